// Which of the loads that wait is begun next.
#include <array>
#include <chrono>

#include "device_fixture.h"

namespace tokendepot::testing {
namespace {

using std::chrono_literals::operator""h;

constexpr uint32_t kMostInMotion = 64;  // loads of a mapped root; more wait

class LoadOrderTest : public TransfersOnDevice {};

TEST_F(LoadOrderTest, TheEarliestDeadlineComesFirstWhoeverAskedFirst) {
  store(0, 1);
  device_.hold_scatters();
  ASSERT_TRUE(transfers_->submit_load(100, plan_many(kMostInMotion)));
  for (int i = 0; i < 10'000 && device_.held_scatters() < kMostInMotion; ++i) usleep(1000);
  ASSERT_EQ(device_.held_scatters(), kMostInMotion);

  // A load's mark tells it from the others: each is submitted behind one of its own.
  constexpr std::array kDeadlines{5h, 2h, 6h, 4h, 1h, 3h};
  std::vector<uint64_t> expected(kDeadlines.size());
  device_.take_scatter_marks();
  for (size_t i = 0; i < kDeadlines.size(); ++i) {
    ASSERT_TRUE(transfers_->mark_stream(nullptr));
    LoadPlan one = plan(0);
    one.deadline_ns = static_cast<uint64_t>(std::chrono::nanoseconds(kDeadlines[i]).count());
    ASSERT_TRUE(transfers_->submit_load(200 + i, one));
    expected[static_cast<size_t>(kDeadlines[i].count()) - 1] = i + 1;  // marks count from 1
  }
  EXPECT_EQ(device_.held_scatters(), kMostInMotion) << "what is beyond the bound waits";
  device_.let_scatters_go();
  std::vector<uint64_t> ended;
  for (int i = 0; i < 10'000 && ended.size() < kDeadlines.size() + 1; ++i, usleep(1000)) {
    for (const Completion& done : transfers_->poll()) {
      EXPECT_TRUE(done.failures.empty()) << done.job;
      ended.push_back(done.job);
    }
  }
  EXPECT_EQ(ended.size(), kDeadlines.size() + 1);
  EXPECT_EQ(device_.take_scatter_marks(), expected);
}

}  // namespace
}  // namespace tokendepot::testing
