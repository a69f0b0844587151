// The operator's rules of one root, read again whenever they change, and what they mean for its segments now.
//
// Every process judges for itself from the same file and the same journals. Wall clocks decide when something
// expires, never whether bytes are right: a clock that is wrong costs hits or space. Thread-safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "store/segment_contents.h"
#include "store/segment_table.h"
#include "tokendepot/tending.h"

namespace tokendepot {

class RootPolicies {
 public:
  /// Both tables outlive this. `capacity` bounds what pins may hold.
  RootPolicies(const std::string& root_path, RootIndex root, uint64_t capacity, SegmentTable& segments,
               SegmentContents& contents);

  /// Reads the file if it changed. True: other keys are pinned than before; contents.watch() was called, and
  /// the puts that were replayed before want to be marked.
  /// A damaged file, or one of another version, is told once, counted if damaged, and is as if absent.
  bool read();
  /// Judges every segment by the rules, at this time of the wall clock, and tells the segment table what has
  /// expired.
  void judge(uint64_t wall_now_ns);

  struct Verdict {
    std::set<uint32_t> pinned;                              // slots not to be evicted for space
    std::set<uint32_t> expired;                             // slots of which nothing is served any more
    std::map<uint64_t, uint64_t> over;                      // namespace (prefix) -> bytes beyond its quota
    std::map<uint32_t, SegmentContents::Segment> contents;  // only where some rule asks for it
  };
  /// As of the last judge().
  Verdict verdict() const;
  bool has_rules() const { return has_rules_; }

  /// Orders candidates for eviction (coldest first): those that hold only namespaces over their quota come
  /// first, pinned ones not at all. `withheld` says whether a pinned one was left out.
  using Candidates = std::vector<std::pair<uint32_t, SegmentTable::Segment>>;
  Candidates victims(Candidates coldest_first, uint64_t wall_now_ns, bool* withheld);
  /// Whether all that the segment holds is of namespaces over their quota, as of the last judge().
  bool is_over_quota(uint32_t slot) const;

  uint64_t pinned_bytes() const { return pinned_bytes_; }
  uint64_t damaged() const { return damaged_; }

 private:
  struct Lives;  // times to live, by namespace
  void tell(const std::string& complaint);
  static bool all_over(const SegmentContents::Segment& held, const std::map<uint64_t, uint64_t>& over);

  const std::string path_;
  const RootIndex root_;
  const uint64_t capacity_;
  SegmentTable& segments_;
  SegmentContents& contents_;

  mutable std::mutex mutex_;  // what follows
  Policies policies_;
  std::vector<std::byte> file_;  // as read last
  std::string complaint_;
  bool over_share_told_ = false;
  std::set<uint32_t> aged_;  // slots of which something has expired
  Verdict verdict_;
  std::atomic<bool> has_rules_ = false;
  std::atomic<uint64_t> pinned_bytes_ = 0;
  std::atomic<uint64_t> damaged_ = 0;
};

}  // namespace tokendepot
