// One root's way through cuFile: its threads, what went wrong on it, and whether it is still used.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <utility>

#include "device/gds/cufile.h"
#include "io/engine.h"

namespace tokendepot {

/// Thread-safe.
class GdsLane {
 public:
  /// `busy` where the system refuses its threads.
  static Result<std::unique_ptr<GdsLane>> make(CuFile& cufile, uint32_t io_depth, std::string root_path);

  struct Rates {
    double cufile = 0;  // GB/s
    double ordinary = 0;
  };
  /// Moves a file's bytes to the slab and back through cuFile, compares them, and reads `bytes` (a multiple
  /// of 1 MiB) both ways for the rates. Leaves nothing behind. Errors: what cuFile refused, `busy` without
  /// memory for it, or `io` when bytes differ.
  Result<Rates> probe(const std::string& directory, IoEngine& ordinary, uint64_t bytes);

  /// For a directory that is only read: whether cuFile takes a file that is there. Without any there is
  /// nothing to refuse.
  Status check_files(const std::string& directory) const;

  /// Empty, and counted as an error, when cuFile does not take the file.
  CuFileHandle add(const File& file);

  IoEngine& engine() { return *engine_; }
  Slab& slab() { return cufile_.slab(); }
  bool p2p() const { return cufile_.p2p(); }
  const std::string& summary() const { return cufile_.summary(); }

  /// False after kMostErrors of them: the root goes on without cuFile.
  bool in_use() const { return errors_.load(std::memory_order_relaxed) < kMostErrors; }
  /// Counts an I/O that was done the ordinary way, or not at all, because cuFile failed it. The first and the
  /// last are told.
  void note_error(const std::string& what);
  uint64_t errors() const { return errors_.load(std::memory_order_relaxed); }

  static constexpr uint64_t kMostErrors = 8;

 private:
  GdsLane(CuFile& cufile, std::unique_ptr<IoEngine> engine, std::string root_path)
      : cufile_(cufile), root_path_(std::move(root_path)), engine_(std::move(engine)) {}

  CuFile& cufile_;
  const std::string root_path_;
  std::atomic<uint64_t> errors_ = 0;
  std::unique_ptr<IoEngine> engine_;
};

}  // namespace tokendepot
