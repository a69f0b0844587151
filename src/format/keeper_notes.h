// The file `keeper-notes` of a root: how far its scrub is, and the capacity that its keeper was given.
//
// Effect of damage: the file is as if it were not there; the scrub starts over and writes it anew.
#pragma once

#include <cstddef>
#include <span>

#include "tokendepot/error.h"
#include "tokendepot/tending.h"

namespace tokendepot {

inline constexpr size_t kKeeperNotesBytes = 128;

void encode_keeper_notes(const KeeperNotes& notes, std::span<std::byte, kKeeperNotesBytes> out);
/// `corrupt` when magic, size, digest or reserved bytes are off, `unsupported` for another version.
Result<KeeperNotes> decode_keeper_notes(std::span<const std::byte> bytes);

}  // namespace tokendepot
