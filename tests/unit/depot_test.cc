// The engine as its users meet it: store, look up, load, restart, damage, share, run out of space.
#include "tokendepot/depot.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <fstream>
#include <map>
#include <set>
#include <thread>

#include "depot_fixture.h"
#include "forked_child.h"

namespace tokendepot::testing {
namespace {

constexpr uint32_t kBlocks = 256;

/// "tmpfs" = mapped transport, "disk" = direct (or buffered where direct I/O is refused).
class DepotOn : public ::testing::TestWithParam<std::string> {
 protected:
  DepotOn() : directory_(GetParam() == "tmpfs" ? "/dev/shm" : "/tmp"), cache_(small_shape(), kBlocks) {}

  Options options(uint64_t capacity = 64 << 20) {
    Options options;
    RootOptions root;
    root.path = directory_.path() + "/root";
    root.capacity_bytes = capacity;
    root.segment_bytes = 1 << 20;
    options.roots.push_back(root);
    options.slab_bytes = 16 << 20;
    options.poll_ms = 20;
    options.free_space_reserve = 0;
    options.scrub_bytes_per_second = 0;  // it would find planted damage before a load does
    return options;
  }
  std::unique_ptr<Depot> open() { return open(options()); }
  std::unique_ptr<Depot> open(const Options& with) {
    auto depot = Depot::open(with);
    EXPECT_TRUE(depot) << (depot ? "" : depot.error().message);
    if (!depot) std::abort();
    const auto ns = (*depot)->register_namespace(R"({"model":"m"})");
    EXPECT_TRUE(ns);
    ns_ = *ns;
    return std::move(*depot);
  }
  std::vector<std::string> segment_files() {
    std::vector<std::string> files;
    for (const auto& entry : std::filesystem::directory_iterator(directory_.path() + "/root/segments")) {
      files.push_back(entry.path());
    }
    return files;
  }
  /// Counted by inode: a file may be renamed, or go, between listing and looking.
  uint64_t bytes_in_segments() {
    std::map<uint64_t, uint64_t> found;
    for (const std::string& file : segment_files()) {
      struct stat status;
      if (stat(file.c_str(), &status) == 0) found[status.st_ino] = static_cast<uint64_t>(status.st_size);
    }
    uint64_t total = 0;
    for (const auto& [inode, bytes] : found) total += bytes;
    return total;
  }
  std::string file_of(const SegmentId& id) const {
    char name[64];
    std::snprintf(name, sizeof name, "/root/segments/%016llx-%08x.seg",
                  static_cast<unsigned long long>(id.writer), id.sequence);
    return directory_.path() + name;
  }
  void flip(const std::string& file, uint64_t offset) {
    const int fd = ::open(file.c_str(), O_RDWR);
    ASSERT_GE(fd, 0);
    char byte = 0;
    ASSERT_EQ(pread(fd, &byte, 1, static_cast<off_t>(offset)), 1);
    byte = static_cast<char>(byte ^ 0x10);
    ASSERT_EQ(pwrite(fd, &byte, 1, static_cast<off_t>(offset)), 1);
    close(fd);
  }

