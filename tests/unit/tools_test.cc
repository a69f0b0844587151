// A root looked at from outside, sound and damaged in every way that a medium or a stranger can think of.
#include "tokendepot/tools.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "depot_fixture.h"

namespace tokendepot::testing {
namespace {

constexpr size_t kChunks = 8;

class Tools : public ::testing::Test {
 protected:
  Tools() : directory_("/dev/shm"), root_(directory_.path() + "/root") {
    Options options;
    options.roots.push_back({});
    options.roots[0].path = root_;
    options.roots[0].capacity_bytes = 4 << 20;
    options.roots[0].segment_bytes = 1 << 20;
    options.free_space_reserve = 0;
    auto depot = Depot::open(options);
    EXPECT_TRUE(depot) << depot.error().message;
    ns_ = (*depot)->register_namespace(R"({"model":"m"})").value();
    HostCache cache(small_shape(), kChunks * kBlocksPerChunk);
    cache.fill(1);
    EXPECT_TRUE((*depot)->attach(cache.paged()));
    EXPECT_EQ(store_chunks(**depot, 1, ns_, prompt_keys(ns_, 1, kChunks), 0, kChunks).items_ok, kChunks);
    EXPECT_TRUE((*depot)->flush(60s));
  }

  std::vector<StoredExtent> extents() const {
    const auto listed = list_extents(root_);
    EXPECT_TRUE(listed) << listed.error().message;
    return listed ? *listed : std::vector<StoredExtent>();
  }

  std::string segment_path(const StoredExtent& extent) const {
    const RootInfo info = inspect_root(root_).value();
    for (const SegmentInfo& segment : info.segments) {
      if (segment.id == extent.where.segment) return root_ + "/segments/" + segment.file;
    }
    ADD_FAILURE() << "no file for the segment of an extent";
    return {};
  }

  std::vector<std::string> files() const {
    std::vector<std::string> found;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(root_)) {
      if (entry.is_regular_file() && entry.file_size() > 0) found.push_back(entry.path());
    }
    std::ranges::sort(found);
    return found;
  }

  TemporaryDirectory directory_;
  std::string root_;
  NamespaceDigest ns_;
};

// One byte of a file changed for as long as this lives.
class FlippedByte {
 public:
  FlippedByte(const std::string& path, uint64_t offset, uint8_t mask)
      : path_(path), offset_(offset), mask_(mask) {
    flip();
  }
  FlippedByte(const FlippedByte&) = delete;
  FlippedByte& operator=(const FlippedByte&) = delete;
  ~FlippedByte() { flip(); }

