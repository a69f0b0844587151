#include "workload/raw_control.h"

#include <fcntl.h>
#include <liburing.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <numeric>
#include <thread>

#include "base/errors.h"
#include "io/huge_memory.h"
#include "io/io_thread.h"
#include "io/scratch_file.h"
#include "workload/meter.h"
#include "workload/payload.h"

namespace tokendepot {
namespace {

bool is_write(Traffic traffic, size_t index) {
  return traffic == Traffic::write || (traffic == Traffic::mixed && index % 2 == 1);
}

/// Runs body(begin) on `count` threads once all of them are there, and returns the seconds from then until
/// the last one has ended: making and joining 128 threads takes 3 to 5 ms, a burst of 8 MiB not much more.
/// `busy`, and nothing ran, where the system refuses a thread: a figure of fewer is of something else.
template <typename Body>
Result<double> seconds_on_threads(size_t count, Body& body) {
  enum class Gate : uint8_t { closed, open, given_up };
  struct Shared {
    Body& body;
    std::atomic<Gate> gate = Gate::closed;
    double begin = 0;
    std::atomic<double> end = 0;
  } shared{body};
  std::vector<std::thread> threads(count);
  size_t started = 0;
  for (; started < count; ++started) {
    threads[started] = start_io_thread(
        [](void* context) {
          auto& all = *static_cast<Shared*>(context);
          all.gate.wait(Gate::closed);
          if (all.gate == Gate::given_up) return;
          all.body(all.begin);
          const double now = steady_s();
          for (double last = all.end; last < now && !all.end.compare_exchange_weak(last, now);) {
          }
        },
        &shared, "td-control");
    if (!threads[started].joinable()) break;
  }
  shared.begin = steady_s();
  shared.end = shared.begin;
  shared.gate = started == count ? Gate::open : Gate::given_up;
  shared.gate.notify_all();
  for (size_t i = 0; i < started; ++i) threads[i].join();
  if (started < count) return std::unexpected(thread_refused("the raw control's threads").error());
  return shared.end - shared.begin;
}

}  // namespace

Result<std::unique_ptr<ControlBuffer>> ControlBuffer::make(uint64_t bytes, Pages pages) {
  std::byte* data = nullptr;
  if (pages == Pages::huge) {
    data = map_huge_memory(bytes);
  } else {
    void* const mapped = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped != MAP_FAILED) data = static_cast<std::byte*>(mapped);
  }
  if (data == nullptr) return fail_errno(errno, "no {} bytes of memory for the raw control", bytes);
  fill_tile({data, bytes}, 0, 0);
  return std::unique_ptr<ControlBuffer>(new ControlBuffer(data, bytes));
}

ControlBuffer::~ControlBuffer() {
  ::munmap(data_, bytes_);
}

Result<std::unique_ptr<RawControl>> RawControl::make(const std::string& directory, uint64_t piece,
                                                     size_t pieces) {
  auto unbuffered = ScratchFile::create(directory, true);
  const bool direct = unbuffered.has_value();
  auto file = direct ? std::move(unbuffered) : ScratchFile::create(directory, false);
  if (!file) return std::unexpected(file.error());
  std::unique_ptr<RawControl> made(new RawControl(std::move(*file), direct, piece, pieces));
  if (const int error = ::posix_fallocate(made->file_.fd(), 0, static_cast<off_t>(piece * pieces));
      error != 0)
    return fail_errno(error, "no space in {} for the raw control's {} bytes", directory, piece * pieces);
  if (auto written = made->move(4, Traffic::write, Pages::huge, pieces, 0); !written)
    return std::unexpected(written.error());
  return made;
}

Result<double> RawControl::run(size_t depth, Traffic traffic, Pages pages, double seconds) {
  const size_t least = direct_ && seconds > 0 ? std::min(depth, pieces_) : pieces_;
  const auto moved = move(depth, traffic, pages, least, seconds);
  if (!moved) return std::unexpected(moved.error());
  return static_cast<double>(piece_ * moved->pieces) * 1e-9 / moved->seconds;
}

Result<double> RawControl::seconds_of(size_t depth, size_t pieces) {
  const auto moved = move(depth, Traffic::read, Pages::huge, pieces, 0);
  if (!moved) return std::unexpected(moved.error());
  return moved->seconds;
}

