// Files of a root that are damaged, gone, unreadable, or that the kernel cannot read: exactly the chunks
// concerned are misses, they are not promised again, and storing them anew heals.
#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <set>

#include "base/log.h"
#include "forked_child.h"
#include "store/journal_file.h"
#include "transfers_fixture.h"

namespace tokendepot::testing {
namespace {

using Reason = ItemFailure::Reason;

std::set<uint32_t> chunks_of(const Completion& done) {
  std::set<uint32_t> chunks;
  for (const ItemFailure& failure : done.failures) chunks.insert(failure.chunk);
  return chunks;
}

class DamagedFiles : public TransfersOn {
 protected:
  std::string file_of(const ExtentRef& where) const {
    return directory_.path() + "/root/segments/" + segment_name(where.segment);
  }
};

/// D5: 64 chunks, each in a segment of its own, of which four are damaged behind the depot; two requests that
/// share the first half load at once. Runs as a user whom mode 000 keeps out.
class FourKindsOfDamage : public DamagedFiles {
 protected:
  static constexpr size_t kChunks = 64;
  static constexpr size_t kShared = 32;

  void run() {
    Options options = this->options();
    options.roots[0].segment_bytes = 72 << 10;
    HostCache cache(small_shape(), (kChunks + kShared) * kBlocksPerChunk);
    HostCache expected(small_shape(), (kChunks + kShared) * kBlocksPerChunk);
    expected.fill(1);
    const std::vector want{want_};
    std::vector<Key> keys;
    {
      auto depot = open(options);
      ASSERT_TRUE(depot->attach(cache.paged()));
      cache.fill(1);
      keys = prompt_keys(ns_, 1, kChunks);
      for (size_t i = 0; i < kChunks; ++i) store_all(*depot, keys, i, i + 1);
    }
    auto depot = open(options);
    ASSERT_TRUE(depot->attach(cache.paged()));
    ASSERT_EQ(depot->longest_prefix(keys, want), kChunks);
    const LoadPlan all = plan_of(*depot, keys, 0, kChunks, 0);
    const LoadPlan half = plan_of(*depot, keys, 0, kShared, kChunks * kBlocksPerChunk);
    std::filesystem::remove(file_of(all.items[5].where));
    std::filesystem::resize_file(file_of(all.items[9].where), 36 << 10);
    std::filesystem::permissions(file_of(all.items[20].where), std::filesystem::perms::none);
    std::filesystem::resize_file(file_of(all.items[33].where), 0);

    cache.clear();
    ASSERT_TRUE(depot->submit_load(1, all));
    ASSERT_TRUE(depot->submit_load(2, half));
    std::vector<Completion> ended(3);
    for (int i = 0; i < 500 && (ended[1].job == 0 || ended[2].job == 0); ++i) {
      depot->wait_ended(20ms);
      for (Completion& done : depot->poll()) ended[done.job] = done;
    }
    EXPECT_EQ(chunks_of(ended[1]), (std::set<uint32_t>{5, 9, 20, 33}));
    EXPECT_EQ(chunks_of(ended[2]), (std::set<uint32_t>{5, 9, 20}));
    for (const Completion& done : ended) {
      for (const ItemFailure& failure : done.failures)
        EXPECT_EQ(failure.reason, Reason::absent) << failure.chunk;
    }
    const auto nothing = std::vector<std::byte>(cache.block(0).size(), std::byte{0xEE});
    for (uint32_t b = 0; b < kChunks * kBlocksPerChunk; ++b) {
      const bool bad = chunks_of(ended[1]).contains(b / kBlocksPerChunk);
      ASSERT_EQ(cache.block(static_cast<int32_t>(b)), bad ? nothing : expected.block(static_cast<int32_t>(b)))
          << b;
    }
    EXPECT_EQ(depot->longest_prefix(keys, want), 5u);

    // What a scheduler does with failed chunks; then nothing of them can be promised a third time.
    const std::set<uint32_t> failed = chunks_of(ended[1]);
    for (const uint32_t chunk : failed) depot->forget(keys[chunk], 0);
    std::vector<uint8_t> have(kChunks);
    depot->stored(keys, want_, have);
    for (uint32_t chunk = 0; chunk < kChunks; ++chunk)
      EXPECT_EQ(have[chunk], failed.contains(chunk) ? 0 : 1) << chunk;
    EXPECT_EQ(depot->stats().load.failures.absent, 7u)
        << "two attempts for what both wanted, one for the rest";

    cache.fill(1);
    for (const uint32_t chunk : failed) store_all(*depot, keys, chunk, chunk + 1);
    for (int restarted = 0; restarted < 2; ++restarted) {
      ASSERT_EQ(depot->longest_prefix(keys, want), kChunks);
      cache.clear();
      EXPECT_EQ(load(*depot, plan_of(*depot, keys, 0, kChunks, 0)).items_ok, kChunks);
      for (int32_t b = 0; b < static_cast<int32_t>(kChunks * kBlocksPerChunk); ++b)
        ASSERT_EQ(cache.block(b), expected.block(b)) << b;
      if (restarted == 1) break;
      depot.reset();
      depot = open(options);
      ASSERT_TRUE(depot->attach(cache.paged()));
    }
  }
};

TEST_P(FourKindsOfDamage, AreMissesOfTheirChunksForTwoRequestsAtOnceAndARestoreHealsThem) {
  constexpr int kCannot = 77;
  ASSERT_EQ(chmod(directory_.path().c_str(), 0777), 0);
  const int code = exit_code_of_child([this] {
    if (!become_nobody()) return kCannot;
    run();
    return HasFailure() ? 1 : 0;
  });
  if (code == kCannot)
    GTEST_SKIP() << "the process may not become an ordinary user, whom mode 000 would keep out";
  EXPECT_EQ(code, 0);
}

/// N4: three chunks of 2 MiB that are read in pieces; the kernel answers EIO for part of the second.
class BrokenMedium : public DamagedFiles {
 protected:
  static constexpr uint32_t kBlocksNow = 24;
  const GroupShape shape_ = small_shape({0, 64, 0, 4});
  HostCache large_{shape_, kBlocksNow};
  std::vector<Key> keys_;

