// Processes side by side on one root: nothing collides, nothing is lost, a load is exact or a miss.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <set>

#include "store/journal_file.h"
#include "transfers_fixture.h"

namespace tokendepot::testing {
namespace {

class ProcessesOn : public TransfersOn {};

/// Reported in place of a prompt, plus the exit code, by a process that could not store all of its prompts.
constexpr uint32_t kGaveUp = 1u << 31;

/// Stores what is not stored yet of a prompt, as an engine does: false where that does not succeed in 20 s.
bool store_missing(Depot& depot, const NamespaceDigest& ns, HostCache& cache, uint32_t prompt, size_t chunks,
                   uint64_t& job) {
  cache.fill(prompt);
  const auto keys = prompt_keys(ns, prompt, chunks);
  for (int attempt = 0; attempt < 2000; ++attempt) {
    std::vector<uint8_t> is_stored(chunks);
    depot.stored(keys, want_of(small_shape()), is_stored);
    StorePlan plan;
    plan.ns = ns;
    for (uint32_t i = 0; i < chunks; ++i) {
      if (!is_stored[i]) plan.items.push_back({keys[i], i, 0, iota_blocks(static_cast<int32_t>(i * 4), 4)});
    }
    if (plan.items.empty()) return true;
    if (!depot.submit_store(job++, plan) || !depot.flush(20s)) return false;
    bool all = false;
    for (const Completion& done : depot.poll()) all |= done.items_ok == plan.items.size();
    if (all) return true;
    usleep(10'000);
  }
  return false;
}

/// Body of a process that stores prompts [first, last) of `chunks` each, then waits to be killed.
int store_prompts(const Options& options, uint32_t first, uint32_t last, size_t chunks, int gate,
                  int report) {
  char none = 0;
  if (read(gate, &none, 1) < 0) return 2;
  auto depot = Depot::open(options);
  if (!depot) {
    std::fprintf(stderr, "open failed: %s\n", depot.error().message.c_str());
    return 3;
  }
  const auto ns = (*depot)->register_namespace(R"({"model":"m"})");
  HostCache cache(small_shape(), static_cast<uint32_t>(chunks * kBlocksPerChunk));
  if (!ns || !(*depot)->attach(cache.paged())) return 4;
  uint64_t job = 0;
  for (uint32_t prompt = first; prompt < last; ++prompt) {
    if (!store_missing(**depot, *ns, cache, prompt, chunks, job)) return 6;
    if (write(report, &prompt, sizeof prompt) != sizeof prompt) return 7;
  }
  pause();
  return 0;
}

/// Runs one of them for each range, all at once. When each has stored everything, calls `meanwhile` and kills
/// them.
void run_processes(
    const Options& options, const std::vector<std::pair<uint32_t, uint32_t>>& ranges, size_t chunks,
    const std::function<void()>& meanwhile = [] {}) {
  int gate[2];
  int report[2];
  ASSERT_EQ(pipe(gate), 0);
  ASSERT_EQ(pipe(report), 0);
  std::vector<pid_t> children;
  size_t expected = 0;
  for (const auto& [first, last] : ranges) {
    expected += last - first;
    const pid_t child = fork();
    if (child == 0) {
      close(gate[1]);
      close(report[0]);
      const int code = store_prompts(options, first, last, chunks, gate[0], report[1]);
      // A process that gives up says so: the others keep the pipe open, its end alone is not seen.
      const uint32_t gave_up = kGaveUp + static_cast<uint32_t>(code);
      (void)!write(report[1], &gave_up, sizeof gave_up);
      _exit(code);
    }
    children.push_back(child);
  }
  close(gate[0]);
  close(gate[1]);  // now, all at once
  close(report[1]);
  size_t reported = 0;
  uint32_t prompt = 0;
  while (reported < expected && read(report[0], &prompt, sizeof prompt) == sizeof prompt && prompt < kGaveUp)
    ++reported;
  close(report[0]);
  meanwhile();
  for (const pid_t child : children) {
    kill(child, SIGKILL);
    int status = 0;
    waitpid(child, &status, 0);
    EXPECT_TRUE(WIFSIGNALED(status)) << "a process ended with " << WEXITSTATUS(status);
  }
  EXPECT_EQ(reported, expected);
}

/// Body of a process that loads all prompts and compares every byte. 0, or what went wrong.
int load_prompts(const Options& options, const std::vector<std::pair<uint32_t, uint32_t>>& ranges,
                 size_t chunks) {
  auto depot = Depot::open(options);
  if (!depot) return 3;
  const auto ns = (*depot)->register_namespace(R"({"model":"m"})");
  const auto blocks = static_cast<uint32_t>(chunks * kBlocksPerChunk);
  HostCache cache(small_shape(), blocks);
  HostCache expected(small_shape(), blocks);
  if (!ns || !(*depot)->attach(cache.paged())) return 4;
  uint64_t job = 0;
  for (const auto& [first, last] : ranges) {
    for (uint32_t prompt = first; prompt < last; ++prompt) {
      const auto keys = prompt_keys(*ns, prompt, chunks);
      const auto plan = plan_chunks(**depot, *ns, keys, want_of(small_shape()), 0, chunks, 0);
      if (!plan || !(*depot)->submit_load(++job, *plan)) return 5;
      if (wait_for(**depot, job).items_ok != chunks) return 6;
      expected.fill(prompt);
      for (uint32_t b = 0; b < blocks; ++b) {
        if (cache.block(static_cast<int32_t>(b)) != expected.block(static_cast<int32_t>(b))) return 7;
      }
    }
  }
  return 0;
}

/// Calls `visit(record)` for each record of all journals of this root.
template <class Visit>
void for_each_record(const std::string& root, Visit visit) {
  for (const auto& entry : std::filesystem::directory_iterator(root + "/journals")) {
    const auto writer = writer_of_journal(entry.path().filename());
    ASSERT_TRUE(writer) << entry.path();
    auto reader = JournalReader::open(entry.path(), *writer);
    ASSERT_TRUE(reader);
    ASSERT_TRUE(reader->read_new(visit));
  }
}

/// No segment was opened twice and no place given twice, whoever wrote the journals of this root.
void expect_no_id_used_twice(const std::string& root) {
  std::set<SegmentId> segments;
  std::set<std::pair<SegmentId, uint64_t>> places;
  for_each_record(root, [&](const Record& record) {
    if (record.type == RecordType::open_segment) {
      EXPECT_TRUE(segments.insert(record.where.segment).second) << segment_name(record.where.segment);
    } else if (record.type == RecordType::put) {
      EXPECT_TRUE(places.emplace(record.where.segment, record.where.offset).second);
    }
  });
  EXPECT_FALSE(segments.empty());
}

/// How often each key was stored.
std::map<Key, size_t> copies_in(const std::string& root) {
  std::map<Key, size_t> copies;
  for_each_record(root, [&](const Record& record) { copies[record.key] += record.type == RecordType::put; });
  std::erase_if(copies, [](const auto& entry) { return entry.second == 0; });
  return copies;
}

// X3: one root, one second, many processes; killed, started again; nothing collides.
TEST_P(ProcessesOn, EightProcessesOnOneRootNeverCollide) {
  constexpr uint32_t kProcesses = 8;
  constexpr uint32_t kPrompts = 25;
  constexpr size_t kChunks = 4;
  const Options roomy = options(512 << 20);
  std::vector<std::pair<uint32_t, uint32_t>> all;
  for (uint32_t generation = 0; generation < 2; ++generation) {
    std::vector<std::pair<uint32_t, uint32_t>> ranges;
    for (uint32_t p = 0; p < kProcesses; ++p) {
      const uint32_t first = (generation * kProcesses + p) * kPrompts;
      ranges.emplace_back(first, first + kPrompts);
    }
    run_processes(roomy, ranges, kChunks);
    all.insert(all.end(), ranges.begin(), ranges.end());
  }
  std::vector<pid_t> readers;
  for (uint32_t p = 0; p < kProcesses; ++p) {
    readers.push_back(fork());
    if (readers.back() == 0) _exit(load_prompts(roomy, all, kChunks));
  }
  for (const pid_t reader : readers) {
    int status = 0;
    ASSERT_EQ(waitpid(reader, &status, 0), reader);
    EXPECT_TRUE(WIFEXITED(status));
    EXPECT_EQ(WEXITSTATUS(status), 0);
  }
  expect_no_id_used_twice(roomy.roots[0].path);
}

// X1: a copy for each of those that store a chunk before they have heard of another's, and no more.
TEST_P(ProcessesOn, OfProcessesThatStoreTheSameKeysEachStoresOnceAndALaterOneNothing) {
  constexpr uint32_t kPrompts = 8;
  constexpr size_t kChunks = 4;
  const Options roomy = options(128 << 20);
  const std::string& root = roomy.roots[0].path;
  const std::vector<std::pair<uint32_t, uint32_t>> all(4, {0, kPrompts});
  run_processes(roomy, all, kChunks, [&] {
    const auto before = copies_in(root);
    EXPECT_EQ(before.size(), kPrompts * kChunks);
    for (const auto& [key, copies] : before) EXPECT_LE(copies, all.size());
    auto later = open(roomy);
    HostCache cache(small_shape(), kChunks * kBlocksPerChunk);
    ASSERT_TRUE(later->attach(cache.paged()));
    uint64_t job = 0;
    for (uint32_t prompt = 0; prompt < kPrompts; ++prompt)
      EXPECT_TRUE(store_missing(*later, ns_, cache, prompt, kChunks, job));
    EXPECT_EQ(job, 0u) << "asked first, and found everything";
    EXPECT_EQ(copies_in(root), before);
  });
  EXPECT_EQ(load_prompts(roomy, {{0, kPrompts}}, kChunks), 0);
}

// Journals are read in the order of their random names: whichever copy is left, it is found.
TEST_P(ProcessesOn, AChunkThatSeveralStoredIsServedWhicheverCopyIsLeft) {
  Options alone = options();
  alone.poll_ms = 3'600'000;
  std::vector<Key> keys;
  {
    std::vector<std::unique_ptr<Depot>> depots;
    for (int i = 0; i < 3; ++i) depots.push_back(open(alone));
    keys = prompt_keys(ns_, 1, 1);
    for (const auto& depot : depots) {
      ASSERT_TRUE(depot->attach(cache_.paged()));
      store_all(*depot, keys, 0, 1);
    }
  }
  const std::filesystem::path whole = directory_ / "root";
  std::set<std::string> writers;
  for (const auto& journal : std::filesystem::directory_iterator(whole / "journals"))
    writers.insert(journal.path().stem());
  ASSERT_EQ(writers.size(), 3u);
  for (const bool removed : {true, false}) {
    for (const std::string& left : writers) {
      SCOPED_TRACE((removed ? "removed, all but that of " : "damaged, all but that of ") + left);
      Options one = alone;
      one.roots[0].path = directory_ / left + (removed ? "-removed" : "-damaged");
      std::filesystem::copy(whole, one.roots[0].path, std::filesystem::copy_options::recursive);
      for (const auto& segment : std::filesystem::directory_iterator(one.roots[0].path + "/segments")) {
        if (segment.path().filename().string().starts_with(left)) continue;
        if (removed) {
          std::filesystem::remove(segment.path());
        } else {
          std::fstream(segment.path(), std::ios::in | std::ios::out | std::ios::binary).seekp(8192)
              << "damage";
        }
      }
      // A load condemns the damaged copy that it meets; the next start knows of another one.
      uint32_t loaded = 0;
      for (int start = 0; start < 3 && loaded == 0; ++start) {
        auto depot = open(one);
        ASSERT_TRUE(depot->attach(cache_.paged()));
        ASSERT_EQ(depot->longest_prefix(keys, std::vector{want_}), 1u);
        loaded = load(*depot, plan_of(*depot, keys, 0, 1, 0)).items_ok;
      }
      EXPECT_EQ(loaded, 1u);
    }
  }
}

TEST_P(ProcessesOn, UnderEvictionByAnotherProcessALoadIsExactOrAMiss) {
  const Options small = options(6 << 20);
  const pid_t child = fork();
  if (child == 0) {
    auto depot = Depot::open(small);
    if (!depot) _exit(3);
    const auto ns = (*depot)->register_namespace(R"({"model":"m"})");
    HostCache cache(small_shape(), kBlocks);
    if (!ns || !(*depot)->attach(cache.paged())) _exit(4);
    for (uint32_t n = 0;; ++n) {
      cache.fill(n % 50);
      const auto keys = prompt_keys(*ns, n % 50, 8);
      (void)store_chunks(**depot, n, *ns, keys, 0, 8);
    }
  }
  auto reader = open(small);
  ASSERT_TRUE(reader->attach(cache_.paged()));
  const auto begin = std::chrono::steady_clock::now();
  const auto spent = [&] { return std::chrono::steady_clock::now() - begin; };
  uint32_t exact = 0;
  for (uint32_t n = 0; spent() < 3s || (exact == 0 && spent() < 60s); ++n) {
    const uint32_t prompt = n % 50;
    const auto keys = prompt_keys(ns_, prompt, 8);
    const size_t have = reader->longest_prefix(keys, std::vector{want_});
    if (have == 0) continue;
    const auto plan = plan_chunks(*reader, ns_, keys, want_, 0, have, 0);
    if (!plan) continue;
    const Completion done = load(*reader, *plan);
    std::set<uint32_t> failed;
    for (const ItemFailure& failure : done.failures) failed.insert(failure.chunk);
    HostCache expected(small_shape(), kBlocks);
    expected.fill(prompt);
    for (uint32_t chunk = 0; chunk < have; ++chunk) {
      if (failed.contains(chunk)) continue;
      ++exact;
      for (uint32_t b = 0; b < 4; ++b) {
        const auto id = static_cast<int32_t>(chunk * 4 + b);
        ASSERT_EQ(cache_.block(id), expected.block(id)) << "prompt " << prompt << " chunk " << chunk;
      }
    }
  }
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  EXPECT_GT(exact, 0u);
}
INSTANTIATE_TEST_SUITE_P(Roots, ProcessesOn, ::testing::Values("tmpfs", "disk", "uring"),
                         [](const auto& suite) { return suite.param; });

}  // namespace
}  // namespace tokendepot::testing
