// Where the system refuses a thread, whichever one, the depot says so and the process goes on.
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "depot_fixture.h"
#include "device/gds/gds_lane.h"
#include "gds_fixture.h"
#include "io/engine.h"
#include "io/file.h"
#include "open_depot.h"
#include "tight_limits.h"
#include "workload/raw_control.h"

namespace tokendepot {
namespace {

using testing::fresh_fake;
using testing::GpuLikeDevice;

constexpr uint64_t kMiB = 1 << 20;

/// Whether it tells of `what`, and of a limit that one can raise.
bool tells(const Error& error, const std::string& what) {
  if (error.kind == ErrorKind::busy && error.message.find(what) != std::string::npos &&
      error.message.find("ulimit -u") != std::string::npos) {
    return true;
  }
  std::fprintf(stderr, "%s: %s\n", name(error.kind), error.message.c_str());
  return false;
}

/// Exit code of `body` in a child that may start `more` threads. What it makes must be gone when it returns.
template <typename Body>
int with_threads(rlim_t more, Body body) {
  return exit_code_of_child([&] {
    if (!limit_threads(more)) return kNotLimited;
    const size_t before = threads_now();
    const int code = body();
    return code == 0 && !threads_become(before) ? 98 : code;
  });
}

#define EXPECT_WELL(more, body)                                                \
  do {                                                                         \
    const int code = with_threads(more, body);                                 \
    if (code == kNotLimited) GTEST_SKIP() << "threads cannot be limited here"; \
    EXPECT_EQ(code, 0) << "with " << (more) << " threads";                     \
  } while (false)

TEST(RefusedThreads, AnEngineWithoutAnyIsAnError) {
  EXPECT_WELL(0, [] {
    const auto engine = make_thread_engine(4);
    if (engine) return 1;
    return tells(engine.error(), "the I/O threads") ? 0 : 2;
  });
  EXPECT_WELL(0, [] {
    const auto engine = make_uring_engine(4);
    if (engine) return 1;
    return tells(engine.error(), "io_uring's thread") ? 0 : 2;
  });
  EXPECT_WELL(0, [] {
    const auto choice = choose_engine("/tmp", false, 4, false);
    if (choice) return 1;
    return tells(choice.error(), "the I/O threads") ? 0 : 2;
  });
}

TEST(RefusedThreads, AnEngineWithFewerThanAskedForMovesBytes) {
  const TemporaryDirectory directory;
  const auto file = File::open(directory / "file", {.write = true, .create = true});
  ASSERT_TRUE(file);
  EXPECT_WELL(2, [&] {
    const auto engine = make_thread_engine(128);
    if (!engine) return 1;
    std::vector<std::byte> out(8 * kMiB, std::byte{7});
    std::vector<std::byte> in(out.size());
    if (move_and_wait(**engine, {.fd = file->fd(), .write = true}, out.data(), 0, out.size()) != 0) return 2;
    if (move_and_wait(**engine, {.fd = file->fd()}, in.data(), 0, in.size()) != 0) return 3;
    return in == out ? 0 : 4;
  });
}

TEST(RefusedThreads, AHostDeviceEndsThoseThatItHasStarted) {
  for (const rlim_t more : {0, 1, 2, 3}) {
    EXPECT_WELL(more, [] {
      const auto device = make_host_device(4, kMiB);
      if (device) return 1;
      return tells(device.error(), "the host device's threads") ? 0 : 2;
    });
  }
}

TEST(RefusedThreads, AControlOfABenchmarkIsAnErrorToo) {
  const TemporaryDirectory directory("/dev/shm");
  std::vector<std::byte> memory(4 * kMiB);
  ASSERT_EQ(::chmod(directory.path().c_str(), 0777), 0);
  EXPECT_WELL(1, [&] {
    const auto copies = CopyControl::make(directory.path(), memory.size());
    if (!copies) return 1;
    const auto rate = (*copies)->run(memory.data(), memory.size(), kMiB, 3, Traffic::read, 0);
    if (rate) return 2;
    if (!tells(rate.error(), "the raw control's threads")) return 3;
    const auto raw = RawControl::make(directory.path(), kMiB, 4);
    if (raw) return 4;
    return tells(raw.error(), "the raw control's threads") ? 0 : 5;
  });
}

TEST(RefusedThreads, ALaneOfCuFileIsAnError) {
  const int code = exit_code_of_child([] {
    fresh_fake();
    GpuLikeDevice device(8 * kMiB);
    const auto cufile = CuFile::open(device, CuFile::Compat::allowed, FAKE_CUFILE_WHOLE);
    if (!cufile) return 1;
    if (!limit_threads(0)) return kNotLimited;
    const auto lane = GdsLane::make(**cufile, 4, "/nowhere");
    if (lane) return 2;
    return tells(lane.error(), "the I/O threads") ? 0 : 3;
  });
  if (code == kNotLimited) GTEST_SKIP() << "threads cannot be limited here";
  EXPECT_EQ(code, 0);
}

/// Opens the same depot with no thread, with one more each time, until it opens.
class ADepot : public ::testing::Test {
 protected:
  ADepot() {
    EXPECT_EQ(::chmod(directory_.path().c_str(), 0777), 0);
    EXPECT_EQ(::chmod(memory_.path().c_str(), 0777), 0);
    options_.roots = {{.path = "", .capacity_bytes = 32 * kMiB}};
    options_.free_space_reserve = 0;
    options_.device_threads = 2;
    options_.io_depth = 3;
  }
  void open_with_ever_more_threads(const std::string& parent, bool with_cufile = false) {
    constexpr int kOpened = 50;
    int code = 0;
    rlim_t more = 0;
    for (; more < 64 && code != kOpened; ++more) {
      options_.roots.front().path = parent + "/" + std::to_string(more);  // each child is another user
      code = exit_code_of_child([&] {
        const size_t before = threads_now();
        fresh_fake();
        std::unique_ptr<Device> device;
        if (with_cufile) device = std::make_unique<GpuLikeDevice>(8 * kMiB);
        if (!limit_threads(more)) return kNotLimited;
        {
          const auto depot = open_depot_on(std::move(device), options_, FAKE_CUFILE_WHOLE);
          if (depot) return kOpened;
          if (!tells(depot.error(), "the system refused")) return 1;
        }
        return threads_become(before) ? 0 : 2;
      });
      if (code == kNotLimited) GTEST_SKIP() << "threads cannot be limited here";
      ASSERT_TRUE(code == 0 || code == kOpened) << code << " with " << more << " threads";
    }
    EXPECT_EQ(code, kOpened);
    EXPECT_GT(more, 4u) << "refused at several places";
  }

