// What a thread of the engine's asks of a device that is not its current one.
#pragma once

#include <cuda_runtime_api.h>

#include <optional>
#include <type_traits>
#include <utility>

#include "device/cuda/status.h"
#include "io/io_thread.h"

namespace tokendepot::cuda {

inline bool is_current(int ordinal) {
  int current = -1;
  return cudaGetDevice(&current) == cudaSuccess && current == ordinal;
}

/// What `body` returns, a Status or a Result, where `ordinal` is the current device: on this thread if it is
/// there, else on one of its own. Switching this one and switching back would make a context on the device it
/// came from, half a gigabyte of somebody else's GPU: cudaSetDevice() does, since CUDA 12. `busy` when the
/// system refuses the thread.
template <typename Body>
std::invoke_result_t<Body&> on_device(int ordinal, Body body) {
  if (is_current(ordinal)) return body();
  using Answer = std::invoke_result_t<Body&>;
  std::optional<Answer> answer;
  auto errand = [&] {
    const Status entered = enter_device(ordinal);
    answer.emplace(entered ? body() : Answer(std::unexpected(entered.error())));
  };
  if (!run_on_io_thread(errand, "td-other")) return thread_refused("a call for another GPU");
  return std::move(*answer);
}

}  // namespace tokendepot::cuda
