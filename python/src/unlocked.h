// Leaving the interpreter and coming back to it.
#pragma once

#include <cxxabi.h>
#include <nanobind/nanobind.h>
#include <unistd.h>

namespace tokendepot::py {

/// What a thread does that comes back to an interpreter that ends or has ended (a daemon thread), as from
/// Python 3.14 on. Before, Python unwinds such a thread (pthread_exit), which ends the whole process with
/// abort() at the first noexcept function on its stack and in a catch (...) that does not rethrow: nanobind
/// has both.
[[noreturn]] inline void stop_for_ever() {
  for (;;) ::pause();
}

/// Holds no GIL while it lives; the thread must hold it before, and holds it again after.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;
  ~Unlocked() {
    // Ended while this thread was away: its memory may be gone. The thread that ends it goes on.
    if (was_alive_ && Py_IsInitialized() == 0) stop_for_ever();
    try {
      PyEval_RestoreThread(state_);
    } catch (const abi::__forced_unwind&) {
      stop_for_ever();
    }
  }

 private:
  const bool was_alive_ = Py_IsInitialized() != 0;
  PyThreadState* state_;
};

/// Calls `body`: one call of Python's C API in which Python code may run, and so other threads; it must own
/// nothing.
template <typename Body>
auto run_python(Body body) {
  try {
    return body();
  } catch (const abi::__forced_unwind&) {
    stop_for_ever();
  }
}

}  // namespace tokendepot::py
