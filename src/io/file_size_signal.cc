#include "io/file_size_signal.h"

#include <pthread.h>
#include <time.h>

#include <cerrno>

namespace tokendepot {

FileSizeSignalGuard::FileSizeSignalGuard() {
  sigset_t only;
  sigemptyset(&only);
  sigaddset(&only, SIGXFSZ);
  pthread_sigmask(SIG_BLOCK, &only, &before_);
  // Pending can only be what was blocked before: the common caller has it open and pays no further call.
  was_pending_ = false;
  if (sigismember(&before_, SIGXFSZ) == 1) {
    sigset_t pending;
    sigpending(&pending);
    was_pending_ = sigismember(&pending, SIGXFSZ) == 1;
  }
}

FileSizeSignalGuard::~FileSizeSignalGuard() {
  const int kept = errno;
  if (!was_pending_) {
    sigset_t only;
    sigemptyset(&only);
    sigaddset(&only, SIGXFSZ);
    const timespec now{};
    while (sigtimedwait(&only, nullptr, &now) == -1 && errno == EINTR) {
    }
  }
  pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  errno = kept;
}

}  // namespace tokendepot
