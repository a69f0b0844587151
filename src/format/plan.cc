#include "tokendepot/plan.h"

#include <string_view>

#include "base/bytes.h"
#include "base/errors.h"
#include "format/digest.h"
#include "format/shape.h"

namespace tokendepot {
namespace {

constexpr uint32_t kPlanVersion = 1;
constexpr std::string_view kLoadMagic = "TDLOADPL";
constexpr std::string_view kStoreMagic = "TDSTORPL";
constexpr size_t kHeadBytes = 56;       // magic, version, item count, namespace, deadline
constexpr size_t kLoadItemBytes = 84;   // without blocks
constexpr size_t kStoreItemBytes = 44;  // without blocks
constexpr size_t kDigestBytes = 8;

class Writer {
 public:
  explicit Writer(size_t bytes) { out_.reserve(bytes); }

  template <typename T>
  void put(T value) {
    const size_t at = out_.size();
    out_.resize(at + sizeof(T));
    put_le<T>(out_, at, value);
  }
  void put_bytes(std::span<const std::byte> bytes) { out_.insert(out_.end(), bytes.begin(), bytes.end()); }
  void put_blocks(std::span<const int32_t> blocks) {
    put(static_cast<uint32_t>(blocks.size()));
    put_bytes(std::as_bytes(blocks));
  }
  std::vector<std::byte> finish() {
    put(xxh3(out_));
    return std::move(out_);
  }

 private:
  std::vector<std::byte> out_;
};

// Reads forward; asking for more than is left makes every later answer zero and ok() false.
class Reader {
 public:
  explicit Reader(std::span<const std::byte> in) : in_(in) {}

  bool ok() const { return ok_; }
  size_t left() const { return in_.size(); }

  template <typename T>
  T get() {
    const std::span<const std::byte> bytes = take(sizeof(T));
    return bytes.empty() ? T{0} : get_le<T>(bytes, 0);
  }
  template <typename Digest>
  Digest get_digest() {
    Digest digest;
    if (const auto bytes = take(digest.bytes.size()); !bytes.empty()) {
      std::memcpy(digest.bytes.data(), bytes.data(), bytes.size());
    }
    return digest;
  }
  std::vector<int32_t> get_blocks() {
    const auto count = get<uint32_t>();
    const std::span<const std::byte> bytes = take(uint64_t{4} * count);
    std::vector<int32_t> blocks(bytes.size() / 4);
    if (!blocks.empty()) std::memcpy(blocks.data(), bytes.data(), bytes.size());
    return blocks;
  }

 private:
  std::span<const std::byte> take(uint64_t bytes) {
    if (!ok_ || bytes > in_.size()) {
      ok_ = false;
      return {};
    }
    const std::span<const std::byte> taken = in_.first(bytes);
    in_ = in_.subspan(bytes);
    return taken;
  }

