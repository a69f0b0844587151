#include <nlohmann/json.hpp>

#include "tokendepot/stats.h"

namespace tokendepot {
namespace {

using Json = nlohmann::json;

Json json_of(const FailureCounts& f) {
  return {{"absent", f.absent},     {"mismatch", f.mismatch},   {"corrupt", f.corrupt},
          {"io_error", f.io_error}, {"timed_out", f.timed_out}, {"cancelled", f.cancelled},
          {"dropped", f.dropped},   {"pinned", f.pinned}};
}

template <typename Amount>
Json json_of(const ByPath<Amount>& p) {
  return {{"mapped", p.mapped},
          {"direct", p.direct},
          {"buffered", p.buffered},
          {"gds_p2p", p.gds_p2p},
          {"gds_compat", p.gds_compat}};
}

Json json_of(const LatencyCounts& l) {
  return {{"counts", l.counts}, {"nanoseconds", l.nanoseconds}};
}

Json json_of(const DropCounts& d) {
  return {{"no_root", d.no_root},
          {"queue_full", d.queue_full},
          {"no_space", d.no_space},
          {"late", d.late},
          {"next_root", d.next_root}};
}

Json json_of(const RootTraffic& t) {
  return {{"bytes", t.bytes}, {"tokens", t.tokens}};
}

Json json_of(const TransferStats& t) {
  return {{"extents", t.extents},
          {"bytes", t.bytes},
          {"nanoseconds", t.nanoseconds},
          {"by_path", json_of(t.by_path)},
          {"tokens_by_path", json_of(t.tokens_by_path)},
          {"failures", json_of(t.failures)},
          {"latency", json_of(t.latency)},
          {"queue", json_of(t.queue)}};
}

Json json_of(const EvictedBytes& e) {
  return {{"capacity", e.capacity},
          {"quota", e.quota},
          {"ttl", e.ttl},
          {"manual", e.manual},
          {"corrupt", e.corrupt}};
}

Json json_of(const RootStats& r) {
  return {{"path", r.path},
          {"id", r.id},
          {"transport", r.transport},
          {"reason", r.reason},
          {"read_bytes_per_second", r.read_bytes_per_second},
          {"capacity_bytes", r.capacity_bytes},
          {"used_bytes", r.used_bytes},
          {"leaving_bytes", r.leaving_bytes},
          {"segments", r.segments},
          {"evicted_segments", r.evicted_segments},
          {"demoted_segments", r.demoted_segments},
          {"demotion_lag_bytes", r.demotion_lag_bytes},
          {"demotion_lag_ns", r.demotion_lag_ns},
          {"promoted_extents", r.promoted_extents},
          {"promoted_bytes", r.promoted_bytes},
          {"rewritten_extents", r.rewritten_extents},
          {"rewritten_bytes", r.rewritten_bytes},
          {"evicted_bytes", json_of(r.evicted_bytes)},
          {"written_bytes", r.written_bytes},
          {"loaded", json_of(r.loaded)},
          {"stored", json_of(r.stored)},
          {"timed_out_loads", r.timed_out_loads},
          {"journal_lag", json_of(r.journal_lag)},
          {"pinned_bytes", r.pinned_bytes},
          {"damaged_policies", r.damaged_policies},
          {"scrubbed_bytes", r.scrubbed_bytes},
          {"scrub_errors", r.scrub_errors},
          {"scrub_pass_bytes", r.scrub_pass_bytes},
          {"scrub_finished_ns", r.scrub_finished_ns},
          {"gds_errors", r.gds_errors},
          {"mended_manifests", r.mended_manifests},
          {"writable", r.writable},
          {"suspended", r.suspended}};
}

Json json_of(const DeviceUse& d) {
  return {{"name", d.name},
          {"slab_bytes", d.slab_bytes},
          {"pinned_bytes", d.pinned_bytes},
          {"mapped_bytes", d.mapped_bytes},
          {"registered_bytes", d.registered_bytes},
          {"threads", d.threads}};
}

}  // namespace

std::string to_json(const DepotStats& s) {
  Json roots = Json::array();
  for (const RootStats& root : s.roots) roots.push_back(json_of(root));
  const Json stats{{"load", json_of(s.load)},
                   {"store", json_of(s.store)},
                   {"drops", json_of(s.drops)},
                   {"latency_bounds_ns", LatencyCounts::kBoundsNs},
                   {"entries", s.entries},
                   {"catalog_bytes", s.catalog_bytes},
                   {"lookups", s.lookups},
                   {"open_nanoseconds", s.open_nanoseconds},
                   {"journal_records", s.journal_records},
                   {"bad_records", s.bad_records},
                   {"device", json_of(s.device)},
                   {"roots", roots}};
  return stats.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace tokendepot
