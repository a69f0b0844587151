#include "extents.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>

namespace tokendepot::py {
namespace {

uint64_t prefix_from_hex(const std::string& hex) {
  if (hex.size() != 16 || hex.find_first_not_of("0123456789abcdef") != std::string::npos) {
    refuse("namespace is \"{}\"; allowed are 16 hex digits", hex);
  }
  return __builtin_bswap64(std::stoull(hex, nullptr, 16));
}

template <typename T>
T field(nb::handle dict, const char* name) {
  return typed<T>(nb::object(dict[name]), "extents as list_extents() gives them");
}

}  // namespace

double seconds_of(uint64_t ns) {
  return static_cast<double>(ns) * 1e-9;
}

std::string prefix_to_hex(uint64_t prefix) {
  return fmt::format("{:016x}", __builtin_bswap64(prefix));
}

nb::dict extent_to(const StoredExtent& e) {
  nb::dict item;
  item["key"] = digest_to_bytes(e.key);
  item["namespace"] = prefix_to_hex(e.ns_prefix);
  item["group"] = e.group;
  item["kind"] = kind_to(e.kind);
  item["part"] = part_to(e.part);
  item["tokens"] = e.tokens;
  item["segment"] = segment_to(e.where.segment);
  item["offset"] = e.where.offset;
  item["bytes"] = e.where.bytes;
  item["stored_at"] = seconds_of(e.stored_at_ns);
  return item;
}

std::vector<StoredExtent> extents_from(nb::sequence extents) {
  std::vector<StoredExtent> out;
  for (nb::handle item : extents) {
    StoredExtent& e = out.emplace_back();
    e.key = digest_from<Key>(field<nb::bytes>(item, "key"), "key");
    e.ns_prefix = prefix_from_hex(field<std::string>(item, "namespace"));
    e.group = field<uint16_t>(item, "group");
    e.kind = kind_from(field<std::string>(item, "kind"));
    e.part = part_from(field<PartTuple>(item, "part"));
    e.tokens = field<uint32_t>(item, "tokens");
    e.where.segment = segment_from(field<std::string>(item, "segment"));
    e.where.offset = field<uint64_t>(item, "offset");
    e.where.bytes = field<uint64_t>(item, "bytes");
  }
  return out;
}

}  // namespace tokendepot::py
