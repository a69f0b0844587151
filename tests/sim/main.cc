// Runs seeds, each in a process of its own, and says what did not hold.
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/log.h"
#include "format/digest.h"
#include "history.h"
#include "report.h"
#include "scheduler.h"

namespace tokendepot::sim {
namespace {

Report* shared_report = nullptr;
bool verbose = false;
// Real time. A run takes milliseconds; one that never gives way to another thread is ended by this.
constexpr unsigned kLongestRunSeconds = 60;
constexpr uint64_t kSweepEvery = 16;  // one seed of so many dies at every change of a short history
constexpr uint64_t kLeases = 8;       // what is left of one seed of so many that is short of segments in use

struct Arguments {
  uint64_t seeds = 100;
  uint64_t first = 1;
  double seconds = 0;  // 0 = no bound
  std::string json;
  std::string plant;
};

constexpr char kUsage[] =
    "usage: tokendepot_sim [--seeds N] [--first-seed S] [--seconds T] [--json FILE] [--plant NAME] "
    "[--verbose]\n"
    "  --seeds N       how many lives to run (100)\n"
    "  --first-seed S  the number of the first (1)\n"
    "  --seconds T     stop after so long, however many seeds are left\n"
    "  --json FILE     the totals and what failed, as one JSON object\n"
    "  --plant NAME    run the build with this bug planted, which must be caught\n"
    "  --verbose       the depots' log lines\n";

[[noreturn]] void refuse(const std::string& sentence) {
  fmt::print(stderr, "tokendepot_sim: {}\n", sentence);
  std::exit(2);
}

template <typename Number>
Number number(std::string_view option, const char* text) {
  Number value{};
  const char* const end = text + std::strlen(text);
  const auto [stop, error] = std::from_chars(text, end, value);
  if (error != std::errc() || stop != end || value < 0)
    refuse(fmt::format("{} is \"{}\", expected a number of 0 or more", option, text));
  return value;
}

Arguments parse(int count, char** arguments) {
  Arguments parsed;
  for (int i = 1; i < count; ++i) {
    const std::string_view option = arguments[i];
    if (option == "--help") {
      fmt::print("{}", kUsage);
      std::exit(0);
    }
    if (option == "--verbose") {
      verbose = true;
      continue;
    }
    constexpr std::string_view kWithValue[] = {"--seeds", "--first-seed", "--seconds", "--json", "--plant"};
    if (std::ranges::find(kWithValue, option) == std::end(kWithValue))
      refuse(fmt::format("unknown argument \"{}\"; --help lists what there is", option));
    if (i + 1 == count) refuse(fmt::format("{} wants a value", option));
    const char* const value = arguments[++i];
    if (option == "--seeds") parsed.seeds = number<uint64_t>(option, value);
    if (option == "--first-seed") parsed.first = number<uint64_t>(option, value);
    if (option == "--seconds") parsed.seconds = number<double>(option, value);
    if (option == "--json") parsed.json = value;
    if (option == "--plant") parsed.plant = value;
  }
  return parsed;
}

struct Totals {
  uint64_t seeds = 0;
  uint64_t runs = 0;
  Report sum;
  std::optional<uint64_t> failed_seed;
  Verdict verdict = Verdict::fine;
  std::string text;

