// A shared root in which another tenant writes segments as it likes: headers that prove themselves and claim
// what is not there, in files that are all holes. What opening, verifying, scrubbing and repairing such a
// root cost is bounded, and what others have stored is found as before.
#include <filesystem>
#include <fstream>

#include "format/digest.h"
#include "format/extent.h"
#include "format/journal.h"
#include "store/journal_file.h"
#include "store/scan.h"
#include "tokendepot/repair.h"
#include "tokendepot/tools.h"
#include "transfers_fixture.h"

namespace tokendepot::testing {
namespace {

constexpr SegmentId kForged{0xf0, 0};
constexpr uint64_t kFileBytes = 1ull << 40;
constexpr uint64_t kHeaders = (64 << 20) / kPageBytes;  // one on each page that a scan looks at
constexpr uint64_t kMostGrowth = 64 << 20;
constexpr auto kMostTime = 60s;

/// A number in KiB of /proc/self/status.
uint64_t status_bytes(const std::string& name) {
  std::ifstream status("/proc/self/status");
  std::string word;
  while (status >> word) {
    uint64_t kib = 0;
    if (word == name + ":" && status >> kib) return kib << 10;
  }
  ADD_FAILURE() << name << " is not in /proc/self/status";
  return 0;
}

/// Whether what is done while it lives stays below the bounds of time and of memory.
class Bounded {
 public:
  Bounded() {
    std::ofstream("/proc/self/clear_refs") << "5";  // the peak starts from here
    before_ = status_bytes("VmRSS");
  }
  ~Bounded() {
    EXPECT_LT(std::chrono::steady_clock::now() - begin_, kMostTime);
// Sanitizers keep memory that was freed.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    EXPECT_LT(status_bytes("VmHWM"), before_ + kMostGrowth);
#endif
  }
  Bounded(const Bounded&) = delete;
  Bounded& operator=(const Bounded&) = delete;

 private:
  const std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
  uint64_t before_ = 0;
};

/// The tenant's own extents: one shard, of about the number of bytes asked for, whose digest is wrong.
ExtentHeader forged_header(uint64_t n, uint64_t payload_bytes) {
  ExtentHeader header;
  header.key.bytes[0] = static_cast<uint8_t>(n);
  header.key.bytes[1] = static_cast<uint8_t>(n >> 8);
  header.segment = kForged;
  header.offset = n * kPageBytes;
  GroupShape shape;
  shape.part = {0, 1, 0, 1};
  shape.tokens = 1 << 20;
  shape.block_tokens = 1 << 20;
  shape.planes = 1;
  shape.row_bytes = static_cast<uint32_t>(payload_bytes >> 20);
  header.set_shape(shape);
  header.shard_digests = {12345};
  return header;
}

class HostileSegment : public TransfersOn {
 protected:
  std::string root() const { return directory_.path() + "/root"; }
  void store_honestly() {
    const auto depot = open();
    ASSERT_TRUE(depot->attach(cache_.paged()));
    cache_.fill(1);
    keys_ = prompt_keys(ns_, 1, 8);
    store_all(*depot, keys_, 0, 8);
    ASSERT_TRUE(depot->flush(60s));
  }
  /// A file of `file_bytes` that is holes but for a header on every page of its first 64 MiB, each of which
  /// claims `payload_bytes`; and the tenant's journal, which has ended. It speaks of the segment, and with
  /// `puts` of each of its extents.
  void plant(uint64_t file_bytes, uint64_t payload_bytes, bool puts) {
    std::vector<std::byte> headers(kHeaders * kPageBytes);
    std::vector<Record> records(1);
    records[0].type = RecordType::open_segment;
    records[0].where = {kForged, 0, file_bytes};
    for (uint64_t n = 0; n < kHeaders; ++n) {
      const ExtentHeader header = forged_header(n, payload_bytes);
      encode_extent_header(header, std::span(headers).subspan(n * kPageBytes, kPageBytes));
      if (puts) records.push_back(put_of(header, extent_bytes(header.shape())));
    }
    if (puts) {
      Record& seal = records.emplace_back();
      seal.type = RecordType::seal;
      seal.where = {kForged, file_bytes, 0};
    }
    const std::string path = root() + "/segments/" + segment_name(kForged);
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(headers.data()), static_cast<std::streamsize>(headers.size()));
    std::filesystem::resize_file(path, file_bytes);
    std::vector<std::byte> journal(records.size() * kRecordBytes);
    for (size_t n = 0; n < records.size(); ++n) {
      records[n].journal = kForged.writer;
      records[n].index = n;
      encode_record(records[n],
                    std::span<std::byte, kRecordBytes>(journal.data() + n * kRecordBytes, kRecordBytes));
    }
    std::ofstream(root() + "/journals/" + journal_name(kForged.writer), std::ios::binary)
        .write(reinterpret_cast<const char*>(journal.data()), static_cast<std::streamsize>(journal.size()));
  }
  /// By an engine that only reads: one that writes makes room, of which the tenant's file takes all.
  void expect_found() {
    Options reading = options();
    reading.writer = false;
    EXPECT_EQ(open(reading)->longest_prefix(keys_, std::vector{want_}), 8u);
  }

