// What comes into a root and what goes, read from outside: what KV events are made of. Safe while engines
// run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "tokendepot/error.h"
#include "tokendepot/key.h"

namespace tokendepot {

/// A chunk of one group that became whole in a root, or is not whole there any more. Whole: its extents hold
/// together all layers and heads that any extent of that namespace and group holds, so that ranks are not
/// told one by one.
struct ChunkChange {
  bool stored = false;
  Key key;
  uint64_t ns_prefix = 0;  // first 8 bytes of the namespace digest
  uint16_t group = 0;
  uint32_t tokens = 0;  // held; fewer than a chunk's where a window is kept
};

/// Follows the journals of one root. Memory: about 250 bytes a chunk and group. Not thread-safe.
class RootWatch {
 public:
  /// `not_found` / `corrupt` / `unsupported` / `permission` when `path` is not a readable root. Reads nothing
  /// yet.
  static Result<std::unique_ptr<RootWatch>> open(const std::string& path);
  ~RootWatch();

  /// What changed since the last call, each chunk once; at first all that is stored. At most `most` changes,
  /// the rest at the next call. Errors: the root cannot be read any more, or another one has taken its place
  /// (`not_found`); what is known stays known.
  Result<std::vector<ChunkChange>> poll(size_t most = SIZE_MAX);
  /// All chunks that are whole, as of the last poll.
  std::vector<ChunkChange> stored() const;

  const std::string& root_id_hex() const;
  /// The root is on a memory file system.
  bool in_memory() const;

 private:
  struct State;
  explicit RootWatch(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace tokendepot
