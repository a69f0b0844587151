// Files that only live while they are being used, for probes, and names for files that are about to be
// renamed.
#pragma once

#include <string>

#include "tokendepot/error.h"

namespace tokendepot {

/// "<directory>/.tmp-<16 random hex digits>".
std::string temporary_path(const std::string& directory);

/// An open regular file without a name: nothing is left in the directory, also after kill -9 (where O_TMPFILE
/// is not supported, a name exists for an instant).
class ScratchFile {
 public:
  static Result<ScratchFile> create(const std::string& directory, bool direct);
  ScratchFile(ScratchFile&& other) noexcept;
  ScratchFile& operator=(ScratchFile&&) = delete;
  ~ScratchFile();

  int fd() const { return fd_; }

 private:
  explicit ScratchFile(int fd) : fd_(fd) {}
  int fd_;
};

}  // namespace tokendepot
