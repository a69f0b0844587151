// Time to live, quotas, pins and scrub on a root: what goes, what stays, and what a damaged file costs.
#include <algorithm>
#include <fstream>
#include <map>

#include "damage.h"
#include "depot_fixture.h"
#include "format/keeper_notes.h"
#include "format/policies.h"
#include "store/scrub.h"
#include "tokendepot/tools.h"

namespace tokendepot::testing {
namespace {

constexpr uint64_t kSegment = 1 << 20;
constexpr uint64_t kHour = 3600ull * 1'000'000'000;

NamespaceDigest namespace_of(uint8_t n) {
  NamespaceDigest ns;
  ns.bytes.fill(n);
  return ns;
}

Key key_of(uint32_t n) {
  Key key;
  std::memcpy(key.bytes.data(), &n, sizeof n);
  key.bytes[31] = 1;
  return key;
}

Policies sample() {
  Policies policies;
  policies.revision = 3;
  policies.rules = {{Policy::Kind::ttl, {}, 5, 6, {}},
                    {Policy::Kind::ttl, namespace_of(1), 7, 8, {}},
                    {Policy::Kind::quota, namespace_of(1), 1 << 20, 9, {}},
                    {Policy::Kind::pin, namespace_of(2), 0, 10, {key_of(1), key_of(2)}}};
  return policies;
}

TEST(PoliciesFormat, what_is_written_is_read) {
  const auto read = decode_policies(encode_policies(sample()));
  ASSERT_TRUE(read) << read.error().message;
  EXPECT_EQ(*read, sample());
  KeeperNotes notes{1, {2, 3}, 4, 5, 6, 7, 8, 9};
  damage::Bytes bytes(kKeeperNotesBytes);
  encode_keeper_notes(notes, std::span<std::byte, kKeeperNotesBytes>(bytes));
  EXPECT_EQ(*decode_keeper_notes(bytes), notes);
}

TEST(PoliciesFormat, every_changed_byte_and_every_shortened_copy_is_seen) {
  const auto read = [](const damage::Bytes& b) { return decode_policies(b); };
  damage::expect_every_changed_byte_is_seen(encode_policies(sample()), read);
  damage::expect_every_shortened_copy_is_seen(encode_policies(sample()), read);
  damage::Bytes bytes(kKeeperNotesBytes);
  encode_keeper_notes({1, {2, 3}, 4, 5, 6, 7, 8, 9}, std::span<std::byte, kKeeperNotesBytes>(bytes));
  damage::expect_every_changed_byte_is_seen(bytes,
                                            [](const damage::Bytes& b) { return decode_keeper_notes(b); });
}

TEST(PoliciesFormat, a_rule_that_cannot_be_is_refused) {
  Policies twice = sample();
  twice.rules.push_back(twice.rules[2]);
  EXPECT_FALSE(check_policies(twice));
  Policies of_nobody = sample();
  of_nobody.rules[2].ns = {};
  EXPECT_FALSE(check_policies(of_nobody));
  Policies many = sample();
  many.rules[3].keys.resize(kMaxPinnedKeys + 1);
  EXPECT_FALSE(check_policies(many));
}

class SetClock final : public Clock {
 public:
  uint64_t steady_ns() const override { return 0; }  // judgements take no time, and none is put off
  uint64_t wall_ns() const override { return wall; }
  uint64_t wall = 1000 * kHour;
};

struct Process {
  Process(const Options& options, const Clock& clock_of_it) : clock(clock_of_it) {
    auto opened = Root::open(options.roots[0], 0, options);
    EXPECT_TRUE(opened) << (opened ? "" : opened.error().message);
    root = std::move(*opened);
    replay = std::make_unique<Replay>(*root, segments, &catalog);
    EXPECT_TRUE(replay->first());
    auto made = RootWriter::open(*root, *replay, segments, clock, 0);
    EXPECT_TRUE(made) << (made ? "" : made.error().message);
    writer = std::move(*made);
    replay->tend(clock);
  }
  static Record put_of(uint8_t ns, uint32_t key) {
    Record put;
    put.key = key_of(key);
    put.ns_prefix = prefix_of(namespace_of(ns));
    put.part = {0, 1, 0, 1};
    put.tokens = 16;
    return put;
  }
  /// Stores an extent; false where there is no space.
  bool store(uint8_t ns, uint32_t key, uint64_t bytes = kSegment) {
    if (writer->wants_spare() && !writer->prepare_spare(nullptr)) return false;
    auto place = writer->reserve(bytes);
    return place && writer->acknowledge(*place, put_of(ns, key)).has_value();
  }
  bool finds(uint32_t key) const {
    const Record put = put_of(1, key);
    Catalog& known = const_cast<Catalog&>(catalog);
    return catalog.find(put.key, *known.part_id({put.group, put.kind, put.part, put.tokens})).has_value();
  }

