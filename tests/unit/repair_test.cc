// Repair of a root whose journals a later version has written to, and what the journals remember.
#include "tokendepot/repair.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "damage.h"
#include "depot_fixture.h"
#include "format/journal.h"
#include "tokendepot/history.h"
#include "tokendepot/tools.h"

namespace tokendepot::testing {
namespace {

constexpr size_t kChunks = 8;

class Repair : public ::testing::Test {
 protected:
  Repair() : directory_("/dev/shm"), root_(directory_.path() + "/root") {
    Options options;
    options.roots.push_back({});
    options.roots[0].path = root_;
    options.roots[0].capacity_bytes = 4 << 20;
    options.roots[0].segment_bytes = 1 << 20;
    options.free_space_reserve = 0;
    auto depot = Depot::open(options);
    EXPECT_TRUE(depot) << depot.error().message;
    const auto ns = (*depot)->register_namespace(R"({"model":"m"})").value();
    HostCache cache(small_shape(), kChunks * kBlocksPerChunk);
    cache.fill(1);
    EXPECT_TRUE((*depot)->attach(cache.paged()));
    keys_ = prompt_keys(ns, 1, kChunks);
    EXPECT_EQ(store_chunks(**depot, 1, ns, keys_, 0, kChunks).items_ok, kChunks);
    EXPECT_TRUE((*depot)->flush(60s));
  }

  std::string journal() const { return root_ + "/journals/" + inspect_root(root_)->journals.at(0).file; }

  TemporaryDirectory directory_;
  std::string root_;
  std::vector<Key> keys_;
};

TEST_F(Repair, AJournalWithRecordsOfALaterVersionIsRefusedAndStaysAsItIs) {
  damage::Bytes record(kRecordBytes);
  const std::string path = journal();
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.read(reinterpret_cast<char*>(record.data()), kRecordBytes);
  damage::set<uint16_t>(record, 4, 2);
  damage::reseal(record);
  file.seekp(0);
  file.write(reinterpret_cast<const char*>(record.data()), kRecordBytes);
  file.close();
  const auto size = std::filesystem::file_size(path);
  const auto repaired = repair_root(root_, {}, true, nullptr);
  ASSERT_FALSE(repaired);
  EXPECT_EQ(repaired.error().kind, ErrorKind::unsupported);
  EXPECT_THAT(repaired.error().message, ::testing::HasSubstr("version 2"));
  EXPECT_EQ(std::filesystem::file_size(path), size);
}

TEST_F(Repair, WhatIsRestoredIsWhatWasThere) {
  const auto before = list_extents(root_).value();
  std::filesystem::remove(journal());
  ASSERT_TRUE(list_extents(root_)->empty());
  uint64_t looked_through = 0;
  const auto repaired = repair_root(root_, {}, true, [&](uint64_t done, uint64_t total) {
    looked_through = done;
    EXPECT_LE(done, total);
  });
  ASSERT_TRUE(repaired) << repaired.error().message;
  EXPECT_GT(looked_through, 0u);
  const auto after = list_extents(root_).value();
  ASSERT_EQ(after.size(), before.size());
  for (size_t i = 0; i < after.size(); ++i) {
    EXPECT_EQ(after[i].key, before[i].key);
    EXPECT_EQ(after[i].where, before[i].where);
    EXPECT_TRUE(verify_extent(root_, after[i]));
  }
  EXPECT_TRUE(repair_root(root_, {}, false, nullptr)->nothing_to_do());
}

TEST_F(Repair, TheJournalsTellWhatBecameOfAnExtent) {
  auto removed = list_extents(root_).value();
  std::erase_if(removed, [&](const StoredExtent& extent) { return extent.key != keys_[0]; });
  ASSERT_EQ(remove_extents(root_, removed), 1u);
  const auto known = trace_extents(root_, keys_).value();
  EXPECT_EQ(known.size(), kChunks);
  for (const PastExtent& each : known) {
    const bool gone = each.extent.key == removed[0].key;
    EXPECT_EQ(each.fate, gone ? PastExtent::Fate::condemned : PastExtent::Fate::live);
    EXPECT_EQ(each.ended_ns > 0, gone);
  }
  const std::string segments = root_ + "/segments";
  std::filesystem::remove_all(segments);
  std::filesystem::create_directory(segments);
  const auto past = trace_extents(root_, std::span(keys_).last(2)).value();
  ASSERT_EQ(past.size(), 2u);
  EXPECT_EQ(past[0].fate, PastExtent::Fate::vanished);
  EXPECT_EQ(past[1].fate, PastExtent::Fate::vanished);
  EXPECT_TRUE(trace_extents(root_, {})->empty());
}

}  // namespace
}  // namespace tokendepot::testing
