// A stand-in for the CUDA runtime, in host memory: streams are threads, kernels their plain twins. What it is
// asked can be made to fail. For tests of what the device does when the driver refuses.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

namespace tokendepot::testing::fake_cuda {

/// The `nth` call of this name from now on (1: the next one), and `more` behind it, return `status`. One
/// order a name. Thread-safe.
void fail(const std::string& call, uint64_t nth, cudaError_t status = cudaErrorUnknown, uint64_t more = 0);
/// Ends all orders; returns how many calls there were of what they name.
uint64_t stop_failing();
/// How often the calling thread made a device current, which makes a context there.
uint64_t devices_set();
/// Until let_copies_go(), what streams are told to copy stays where it is, and what is behind it waits.
void hold_copies();
void let_copies_go();
/// For each call that can fail, first.
cudaError_t called(const char* name);

}  // namespace tokendepot::testing::fake_cuda
