// Between Python values and the engine's types. Everything here needs the GIL.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <chrono>
#include <cstdint>
#include <exception>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <typeinfo>
#include <utility>
#include <vector>

#include "base/errors.h"
#include "tokendepot/depot.h"
#include "tokendepot/error.h"
#include "tokendepot/key.h"
#include "tokendepot/layout.h"

namespace tokendepot::py {

namespace nb = nanobind;

/// Carries an Error to the interpreter, where it becomes DepotError.
class DepotException : public std::exception {
 public:
  explicit DepotException(Error error) : error_(std::move(error)) {}
  const char* what() const noexcept override { return error_.message.c_str(); }
  const Error& error() const { return error_; }

 private:
  Error error_;
};

inline void unwrap(Status status) {
  if (!status) throw DepotException(std::move(status.error()));
}

template <typename T>
T unwrap(Result<T> result) {
  if (!result) throw DepotException(std::move(result.error()));
  return std::move(*result);
}

template <typename... Args>
[[noreturn]] void refuse(fmt::format_string<Args...> text, Args&&... args) {
  throw DepotException(fail(ErrorKind::invalid_argument, text, std::forward<Args>(args)...).error());
}

inline std::string_view view(const nb::bytes& bytes) {
  return {static_cast<const char*>(bytes.data()), bytes.size()};
}

inline std::span<const std::byte> as_span(const nb::bytes& bytes) {
  return {static_cast<const std::byte*>(bytes.data()), bytes.size()};
}

inline nb::bytes to_bytes(std::span<const std::byte> bytes) {
  return nb::bytes(bytes.data(), bytes.size());
}

/// Text that may hold any bytes (file names of others, messages that quote them) as a str.
nb::object to_str(std::string_view text);

/// What json.loads makes of the engine's own JSON.
nb::object from_json(std::string_view text);

/// str (as UTF-8) or bytes. The object must outlive the view.
std::string_view text_or_bytes(nb::handle value, const char* what);

template <typename Digest>
Digest digest_from(const nb::bytes& bytes, const char* what) {
  Digest digest;
  if (bytes.size() != digest.bytes.size())
    refuse("{} has {} bytes; allowed are {}", what, bytes.size(), digest.bytes.size());
  std::memcpy(digest.bytes.data(), bytes.data(), digest.bytes.size());
  return digest;
}

template <typename Digest>
nb::bytes digest_to_bytes(const Digest& digest) {
  return nb::bytes(digest.bytes.data(), digest.bytes.size());
}

std::vector<Key> keys_from(const nb::bytes& bytes);

/// A value of the type asked for, or a TypeError that names what it should have been.
template <typename T>
T typed(nb::handle value, const char* what) {
  try {
    return nb::cast<T>(value);
  } catch (const std::bad_cast&) {
    throw nb::type_error(fmt::format("expected {}", what).c_str());
  }
}

using PartTuple = std::tuple<uint16_t, uint16_t, uint16_t, uint16_t>;
inline Part part_from(const PartTuple& p) {
  return {std::get<0>(p), std::get<1>(p), std::get<2>(p), std::get<3>(p)};
}
inline PartTuple part_to(const Part& p) {
  return {p.layer_begin, p.layer_end, p.head_begin, p.head_end};
}

LayoutKind kind_from(std::string_view name);
const char* kind_to(LayoutKind kind);

/// "0123456789abcdef-00000001": how a segment is written everywhere people see it.
std::string segment_to(const SegmentId& id);
SegmentId segment_from(std::string_view text);

/// Seconds as a duration: negative and NaN are 0, what is too long to count is cut to decades.
std::chrono::nanoseconds duration_from(double seconds);

/// A list or tuple of ints, or a one-dimensional CPU buffer of 32- or 64-bit integers, each within T.
template <typename T>
std::vector<T> integers_from(nb::handle value, const char* what);

extern template std::vector<uint32_t> integers_from(nb::handle, const char*);
extern template std::vector<int32_t> integers_from(nb::handle, const char*);

/// What each source file adds to the module.
void bind_key_chain(nb::module_& module);
void bind_depot(nb::module_& module);
void bind_export(nb::module_& module);
void bind_repair(nb::module_& module);
void bind_tools(nb::module_& module);
void bind_tending(nb::module_& module);
void bind_workload(nb::module_& module);
void bind_lmcache(nb::module_& module);

}  // namespace tokendepot::py
