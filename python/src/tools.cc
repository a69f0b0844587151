#include "tokendepot/tools.h"

#include "tokendepot/watch.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <mutex>
#include <optional>

#include "convert.h"
#include "extents.h"
#include "io/memory_limit.h"
#include "unlocked.h"

namespace tokendepot::py {
namespace {

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
    const Unlocked unlocked;
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
    const Unlocked unlocked;
    return unwrap(list_extents(path));
  }();
  nb::list out;
  for (const StoredExtent& e : extents) out.append(extent_to(e));
  return out;
}

nb::list verify(const std::string& path, nb::sequence extents) {
  const auto wanted = extents_from(extents);
  std::vector<std::string> results;
  {
    const Unlocked unlocked;
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
  const Unlocked unlocked;
  return unwrap(remove_extents(path, wanted, corrupt ? Cause::corrupt : Cause::manual));
}

nb::dict evict(const std::string& path, uint64_t bytes, bool dry_run) {
  const Evicted evicted = [&] {
    const Unlocked unlocked;
    return unwrap(evict_segments(path, bytes, dry_run));
  }();
  nb::dict out;
  out["segments"] = evicted.segments;
  out["bytes"] = evicted.bytes;
  return out;
}

/// Calls of several threads take turns.
class Watch {
 public:
  explicit Watch(std::unique_ptr<RootWatch> watch) : watch_(std::move(watch)) {}

  nb::list poll(size_t most) {
    return changes_to([this, most] { return unwrap(watch_->poll(most)); });
  }
  nb::list stored() {
    return changes_to([this] { return watch_->stored(); });
  }
  std::string root_id() const { return watch_->root_id_hex(); }
  bool in_memory() const { return watch_->in_memory(); }

 private:
  template <typename Call>
  nb::list changes_to(Call call) {
    const std::vector<ChunkChange> changes = [&] {
      const Unlocked unlocked;
      const std::lock_guard lock(mutex_);
      return call();
    }();
    nb::list out;
    for (const ChunkChange& c : changes)
      out.append(
          nb::make_tuple(c.stored, digest_to_bytes(c.key), prefix_to_hex(c.ns_prefix), c.group, c.tokens));
    return out;
  }

  std::mutex mutex_;
  const std::unique_ptr<RootWatch> watch_;
};

Watch* watch_root(const std::string& path) {
  const Unlocked unlocked;
  return new Watch(unwrap(RootWatch::open(path)));  // the module owns it
}

std::optional<MemoryLimit> unlocked_memory_limit() {
  nb::gil_scoped_release unlocked;
  return memory_limit();
}

nb::object limit_of_memory() {
  const auto limit = unlocked_memory_limit();
  if (!limit) return nb::none();
  return nb::make_tuple(limit->bytes, limit->file);
}

std::optional<uint64_t> unused_memory() {
  const auto limit = unlocked_memory_limit();
  return limit ? std::optional(limit->unused_bytes) : std::nullopt;
}

}  // namespace

void bind_tools(nb::module_& module) {
  nb::class_<Watch>(module, "RootWatch")
      .def("poll", &Watch::poll, nb::arg("most"))
      .def("stored", &Watch::stored)
      .def_prop_ro("root_id", &Watch::root_id)
      .def_prop_ro("in_memory", &Watch::in_memory);
  module.def("watch_root", &watch_root, nb::arg("path"), nb::rv_policy::take_ownership);
  module.def("memory_limit", &limit_of_memory);
  module.def("unused_memory", &unused_memory);
  module.def("inspect_root", &inspect, nb::arg("path"));
  module.def("list_extents", &list, nb::arg("path"));
  module.def("verify_extents", &verify, nb::arg("path"), nb::arg("extents"));
  module.def("remove_extents", &remove, nb::arg("path"), nb::arg("extents"), nb::arg("corrupt") = false);
  module.def("evict_segments", &evict, nb::arg("path"), nb::arg("bytes"), nb::arg("dry_run") = false);
}

}  // namespace tokendepot::py
