#include "tokendepot/export.h"

#include <array>
#include <cstring>

#include "base/clock.h"
#include "base/errors.h"
#include "format/digest.h"
#include "format/export_file.h"
#include "format/manifest.h"
#include "io/file.h"
#include "io/stream.h"
#include "store/extent_check.h"
#include "store/journal_file.h"
#include "store/scan.h"

namespace tokendepot {
namespace {

class FileExporter final : public Exporter {
 public:
  FileExporter(int fd, NamespaceDigest ns) : fd_(fd), ns_(ns) {}

  Status begin(const Manifest& manifest, uint64_t extents, uint64_t bytes) {
    std::array<std::byte, kPageBytes> page;
    const ExportHeader header{ns_, manifest.canonical.size(), system_clock().wall_ns(), extents, bytes};
    encode_export_header(header, page);
    header_digest_ = export_header_digest(page);
    if (auto written = write(page); !written) return written;
    std::vector<std::byte> text(align_up(manifest.canonical.size()));
    std::memcpy(text.data(), manifest.canonical.data(), manifest.canonical.size());
    return write(text);
  }

  Result<Status> add(const std::string& root, const StoredExtent& extent) override {
    if (entries_.size() == kMaxExportedExtents) {
      return fail(ErrorKind::invalid_argument, "one export file holds {} extents at most",
                  kMaxExportedExtents);
    }
    if (auto read = read_extent(root, extent); !read) return Status(std::unexpected(read.error()));
    entries_.push_back({.key = extent.key,
                        .offset = at_,
                        .bytes = buffer_.size(),
                        .header_digest = extent_header_digest(buffer_),
                        .group = extent.group});
    if (auto written = write(buffer_); !written) return std::unexpected(written.error());
    return Status();
  }

  Status finish() override { return write(encode_export_index(entries_, at_, header_digest_)); }

  uint64_t file_bytes() const override { return at_; }

 private:
  /// Into buffer_, checked.
  Status read_extent(const std::string& root, const StoredExtent& extent);
  Status write(std::span<const std::byte> bytes) {
    auto written = write_stream(fd_, bytes);
    if (written) at_ += bytes.size();
    return written;
  }

  const int fd_;
  const NamespaceDigest ns_;
  uint64_t header_digest_ = 0;
  uint64_t at_ = 0;
  std::vector<std::byte> buffer_;
  std::vector<ExportEntry> entries_;
};

Status FileExporter::read_extent(const std::string& root, const StoredExtent& extent) {
  const std::string name = root + "/segments/" + segment_name(extent.where.segment);
  const std::string where = fmt::format("{} at {}", name, extent.where.offset);
  if (extent.where.bytes > kMaxExportedExtentBytes) {
    return fail(ErrorKind::unsupported, "{}: an extent of {} bytes; export files hold up to {}", where,
                extent.where.bytes, kMaxExportedExtentBytes);
  }
  const auto file = File::open(name, {});
  if (!file) return std::unexpected(file.error());
  // Nothing is allocated for a claim that the file does not bear out.
  const auto size = credible_bytes(*file);
  if (!size) return std::unexpected(size.error());
  if (extent.where.offset > *size || extent.where.bytes > *size - extent.where.offset) {
    return fail(ErrorKind::corrupt, "{}: the extent of {} bytes ends behind the {} bytes that are there",
                where, extent.where.bytes, *size);
  }
  buffer_.resize(extent.where.bytes);
  if (auto read = file->read_at(buffer_, extent.where.offset); !read) return read;
  const auto header = decode_extent_header(buffer_);
  if (!header) return fail(header.error().kind, "{}: {}", where, header.error().message);
  if (auto same = check_header(*header, extent, where); !same) return same;
  if (header->ns != ns_) {
    return fail(ErrorKind::corrupt, "{}: the extent is of another namespace", where);
  }
  return check_payload(*header, buffer_, where);
}

}  // namespace

Result<std::unique_ptr<Exporter>> Exporter::begin(int fd, std::string_view manifest_json, uint64_t extents,
                                                  uint64_t bytes) {
  const auto manifest = make_manifest(manifest_json);
  if (!manifest) return std::unexpected(manifest.error());
  if (extents > kMaxExportedExtents) {
    return fail(ErrorKind::invalid_argument,
                "{} extents are to be exported; allowed are up to {} in one file", extents,
                kMaxExportedExtents);
  }
  auto exporter = std::make_unique<FileExporter>(fd, manifest->digest);
  if (auto begun = exporter->begin(*manifest, extents, bytes); !begun) return std::unexpected(begun.error());
  return exporter;
}

}  // namespace tokendepot
