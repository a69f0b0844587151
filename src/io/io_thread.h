// Threads of the I/O engines.
#pragma once

#include <thread>

namespace tokendepot {

/// Starts body(context) on a thread named td-io that takes none of the process's signals, so that the
/// engine's handlers never run on it. Faults of the thread itself stay open: SIGBUS must reach the guard of a
/// mapping. Not joinable when the system refuses another thread.
std::thread start_io_thread(void (*body)(void*), void* context);

}  // namespace tokendepot