  std::span<const std::byte> in_;
  bool ok_ = true;
};

void put_head(Writer& out, std::string_view magic, size_t items, const NamespaceDigest& ns,
              uint64_t deadline_ns) {
  out.put_bytes(std::as_bytes(std::span(magic)));
  out.put(kPlanVersion);
  out.put(static_cast<uint32_t>(items));
  out.put_bytes(std::as_bytes(std::span(ns.bytes)));
  out.put(deadline_ns);
}

struct Head {
  NamespaceDigest ns;
  uint64_t deadline_ns;
  uint32_t items;
  Reader rest;  // the items
};

Result<Head> get_head(std::span<const std::byte> bytes, std::string_view magic, size_t least_item_bytes) {
  if (bytes.size() < kHeadBytes + kDigestBytes ||
      std::memcmp(bytes.data(), magic.data(), magic.size()) != 0) {
    return fail(ErrorKind::corrupt, "plan of {} bytes does not start with the magic {}", bytes.size(), magic);
  }
  const auto version = get_le<uint32_t>(bytes, magic.size());
  if (version != kPlanVersion) {
    return fail(ErrorKind::unsupported, "plan has version {}, this program reads version {}", version,
                kPlanVersion);
  }
  const std::span<const std::byte> body = bytes.first(bytes.size() - kDigestBytes);
  const auto stored = get_le<uint64_t>(bytes, body.size());
  const uint64_t digest = xxh3(body);
  if (stored != digest) {
    return fail(ErrorKind::corrupt, "plan has digest {:016x}, its bytes give {:016x}", stored, digest);
  }
  Reader in(body.subspan(magic.size() + sizeof(version)));
  Head head{.ns = {}, .deadline_ns = 0, .items = in.get<uint32_t>(), .rest = in};
  head.ns = head.rest.get_digest<NamespaceDigest>();
  head.deadline_ns = head.rest.get<uint64_t>();
  if (head.items > head.rest.left() / least_item_bytes) {
    return fail(ErrorKind::corrupt, "plan says {} items, its {} bytes cannot hold them", head.items,
                bytes.size());
  }
  return head;
}

Status check_end(const Reader& in, size_t item) {
  if (!in.ok()) return fail(ErrorKind::corrupt, "plan ends within item {}", item);
  return {};
}

Status check_blocks(std::span<const int32_t> blocks, int32_t least, size_t item) {
  for (const int32_t block : blocks) {
    if (block < least) {
      return fail(ErrorKind::corrupt, "plan item {} has block id {}, at least {} is needed", item, block,
                  least);
    }
  }
  return {};
}

Status check_load_item(const LoadItem& item, size_t index) {
  if (item.kind != LayoutKind::canonical && item.kind != LayoutKind::opaque) {
    return fail(ErrorKind::corrupt, "plan item {} has layout kind {}, known are 1 and 2", index,
                static_cast<unsigned>(item.kind));
  }
  if (item.part.layer_begin >= item.part.layer_end || item.part.head_begin >= item.part.head_end ||
      item.tokens < 1 || item.tokens > kMaxTokens) {
    return fail(ErrorKind::corrupt,
                "plan item {} has layers {} to {}, heads {} to {}, {} tokens; none may be empty", index,
                item.part.layer_begin, item.part.layer_end, item.part.head_begin, item.part.head_end,
                item.tokens);
  }
  const ExtentRef& where = item.where;
  if (where.offset % kPageBytes != 0 || where.offset > kMaxOffset || where.bytes % kPageBytes != 0 ||
      where.bytes == 0 || where.bytes > kMaxOffset) {
    return fail(ErrorKind::corrupt, "plan item {} has offset {} and {} bytes, expected multiples of {}",
                index, where.offset, where.bytes, kPageBytes);
  }
  return check_blocks(item.blocks, kSkipBlock, index);
}

}  // namespace

std::vector<std::byte> encode(const LoadPlan& plan) {
  size_t bytes = kHeadBytes + kDigestBytes;
  for (const LoadItem& item : plan.items) bytes += kLoadItemBytes + 4 * item.blocks.size();
  Writer out(bytes);
  put_head(out, kLoadMagic, plan.items.size(), plan.ns, plan.deadline_ns);
  for (const LoadItem& item : plan.items) {
    out.put_bytes(std::as_bytes(std::span(item.key.bytes)));
    out.put(item.chunk);
    out.put(item.group);
    out.put(static_cast<uint8_t>(item.kind));
    out.put(uint8_t{0});
    out.put(item.part.layer_begin);
    out.put(item.part.layer_end);
    out.put(item.part.head_begin);
    out.put(item.part.head_end);
    out.put(item.tokens);
    out.put(item.where.segment.sequence);
    out.put(item.where.segment.writer);
    out.put(item.where.offset);
    out.put(item.where.bytes);
    out.put_blocks(item.blocks);
  }
  return out.finish();
}

std::vector<std::byte> encode(const StorePlan& plan) {
  size_t bytes = kHeadBytes + kDigestBytes;
  for (const StoreItem& item : plan.items) bytes += kStoreItemBytes + 4 * item.blocks.size();
  Writer out(bytes);
  put_head(out, kStoreMagic, plan.items.size(), plan.ns, 0);
  for (const StoreItem& item : plan.items) {
    out.put_bytes(std::as_bytes(std::span(item.key.bytes)));
    out.put(item.chunk);
    out.put(item.group);
    out.put(uint16_t{0});
    out.put_blocks(item.blocks);
  }
  return out.finish();
}

Result<LoadPlan> decode_load_plan(std::span<const std::byte> bytes) {
  Result<Head> head = get_head(bytes, kLoadMagic, kLoadItemBytes);
  if (!head) return std::unexpected(std::move(head.error()));
  LoadPlan plan{.ns = head->ns, .deadline_ns = head->deadline_ns, .items = {}};
  plan.items.reserve(head->items);
  Reader& in = head->rest;
  for (uint32_t i = 0; i < head->items; ++i) {
    LoadItem item;
    item.key = in.get_digest<Key>();
    item.chunk = in.get<uint32_t>();
    item.group = in.get<uint16_t>();
    item.kind = static_cast<LayoutKind>(in.get<uint8_t>());
    const auto reserved = in.get<uint8_t>();
    item.part.layer_begin = in.get<uint16_t>();
    item.part.layer_end = in.get<uint16_t>();
    item.part.head_begin = in.get<uint16_t>();
    item.part.head_end = in.get<uint16_t>();
    item.tokens = in.get<uint32_t>();
    item.where.segment.sequence = in.get<uint32_t>();
    item.where.segment.writer = in.get<uint64_t>();
    item.where.offset = in.get<uint64_t>();
    item.where.bytes = in.get<uint64_t>();
    item.blocks = in.get_blocks();
    if (Status ok = check_end(in, i); !ok) return std::unexpected(std::move(ok.error()));
    if (reserved != 0)
      return fail(ErrorKind::corrupt, "plan item {} has reserved bytes that are not zero", i);
    if (Status ok = check_load_item(item, i); !ok) return std::unexpected(std::move(ok.error()));
    plan.items.push_back(std::move(item));
  }
  if (in.left() != 0) return fail(ErrorKind::corrupt, "plan has {} bytes behind its last item", in.left());
  return plan;
}

Result<StorePlan> decode_store_plan(std::span<const std::byte> bytes) {
  Result<Head> head = get_head(bytes, kStoreMagic, kStoreItemBytes);
  if (!head) return std::unexpected(std::move(head.error()));
  if (head->deadline_ns != 0) return fail(ErrorKind::corrupt, "plan has reserved bytes that are not zero");
  StorePlan plan{.ns = head->ns, .items = {}};
  plan.items.reserve(head->items);
  Reader& in = head->rest;
  for (uint32_t i = 0; i < head->items; ++i) {
    StoreItem item;
    item.key = in.get_digest<Key>();
    item.chunk = in.get<uint32_t>();
    item.group = in.get<uint16_t>();
    const auto reserved = in.get<uint16_t>();
    item.blocks = in.get_blocks();
    if (Status ok = check_end(in, i); !ok) return std::unexpected(std::move(ok.error()));
    if (reserved != 0)
      return fail(ErrorKind::corrupt, "plan item {} has reserved bytes that are not zero", i);
    if (Status ok = check_blocks(item.blocks, 0, i); !ok) return std::unexpected(std::move(ok.error()));
    plan.items.push_back(std::move(item));
  }
  if (in.left() != 0) return fail(ErrorKind::corrupt, "plan has {} bytes behind its last item", in.left());
  return plan;
}

}  // namespace tokendepot
