// Journal of one writer: fixed records of 128 bytes, appended after the bytes that they speak of.
//
// Effect of damage: a record that does not decode is as if it had never been written; those behind it count.
// A record names its journal and its index, so that one copied or replayed elsewhere is seen.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "tokendepot/error.h"
#include "tokendepot/key.h"
#include "tokendepot/layout.h"
#include "tokendepot/plan.h"
#include "tokendepot/tending.h"

namespace tokendepot {

inline constexpr size_t kRecordBytes = 128;

enum class RecordType : uint8_t {
  put = 1,              // an extent is complete at `where`
  seal = 2,             // the segment takes no more extents; `where.offset` = bytes in use
  condemn_extent = 3,   // the extent at `where` is bad or removed: forget it
  condemn_segment = 4,  // the segment is being recycled or removed: forget all its extents
  touch = 5,            // the segment was used at `time_ns`
  open_segment = 6,     // the writer starts to fill this segment; `where.bytes` = size of the segment file
  adopt_segment = 7,    // a copy of a sealed segment is complete in this root; its puts follow
};

/// `group` of an open_segment record: everything in the segment is a copy of what a lower root holds, so it
/// need not be demoted. Readers that do not know it demote it.
inline constexpr uint16_t kCopiesOnly = 1;

struct Record {
  RecordType type = RecordType::put;
  LayoutKind kind = LayoutKind::canonical;  // put
  uint16_t group = 0;                       // put, condemn_extent
  uint64_t index = 0;                       // position of this record in its journal
  uint64_t journal = 0;                     // writer id of the journal
  Key key;                                  // put, condemn_extent; zero otherwise
  uint64_t ns_prefix = 0;  // put: first 8 bytes (LE) of the namespace digest; condemn_*: set_cause()
  ExtentRef where;         // segment always; offset and bytes where the type says so
  Part part;               // put
  uint32_t tokens = 0;     // put
  uint64_t time_ns = 0;    // wall clock
  bool operator==(const Record&) const = default;
};

/// First 8 bytes of a namespace digest as a little-endian number.
uint64_t prefix_of(const NamespaceDigest& ns);

/// Why a condemn_extent or condemn_segment was written: counted, nothing else. A number of a later version is
/// untold.
Cause cause_of(const Record& condemnation);
void set_cause(Record& condemnation, Cause cause);

void encode_record(const Record& record, std::span<std::byte, kRecordBytes> out);
/// `corrupt` when magic, digest, type, or (journal, index) differ from what is expected at this place.
Result<Record> decode_record(std::span<const std::byte, kRecordBytes> bytes, uint64_t journal,
                             uint64_t index);

}  // namespace tokendepot
