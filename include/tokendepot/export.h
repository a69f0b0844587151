// A namespace, or a part of it, as one file for warming another site: written from roots, read into a root.
// The bytes: docs/format.md, "Export file". Safe while engines run.
//
// A digest proves that bytes are what was exported, not who exported them: import from sources that you trust
// to have computed what they say.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tokendepot/depot.h"
#include "tokendepot/error.h"
#include "tokendepot/tools.h"

namespace tokendepot {

/// Not thread-safe. Holds one extent in memory, and 64 bytes for each extent written.
class Exporter {
 public:
  /// Begins a file at the present end of `fd`, which is lent until the exporter is gone; it may be a pipe.
  /// `manifest_json` is what the namespace stands for. `extents` and `bytes` are told to whoever reads the
  /// file, for progress.
  static Result<std::unique_ptr<Exporter>> begin(int fd, std::string_view manifest_json, uint64_t extents,
                                                 uint64_t bytes);
  virtual ~Exporter() = default;

  /// Reads the extent from `root`, checks who it is and every digest, and writes it. The inner status says
  /// what is wrong with the extent (then nothing of it was written, and the file goes on; larger than 1 GiB
  /// is `unsupported`), the outer one what is wrong with the stream.
  virtual Result<Status> add(const std::string& root, const StoredExtent& extent) = 0;
  /// Writes index and trailing digest. Nothing may be added behind them.
  virtual Status finish() = 0;
  /// Bytes of the file so far.
  virtual uint64_t file_bytes() const = 0;
};

struct ImportReport {
  NamespaceDigest ns;
  std::string manifest;          // JSON
  uint64_t planned_extents = 0;  // what the file's first page announces
  uint64_t planned_bytes = 0;
  uint64_t file_bytes = 0;  // read so far
  uint64_t imported = 0;    // extents
  uint64_t imported_bytes = 0;
  uint64_t present = 0;  // were in the root already
  uint64_t damaged = 0;  // digests that differ, or in the index but not in the file
  uint64_t junk_bytes = 0;
  bool full = false;   // the root has no room for more: the rest of the file was not read
  bool whole = false;  // index and trailing digest came and agree with everything before
  std::string reason;  // why not whole, or why full
};

/// Not thread-safe. Holds one extent in memory, and 64 bytes for each extent of the file.
class Importer {
 public:
  /// Reads the first page and the manifest from `fd`, which is lent until the importer is gone, and opens the
  /// target: the root of a depot, or with `create` a directory that may become one. `invalid_argument`
  /// or `unsupported` when this is no export file that can be read: then the target is as it was. Nothing is
  /// written before the first extent that is sound and not in the root yet.
  static Result<std::unique_ptr<Importer>> begin(int fd, const RootOptions& target, bool create,
                                                 uint64_t free_space_reserve);
  virtual ~Importer() = default;

  /// Goes on for about `bytes` of the file. False: it has ended. What is good goes in, whatever else is wrong
  /// with the file; an extent is written only when every digest of it is right. Evicts nothing. Errors: of
  /// the stream (`io`) or of the target.
  virtual Result<bool> go_on(uint64_t bytes) = 0;
  virtual const ImportReport& report() const = 0;
};

}  // namespace tokendepot
