#include "store/root_policies.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "base/log.h"
#include "format/policies.h"
#include "io/file.h"

namespace tokendepot {

struct RootPolicies::Lives {
  std::map<uint64_t, uint64_t> by_namespace;  // ns
  std::optional<uint64_t> of_root;

  /// The shortest of those that hold for any of the tenants: what lies in one file expires together.
  std::optional<uint64_t> of(const SegmentContents::Segment& held) const {
    std::optional<uint64_t> shortest;
    for (const auto& tenant : held.tenants) {
      const auto own = by_namespace.find(tenant.ns_prefix);
      const auto life = own != by_namespace.end() ? std::optional(own->second) : of_root;
      if (life && (!shortest || *life < *shortest)) shortest = life;
    }
    return shortest;
  }
};

RootPolicies::RootPolicies(const std::string& root_path, RootIndex root, uint64_t capacity,
                           SegmentTable& segments, SegmentContents& contents)
    : path_(root_path + "/policies"),
      root_(root),
      capacity_(capacity),
      segments_(segments),
      contents_(contents) {}

void RootPolicies::tell(const std::string& complaint) {
  if (complaint == complaint_) return;
  complaint_ = complaint;
  if (!complaint.empty()) log(LogLevel::warning, "{}: none of its policies hold: {}", path_, complaint);
}

bool RootPolicies::read() {
  auto bytes = read_file(path_, kMaxPolicyBytes);
  std::lock_guard lock(mutex_);
  Policies fresh;
  if (bytes) {
    if (*bytes == file_) return false;
    file_ = std::move(*bytes);
    auto decoded = decode_policies(file_);
    if (decoded) {
      fresh = std::move(*decoded);
      tell("");
    } else {
      damaged_ += decoded.error().kind == ErrorKind::corrupt ? 1 : 0;
      tell(decoded.error().message);
    }
  } else if (bytes.error().kind == ErrorKind::not_found) {
    if (file_.empty()) return false;
    file_.clear();
    tell("");
  } else {  // it cannot be read now: what was known still holds
    tell(bytes.error().message);
    return false;
  }
  const auto keys_of = [](const Policies& policies) {
    std::set<Key> keys;
    for (const Policy& rule : policies.rules) keys.insert(rule.keys.begin(), rule.keys.end());
    return keys;
  };
  std::set<Key> keys = keys_of(fresh);
  const bool other_keys = keys != keys_of(policies_);
  policies_ = std::move(fresh);
  if (other_keys) contents_.watch(std::move(keys));
  has_rules_ = !policies_.rules.empty() || !aged_.empty() || pinned_bytes_ > 0;
  return other_keys;
}

bool RootPolicies::all_over(const SegmentContents::Segment& held, const std::map<uint64_t, uint64_t>& over) {
  bool any = false;
  for (const auto& tenant : held.tenants) {
    if (tenant.bytes == 0) continue;
    if (!over.contains(tenant.ns_prefix)) return false;
    any = true;
  }
  return any;
}

void RootPolicies::judge(uint64_t wall_now_ns) {
  if (!has_rules_) return;
  std::lock_guard lock(mutex_);
  Lives lives;
  std::map<uint64_t, uint64_t> quotas;
  std::set<uint64_t> pinned_namespaces;
  bool pins_keys = false;
  for (const Policy& rule : policies_.rules) {
    const uint64_t ns = prefix_of(rule.ns);
    if (rule.kind == Policy::Kind::ttl && rule.ns == NamespaceDigest{}) lives.of_root = rule.value;
    if (rule.kind == Policy::Kind::ttl && rule.ns != NamespaceDigest{}) lives.by_namespace[ns] = rule.value;
    if (rule.kind == Policy::Kind::quota) quotas[ns] = rule.value;
    if (rule.kind != Policy::Kind::pin || (rule.value != 0 && rule.value <= wall_now_ns)) continue;
    if (rule.keys.empty()) pinned_namespaces.insert(ns);
    pins_keys |= !rule.keys.empty();
  }

  Verdict fresh;
  fresh.contents = contents_.snapshot();
  std::map<uint64_t, uint64_t> usage;
  std::map<SegmentId, std::pair<uint32_t, uint64_t>> pinned;  // by id: the same for every process
  std::set<uint32_t> aged;
  for (const auto& [slot, held] : fresh.contents) {
    for (const auto& tenant : held.tenants) usage[tenant.ns_prefix] += tenant.bytes;
    uint64_t expired_end = 0;
    const auto life = lives.of(held);
    for (const auto& group : held.ages) {
      if (!life || wall_now_ns < *life || group.newest_ns > wall_now_ns - *life) break;
      expired_end = group.end;
    }
    if (expired_end > 0) aged.insert(slot);
    segments_.set_expired(slot, root_, expired_end);
    const bool whole = expired_end > 0 && expired_end == held.ages.back().end;
    if (whole) fresh.expired.insert(slot);
    const bool wanted =
        (pins_keys && held.pinned_extents > 0) || std::ranges::any_of(held.tenants, [&](const auto& tenant) {
          return tenant.bytes > 0 && pinned_namespaces.contains(tenant.ns_prefix);
        });
    if (!wanted || whole) continue;
    const SegmentTable::Segment segment = segments_.get(slot);
    const SegmentTable::PerRoot& here = segment.roots[root_];
    if (here.present && !here.condemned) pinned[segment.id] = {slot, here.file_bytes};
  }
  for (const uint32_t slot : aged_) {
    if (!aged.contains(slot) && !fresh.contents.contains(slot)) segments_.set_expired(slot, root_, 0);
  }
  aged_ = std::move(aged);
  uint64_t held_bytes = 0;
  bool over_share = false;
  for (const auto& [id, place] : pinned) {
    if (place.second > capacity_ / kPinShare - held_bytes) {
      over_share = true;
      continue;
    }
    held_bytes += place.second;
    fresh.pinned.insert(place.first);
  }
  if (over_share && !over_share_told_) {
    log(LogLevel::warning, "{}: pins hold {} bytes, which is their share of the capacity; more is not held",
        path_, held_bytes);
  }
  over_share_told_ = over_share;
  pinned_bytes_ = held_bytes;
  for (const auto& [ns, quota] : quotas) {
    if (usage[ns] > quota) fresh.over[ns] = usage[ns] - quota;
  }
  has_rules_ = !policies_.rules.empty();
  verdict_ = has_rules_ ? std::move(fresh) : Verdict{};
}

RootPolicies::Verdict RootPolicies::verdict() const {
  std::lock_guard lock(mutex_);
  return verdict_;
}

RootPolicies::Candidates RootPolicies::victims(Candidates coldest_first, uint64_t wall_now_ns,
                                               bool* withheld) {
  *withheld = false;
  if (!has_rules_) return coldest_first;
  judge(wall_now_ns);
  std::lock_guard lock(mutex_);
  *withheld = std::erase_if(coldest_first, [this](const auto& candidate) {
                return verdict_.pinned.contains(candidate.first);
              }) > 0;
  Candidates first;
  Candidates rest;
  for (const auto& candidate : coldest_first) {
    const auto held = verdict_.contents.find(candidate.first);
    const bool goes = verdict_.expired.contains(candidate.first) ||
                      (held != verdict_.contents.end() && all_over(held->second, verdict_.over));
    (goes ? first : rest).push_back(candidate);
  }
  first.insert(first.end(), rest.begin(), rest.end());
  return first;
}

bool RootPolicies::is_over_quota(uint32_t slot) const {
  std::lock_guard lock(mutex_);
  const auto held = verdict_.contents.find(slot);
  return held != verdict_.contents.end() && all_over(held->second, verdict_.over);
}

}  // namespace tokendepot
