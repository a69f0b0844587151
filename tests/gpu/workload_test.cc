// The workload of `tokendepot bench io` with its paged cache on a GPU.
#include "tokendepot/workload.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>

#include "device_memory.h"

namespace tokendepot {
namespace {

class CudaWorkloadTest : public ::testing::TestWithParam<WorkloadKind> {
 protected:
  void SetUp() override {
    SKIP_WITHOUT_GPU();
    directory_ = "/dev/shm/tokendepot-test-XXXXXX";
    ASSERT_NE(::mkdtemp(directory_.data()), nullptr);
  }
  void TearDown() override {
    if (!directory_.empty()) std::filesystem::remove_all(directory_);
  }
  std::string directory_;
};

INSTANTIATE_TEST_SUITE_P(Kinds, CudaWorkloadTest,
                         ::testing::Values(WorkloadKind::read, WorkloadKind::write, WorkloadKind::mixed,
                                           WorkloadKind::burst));

TEST_P(CudaWorkloadTest, MovesBytesThatCompareEqualNextToTheLinksLimit) {
  const auto never = [] { return false; };
  WorkloadSpec spec;
  spec.options.device = "cuda:0";
  spec.options.device_slab_bytes = 64 << 20;
  spec.options.slab_bytes = 64 << 20;
  spec.options.free_space_reserve = 0;
  spec.options.roots.resize(1);
  spec.options.roots[0].path = directory_ + "/root";
  spec.options.roots[0].capacity_bytes = 128 << 20;
  spec.options.roots[0].segment_bytes = 16 << 20;
  spec.kind = GetParam();
  spec.extent_bytes = {1 << 20};
  spec.volume_bytes = 32 << 20;
  spec.in_flight = 4;
  spec.request_extents = 2;
  auto workload = Workload::open(spec);
  ASSERT_TRUE(workload) << workload.error().message;
  ASSERT_TRUE((*workload)->fill(never));
  const auto run = (*workload)->run(0.1, never);
  ASSERT_TRUE(run) << run.error().message;
  EXPECT_EQ(run->failed, 0u) << run->failure;
  EXPECT_GE(run->extents, 1u);
  const auto limits = (*workload)->limits(0.05);
  ASSERT_TRUE(limits) << limits.error().message;
  ASSERT_EQ(limits->size(), 1u);
  EXPECT_GT(limits->front().gb_per_s, 0);
  const auto check = (*workload)->verify(1, never);
  ASSERT_TRUE(check) << check.error().message;
  EXPECT_GE(check->extents, 1u);
  EXPECT_EQ(check->wrong, 0u) << check->first_wrong;
}

}  // namespace
}  // namespace tokendepot
