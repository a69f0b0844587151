// Threads of the I/O engines.
#pragma once

#include <cstdint>
#include <expected>
#include <string_view>
#include <thread>

#include "tokendepot/error.h"

namespace tokendepot {

/// Starts body(context) on a thread of that name, at most 15 characters, that takes none of the process's
/// signals, so that the engine's handlers never run on it. Faults of the thread itself stay open: SIGBUS must
/// reach the guard of a mapping. Not joinable when the system refuses another thread.
std::thread start_io_thread(void (*body)(void*), void* context, const char* name);

/// Runs `body` on such a thread and waits for it. False: the system refused the thread, and nothing was done.
template <typename Body>
bool run_on_io_thread(Body& body, const char* name) {
  std::thread thread = start_io_thread([](void* errand) { (*static_cast<Body*>(errand))(); }, &body, name);
  if (!thread.joinable()) return false;
  thread.join();
  return true;
}

/// Of them, those of this process that have not ended.
uint32_t io_threads_running();

/// What to return then: `busy`, with the limits that there are. `whose` as in "the CUDA device's threads".
std::unexpected<Error> thread_refused(std::string_view whose);

}  // namespace tokendepot
