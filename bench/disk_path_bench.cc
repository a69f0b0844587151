// Disk path: extents of 1, 2.5 and 10 MiB, 8 and 32 in flight, digest on, against a raw control of the same
// minute: threads of plain O_DIRECT pread/pwrite on one preallocated file, same sizes and depth, alternated
// with ours.
#include "raw_control.h"
#include "rig.h"

namespace tokendepot::bench {
namespace {

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
    Rig rig({.base = base,
             .mib = mib,
             .extents = extents,
             .segment_bytes = toy ? 16ull << 20 : 256ull << 20,
             .capacity = volume * 3});
    RawControl raw(base, piece, extents);
    std::printf("disk path on %s: %s, %zu extents of %s\n", base.c_str(), rig.transport().c_str(), extents,
                size_name(mib).c_str());
    // Until all segments are recycled ones: fresh file extents are slow to write for everybody.
    for (int warm = 0; warm < (toy ? 1 : 4); ++warm) rig.store(8);
    for (const size_t flight : {size_t{8}, size_t{32}}) {
      Pairs loads, stores;
      for (int round = 0; round < rounds; ++round) {
        stores.add(rig.store(flight), raw.run(flight, true));
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
