#include "gpu/options.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "rig.h"

namespace tokendepot::bench {
namespace {

constexpr const char* kUsage =
    R"(usage: gpu_path [OPTION...]   measures loads and stores of a depot with a CUDA device, next to their limits

  --only PART,...     paths (load and store of each kind of root), kernels, matmul, threads (what stores into fresh
                      segments cost other threads of the process), open; default: all
  --roots KIND,...    mapped, direct, loop, gds, gdsloop; default: all that this machine offers
  --sizes MIB,...     payload of an extent, multiples of 0.5; default: 1,2.5,10,32,80
  --seconds S         of each figure; default: 2
  --volume GIB        extents of one size together, on memory; a quarter of it on disk; default: 2
  --open GIB          size of the depot whose opening is timed; default: 64, less where memory is short
  --open-size MIB     payload of its extents, a multiple of 0.5; default: 10
  --memory DIR        a directory on a memory file system; default: /dev/shm
  --disk DIR          a directory on the disk; default: $TOKENDEPOT_BENCH_DIR or /var/tmp
  --engine JSON       keys of the depot that replace the benchmark's, e.g. '{"io_depth":32}'
  --json FILE         writes the results there, too
  --toy               small sizes: shows that it works, the figures mean nothing
)";

[[noreturn]] void refuse(const std::string& option, const std::string& value, const std::string& expected) {
  stop(option + " has the value \"" + value + "\", expected " + expected);
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> pieces;
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.find(',', at), text.size());
    pieces.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return pieces;
}

double number(const std::string& option, const std::string& value, double least, double most) {
  double parsed = 0;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), parsed);
  if (error != std::errc() || end != value.data() + value.size() || !(parsed >= least && parsed <= most)) {
    char range[64];
    std::snprintf(range, sizeof range, "a number from %g to %g", least, most);
    refuse(option, value, range);
  }
  return parsed;
}

double mebibytes(const std::string& option, const std::string& value) {
  const double size = number(option, value, 0.5, 512);
  if (size * 2 != std::floor(size * 2)) refuse(option, value, "a multiple of 0.5");
  return size;
}

std::vector<std::string> choices(const std::string& option, const std::string& value,
                                 const std::vector<std::string>& known) {
  std::string names;
  for (const std::string& name : known) names += (names.empty() ? "" : ", ") + name;
  std::vector<std::string> chosen = split(value);
  for (const std::string& name : chosen) {
    if (std::ranges::find(known, name) == known.end()) refuse(option, name, "one of " + names);
  }
  return chosen;
}

}  // namespace

const std::vector<std::string>& parts() {
  static const std::vector<std::string> names{"paths", "kernels", "matmul", "threads", "open"};
  return names;
}

bool GpuOptions::wants(const std::string& part) const {
  return only.empty() || std::ranges::find(only, part) != only.end();
}

GpuOptions parse_arguments(int argc, char** argv) {
  GpuOptions options;
  if (const char* disk = std::getenv("TOKENDEPOT_BENCH_DIR")) options.disk = disk;
  const std::vector<std::string_view> arguments(argv + 1, argv + argc);
  // First, so that what else is said stays in force.
  if (std::ranges::find(arguments, "--toy") != arguments.end()) {
    options.toy = true;
    options.sizes = {1};
    options.seconds = 0.02;
    options.volume_gib = 1.0 / 32;
    options.open_gib = 1.0 / 8;
    options.open_mib = 1;
  }
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "--toy") continue;
    if (option == "--help") {
      std::fputs(kUsage, stdout);
      std::exit(0);
    }
    const auto value = [&]() -> std::string {
      if (i + 1 == argc) stop(option + " wants a value");
      return argv[++i];
    };
    if (option == "--only") {
      options.only = choices(option, value(), parts());
    } else if (option == "--roots") {
      options.roots = choices(option, value(), root_kinds());
    } else if (option == "--sizes") {
      options.sizes.clear();
      for (const std::string& size : split(value())) options.sizes.push_back(mebibytes(option, size));
    } else if (option == "--seconds") {
      options.seconds = number(option, value(), 0.01, 60);
    } else if (option == "--volume") {
      options.volume_gib = number(option, value(), 1.0 / 64, 64);
    } else if (option == "--open") {
      options.open_gib = number(option, value(), 1.0 / 16, 4096);
    } else if (option == "--open-size") {
      options.open_mib = mebibytes(option, value());
    } else if (option == "--memory") {
      options.memory = value();
    } else if (option == "--disk") {
      options.disk = value();
    } else if (option == "--engine") {
      options.engine = value();
    } else if (option == "--json") {
      options.json = value();
    } else {
      stop("unknown argument \"" + option + "\", expected what gpu_path --help lists");
    }
  }
  return options;
}

}  // namespace tokendepot::bench