  TemporaryDirectory directory_;
  HostCache cache_;
  NamespaceDigest ns_;
};

TEST_P(DepotOn, StoredChunksComeBackByteForByteInOtherBlocks) {
  auto depot = open();
  ASSERT_TRUE(depot->attach(cache_.paged()));
  cache_.fill(1);
  const auto keys = prompt_keys(ns_, 1, 8);
  EXPECT_EQ(depot->longest_prefix(keys, std::vector{want_of(small_shape())}), 0u);
  EXPECT_EQ(store_chunks(*depot, 1, ns_, keys, 0, 8).items_ok, 8u);
  std::vector<std::vector<std::byte>> before;
  for (int32_t b = 0; b < 32; ++b) before.push_back(cache_.block(b));
  EXPECT_EQ(depot->longest_prefix(keys, std::vector{want_of(small_shape())}), 8u);
  cache_.clear();
  const auto plan = plan_chunks(*depot, ns_, keys, want_of(small_shape()), 0, 8, 100);
  ASSERT_TRUE(plan) << plan.error().message;
  ASSERT_TRUE(depot->submit_load(2, *plan));
  const Completion done = wait_for(*depot, 2);
  EXPECT_EQ(done.items_ok, 8u);
  EXPECT_TRUE(done.failures.empty());
  for (int32_t b = 0; b < 32; ++b)
    EXPECT_EQ(cache_.block(100 + b), before[static_cast<size_t>(b)]) << "block " << b;
  EXPECT_EQ(cache_.block(99), std::vector<std::byte>(cache_.block(99).size(), std::byte{0xEE}));
}

TEST_P(DepotOn, RestartServesEveryAcknowledgedChunk) {
  {
    auto depot = open();
    ASSERT_TRUE(depot->attach(cache_.paged()));
    cache_.fill(2);
    const auto keys = prompt_keys(ns_, 2, 40);
    EXPECT_EQ(store_chunks(*depot, 1, ns_, keys, 0, 40).items_ok, 40u);
  }
  auto depot = open();
  ASSERT_TRUE(depot->attach(cache_.paged()));
  const auto keys = prompt_keys(ns_, 2, 41);
  EXPECT_EQ(depot->longest_prefix(keys, std::vector{want_of(small_shape())}), 40u);
  const auto expected = cache_.block(17);
  cache_.clear();
  const auto plan = plan_chunks(*depot, ns_, keys, want_of(small_shape()), 4, 5, 200);
  ASSERT_TRUE(plan);
  ASSERT_TRUE(depot->submit_load(7, *plan));
  EXPECT_EQ(wait_for(*depot, 7).items_ok, 1u);
  EXPECT_EQ(cache_.block(201), expected);
}

TEST_P(DepotOn, AFlippedByteIsAMissOfThatChunkOnlyAndAReputHeals) {
  auto depot = open();
  ASSERT_TRUE(depot->attach(cache_.paged()));
  cache_.fill(3);
  const auto keys = prompt_keys(ns_, 3, 4);
  const auto want = want_of(small_shape());
  ASSERT_EQ(store_chunks(*depot, 1, ns_, keys, 0, 4).items_ok, 4u);
  const auto plan = plan_chunks(*depot, ns_, keys, want, 0, 4, 100);
  ASSERT_TRUE(plan);
  const ExtentRef& victim = plan->items[1].where;
  flip(file_of(victim.segment), victim.offset + 4096 + 1000);
  cache_.clear();
  ASSERT_TRUE(depot->submit_load(2, *plan));
  const Completion done = wait_for(*depot, 2);
  EXPECT_EQ(done.items_ok, 3u);
  ASSERT_EQ(done.failures.size(), 1u);
  EXPECT_EQ(done.failures[0].chunk, 1u);
  EXPECT_EQ(done.failures[0].reason, ItemFailure::Reason::corrupt);
  for (int32_t b = 104; b < 108; ++b) {
    EXPECT_EQ(cache_.block(b), std::vector<std::byte>(cache_.block(b).size(), std::byte{0xEE}))
        << "nothing is written";
  }
  EXPECT_EQ(depot->longest_prefix(keys, std::vector{want}), 1u) << "condemned, not promised again";
  cache_.fill(3);
  EXPECT_EQ(store_chunks(*depot, 3, ns_, keys, 1, 2).items_ok, 1u);
  EXPECT_EQ(depot->longest_prefix(keys, std::vector{want}), 4u);
}

TEST_P(DepotOn, TruncatedSegmentsAreMissesAndTheProcessLives) {
  auto depot = open();
  ASSERT_TRUE(depot->attach(cache_.paged()));
  cache_.fill(4);
  const auto keys = prompt_keys(ns_, 4, 6);
  ASSERT_EQ(store_chunks(*depot, 1, ns_, keys, 0, 6).items_ok, 6u);
  const auto plan = plan_chunks(*depot, ns_, keys, want_of(small_shape()), 0, 6, 100);
  ASSERT_TRUE(plan);
  for (const std::string& file : segment_files()) std::filesystem::resize_file(file, 0);
  ASSERT_TRUE(depot->submit_load(2, *plan));
  const Completion done = wait_for(*depot, 2);
  EXPECT_EQ(done.items_ok, 0u);
  EXPECT_EQ(done.failures.size(), 6u);
  for (const ItemFailure& failure : done.failures) EXPECT_EQ(failure.reason, ItemFailure::Reason::absent);
  EXPECT_EQ(depot->longest_prefix(keys, std::vector{want_of(small_shape())}), 0u);
}

TEST_P(DepotOn, ARootThatVanishesWhileServingIsMissesAndStoresStopQuietly) {
  auto depot = open();
  ASSERT_TRUE(depot->attach(cache_.paged()));
  cache_.fill(5);
  const auto keys = prompt_keys(ns_, 5, 6);
  ASSERT_EQ(store_chunks(*depot, 1, ns_, keys, 0, 6).items_ok, 6u);
  // The keeper may be making the next segment: removing goes on until it finds no directory to make one in.
  std::error_code refused;
  for (int i = 0; i < 1000 && std::filesystem::exists(directory_.path() + "/root"); ++i)
    std::filesystem::remove_all(directory_.path() + "/root", refused);
  uint64_t job = 2;
  uint64_t dropped = 0;
  for (uint32_t prompt = 0; prompt < 8; ++prompt) {
    cache_.fill(100 + prompt);
    dropped += store_chunks(*depot, job++, ns_, prompt_keys(ns_, 100 + prompt, 32), 0, 32).failures.size();
    usleep(30'000);
  }
  EXPECT_GT(dropped, 0u) << "segments that are open are filled, new ones cannot be had";
  depot.reset();
  EXPECT_FALSE(std::filesystem::exists(directory_.path() + "/root"));
}

TEST_P(DepotOn, TheColdestSegmentsGoAndTheCapacityHolds) {
  Options at_once = options(4 << 20);
  at_once.eviction_grace_ms = 0;
  auto depot = open(at_once);
  ASSERT_TRUE(depot->attach(cache_.paged()));
  cache_.fill(6);
  const auto want = want_of(small_shape());
  uint64_t job = 1;
  for (uint32_t prompt = 0; prompt < 60; ++prompt) {
    const auto keys = prompt_keys(ns_, 1000 + prompt, 8);
    store_until_all_are(*depot, job, ns_, keys, 0, 8);
    EXPECT_LE(bytes_in_segments(), 4u << 20);
  }
  EXPECT_EQ(depot->longest_prefix(prompt_keys(ns_, 1059, 8), std::vector{want}), 8u) << "the newest is there";
  EXPECT_EQ(depot->longest_prefix(prompt_keys(ns_, 1000, 8), std::vector{want}), 0u) << "the oldest is gone";
  const DepotStats stats = depot->stats();
  EXPECT_GT(stats.roots[0].evicted_segments, 0u);
  EXPECT_LE(stats.roots[0].used_bytes, 4u << 20);
  EXPECT_EQ(stats.load.failures.corrupt, 0u);
}

TEST_P(DepotOn, ASecondProcessesHandleSeesNewChunksWithoutAsking) {
  auto writer = open();
  ASSERT_TRUE(writer->attach(cache_.paged()));
  Options reader_options = options();
  reader_options.writer = false;
  auto reader = open(reader_options);
  cache_.fill(7);
  const auto keys = prompt_keys(ns_, 7, 4);
  ASSERT_EQ(store_chunks(*writer, 1, ns_, keys, 0, 4).items_ok, 4u);
  const auto want = std::vector{want_of(small_shape())};
  for (int i = 0; i < 500 && reader->longest_prefix(keys, want) < 4; ++i) usleep(20'000);
  EXPECT_EQ(reader->longest_prefix(keys, want), 4u);
  const auto plan = plan_chunks(*reader, ns_, keys, want[0], 0, 4, 100);
  ASSERT_TRUE(plan);
  ASSERT_TRUE(writer->submit_load(2, *plan)) << "the scheduler half plans, the worker half loads";
  EXPECT_EQ(wait_for(*writer, 2).items_ok, 4u);
}

TEST_P(DepotOn, AnotherNamespaceSaltOrTokenNeverHits) {
  auto depot = open();
  ASSERT_TRUE(depot->attach(cache_.paged()));
  cache_.fill(8);
  const auto keys = prompt_keys(ns_, 8, 4);
  ASSERT_EQ(store_chunks(*depot, 1, ns_, keys, 0, 4).items_ok, 4u);
  const auto want = std::vector{want_of(small_shape())};
  const auto other = depot->register_namespace(R"({"model":"n"})");
  ASSERT_TRUE(other);
  EXPECT_EQ(depot->longest_prefix(prompt_keys(*other, 8, 4), want), 0u);
  EXPECT_EQ(depot->longest_prefix(prompt_keys(ns_, 9, 4), want), 0u);
  EXPECT_EQ(depot->longest_prefix(keys, want), 4u);
}

TEST_P(DepotOn, ALoadPastItsDeadlineFailsWhollyAndIsReportedOnce) {
  auto depot = open();
  ASSERT_TRUE(depot->attach(cache_.paged()));
  cache_.fill(9);
  const auto keys = prompt_keys(ns_, 9, 40);
  ASSERT_EQ(store_chunks(*depot, 1, ns_, keys, 0, 40).items_ok, 40u);
  auto plan = plan_chunks(*depot, ns_, keys, want_of(small_shape()), 0, 40, 90, 1ns);
  ASSERT_TRUE(plan);
  ASSERT_TRUE(depot->submit_load(2, *plan));
  const Completion done = wait_for(*depot, 2);
  EXPECT_EQ(done.items_ok + done.failures.size(), 40u);
  for (const ItemFailure& failure : done.failures) EXPECT_EQ(failure.reason, ItemFailure::Reason::timed_out);
  usleep(50'000);
  EXPECT_TRUE(depot->poll().empty());
}

TEST_P(DepotOn, AHeldLoadIsPlacedEvenWhenItsRootIsGone) {
  auto depot = open();
  ASSERT_TRUE(depot->attach(cache_.paged()));
  cache_.fill(11);
  const auto keys = prompt_keys(ns_, 11, 6);
  ASSERT_EQ(store_chunks(*depot, 1, ns_, keys, 0, 6).items_ok, 6u);
  std::vector<std::vector<std::byte>> before;
  for (int32_t b = 0; b < 24; ++b) before.push_back(cache_.block(b));
  const auto plan = plan_chunks(*depot, ns_, keys, want_of(small_shape()), 0, 6, 0);
  ASSERT_TRUE(plan);
  cache_.clear();
  ASSERT_TRUE(depot->submit_hold(2, *plan));
  EXPECT_EQ(wait_for(*depot, 2).items_ok, 6u);
  EXPECT_EQ(cache_.block(0), std::vector<std::byte>(cache_.block(0).size(), std::byte{0xEE}))
      << "nothing is written yet";
  for (const std::string& file : segment_files()) std::filesystem::resize_file(file, 0);
  std::vector<Depot::HeldBlocks> blocks;
  for (uint32_t chunk = 1; chunk < 6; ++chunk) {
    blocks.push_back(
        {chunk, 0, iota_blocks(static_cast<int32_t>(100 + chunk * kBlocksPerChunk), kBlocksPerChunk)});
  }
  ASSERT_TRUE(depot->place(3, 2, blocks));
  EXPECT_EQ(wait_for(*depot, 3).items_ok, 5u);
  for (int32_t b = 4; b < 24; ++b)
    EXPECT_EQ(cache_.block(100 + b), before[static_cast<size_t>(b)]) << "block " << b;
  EXPECT_FALSE(depot->place(4, 2, blocks)) << "nothing is held any more";
}

TEST_P(DepotOn, AHoldOfDamagedOrTooManyExtentsFailsBeforeAnythingIsPromised) {
  Options small = options();
  small.slab_bytes = 5 * 69632;
  auto depot = open(small);
  ASSERT_TRUE(depot->attach(cache_.paged()));
  cache_.fill(12);
  const auto keys = prompt_keys(ns_, 12, 8);
  ASSERT_EQ(store_chunks(*depot, 1, ns_, keys, 0, 8).items_ok, 8u);
  const auto plan = plan_chunks(*depot, ns_, keys, want_of(small_shape()), 0, 8, 0);
  ASSERT_TRUE(plan);
  flip(file_of(plan->items[2].where.segment), plan->items[2].where.offset + 4096 + 9);
  ASSERT_TRUE(depot->submit_hold(2, *plan));
  const Completion held = wait_for(*depot, 2);
  EXPECT_GE(held.items_ok, 4u);
  EXPECT_LE(held.items_ok, 6u) << "the staging memory holds five extents, a damaged one gives its place back";
  size_t corrupt = 0;
  for (const ItemFailure& failure : held.failures)
    corrupt += failure.reason == ItemFailure::Reason::corrupt ? 1 : 0;
  EXPECT_EQ(corrupt, 1u);
  depot->drop_held(2);
  ASSERT_TRUE(depot->submit_hold(3, *plan_chunks(*depot, ns_, keys, want_of(small_shape()), 3, 8, 0)));
  EXPECT_EQ(wait_for(*depot, 3).items_ok, 5u) << "what was dropped is free again";
}

TEST_P(DepotOn, AfterForkTheChildAnswersClosedAndTheParentGoesOn) {
  auto depot = open();
  ASSERT_TRUE(depot->attach(cache_.paged()));
  cache_.fill(10);
  const auto keys = prompt_keys(ns_, 10, 2);
  const pid_t child = fork();
  if (child == 0) {
    const auto refused = depot->submit_store(1, {});
    const bool closed = !refused && refused.error().kind == ErrorKind::closed;
    depot.reset();
    _exit(closed ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  EXPECT_EQ(store_chunks(*depot, 1, ns_, keys, 0, 2).items_ok, 2u);
}

// E8. The children are born while threads of the parent hold locks that nobody will ever release in them.
TEST_P(DepotOn, AfterForkWithStoresUnderWayNoChildHangsAndTheParentLosesNothing) {
  constexpr uint32_t kRounds = 200;
  constexpr size_t kChunks = 2;      // a round; together they leave room for what is evicted ahead
  constexpr unsigned kPatience = 5;  // seconds, then the child is killed
  auto depot = open();
  ASSERT_TRUE(depot->attach(cache_.paged()));
  cache_.fill(10);
  const HostCache expected = cache_;
  for (uint32_t round = 0; round < kRounds; ++round) {
    const auto keys = prompt_keys(ns_, round, kChunks);
    StorePlan plan;
    plan.ns = ns_;
    for (uint32_t i = 0; i < kChunks; ++i)
      plan.items.push_back({keys[i], i, 0, iota_blocks(static_cast<int32_t>(i * 4), 4)});
    ASSERT_TRUE(depot->submit_store(round, plan));
    const int code = exit_code_of_child([&] {
      alarm(kPatience);
      const auto refused = depot->submit_store(kRounds, plan);
      if (refused || refused.error().kind != ErrorKind::closed) return 1;
      if (!depot->flush(60s) || !depot->poll().empty()) return 2;
      if (depot->longest_prefix(keys, std::vector{want_of(small_shape())}) > 0) return 3;
      depot.reset();
      return 0;
    });
    ASSERT_EQ(code, 0) << "round " << round;
  }
  ASSERT_TRUE(depot->flush(60s));
  std::set<uint64_t> acknowledged;
  for (const Completion& done : depot->poll()) {
    if (done.items_ok == kChunks) acknowledged.insert(done.job);
  }
  EXPECT_GT(acknowledged.size(), kRounds / 2) << "others may have been dropped for want of a segment in time";
  depot.reset();
  depot = open();
  ASSERT_TRUE(depot->attach(cache_.paged()));
  for (const uint64_t job : acknowledged) {
    cache_.clear();
    const auto keys = prompt_keys(ns_, static_cast<uint32_t>(job), kChunks);
    const auto plan = plan_chunks(*depot, ns_, keys, want_of(small_shape()), 0, kChunks, 0);
    ASSERT_TRUE(plan) << plan.error().message;
    ASSERT_TRUE(depot->submit_load(job, *plan));
    ASSERT_EQ(wait_for(*depot, job).items_ok, kChunks);
    for (int32_t b = 0; b < static_cast<int32_t>(kChunks * kBlocksPerChunk); ++b)
      ASSERT_EQ(cache_.block(b), expected.block(b)) << "prompt " << job;
  }
}

TEST_P(DepotOn, ADirectoryThatHoldsSomethingElseIsRefusedByName) {
  std::filesystem::create_directory(directory_.path() + "/root");
  std::ofstream(directory_.path() + "/root/precious.txt") << "data";
  const auto refused = Depot::open(options());
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().kind, ErrorKind::invalid_argument);
  EXPECT_NE(refused.error().message.find("precious.txt"), std::string::npos);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(directory_.path() + "/root"), {}), 1);
}

INSTANTIATE_TEST_SUITE_P(Roots, DepotOn, ::testing::Values("tmpfs", "disk"),
                         [](const auto& suite) { return suite.param; });

}  // namespace
}  // namespace tokendepot::testing
