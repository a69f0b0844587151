// The rules of a root from outside: read, judged against what is stored, changed under a lock of their own.
#include <algorithm>
#include <chrono>
#include <map>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "base/errors.h"
#include "format/journal.h"
#include "format/keeper_notes.h"
#include "format/policies.h"
#include "io/file.h"
#include "root_files.h"
#include "store/journal_file.h"
#include "tokendepot/tools.h"

namespace tokendepot {
namespace {

/// Nothing there = no rules. Errors name the file.
Result<Policies> read_policies(const std::string& root) {
  const std::string path = root + "/policies";
  const auto bytes = read_file(path, kMaxPolicyBytes);
  if (!bytes) {
    if (bytes.error().kind == ErrorKind::not_found) return Policies{};
    return std::unexpected(bytes.error());
  }
  auto policies = decode_policies(*bytes);
  if (!policies) {
    return fail(policies.error().kind, "{}: {}; engines do without; remove the file to start over", path,
                policies.error().message);
  }
  return policies;
}

/// Held while the file is read, changed and replaced. Engines only read it.
Result<File> lock_policies(const std::string& root) {
  constexpr auto kPatience = std::chrono::seconds(2);
  constexpr auto kPause = std::chrono::milliseconds(5);
  auto file = File::open(root + "/policies.lock", {.write = true, .create = true});
  if (!file) return file;
  for (auto waited = std::chrono::milliseconds(0);; waited += kPause) {
    const auto locked = file->try_lock_exclusive();
    if (!locked) return std::unexpected(locked.error());
    if (*locked) return file;
    if (waited >= kPatience)
      return fail(ErrorKind::busy, "{} is held by another command for {} s", file->path(), kPatience.count());
    std::this_thread::sleep_for(kPause);
  }
}

bool in_force(const Policy& rule, uint64_t now) {
  return rule.kind != Policy::Kind::pin || rule.value == 0 || rule.value > now;
}

struct Judged {
  std::vector<uint64_t> bytes;
  std::set<SegmentId> pinned_segments;
  uint64_t pinned_bytes = 0;
};

Result<Judged> judge(const std::string& root, const Policies& policies, uint64_t now) {
  Judged judged;
  judged.bytes.resize(policies.rules.size());
  if (policies.rules.empty()) return judged;
  const auto extents = list_extents(root);
  if (!extents) return std::unexpected(extents.error());
  std::map<Key, std::vector<size_t>> by_key;
  std::map<uint64_t, std::vector<size_t>> by_namespace;
  std::vector<size_t> of_all;
  for (size_t i = 0; i < policies.rules.size(); ++i) {
    const Policy& rule = policies.rules[i];
    for (const Key& key : rule.keys) by_key[key].push_back(i);
    if (rule.ns == NamespaceDigest{}) {
      of_all.push_back(i);
    } else if (rule.keys.empty()) {
      by_namespace[prefix_of(rule.ns)].push_back(i);
    }
  }
  for (const StoredExtent& extent : *extents) {
    const auto count = [&](const std::vector<size_t>& rules) {
      for (const size_t i : rules) {
        judged.bytes[i] += extent.where.bytes;
        const Policy& rule = policies.rules[i];
        if (rule.kind == Policy::Kind::pin && in_force(rule, now))
          judged.pinned_segments.insert(extent.where.segment);
      }
    };
    count(of_all);
    if (const auto found = by_namespace.find(extent.ns_prefix); found != by_namespace.end())
      count(found->second);
    if (const auto found = by_key.find(extent.key); found != by_key.end()) count(found->second);
  }
  if (judged.pinned_segments.empty()) return judged;
  const auto files = list_directory(root + "/segments");
  if (!files) return std::unexpected(files.error());
  for (const DirectoryEntry& file : *files) {
    const auto id = segment_of_name(file.name);
    if (id && judged.pinned_segments.contains(*id)) judged.pinned_bytes += file.bytes;
  }
  return judged;
}

KeeperNotes read_notes(const std::string& root) {
  const auto bytes = read_file(root + "/keeper-notes", kKeeperNotesBytes);
  const auto notes = bytes ? decode_keeper_notes(*bytes) : Result<KeeperNotes>(KeeperNotes{});
  return notes ? *notes : KeeperNotes{};
}

bool same_place(const Policy& a, const Policy& b) {
  return a.kind == b.kind && a.ns == b.ns && a.keys == b.keys;
}

/// The rules, and the lock that is held while they are changed; a dry run takes none.
struct Opened {
  std::optional<File> lock;
  Policies policies;
};

/// `not_found` where there is no root.
Result<Opened> open_policies(const std::string& root, bool dry_run) {
  if (const auto marker = read_marker(root); !marker) return std::unexpected(marker.error());
  Opened opened;
  if (!dry_run) {
    auto locked = lock_policies(root);
    if (!locked) return std::unexpected(locked.error());
    opened.lock = std::move(*locked);
  }
  auto policies = read_policies(root);
  if (!policies) return std::unexpected(policies.error());
  opened.policies = std::move(*policies);
  return opened;
}

Status write_policies(const std::string& root, Policies policies, uint64_t now) {
  std::erase_if(policies.rules, [now](const Policy& rule) { return !in_force(rule, now); });
  ++policies.revision;
  return write_file_atomically(root + "/policies", encode_policies(policies));
}

}  // namespace

Result<PolicyInfo> inspect_policies(const std::string& path) {
  PolicyInfo info;
  auto policies = read_policies(path);
  if (policies) {
    info.policies = std::move(*policies);
  } else if (policies.error().kind == ErrorKind::corrupt || policies.error().kind == ErrorKind::unsupported) {
    info.damage = policies.error().message;
  } else {
    return std::unexpected(policies.error());
  }
  auto judged = judge(path, info.policies, system_clock().wall_ns());
  if (!judged) return std::unexpected(judged.error());
  info.bytes = std::move(judged->bytes);
  info.pinned_bytes = judged->pinned_bytes;
  info.pinned_segments = std::move(judged->pinned_segments);
  info.notes = read_notes(path);
  return info;
}

Status set_policy(const std::string& path, Policy policy, uint64_t capacity_bytes, bool dry_run) {
  auto opened = open_policies(path, dry_run);
  if (!opened) return std::unexpected(opened.error());
  Policies& policies = opened->policies;
  const uint64_t now = system_clock().wall_ns();
  policy.made_ns = now;
  std::erase_if(policies.rules, [&](const Policy& rule) { return same_place(rule, policy); });
  policies.rules.push_back(policy);
  if (auto right = check_policies(policies); !right) return right;
  if (policy.kind == Policy::Kind::pin) {
    const uint64_t capacity = capacity_bytes != 0 ? capacity_bytes : read_notes(path).capacity_bytes;
    if (capacity == 0) {
      return fail(
          ErrorKind::invalid_argument,
          "the capacity of {} is not known, because no engine has noted it yet; give it with --capacity",
          path);
    }
    const auto judged = judge(path, policies, now);
    if (!judged) return std::unexpected(judged.error());
    if (judged->pinned_bytes > capacity / kPinShare) {
      return fail(
          ErrorKind::invalid_argument,
          "pins would hold {} bytes of segments in {}; allowed are {}, which is 1/{} of its capacity of "
          "{}",
          judged->pinned_bytes, path, capacity / kPinShare, kPinShare, capacity);
    }
  }
  if (dry_run) return {};
  return write_policies(path, std::move(policies), now);
}

Result<uint64_t> drop_policies(const std::string& path, Policy::Kind kind, const NamespaceDigest& ns,
                               const std::optional<std::vector<Key>>& keys, bool dry_run) {
  auto opened = open_policies(path, dry_run);
  if (!opened) return std::unexpected(opened.error());
  Policies& policies = opened->policies;
  const uint64_t dropped = std::erase_if(policies.rules, [&](const Policy& rule) {
    return rule.kind == kind && rule.ns == ns && (!keys || rule.keys == *keys);
  });
  if (dropped == 0 || dry_run) return dropped;
  if (auto written = write_policies(path, std::move(policies), system_clock().wall_ns()); !written)
    return std::unexpected(written.error());
  return dropped;
}

}  // namespace tokendepot