  const TemporaryDirectory directory_{"/tmp"};
  const TemporaryDirectory memory_{"/dev/shm"};
  Options options_;
};

TEST_F(ADepot, OpensOrSaysThatAThreadWasRefusedWhicheverItIs) {
  for (const IoChoice io : {IoChoice::threads, IoChoice::uring, IoChoice::automatic}) {
    if (io == IoChoice::uring && !make_uring_engine(1)) continue;
    options_.roots.front().io = io;
    options_.roots.front().transport = TransportChoice::buffered;
    const std::string parent = directory_ / ("io" + std::to_string(static_cast<int>(io)));
    ASSERT_EQ(::mkdir(parent.c_str(), 0777), 0);
    ASSERT_EQ(::chmod(parent.c_str(), 0777), 0);
    open_with_ever_more_threads(parent);
  }
}

TEST_F(ADepot, InMemoryOpensOrSaysThatAThreadWasRefused) {
  open_with_ever_more_threads(memory_.path());
}

TEST_F(ADepot, WithCuFileOpensOrSaysThatAThreadWasRefused) {
  if (!probe_direct_alignment(directory_.path())) GTEST_SKIP() << "/tmp has no O_DIRECT";
  options_.roots.front().io = IoChoice::threads;
  options_.roots.front().transport = TransportChoice::gds;
  open_with_ever_more_threads(directory_.path(), true);
}

}  // namespace
}  // namespace tokendepot