 private:
  void flip() {
    std::fstream file(path_, std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(static_cast<std::streamoff>(offset_));
    const int byte = file.get();
    ASSERT_NE(byte, EOF);
    file.seekp(static_cast<std::streamoff>(offset_));
    file.put(static_cast<char>(byte ^ mask_));
  }
  std::string path_;
  uint64_t offset_;
  uint8_t mask_;
};

TEST_F(Tools, ASoundRootIsDescribedAsItIs) {
  const auto info = inspect_root(root_);
  ASSERT_TRUE(info) << info.error().message;
  EXPECT_EQ(info->path, root_);
  EXPECT_EQ(info->root_id_hex.size(), 32u);
  EXPECT_EQ(info->file_system, "tmpfs");
  EXPECT_EQ(info->transport, "mapped");
  ASSERT_EQ(info->namespaces.size(), 1u);
  EXPECT_EQ(info->namespaces[0].digest_hex, to_hex(ns_.bytes));
  EXPECT_EQ(info->namespaces[0].manifest, R"({"model":"m"})");
  EXPECT_EQ(info->namespaces[0].extents, kChunks);
  ASSERT_EQ(info->journals.size(), 1u);
  EXPECT_FALSE(info->journals[0].damaged);
  EXPECT_FALSE(info->journals[0].in_use);
  EXPECT_THAT(info->foreign_files, ::testing::IsEmpty());
  uint64_t live = 0;
  for (const SegmentInfo& segment : info->segments) live += segment.live_bytes;
  EXPECT_EQ(live, info->namespaces[0].bytes);
  for (const StoredExtent& extent : extents()) EXPECT_TRUE(verify_extent(root_, extent));
}

TEST_F(Tools, AFlippedByteOfAnExtentDamagesThatExtentAlone) {
  const auto all = extents();
  ASSERT_EQ(all.size(), kChunks);
  std::mt19937_64 random(4);
  for (int round = 0; round < 100; ++round) {
    const StoredExtent& hit = all[random() % all.size()];
    const uint64_t at = hit.where.offset + random() % hit.where.bytes;
    const FlippedByte flipped(segment_path(hit), at, static_cast<uint8_t>(1u << random() % 8));
    for (const StoredExtent& extent : all) {
      const auto status = verify_extent(root_, extent);
      EXPECT_EQ(status.has_value(), extent.key != hit.key) << "byte " << at - hit.where.offset;
      if (!status) {
        EXPECT_EQ(status.error().kind, ErrorKind::corrupt) << status.error().message;
      }
    }
  }
}

TEST_F(Tools, AFlippedByteOfAJournalHidesAtMostOneRecord) {
  std::mt19937_64 random(5);
  const std::string journal = root_ + "/journals/" + inspect_root(root_)->journals[0].file;
  const uint64_t size = std::filesystem::file_size(journal);
  for (int round = 0; round < 100; ++round) {
    const FlippedByte flipped(journal, random() % size, static_cast<uint8_t>(1u << random() % 8));
    const auto left = extents();
    EXPECT_GE(left.size(), kChunks - 1);
    for (const StoredExtent& extent : left) EXPECT_TRUE(verify_extent(root_, extent));
    EXPECT_TRUE(inspect_root(root_)->journals[0].damaged);
  }
}

TEST_F(Tools, NoFileCutShortOrFilledWithJunkIsMoreThanAnError) {
  std::mt19937_64 random(6);
  const auto all = extents();
  for (const std::string& path : files()) {
    std::ifstream in(path, std::ios::binary);
    const std::string good((std::istreambuf_iterator<char>(in)), {});
    for (int round = 0; round < 12; ++round) {
      std::string bad = good.substr(0, random() % good.size());
      if (round % 2 == 1) {
        for (char& c : bad) c = static_cast<char>(random());
      }
      std::ofstream(path, std::ios::binary | std::ios::trunc) << bad;
      const auto info = inspect_root(root_);
      EXPECT_TRUE(info || !info.error().message.empty());
      for (const StoredExtent& extent : all) {
        const auto status = verify_extent(root_, extent);
        EXPECT_TRUE(status || !status.error().message.empty());
      }
    }
    std::ofstream(path, std::ios::binary | std::ios::trunc) << good;
  }
  ASSERT_EQ(extents().size(), kChunks);
  for (const StoredExtent& extent : extents()) EXPECT_TRUE(verify_extent(root_, extent));
}

TEST_F(Tools, ClaimsThatNoFileCanHoldAreCorrupt) {
  StoredExtent extent = extents()[0];
  for (const uint64_t absurd :
       {uint64_t{0}, uint64_t{4096}, uint64_t{1} << 40, ~uint64_t{0} & ~uint64_t{4095}}) {
    StoredExtent claim = extent;
    claim.where.bytes = absurd;
    EXPECT_EQ(verify_extent(root_, claim).error().kind, ErrorKind::corrupt) << absurd;
    claim = extent;
    claim.where.offset += absurd == 0 ? 4096 : absurd;
    EXPECT_FALSE(verify_extent(root_, claim)) << absurd;
  }
  extent.part.head_end = 65535;
  EXPECT_EQ(verify_extent(root_, extent).error().kind, ErrorKind::corrupt);
  extent = extents()[0];
  extent.where.segment.sequence += 1000;
  EXPECT_EQ(verify_extent(root_, extent).error().kind, ErrorKind::not_found);
}

TEST_F(Tools, OnlyWhatIsThereIsRemovedAndOnlyOnce) {
  const auto all = extents();
  std::vector<StoredExtent> wanted(all.begin(), all.begin() + 3);
  wanted.push_back(all[0]);
  wanted.push_back(all[0]);
  wanted.back().where.segment.writer += 1;
  EXPECT_EQ(remove_extents(root_, wanted), 3u);
  EXPECT_EQ(extents().size(), kChunks - 3);
  const auto journals = inspect_root(root_)->journals.size();
  EXPECT_EQ(remove_extents(root_, wanted), 0u);
  EXPECT_EQ(inspect_root(root_)->journals.size(), journals);
}

TEST_F(Tools, ADirectoryThatIsNoRootIsNotFoundAndStaysAsItWas) {
  std::filesystem::create_directory(directory_.path() + "/other");
  for (const std::string& path :
       {directory_.path() + "/other", directory_.path() + "/missing", std::string("/dev/null")}) {
    EXPECT_EQ(inspect_root(path).error().kind, ErrorKind::not_found) << path;
    EXPECT_EQ(list_extents(path).error().kind, ErrorKind::not_found) << path;
    EXPECT_EQ(remove_extents(path, {}).error().kind, ErrorKind::not_found) << path;
    EXPECT_EQ(evict_segments(path, 1).error().kind, ErrorKind::not_found) << path;
  }
  EXPECT_TRUE(std::filesystem::is_empty(directory_.path() + "/other"));
}

}  // namespace
}  // namespace tokendepot::testing
