#include "io/io_thread.h"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <cerrno>
#include <system_error>

#include "base/errors.h"

namespace tokendepot {
namespace {

std::atomic<uint32_t> running = 0;

}  // namespace

std::thread start_io_thread(void (*body)(void*), void* context, const char* name) {
  sigset_t blocked;
  sigfillset(&blocked);
  for (const int fault : {SIGBUS, SIGSEGV, SIGILL, SIGFPE, SIGTRAP, SIGABRT, SIGSYS})
    sigdelset(&blocked, fault);
  sigset_t before;
  pthread_sigmask(SIG_SETMASK, &blocked, &before);
  std::thread thread;
  ++running;
  try {
    thread = std::thread([body, context] {
      body(context);
      --running;
    });
    pthread_setname_np(thread.native_handle(), name);
  } catch (const std::system_error&) {
    --running;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return thread;
}

uint32_t io_threads_running() {
  return running;
}

std::unexpected<Error> thread_refused(std::string_view whose) {
  auto refused = fail(ErrorKind::busy,
                      "the system refused {}; check the limits of processes (ulimit -u, pids.max of the "
                      "control group) and of address space (ulimit -v)",
                      whose);
  refused.error().os_errno = EAGAIN;
  return refused;
}

}  // namespace tokendepot