Result<RawControl::Moved> RawControl::move(size_t depth, Traffic traffic, Pages pages, size_t least,
                                           double seconds) {
  // Buffers and threads are made before the clock starts: the control pays for the disk only.
  auto& buffers = pages == Pages::plain ? plain_ : huge_;
  while (buffers.size() < depth) {
    auto buffer = ControlBuffer::make(piece_, pages);
    if (!buffer) return std::unexpected(buffer.error());
    buffers.push_back(std::move(*buffer));
  }
  // Without O_DIRECT the first pass comes from the medium, a second one would not.
  const bool one_pass = !direct_ && traffic != Traffic::write;
  if (one_pass) {
    ::fdatasync(file_.fd());
    ::posix_fadvise(file_.fd(), 0, 0, POSIX_FADV_DONTNEED);
    seconds = 0;
  }
  if (order_.empty()) order_ = shuffled();
  std::atomic<size_t> next = 0;
  std::atomic<uint64_t> done = 0;
  std::atomic<int> error = 0;
  std::atomic<size_t> next_buffer = 0;
  auto work = [&](double begin) {
    std::byte* const buffer = buffers[next_buffer++]->data();
    for (size_t i = next++; error == 0 && (i < least || steady_s() - begin < seconds); i = next++) {
      const auto at = static_cast<off_t>(order_[(first_ + i) % pieces_] * piece_);
      const ssize_t moved = is_write(traffic, i) ? ::pwrite(file_.fd(), buffer, piece_, at)
                                                 : ::pread(file_.fd(), buffer, piece_, at);
      if (moved != static_cast<ssize_t>(piece_)) error = moved < 0 ? errno : EIO;
      ++done;
    }
  };
  const auto took = seconds_on_threads(depth, work);
  if (!took) return std::unexpected(took.error());
  if (error != 0) return fail_errno(error, "the raw control of {} bytes a piece failed", piece_);
  first_ = (first_ + done) % pieces_;
  return Moved{done, *took};
}

Result<double> RawControl::run_split(uint64_t part) {
  if (huge_.empty()) {
    auto made = ControlBuffer::make(piece_, Pages::huge);
    if (!made) return std::unexpected(made.error());
    huge_.push_back(std::move(*made));
  }
  std::byte* const buffer = huge_.front()->data();
  const auto parts = static_cast<unsigned>((piece_ + part - 1) / part);
  io_uring ring{};
  if (io_uring_queue_init(parts, &ring, 0) != 0) return 0;
  bool failed = false;
  const double begin = steady_s();
  for (const size_t block : shuffled()) {
    for (uint64_t at = 0; at < piece_; at += part) {
      const auto bytes = static_cast<unsigned>(std::min(part, piece_ - at));
      io_uring_sqe* const entry = io_uring_get_sqe(&ring);
      io_uring_prep_read(entry, file_.fd(), buffer + at, bytes, block * piece_ + at);
      io_uring_sqe_set_data64(entry, bytes);
    }
    failed = io_uring_submit(&ring) != static_cast<int>(parts);
    for (unsigned i = 0; i < parts && !failed; ++i) {
      io_uring_cqe* done = nullptr;
      failed = io_uring_wait_cqe(&ring, &done) != 0 || done->res != static_cast<int>(done->user_data);
      if (!failed) io_uring_cqe_seen(&ring, done);
    }
    if (failed) break;
  }
  const double took = steady_s() - begin;
  io_uring_queue_exit(&ring);
  if (failed) return fail(ErrorKind::io, "the raw split control failed");
  return static_cast<double>(piece_ * pieces_) * 1e-9 / took;
}

std::vector<size_t> RawControl::shuffled() {
  std::vector<size_t> order(pieces_);
  std::iota(order.begin(), order.end(), size_t{0});
  std::ranges::shuffle(order, random_);
  return order;
}

Result<std::unique_ptr<CopyControl>> CopyControl::make(const std::string& directory, uint64_t bytes) {
  const std::string path = temporary_path(directory);
  auto file = File::open(path, {.write = true, .create = true, .exclusive = true});
  if (!file) return std::unexpected(file.error());
  const auto allocated = file->preallocate(bytes);
  auto mapping = allocated ? Mapping::map(*file, bytes, true) : std::unexpected(allocated.error());
  if (auto removed = remove_file(path); !removed) return std::unexpected(removed.error());
  if (!mapping) return std::unexpected(mapping.error());
  fill_tile({mapping->data(), bytes}, 0, 0);
  return std::unique_ptr<CopyControl>(new CopyControl(std::move(*file), std::move(*mapping)));
}

Result<double> CopyControl::run(std::byte* memory, uint64_t bytes, uint64_t piece, size_t threads,
                                Traffic traffic, double seconds) {
  const uint64_t pieces = std::min(bytes, mapping_.size()) / piece;
  if (pieces == 0) return 0;
  std::atomic<uint64_t> next = 0;
  std::atomic<uint64_t> done = 0;
  auto copy = [&](double begin) {
    for (uint64_t i = next++; i < pieces || steady_s() - begin < seconds; i = next++) {
      const uint64_t at = i % pieces * piece;
      if (is_write(traffic, i)) {
        std::memcpy(mapping_.data() + at, memory + at, piece);
      } else {
        std::memcpy(memory + at, mapping_.data() + at, piece);
      }
      ++done;
    }
  };
  const auto took = seconds_on_threads(threads, copy);
  if (!took) return std::unexpected(took.error());
  return static_cast<double>(done * piece) * 1e-9 / *took;
}

}  // namespace tokendepot
