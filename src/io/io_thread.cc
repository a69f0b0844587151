#include "io/io_thread.h"

#include <pthread.h>
#include <signal.h>

#include <system_error>

namespace tokendepot {

std::thread start_io_thread(void (*body)(void*), void* context) {
  sigset_t blocked;
  sigfillset(&blocked);
  for (const int fault : {SIGBUS, SIGSEGV, SIGILL, SIGFPE, SIGTRAP, SIGABRT, SIGSYS})
    sigdelset(&blocked, fault);
  sigset_t before;
  pthread_sigmask(SIG_SETMASK, &blocked, &before);
  std::thread thread;
  try {
    thread = std::thread(body, context);
    pthread_setname_np(thread.native_handle(), "td-io");
  } catch (const std::system_error&) {
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return thread;
}

}  // namespace tokendepot
