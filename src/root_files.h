// The files of a root as tools meet them from outside: nothing is created, nothing stands still.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "format/marker.h"
#include "io/file.h"
#include "store/keeper_lock.h"
#include "tokendepot/error.h"
#include "tokendepot/key.h"

namespace tokendepot {

/// `not_found` when `path` has no marker, `corrupt` or `unsupported` when it has none that can be read.
Result<Marker> read_marker(const std::string& path);
/// A directory that was never created holds nothing.
Result<std::vector<DirectoryEntry>> entries_of(const std::string& path);
/// A file that is being made, or was when its maker died.
bool is_temporary(const std::string& name);
/// Somebody holds the lock of this journal.
bool has_live_writer(const std::string& journal);
/// "<64 hex>.json". nullopt: not a manifest's name.
std::optional<NamespaceDigest> digest_of_manifest(const std::string& name);
/// The sole right to create, recycle and remove segments; engines hold it for moments. `busy` after 2 s.
Result<KeeperLock> lock_keeper(const std::string& path);

}  // namespace tokendepot
