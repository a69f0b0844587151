// Disk path: extents of 1, 2.5 and 10 MiB, 8, 32 and one in flight, digest on, against raw controls of the
// same seconds: threads of plain O_DIRECT pread/pwrite on one preallocated file, same sizes and depth.
//
// RESULT lines: <name> has the control with ordinary buffers as its limit, <name>_huge the same control with
// buffers in huge pages as ours are, <name>_split (one extent in flight) bare reads of one extent in parts at
// once.
#include <array>
#include <functional>

#include "rig.h"
#include "workload/raw_control.h"

namespace tokendepot::bench {
namespace {

std::string size_name(double mib) {
  return mib == 2.5 ? "2.5MiB" : std::to_string(static_cast<int>(mib)) + "MiB";
}

/// Alternates ours and its controls, in short runs whose order turns by one each round: the disk is shared,
/// drifts, and may hold a burst back from whoever comes after another one.
struct Contest {
  struct Control {
    std::string suffix;  // of the RESULT line that has it as its limit
    std::function<double()> run;
  };
  std::function<Rig::Run()> ours;
  std::vector<Control> controls;

  void run(const std::string& name, int rounds) const {
    std::vector<double> cpu;
    std::vector<std::vector<double>> rates(controls.size());
    std::vector<std::vector<double>> ratios(controls.size());
    const size_t turns = controls.size() + 1;
    for (int round = 0; round < rounds; ++round) {
      Rig::Run mine;
      std::vector<double> theirs(controls.size());
      for (size_t turn = 0; turn < turns; ++turn) {
        const size_t who = (turn + static_cast<size_t>(round)) % turns;
        if (who == 0) {
          mine = ours();
        } else {
          theirs[who - 1] = controls[who - 1].run();
        }
      }
      cpu.push_back(mine.cpu_s_per_gb);
      for (size_t c = 0; c < controls.size(); ++c) {
        rates[c].push_back(theirs[c]);
        ratios[c].push_back(theirs[c] > 0 ? mine.gb_per_s / theirs[c] : 0);
      }
    }
    // The ratio is the median of the rounds' ratios, not of medians.
    for (size_t c = 0; c < controls.size(); ++c) {
      const double limit = median(rates[c]);
      print_result(name + controls[c].suffix, median(ratios[c]) * limit, "GB/s", limit);
    }
    print_result(name + "_cpu", median(cpu), "CPU-s/GB", 0.30);
  }
};

void run(const std::string& base, bool toy) {
  const uint64_t volume = toy ? 48ull << 20 : 256ull << 20;
  const int rounds = toy ? 1 : 20;
  for (const double mib : {1.0, 2.5, 10.0}) {
    const auto piece = static_cast<uint64_t>(mib * 1048576);
    const size_t extents = volume / piece;
    Rig rig({.base = base,
             .mib = mib,
             .extents = extents,
             .segment_bytes = toy ? 16ull << 20 : 64ull << 20,
             .capacity = volume * 3});
    const auto raw = unwrap(RawControl::make(base, piece, extents));
    std::printf("disk path on %s: %s, %zu extents of %s\n", base.c_str(), rig.transport().c_str(), extents,
                size_name(mib).c_str());
    // Until all segments are recycled ones: fresh file extents are slow to write for everybody.
    for (int warm = 0; warm < (toy ? 1 : 4); ++warm) rig.store(8);
    for (const size_t flight : {size_t{8}, size_t{32}}) {
      const std::string tail = size_name(mib) + "_" + std::to_string(flight);
      for (const bool write : {true, false}) {
        const auto control = [&, write](Pages pages) {
          return unwrap(raw->run(flight, write ? Traffic::write : Traffic::read, pages));
        };
        const Contest contest{
            [&, write] { return write ? rig.store(flight) : rig.load(flight); },
            {{"", [=] { return control(Pages::plain); }}, {"_huge", [=] { return control(Pages::huge); }}}};
        contest.run(write ? "disk_store_" + tail : "disk_load_" + tail, rounds);
      }
    }
    const Contest single{[&] { return rig.load(1); },
                         {{"", [&] { return unwrap(raw->run(1, Traffic::read, Pages::plain)); }},
                          {"_huge", [&] { return unwrap(raw->run(1, Traffic::read, Pages::huge)); }},
                          {"_split", [&] { return unwrap(raw->run_split(256 << 10)); }}}};
    single.run("disk_load_" + size_name(mib) + "_1", rounds);
  }
}

}  // namespace
}  // namespace tokendepot::bench

int main(int argc, char** argv) {
  const bool toy = argc > 1 && std::string(argv[1]) == "--toy";
  const std::string base = argc > (toy ? 2 : 1) ? argv[argc - 1] : "/tmp";
  tokendepot::bench::run(base, toy);
}
