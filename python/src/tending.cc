#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "convert.h"
#include "tokendepot/tools.h"
#include "unlocked.h"

namespace tokendepot::py {
namespace {

constexpr std::array<std::pair<const char*, Policy::Kind>, 3> kKinds{
    {{"ttl", Policy::Kind::ttl}, {"quota", Policy::Kind::quota}, {"pin", Policy::Kind::pin}}};

Policy::Kind policy_kind_from(const std::string& text) {
  for (const auto& [known, kind] : kKinds) {
    if (known == text) return kind;
  }
  refuse("kind is \"{}\"; allowed are ttl, quota and pin", text);
}

const char* policy_kind_to(Policy::Kind kind) {
  return kKinds[static_cast<size_t>(kind) - 1].first;
}

double seconds_of(uint64_t ns) {
  return static_cast<double>(ns) * 1e-9;
}

nb::dict describe(const Policy& rule, uint64_t bytes) {
  nb::dict out;
  out["kind"] = policy_kind_to(rule.kind);
  out["namespace"] = rule.ns == NamespaceDigest{} ? "" : to_hex(rule.ns.bytes);
  // Nanoseconds for times, so that what is read back is what was set.
  out["value"] = rule.value;
  out["made"] = seconds_of(rule.made_ns);
  out["chunks"] = rule.keys.size();
  out["bytes"] = bytes;
  return out;
}

nb::dict inspect(const std::string& path) {
  const PolicyInfo info = [&] {
    const Unlocked unlocked;
    return unwrap(inspect_policies(path));
  }();
  nb::list rules;
  for (size_t i = 0; i < info.policies.rules.size(); ++i)
    rules.append(describe(info.policies.rules[i], info.bytes[i]));
  nb::dict out;
  out["rules"] = rules;
  out["damage"] = to_str(info.damage);
  out["capacity"] = info.notes.capacity_bytes;
  out["pinned_bytes"] = info.pinned_bytes;
  out["pin_limit"] = info.notes.capacity_bytes / kPinShare;
  out["scrub_began"] = seconds_of(info.notes.scrub_began_ns);
  out["scrub_bytes"] = info.notes.scrub_bytes;
  out["scrub_bad"] = info.notes.scrub_bad;
  out["scrub_finished"] = seconds_of(info.notes.finished_ns);
  out["scrub_finished_bytes"] = info.notes.finished_bytes;
  out["scrub_finished_bad"] = info.notes.finished_bad;
  return out;
}

NamespaceDigest namespace_from(const nb::bytes& bytes) {
  return bytes.size() == 0 ? NamespaceDigest{} : digest_from<NamespaceDigest>(bytes, "namespace");
}

void set(const std::string& path, const std::string& kind, const nb::bytes& ns, uint64_t value,
         const nb::bytes& keys, uint64_t capacity, bool dry_run) {
  const Policy policy{policy_kind_from(kind), namespace_from(ns), value, 0, keys_from(keys)};
  const Unlocked unlocked;
  unwrap(set_policy(path, policy, capacity, dry_run));
}

uint64_t drop(const std::string& path, const std::string& kind, const nb::bytes& ns,
              const std::optional<nb::bytes>& keys, bool dry_run) {
  const auto of = policy_kind_from(kind);
  const auto digest = namespace_from(ns);
  std::optional<std::vector<Key>> wanted;
  if (keys) wanted = keys_from(*keys);
  const Unlocked unlocked;
  return unwrap(drop_policies(path, of, digest, wanted, dry_run));
}

}  // namespace

void bind_tending(nb::module_& module) {
  module.def("inspect_policies", &inspect, nb::arg("path"));
  module.def("set_policy", &set, nb::arg("path"), nb::arg("kind"), nb::arg("namespace"), nb::arg("value"),
             nb::arg("keys") = nb::bytes("", 0), nb::arg("capacity") = 0, nb::arg("dry_run") = false);
  module.def("drop_policies", &drop, nb::arg("path"), nb::arg("kind"), nb::arg("namespace"),
             nb::arg("keys") = nb::none(), nb::arg("dry_run") = false);
}

}  // namespace tokendepot::py
