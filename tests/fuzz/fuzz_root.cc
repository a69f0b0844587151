// A journal and a segment that somebody else wrote into a shared root: read as a starting engine reads them,
// into table and catalog, and scanned as recovery scans. Magic, place and digests are made right, so that
// what lies behind those checks is reached; every eighth record is left as it is.
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/check.h"
#include "base/log.h"
#include "format/digest.h"
#include "format/journal.h"
#include "store/catalog.h"
#include "store/replay.h"
#include "store/root.h"
#include "store/scan.h"

namespace {

using namespace tokendepot;
using Bytes = std::vector<std::byte>;

constexpr uint64_t kWriter = 1;
constexpr SegmentId kSegment{kWriter, 0};

/// One directory in memory for all inputs, removed at the end.
class Directory {
 public:
  Directory() {
    set_log_sink([](LogLevel, std::string_view) {});
    char name[] = "/dev/shm/tokendepot-fuzz-XXXXXX";
    TD_CHECK(mkdtemp(name) != nullptr);
    path_ = name;
    RootOptions options{.path = path_, .capacity_bytes = 16 << 20};
    auto opened = Root::open(options, 0, Options{});
    TD_CHECK(opened.has_value());
    root_ = std::move(*opened);
  }
  ~Directory() { std::filesystem::remove_all(path_); }
  Directory(const Directory&) = delete;
  Directory& operator=(const Directory&) = delete;
  Root& root() { return *root_; }

 private:
  std::string path_;
  std::unique_ptr<Root> root_;
};

void write(const std::string& path, std::span<const std::byte> bytes) {
  const auto file = File::open(path, {.write = true, .create = true});
  TD_CHECK(file && file->truncate(0) && file->write_at(bytes, 0));
}

Bytes journal_of(std::span<const std::byte> input) {
  Bytes journal(input.begin(), input.end());
  for (uint64_t index = 0; (index + 1) * kRecordBytes <= journal.size(); ++index) {
    if (index % 8 == 7) continue;
    const auto record = std::span(journal).subspan(index * kRecordBytes, kRecordBytes);
    std::memcpy(record.data(), "TDJR\1\0", 6);
    put_le<uint64_t>(record, 8, index);
    put_le<uint64_t>(record, 16, kWriter);
    put_le<uint64_t>(record, 120, xxh3(record.first(120)));
  }
  return journal;
}

Bytes segment_of(std::span<const std::byte> input) {
  Bytes segment(align_up(input.size() + 1));
  std::ranges::copy(input, segment.begin());
  const std::span<std::byte> header = std::span(segment).first(kPageBytes);
  std::memcpy(header.data(), "TDEXTENT\1\0\0", 12);
  put_le<uint32_t>(header, 12, kPageBytes);
  put_le<uint64_t>(header, 80, kSegment.writer);
  put_le<uint32_t>(header, 88, kSegment.sequence);
  put_le<uint64_t>(header, 96, 0);
  put_le<uint64_t>(header, 168, 0);
  put_le<uint64_t>(header, 168, shard_digest(header));
  return segment;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static Directory directory;
  Root& root = directory.root();
  const auto input = std::as_bytes(std::span(data, size));
  const size_t half = size / 2 / kRecordBytes * kRecordBytes;
  const std::string segment_path = root.files().path_of(kSegment);
  write(root.journals_dir() + "/" + journal_name(kWriter), journal_of(input.first(half)));
  write(segment_path, segment_of(input.subspan(half)));

  SegmentTable segments;
  Catalog catalog(segments);
  Replay replay(root, segments, &catalog);
  if (const Status read = replay.first(); !read) {
    TD_CHECK(read.error().kind == ErrorKind::unsupported);  // a record of another version, with its digest
    return 0;
  }
  catalog.sweep();
  TD_CHECK(catalog.entries() <= half / kRecordBytes);
  for (const auto& [slot, segment] : segments.present_segments(root.index()))
    TD_CHECK(segment.id == kSegment);

  const auto file = File::open(segment_path, {});
  TD_CHECK(file.has_value());
  const auto end = scan_extents(*file, kSegment, 0, true, [](const ExtentHeader& header, uint64_t bytes) {
    TD_CHECK(header.segment == kSegment && bytes > 0);
  });
  TD_CHECK(end && *end <= align_up(size + 1));
  root.files().drop(kSegment);
  return 0;
}
