// Whole depots that store and load past the host through a fake cuFile, and what they do when it fails them.

#include "gds_depot_fixture.h"

namespace tokendepot::testing {
namespace {

TEST_F(GdsDepot, StoresAndLoadsGoPastTheHostAndAreCountedSo) {
  open();
  EXPECT_EQ(transport(), "gds-p2p");
  store_all();
  ASSERT_EQ(load_all().items_ok, kChunks);
  const DepotStats stats = depot_->stats();
  EXPECT_EQ(stats.store.by_path.gds_p2p, stats.store.extents * payload_);
  EXPECT_EQ(stats.store.by_path.direct, stats.store.extents * header_);
  EXPECT_EQ(stats.load.by_path.gds_p2p, kChunks * payload_);
  EXPECT_EQ(stats.load.by_path.direct, kChunks * header_);
  EXPECT_EQ(stats.load.by_path.gds_compat, 0u);
  EXPECT_DOUBLE_EQ(stats.store.tokens_by_path.gds_p2p, kChunks * kChunkTokens);
  EXPECT_DOUBLE_EQ(stats.load.tokens_by_path.gds_p2p, kChunks * kChunkTokens);
  EXPECT_DOUBLE_EQ(stats.load.tokens_by_path.direct, 0) << "headers carry no tokens";
  EXPECT_EQ(errors(), 0u);
  EXPECT_GE(fake_.read_bytes, kChunks * payload_);
}

TEST_F(GdsDepot, CompatibilityModeIsCountedAsSuch) {
  fake_.point_to_point = false;
  open();
  EXPECT_EQ(transport(), "gds-compat");
  store_all();
  ASSERT_EQ(load_all().items_ok, kChunks);
  const DepotStats stats = depot_->stats();
  EXPECT_EQ(stats.load.by_path.gds_compat, kChunks * payload_);
  EXPECT_EQ(stats.load.by_path.gds_p2p, 0u);
}

TEST_F(GdsDepot, WhatOneWayStoredTheOtherLoads) {
  open();
  store_all();
  options_.roots[0].transport = TransportChoice::direct;
  open();
  EXPECT_EQ(transport(), "direct-threads");
  EXPECT_EQ(load_all().items_ok, kChunks);
  EXPECT_EQ(depot_->stats().load.by_path.direct, kChunks * (payload_ + header_));
}

TEST_F(GdsDepot, ShortTransfersArriveWhole) {
  fake_.most_bytes = kPageBytes;
  open();
  store_all();
  EXPECT_EQ(load_all().items_ok, kChunks);
}

TEST_F(GdsDepot, ASlabForOneExtentIsEnough) {
  file_slab_bytes_ = 1 << 20;  // the check at open wants that much
  open();
  store_all();
  EXPECT_EQ(load_all().items_ok, kChunks);
}

TEST_F(GdsDepot, HalfOfTheHeadsAreReadWithoutTheRest) {
  open();
  store_all();
  const std::vector<std::byte> whole = cache_.block(0);
  depot_.reset();
  const GroupShape half = small_shape({0, 2, 2, 4});
  HostCache reader(half, kBlocks);
  auto opened = try_open();
  ASSERT_TRUE(opened);
  ASSERT_TRUE((*opened)->attach(reader.paged()));
  reader.clear();
  const auto plan = plan_chunks(**opened, ns_, keys_, want_of(half), 0, 1, 0);
  ASSERT_TRUE(plan) << plan.error().message;
  ASSERT_TRUE((*opened)->submit_load(1, *plan));
  ASSERT_EQ(wait_for(**opened, 1).items_ok, 1u);
  EXPECT_EQ((*opened)->stats().load.by_path.gds_p2p, payload_ / 2);
  const auto got = reader.block(0);
  const size_t row = small_shape().row_bytes;
  for (size_t at = 0; at < got.size(); at += row) {
    const size_t token = at / row / 2, head = at / row % 2;
    ASSERT_TRUE(
        std::equal(got.begin() + at, got.begin() + at + row, whole.begin() + (token * 4 + 2 + head) * row))
        << at;
  }
}

TEST_F(GdsDepot, AReadThatCuFileFailsIsDoneTheOrdinaryWay) {
  open();
  store_all();
  fake_.fail_reads = 1;
  EXPECT_EQ(load_all().items_ok, kChunks);
  EXPECT_EQ(errors(), 1u);
  const DepotStats stats = depot_->stats();
  EXPECT_EQ(stats.load.by_path.gds_p2p, (kChunks - 1) * payload_);
  EXPECT_EQ(stats.load.by_path.direct, kChunks * header_ + payload_);
  EXPECT_DOUBLE_EQ(stats.load.tokens_by_path.gds_p2p, (kChunks - 1) * kChunkTokens);
  EXPECT_DOUBLE_EQ(stats.load.tokens_by_path.direct, kChunkTokens);
}

TEST_F(GdsDepot, ARootThatFailsAgainAndAgainGoesOnWithoutCuFile) {
  open();
  store_all();
  fake_.fail_reads = -1;
  EXPECT_EQ(load_all().items_ok, kChunks);
  EXPECT_GE(errors(), GdsLane::kMostErrors);
  EXPECT_NE(logged().find("going on without it"), std::string::npos);
  EXPECT_EQ(logged().find("going on without it"), logged().rfind("going on without it")) << "one line";
  EXPECT_EQ(transport(), "direct-threads");
  fake_.fail_reads = 0;
  const uint64_t before = fake_.read_bytes;
  EXPECT_EQ(load_all().items_ok, kChunks);
  EXPECT_EQ(fake_.read_bytes, before);
}

TEST_F(GdsDepot, BytesThatCuFileDamagedAreReadAgainAndNotCondemned) {
  open();
  store_all();
  fake_.damage_reads = true;
  EXPECT_EQ(load_all().items_ok, kChunks);
  EXPECT_GT(errors(), 0u);
  EXPECT_NE(logged().find("a digest differs"), std::string::npos);
  fake_.damage_reads = false;
  depot_->refresh();
  EXPECT_EQ(depot_->longest_prefix(keys_, std::vector{want_of(small_shape())}), kChunks);
}

TEST_F(GdsDepot, DamageOnTheMediumIsCorruptHoweverItIsRead) {
  open();
  store_all();
  const auto plan = plan_chunks(*depot_, ns_, keys_, want_of(small_shape()), 0, 1, kElsewhere);
  ASSERT_TRUE(plan);
  for (const auto& entry : std::filesystem::directory_iterator(directory_.path() + "/root/segments")) {
    auto file = File::open(entry.path().string(), {.write = true});
    ASSERT_TRUE(file);
    std::byte byte{};
    const uint64_t at = plan->items[0].where.offset + header_ + 100;
    ASSERT_TRUE(file->read_at({&byte, 1}, at));
    byte ^= std::byte{1};
    ASSERT_TRUE(file->write_at({&byte, 1}, at));
  }
  const Completion done = load_all();
  ASSERT_GE(done.failures.size(), 1u);
  EXPECT_TRUE(std::ranges::all_of(done.failures, [](const ItemFailure& failure) {
    return failure.reason == ItemFailure::Reason::corrupt;
  }));
  EXPECT_EQ(errors(), 0u) << "cuFile brought what is there";
}

TEST_F(GdsDepot, SegmentsThatCuFileDoesNotTakeGoTheOrdinaryWay) {
  open();
  fake_.refuse_files = 5008;
  store_all();
  depot_.reset();
  open();
  EXPECT_EQ(transport(), "direct-threads") << "the check at open has seen it";
  EXPECT_NE(depot_->stats().roots[0].reason.find("not on this file system"), std::string::npos);
  EXPECT_EQ(load_all().items_ok, kChunks);
}

TEST_F(GdsDepot, WhatIsHeldGoesThroughTheHostsSlab) {
  open();
  store_all();
  const auto plan = plan_chunks(*depot_, ns_, keys_, want_of(small_shape()), 0, 2, kElsewhere);
  ASSERT_TRUE(plan);
  ASSERT_TRUE(depot_->submit_hold(500, *plan));
  ASSERT_EQ(wait_for(*depot_, 500).items_ok, 2u);
  std::vector<Depot::HeldBlocks> blocks;
  for (const LoadItem& item : plan->items) blocks.push_back({item.chunk, item.group, item.blocks});
  ASSERT_TRUE(depot_->place(501, 500, blocks));
  ASSERT_EQ(wait_for(*depot_, 501).items_ok, 2u);
  EXPECT_EQ(cache_.block(kElsewhere), cache_.block(0));
  const DepotStats stats = depot_->stats();
  EXPECT_EQ(stats.load.by_path.gds_p2p, 0u);
  EXPECT_EQ(stats.load.by_path.direct, 2 * (payload_ + header_)) << "placing reads nothing";
}

TEST_F(GdsDepot, ALoadThatIsCancelledWhileCuFileReadsEndsWithItsMemory) {
  open();
  store_all();
  fake_.read_delay_us = 500'000;
  const auto plan = plan_chunks(*depot_, ns_, keys_, want_of(small_shape()), 0, kChunks, kElsewhere);
  ASSERT_TRUE(plan);
  ASSERT_TRUE(depot_->submit_load(++job_, *plan));
  while (fake_.reads_begun == 0) usleep(1000);
  depot_->cancel(job_);
  const Completion done = wait_for(*depot_, job_);
  EXPECT_EQ(done.items_ok + done.failures.size(), kChunks);
  EXPECT_GT(done.failures.size(), 0u);
  fake_.read_delay_us = 0;
  EXPECT_EQ(load_all().items_ok, kChunks) << "no slab memory was lost";
}

TEST_F(GdsDepot, ADeadlinePassesWhileCuFileReads) {
  open();
  store_all();
  fake_.read_delay_us = 200'000;
  const Completion late = load_all(20ms);
  EXPECT_EQ(late.failures.size(), kChunks);
  for (const ItemFailure& failure : late.failures) EXPECT_EQ(failure.reason, ItemFailure::Reason::timed_out);
  fake_.read_delay_us = 0;
  EXPECT_EQ(load_all().items_ok, kChunks);
}

TEST_F(GdsDepot, ADepotThatClosesWaitsForCuFilesReadsAndFailures) {
  open();
  store_all();
  fake_.read_delay_us = 100'000;
  for (const int failing : {0, -1}) {
    fake_.fail_reads = failing;
    fake_.reads_begun = 0;
    const auto plan = plan_chunks(*depot_, ns_, keys_, want_of(small_shape()), 0, kChunks, kElsewhere);
    ASSERT_TRUE(plan);
    ASSERT_TRUE(depot_->submit_load(++job_, *plan));
    while (fake_.reads_begun == 0) usleep(1000);
    depot_.reset();
    EXPECT_EQ(fake_.open_files, 0) << "no handle is used after its end";
    fake_.fail_reads = 0;
    open();
  }
  fake_.read_delay_us = 0;
  EXPECT_EQ(load_all().items_ok, kChunks);
}

TEST_F(GdsDepot, SegmentsThatAreClosedAndOpenedAgainAreRegisteredAnew) {
  options_.roots[0].capacity_bytes = 4 << 20;  // the fourth segment recycles the first
  options_.eviction_grace_ms = 0;
  open();
  cache_.fill(1);
  for (uint64_t prompt = 1; prompt <= 60; ++prompt) {
    keys_ = prompt_keys(ns_, prompt, kChunks);
    until_stored([&] { return store(0, kChunks).items_ok == kChunks; });
  }
  EXPECT_GT(depot_->stats().roots[0].evicted_segments, 0u);
  EXPECT_EQ(load_all().items_ok, kChunks);
  EXPECT_EQ(errors(), 0u);
  EXPECT_LE(fake_.open_files, 5) << "handles of recycled segments have ended";
}

TEST_F(GdsDepot, WhereNoRootUsesCuFileTheDeviceHasItsWholeSlab) {
  fake_.refuse_files = 5008;
  open();
  EXPECT_EQ(fake_.registered_buffers, 0);
}

TEST_F(GdsDepot, AReadOnlyRootIsReadPastTheHost) {
  open();
  store_all();
  depot_.reset();
  options_.roots[0].read_only = options_.roots[0].require_gds = true;
  fake_.refuse_files = 5008;
  const auto refused = try_open();
  ASSERT_FALSE(refused);
  EXPECT_NE(refused.error().message.find("require_gds"), std::string::npos);
  fake_.refuse_files = 0;
  auto opened = try_open();
  ASSERT_TRUE(opened) << opened.error().message;
  depot_ = std::move(*opened);
  ASSERT_TRUE(depot_->attach(cache_.paged()));
  EXPECT_EQ(transport(), "gds-p2p");
  EXPECT_EQ(load_all().items_ok, kChunks);
  EXPECT_EQ(depot_->stats().load.by_path.gds_p2p, kChunks * payload_);
}

TEST_F(GdsDepot, RequireGdsIsForRootsThatNameIt) {
  options_.roots[0].require_gds = true;
  options_.roots[0].transport = TransportChoice::automatic;
  const auto refused = try_open();
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().kind, ErrorKind::invalid_argument);
}

TEST_F(GdsDepot, RequireGdsRefusesEveryOtherWayInOneSentence) {
  options_.roots[0].require_gds = true;
  const auto refusal = [&](const char* library) {
    const auto refused = try_open(library);
    EXPECT_FALSE(refused);
    return refused ? std::string() : refused.error().message;
  };
  EXPECT_NE(refusal("/nowhere/libcufile.so.0").find("require_gds"), std::string::npos);
  fake_.refuse_files = 5008;
  EXPECT_NE(refusal(FAKE_CUFILE_WHOLE).find("require_gds"), std::string::npos);
  fresh_fake();
  fake_.point_to_point = false;
  EXPECT_NE(refusal(FAKE_CUFILE_WHOLE).find("compatibility mode"), std::string::npos);
  fresh_fake();
  open();
  EXPECT_EQ(transport(), "gds-p2p");
}

TEST_F(GdsDepot, WithoutTheLibraryTheRootIsDirect) {
  open("/nowhere/libcufile.so.0");
  EXPECT_EQ(transport(), "direct-threads");
  EXPECT_NE(logged().find("/nowhere/libcufile.so.0"), std::string::npos);
  store_all();
  EXPECT_EQ(load_all().items_ok, kChunks);
}

TEST_F(GdsDepot, OnTheHostDeviceThereIsNothingToSpareAndNothingToRequire) {
  options_.roots[0].require_gds = true;
  auto opened = try_open(FAKE_CUFILE_WHOLE, "host");
  ASSERT_TRUE(opened) << opened.error().message;
  EXPECT_EQ((*opened)->stats().roots[0].transport, "direct-threads");
}

TEST_F(GdsDepot, AutoMeasuresPointToPointAndNeverTakesCompatibilityMode) {
  options_.roots.push_back(options_.roots[0]);
  options_.roots[1].path = directory_.path() + "/second";
  options_.roots[1].transport = TransportChoice::automatic;
  file_slab_bytes_ = 64 << 20;
  auto opened = try_open();
  ASSERT_TRUE(opened) << opened.error().message;
  EXPECT_NE((*opened)->stats().roots[1].reason.find("cuFile"), std::string::npos);
  opened->reset();
  fresh_fake();
  fake_.point_to_point = false;
  opened = try_open();
  ASSERT_TRUE(opened);
  EXPECT_EQ((*opened)->stats().roots[0].transport, "gds-compat");
  EXPECT_EQ((*opened)->stats().roots[1].transport, "direct-threads");
}

TEST_F(GdsDepot, NothingIsLeftBehindByTheCheckAtOpen) {
  open();
  for (const auto& entry : std::filesystem::directory_iterator(directory_.path() + "/root/segments"))
    EXPECT_FALSE(entry.path().filename().string().starts_with(".tmp-")) << entry.path();
}

}  // namespace
}  // namespace tokendepot::testing
