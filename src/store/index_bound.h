// How much of the index one root may take up, whatever its journals say: a record costs 128 bytes and may
// name a place in a file that is small, full of holes, or not there.
//
// Extents of one segment do not overlap and are at least two pages each, header and payload. So a file of n
// bytes has n / 8192 of them at most, and a root capacity / 8192. Not thread-safe.
#pragma once

#include <cstdint>
#include <vector>

namespace tokendepot {

class IndexBound {
 public:
  /// Extents in files whose size is not known: the records of other processes come before any listing that
  /// shows their segments. 61 MiB of index.
  static constexpr uint64_t kOnTheirWord = 1 << 20;

  explicit IndexBound(uint64_t capacity);

  /// The file system says that the segment's file has so many bytes. 0 = not known yet.
  void found(uint32_t slot, uint64_t file_bytes);
  bool knows(uint32_t slot) const { return slot < segments_.size() && segments_[slot].file_bytes != 0; }
  /// An extent that ends there fits only if the file's size becomes known, or has grown since: where it
  /// cannot be allocated it is made piece by piece. Once a segment between two new_round().
  bool must_ask(uint32_t slot, uint64_t end);
  void new_round() { ++round_; }

  /// Whether the segment can hold an extent that ends there. Told for each put: those of files of unknown
  /// size are counted here.
  bool fits(uint32_t slot, uint64_t end);
  /// Whether one extent more of this segment may be indexed.
  bool has_room(uint32_t slot) const;
  void added(uint32_t slot);
  /// The segment is condemned: its extents count until they are swept().
  void condemned(uint32_t slot);
  void swept();

 private:
  struct Segment {
    uint64_t file_bytes = 0;
    uint32_t extents = 0;  // indexed, each once for each place of its chunk
    uint32_t asked = 0;    // round
  };
  Segment& at(uint32_t slot);

  const uint64_t most_;
  uint64_t extents_ = 0;
  uint64_t leaving_ = 0;  // of extents_
  uint64_t on_their_word_ = 0;
  uint32_t round_ = 1;
  std::vector<Segment> segments_;  // by slot
};

}  // namespace tokendepot
