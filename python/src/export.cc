#include "tokendepot/export.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>

#include "convert.h"
#include "extents.h"
#include "unlocked.h"

namespace tokendepot::py {
namespace {

std::unique_ptr<Exporter> begin_export(int fd, const std::string& manifest, uint64_t extents,
                                       uint64_t bytes) {
  const Unlocked unlocked;
  return unwrap(Exporter::begin(fd, manifest, extents, bytes));
}

nb::list add(Exporter& exporter, const std::string& root, nb::sequence extents) {
  const auto wanted = extents_from(extents);
  std::vector<std::string> results;
  {
    const Unlocked unlocked;
    for (const StoredExtent& extent : wanted) {
      const Status added = unwrap(exporter.add(root, extent));
      results.push_back(added ? "ok"
                              : fmt::format("{}: {}", name(added.error().kind), added.error().message));
    }
  }
  nb::list out;
  for (const std::string& result : results) out.append(to_str(result));
  return out;
}

void finish(Exporter& exporter) {
  const Unlocked unlocked;
  unwrap(exporter.finish());
}

std::unique_ptr<Importer> begin_import(int fd, const std::string& path, uint64_t capacity, bool create,
                                       uint64_t free_space_reserve) {
  const Unlocked unlocked;
  RootOptions target;
  target.path = path;
  target.capacity_bytes = capacity;
  target.io = IoChoice::threads;  // which engine is faster is measured with writes, and does not matter here
  return unwrap(Importer::begin(fd, target, create, free_space_reserve));
}

bool go_on(Importer& importer, uint64_t bytes) {
  const Unlocked unlocked;
  return unwrap(importer.go_on(bytes));
}

nb::dict report_of(const Importer& importer) {
  const ImportReport& r = importer.report();
  nb::dict out;
  out["namespace"] = to_hex(r.ns.bytes);
  out["manifest"] = r.manifest;
  out["planned_extents"] = r.planned_extents;
  out["planned_bytes"] = r.planned_bytes;
  out["file_bytes"] = r.file_bytes;
  out["imported"] = r.imported;
  out["imported_bytes"] = r.imported_bytes;
  out["present"] = r.present;
  out["damaged"] = r.damaged;
  out["junk_bytes"] = r.junk_bytes;
  out["full"] = r.full;
  out["whole"] = r.whole;
  out["reason"] = to_str(r.reason);
  return out;
}

}  // namespace

void bind_export(nb::module_& module) {
  nb::class_<Exporter>(module, "Exporter", "Writes an export file. See include/tokendepot/export.h.")
      .def_static("begin", &begin_export, nb::arg("fd"), nb::arg("manifest"), nb::arg("extents"),
                  nb::arg("bytes"))
      .def("add", &add, nb::arg("root"), nb::arg("extents"))
      .def("finish", &finish)
      .def_prop_ro("file_bytes", &Exporter::file_bytes);
  nb::class_<Importer>(module, "Importer",
                       "Reads an export file into a root. See include/tokendepot/export.h.")
      .def_static("begin", &begin_import, nb::arg("fd"), nb::arg("path"), nb::arg("capacity"),
                  nb::arg("create"), nb::arg("free_space_reserve"))
      .def("go_on", &go_on, nb::arg("bytes"))
      .def("report", &report_of);
}

}  // namespace tokendepot::py
