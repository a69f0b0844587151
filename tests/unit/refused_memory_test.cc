// Where the system refuses memory for what the depot measures with, it does without and the process goes on.
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdio>
#include <string>
#include <vector>

#include "device/gds/gds_lane.h"
#include "gds_fixture.h"
#include "io/engine.h"
#include "io/file.h"
#include "io/scratch_file.h"
#include "temporary_directory.h"
#include "tight_limits.h"
#include "tokendepot/depot.h"

namespace tokendepot {
namespace {

using testing::fresh_fake;
using testing::GpuLikeDevice;

constexpr uint64_t kMiB = 1 << 20;

bool tells(const std::string& message, const std::string& what) {
  if (message.find(what) != std::string::npos) return true;
  std::fprintf(stderr, "%s\n", message.c_str());
  return false;
}

class RefusedMemory : public ::testing::Test {
 protected:
  void SetUp() override {
    if (kShadowMemory) GTEST_SKIP() << "a sanitizer's own memory is more than any limit";
  }
  const TemporaryDirectory directory_{"/tmp"};
};

TEST_F(RefusedMemory, EnginesAreNotMeasuredAndThreadsAreTaken) {
  const bool uring = make_uring_engine(2).has_value();
  EXPECT_EQ(
      exit_code_of_child([&] {
        if (!limit_memory(8 * kMiB)) return 1;
        const auto choice = choose_engine(directory_.path(), false, 2, false);
        if (!choice) return 2;
        if (std::string(choice->engine->name()) != "threads") return 3;
        if (uring && !tells(choice->reason, "not measured: the system refused 33554432 bytes of memory"))
          return 4;
        const auto file = File::open(directory_ / "file", {.write = true, .create = true});
        std::vector<std::byte> out(kMiB, std::byte{7});
        return move_and_wait(*choice->engine, {.fd = file->fd(), .write = true}, out.data(), 0, kMiB);
      }),
      0);
}

TEST_F(RefusedMemory, DirectTransfersAreNotTried) {
  if (!ScratchFile::create(directory_.path(), true)) GTEST_SKIP() << "/tmp has no O_DIRECT";
  EXPECT_EQ(exit_code_of_child([&] {
              if (!limit_memory(256 << 10)) return 1;
              const auto alignment = probe_direct_alignment(directory_.path());
              if (alignment) return 2;
              if (alignment.error().kind != ErrorKind::busy) return 3;
              return tells(alignment.error().message, "bytes of memory for a probe of direct I/O") ? 0 : 4;
            }),
            0);
}

TEST_F(RefusedMemory, CuFileIsNotMeasured) {
  if (!ScratchFile::create(directory_.path(), true)) GTEST_SKIP() << "/tmp has no O_DIRECT";
  EXPECT_EQ(exit_code_of_child([&] {
              fresh_fake();
              GpuLikeDevice device(8 * kMiB);
              const auto cufile = CuFile::open(device, CuFile::Compat::allowed, FAKE_CUFILE_WHOLE);
              if (!cufile) return 1;
              const auto ordinary = make_thread_engine(1);
              const auto lane = GdsLane::make(**cufile, 1, "/nowhere");
              if (!ordinary || !lane) return 2;
              if (!limit_memory(2 * kMiB)) return 3;
              const auto rates = (*lane)->probe(directory_.path(), **ordinary, 4 * kMiB);
              if (rates) return 4;
              if (rates.error().kind != ErrorKind::busy) return 6;
              return tells(rates.error().message, "5242880 bytes of memory for a probe of cuFile") ? 0 : 5;
            }),
            0);
}

}  // namespace
}  // namespace tokendepot
