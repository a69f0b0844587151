// A write beyond RLIMIT_FSIZE raises SIGXFSZ, which ends the process by default. Here it must be just EFBIG.
#pragma once

#include <signal.h>

namespace tokendepot {

/// Holds SIGXFSZ back on this thread while it lives, and swallows the one that a call inside it has raised.
/// One that was pending before stays pending. Errno is kept.
class FileSizeSignalGuard {
 public:
  FileSizeSignalGuard();
  FileSizeSignalGuard(const FileSizeSignalGuard&) = delete;
  FileSizeSignalGuard& operator=(const FileSizeSignalGuard&) = delete;
  ~FileSizeSignalGuard();

 private:
  sigset_t before_;
  bool was_pending_;
};

}  // namespace tokendepot
