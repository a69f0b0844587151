// The reading half of an export file: what is sound and not in the target yet takes the way of a store.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>

#include "base/clock.h"
#include "base/errors.h"
#include "format/export_file.h"
#include "format/manifest.h"
#include "format/shape.h"
#include "io/stream.h"
#include "root_files.h"
#include "store/extent_check.h"
#include "store/root_writer.h"
#include "tokendepot/export.h"

namespace tokendepot {
namespace {

constexpr std::string_view kSource = "the export file";

/// What came of a stream and was not used yet, at addresses that direct I/O accepts.
class Window {
 public:
  explicit Window(int fd) : fd_(fd) {}

  /// Has at least `bytes` there unless the stream ends before. False: it does.
  Result<bool> fill(uint64_t bytes) {
    if (bytes <= size_) return true;
    if (begin_ + bytes > capacity_) {
      const uint64_t wanted = std::max(align_up(bytes), kLeast);
      std::unique_ptr<std::byte, void (*)(void*)> fresh(
          static_cast<std::byte*>(std::aligned_alloc(kPageBytes, wanted)), &std::free);
      if (!fresh) return fail(ErrorKind::io, "no memory for {} bytes of {}", wanted, kSource);
      if (size_ > 0) std::memcpy(fresh.get(), memory_.get() + begin_, size_);
      memory_ = std::move(fresh);
      capacity_ = wanted;
      begin_ = 0;
    }
    const auto count = read_stream(fd_, {memory_.get() + begin_ + size_, bytes - size_});
    if (!count) return std::unexpected(count.error());
    size_ += *count;
    return size_ >= bytes;
  }
  std::span<std::byte> bytes() const { return {memory_.get() + begin_, size_}; }
  /// Goes on behind the first `count` bytes, whole pages while the stream lasts.
  void drop(uint64_t count) {
    begin_ += count;
    size_ -= count;
    consumed_ += count;
    if (size_ == 0) begin_ = 0;
  }
  uint64_t consumed() const { return consumed_; }

 private:
  static constexpr uint64_t kLeast = 1 << 20;
  const int fd_;
  std::unique_ptr<std::byte, void (*)(void*)> memory_{nullptr, &std::free};
  uint64_t capacity_ = 0;
  uint64_t begin_ = 0;
  uint64_t size_ = 0;
  uint64_t consumed_ = 0;
};

class FileImporter final : public Importer {
 public:
  explicit FileImporter(int fd) : window_(fd) {}

  Status read_front();
  Status open_target(const RootOptions& target, bool create, uint64_t free_space_reserve);

  Result<bool> go_on(uint64_t bytes) override;
  const ImportReport& report() const override { return report_; }

 private:
  enum class Taken : uint8_t { stored, present, damaged, no_room };

  /// What to do with the extent at the front of the window.
  Result<Taken> take(const ExtentHeader& header, uint64_t bytes);
  Result<std::optional<RootWriter::Place>> reserve(uint64_t bytes);
  bool has_room_for_segment() const;
  Status read_end();
  void note_seen(const ExtentHeader& header, uint64_t bytes);

  Window window_;
  Manifest manifest_;
  uint64_t header_digest_ = 0;
  std::vector<ExportEntry> seen_;
  ImportReport report_;
  bool ended_ = false;

