#include "format/policies.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <string_view>
#include <utility>

#include "base/bytes.h"
#include "base/errors.h"
#include "format/digest.h"

namespace tokendepot {
namespace {

constexpr std::string_view kMagic = "TDPOLICY";
constexpr uint32_t kVersion = 1;
constexpr size_t kVersionAt = 8;
constexpr size_t kRulesAt = 12;
constexpr size_t kRevisionAt = 16;
constexpr size_t kReservedAt = 24;
constexpr size_t kHeaderBytes = 32;
constexpr size_t kDigestBytes = 8;

constexpr size_t kKindAt = 0;
constexpr size_t kRuleReserved1At = 1;
constexpr size_t kKeysAt = 4;
constexpr size_t kValueAt = 8;
constexpr size_t kMadeAt = 16;
constexpr size_t kNamespaceAt = 24;
constexpr size_t kRuleReserved2At = 56;
constexpr size_t kRuleBytes = 64;
constexpr size_t kKeyBytes = sizeof(Key::bytes);

bool all_zero(std::span<const std::byte> bytes) {
  return std::ranges::all_of(bytes, [](std::byte b) { return b == std::byte{0}; });
}

Status check_rule(const Policy& rule, size_t number) {
  if (rule.kind < Policy::Kind::ttl || rule.kind > Policy::Kind::pin) {
    return fail(ErrorKind::invalid_argument, "policy {} has kind {}, known are 1 to 3", number,
                static_cast<unsigned>(rule.kind));
  }
  if (rule.kind != Policy::Kind::ttl && rule.ns == NamespaceDigest{}) {
    return fail(ErrorKind::invalid_argument, "policy {} names no namespace; only a time to live may do that",
                number);
  }
  if (rule.kind != Policy::Kind::pin && (rule.value == 0 || !rule.keys.empty())) {
    return fail(ErrorKind::invalid_argument,
                "policy {} has the value {} and {} keys; expected more than 0, and no keys", number,
                rule.value, rule.keys.size());
  }
  return {};
}

}  // namespace

Status check_policies(const Policies& policies) {
  if (policies.rules.size() > kMaxPolicies) {
    return fail(ErrorKind::invalid_argument, "a root has {} policies; allowed are {}", policies.rules.size(),
                kMaxPolicies);
  }
  size_t keys = 0;
  std::set<std::pair<Policy::Kind, NamespaceDigest>> seen;
  for (size_t i = 0; i < policies.rules.size(); ++i) {
    const Policy& rule = policies.rules[i];
    if (auto right = check_rule(rule, i); !right) return right;
    if (rule.kind != Policy::Kind::pin && !seen.emplace(rule.kind, rule.ns).second)
      return fail(ErrorKind::invalid_argument, "policy {} comes twice", i);
    keys += rule.keys.size();
  }
  if (keys > kMaxPinnedKeys) {
    return fail(ErrorKind::invalid_argument,
                "the pins of a root name {} chunks; allowed are {}: pin whole namespaces instead", keys,
                kMaxPinnedKeys);
  }
  return {};
}

std::vector<std::byte> encode_policies(const Policies& policies) {
  size_t size = kHeaderBytes + kDigestBytes;
  for (const Policy& rule : policies.rules) size += kRuleBytes + rule.keys.size() * kKeyBytes;
  std::vector<std::byte> bytes(size);
  const std::span out(bytes);
  std::memcpy(out.data(), kMagic.data(), kMagic.size());
  put_le<uint32_t>(out, kVersionAt, kVersion);
  put_le<uint32_t>(out, kRulesAt, static_cast<uint32_t>(policies.rules.size()));
  put_le<uint64_t>(out, kRevisionAt, policies.revision);
  size_t at = kHeaderBytes;
  for (const Policy& rule : policies.rules) {
    put_le<uint8_t>(out, at + kKindAt, static_cast<uint8_t>(rule.kind));
    put_le<uint32_t>(out, at + kKeysAt, static_cast<uint32_t>(rule.keys.size()));
    put_le<uint64_t>(out, at + kValueAt, rule.value);
    put_le<uint64_t>(out, at + kMadeAt, rule.made_ns);
    std::memcpy(out.data() + at + kNamespaceAt, rule.ns.bytes.data(), rule.ns.bytes.size());
    at += kRuleBytes;
    for (const Key& key : rule.keys) {
      std::memcpy(out.data() + at, key.bytes.data(), kKeyBytes);
      at += kKeyBytes;
    }
  }
  put_le<uint64_t>(out, at, xxh3(out.first(at)));
  return bytes;
}

Result<Policies> decode_policies(std::span<const std::byte> bytes) {
  if (bytes.size() < kRulesAt || std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) != 0) {
    return fail(ErrorKind::corrupt, "policies of {} bytes do not start with their magic", bytes.size());
  }
  if (const uint32_t version = get_le<uint32_t>(bytes, kVersionAt); version != kVersion) {
    return fail(ErrorKind::unsupported, "policies have version {}, this program reads version {}", version,
                kVersion);
  }
  if (bytes.size() < kHeaderBytes + kDigestBytes || bytes.size() > kMaxPolicyBytes) {
    return fail(ErrorKind::corrupt, "policies have {} bytes, expected {} to {}", bytes.size(),
                kHeaderBytes + kDigestBytes, kMaxPolicyBytes);
  }
  const size_t end = bytes.size() - kDigestBytes;
  const uint64_t stored = get_le<uint64_t>(bytes, end);
  const uint64_t digest = xxh3(bytes.first(end));
  if (stored != digest) {
    return fail(ErrorKind::corrupt, "policies have digest {:016x}, their bytes give {:016x}", stored, digest);
  }
  const uint32_t rules = get_le<uint32_t>(bytes, kRulesAt);
  Policies policies;
  policies.revision = get_le<uint64_t>(bytes, kRevisionAt);
  if (policies.revision == 0 || !all_zero(bytes.subspan(kReservedAt, kHeaderBytes - kReservedAt)))
    return fail(ErrorKind::corrupt, "policies have revision 0 or reserved bytes that are not zero");
  size_t at = kHeaderBytes;
  for (uint32_t i = 0; i < rules; ++i) {
    if (end - at < kRuleBytes) return fail(ErrorKind::corrupt, "policies end within rule {} of {}", i, rules);
    const uint32_t keys = get_le<uint32_t>(bytes, at + kKeysAt);
    if (keys > (end - at - kRuleBytes) / kKeyBytes)
      return fail(ErrorKind::corrupt, "policy {} has {} keys, which is more than there are bytes for", i,
                  keys);
    if (!all_zero(bytes.subspan(at + kRuleReserved1At, kKeysAt - kRuleReserved1At)) ||
        !all_zero(bytes.subspan(at + kRuleReserved2At, kRuleBytes - kRuleReserved2At)))
      return fail(ErrorKind::corrupt, "policy {} has reserved bytes that are not zero", i);
    Policy& rule = policies.rules.emplace_back();
    rule.kind = static_cast<Policy::Kind>(get_le<uint8_t>(bytes, at + kKindAt));
    rule.value = get_le<uint64_t>(bytes, at + kValueAt);
    rule.made_ns = get_le<uint64_t>(bytes, at + kMadeAt);
    std::memcpy(rule.ns.bytes.data(), bytes.data() + at + kNamespaceAt, rule.ns.bytes.size());
    at += kRuleBytes;
    rule.keys.resize(keys);
    for (Key& key : rule.keys) {
      std::memcpy(key.bytes.data(), bytes.data() + at, kKeyBytes);
      at += kKeyBytes;
    }
  }
  if (at != end) return fail(ErrorKind::corrupt, "policies have {} bytes behind their last rule", end - at);
  if (auto right = check_policies(policies); !right)
    return fail(ErrorKind::corrupt, "{}", right.error().message);
  return policies;
}

}  // namespace tokendepot
