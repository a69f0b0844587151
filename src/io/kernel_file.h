// What the kernel tells in text: files of /proc and /sys.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace tokendepot {

/// All of such a file, whose size the kernel does not tell; "" where it is not there or cannot be read, and
/// no more than 16 MiB of it. Thread-safe.
///
/// Not by iostreams, which src/ does without: their facets are numbered process-wide, and in a Python process
/// that has two C++ libraries (one of a module that carries its own) `stream >> number` finds another facet's
/// functions and ends the process.
std::string kernel_text(const std::string& path);

/// The number that all of `text` is, less one newline at its end.
std::optional<int64_t> number_in(std::string_view text);

/// Cuts `text` at the first `separator`: what is before it, and what is behind it ("" where there is none).
std::pair<std::string_view, std::string_view> cut_at(std::string_view text, char separator);

}  // namespace tokendepot