  Options large_options() {
    Options large = options();
    large.roots[0].segment_bytes = 8 << 20;
    large.slab_bytes = 16 << 20;
    return large;
  }
  std::unique_ptr<Depot> stored() {
    auto depot = open(large_options());
    EXPECT_TRUE(depot->attach(large_.paged()));
    large_.fill(1);
    keys_ = prompt_keys(ns_, 1, 3);
    for (size_t i = 0; i < 3; ++i) store_all(*depot, keys_, i, i + 1);
    return depot;
  }
  LoadPlan plan(Depot& depot, size_t first, size_t last) {
    auto planned = plan_chunks(depot, ns_, keys_, want_of(shape_), first, last,
                               static_cast<int32_t>((3 + first) * kBlocksPerChunk));
    EXPECT_TRUE(planned) << (planned ? "" : planned.error().message);
    return planned ? *planned : LoadPlan{};
  }
  /// Blocks 12 and on hold another request's payload until a good chunk replaces it.
  void expect_only_good_chunks_arrived(uint32_t bad) {
    HostCache expected(shape_, kBlocksNow);
    expected.fill(1);
    const auto others = std::vector<std::byte>(expected.block(0).size(), std::byte{0xEE});
    for (int32_t b = 0; b < 12; ++b) {
      const bool good = static_cast<uint32_t>(b) / kBlocksPerChunk != bad;
      ASSERT_EQ(large_.block(12 + b), good ? expected.block(b) : others) << "block " << b;
    }
  }
  void chunk_one_is_an_io_error_until_it_is_stored_anew(Depot& depot) {
    const std::vector want{want_of(shape_)};
    for (int attempt = 1; attempt <= 2; ++attempt) {
      large_.clear();
      const Completion failed = load(depot, plan(depot, 0, 3));
      EXPECT_EQ(failed.items_ok, 2u);
      ASSERT_EQ(failed.failures.size(), 1u);
      EXPECT_EQ(failed.failures[0].chunk, 1u);
      EXPECT_EQ(failed.failures[0].reason, Reason::io_error);
      expect_only_good_chunks_arrived(1);
      EXPECT_EQ(depot.stats().load.failures.io_error, static_cast<uint64_t>(attempt));
    }
    EXPECT_EQ(depot.longest_prefix(keys_, want), 3u) << "nothing proves that the extent is bad";
    depot.forget(keys_[1], 0);
    EXPECT_EQ(depot.longest_prefix(keys_, want), 1u);
    large_.fill(1);
    store_all(depot, keys_, 1, 2);
    EXPECT_EQ(depot.longest_prefix(keys_, want), 3u);
    large_.clear();
    EXPECT_EQ(load(depot, plan(depot, 0, 3)).items_ok, 3u);
    expect_only_good_chunks_arrived(3);
  }
  /// `broken` says which part of the extent [offset, offset + bytes) cannot be read.
  int with_broken_reads(std::pair<uint64_t, uint64_t> (*broken)(const ExtentRef&)) {
    return exit_code_of_child([&] {
      const auto depot = stored();
      const auto [begin, end] = broken(plan(*depot, 0, 3).items[1].where);
      if (!break_reads(static_cast<uint32_t>(begin), static_cast<uint32_t>(end))) return 2;
      chunk_one_is_an_io_error_until_it_is_stored_anew(*depot);
      return HasFailure() ? 1 : 0;
    });
  }
};

TEST_P(BrokenMedium, AFirstReadThatFailsIsAnIoErrorOfThatChunkOnly) {
  EXPECT_EQ(
      with_broken_reads([](const ExtentRef& where) { return std::pair(where.offset, where.offset + 1); }), 0);
}

TEST_P(BrokenMedium, ALaterReadThatFailsIsAnIoErrorOfThatChunkOnly) {
  EXPECT_EQ(with_broken_reads([](const ExtentRef& where) {
              return std::pair(where.offset + where.bytes / 2, where.offset + where.bytes);
            }),
            0);
}

TEST_P(BrokenMedium, AReadThatFailsWhileChunksAreVerifiedAheadHoldsTheOthers) {
  EXPECT_EQ(
      exit_code_of_child([&] {
        const auto depot = stored();
        const LoadPlan whole = plan(*depot, 0, 3);
        const ExtentRef& bad = whole.items[1].where;
        if (!break_reads(static_cast<uint32_t>(bad.offset), static_cast<uint32_t>(bad.offset + bad.bytes)))
          return 2;
        large_.clear();
        EXPECT_TRUE(depot->submit_hold(7, whole));
        const Completion held = wait_for(*depot, 7);
        EXPECT_EQ(chunks_of(held), std::set<uint32_t>{1});
        const std::vector<Depot::HeldBlocks> blocks{{0, 0, iota_blocks(12, 4)}, {2, 0, iota_blocks(20, 4)}};
        EXPECT_TRUE(depot->place(8, 7, blocks));
        EXPECT_EQ(wait_for(*depot, 8).items_ok, 2u);
        expect_only_good_chunks_arrived(1);
        return HasFailure() ? 1 : 0;
      }),
      0);
}

INSTANTIATE_TEST_SUITE_P(Roots, FourKindsOfDamage, ::testing::Values("tmpfs", "disk", "uring"),
                         [](const auto& suite) { return suite.param; });
INSTANTIATE_TEST_SUITE_P(Roots, BrokenMedium, ::testing::Values("disk"),
                         [](const auto& suite) { return suite.param; });

class UnopenedSegments : public DamagedFiles {};

// N4: the kernel does not open a segment file that is there.
TEST_P(UnopenedSegments, AreIoErrorsAndWhatIsOpenIsServedOn) {
  EXPECT_EQ(exit_code_of_child([this] {
              Options small = options();
              small.roots[0].segment_bytes = 72 << 10;  // a segment for each chunk
              std::vector<Key> keys;
              {
                const auto depot = open(small);
                EXPECT_TRUE(depot->attach(cache_.paged()));
                cache_.fill(1);
                keys = prompt_keys(ns_, 1, 3);
                for (size_t i = 0; i < 3; ++i) store_all(*depot, keys, i, i + 1);
              }
              const auto depot = open(small);
              EXPECT_TRUE(depot->attach(cache_.paged()));
              EXPECT_EQ(load(*depot, plan_of(*depot, keys, 0, 1, 100)).items_ok, 1u);
              const LoadPlan all = plan_of(*depot, keys, 0, 2, 100);
              if (!forbid_open_flag(O_NOFOLLOW, EIO)) return 2;
              std::mutex saying;
              std::string said;
              set_log_sink([&](LogLevel, std::string_view line) {
                const std::lock_guard lock(saying);
                said += line;
              });
              const Completion done = load(*depot, all);
              const auto silent = [&] {
                const std::lock_guard lock(saying);
                return said.empty();
              };
              for (int i = 0; i < 500 && silent(); ++i) usleep(10'000);
              set_log_sink(nullptr);
              EXPECT_EQ(done.items_ok, 1u);
              EXPECT_EQ(chunks_of(done), std::set<uint32_t>{1});
              EXPECT_EQ(depot->stats().load.failures.io_error, 1u);
              EXPECT_EQ(depot->stats().load.failures.absent, 0u);
              EXPECT_NE(said.find("cannot open"), std::string::npos) << said;
              return HasFailure() ? 1 : 0;
            }),
            0);
}

INSTANTIATE_TEST_SUITE_P(Roots, UnopenedSegments, ::testing::Values("tmpfs", "disk"),
                         [](const auto& suite) { return suite.param; });

class RemovedSegments : public DamagedFiles {};

// D5: a file that goes while it is filled takes what it held with it, and nothing that is stored afterwards.
TEST_P(RemovedSegments, StopBeingFilledAndWhatTheyHeldIsStoredAnew) {
  auto depot = open();
  ASSERT_TRUE(depot->attach(cache_.paged()));
  cache_.fill(1);
  const auto keys = prompt_keys(ns_, 1, 4);
  const std::vector want{want_};
  store_all(*depot, keys, 0, 2);
  for (const auto& entry : std::filesystem::directory_iterator(directory_.path() + "/root/segments"))
    std::filesystem::remove(entry.path());
  for (int i = 0; i < 500 && depot->longest_prefix(keys, want) > 0; ++i) usleep(10'000);
  EXPECT_EQ(depot->longest_prefix(keys, want), 0u);
  store_all(*depot, keys, 0, 4);
  for (int restarted = 0; restarted < 2; ++restarted) {
    ASSERT_EQ(depot->longest_prefix(keys, want), 4u);
    EXPECT_EQ(load(*depot, plan_of(*depot, keys, 0, 4, 100)).items_ok, 4u);
    depot.reset();
    depot = open();
    ASSERT_TRUE(depot->attach(cache_.paged()));
  }
}

// The same of one that is cut short: what lies before the cut is served on.
TEST_P(RemovedSegments, AreLeftWhenTheyAreTruncatedToo) {
  auto depot = open();
  ASSERT_TRUE(depot->attach(cache_.paged()));
  cache_.fill(1);
  const auto keys = prompt_keys(ns_, 1, 6);
  store_all(*depot, keys, 0, 3);
  const ExtentRef second = plan_of(*depot, keys, 0, 3, 100).items[1].where;
  for (const auto& entry : std::filesystem::directory_iterator(directory_.path() + "/root/segments")) {
    const bool filled = entry.path().filename() == segment_name(second.segment);
    std::filesystem::resize_file(entry.path(), filled ? second.offset : 0);
  }
  // What is stored meanwhile may go behind the end, and is then a miss or refused; afterwards nothing does.
  for (int i = 0; i < 500 && load(*depot, plan_of(*depot, keys, 0, 3, 100)).items_ok > 1; ++i) usleep(10'000);
  EXPECT_EQ(load(*depot, plan_of(*depot, keys, 0, 1, 100)).items_ok, 1u) << "before the cut";
  for (const size_t chunk : {1, 2}) depot->forget(keys[chunk], 0);
  usleep(2'500'000);
  store_all(*depot, keys, 1, 6);
  for (int restarted = 0; restarted < 2; ++restarted) {
    ASSERT_EQ(depot->longest_prefix(keys, std::vector{want_}), 6u);
    EXPECT_EQ(load(*depot, plan_of(*depot, keys, 0, 6, 100)).items_ok, 6u);
    depot.reset();
    depot = open();
    ASSERT_TRUE(depot->attach(cache_.paged()));
  }
}

INSTANTIATE_TEST_SUITE_P(Roots, RemovedSegments, ::testing::Values("tmpfs", "disk"),
                         [](const auto& suite) { return suite.param; });

class DamagedManifest : public DamagedFiles {};

TEST_P(DamagedManifest, IsToldCountedAndWrittenAnewWhenItsNamespaceIsRegistered) {
  const auto manifest = [this] {
    return std::filesystem::directory_iterator(directory_.path() + "/root/manifests")->path();
  };
  const auto content = [&] {
    std::ifstream file(manifest(), std::ios::binary);
    return std::string((std::istreambuf_iterator<char>(file)), {});
  };
  {
    const auto depot = open();
  }
  const std::string whole = content();
  const std::vector<std::pair<std::string, void (*)(const std::filesystem::path&)>> damages{
      {"a byte",
       [](const auto& file) { std::fstream(file, std::ios::in | std::ios::out).seekp(2).put('X'); }},
      {"cut short", [](const auto& file) { std::filesystem::resize_file(file, 4); }},
      {"empty", [](const auto& file) { std::filesystem::resize_file(file, 0); }},
      {"too long", [](const auto& file) { std::filesystem::resize_file(file, 2 << 20); }},
  };
  for (const auto& [what, damage] : damages) {
    SCOPED_TRACE(what);
    damage(manifest());
    std::vector<std::string> said;
    set_log_sink([&said](LogLevel level, std::string_view line) {
      if (level == LogLevel::warning) said.emplace_back(line);
    });
    const auto depot = open();
    const uint64_t counted = depot->stats().roots[0].mended_manifests;
    ASSERT_TRUE(depot->register_namespace(R"({"model":"m"})"));
    set_log_sink(nullptr);
    ASSERT_EQ(said.size(), 1u);
    EXPECT_NE(said[0].find("was damaged and is written anew"), std::string::npos) << said[0];
    EXPECT_NE(said[0].find(manifest().filename().string()), std::string::npos) << said[0];
    EXPECT_EQ(counted, 1u);
    EXPECT_EQ(depot->stats().roots[0].mended_manifests, 1u) << "mended once is mended";
    EXPECT_EQ(content(), whole);
  }
}

INSTANTIATE_TEST_SUITE_P(Roots, DamagedManifest, ::testing::Values("tmpfs"),
                         [](const auto& suite) { return suite.param; });

}  // namespace
}  // namespace tokendepot::testing
