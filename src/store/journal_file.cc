#include "store/journal_file.h"

#include <openssl/rand.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <utility>

#include "base/errors.h"

namespace tokendepot {
namespace {

constexpr uint64_t kReadBytes = 1 << 20;
static_assert(kReadBytes % kRecordBytes == 0);
// So much damage in a row ends a journal: a hole costs its maker nothing, and reading a terabyte of it would
// keep a depot from opening.
constexpr uint64_t kMostDamagedInARow = (64ull << 20) / kRecordBytes;

std::optional<uint64_t> parse_hex(std::string_view text, size_t digits) {
  if (text.size() != digits) return std::nullopt;
  if (!std::ranges::all_of(text, [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); })) {
    return std::nullopt;
  }
  uint64_t value = 0;
  std::from_chars(text.data(), text.data() + text.size(), value, 16);
  return value;
}

Result<uint64_t> random_writer() {
  uint64_t writer = 0;
  while (writer == 0) {
    if (RAND_bytes(reinterpret_cast<unsigned char*>(&writer), sizeof writer) != 1) {
      return fail(ErrorKind::io, "no random bytes for a writer id");
    }
  }
  return writer;
}

}  // namespace

std::string journal_name(uint64_t writer) {
  return fmt::format("{:016x}.log", writer);
}

std::optional<uint64_t> writer_of_journal(const std::string& name) {
  if (!name.ends_with(".log")) return std::nullopt;
  return parse_hex(std::string_view(name).substr(0, name.size() - 4), 16);
}

std::string segment_name(const SegmentId& id) {
  return fmt::format("{:016x}-{:08x}.seg", id.writer, id.sequence);
}

std::optional<SegmentId> segment_of_name(const std::string& name) {
  const std::string_view text = name;
  if (text.size() != 29 || text[16] != '-' || !text.ends_with(".seg")) return std::nullopt;
  const auto writer = parse_hex(text.substr(0, 16), 16);
  const auto sequence = parse_hex(text.substr(17, 8), 8);
  if (!writer || !sequence) return std::nullopt;
  return SegmentId{*writer, static_cast<uint32_t>(*sequence)};
}

Result<JournalReader> JournalReader::open(const std::string& path, uint64_t writer) {
  auto file = File::open(path, {});
  if (!file) return std::unexpected(file.error());
  JournalReader reader;
  reader.file_ = std::move(*file);
  reader.path_ = path;
  reader.writer_ = writer;
  return reader;
}

Result<uint64_t> JournalReader::read_new(const std::function<void(const Record&)>& visit,
                                         uint64_t listed_bytes, const std::stop_token& stop) {
  if (!file_.is_open()) {
    auto file = File::open(path_, {});
    if (!file) return std::unexpected(file.error());
    file_ = std::move(*file);
  }
  const auto now = file_.size();
  if (!now) return std::unexpected(now.error());
  const uint64_t size = std::max(*now, listed_bytes);
  const uint64_t slots = size / kRecordBytes;
  // A long damaged tail is not read over and over; a short one may be a record that is being written.
  if (size == size_seen_ && slots > next_index_ + kReadBytes / kRecordBytes) return 0;
  size_seen_ = kNothing;  // a read that fails has seen nothing
  uint64_t index = next_index_;
  uint64_t good = 0;
  uint64_t pending_bad = 0;
  std::vector<std::byte> buffer;
  while (index < slots && pending_bad < kMostDamagedInARow) {
    if (stop.stop_requested()) return good;
    const uint64_t count = std::min(slots - index, kReadBytes / kRecordBytes);
    buffer.resize(count * kRecordBytes);
    if (auto read = file_.read_at(buffer, index * kRecordBytes); !read) {
      if (read.error().kind == ErrorKind::not_found) break;  // cut off by a new owner since size()
      return std::unexpected(read.error());
    }
    for (uint64_t i = 0; i < count; ++i, ++index) {
      const auto slot =
          std::span<const std::byte, kRecordBytes>(buffer.data() + i * kRecordBytes, kRecordBytes);
      const auto record = decode_record(slot, writer_, index);
      if (!record) {
        // Not damage: what a later program wrote must neither be cut off nor have its segments removed.
        if (record.error().kind == ErrorKind::unsupported)
          return fail(ErrorKind::unsupported, "{}: {}", path_, record.error().message);
        ++pending_bad;
        continue;
      }
      bad_records_ += pending_bad;
      pending_bad = 0;
      next_index_ = index + 1;
      ++good;
      visit(*record);
      newest_ns_ = std::max(newest_ns_, record->time_ns);
    }
  }
  has_tail_ = size > next_index_ * kRecordBytes;
  size_seen_ = size;
  return good;
}

Result<JournalWriter> JournalWriter::create(const std::string& directory) {
  // Between its making and its locking a journal looks like a dead writer's, and another process may adopt
  // it: it is theirs then, and the next id is tried.
  constexpr int kAttempts = 64;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    const auto writer = random_writer();
    if (!writer) return std::unexpected(writer.error());
    auto file = File::open(directory + "/" + journal_name(*writer),
                           {.write = true, .create = true, .exclusive = true});
    if (!file) return std::unexpected(file.error());
    const auto locked = file->try_lock_exclusive();
    if (!locked) return std::unexpected(locked.error());
    if (!*locked || !file->is_at_its_path()) continue;
    JournalWriter journal;
    journal.file_ = std::move(*file);
    journal.writer_ = *writer;
    return journal;
  }
  return fail(ErrorKind::busy,
              "{}: {} new journals were taken by other processes before they could be locked", directory,
              kAttempts);
}

Result<std::optional<JournalWriter>> JournalWriter::lock(const std::string& path, uint64_t writer) {
  auto file = File::open(path, {.write = true});
  if (!file) return std::unexpected(file.error());
  const auto locked = file->try_lock_exclusive();
  if (!locked) return std::unexpected(locked.error());
  if (!*locked) return std::optional<JournalWriter>();
  // The owner may have compacted it away between our open and its last breath: what is appended to a file
  // without a name is lost.
  if (!file->is_at_its_path()) return fail(ErrorKind::not_found, "{} was removed by its owner", path);
  JournalWriter journal;
  journal.file_ = std::move(*file);
  journal.writer_ = writer;
  return std::optional<JournalWriter>(std::move(journal));
}

Status JournalWriter::append_at(uint64_t next_index) {
  next_index_ = next_index;
  return file_.truncate(next_index * kRecordBytes);
}

bool JournalWriter::another_appended() const {
  std::array<std::byte, kRecordBytes> slot;
  return file_.read_at(slot, next_index_ * kRecordBytes).has_value() &&
         decode_record(slot, writer_, next_index_).has_value();
}

Status JournalWriter::append(std::span<Record> records) {
  buffer_.resize(records.size() * kRecordBytes);
  for (size_t i = 0; i < records.size(); ++i) {
    records[i].journal = writer_;
    records[i].index = next_index_ + i;
    encode_record(records[i],
                  std::span<std::byte, kRecordBytes>(buffer_.data() + i * kRecordBytes, kRecordBytes));
  }
  auto written = file_.write_at(buffer_, next_index_ * kRecordBytes);
  if (written) next_index_ += records.size();
  return written;
}

}  // namespace tokendepot
