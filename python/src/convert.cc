#include "convert.h"

#include <charconv>
#include <cmath>

#include "store/journal_file.h"
#include "unlocked.h"

namespace tokendepot::py {

nb::object to_str(std::string_view text) {
  PyObject* decoded =
      PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "backslashreplace");
  if (decoded == nullptr) throw nb::python_error();
  return nb::steal(decoded);
}

nb::object from_json(std::string_view text) {
  const auto checked = [](PyObject* result) {
    if (result == nullptr) throw nb::python_error();
    return nb::steal(result);
  };
  const nb::object json = checked(run_python([] { return PyImport_ImportModule("json"); }));
  const nb::object loads = json.attr("loads");
  const nb::object argument = to_str(text);
  return checked(run_python([&] { return PyObject_CallOneArg(loads.ptr(), argument.ptr()); }));
}

std::string_view text_or_bytes(nb::handle value, const char* what) {
  if (PyBytes_Check(value.ptr())) return view(nb::borrow<nb::bytes>(value));
  if (PyUnicode_Check(value.ptr())) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(value.ptr(), &size);
    if (text == nullptr) throw nb::python_error();
    return {text, static_cast<size_t>(size)};
  }
  throw nb::type_error(fmt::format("{} must be str or bytes", what).c_str());
}

std::vector<Key> keys_from(const nb::bytes& bytes) {
  if (bytes.size() % sizeof(Key) != 0) {
    refuse("keys has {} bytes; allowed is a multiple of {}", bytes.size(), sizeof(Key));
  }
  std::vector<Key> keys(bytes.size() / sizeof(Key));
  if (!keys.empty()) std::memcpy(keys.data(), bytes.data(), bytes.size());
  return keys;
}

LayoutKind kind_from(std::string_view name) {
  if (name == "canonical") return LayoutKind::canonical;
  if (name == "opaque") return LayoutKind::opaque;
  refuse("kind is \"{}\"; allowed are \"canonical\" and \"opaque\"", name);
}

const char* kind_to(LayoutKind kind) {
  return kind == LayoutKind::canonical ? "canonical" : "opaque";
}

std::string segment_to(const SegmentId& id) {
  const std::string name = segment_name(id);
  return name.substr(0, name.rfind('.'));
}

SegmentId segment_from(std::string_view text) {
  const auto id = segment_of_name(std::string(text) + ".seg");
  if (!id) refuse("segment is \"{}\"; allowed is <16 hex digits>-<8 hex digits>", text);
  return *id;
}

std::chrono::nanoseconds duration_from(double seconds) {
  constexpr double kMost = 1e9;  // about 30 years
  if (!(seconds > 0)) return {};
  return std::chrono::nanoseconds(static_cast<int64_t>(std::min(seconds, kMost) * 1e9));
}

namespace {

template <typename T>
constexpr const char* kRange =
    std::numeric_limits<T>::is_signed ? "whole numbers in [-2**31, 2**31)" : "whole numbers in [0, 2**32)";

template <typename T>
[[noreturn]] void out_of_range(const char* what, size_t index, std::string_view value) {
  refuse("{}[{}] is {}; allowed are {}", what, index, value, kRange<T>);
}

template <typename T, typename V>
void append_strided(std::vector<T>& out, const void* data, size_t count, int64_t stride, const char* what) {
  const V* from = static_cast<const V*>(data);
  for (size_t i = 0; i < count; ++i) {
    const V value = from[static_cast<int64_t>(i) * stride];
    if (!std::in_range<T>(value)) out_of_range<T>(what, i, std::to_string(value));
    out.push_back(static_cast<T>(value));
  }
}

template <typename T>
std::vector<T> from_items(PyObject* const* items, size_t count, const char* what) {
  std::vector<T> out;
  out.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    int overflow = 0;
    const long long value =
        PyLong_AsLongLongAndOverflow(items[i], &overflow);  // takes anything with __index__
    if (value == -1 && overflow == 0 && PyErr_Occurred() != nullptr) throw nb::python_error();
    if (overflow != 0 || !std::in_range<T>(value)) {
      out_of_range<T>(what, i, nb::str(nb::handle(items[i])).c_str());
    }
    out.push_back(static_cast<T>(value));
  }
  return out;
}

}  // namespace

template <typename T>
std::vector<T> integers_from(nb::handle value, const char* what) {
  if (PyList_Check(value.ptr()) || PyTuple_Check(value.ptr())) {
    const auto count = static_cast<size_t>(PySequence_Fast_GET_SIZE(value.ptr()));
    return from_items<T>(PySequence_Fast_ITEMS(value.ptr()), count, what);
  }
  nb::ndarray<nb::ro, nb::ndim<1>, nb::device::cpu> array;
  if (!nb::try_cast(value, array)) {
    throw nb::type_error(
        fmt::format("{} must be a list or tuple of ints or a one-dimensional integer buffer", what).c_str());
  }
  std::vector<T> out;
  out.reserve(array.shape(0));
  const auto type = array.dtype();
  const auto append = [&]<typename V>(V) {
    append_strided<T, V>(out, array.data(), array.shape(0), array.stride(0), what);
  };
  if (type == nb::dtype<int32_t>()) {
    append(int32_t{});
  } else if (type == nb::dtype<uint32_t>()) {
    append(uint32_t{});
  } else if (type == nb::dtype<int64_t>()) {
    append(int64_t{});
  } else if (type == nb::dtype<uint64_t>()) {
    append(uint64_t{});
  } else {
    throw nb::type_error(fmt::format("{} must hold 32- or 64-bit integers", what).c_str());
  }
  return out;
}

template std::vector<uint32_t> integers_from(nb::handle, const char*);
template std::vector<int32_t> integers_from(nb::handle, const char*);

}  // namespace tokendepot::py
