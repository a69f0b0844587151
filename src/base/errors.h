// Short ways to make an Error.
#pragma once

#include <fmt/format.h>

#include <cerrno>
#include <cstring>
#include <expected>
#include <utility>

#include "tokendepot/error.h"

namespace tokendepot {

template <typename... Args>
std::unexpected<Error> fail(ErrorKind kind, fmt::format_string<Args...> text, Args&&... args) {
  return std::unexpected(Error{kind, 0, fmt::format(text, std::forward<Args>(args)...)});
}

/// The kind that suits an errno: ENOSPC and EDQUOT no_space; EACCES, EPERM and EROFS permission; ENOENT
/// not_found; EINVAL, ENOSYS, EOPNOTSUPP unsupported; anything else io.
ErrorKind kind_of_errno(int error_number);

/// "<what>: <strerror>", with the kind taken from the errno.
template <typename... Args>
std::unexpected<Error> fail_errno(int error_number, fmt::format_string<Args...> what, Args&&... args) {
  return std::unexpected(Error{
      kind_of_errno(error_number), error_number,
      fmt::format("{}: {}", fmt::format(what, std::forward<Args>(args)...), std::strerror(error_number))});
}

}  // namespace tokendepot
