// The file `policies` of a root: time to live, quotas, pins.
//
// Effect of damage: the file is as if it were not there. Nothing is lost by that but the operator's rules.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "tokendepot/error.h"
#include "tokendepot/tending.h"

namespace tokendepot {

inline constexpr size_t kMaxPolicyBytes = 4 << 20;
inline constexpr size_t kMaxPolicies = 4096;
inline constexpr size_t kMaxPinnedKeys = 100'000;  // of all pins of a root together

/// `invalid_argument`, with the rule and the bound named, for what the file cannot say.
Status check_policies(const Policies& policies);
/// The file's bytes. `policies` has passed check_policies().
std::vector<std::byte> encode_policies(const Policies& policies);
/// `corrupt` when magic, digest, sizes, kinds or reserved bytes are off or a rule comes twice, `unsupported`
/// for another version. Never allocates more than a small multiple of bytes.size().
Result<Policies> decode_policies(std::span<const std::byte> bytes);

}  // namespace tokendepot
