// One extent on its way in or out. Owned by Transfers; plain data driven from step to step.
#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "device/device.h"
#include "format/extent.h"
#include "io/engine.h"
#include "store/root_writer.h"
#include "transfer/transfers.h"

namespace tokendepot {

/// Bytes of one operation of the kernel when so many extents are in motion: large enough for full bandwidth,
/// small enough that few extents fill the queue too.
constexpr uint64_t piece_bytes_for(size_t in_motion) {
  return in_motion <= 2 ? 256 << 10 : in_motion <= 4 ? 512 << 10 : 1 << 20;
}

struct LoadTask {
  enum class State : uint8_t { queued, reading, scattering, held, over };

  Transfers* transfers = nullptr;
  uint64_t job = 0;
  uint32_t item_index = 0;
  LoadItem item;
  NamespaceDigest ns;
  const PagedCache* cache = nullptr;
  std::unique_ptr<PagedCache> own_cache;  // of an object; `cache` points to it
  uint32_t first_shard = 0;
  uint32_t shards = 0;
  uint64_t header_bytes = 0;
  uint64_t run_bytes = 0;   // the shards wanted
  uint64_t run_offset = 0;  // in the payload
  uint64_t submitted_ns = 0;
  uint64_t deadline_ns = UINT64_MAX;
  uint64_t mark = 0;  // see ScatterWork::after

  State state = State::queued;  // guarded by Transfers::mutex_
  bool resolved = false;        // its job knows the outcome; only buffers are still in use
  uint64_t waited_ns = 0;       // in the queue; 0 = not begun
  bool hold = false;            // verify into staging and keep it there
  size_t tier = 0;              // root in use; on failure the next one that holds the segment
  bool evicted_too = false;     // in the end those that have evicted it
  uint32_t missing_in = 0;      // bit per root that should hold the extent and does not
  bool open_failed = false;     // some root's file may be there, but the kernel did not open it
  uint32_t slot = 0;
  bool slot_held = false;
  SegmentLease segment;
  std::byte* staging = nullptr;
  uint64_t staged_bytes = 0;
  GdsLane* lane = nullptr;          // the shards come through cuFile into `device_run`, the header does not
  std::byte* device_run = nullptr;  // of the lane's slab
  bool avoid_gds = false;           // cuFile failed this extent
  GdsLane* suspect = nullptr;       // to blame for `complaint` if the ordinary way brings what it did not
  std::string complaint;
  bool direct = false;        // how the segment's file was open
  bool counted_path = false;  // what is placed after it was held is not read again
  uint64_t piece_bytes = 0;
  std::vector<IoOperation> pieces;
  std::atomic<uint32_t> pieces_left = 0;
  std::atomic<int> io_error = 0;
  std::atomic<int> gds_error = 0;
  std::vector<uint64_t> page_digests;  // of the shards wanted; empty where the device makes its own
  ExtentHeader header;
  ScatterWork scatter;
};

struct StoreTask {
  Transfers* transfers = nullptr;
  uint64_t job = 0;
  uint32_t item_index = 0;
  StoreItem item;
  NamespaceDigest ns;
  const PagedCache* cache = nullptr;
  std::unique_ptr<PagedCache> own_cache;  // of an object; `cache` points to it
  RootWriter* writer = nullptr;
  Keeper* keeper = nullptr;
  uint64_t header_bytes = 0;
  uint64_t bytes = 0;
  uint64_t submitted_ns = 0;
  uint64_t waited_ns = 0;  // in the queue, as of the last attempt to start it
  uint64_t mark = 0;       // see ScatterWork::after

  bool counted_ungathered = true;  // guarded by Transfers::mutex_, as are the next three
  bool spoilt = false;             // its blocks may have changed while they were read
  bool starting = false;           // the dispatcher has it in hand, nothing has read its blocks yet
  bool given_up = false;           // while it was starting: its blocks must not be read any more
  RootWriter::Place place;
  bool direct = false;           // how the place's file is open
  std::byte* staging = nullptr;  // the extent, or its header only where the shards go through a lane
  uint64_t staged_bytes = 0;
  GdsLane* lane = nullptr;          // until it has failed to write the shards that lie in `device_run`
  std::byte* device_run = nullptr;  // of the lane's slab
  ExtentHeader header;
  GatherWork gather;
  uint64_t piece_bytes = 0;
  std::vector<IoOperation> pieces;
  std::atomic<uint32_t> pieces_left = 0;
  std::atomic<int> io_error = 0;
  std::atomic<int> gds_error = 0;
  const GdsLane* written_by = nullptr;  // the lane, when it is given back before the end
  WriteThrough::Passage passage;
};

/// Cuts [offset, offset + bytes) of a file into operations of about `piece_bytes` between it and `memory`.
void cut_pieces(std::vector<IoOperation>& pieces, const IoOperation& pattern, std::byte* memory,
                uint64_t offset, uint64_t bytes, uint64_t piece_bytes);

}  // namespace tokendepot
