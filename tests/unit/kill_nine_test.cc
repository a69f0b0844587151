// Processes that are killed while they store: what was acknowledged is served after the restart, from the
// first look-up on, and nothing else is left of the dead. TOKENDEPOT_LONG_TESTS=1 asks for the full size.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <random>
#include <thread>

#include "base/log.h"
#include "transfers_fixture.h"

namespace tokendepot::testing {
namespace {

constexpr size_t kPromptChunks = 2;
constexpr uint32_t kPromptBlocks = kPromptChunks * kBlocksPerChunk;

bool long_tests() {
  return std::getenv("TOKENDEPOT_LONG_TESTS") != nullptr;
}

StorePlan plan_of_prompt(const NamespaceDigest& ns, uint32_t prompt) {
  const auto keys = prompt_keys(ns, prompt, kPromptChunks);
  StorePlan plan;
  plan.ns = ns;
  for (uint32_t c = 0; c < kPromptChunks; ++c)
    plan.items.push_back(
        {keys[c], c, 0, iota_blocks(static_cast<int32_t>(c * kBlocksPerChunk), kBlocksPerChunk)});
  return plan;
}

/// Body of a process that stores prompt after prompt and writes the number of each to `report` when it was
/// acknowledged, until it is killed. Its exit code says what went wrong.
int store_until_killed(const Options& options, uint32_t first_prompt, int report) {
  auto depot = Depot::open(options);
  if (!depot) return 3;
  const auto ns = (*depot)->register_namespace(R"({"model":"m"})");
  HostCache cache(small_shape(), kPromptBlocks);
  if (!ns || !(*depot)->attach(cache.paged())) return 4;
  for (uint32_t prompt = first_prompt;; ++prompt) {
    cache.fill(prompt);
    if (!(*depot)->submit_store(prompt, plan_of_prompt(*ns, prompt))) return 5;
    if (!(*depot)->flush(60s)) return 6;
    for (const Completion& done : (*depot)->poll()) {
      if (done.items_ok == kPromptChunks && write(report, &prompt, sizeof prompt) != sizeof prompt) return 7;
    }
  }
}

class KilledOn : public TransfersOn {
 protected:
  std::string segments_dir() const { return directory_.path() + "/root/segments"; }
  std::vector<std::filesystem::path> segment_files() const {
    std::vector<std::filesystem::path> files;
    for (const auto& entry : std::filesystem::directory_iterator(segments_dir()))
      files.push_back(entry.path());
    return files;
  }
  uint64_t bytes_in_segments() const {
    uint64_t total = 0;
    for (const auto& file : segment_files()) {
      std::error_code gone;
      const auto bytes = std::filesystem::file_size(file, gone);
      if (!gone) total += bytes;
    }
    return total;
  }
  /// Loads these prompts, as many at once as the cache holds, and compares every block.
  void expect_exact(Depot& depot, std::span<const uint32_t> prompts) {
    constexpr size_t kAtOnce = kBlocks / kPromptBlocks;
    while (!prompts.empty()) {
      const auto some = prompts.first(std::min(kAtOnce, prompts.size()));
      prompts = prompts.subspan(some.size());
      LoadPlan plan;
      for (size_t i = 0; i < some.size(); ++i) {
        LoadPlan one = plan_of(depot, prompt_keys(ns_, some[i], kPromptChunks), 0, kPromptChunks,
                               static_cast<int32_t>(i * kPromptBlocks));
        plan.ns = one.ns;
        std::ranges::move(one.items, std::back_inserter(plan.items));
      }
      cache_.clear();
      ASSERT_EQ(load(depot, plan).items_ok, some.size() * kPromptChunks);
      for (size_t i = 0; i < some.size(); ++i) {
        HostCache expected(small_shape(), kPromptBlocks);
        expected.fill(some[i]);
        for (uint32_t b = 0; b < kPromptBlocks; ++b) {
          ASSERT_EQ(cache_.block(static_cast<int32_t>(i * kPromptBlocks + b)),
                    expected.block(static_cast<int32_t>(b)))
              << "prompt " << some[i];
        }
      }
    }
  }
};

TEST_P(KilledOn, KillNineWhileStoringLosesNothingAcknowledged) {
  // So many of the newest fit whatever the rounds were like: with one prompt acknowledged and one torn in
  // each, 200 take 54 of the 64 segments. Older ones may have been evicted; those that were not are exact as
  // well.
  constexpr size_t kKept = 200;
  constexpr size_t kSample = 20;
  const std::vector want{want_};
  std::mt19937 random(42);
  std::vector<uint32_t> acknowledged;
  size_t older_checked = 0;
  const uint32_t rounds = long_tests() ? 200 : 12;
  for (uint32_t round = 0; round < rounds; ++round) {
    int report[2];
    ASSERT_EQ(pipe(report), 0);
    const pid_t child = fork();
    if (child == 0) {
      close(report[0]);
      _exit(store_until_killed(options(), round * 100'000, report[1]));
    }
    close(report[1]);
    uint32_t prompt = 0;
    ASSERT_EQ(read(report[0], &prompt, sizeof prompt), static_cast<ssize_t>(sizeof prompt))
        << "the first acknowledgement";
    acknowledged.push_back(prompt);
    usleep(static_cast<useconds_t>(random() % 60'000));
    kill(child, SIGKILL);
    int status = 0;
    waitpid(child, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status)) << "child ended by itself: " << WEXITSTATUS(status);
    while (read(report[0], &prompt, sizeof prompt) == sizeof prompt) acknowledged.push_back(prompt);
    close(report[0]);

    const auto recovered = open();
    // A reader of its own: what it loads is not recorded as used, so that the oldest stay the first to go.
    Options looking = options();
    looking.writer = false;
    const auto depot = open(looking);
    ASSERT_TRUE(depot->attach(cache_.paged()));
    const size_t kept = std::min(kKept, acknowledged.size());
    const auto newest = std::span(acknowledged).last(kept);
    for (const uint32_t one : newest)
      ASSERT_EQ(depot->longest_prefix(prompt_keys(ns_, one, 2), want), 2u)
          << "round " << round << " prompt " << one;
    ASSERT_NO_FATAL_FAILURE(expect_exact(*depot, newest));
    std::vector<uint32_t> older;
    std::ranges::sample(std::span(acknowledged).first(acknowledged.size() - kept), std::back_inserter(older),
                        kSample, random);
    std::erase_if(older,
                  [&](uint32_t one) { return depot->longest_prefix(prompt_keys(ns_, one, 2), want) < 2; });
    ASSERT_NO_FATAL_FAILURE(expect_exact(*depot, older));
    older_checked += older.size();
  }
  std::printf("%zu prompts acknowledged in %u rounds, %zu looks at older ones\n", acknowledged.size(), rounds,
              older_checked);
  const auto depot = open();
  const auto unknown = [&] {
    const RootStats root = depot->stats().roots[0];
    return static_cast<int64_t>(segment_files().size()) - static_cast<int64_t>(root.segments) -
           1;  // its spare
  };
  for (int i = 0; i < 600 && unknown() > 0; ++i) usleep(50'000);
  EXPECT_LE(unknown(), 0) << "files that the dead left";
}

GroupShape tiny_shape() {
  GroupShape tiny;
  tiny.part = {0, 1, 0, 1};
  tiny.tokens = kChunkTokens;
  tiny.block_tokens = kBlockTokens;
  tiny.planes = 1;
  tiny.row_bytes = 64;  // 4 KiB an extent, and as much for its header
  return tiny;
}

/// Stores what is missing of `keys`; false when it cannot be had.
bool store_missing(Depot& depot, const NamespaceDigest& ns, std::span<const Key> keys) {
  std::vector<uint8_t> have(keys.size());
  for (uint64_t attempt = 0; attempt < 50; ++attempt) {
    depot.stored(keys, want_of(tiny_shape()), have);
    StorePlan plan;
    plan.ns = ns;
    for (size_t i = 0; i < keys.size(); ++i) {
      if (have[i] == 0) plan.items.push_back({keys[i], static_cast<uint32_t>(i), 0, iota_blocks(0, 4)});
    }
    if (plan.items.empty()) return true;
    if (!depot.submit_store(attempt, plan) || !depot.flush(60s)) return false;
    (void)depot.poll();
  }
  return false;
}

// D8: a depot is not open before its index is whole, so that no look-up is answered too early.
TEST_P(KilledOn, AfterKillNineTheFirstLookupKnowsAllAndNothingIsStoredTwice) {
  const size_t count = long_tests() ? 200'000 : 10'000;
  Options roomy = options(count * 16384);
  roomy.roots[0].segment_bytes = 16 << 20;
  roomy.store_queue_bytes = 1ull << 40;
  int report[2];
  ASSERT_EQ(pipe(report), 0);
  const pid_t child = fork();
  if (child == 0) {
    auto depot = Depot::open(roomy);
    if (!depot) _exit(3);
    const auto ns = (*depot)->register_namespace(R"({"model":"m"})");
    HostCache cache(tiny_shape(), 4);
    if (!ns || !(*depot)->attach(cache.paged())) _exit(4);
    if (!store_missing(**depot, *ns, prompt_keys(*ns, 1, count))) _exit(5);
    if (write(report[1], "", 1) != 1) _exit(6);
    for (uint32_t prompt = 2;; ++prompt) (void)store_missing(**depot, *ns, prompt_keys(*ns, prompt, 16));
  }
  close(report[1]);
  char all_stored = 0;
  ASSERT_EQ(read(report[0], &all_stored, 1), 1);
  close(report[0]);
  usleep(20'000);
  kill(child, SIGKILL);
  int status = 0;
  waitpid(child, &status, 0);
  ASSERT_TRUE(WIFSIGNALED(status)) << "child ended by itself: " << WEXITSTATUS(status);

  std::atomic<int> ready_lines = 0;
  set_log_sink(
      [&](LogLevel, std::string_view line) { ready_lines += line.starts_with("ready after ") ? 1 : 0; });
  const auto depot = open(roomy);
  set_log_sink(nullptr);
  const auto keys = prompt_keys(ns_, 1, count);
  const std::vector want{want_of(tiny_shape())};
  EXPECT_EQ(depot->longest_prefix(keys, want), count) << "at once";
  HostCache cache(tiny_shape(), 4);
  ASSERT_TRUE(depot->attach(cache.paged()));
  EXPECT_TRUE(store_missing(*depot, ns_, keys));
  EXPECT_EQ(depot->stats().store.extents, 0u) << "stored a second time";
  for (const int after_ms : {10, 90, 900}) {
    usleep(static_cast<useconds_t>(after_ms) * 1000);
    EXPECT_EQ(depot->longest_prefix(keys, want), count) << after_ms << " ms later";
  }
  EXPECT_EQ(depot->stats().store.extents, 0u);
  // At rest: the next segment is made in the background.
  const auto difference = [&] {
    return static_cast<int64_t>(bytes_in_segments()) -
           static_cast<int64_t>(depot->stats().roots[0].used_bytes);
  };
  for (int i = 0; i < 600 && difference() != 0; ++i) usleep(50'000);
  EXPECT_EQ(difference(), 0);
  EXPECT_EQ(ready_lines, 1);
  const DepotStats stats = depot->stats();
  EXPECT_GT(stats.open_nanoseconds, 0u);
  std::printf("%zu extents: ready after %.3f s\n", count, static_cast<double>(stats.open_nanoseconds) * 1e-9);
}

// D8: files that go while the directory is read.
TEST_P(KilledOn, SegmentsThatGoWhileTheDepotOpensAreMisses) {
  std::mt19937 random(7);
  for (uint32_t round = 0; round < 10; ++round) {
    std::vector<uint32_t> prompts;
    {
      const auto depot = open();
      ASSERT_TRUE(depot->attach(cache_.paged()));
      for (uint32_t i = 0; i < 16; ++i) {
        prompts.push_back(1000 * round + i);
        cache_.fill(prompts.back());
        store_all(*depot, prompt_keys(ns_, prompts.back(), 2), 0, 2);
      }
    }
    auto files = segment_files();
    std::ranges::shuffle(files, random);
    std::thread remover([&] {
      for (size_t i = 0; i < files.size() / 2; ++i) {
        usleep(static_cast<useconds_t>(random() % 500));
        std::filesystem::remove(files[i]);
      }
    });
    auto depot = Depot::open(options());
    remover.join();
    ASSERT_TRUE(depot) << depot.error().message;
    ASSERT_TRUE((*depot)->attach(cache_.paged()));
    for (const uint32_t prompt : prompts) {
      const auto keys = prompt_keys(ns_, prompt, 2);
      const size_t promised = (*depot)->longest_prefix(keys, std::vector{want_});
      if (promised == 0) continue;
      const auto plan = plan_chunks(**depot, ns_, keys, want_, 0, promised, 0);
      if (!plan) continue;  // found gone in this moment
      const Completion done = load(**depot, *plan);
      EXPECT_EQ(done.items_ok + done.failures.size(), promised);
      for (const ItemFailure& failure : done.failures) EXPECT_EQ(failure.reason, ItemFailure::Reason::absent);
      // Less where a file was removed that is still open: it served, until the keeper found it gone.
      EXPECT_LE(
          (*depot)->longest_prefix(keys, std::vector{want_}),
          done.failures.empty() ? promised : std::ranges::min(done.failures, {}, &ItemFailure::chunk).chunk)
          << "promised again";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Roots, KilledOn, ::testing::Values("tmpfs", "disk"),
                         [](const auto& suite) { return suite.param; });

}  // namespace
}  // namespace tokendepot::testing
