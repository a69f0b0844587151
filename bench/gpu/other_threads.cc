#include "gpu/other_threads.h"

#include <cstdint>

#include "rig.h"

namespace tokendepot::bench {
namespace {

constexpr int kLaunches = 400;  // about those of 32 layers, one by one
constexpr int kMappings = 20;
constexpr int kRounds = 500'000;

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