  uint64_t free_space_reserve_ = 0;
  std::unique_ptr<Root> root_;
  SegmentTable segments_;
  Catalog catalog_{segments_};
  std::unique_ptr<Replay> replay_;
  std::unique_ptr<RootWriter> writer_;  // from the first extent on that is stored
};

Status FileImporter::read_front() {
  const auto whole = window_.fill(kPageBytes);
  if (!whole) return std::unexpected(whole.error());
  const auto page = window_.bytes();
  const auto header = decode_export_header(page.first(std::min<size_t>(page.size(), kPageBytes)));
  if (!header) {
    // Whatever is wrong with the first page, nothing of the file can be used: it is the wrong file.
    const bool other = header.error().kind == ErrorKind::unsupported;
    return fail(other ? ErrorKind::unsupported : ErrorKind::invalid_argument, "{}", header.error().message);
  }
  header_digest_ = export_header_digest(page.first<kPageBytes>());
  report_.ns = header->ns;
  report_.planned_extents = header->extents;
  report_.planned_bytes = header->bytes;
  window_.drop(kPageBytes);

  const uint64_t padded = align_up(header->manifest_bytes);
  const auto there = window_.fill(padded);
  if (!there) return std::unexpected(there.error());
  if (!*there) return fail(ErrorKind::invalid_argument, "{} ends within its manifest", kSource);
  const std::string_view text(reinterpret_cast<const char*>(window_.bytes().data()), header->manifest_bytes);
  auto manifest = check_manifest(text, header->ns);
  if (!manifest) {
    return fail(ErrorKind::invalid_argument, "the manifest of {}: {}", kSource, manifest.error().message);
  }
  manifest_ = std::move(*manifest);
  report_.manifest = manifest_.canonical;
  window_.drop(padded);
  report_.file_bytes = window_.consumed();
  return {};
}

Status FileImporter::open_target(const RootOptions& target, bool create, uint64_t free_space_reserve) {
  const auto marker = read_marker(target.path);
  if (!marker && !(create && marker.error().kind == ErrorKind::not_found))
    return std::unexpected(marker.error());
  auto root = Root::open(target, 0, Options());
  if (!root) return std::unexpected(root.error());
  if (!(*root)->writable()) {
    return fail(ErrorKind::permission, "root \"{}\" cannot be written", target.path);
  }
  root_ = std::move(*root);
  free_space_reserve_ = free_space_reserve;
  replay_ = std::make_unique<Replay>(*root_, segments_, &catalog_);
  return replay_->first();
}

bool FileImporter::has_room_for_segment() const {
  const auto entries = list_directory(root_->segments_dir());
  const auto system = file_system_of(root_->path());
  if (!entries || !system) return false;
  uint64_t used = 0;
  for (const DirectoryEntry& entry : *entries) used += entry.bytes;
  const uint64_t wanted = root_->segment_bytes();
  return used <= root_->capacity() && wanted <= root_->capacity() - used &&
         free_space_reserve_ <= system->available_bytes &&
         wanted <= system->available_bytes - free_space_reserve_;
}

Result<std::optional<RootWriter::Place>> FileImporter::reserve(uint64_t bytes) {
  while (true) {
    auto place = writer_->reserve(bytes);
    if (place) return std::optional(std::move(*place));
    if (place.error().kind != ErrorKind::busy && place.error().kind != ErrorKind::no_space)
      return std::unexpected(place.error());
    writer_->leave_spoilt_segments();
    // Asked before, because the writer makes room by eviction: what engines use here is worth more than what
    // somebody else used.
    if (!has_room_for_segment()) return std::optional<RootWriter::Place>();
    if (auto ready = writer_->prepare_spare({}); !ready) {
      if (ready.error().kind == ErrorKind::no_space) return std::optional<RootWriter::Place>();
      return std::unexpected(ready.error());
    }
  }
}

Result<FileImporter::Taken> FileImporter::take(const ExtentHeader& header, uint64_t bytes) {
  const auto part = catalog_.part_id({header.group, header.kind, header.part, header.tokens});
  if (part && catalog_.find(header.key, *part)) return Taken::present;
  const auto extent = window_.bytes().first(bytes);
  if (!check_payload(header, extent, "")) return Taken::damaged;
  if (auto fits = root_->fit_extent(bytes); !fits) {
    report_.reason = fits.error().message;
    return Taken::no_room;
  }
  if (!writer_) {
    if (auto kept = root_->keep_manifest(manifest_); !kept) return std::unexpected(kept.error());
    auto writer = RootWriter::open(*root_, *replay_, segments_, system_clock(), free_space_reserve_);
    if (!writer) return std::unexpected(writer.error());
    writer_ = std::move(*writer);
  }
  auto place = reserve(bytes);
  if (!place) return std::unexpected(place.error());
  if (!*place) {
    report_.reason = fmt::format(
        "root \"{}\": a new segment of {} bytes would exceed capacity={} or leave less than {} bytes free; "
        "nothing is evicted for an import",
        root_->path(), root_->segment_bytes(), root_->capacity(), free_space_reserve_);
    return Taken::no_room;
  }
  ExtentHeader here = header;
  here.segment = (*place)->where.segment;
  here.offset = (*place)->where.offset;
  encode_extent_header(here, extent);
  if (auto written = (*place)->segment->file.write_at(extent, here.offset); !written)
    return std::unexpected(written.error());
  Record put;
  put.kind = header.kind;
  put.group = header.group;
  put.key = header.key;
  put.ns_prefix = prefix_of(header.ns);
  put.part = header.part;
  put.tokens = header.tokens;
  if (auto known = writer_->acknowledge(**place, put); !known) return std::unexpected(known.error());
  return Taken::stored;
}

void FileImporter::note_seen(const ExtentHeader& header, uint64_t bytes) {
  seen_.push_back({.key = header.key,
                   .offset = window_.consumed(),
                   .bytes = bytes,
                   .header_digest = extent_header_digest(window_.bytes()),
                   .group = header.group});
}

Status FileImporter::read_end() {
  const uint64_t offset = window_.consumed();
  // Grows with what comes, not with what is claimed; one byte more would be behind the end.
  const uint64_t most = 64 * (kMaxExportedExtents + 1);
  bool more = true;
  for (uint64_t wanted = 1 << 20; more && wanted <= 2 * most; wanted *= 2) {
    const auto filled = window_.fill(wanted);
    if (!filled) return std::unexpected(filled.error());
    more = *filled;
  }
  const auto index = decode_export_index(window_.bytes(), offset, header_digest_);
  window_.drop(window_.bytes().size());
  if (!index) {
    report_.reason = index.error().message;
    return {};
  }
  // Both are in the order of the file.
  size_t missing = 0;
  size_t at = 0;
  for (const ExportEntry& entry : *index) {
    while (at < seen_.size() && seen_[at].offset < entry.offset) ++at;
    if (at == seen_.size() || seen_[at] != entry) ++missing;
  }
  report_.damaged += missing;
  report_.whole = report_.damaged == 0 && report_.junk_bytes == 0;
  if (!report_.whole) report_.reason = "some of its bytes are not what was exported";
  return {};
}

Result<bool> FileImporter::go_on(uint64_t bytes) {
  const uint64_t until = window_.consumed() + bytes;
  replay_->poll();  // what engines stored meanwhile needs no second copy
  while (!ended_ && window_.consumed() < until) {
    if (auto filled = window_.fill(kPageBytes); !filled) return std::unexpected(filled.error());
    ExportPiece piece = next_export_piece(window_.bytes(), report_.ns);
    if (piece.kind == ExportPiece::Kind::more) {
      if (auto filled = window_.fill(piece.bytes); !filled) return std::unexpected(filled.error());
      piece = next_export_piece(window_.bytes(), report_.ns);
      if (piece.kind == ExportPiece::Kind::more) piece = ExportPiece();
    }
    if (piece.kind == ExportPiece::Kind::index) {
      ended_ = true;
      if (auto read = read_end(); !read) return std::unexpected(read.error());
      break;
    }
    if (window_.bytes().empty()) {
      ended_ = true;
      report_.reason = "it ends without index and trailing digest";
      break;
    }
    bool whole = false;
    if (piece.kind == ExportPiece::Kind::extent) {
      const auto filled = window_.fill(piece.bytes);
      if (!filled) return std::unexpected(filled.error());
      whole = *filled;
    }
    if (!whole) {
      const uint64_t junk = std::min<uint64_t>(kPageBytes, window_.bytes().size());
      report_.junk_bytes += junk;
      window_.drop(junk);
      continue;
    }
    note_seen(*piece.header, piece.bytes);
    const auto taken = take(*piece.header, piece.bytes);
    if (!taken) return std::unexpected(taken.error());
    if (*taken == Taken::no_room) {
      report_.full = ended_ = true;
      break;
    }
    report_.imported += *taken == Taken::stored;
    report_.imported_bytes += *taken == Taken::stored ? piece.bytes : 0;
    report_.present += *taken == Taken::present;
    report_.damaged += *taken == Taken::damaged;
    window_.drop(piece.bytes);
  }
  report_.file_bytes = window_.consumed();
  return !ended_;
}

}  // namespace

Result<std::unique_ptr<Importer>> Importer::begin(int fd, const RootOptions& target, bool create,
                                                  uint64_t free_space_reserve) {
  auto importer = std::make_unique<FileImporter>(fd);
  if (auto read = importer->read_front(); !read) return std::unexpected(read.error());
  if (auto opened = importer->open_target(target, create, free_space_reserve); !opened)
    return std::unexpected(opened.error());
  return importer;
}

}  // namespace tokendepot
