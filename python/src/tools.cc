#include "tokendepot/tools.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>

#include "convert.h"

namespace tokendepot::py {
namespace {

double seconds_of(uint64_t ns) {
  return static_cast<double>(ns) * 1e-9;
}

std::string prefix_to_hex(uint64_t prefix) {  // the number is the first 8 digest bytes, the lowest first
  return fmt::format("{:016x}", __builtin_bswap64(prefix));
}

uint64_t prefix_from_hex(const std::string& hex) {
  if (hex.size() != 16 || hex.find_first_not_of("0123456789abcdef") != std::string::npos) {
    refuse("namespace is \"{}\"; allowed are 16 hex digits", hex);
  }
  return __builtin_bswap64(std::stoull(hex, nullptr, 16));
}

nb::dict describe(const NamespaceInfo& n) {
  nb::dict out;
  out["digest"] = n.digest_hex;
  out["manifest"] = n.manifest;
  out["damaged"] = n.damaged;
  out["extents"] = n.extents;
  out["bytes"] = n.bytes;
  return out;
}

nb::dict describe(const SegmentInfo& s) {
  nb::dict out;
  out["segment"] = segment_to(s.id);
  out["file"] = s.file;
  out["file_bytes"] = s.file_bytes;
  out["live_bytes"] = s.live_bytes;
  out["extents"] = s.extents;
  out["sealed"] = s.sealed;
  out["last_used"] = seconds_of(s.last_used_ns);
  return out;
}

nb::dict describe(const JournalInfo& j) {
  nb::dict out;
  out["writer"] = fmt::format("{:016x}", j.writer);
  out["file"] = j.file;
  out["records"] = j.records;
  out["bad_records"] = j.bad_records;
  out["damaged"] = j.damaged;
  out["in_use"] = j.in_use;
  return out;
}

template <typename T>
nb::list describe_all(const std::vector<T>& list) {
  nb::list out;
  for (const T& item : list) out.append(describe(item));
  return out;
}

nb::dict inspect(const std::string& path) {
  const RootInfo info = [&] {
    nb::gil_scoped_release unlocked;
    return unwrap(inspect_root(path));
  }();
  uint64_t extents = 0;
  uint64_t live_bytes = 0;
  uint64_t file_bytes = 0;
  for (const SegmentInfo& segment : info.segments) {
    extents += segment.extents;
    live_bytes += segment.live_bytes;
    file_bytes += segment.file_bytes;
  }
  nb::dict out;
  out["path"] = info.path;
  out["root_id"] = info.root_id_hex;
  out["format_version"] = info.format_version;
  out["created"] = seconds_of(info.created_ns);
  out["file_system"] = info.file_system;
  out["available_bytes"] = info.available_bytes;
  out["transport"] = info.transport;
  out["namespaces"] = describe_all(info.namespaces);
  out["segments"] = describe_all(info.segments);
  out["journals"] = describe_all(info.journals);
  nb::list foreign;
  for (const std::string& file : info.foreign_files) foreign.append(to_str(file));
  out["foreign_files"] = foreign;
  out["extents"] = extents;
  out["live_bytes"] = live_bytes;
  out["file_bytes"] = file_bytes;
  return out;
}

nb::list list(const std::string& path) {
  const auto extents = [&] {
    nb::gil_scoped_release unlocked;
    return unwrap(list_extents(path));
  }();
  nb::list out;
  for (const StoredExtent& e : extents) {
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
    out.append(item);
  }
  return out;
}

template <typename T>
T field(nb::handle dict, const char* name) {
  return typed<T>(nb::object(dict[name]), "extents as list_extents() gives them");
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

nb::list verify(const std::string& path, nb::sequence extents) {
  const auto wanted = extents_from(extents);
  std::vector<std::string> results;
  {
    nb::gil_scoped_release unlocked;
    for (const StoredExtent& extent : wanted) {
      const auto status = verify_extent(path, extent);
      results.push_back(status ? "ok"
                               : fmt::format("{}: {}", name(status.error().kind), status.error().message));
    }
  }
  nb::list out;
  for (const std::string& result : results) out.append(to_str(result));
  return out;
}

uint64_t remove(const std::string& path, nb::sequence extents, bool corrupt) {
  const auto wanted = extents_from(extents);
  nb::gil_scoped_release unlocked;
  return unwrap(remove_extents(path, wanted, corrupt ? Cause::corrupt : Cause::manual));
}

nb::dict evict(const std::string& path, uint64_t bytes, bool dry_run) {
  const Evicted evicted = [&] {
    nb::gil_scoped_release unlocked;
    return unwrap(evict_segments(path, bytes, dry_run));
  }();
  nb::dict out;
  out["segments"] = evicted.segments;
  out["bytes"] = evicted.bytes;
  return out;
}

}  // namespace

void bind_tools(nb::module_& module) {
  module.def("inspect_root", &inspect, nb::arg("path"));
  module.def("list_extents", &list, nb::arg("path"));
  module.def("verify_extents", &verify, nb::arg("path"), nb::arg("extents"));
  module.def("remove_extents", &remove, nb::arg("path"), nb::arg("extents"), nb::arg("corrupt") = false);
  module.def("evict_segments", &evict, nb::arg("path"), nb::arg("bytes"), nb::arg("dry_run") = false);
}

}  // namespace tokendepot::py