  bool add(const Report& run, uint64_t seed) {
    ++runs;
    sum.operations += run.operations;
    sum.hits += run.hits;
    sum.crashes += run.crashes;
    for (size_t i = 0; i < run.injected.size(); ++i) sum.injected[i] += run.injected[i];
    sum.trace = sum.trace * 31 + run.trace;
    if (run.verdict == Verdict::fine) return true;
    failed_seed = seed;
    verdict = run.verdict;
    text = run.text;
    return false;
  }
  uint64_t injected() const {
    uint64_t all = 0;
    for (const uint64_t count : sum.injected) all += count;
    return all;
  }
};

/// One life in a child process: what it leaves behind when it is killed within goes with the child.
template <typename Body>
Report run_apart(uint64_t seed, Body body) {
  *shared_report = Report{};
  std::fflush(nullptr);
  const pid_t child = fork();
  TD_CHECK(child >= 0);
  if (child == 0) {
    alarm(kLongestRunSeconds);
    set_log_sink([](LogLevel level, std::string_view line) {
      tell("{}{}", level >= LogLevel::warning ? "WARNING " : "", line);
    });
    run_simulation(seed, body);
    shared_report->finished = true;
    _exit(0);
  }
  int status = 0;
  while (waitpid(child, &status, 0) != child) {
  }
  Report result = *shared_report;
  if (!result.finished && result.verdict == Verdict::fine) {
    const bool alarmed = WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM;
    result.verdict = alarmed ? Verdict::hang : Verdict::broken;
    std::snprintf(result.text, sizeof result.text, "%s",
                  alarmed               ? "a thread runs for ever"
                  : WIFSIGNALED(status) ? strsignal(WTERMSIG(status))
                                        : "the engine ended the process");
  }
  return result;
}

/// False: something did not hold.
bool run_seed(uint64_t seed, Totals& totals) {
  ++totals.seeds;
  if (seed % kSweepEvery == kLeases)
    return totals.add(run_apart(seed, [seed] { run_lease_history(seed); }), seed);
  if (seed % kSweepEvery != 0) return totals.add(run_apart(seed, [seed] { run_history(seed); }), seed);
  const Report whole = run_apart(seed, [seed] { run_short_history(seed, 0, 0); });
  if (!totals.add(whole, seed)) return false;
  for (uint64_t n = 1; n <= whole.writes; ++n) {
    // Every third death is followed by one of the heir, somewhere in its recovery.
    const uint64_t again = n % 3 == 0 ? 1 + n / 3 % 6 : 0;
    const Report run = run_apart(seed, [=] { run_short_history(seed, n, again); });
    if (!totals.add(run, seed)) return false;
  }
  return true;
}

void write_json(const std::string& path, const Totals& totals) {
  nlohmann::json injected = nlohmann::json::object();
  for (size_t i = 0; i < kInjectedNames.size(); ++i) injected[kInjectedNames[i]] = totals.sum.injected[i];
  nlohmann::json out = {{"seeds", totals.seeds},
                        {"runs", totals.runs},
                        {"operations", totals.sum.operations},
                        {"verified_extents", totals.sum.hits},
                        {"crashes", totals.sum.crashes},
                        {"injected", injected},
                        {"trace", fmt::format("{:016x}", totals.sum.trace)},
                        {"failure", nullptr}};
  if (totals.failed_seed) {
    out["failure"] = {{"seed", *totals.failed_seed},
                      {"kind", kVerdictNames[static_cast<size_t>(totals.verdict)]},
                      {"text", totals.text}};
  }
  std::ofstream file(path);
  file << out.dump(2) << '\n';
  if (!file.flush()) refuse(fmt::format("--json {} cannot be written: {}", path, std::strerror(errno)));
}

/// The planted bugs are programs of their own, next to this one.
[[noreturn]] void run_plant(const std::string& name, char** arguments) {
  const bool plain = std::ranges::all_of(name, [](char c) { return (c >= 'a' && c <= 'z') || c == '_'; });
  if (!plain) refuse(fmt::format("--plant is \"{}\", expected the name of a planted bug", name));
  std::vector<char> self(4096);
  const ssize_t length = readlink("/proc/self/exe", self.data(), self.size() - 1);
  TD_CHECK(length > 0);
  const std::string program = std::string(self.data(), static_cast<size_t>(length)) + "_" + name;
  std::vector<char*> rest;
  for (char** argument = arguments; *argument != nullptr; ++argument) {
    if (std::strcmp(*argument, "--plant") == 0) {
      ++argument;
      continue;
    }
    rest.push_back(*argument);
  }
  rest.push_back(nullptr);
  execv(program.c_str(), rest.data());
  refuse(fmt::format("--plant {}: {} cannot be run: {}", name, program, std::strerror(errno)));
}

}  // namespace

Report& report() {
  return *shared_report;
}

void tell_line(const std::string& line) {
  if (!verbose) return;
  fmt::print(stderr, "{:12.6f} process {}: {}\n", static_cast<double>(now_ns()) * 1e-9, current_process(),
             line);
}

void count(Injected kind) {
  ++shared_report->injected[static_cast<size_t>(kind)];
  note("injected", static_cast<uint64_t>(kind));
}

void note(std::string_view what, uint64_t value) {
  const uint64_t words[] = {shared_report->trace, xxh3(std::as_bytes(std::span(what))), value};
  shared_report->trace = xxh3(std::as_bytes(std::span(words)));
}

void violated(Verdict verdict, std::string_view text) {
  shared_report->verdict = verdict;
  std::snprintf(shared_report->text, sizeof shared_report->text, "%.*s", static_cast<int>(text.size()),
                text.data());
  _exit(1);
}

}  // namespace tokendepot::sim

int main(int count, char** arguments) {
  using namespace tokendepot::sim;
  const Arguments wanted = parse(count, arguments);
  if (!wanted.plant.empty()) run_plant(wanted.plant, arguments);
  void* const memory =
      mmap(nullptr, sizeof(Report), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  TD_CHECK(memory != MAP_FAILED);
  shared_report = new (memory) Report;

  Totals totals;
  const auto began = std::chrono::steady_clock::now();
  for (uint64_t i = 0; i < wanted.seeds; ++i) {
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - began;
    if (wanted.seconds > 0 && taken.count() > wanted.seconds) break;
    if (!run_seed(wanted.first + i, totals)) break;
  }
  if (totals.failed_seed) {
    fmt::print("seed {}: {}: {}\nreplay: {} --first-seed {} --seeds 1 --verbose\n", *totals.failed_seed,
               kVerdictNames[static_cast<size_t>(totals.verdict)], totals.text, arguments[0],
               *totals.failed_seed);
  }
  if (!wanted.json.empty()) write_json(wanted.json, totals);
  const auto is = [&](Verdict verdict) { return totals.verdict == verdict ? 1 : 0; };
  fmt::print("SIM seeds {} operations {} crashes {} injected {} wrong {} lost {} hangs {}\n", totals.seeds,
             totals.sum.operations, totals.sum.crashes, totals.injected(), is(Verdict::wrong),
             is(Verdict::lost), is(Verdict::hang));
  return totals.failed_seed ? 1 : 0;
}
