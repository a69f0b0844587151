// D4: extents at and beyond 2^31 and 2^32 bytes. No length wraps anywhere: they are byte exact, or refused
// before anything is stored, with the limit named.
#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <fstream>
#include <set>

#include "depot_fixture.h"
#include "format/extent.h"
#include "format/journal.h"
#include "format/shape.h"
#include "store/catalog.h"
#include "tokendepot/plan.h"

namespace tokendepot::testing {
namespace {

struct Size {
  const char* name;
  uint64_t payload_bytes;
  uint16_t layers;
  uint32_t tokens;  // of 4 KiB each; all of them in one block
};

constexpr Size kSizes[] = {
    {"the_most_that_one_call_of_the_kernel_moves", 2'147'479'552, 1, 524'287},
    {"two_gibibytes", uint64_t{1} << 31, 1, 524'288},
    {"two_gibibytes_and_a_page", (uint64_t{1} << 31) + 4096, 1, 524'289},
    {"four_gibibytes_less_a_page", (uint64_t{1} << 32) - 4096, 1, 1'048'575},
    {"four_gibibytes", uint64_t{1} << 32, 1, 1'048'576},
    {"four_gibibytes_and_a_page", (uint64_t{1} << 32) + 4096, 17, 61'681},
};

GroupShape shape_of(const Size& size) {
  GroupShape shape;
  shape.part = {0, size.layers, 0, 1};
  shape.tokens = size.tokens;
  shape.block_tokens = size.tokens;
  shape.planes = 1;
  shape.row_bytes = 4096;
  return shape;
}

/// A paged cache of two blocks in memory that is only reserved: what is not written takes none and reads as
/// zeros.
class SparseCache {
 public:
  explicit SparseCache(const GroupShape& shape)
      : shape_(shape), layer_bytes_(2 * uint64_t{shape.tokens} * shape.row_bytes) {
    bytes_ = layer_bytes_ * shape.part.layers();
    void* const memory =
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    EXPECT_NE(memory, MAP_FAILED);
    memory_ = static_cast<std::byte*>(memory);
  }
  SparseCache(const SparseCache&) = delete;
  SparseCache& operator=(const SparseCache&) = delete;
  ~SparseCache() { munmap(memory_, bytes_); }

  PagedCache paged() const {
    PagedCache cache;
    cache.shape = shape_;
    cache.block_count = 2;
    for (uint32_t layer = 0; layer < shape_.part.layers(); ++layer) {
      cache.layers.push_back(
          {{memory_ + layer * layer_bytes_, static_cast<int64_t>(layer_bytes_ / 2), 0, shape_.row_bytes, 0}});
    }
    return cache;
  }
  /// Byte `at` of the payload that block 0 or 1 makes.
  std::byte& byte(uint32_t block, uint64_t at) const {
    const uint64_t plane_bytes = layer_bytes_ / 2;
    return memory_[at / plane_bytes * layer_bytes_ + block * plane_bytes + at % plane_bytes];
  }
  uint64_t payload_bytes() const { return bytes_ / 2; }

 private:
  GroupShape shape_;
  uint64_t layer_bytes_;
  uint64_t bytes_;
  std::byte* memory_;
};

class LargeExtent : public ::testing::TestWithParam<Size> {
 protected:
  Options options(const std::string& root, uint64_t capacity) const {
    Options options;
    options.roots = {{.path = root, .capacity_bytes = capacity, .segment_bytes = 1 << 20}};
    options.slab_bytes = 8 << 20;
    options.free_space_reserve = 0;
    return options;
  }
};

TEST_P(LargeExtent, HasTheSizesThatItsShapeMakes) {
  const GroupShape shape = shape_of(GetParam());
  ASSERT_TRUE(check_shape(shape));
  EXPECT_EQ(shape.payload_bytes(), GetParam().payload_bytes);
  EXPECT_EQ(extent_bytes(shape), GetParam().payload_bytes + kPageBytes);
  EXPECT_TRUE(validate(SparseCache(shape).paged()));
}

TEST_P(LargeExtent, KeepsItsLengthInHeaderJournalPlanAndCatalog) {
  const GroupShape shape = shape_of(GetParam());
  const uint64_t bytes = extent_bytes(shape);
  for (const uint64_t offset : {uint64_t{0}, (uint64_t{1} << 31) - 4096, uint64_t{1} << 31,
                                (uint64_t{1} << 32) - 4096, uint64_t{1} << 32}) {
    ExtentHeader header;
    header.set_shape(shape);
    header.offset = offset;
    header.shard_digests.resize(1);
    std::vector<std::byte> page(kPageBytes);
    encode_extent_header(header, page);
    const auto read = decode_extent_header(page);
    ASSERT_TRUE(read) << read.error().message;
    EXPECT_EQ(read->offset, offset);
    EXPECT_EQ(extent_bytes(read->shape()), bytes);

    Record put;
    put.type = RecordType::put;
    put.part = shape.part;
    put.tokens = shape.tokens;
    put.where = {{7, 1}, offset, bytes};
    std::array<std::byte, kRecordBytes> record;
    encode_record(put, record);
    const auto decoded = decode_record(record, 0, 0);
    ASSERT_TRUE(decoded) << decoded.error().message;
    EXPECT_EQ(decoded->where.offset, offset);
    EXPECT_EQ(decoded->where.bytes, bytes);

    LoadPlan plan;
    plan.items.push_back({Key{}, 0, 0, shape.kind, shape.part, shape.tokens, put.where, {0}});
    const auto sent = decode_load_plan(encode(plan));
    ASSERT_TRUE(sent) << sent.error().message;
    EXPECT_EQ(sent->items[0].where.offset, offset);
    EXPECT_EQ(sent->items[0].where.bytes, bytes);

    SegmentTable segments;
    Catalog catalog(segments);
    const PartId part = *catalog.part_id({0, shape.kind, shape.part, shape.tokens});
    const uint32_t slot = segments.slot_of(put.where.segment);
    segments.set_present(slot, 0, offset + bytes);
    catalog.put(Key{}, part, slot, put.where);
    const auto found = catalog.find(Key{}, part);
    ASSERT_TRUE(found);
    EXPECT_EQ(found->offset, offset);
    EXPECT_EQ(found->bytes, bytes);
  }
}

TEST_P(LargeExtent, IsRefusedBeforeAnythingIsStoredWhereNoSegmentOrSlabHoldsIt) {
  const SparseCache cache(shape_of(GetParam()));
  const std::string bytes = std::to_string(extent_bytes(shape_of(GetParam())));
  const TemporaryDirectory memory("/dev/shm");
  const auto small_root = Depot::open(options(memory / "root", 16 << 20));
  ASSERT_TRUE(small_root) << small_root.error().message;
  const auto too_large = (*small_root)->attach(cache.paged());
  ASSERT_FALSE(too_large);
  EXPECT_EQ(too_large.error().kind, ErrorKind::invalid_argument);
  EXPECT_NE(too_large.error().message.find("capacity=16777216"), std::string::npos)
      << too_large.error().message;
  EXPECT_NE(too_large.error().message.find(bytes), std::string::npos) << too_large.error().message;

  const TemporaryDirectory disk("/var/tmp");
  Options buffered = options(disk / "root", 16 << 20);
  buffered.roots[0].transport = TransportChoice::buffered;
  const auto small_slab = Depot::open(buffered);
  ASSERT_TRUE(small_slab) << small_slab.error().message;
  const auto larger_than_slab = (*small_slab)->attach(cache.paged());
  ASSERT_FALSE(larger_than_slab);
  EXPECT_EQ(larger_than_slab.error().kind, ErrorKind::invalid_argument);
  EXPECT_NE(larger_than_slab.error().message.find("slab=8388608"), std::string::npos)
      << larger_than_slab.error().message;
  EXPECT_NE(larger_than_slab.error().message.find(bytes), std::string::npos)
      << larger_than_slab.error().message;
}

class LargeExtentInMotion : public LargeExtent {};

/// What the system could give away without swapping.
uint64_t available_memory() {
  std::ifstream meminfo("/proc/meminfo");
  for (std::string name; meminfo >> name;) {
    uint64_t kibibytes = 0;
    if (name == "MemAvailable:" && meminfo >> kibibytes) return kibibytes << 10;
  }
  return 0;
}

// Takes twice as much memory as the extent has bytes for a moment, so that only the long tests ask for it.
// The reserve keeps the depot from making a second segment of that size ahead.
TEST_P(LargeExtentInMotion, IsByteExactWhereThereIsRoomForIt) {
  if (std::getenv("TOKENDEPOT_LONG_TESTS") == nullptr) GTEST_SKIP() << "one of the long tests";
  const GroupShape shape = shape_of(GetParam());
  const uint64_t bytes = extent_bytes(shape);
  if (available_memory() < 2 * bytes + (2ull << 30)) GTEST_SKIP() << "too little memory is available";
  TemporaryDirectory directory("/dev/shm");
  const uint64_t file_system = 3 * bytes + (64ull << 20);
  if (!directory.mount_tmpfs(fmt::format("size={}", file_system).c_str())) GTEST_SKIP() << "cannot mount";
  Options roomy = options(directory / "root", 3 * bytes + (16 << 20));
  roomy.free_space_reserve = file_system - bytes - bytes / 2;
  roomy.store_queue_bytes = 2 * bytes;
  const SparseCache cache(shape);
  std::set<uint64_t> tagged;  // bytes around both ends and every edge
  for (const uint64_t edge : {uint64_t{0}, uint64_t{1} << 31, uint64_t{1} << 32, shape.payload_bytes()}) {
    for (const int64_t beside : {-4096, -1, 0, 1, 4095}) {
      const uint64_t at = edge + static_cast<uint64_t>(beside);
      if (at < shape.payload_bytes()) tagged.insert(at);
    }
  }
  unsigned tag = 0;
  for (const uint64_t at : tagged) cache.byte(0, at) = static_cast<std::byte>(++tag);
  Key key{};
  for (int restarted = 0; restarted < 2; ++restarted) {
    roomy.writer = restarted == 0;  // a second writer would evict the one extent to have space ready
    auto depot = Depot::open(roomy);
    ASSERT_TRUE(depot) << depot.error().message;
    const auto ns = (*depot)->register_namespace(R"({"model":"m"})");
    ASSERT_TRUE((*depot)->attach(cache.paged()));
    key = prompt_keys(*ns, 1, 1)[0];
    const GroupWant want = want_of(shape);
    bool stored = restarted == 1;
    for (uint64_t job = 0; job < 200 && !stored; ++job) {
      StorePlan plan;
      plan.ns = *ns;
      plan.items.push_back({key, 0, 0, {0}});
      ASSERT_TRUE((*depot)->submit_store(job, plan));
      stored = wait_for(**depot, job, 120s).items_ok == 1;
      if (!stored) usleep(50'000);
    }
    ASSERT_TRUE(stored);
    ASSERT_EQ((*depot)->longest_prefix(std::span(&key, 1), std::span(&want, 1)), 1u);
    // Only the tagged pages of block 1 are compared; the digests speak for the zeros in between.
    const std::vector<int32_t> blocks{1};
    const Depot::LoadGroup group{want, 0, 1, blocks};
    const auto plan = (*depot)->plan_load(*ns, std::span(&key, 1), std::span(&group, 1), 0s);
    ASSERT_TRUE(plan) << plan.error().message;
    EXPECT_EQ(plan->items[0].where.bytes, bytes);
    ASSERT_TRUE((*depot)->submit_load(1000, *plan));
    const Completion done = wait_for(**depot, 1000, 120s);
    ASSERT_EQ(done.items_ok, 1u) << (done.failures.empty() ? "" : name(done.failures[0].reason));
    EXPECT_EQ(done.bytes, bytes);
    for (const uint64_t at : tagged) {
      EXPECT_EQ(cache.byte(1, at), cache.byte(0, at)) << "byte " << at;
      cache.byte(1, at) = std::byte{0xEE};
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, LargeExtent, ::testing::ValuesIn(kSizes),
                         [](const auto& size) { return std::string(size.param.name); });
INSTANTIATE_TEST_SUITE_P(Sizes, LargeExtentInMotion, ::testing::Values(kSizes[0], kSizes[2], kSizes[5]),
                         [](const auto& size) { return std::string(size.param.name); });

TEST(LargeSizes, OptionsThatWouldWrapAroundAreRefusedOrHonoured) {
  const TemporaryDirectory directory("/dev/shm");
  for (const uint64_t segment : {UINT64_MAX, UINT64_MAX / 3 + 2, uint64_t{1} << 63, uint64_t{1} << 32}) {
    Options options;
    options.roots = {{.path = directory / "root", .capacity_bytes = 16 << 20, .segment_bytes = segment}};
    const auto refused = Depot::open(options);
    ASSERT_FALSE(refused) << segment;
    EXPECT_EQ(refused.error().kind, ErrorKind::invalid_argument);
    EXPECT_NE(refused.error().message.find(std::to_string(segment)), std::string::npos)
        << refused.error().message;
  }
  // Keeping all of the file system free must not be taken for keeping nothing free.
  Options reserved;
  reserved.roots = {{.path = directory / "root", .capacity_bytes = 16 << 20, .segment_bytes = 1 << 20}};
  reserved.free_space_reserve = UINT64_MAX;
  const auto depot = Depot::open(reserved);
  ASSERT_TRUE(depot) << depot.error().message;
  const auto ns = (*depot)->register_namespace(R"({"model":"m"})");
  HostCache cache(small_shape(), 4);
  ASSERT_TRUE((*depot)->attach(cache.paged()));
  for (int i = 0; i < 200 && !(*depot)->stats().roots[0].suspended; ++i) usleep(10'000);
  EXPECT_EQ(store_chunks(**depot, 1, *ns, prompt_keys(*ns, 1, 1), 0, 1).items_ok, 0u);
}

}  // namespace
}  // namespace tokendepot::testing
