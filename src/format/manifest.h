// A namespace's manifest: the JSON of what must be equal, in canonical form.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "tokendepot/error.h"
#include "tokendepot/key.h"

namespace tokendepot {

inline constexpr size_t kMaxManifestBytes = 1 << 20;

struct Manifest {
  std::string canonical;   // sorted keys, no blanks, UTF-8, as stored in manifests/<digest>.json
  NamespaceDigest digest;  // SHA-256 of `canonical`
};

/// Parses any JSON object (at most 1 MiB, nesting at most 64) and brings it to canonical form.
/// invalid_argument says what is wrong otherwise. Numbers keep their JSON type: 1 and 1.0 differ.
Result<Manifest> make_manifest(std::string_view json);

/// Checks stored bytes against the digest that their file name claims: `corrupt` when they differ.
Result<Manifest> check_manifest(std::string_view stored, const NamespaceDigest& expected);

}  // namespace tokendepot
