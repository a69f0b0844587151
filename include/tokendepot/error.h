// Errors of the engine: one type throughout, never an exception.
//
// An expected outcome (miss, pending) is an enum of the call that has it; an operating error is an `Error` in
// a `Result`; a bug is an assertion (src/base/check.h).
#pragma once

#include <cstdint>
#include <expected>
#include <string>

namespace tokendepot {

enum class ErrorKind : uint8_t {
  invalid_argument,  // the caller's value is wrong; the message names it, its value and what is allowed
  not_found,         // file, root, namespace or extent is not there
  corrupt,           // bytes on the medium are not what their digest or identity says
  io,                // the kernel failed an operation; os_errno says how
  no_space,          // file system or capacity full
  permission,        // not allowed to open, read or write
  unsupported,       // this host, file system or format version cannot do it
  busy,              // a bound (queue, slab, lock) is reached; try later or drop
  timed_out,         // a deadline passed
  closed,            // the handle is shut down, or used after fork()
};

/// Stable lower-case name of a kind ("invalid_argument", "corrupt", ...), used in metrics, JSON and messages.
const char* name(ErrorKind kind);

struct Error {
  ErrorKind kind;
  int os_errno = 0;     // 0 when no system call was involved
  std::string message;  // one sentence that names the thing, the value and what was expected
};

template <typename T>
using Result = std::expected<T, Error>;
using Status = Result<void>;

}  // namespace tokendepot
