// The module tokendepot._core: python/tokendepot/_core.pyi is its contract.
#include <nanobind/stl/string.h>

#include <cstdio>

#include "base/log.h"
#include "convert.h"
#include "format/extent.h"
#include "unlocked.h"

namespace tokendepot::py {
namespace {

PyObject* depot_error = nullptr;  // lives as long as the interpreter

void translate(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const DepotException& exception) {
    const Error& error = exception.error();
    try {
      nb::object raised = nb::borrow(depot_error)(to_str(error.message));
      raised.attr("kind") = name(error.kind);
      raised.attr("errno") = error.os_errno;
      PyErr_SetObject(depot_error, raised.ptr());
    } catch (nb::python_error& failed) {
      failed.restore();
    }
  }
}

nb::object options_as_dict(const std::string& config_json) {
  const std::string json = [&] {
    const Unlocked unlocked;
    return to_json(unwrap(parse_options(config_json)));
  }();
  return from_json(json);
}

/// For programs whose output is not a log: lines below warnings are dropped.
void log_warnings_only() {
  set_log_sink([](LogLevel level, std::string_view text) {
    if (level < LogLevel::warning) return;
    std::string line = fmt::format("tokendepot: {}\n", text);
    for (char& c : std::span(line).first(line.size() - 1)) {
      if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = ' ';
    }
    std::fwrite(line.data(), 1, line.size(), stderr);
  });
}

}  // namespace
}  // namespace tokendepot::py

NB_MODULE(_core, module) {
  namespace nb = nanobind;
  using namespace tokendepot;
  using namespace tokendepot::py;

  nb::set_leak_warnings(false);  // an engine that dies leaves handles behind; that is its right
  module.doc() = "Native module: the engine behind tokendepot.";

  nb::dict defaults;
  defaults["kind"] = "";
  defaults["errno"] = 0;
  depot_error = PyErr_NewExceptionWithDoc("tokendepot._core.DepotError", "An operation of the depot failed.",
                                          nullptr, defaults.ptr());
  if (depot_error == nullptr) throw nb::python_error();
  module.attr("DepotError") = nb::borrow(depot_error);
  nb::register_exception_translator(&translate);

  module.attr("KEY_BYTES") = sizeof(Key);
  module.attr("SKIP_BLOCK") = kSkipBlock;
  module.attr("FORMAT_VERSION") = kFormatVersion;
  module.def("version", [] { return TOKENDEPOT_VERSION; });
  module.def("parse_options", &options_as_dict, nb::arg("config_json"));
  module.def("parse_size", [](const std::string& text) { return unwrap(parse_size(text)); }, nb::arg("text"));

  module.def("log_warnings_only", &log_warnings_only);

  bind_key_chain(module);
  bind_depot(module);
  bind_tools(module);
  bind_export(module);
  bind_repair(module);
  bind_tending(module);
  bind_workload(module);
  bind_lmcache(module);
}
