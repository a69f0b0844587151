#include "gpu/other_threads.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>

#include "rig.h"

namespace tokendepot::bench {
namespace {

constexpr int kLaunches = 400;  // about those of 32 layers, one by one
constexpr int kMappings = 20;
constexpr int kRounds = 500'000;

void map_and_give_back() {
  constexpr uint64_t kBytes = 1 << 20;
  void* const memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) stop("no memory for a mapping of 1 MiB");
  std::memset(memory, 1, 4096);
  munmap(memory, kBytes);
}

/// Each round waits for the one before, so that only the clock and what shares the core can change its time.
void calculate() {
  volatile uint64_t seed = 1;
  uint64_t value = seed;
  for (int i = 0; i < kRounds; ++i) value = value * 6364136223846793005u + 1442695040888963407u;
  seed = value;
}

}  // namespace

std::vector<OtherWork> other_work(Matmul& matmul) {
  return {
      {"launch", kLaunches,
       [&matmul](const std::function<void()>& queued) {
         matmul.enqueue(kLaunches);
         queued();
         matmul.wait();
       }},
      {"mapping", kMappings,
       [](const std::function<void()>& queued) {
         for (int i = 0; i < kMappings; ++i) map_and_give_back();
         queued();
       }},
      {"calculation", kRounds / 1000.0,
       [](const std::function<void()>& queued) {
         calculate();
         queued();
       }},
  };
}

}  // namespace tokendepot::bench
