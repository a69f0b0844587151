// The results of one run: printed as they come, kept for a file.
#pragma once

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "result.h"

namespace tokendepot::bench {

class Report {
 public:
  void about(const std::string& what, const std::string& is) {
    std::printf("%s: %s\n", what.c_str(), is.c_str());
    std::fflush(stdout);
    machine_[what] = is;
  }
  void note(const std::string& line) {
    std::printf("%s\n", line.c_str());
    std::fflush(stdout);
    notes_.push_back(line);
  }
  void add(const std::string& name, double value, const char* unit, double limit) {
    print_result(name, value, unit, limit);
    results_.push_back({{"name", name}, {"value", value}, {"unit", unit}, {"limit", limit}});
  }
  bool write(const std::string& path) const {
    std::ofstream file(path);
    file << nlohmann::json{{"machine", machine_}, {"notes", notes_}, {"results", results_}}.dump(1) << '\n';
    return file.good();
  }

 private:
  nlohmann::json machine_ = nlohmann::json::object();
  std::vector<std::string> notes_;
  nlohmann::json results_ = nlohmann::json::array();
};

/// Ours and the limit, measured by turns. The ratio is the median of the pairs' ratios, not of medians: what
/// is shared drifts.
struct Pairs {
  std::vector<double> limit, ratio, cpu, limit_cpu;
  void add(double ours, double ours_cpu, double theirs, double theirs_cpu) {
    limit.push_back(theirs);
    ratio.push_back(ours / theirs);
    cpu.push_back(ours_cpu);
    limit_cpu.push_back(theirs_cpu);
  }
  void print(Report& report, const std::string& name) const {
    report.add(name, median(ratio) * median(limit), "GB/s", median(limit));
    report.add(name + "_cpu", median(cpu), "CPU-s/GB", median(limit_cpu));
  }
};

}  // namespace tokendepot::bench
