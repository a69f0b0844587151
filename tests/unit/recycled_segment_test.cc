// A segment that another process recycles while it is being loaded from: its bytes are another extent's by
// now, which is no damage.
#include <filesystem>

#include "device_fixture.h"
#include "format/extent.h"

namespace tokendepot::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::Field;
using Reason = ItemFailure::Reason;

class RecycledSegment : public TransfersOnDevice {
 protected:
  std::string path_of(const ExtentRef& where) const { return roots_[0].root->files().path_of(where.segment); }
  void rename_away(const ExtentRef& where) {
    std::filesystem::rename(path_of(where), roots_[0].root->segments_dir() + "/elsewhere");
  }
  void overwrite(const std::string& path, uint64_t at) {
    const auto file = File::open(path, {.write = true});
    ASSERT_TRUE(file);
    std::byte byte{};
    ASSERT_TRUE(file->read_at({&byte, 1}, at));
    byte ^= std::byte{1};
    ASSERT_TRUE(file->write_at({&byte, 1}, at));
  }
  Reason reason_of(const LoadPlan& plan, bool hold = false) {
    EXPECT_TRUE(transfers_->submit_load(++job_, plan, hold));
    const Completion done = completion_of(job_);
    EXPECT_EQ(done.failures.size(), 1u);
    return done.failures.empty() ? Reason::cancelled : done.failures[0].reason;
  }
  /// The extent by itself: that its segment has gone the keeper finds out sooner or later.
  bool is_condemned(const ExtentRef& where) {
    return roots_[0].replay->is_condemned(*segments_.find(where.segment), where.offset);
  }

  const uint64_t header_ = extent_header_bytes(shape_.shards());
};

TEST_F(RecycledSegment, IsAbsentWhereItsPayloadIsNewAndCondemnsNothing) {
  store(0, 1);
  const LoadPlan stored = plan(0);
  const ExtentRef where = stored.items[0].where;
  overwrite(path_of(where), where.offset + header_ + 100);
  rename_away(where);  // it is open and mapped still
  EXPECT_EQ(reason_of(stored), Reason::absent);
  EXPECT_FALSE(is_condemned(where)) << "whoever recycled it has told everybody already";
  EXPECT_EQ(reason_of(stored, true), Reason::absent) << "what is held is copied first";
  EXPECT_FALSE(is_condemned(where));
}

TEST_F(RecycledSegment, IsAbsentWhereItsHeaderIsHalfWrittenAndCondemnsNothing) {
  store(0, 1);
  const LoadPlan stored = plan(0);
  const ExtentRef where = stored.items[0].where;
  overwrite(path_of(where), where.offset + 20);
  rename_away(where);
  EXPECT_EQ(reason_of(stored), Reason::absent);
  EXPECT_FALSE(is_condemned(where));
}

TEST_F(RecycledSegment, WhileItHasItsNameWhatDiffersIsCorruptAndCondemned) {
  store(0, 1);
  const LoadPlan stored = plan(0);
  const ExtentRef where = stored.items[0].where;
  overwrite(path_of(where), where.offset + header_ + 100);
  EXPECT_EQ(reason_of(stored), Reason::corrupt);
  EXPECT_TRUE(is_condemned(where));
}

}  // namespace
}  // namespace tokendepot::testing
