#include "store/write_through.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "base/errors.h"
#include "base/log.h"
#include "io/io_thread.h"

namespace tokendepot {
namespace {

constexpr uint64_t kPiece = 4ull << 20;
constexpr auto kRetry = std::chrono::milliseconds(20);
// Extents of the segment before may still come when the next one is being filled.
constexpr size_t kMostCopies = 4;

}  // namespace

WriteThrough::WriteThrough(Root& from, RootWriter& to, SegmentTable& segments, const Clock& clock,
                           BeforeEviction before_eviction)
    : from_(from),
      to_(to),
      segments_(segments),
      clock_(clock),
      before_eviction_(std::move(before_eviction)),
      piece_(static_cast<std::byte*>(std::aligned_alloc(kPageBytes, kPiece)), &std::free) {
  thread_ = start_io_thread([](void* self) { static_cast<WriteThrough*>(self)->run(); }, this, "td-through");
  has_ended_ = !thread_.joinable();
}

WriteThrough::~WriteThrough() {
  (void)stop(std::chrono::nanoseconds(0));
  if (thread_.joinable()) thread_.join();
}

bool WriteThrough::stop(std::chrono::nanoseconds patience) {
  std::unique_lock lock(mutex_);
  stop_ = true;
  wake_.notify_all();
  return ended_.wait_for(lock, patience, [this] { return has_ended_; });
}

void WriteThrough::submit(Passage* passage) {
  passage->submitted_ns = clock_.steady_ns();
  {
    std::lock_guard lock(mutex_);
    if (!has_ended_) {
      waiting_.push_back(passage);
      wake_.notify_one();
      return;
    }
  }
  passage->done(passage, false);
}

void WriteThrough::release(const SegmentId& id) {
  std::lock_guard lock(mutex_);
  copies_.erase(id);
}

void WriteThrough::run() {
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [this] { return stop_ || !waiting_.empty(); });
    if (waiting_.empty()) break;
    Passage* const passage = waiting_.front();
    lock.unlock();
    const Status passed = stop_ ? fail(ErrorKind::closed, "the depot is closing") : pass(*passage);
    lock.lock();
    const bool late = clock_.steady_ns() - passage->submitted_ns >= kPatienceNs;
    // A segment may be sealed, or past its grace, any moment.
    const bool short_of_space =
        !passed && (passed.error().kind == ErrorKind::busy || passed.error().kind == ErrorKind::no_space);
    if (short_of_space && !late && !stop_) {
      wake_.wait_for(lock, kRetry, [this] { return stop_.load(); });
      continue;
    }
    waiting_.pop_front();
    const bool complain = !passed && !stop_ && !std::exchange(complained_, true);
    if (passed) complained_ = false;
    lock.unlock();
    if (complain)
      log(LogLevel::warning, "write_through: kept in \"{}\" only and reported as not stored: {}",
          from_.path(), passed.error().message);
    passage->done(passage, passed.has_value());
    lock.lock();
  }
  copies_.clear();
  has_ended_ = true;
  ended_.notify_all();
}

Result<std::shared_ptr<File>> WriteThrough::copy_of(const Passage& passage) {
  const SegmentId& id = passage.put.where.segment;
  {
    std::lock_guard lock(mutex_);
    if (const auto known = copies_.find(id); known != copies_.end()) return known->second;
  }
  const SegmentTable::Segment segment = segments_.get(passage.slot);
  const SegmentTable::PerRoot& there = segment.roots[to_.root().index()];
  if (there.present || there.condemned)
    return fail(ErrorKind::not_found, "root \"{}\": the copy of {} is not ours any more", to_.root_path(),
                segment_name(id));
  auto opened = to_.open_copy(id, segment.roots[from_.index()].file_bytes, before_eviction_);
  if (!opened) return std::unexpected(opened.error());
  auto copy = std::make_shared<File>(std::move(*opened));
  if (auto begun = to_.begin_copy(id, *copy); !begun) {
    to_.drop_copy(id, *copy);
    return std::unexpected(begun.error());
  }
  std::lock_guard lock(mutex_);
  while (copies_.size() >= kMostCopies) copies_.erase(copies_.begin());
  copies_[id] = copy;
  return copy;
}

Status WriteThrough::pass(const Passage& passage) {
  const ExtentRef& where = passage.put.where;
  auto copy = copy_of(passage);
  if (!copy) return std::unexpected(copy.error());
  if (segments_.condemned(passage.slot, to_.root().index()))
    return fail(ErrorKind::not_found, "root \"{}\": the copy of {} was evicted", to_.root_path(),
                segment_name(where.segment));
  const auto source = from_.files().open(where.segment);
  if (!source) return std::unexpected(source.error());
  for (uint64_t at = 0; at < where.bytes; at += kPiece) {
    if (stop_) return fail(ErrorKind::closed, "the depot is closing");
    const std::span<std::byte> bytes(piece_.get(), std::min(kPiece, where.bytes - at));
    if (auto read = (*source)->file.read_at(bytes, where.offset + at); !read) return read;
    if (auto written = (*copy)->write_at(bytes, where.offset + at); !written) return written;
  }
  return to_.extend_copy(passage.put);
}

}  // namespace tokendepot
