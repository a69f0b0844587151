#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include "base/clock.h"
#include "io/engine.h"
#include "io/huge_memory.h"
#include "io/scratch_file.h"

namespace tokendepot {
namespace {

constexpr uint64_t kProbeBytes = 32ull << 20;
constexpr uint64_t kWriteStepBytes = 4ull << 20;
constexpr uint64_t kWriteBudgetNs = 80'000'000;
constexpr uint64_t kBudgetNs = 300'000'000;
constexpr size_t kRounds = 3;
constexpr uint64_t kReadsBudgetNs = 100'000'000;
constexpr uint32_t kFewestReads = 4;

class ProbeMemory {
 public:
  // Like the slab's: what kind of pages a buffer has decides how fast it is filled.
  ProbeMemory() : address_(map_huge_memory(kProbeBytes)) {
    if (address_ == nullptr) return;
    // Not zeros: a file system that compresses or skips them would be measured at something else.
    uint64_t state = 1;
    auto* const words = reinterpret_cast<uint64_t*>(address_);
    for (uint64_t i = 0; i < kProbeBytes / sizeof(uint64_t); ++i) {
      state = state * 6364136223846793005ull + 1442695040888963407ull;
      words[i] = state;
    }
  }
  ProbeMemory(const ProbeMemory&) = delete;
  ProbeMemory& operator=(const ProbeMemory&) = delete;
  ~ProbeMemory() {
    if (address_ != nullptr) ::munmap(address_, kProbeBytes);
  }
  /// nullptr where the system refuses it.
  std::byte* data() const { return address_; }

 private:
  std::byte* address_;
};

double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

EngineChoice threads_because(std::unique_ptr<IoEngine> threads, std::string reason) {
  return {std::move(threads), std::move(reason), 0, 0};
}

/// How fast [0, bytes) of a file comes with all, half and a quarter of the engine's slots, at the best of two
/// or three rounds each; empty where that is not to be known in time. `expected_ns`: of one reading.
std::vector<ReadRate> rates_of_reads(IoEngine& engine, int fd, std::byte* memory, uint64_t bytes,
                                     uint64_t expected_ns) {
  std::vector<ReadRate> measured;
  for (uint32_t reads = engine.depth(); measured.size() < 3 && reads >= kFewestReads; reads /= 2)
    measured.push_back({reads, 0});
  const bool slots_stay_busy = bytes >= 2 * kMoveBytes * engine.depth();
  if (measured.size() < 2 || !slots_stay_busy || 2 * expected_ns * measured.size() > kReadsBudgetNs)
    return {};
  const Clock& clock = system_clock();
  const uint64_t start = clock.steady_ns();
  for (size_t round = 0; round < kRounds; ++round) {
    for (ReadRate& each : measured) {
      const uint64_t before = clock.steady_ns();
      if (before - start > kReadsBudgetNs && round < 2) return {};
      if (move_and_wait(engine, {.fd = fd}, memory, 0, bytes, each.reads) != 0) return {};
      const uint64_t took = std::max<uint64_t>(clock.steady_ns() - before, 1);
      each.rate = std::max(each.rate, static_cast<double>(bytes) / static_cast<double>(took));
    }
    if (clock.steady_ns() - start > kReadsBudgetNs * 2 / 3 && round >= 1) break;
  }
  return measured;
}

}  // namespace

uint32_t fewest_reads(std::span<const ReadRate> measured) {
  constexpr double kNearEnough = 0.95;
  const double fastest = std::ranges::max(measured, {}, &ReadRate::rate).rate;
  uint32_t fewest = std::ranges::max(measured, {}, &ReadRate::reads).reads;
  for (const auto& [reads, rate] : measured) {
    if (rate >= kNearEnough * fastest) fewest = std::min(fewest, reads);
  }
  return fewest;
}

Result<EngineChoice> choose_engine(const std::string& directory, bool direct, uint32_t depth,
                                   bool count_reads) {
  Result<std::unique_ptr<IoEngine>> made = make_thread_engine(depth);
  if (!made) return std::unexpected(made.error());
  std::unique_ptr<IoEngine> threads = std::move(*made);
  Result<std::unique_ptr<IoEngine>> uring = make_uring_engine(depth);
  if (!uring) return threads_because(std::move(threads), uring.error().message);

  const Result<ScratchFile> file = ScratchFile::create(directory, direct);
  if (!file) return threads_because(std::move(threads), "not measured: " + file.error().message);

  const ProbeMemory memory;
  if (memory.data() == nullptr) {
    return threads_because(std::move(threads),
                           fmt::format("not measured: the system refused {} bytes of memory", kProbeBytes));
  }
  const Clock& clock = system_clock();
  const uint64_t start = clock.steady_ns();
  // On a slow disk a smaller file has to do.
  uint64_t bytes = 0;
  while (bytes < kProbeBytes && (bytes == 0 || clock.steady_ns() - start < kWriteBudgetNs)) {
    if (const int error = move_and_wait(*threads, {.fd = file->fd(), .write = true}, memory.data() + bytes,
                                        bytes, kWriteStepBytes);
        error != 0) {
      return threads_because(
          std::move(threads),
          fmt::format("not measured: cannot write a probe file in {}: {}", directory, std::strerror(error)));
    }
    bytes += kWriteStepBytes;
  }

  std::vector<double> rates[2];
  for (size_t round = 0; round < kRounds; ++round) {
    // Each engine is first every other time; what the one leaves in caches would favour the other.
    for (const size_t which : {round % 2, 1 - round % 2}) {
      IoEngine& engine = which == 0 ? *threads : **uring;
      const uint64_t before = clock.steady_ns();
      if (const int error = move_and_wait(engine, {.fd = file->fd()}, memory.data(), 0, bytes); error != 0) {
        return threads_because(std::move(threads),
                               fmt::format("not measured: {} cannot read a probe file in {}: {}",
                                           engine.name(), directory, std::strerror(error)));
      }
      const uint64_t took = std::max<uint64_t>(clock.steady_ns() - before, 1);
      rates[which].push_back(static_cast<double>(bytes) / static_cast<double>(took));
    }
    if (clock.steady_ns() - start > kBudgetNs * 2 / 3) break;
  }
  const double with_threads = median(rates[0]);
  const double with_uring = median(rates[1]);
  std::string reason = fmt::format("threads {:.1f} GB/s, uring {:.1f} GB/s", with_threads, with_uring);
  const bool take_uring = with_uring > 1.1 * with_threads;
  const double rate = take_uring ? with_uring : with_threads;
  EngineChoice choice{take_uring ? std::move(*uring) : std::move(threads), std::move(reason),
                      static_cast<uint64_t>(rate * 1e9), 0};
  if (!count_reads) return choice;
  const auto measured = rates_of_reads(*choice.engine, file->fd(), memory.data(), bytes,
                                       static_cast<uint64_t>(static_cast<double>(bytes) / rate));
  if (measured.empty()) return choice;
  choice.enough_bytes = fewest_reads(measured) * kMoveBytes;
  choice.reason += fmt::format(", {} MiB of reads at once are enough", choice.enough_bytes / kMoveBytes);
  return choice;
}

}  // namespace tokendepot
