// Host path on tmpfs: 2.5 MiB extents, 8 in flight, digest on. Limit: two threads of plain memcpy of the same
// bytes between the same memories in the same run. Beside stores a thread maps and unmaps memory, as engines
// do: the kernel has one lock for that in a process.
#include <atomic>
#include <thread>

#include "rig.h"
#include "workload/raw_control.h"

namespace tokendepot::bench {
namespace {

/// GB/s of two threads that copy `bytes` between a mapped tmpfs file and the cache, in pieces of 2.5 MiB.
double memcpy_limit(const std::string& directory, Rig& rig, uint64_t bytes, Traffic traffic) {
  const auto control = unwrap(CopyControl::make(directory, bytes));
  std::vector<double> rates;
  for (int round = 0; round < 3; ++round)
    rates.push_back(unwrap(control->run(rig.memory(), rig.memory_bytes(), 5ull << 19, 2, traffic, 0)));
  return median(rates);
}

/// A thread of the engine that maps and unmaps a MiB of memory over and over; what one round took at most.
class Mapper {
 public:
  Mapper() : thread_([this] { run(); }) {}
  ~Mapper() {
    if (thread_.joinable()) longest_ms();
  }
  Mapper(const Mapper&) = delete;
  Mapper& operator=(const Mapper&) = delete;
  /// Ends it.
  double longest_ms() {
    over_ = true;
    thread_.join();
    return longest_ms_;
  }

 private:
  void run() {
    while (!over_) {
      const double begin = now_s();
      map_and_give_back();
      longest_ms_ = std::max(longest_ms_, (now_s() - begin) * 1e3);
      ::usleep(200);
    }
  }

  std::atomic<bool> over_ = false;
  double longest_ms_ = 0;
  std::thread thread_;
};

void run(const std::string& base, bool toy) {
  const size_t extents = toy ? 16 : 400;  // 1 GB
  const uint64_t segment = toy ? 16ull << 20 : 256ull << 20;
  // Room for a little more than one generation, so that later ones are stored into recycled segments.
  const uint64_t capacity = toy ? 128ull << 20 : 2048ull << 20;
  Rig rig({.base = base, .mib = 2.5, .extents = extents, .segment_bytes = segment, .capacity = capacity});
  std::printf("host path on %s: %s, %zu extents of 2.5 MiB, 8 in flight\n", base.c_str(),
              rig.transport().c_str(), extents);
  std::vector<Rig::Run> stores;
  std::vector<Rig::Run> loads;
  Mapper alone;
  ::usleep(toy ? 10'000 : 1'000'000);
  const double mapping_alone_ms = alone.longest_ms();
  double mapping_ms = 0;
  for (int round = 0; round < (toy ? 1 : 5); ++round) {
    Mapper beside;
    stores.push_back(rig.store(8));
    mapping_ms = std::max(mapping_ms, beside.longest_ms());
    for (int again = 0; again < (toy ? 1 : 2); ++again) loads.push_back(rig.load(8));
  }
  auto rate = [](const std::vector<Rig::Run>& runs, bool cpu) {
    std::vector<double> values;
    for (const Rig::Run& run : runs) values.push_back(cpu ? run.cpu_s_per_gb : run.gb_per_s);
    return median(values);
  };
  const uint64_t limit_bytes = toy ? 40ull << 20 : 500ull << 20;
  const double out_limit = memcpy_limit(base, rig, limit_bytes, Traffic::read);
  const double in_limit = memcpy_limit(base, rig, limit_bytes, Traffic::write);
  print_result("host_tmpfs_load", rate(loads, false), "GB/s", out_limit);
  print_result("host_tmpfs_load_cpu", rate(loads, true), "CPU-s/GB", 0.30);
  // The first generation goes to fresh segments; what a depot does all day is refill recycled ones.
  if (stores.size() > 1) {
    print_result("host_tmpfs_store_fresh", stores.front().gb_per_s, "GB/s", in_limit);
    stores.erase(stores.begin());
  }
  print_result("host_tmpfs_store", rate(stores, false), "GB/s", in_limit);
  print_result("host_tmpfs_store_cpu", rate(stores, true), "CPU-s/GB", 0.30);
  print_result("host_tmpfs_mmap_beside_store", mapping_ms, "ms at most", mapping_alone_ms);
}

}  // namespace
}  // namespace tokendepot::bench

int main(int argc, char** argv) {
  const bool toy = argc > 1 && std::string(argv[1]) == "--toy";
  const std::string base = argc > (toy ? 2 : 1) ? argv[argc - 1] : "/dev/shm";
  tokendepot::bench::run(base, toy);
}
