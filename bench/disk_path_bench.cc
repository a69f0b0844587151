// Disk path: extents of 1, 2.5 and 10 MiB, 8 and 32 in flight, digest on, against a raw control of the same
// minute: threads of plain O_DIRECT pread/pwrite on one preallocated file, same sizes and depth, alternated
// with ours.
#include <fcntl.h>

#include <atomic>
#include <thread>

#include "rig.h"

namespace tokendepot::bench {
namespace {

/// One preallocated and written file, read and written in blocks of the extents' size.
class RawControl {
 public:
  RawControl(const std::string& base, uint64_t piece, size_t pieces)
      : file_(base + "/tokendepot-bench-raw"), piece_(piece), pieces_(pieces) {
    fd_ = open(file_.c_str(), O_RDWR | O_CREAT | O_DIRECT, 0600);
    if (fd_ < 0) fd_ = open(file_.c_str(), O_RDWR | O_CREAT, 0600);
    if (fd_ < 0 || posix_fallocate(fd_, 0, static_cast<off_t>(piece * pieces)) != 0)
      stop("no space for the raw control");
    run(4, true);
  }
  ~RawControl() {
    close(fd_);
    unlink(file_.c_str());
  }
  RawControl(const RawControl&) = delete;
  RawControl& operator=(const RawControl&) = delete;

  /// GB/s of `depth` threads.
  double run(size_t depth, bool write) {
    std::vector<size_t> order(pieces_);
    for (size_t i = 0; i < pieces_; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random_);
    // Buffers are made and touched before the clock starts: the control pays for the disk only.
    while (buffers_.size() < depth) {
      buffers_.emplace_back(static_cast<char*>(std::aligned_alloc(4096, piece_)), &std::free);
      std::memset(buffers_.back().get(), static_cast<int>(buffers_.size()), piece_);
    }
    std::atomic<size_t> next = 0;
    std::atomic<bool> failed = false;
    const double begin = now_s();
    std::vector<std::thread> threads;
    for (size_t t = 0; t < depth; ++t) {
      threads.emplace_back([&, t] {
        char* const buffer = buffers_[t].get();
        for (size_t i = next++; i < pieces_; i = next++) {
          const auto at = static_cast<off_t>(order[i] * piece_);
          const ssize_t moved = write ? pwrite(fd_, buffer, piece_, at) : pread(fd_, buffer, piece_, at);
          if (moved != static_cast<ssize_t>(piece_)) failed = true;
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    if (failed) stop("the raw control failed");
    return static_cast<double>(piece_ * pieces_) * 1e-9 / (now_s() - begin);
  }

 private:
  std::string file_;
  uint64_t piece_;
  size_t pieces_;
  int fd_ = -1;
  std::vector<std::unique_ptr<char, void (*)(void*)>> buffers_;
  std::mt19937 random_{5};
};

std::string size_name(double mib) {
  return mib == 2.5 ? "2.5MiB" : std::to_string(static_cast<int>(mib)) + "MiB";
}

struct Pairs {
  std::vector<double> ours, cpu, control, ratio;
  void add(const Rig::Run& run, double raw) {
    ours.push_back(run.gb_per_s);
    cpu.push_back(run.cpu_s_per_gb);
    control.push_back(raw);
    ratio.push_back(run.gb_per_s / raw);
  }
  /// The ratio is the median of the pairs' ratios, not of medians: the disk is shared and drifts.
  void print(const std::string& name) const {
    const double limit = median(control);
    print_result(name, median(ratio) * limit, "GB/s", limit);
    print_result(name + "_cpu", median(cpu), "CPU-s/GB", 0.30);
  }
};

void run(const std::string& base, bool toy) {
  const uint64_t volume = toy ? 48ull << 20 : 1024ull << 20;
  const int rounds = toy ? 1 : 5;
  for (const double mib : {1.0, 2.5, 10.0}) {
    const auto piece = static_cast<uint64_t>(mib * 1048576);
    const size_t extents = volume / piece;
    Rig rig(base, mib, extents, toy ? 16ull << 20 : 256ull << 20, volume * 3);
    RawControl raw(base, piece, extents);
    std::printf("disk path on %s: %s, %zu extents of %s\n", base.c_str(), rig.transport().c_str(), extents,
                size_name(mib).c_str());
    uint32_t generation = 0;
    // Until all segments are recycled ones: fresh file extents are slow to write for everybody.
    for (int warm = 0; warm < (toy ? 1 : 4); ++warm) rig.store(8, generation++);
    for (const size_t flight : {size_t{8}, size_t{32}}) {
      Pairs loads, stores;
      for (int round = 0; round < rounds; ++round) {
        stores.add(rig.store(flight, generation++), raw.run(flight, true));
        loads.add(rig.load(flight), raw.run(flight, false));
      }
      const std::string tail = size_name(mib) + "_" + std::to_string(flight);
      loads.print("disk_load_" + tail);
      stores.print("disk_store_" + tail);
    }
    Pairs singles;
    for (int round = 0; round < rounds; ++round) singles.add(rig.load(1), raw.run(1, false));
    singles.print("disk_load_" + size_name(mib) + "_1");
  }
}

}  // namespace
}  // namespace tokendepot::bench

int main(int argc, char** argv) {
  const bool toy = argc > 1 && std::string(argv[1]) == "--toy";
  const std::string base = argc > (toy ? 2 : 1) ? argv[argc - 1] : "/tmp";
  tokendepot::bench::run(base, toy);
}
