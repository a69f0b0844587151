// Loads and stores in motion: hostile plans, job ids, bounds, deadlines, close.
#include "transfer/transfers.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <set>
#include <thread>

#include "transfers_fixture.h"

namespace tokendepot::testing {
namespace {

TEST_P(TransfersOn, HostilePlansAreMissesAndTouchNothing) {
  auto depot = open();
  ASSERT_TRUE(depot->attach(cache_.paged()));
  cache_.fill(1);
  const auto keys = prompt_keys(ns_, 1, 2);
  store_all(*depot, keys, 0, 2);
  const LoadPlan good = plan_of(*depot, keys, 0, 1, 100);
  ASSERT_EQ(good.items.size(), 1u);
  cache_.clear();
  const auto untouched = blocks(0, kBlocks);
  std::vector<std::pair<std::string, LoadItem>> hostile;
  auto vary = [&](const std::string& what, auto change) {
    LoadItem item = good.items[0];
    change(item);
    hostile.emplace_back(what, item);
  };
  vary("offset wraps", [](LoadItem& i) { i.where.offset = 0 - i.where.bytes; });
  vary("offset far out", [](LoadItem& i) { i.where.offset = 1ull << 61; });
  vary("offset odd", [](LoadItem& i) { i.where.offset = 5; });
  vary("offset of nothing", [](LoadItem& i) { i.where.offset = 512 << 10; });
  vary("too many bytes", [](LoadItem& i) { i.where.bytes = 1ull << 61; });
  vary("no bytes", [](LoadItem& i) { i.where.bytes = 0; });
  vary("block below", [](LoadItem& i) { i.blocks[1] = -2; });
  vary("block above", [](LoadItem& i) { i.blocks[1] = kBlocks; });
  vary("too few blocks", [](LoadItem& i) { i.blocks.pop_back(); });
  vary("too many blocks", [](LoadItem& i) { i.blocks.push_back(0); });
  vary("part inside out", [](LoadItem& i) { i.part = {2, 1, 0, 4}; });
  vary("part of all heads", [](LoadItem& i) { i.part = {0, 65535, 0, 65535}; });
  vary("other kind", [](LoadItem& i) { i.kind = LayoutKind::opaque; });
  vary("other tokens", [](LoadItem& i) { i.tokens = 128; });
  vary("other key", [](LoadItem& i) { i.key.bytes[0] ^= 1; });
  vary("other segment", [](LoadItem& i) { i.where.segment = {0xfeed, 7}; });
  for (const auto& [what, item] : hostile) {
    LoadPlan plan = good;
    plan.items = {item};
    const Completion done = load(*depot, plan);
    EXPECT_EQ(done.items_ok, 0u) << what;
  }
  LoadPlan foreign = good;
  foreign.ns.bytes[3] ^= 1;
  EXPECT_EQ(load(*depot, foreign).items_ok, 0u);
  LoadPlan endless = good;
  endless.deadline_ns = UINT64_MAX;
  EXPECT_EQ(blocks(0, kBlocks), untouched);
  EXPECT_EQ(load(*depot, endless).items_ok, 1u) << "a deadline that overflows the clock is none";
}

TEST_P(TransfersOn, AJobIdIsInUseUntilItWasReported) {
  auto depot = open();
  ASSERT_TRUE(depot->attach(cache_.paged()));
  ASSERT_TRUE(depot->submit_load(5, {}));
  const auto again = depot->submit_load(5, {});
  ASSERT_FALSE(again);
  EXPECT_EQ(again.error().kind, ErrorKind::busy);
  EXPECT_FALSE(depot->submit_store(5, {}));
  EXPECT_EQ(depot->poll().size(), 1u);
  EXPECT_TRUE(depot->submit_store(5, {}));
  EXPECT_EQ(wait_for(*depot, 5).kind, JobKind::store);
}

TEST_P(TransfersOn, AnExtentLargerThanTheSlabFailsAndOthersGoOn) {
  if (GetParam() == "tmpfs") GTEST_SKIP() << "mapped roots need no slab";
  // Written by a rank that owns all 64 layers; read by one that owns two of them.
  const GroupShape whole = small_shape({0, 64, 0, 4});  // 2 MiB an extent
  HostCache writer_cache(whole, 8);
  Options big = options();
  big.roots[0].segment_bytes = 4 << 20;
  {
    auto depot = open(big);
    ASSERT_TRUE(depot->attach(writer_cache.paged()));
    store_all(*depot, prompt_keys(ns_, 1, 1), 0, 1);
  }
  Options narrow = big;
  narrow.slab_bytes = 1 << 20;
  auto depot = open(narrow);
  ASSERT_TRUE(depot->attach(cache_.paged()));
  const auto keys = prompt_keys(ns_, 1, 1);
  const auto large = plan_chunks(*depot, ns_, keys, want_of(small_shape()), 0, 1, 0);
  ASSERT_TRUE(large);
  const Completion refused = load(*depot, *large);
  ASSERT_EQ(refused.failures.size(), 1u);
  EXPECT_EQ(refused.failures[0].reason, ItemFailure::Reason::dropped);
  cache_.fill(3);
  const auto mine = prompt_keys(ns_, 9, 2);
  store_all(*depot, mine, 0, 2);
  EXPECT_EQ(load(*depot, plan_of(*depot, mine, 0, 2, 100)).items_ok, 2u);
}

TEST_P(TransfersOn, AnExtentThatIsReadInPiecesIsVerifiedInEveryOne) {
  const GroupShape whole = small_shape({0, 64, 0, 4});  // 2 MiB an extent, 512 KiB a shard
  const GroupShape middle = small_shape({0, 64, 1, 3});
  Options big = options();
  big.roots[0].segment_bytes = 4 << 20;
  HostCache writer_cache(whole, 8);
  auto depot = open(big);
  ASSERT_TRUE(depot->attach(writer_cache.paged()));
  writer_cache.fill(1);
  const auto keys = prompt_keys(ns_, 1, 1);
  store_all(*depot, keys, 0, 1);
  const auto expected = writer_cache.block(2);
  const auto plan = plan_chunks(*depot, ns_, keys, want_of(whole), 0, 1, 4);
  ASSERT_TRUE(plan);
  EXPECT_EQ(load(*depot, *plan).items_ok, 1u);
  EXPECT_EQ(writer_cache.block(6), expected);

  HostCache part_cache(middle, 8);
  Options beside = big;
  beside.roots[0].read_only = true;
  auto reader = open(beside);
  ASSERT_TRUE(reader->attach(part_cache.paged()));
  const ExtentRef where = plan->items[0].where;
  const std::string file = directory_.path() + "/root/segments/" + segment_name(where.segment);
  auto flip = [&file](uint64_t at) {
    const int fd = ::open(file.c_str(), O_RDWR);
    char byte = 0;
    ASSERT_EQ(pread(fd, &byte, 1, static_cast<off_t>(at)), 1);
    byte = static_cast<char>(byte ^ 1);
    ASSERT_EQ(pwrite(fd, &byte, 1, static_cast<off_t>(at)), 1);
    ::close(fd);
  };
  part_cache.clear();
  const auto untouched = part_cache.block(0);
  const uint64_t first = 4096 + (512 << 10);  // heads 1 and 2
  const uint64_t last = first + (1 << 20) - 1;
  for (uint64_t at = first; at <= last; at = at + 60'000 > last && at != last ? last : at + 60'000) {
    flip(where.offset + at);
    const Completion done = load(*reader, *plan);
    ASSERT_EQ(done.failures.size(), 1u) << at;
    EXPECT_EQ(done.failures[0].reason, ItemFailure::Reason::corrupt) << at;
    ASSERT_EQ(part_cache.block(0), untouched) << at;
    flip(where.offset + at);
  }
  LoadPlan good = *plan;
  good.items[0].blocks = {0, 1, 2, 3};
  flip(where.offset + first - 1);  // of a head that is not asked for
  EXPECT_EQ(load(*reader, good).items_ok, 1u);
  const auto rows = part_cache.block(2);
  for (size_t token = 0; token < rows.size() / 128; ++token) {
    ASSERT_TRUE(std::equal(rows.begin() + static_cast<int64_t>(token * 128),
                           rows.begin() + static_cast<int64_t>(token * 128 + 128),
                           expected.begin() + static_cast<int64_t>(token * 256 + 64)))
        << token;
  }
}

// D3: what a short file does not give is not taken from who used the buffer before.
TEST_P(TransfersOn, AShortFileNeverHandsOutStaleBytes) {
  Options one = options();
  one.slab_bytes = 128 << 10;  // one extent at a time through the same staging memory
  one.store_queue_bytes = 64 << 20;
  auto depot = open(one);
  ASSERT_TRUE(depot->attach(cache_.paged()));
  cache_.clear(std::byte{0xAA});
  const auto first = prompt_keys(ns_, 1, 1);
  store_all(*depot, first, 0, 1);
  cache_.fill(2);
  const auto second = prompt_keys(ns_, 2, 8);
  store_all(*depot, second, 0, 8);
  const LoadPlan one_plan = plan_of(*depot, first, 0, 1, 100);
  const LoadPlan batch = plan_of(*depot, second, 0, 8, 0);
  uint64_t third = 0;
  for (const LoadItem& item : batch.items) {
    if (item.chunk == 3) third = item.where.offset;
  }
  // Everything from within chunk 3 on is gone.
  std::filesystem::resize_file(
      directory_.path() + "/root/segments/" + segment_name(batch.items[0].where.segment),
      third + 4096 + 16896);
  cache_.clear(std::byte{0xEE});
  EXPECT_EQ(load(*depot, one_plan).items_ok, 1u);
  EXPECT_EQ(cache_.block(100)[0], std::byte{0xAA});
  const Completion torn = load(*depot, batch);
  std::set<uint32_t> failed;
  for (const ItemFailure& failure : torn.failures) failed.insert(failure.chunk);
  EXPECT_TRUE(failed.contains(3));
  HostCache expected(small_shape(), kBlocks);
  expected.fill(2);
  for (uint32_t chunk = 0; chunk < 8; ++chunk) {
    for (int32_t b = 0; b < 4; ++b) {
      const auto id = static_cast<int32_t>(chunk) * 4 + b;
      const auto got = cache_.block(id);
      if (failed.contains(chunk)) {
        EXPECT_EQ(std::count(got.begin(), got.end(), std::byte{0xAA}), 0) << "stale bytes in chunk " << chunk;
      } else {
        EXPECT_EQ(got, expected.block(id));
      }
    }
  }
  EXPECT_EQ(load(*depot, one_plan).items_ok, 1u) << "and a good batch right behind is exact";
  EXPECT_EQ(cache_.block(100)[0], std::byte{0xAA});
  EXPECT_EQ(depot->stats().load.failures.absent, failed.size());
}

// D5: a verdict that turned out wrong is not given again.
TEST_P(TransfersOn, MissingAndShortFilesAreNotPromisedTwiceAndHeal) {
  std::vector<Key> keys;
  {
    auto depot = open();
    ASSERT_TRUE(depot->attach(cache_.paged()));
    cache_.fill(1);
    keys = prompt_keys(ns_, 1, 60);
    for (size_t i = 0; i < 60; i += 4) store_all(*depot, keys, i, i + 4);
  }
  auto depot = open();
  ASSERT_TRUE(depot->attach(cache_.paged()));
  ASSERT_EQ(depot->longest_prefix(keys, std::vector{want_}), 60u);
  const LoadPlan all = plan_of(*depot, keys, 0, 60, 0);
  std::vector<std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator(directory_.path() + "/root/segments"))
    files.push_back(entry.path());
  std::ranges::sort(files);
  ASSERT_GE(files.size(), 4u);
  std::filesystem::remove(files[0]);
  std::filesystem::resize_file(files[1], 300'000);
  std::filesystem::resize_file(files[2], 0);
  const Completion done = load(*depot, all);
  ASSERT_FALSE(done.failures.empty());
  uint32_t lowest = 60;
  for (const ItemFailure& failure : done.failures) lowest = std::min(lowest, failure.chunk);
  EXPECT_EQ(depot->longest_prefix(keys, std::vector{want_}), lowest);
  std::vector<uint8_t> have(60);
  depot->stored(keys, want_, have);
  for (const ItemFailure& failure : done.failures) EXPECT_EQ(have[failure.chunk], 0u) << failure.chunk;
  cache_.fill(1);
  for (size_t i = 0; i < 60; ++i) {
    if (have[i] == 0) store_all(*depot, keys, i, i + 1);
  }
  EXPECT_EQ(depot->longest_prefix(keys, std::vector{want_}), 60u);
  EXPECT_EQ(load(*depot, plan_of(*depot, keys, 0, 60, 0)).items_ok, 60u);
}

TEST_P(TransfersOn, CloseEndsLoadsAndStoresInMotion) {
  for (int round = 0; round < 15; ++round) {
    auto depot = open();
    ASSERT_TRUE(depot->attach(cache_.paged()));
    cache_.fill(1);
    const auto keys = prompt_keys(ns_, 1, 40);
    if (round == 0) {
      for (size_t i = 0; i < 40; i += 4) store_all(*depot, keys, i, i + 4);
    }
    const LoadPlan plan = plan_of(*depot, keys, 0, 20, 0);
    for (uint64_t job = 0; job < 20; ++job) {
      ASSERT_TRUE(depot->submit_load(job, plan));
      StorePlan store;
      store.ns = ns_;
      store.items.push_back(
          {prompt_keys(ns_, 100 + static_cast<uint32_t>(job), 1)[0], 0, 0, iota_blocks(200, 4)});
      ASSERT_TRUE(depot->submit_store(100 + job, store));
      if (job % 5 == 2) depot->cancel(job);
    }
    usleep(static_cast<useconds_t>(round) * 300);
    depot.reset();
  }
}

TEST_P(TransfersOn, WhatIsHeldNeedsNoMediumAnyMore) {
  auto depot = open();
  ASSERT_TRUE(depot->attach(cache_.paged()));
  cache_.fill(1);
  const auto keys = prompt_keys(ns_, 1, 8);
  store_all(*depot, keys, 0, 8);
  const LoadPlan plan = plan_of(*depot, keys, 0, 8, 0);
  cache_.clear();
  const auto cleared = blocks(0, kBlocks);
  ASSERT_TRUE(depot->submit_hold(7, plan));
  EXPECT_EQ(wait_for(*depot, 7).items_ok, 8u);
  EXPECT_EQ(blocks(0, kBlocks), cleared) << "nothing is written yet";
  EXPECT_FALSE(depot->submit_load(7, plan)) << "the id stands for what is held";
  for (const auto& entry : std::filesystem::directory_iterator(directory_.path() + "/root/segments"))
    std::filesystem::remove(entry.path());
  const std::vector<Depot::HeldBlocks> wanted{{2, 0, iota_blocks(100, 4)}, {5, 0, iota_blocks(120, 4)}};
  std::vector<Depot::HeldBlocks> hostile = wanted;
  hostile[1].blocks[3] = kBlocks;
  EXPECT_FALSE(depot->place(8, 7, hostile));
  ASSERT_TRUE(depot->place(8, 7, wanted));
  EXPECT_EQ(wait_for(*depot, 8).items_ok, 2u);
  HostCache expected(small_shape(), kBlocks);
  expected.fill(1);
  for (int32_t b = 0; b < 4; ++b) {
    EXPECT_EQ(cache_.block(100 + b), expected.block(8 + b));
    EXPECT_EQ(cache_.block(120 + b), expected.block(20 + b));
  }
  EXPECT_EQ(depot->place(9, 7, wanted).error().kind, ErrorKind::not_found);
}

TEST_P(TransfersOn, HeldLoadsEndWithTheDepotAndGiveTheirMemoryBack) {
  Options small = options();
  small.slab_bytes = 2 << 20;
  auto depot = open(small);
  ASSERT_TRUE(depot->attach(cache_.paged()));
  cache_.fill(1);
  const auto keys = prompt_keys(ns_, 1, 8);
  store_all(*depot, keys, 0, 8);
  const LoadPlan plan = plan_of(*depot, keys, 0, 8, 0);
  for (uint64_t round = 0; round < 20; ++round) {
    ASSERT_TRUE(depot->submit_hold(round, plan));
    EXPECT_EQ(wait_for(*depot, round).items_ok, 8u) << "round " << round;
    depot->drop_held(round);
  }
  ASSERT_TRUE(depot->submit_hold(50, plan));
  wait_for(*depot, 50);
  ASSERT_TRUE(depot->submit_hold(51, plan));
}

TEST_P(TransfersOn, AfterAJobWasReportedItsBlocksStayAsTheyAre) {
  auto depot = open();
  ASSERT_TRUE(depot->attach(cache_.paged()));
  cache_.fill(1);
  const auto keys = prompt_keys(ns_, 1, 40);
  for (size_t i = 0; i < 40; i += 4) store_all(*depot, keys, i, i + 4);
  for (uint64_t round = 0; round < 60; ++round) {
    const auto deadline = round % 2 == 0 ? std::chrono::nanoseconds(20'000 * (round + 1)) : 0ns;
    ASSERT_TRUE(depot->submit_load(round, plan_of(*depot, keys, 0, 20, 0, deadline)));
    usleep(static_cast<useconds_t>(round) * 10);
    if (round % 2 == 1) depot->cancel(round);
    const Completion done = wait_for(*depot, round);
    EXPECT_EQ(done.items_ok + done.failures.size(), 20u);
    cache_.clear();  // the engine reuses them; a late write is seen here, or by the thread sanitizer
    const auto mine = blocks(0, 80);
    usleep(300);
    ASSERT_EQ(blocks(0, 80), mine) << "round " << round;
  }
}

TEST_P(TransfersOn, BlocksReusedAfterATimeOutAreNotPublished) {
  auto depot = open();
  ASSERT_TRUE(depot->attach(cache_.paged()));
  for (uint32_t round = 0; round < 40; ++round) {
    cache_.fill(round);
    const auto keys = prompt_keys(ns_, round, 8);
    StorePlan plan;
    plan.ns = ns_;
    for (uint32_t i = 0; i < 8; ++i)
      plan.items.push_back({keys[i], i, 0, iota_blocks(static_cast<int32_t>(i * 4), 4)});
    ASSERT_TRUE(depot->submit_store(round, plan));
    const bool gathered = depot->wait_gathered(0ns);
    const Completion done = wait_for(*depot, round);
    EXPECT_EQ(done.items_ok + done.failures.size(), 8u);
    // What the engine may not trust it did not get: a failed item is not to be found.
    if (gathered) continue;
    std::vector<uint8_t> have(8);
    depot->stored(keys, want_, have);
    for (const ItemFailure& failure : done.failures) EXPECT_EQ(have[failure.chunk], 0u);
  }
  EXPECT_TRUE(depot->wait_gathered(std::chrono::nanoseconds(INT64_MAX))) << "no overflow, nothing is owed";
  EXPECT_TRUE(depot->flush(std::chrono::nanoseconds(INT64_MAX)));
}

TEST_P(TransfersOn, NothingIsKeptAfterTheWorkIsDone) {
  auto depot = open(options(4 << 20));
  ASSERT_TRUE(depot->attach(cache_.paged()));
  const auto descriptors = [] {
    return std::distance(std::filesystem::directory_iterator("/proc/self/fd"), {});
  };
  cache_.fill(1);
  std::ptrdiff_t warm = 0;
  for (uint32_t round = 0; round < 60; ++round) {
    const auto keys = prompt_keys(ns_, round, 8);
    store_all(*depot, keys, 0, 8);
    const auto plan = plan_chunks(*depot, ns_, keys, want_, 0, 8, 100);
    if (plan) load(*depot, *plan);
    if (round == 20) warm = descriptors();
  }
  EXPECT_LE(descriptors(), warm + 4);
}

// C3: too large for the root is refused at attach; capacity below three segments at open.
TEST_P(TransfersOn, ExtentsThatCannotFitAreRefusedUpFront) {
  Options tiny = options(3 << 20);
  auto depot = open(tiny);
  HostCache large(small_shape({0, 64, 0, 4}), 4);  // 2 MiB an extent: three do not fit
  const auto refused = depot->attach(large.paged());
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().kind, ErrorKind::invalid_argument);
  Options none = options(1);
  none.roots[0].path += "2";
  EXPECT_FALSE(Depot::open(none));
  none.roots[0].capacity_bytes = 0;
  EXPECT_FALSE(Depot::open(none));
  none = options();
  none.device_threads = 0;
  EXPECT_FALSE(Depot::open(none));
  none = options();
  none.io_depth = 1000;
  EXPECT_FALSE(Depot::open(none));
}

INSTANTIATE_TEST_SUITE_P(Roots, TransfersOn, ::testing::Values("tmpfs", "disk", "uring"),
                         [](const auto& suite) { return suite.param; });

}  // namespace
}  // namespace tokendepot::testing