  std::vector<Key> keys_;
};

// The whole file, as it is for a scan; and as much as is believed of any file.
constexpr uint64_t kClaims[] = {kFileBytes - (256ull << 20), 512ull << 20};

TEST_P(HostileSegment, ForgedHeadersCostABoundedWorkAndMemory) {
  store_honestly();
  for (const uint64_t claim : kClaims) {
    SCOPED_TRACE(claim);
    plant(kFileBytes, claim, false);
    const Bounded bounded;
    expect_found();
    open();  // takes the tenant's journal over and looks for what it does not tell
  }
}

TEST_P(HostileSegment, ForgedExtentsAreVerifiedAtABoundedCost) {
  store_honestly();
  for (const uint64_t claim : kClaims) {
    SCOPED_TRACE(claim);
    plant(kFileBytes, claim, true);
    const Bounded bounded;
    const auto extents = list_extents(root());
    ASSERT_TRUE(extents);
    size_t good = 0;
    for (const StoredExtent& extent : *extents) good += verify_extent(root(), extent).has_value();
    EXPECT_EQ(good, 8u);
    EXPECT_LT(extents->size(), 8u + 16);
  }
}

TEST_P(HostileSegment, ForgedExtentsAreScrubbedAtABoundedCost) {
  store_honestly();
  plant(512 << 20, 256 << 20, true);
  const Bounded bounded;
  Options scrubbing = options(1 << 30);  // else it is evicted before it is scrubbed
  scrubbing.scrub_bytes_per_second = 1ull << 40;
  const auto depot = open(scrubbing);
  const auto end = std::chrono::steady_clock::now() + kMostTime;
  while (depot->stats().roots[0].scrub_finished_ns == 0 && std::chrono::steady_clock::now() < end)
    usleep(10'000);
  EXPECT_NE(depot->stats().roots[0].scrub_finished_ns, 0u);
  EXPECT_GT(depot->stats().roots[0].scrub_errors, 0u);
}

TEST_P(HostileSegment, ForgedHeadersAreExaminedForRepairAtABoundedCost) {
  store_honestly();
  for (const uint64_t claim : kClaims) {
    SCOPED_TRACE(claim);
    plant(kFileBytes, claim, false);
    const Bounded bounded;
    const auto report = repair_root(root(), {}, true, nullptr);
    ASSERT_TRUE(report) << report.error().message;
    EXPECT_TRUE(report->segments.empty()) << "no forged extent is whole";
  }
  expect_found();
}

TEST_P(HostileSegment, MayHoldAnyNumberOfWholeExtentsWithoutARecord) {
  store_honestly();
  plant(1 << 20, 1 << 20, false);  // the journal; the segment is written below
  const std::vector<std::byte> page(kPageBytes);
  ExtentHeader header = forged_header(0, 1 << 20);
  GroupShape shape = header.shape();
  shape.tokens = shape.block_tokens = 1;
  shape.row_bytes = 1;
  header.set_shape(shape);
  header.shard_digests = {shard_digest(page)};
  constexpr uint64_t kExtents = 5000;
  std::vector<std::byte> bytes(kExtents * 2 * kPageBytes);
  for (uint64_t n = 0; n < kExtents; ++n) {
    header.key.bytes[0] = static_cast<uint8_t>(n);
    header.key.bytes[1] = static_cast<uint8_t>(n >> 8);
    header.offset = 2 * n * kPageBytes;
    encode_extent_header(header, std::span(bytes).subspan(header.offset, kPageBytes));
  }
  std::ofstream(root() + "/segments/" + segment_name(kForged), std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  open();
  expect_found();
  const auto extents = list_extents(root());
  ASSERT_TRUE(extents);
  EXPECT_EQ(extents->size(), 8 + kExtents) << "all of them are found, a few thousand at a time";
}

INSTANTIATE_TEST_SUITE_P(Roots, HostileSegment, ::testing::Values("tmpfs", "disk"),
                         [](const auto& suite) { return suite.param; });

}  // namespace
}  // namespace tokendepot::testing