  const Clock& clock;
  SegmentTable segments;
  Catalog catalog{segments};
  std::unique_ptr<Root> root;
  std::unique_ptr<Replay> replay;
  std::unique_ptr<RootWriter> writer;
};

class PoliciesTest : public ::testing::Test {
 protected:
  Options options(uint64_t segments = 6) {
    Options options;
    options.roots = {{.path = root(), .capacity_bytes = segments * kSegment, .segment_bytes = kSegment}};
    options.free_space_reserve = 0;
    return options;
  }
  std::string root() const { return directory_.path() + "/root"; }
  void set(Policy::Kind kind, uint8_t ns, uint64_t value, std::vector<Key> keys = {}) {
    const auto done =
        set_policy(root(), {kind, ns == 0 ? NamespaceDigest{} : namespace_of(ns), value, 0, std::move(keys)},
                   6 * kSegment);
    ASSERT_TRUE(done) << done.error().message;
  }
  TemporaryDirectory directory_{"/dev/shm"};
  SetClock clock_;
};

TEST_F(PoliciesTest, PinnedExtentsOutliveAnyNumberOfStores) {
  Process process(options(), clock_);
  for (uint32_t n = 0; n < 3; ++n) ASSERT_TRUE(process.store(1, n));
  set(Policy::Kind::pin, 1, 0, {key_of(0)});  // told of a key that was stored before
  process.replay->tend(clock_);
  for (uint32_t n = 10; n < 40; ++n) {
    ++clock_.wall;
    ASSERT_TRUE(process.store(2, n));
  }
  EXPECT_TRUE(process.finds(0));
  EXPECT_FALSE(process.finds(1));
  EXPECT_EQ(process.replay->policies().pinned_bytes(), kSegment);

  ASSERT_EQ(*drop_policies(root(), Policy::Kind::pin, namespace_of(1), std::nullopt), 1u);
  process.replay->tend(clock_);
  for (uint32_t n = 40; n < 60; ++n) ASSERT_TRUE(process.store(2, n));
  EXPECT_FALSE(process.finds(0)) << "and goes once it is unpinned";
}

TEST_F(PoliciesTest, APinEndsByItself) {
  clock_.wall = system_clock().wall_ns();
  Process process(options(), clock_);
  ASSERT_TRUE(process.store(1, 0));
  ASSERT_TRUE(process.store(1, 1));
  set(Policy::Kind::pin, 1, clock_.wall + kHour);
  process.replay->tend(clock_);
  EXPECT_EQ(process.replay->policies().pinned_bytes(), 2 * kSegment);
  clock_.wall += kHour;
  process.replay->tend(clock_);
  EXPECT_EQ(process.replay->policies().pinned_bytes(), 0u);
}

// C3: everything pinned.
TEST_F(PoliciesTest, WithEverythingPinnedStoresAreDroppedForThatReasonAndWithoutALoop) {
  Process process(options(3), clock_);
  for (uint32_t n = 0; n < 3; ++n) ASSERT_TRUE(process.store(1, n));
  set(Policy::Kind::pin, 1, 0);
  process.replay->tend(clock_);
  // Half of the capacity is pinned (one segment of three), the others are in use.
  for (const auto& [slot, segment] : process.segments.present_segments(0)) process.segments.acquire(slot);
  const auto none = process.writer->prepare_spare(nullptr);
  ASSERT_FALSE(none);
  EXPECT_EQ(none.error().kind, ErrorKind::no_space);
  EXPECT_TRUE(process.writer->space_is_pinned());
  for (const auto& [slot, segment] : process.segments.present_segments(0)) process.segments.release(slot);
  EXPECT_TRUE(process.store(1, 9)) << "what is beyond the pins' share can still go";
  EXPECT_FALSE(process.writer->space_is_pinned());
}

TEST_F(PoliciesTest, APinBeyondItsShareIsRefusedWithTheFigures) {
  Process process(options(), clock_);
  for (uint32_t n = 0; n < 5; ++n) ASSERT_TRUE(process.store(1, n));
  const auto refused = set_policy(root(), {Policy::Kind::pin, namespace_of(1), 0, 0, {}}, 6 * kSegment);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().kind, ErrorKind::invalid_argument);
  EXPECT_NE(refused.error().message.find(std::to_string(3 * kSegment)), std::string::npos)
      << refused.error().message;
  EXPECT_FALSE(std::filesystem::exists(root() + "/policies")) << "nothing changed";
  EXPECT_FALSE(set_policy(root(), {Policy::Kind::pin, namespace_of(1), 0, 0, {}})) << "capacity not known";
}

TEST_F(PoliciesTest, ANamespaceOverItsQuotaLosesItsOwnColdestOnly) {
  Process process(options(8), clock_);
  for (uint32_t n = 0; n < 3; ++n) {
    ++clock_.wall;
    ASSERT_TRUE(process.store(1, n));
  }
  for (uint32_t n = 10; n < 13; ++n) {
    ++clock_.wall;
    ASSERT_TRUE(process.store(2, n));
  }
  set(Policy::Kind::quota, 2, 2 * kSegment);
  process.replay->tend(clock_);
  EXPECT_EQ(process.writer->reclaim(), 1u);
  EXPECT_FALSE(process.finds(10));
  EXPECT_TRUE(process.finds(11));
  for (uint32_t n = 13; n < 40; ++n) {  // far more than there is room for
    ++clock_.wall;
    ASSERT_TRUE(process.store(2, n));
  }
  for (uint32_t n = 0; n < 3; ++n) EXPECT_TRUE(process.finds(n)) << "the other's are colder, and stay";
  EXPECT_GT(process.replay->evicted().quota, 0u);
  EXPECT_EQ(process.replay->evicted().capacity, 0u);
}

TEST_F(PoliciesTest, InASegmentThatNamespacesShareTheQuotaTakesItsOwnExtents) {
  Process process(options(), clock_);
  for (uint32_t n = 0; n < 3; ++n) ASSERT_TRUE(process.store(1, n, 4096));
  Replay& replay = *process.replay;
  // The same extents told once more, as after a compaction of the journal, count once.
  std::vector<Record> again;
  for (uint32_t n = 0; n < 3; ++n) again.push_back(Process::put_of(1, n));
  const SegmentId id = process.segments.present_segments(0)[0].second.id;
  for (uint32_t n = 0; n < 3; ++n) {
    again[n].where = {id, n * 4096ull, 4096};
    replay.apply(again[n]);
  }
  ASSERT_TRUE(process.store(2, 7, 4096));
  set(Policy::Kind::quota, 1, 3 * 4096);
  replay.tend(clock_);
  EXPECT_TRUE(replay.policies().verdict().over.empty()) << "12 KiB, not 24";
  set(Policy::Kind::quota, 1, 4096);
  replay.tend(clock_);
  const auto over = replay.policies().verdict().over;
  ASSERT_EQ(over.size(), 1u);
  EXPECT_EQ(over.begin()->second, 2 * 4096u);
}

TEST_F(PoliciesTest, WhatHasOutlivedItsTimeIsNotFoundAndItsSegmentsGo) {
  Process process(options(), clock_);
  ASSERT_TRUE(process.store(1, 0));
  ASSERT_TRUE(process.store(2, 1));
  clock_.wall += 2 * kHour;
  ASSERT_TRUE(process.store(1, 2));
  ASSERT_TRUE(process.store(1, 3));
  set(Policy::Kind::ttl, 1, kHour);
  process.replay->tend(clock_);
  EXPECT_FALSE(process.finds(0));
  EXPECT_EQ(process.catalog.history(key_of(0)), KeyHistory::gone) << "which explains the miss";
  EXPECT_TRUE(process.finds(1)) << "of another namespace";
  EXPECT_TRUE(process.finds(2)) << "young";
  EXPECT_EQ(process.writer->reclaim(), 1u);
  EXPECT_EQ(process.replay->evicted().ttl, kSegment);
  set(Policy::Kind::ttl, 0, kHour);
  process.replay->tend(clock_);
  EXPECT_FALSE(process.finds(1)) << "the root's holds for who has none of its own";
}

TEST_F(PoliciesTest, WithinASegmentTheOldExtentsExpireFirst) {
  Process process(options(), clock_);
  for (uint32_t n = 0; n < 100; ++n) {
    ASSERT_TRUE(process.store(1, n, 4096));
    clock_.wall += kHour;
  }
  set(Policy::Kind::ttl, 1, 50 * kHour);
  process.replay->tend(clock_);
  for (uint32_t n = 0; n < 100; ++n) {
    if (n < 40) {
      EXPECT_FALSE(process.finds(n)) << n;
    }
    if (n > 50) {
      EXPECT_TRUE(process.finds(n)) << n;
    }
  }
  ASSERT_EQ(*drop_policies(root(), Policy::Kind::ttl, namespace_of(1), std::nullopt), 1u);
  process.replay->tend(clock_);
  EXPECT_TRUE(process.finds(0)) << "and what was not removed yet is back without the rule";
}

TEST_F(PoliciesTest, AClockThatIsWrongCostsExpiryAndNothingElse) {
  Process process(options(), clock_);
  set(Policy::Kind::ttl, 1, kHour);
  clock_.wall += 100 * kHour;  // a host whose clock is ahead
  ASSERT_TRUE(process.store(1, 0));
  clock_.wall -= 100 * kHour;
  process.replay->tend(clock_);
  EXPECT_TRUE(process.finds(0)) << "later expiry";
  clock_.wall = 1;
  process.replay->tend(clock_);
  EXPECT_TRUE(process.finds(0));
  clock_.wall = UINT64_MAX;
  process.replay->tend(clock_);
  EXPECT_FALSE(process.finds(0)) << "earlier expiry";
  clock_.wall = 1000 * kHour;
  process.replay->tend(clock_);
  EXPECT_TRUE(process.finds(0));
}

TEST_F(PoliciesTest, ADamagedFileIsToldCountedAndAsIfAbsentAndAnotherVersionIsLeftAlone) {
  Process process(options(), clock_);
  ASSERT_TRUE(process.store(1, 0));
  ASSERT_TRUE(process.store(1, 1));
  set(Policy::Kind::pin, 1, 0);
  process.replay->tend(clock_);
  EXPECT_GT(process.replay->policies().pinned_bytes(), 0u);
  std::fstream(root() + "/policies", std::ios::in | std::ios::out | std::ios::binary).seekp(40).put('\x7f');
  process.replay->tend(clock_);
  process.replay->tend(clock_);
  EXPECT_EQ(process.replay->policies().damaged(), 1u);
  EXPECT_EQ(process.replay->policies().pinned_bytes(), 0u);
  EXPECT_EQ(set_policy(root(), {Policy::Kind::ttl, {}, 1, 0, {}}).error().kind, ErrorKind::corrupt);

  const std::string future("TDPOLICY\x02\0\0\0and more", 20);
  std::ofstream(root() + "/policies", std::ios::binary) << future;
  process.replay->tend(clock_);
  EXPECT_EQ(process.replay->policies().damaged(), 1u) << "not damage";
  EXPECT_EQ(set_policy(root(), {Policy::Kind::ttl, {}, 1, 0, {}}).error().kind, ErrorKind::unsupported);
  std::ifstream left(root() + "/policies", std::ios::binary);
  EXPECT_EQ(std::string(std::istreambuf_iterator<char>(left), {}), future);
}

/// A whole depot, so that extents have headers and digests.
class ScrubTest : public PoliciesTest {
 protected:
  Options engine(uint64_t rate) {
    Options all = options(16);
    all.scrub_bytes_per_second = rate;
    all.poll_ms = 10;
    return all;
  }
  void fill(Depot& depot, size_t chunks) {
    ns_ = *depot.register_namespace(R"({"model":"scrubbed"})");
    EXPECT_TRUE(depot.attach(cache_.paged()));
    cache_.fill(1);
    keys_ = prompt_keys(ns_, 1, chunks);
    for (size_t i = 0; i < chunks; ++i) {
      StorePlan plan{ns_, {{keys_[i], static_cast<uint32_t>(i), 0, iota_blocks(0, kBlocksPerChunk)}}};
      EXPECT_TRUE(depot.submit_store(i + 1, plan));
      EXPECT_EQ(wait_for(depot, i + 1).items_ok, 1u);
    }
  }
  HostCache cache_{small_shape(), 4};
  NamespaceDigest ns_;
  std::vector<Key> keys_;
};

TEST_F(ScrubTest, ABadExtentIsFoundCondemnedAndCountedAndTheOthersStay) {
  {
    auto depot = Depot::open(engine(0));
    ASSERT_TRUE(depot);
    fill(**depot, 40);
  }
  const auto before = list_extents(root());
  ASSERT_TRUE(before);
  ASSERT_EQ(before->size(), 40u);
  const StoredExtent bad = (*before)[3];
  char name[64];
  std::snprintf(name, sizeof name, "/segments/%016lx-%08x.seg", bad.where.segment.writer,
                bad.where.segment.sequence);
  std::fstream(root() + name, std::ios::in | std::ios::out | std::ios::binary)
      .seekp(static_cast<std::streamoff>(bad.where.offset + bad.where.bytes - 1))
      .put('\x5a');
  auto depot = Depot::open(engine(1ull << 30));
  ASSERT_TRUE(depot);
  const auto end = std::chrono::steady_clock::now() + 20s;
  RootStats root_stats;
  do {
    std::this_thread::sleep_for(20ms);
    root_stats = (*depot)->stats().roots[0];
  } while (root_stats.scrub_finished_ns == 0 && std::chrono::steady_clock::now() < end);
  EXPECT_NE(root_stats.scrub_finished_ns, 0u);
  EXPECT_EQ(root_stats.scrub_errors, 1u);
  EXPECT_GT(root_stats.scrubbed_bytes, 0u);
  EXPECT_EQ(root_stats.evicted_bytes.corrupt, bad.where.bytes);
  const auto after = list_extents(root());
  ASSERT_TRUE(after);
  EXPECT_EQ(after->size(), 39u);
  EXPECT_TRUE(std::ranges::none_of(*after, [&](const StoredExtent& e) { return e.where == bad.where; }));
  const auto told = inspect_policies(root());
  ASSERT_TRUE(told);
  EXPECT_EQ(told->notes.finished_bad, 1u);
  EXPECT_EQ(told->notes.capacity_bytes, 16 * kSegment) << "which tools ask for";
}

TEST_F(ScrubTest, ANewProcessDoesNotStartOver) {
  {
    auto depot = Depot::open(engine(0));
    ASSERT_TRUE(depot);
    fill(**depot, 40);
  }
  const uint64_t finished = system_clock().wall_ns();
  damage::Bytes bytes(kKeeperNotesBytes);
  encode_keeper_notes({16 * kSegment, {}, 0, 0, 0, finished, 77, 0},
                      std::span<std::byte, kKeeperNotesBytes>(bytes));
  std::ofstream(root() + "/keeper-notes", std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  auto depot = Depot::open(engine(1ull << 30));
  ASSERT_TRUE(depot);
  std::this_thread::sleep_for(2500ms);
  const RootStats stats = (*depot)->stats().roots[0];
  EXPECT_EQ(stats.scrubbed_bytes, 0u) << "the last pass ended just now";
  EXPECT_EQ(stats.scrub_finished_ns, finished);
}

}  // namespace
}  // namespace tokendepot::testing
