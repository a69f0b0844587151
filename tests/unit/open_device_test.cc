#include "device/open_device.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "depot_fixture.h"

namespace tokendepot {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

TEST(OpenDevice, ADepotOnAGpuThatIsNotHereIsRefusedInOneSentence) {
  const TemporaryDirectory directory("/tmp");
  Options options;
  options.roots = {{.path = directory.path() + "/depot", .capacity_bytes = 32ull << 20}};
  options.free_space_reserve = 0;
  options.device = "cuda:255";
  const auto refused = Depot::open(options);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().kind, ErrorKind::unsupported);
  EXPECT_THAT(refused.error().message, HasSubstr("device=cuda:255"));
  EXPECT_THAT(refused.error().message, Not(HasSubstr("\n")));
  EXPECT_FALSE(std::filesystem::exists(directory.path() + "/depot"));
}

TEST(OpenDevice, AnOptionThatNamesNoDeviceIsRefused) {
  const TemporaryDirectory directory("/tmp");
  Options options;
  options.roots = {{.path = directory.path(), .capacity_bytes = 32ull << 20}};
  options.device = "gpu";
  const auto refused = Depot::open(options);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().kind, ErrorKind::invalid_argument);
  EXPECT_THAT(refused.error().message, HasSubstr("device=\"gpu\""));
}

TEST(OpenDevice, TheHostDeviceTakesAnyMarkAndSaysWhatItIs) {
  const TemporaryDirectory directory("/tmp");
  Options options;
  options.roots = {{.path = directory.path(), .capacity_bytes = 32ull << 20}};
  options.free_space_reserve = 0;
  const auto depot = Depot::open(options);
  ASSERT_TRUE(depot) << depot.error().message;
  EXPECT_TRUE((*depot)->mark_stream(nullptr));
  EXPECT_TRUE((*depot)->mark_stream(&options));
  EXPECT_EQ((*depot)->stats().device.name, "host");
  EXPECT_EQ((*depot)->stats().device.threads, options.device_threads);
  EXPECT_EQ((*depot)->stats().device.pinned_bytes, 0u);
}

}  // namespace
}  // namespace tokendepot
