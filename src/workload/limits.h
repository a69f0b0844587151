// What bounds a workload on this machine: its medium and its link, measured without a depot.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "tokendepot/workload.h"
#include "workload/link.h"
#include "workload/raw_control.h"

namespace tokendepot {

struct LimitsPlan {
  std::string directory;  // on the medium
  bool in_memory = false;
  std::optional<uint32_t> gpu;
  Traffic traffic = Traffic::read;
  uint64_t piece = 0;
  size_t pieces = 0;        // of the control's file
  size_t depth = 1;         // pieces in flight
  size_t burst_pieces = 0;  // as many at once, then none; 0 = a steady stream
};

class Limits {
 public:
  static Result<std::unique_ptr<Limits>> make(const LimitsPlan& plan);
  Result<std::vector<WorkloadLimit>> measure(double seconds);

 private:
  explicit Limits(const LimitsPlan& plan) : plan_(plan) {}
  Status measure_medium(double seconds, std::vector<WorkloadLimit>& into);
  Status measure_link(double seconds, std::vector<WorkloadLimit>& into);

  LimitsPlan plan_;
  std::unique_ptr<RawControl> raw_;
  std::unique_ptr<CopyControl> copies_;
  std::unique_ptr<ControlBuffer> memory_;  // of the copies
  std::unique_ptr<Link> link_;
};

}  // namespace tokendepot
