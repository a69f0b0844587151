#include "tokendepot/workload.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "convert.h"
#include "unlocked.h"

namespace tokendepot::py {
namespace {

WorkloadKind workload_kind_from(std::string_view name) {
  if (name == "read") return WorkloadKind::read;
  if (name == "write") return WorkloadKind::write;
  if (name == "mixed") return WorkloadKind::mixed;
  if (name == "burst") return WorkloadKind::burst;
  refuse("kind is \"{}\"; allowed are \"read\", \"write\", \"mixed\" and \"burst\"", name);
}

/// Whether a signal's handler raised: its exception stays pending until raise_pending().
bool signalled() {
  const nb::gil_scoped_acquire locked;
  return PyErr_CheckSignals() != 0;
}

void raise_pending() {
  if (PyErr_Occurred() != nullptr) throw nb::python_error();
}

nb::dict by_path(const PathBytes& bytes) {
  nb::dict out;
  out["mapped"] = bytes.mapped;
  out["direct"] = bytes.direct;
  out["buffered"] = bytes.buffered;
  out["gds_p2p"] = bytes.gds_p2p;
  out["gds_compat"] = bytes.gds_compat;
  return out;
}

nb::dict describe(const WorkloadRun& run) {
  nb::dict out;
  out["seconds"] = run.seconds;
  out["cpu_seconds"] = run.cpu_seconds;
  out["client_seconds"] = run.client_seconds;
  out["extents"] = run.extents;
  out["bytes"] = run.bytes;
  out["dropped"] = run.dropped;
  out["failed"] = run.failed;
  out["failure"] = run.failure;
  out["loaded"] = by_path(run.loaded);
  out["stored"] = by_path(run.stored);
  out["device_read_bytes"] = run.device_read_bytes;
  nb::list classes;
  for (const WorkloadClass& counted : run.classes) {
    nb::dict one;
    one["write"] = counted.write;
    one["extent_bytes"] = counted.extent_bytes;
    one["count"] = counted.count;
    nb::list latency;
    for (const auto& [nanoseconds, count] : counted.latency.buckets())
      latency.append(nb::make_tuple(nanoseconds, count));
    one["latency"] = latency;
    classes.append(one);
  }
  out["classes"] = classes;
  nb::list bursts;
  for (const auto& [first, last] : run.bursts) bursts.append(nb::make_tuple(first, last));
  out["bursts"] = bursts;
  return out;
}

std::unique_ptr<Workload> open_workload(const std::string& config_json, const std::string& kind,
                                        const std::vector<uint64_t>& extent_bytes, uint64_t volume_bytes,
                                        uint32_t in_flight, uint32_t request_extents, uint32_t process,
                                        bool keep_cache) {
  const Unlocked unlocked;
  WorkloadSpec spec;
  spec.options = unwrap(parse_options(config_json));
  spec.kind = workload_kind_from(kind);
  spec.extent_bytes = extent_bytes;
  spec.volume_bytes = volume_bytes;
  spec.in_flight = in_flight;
  spec.request_extents = request_extents;
  spec.process = process;
  spec.keep_cache = keep_cache;
  return unwrap(Workload::open(spec));
}

void fill(Workload& self) {
  {
    const Unlocked unlocked;
    unwrap(self.fill(signalled));
  }
  raise_pending();
}

nb::dict run(Workload& self, double seconds) {
  const WorkloadRun done = [&] {
    const Unlocked unlocked;
    return unwrap(self.run(seconds, signalled));
  }();
  raise_pending();
  return describe(done);
}

nb::list limits(Workload& self, double seconds) {
  const auto measured = [&] {
    const Unlocked unlocked;
    return unwrap(self.limits(seconds));
  }();
  nb::list out;
  for (const WorkloadLimit& limit : measured) {
    nb::dict one;
    one["what"] = limit.what;
    one["gb_per_s"] = limit.gb_per_s;
    out.append(one);
  }
  return out;
}

nb::dict verify(Workload& self, uint32_t every) {
  const WorkloadCheck check = [&] {
    const Unlocked unlocked;
    return unwrap(self.verify(every, signalled));
  }();
  raise_pending();
  nb::dict out;
  out["extents"] = check.extents;
  out["bytes"] = check.bytes;
  out["wrong"] = check.wrong;
  out["first_wrong"] = check.first_wrong;
  return out;
}

nb::dict about(const Workload& self) {
  const RootStats root = self.stats().roots[0];
  nb::dict out;
  out["transport"] = root.transport;
  out["reason"] = root.reason;
  out["file_system"] = self.file_system();
  out["in_memory"] = self.in_memory();
  out["payload_gb_per_s"] = self.payload_gb_per_s();
  return out;
}

}  // namespace

void bind_workload(nb::module_& module) {
  nb::class_<Workload>(module, "Workload")
      .def_static("open", &open_workload, nb::arg("config_json"), nb::kw_only(), nb::arg("kind"),
                  nb::arg("extent_bytes"), nb::arg("volume_bytes"), nb::arg("in_flight"),
                  nb::arg("request_extents") = 1, nb::arg("process") = 0, nb::arg("keep_cache") = false)
      .def("fill", &fill)
      .def("run", &run, nb::arg("seconds"))
      .def("limits", &limits, nb::arg("seconds"))
      .def("verify", &verify, nb::arg("every") = 1)
      .def("about", &about);
}

}  // namespace tokendepot::py
