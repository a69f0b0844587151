#include "tokendepot/repair.h"

#include <nanobind/stl/function.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "convert.h"
#include "extents.h"
#include "tokendepot/history.h"
#include "unlocked.h"

namespace tokendepot::py {
namespace {

const char* marker_to(RepairReport::Marker marker) {
  switch (marker) {
    case RepairReport::Marker::sound:
      return "sound";
    case RepairReport::Marker::missing:
      return "missing";
    case RepairReport::Marker::damaged:
      return "damaged";
  }
  return "damaged";
}

const char* fate_to(PastExtent::Fate fate) {
  switch (fate) {
    case PastExtent::Fate::live:
      return "live";
    case PastExtent::Fate::condemned:
      return "condemned";
    case PastExtent::Fate::evicted:
      return "evicted";
    case PastExtent::Fate::vanished:
      return "vanished";
  }
  return "vanished";
}

nb::dict repair(const std::string& path, const std::vector<std::string>& sources, bool apply,
                const nb::callable& progress) {
  const RepairReport report = [&] {
    const Unlocked unlocked;
    return unwrap(repair_root(path, sources, apply, [&](uint64_t done, uint64_t total) {
      nb::gil_scoped_acquire locked;
      progress(done, total);
    }));
  }();
  nb::dict out;
  out["marker"] = marker_to(report.marker);
  nb::list journals;
  for (const auto& j : report.journals) {
    nb::dict item;
    item["file"] = j.file;
    item["good_records"] = j.good_records;
    item["bad_records"] = j.bad_records;
    journals.append(item);
  }
  out["journals"] = journals;
  nb::list segments;
  for (const auto& s : report.segments) {
    nb::dict item;
    item["file"] = s.file;
    item["extents"] = s.extents;
    item["bytes"] = s.bytes;
    segments.append(item);
  }
  out["segments"] = segments;
  out["manifests"] = report.manifests;
  out["lost_manifests"] = report.lost_manifests;
  out["damaged_extents"] = report.damaged_extents;
  nb::list left;
  for (const auto& l : report.left) {
    nb::dict item;
    item["file"] = to_str(l.file);
    item["why"] = l.why;
    left.append(item);
  }
  out["left"] = left;
  out["nothing_to_do"] = report.nothing_to_do();
  return out;
}

nb::list trace(const std::string& path, const nb::bytes& keys) {
  const auto wanted = keys_from(keys);
  const auto past = [&] {
    const Unlocked unlocked;
    return unwrap(trace_extents(path, wanted));
  }();
  nb::list out;
  for (const PastExtent& p : past) {
    nb::dict item = extent_to(p.extent);
    item["fate"] = fate_to(p.fate);
    item["ended_at"] = seconds_of(p.ended_ns);
    out.append(item);
  }
  return out;
}

}  // namespace

void bind_repair(nb::module_& module) {
  module.def("repair_root", &repair, nb::arg("path"), nb::arg("sources"), nb::arg("apply"),
             nb::arg("progress"));
  module.def("trace_extents", &trace, nb::arg("path"), nb::arg("keys"));
}

}  // namespace tokendepot::py
