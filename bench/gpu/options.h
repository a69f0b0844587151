// What gpu_path is asked to measure.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tokendepot::bench {

struct GpuOptions {
  bool toy = false;
  std::vector<std::string> only;                  // parts; empty = all
  std::vector<std::string> roots;                 // kinds of root; empty = all
  std::vector<double> sizes{1, 2.5, 10, 32, 80};  // MiB
  double seconds = 2;                             // of each figure, its limit not counted
  double volume_gib = 2;                          // extents of one size together, on memory
  double open_gib = 64;                           // the depot whose opening is timed
  double open_mib = 10;                           // payload of its extents
  std::string memory = "/dev/shm";                // a directory on a memory file system
  std::string disk = "/var/tmp";                  // a directory on the disk
  std::string engine = "{}";                      // keys of the depot that replace ours
  std::string json;                               // file for the results

  bool wants(const std::string& part) const;
};

/// The parts and kinds of root that can be asked for.
const std::vector<std::string>& parts();
const std::vector<std::string>& root_kinds();

/// Stops the program with one sentence on an argument that is not understood, after --help with the usage.
GpuOptions parse_arguments(int argc, char** argv);

}  // namespace tokendepot::bench
