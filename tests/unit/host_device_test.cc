#include <dirent.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <fstream>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "device/device.h"
#include "io/file.h"
#include "io/mapping.h"
#include "paged_memory.h"

namespace tokendepot::paged_test {
namespace {

/// Collects what the device reports, in order.
class Reports {
 public:
  void add(std::string what) {
    const std::lock_guard lock(mutex_);
    reports_.push_back(std::move(what));
    changed_.notify_all();
  }
  std::vector<std::string> wait_for(size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return reports_.size() >= count; });
    return reports_;
  }
  size_t count() {
    const std::lock_guard lock(mutex_);
    return reports_.size();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::string> reports_;
};

const char* name_of(ScatterOutcome outcome) {
  switch (outcome) {
    case ScatterOutcome::ok:
      return "scatter ok";
    case ScatterOutcome::corrupt:
      return "scatter corrupt";
    case ScatterOutcome::gone:
      return "scatter gone";
    case ScatterOutcome::failed:
      return "scatter failed";
  }
  return "?";
}

/// A cache, an extent that fits it, and one work of each kind between them.
class HostDeviceTest : public testing::Test {
 protected:
  HostDeviceTest() {
    header_ = header_of(shape_, payload_);
    gathered_.resize(payload_.size());
    digests_.resize(shape_.shards());
  }

  ScatterWork scatter() {
    ScatterWork work;
    work.cache = &memory_.cache;
    work.header = &header_;
    work.payload = payload_;
    work.shards = shape_.shards();
    work.blocks = blocks_;
    work.owner = &reports_;
    work.done = [](ScatterWork* self, ScatterOutcome outcome) {
      static_cast<Reports*>(self->owner)->add(name_of(outcome));
    };
    return work;
  }

  GatherWork gather() {
    GatherWork work;
    work.cache = &memory_.cache;
    work.blocks = blocks_;
    work.payload = gathered_;
    work.digests = digests_;
    work.owner = &reports_;
    work.done = [](GatherWork* self, bool ok) {
      static_cast<Reports*>(self->owner)->add(ok ? "gather ok" : "gather gone");
    };
    return work;
  }

  std::mt19937 random_{1};
  const GroupShape shape_{
      .part = {0, 4, 0, 2}, .tokens = 64, .block_tokens = 16, .planes = 2, .row_bytes = 128};
  PagedMemory memory_ = make_canonical(shape_, 9, "LPBTH", 0, random_);
  const std::vector<int32_t> blocks_ = pick_blocks(4, 9, random_);
  std::vector<std::byte> payload_ = reference_payload(shape_);
  ExtentHeader header_;
  std::vector<std::byte> gathered_;
  std::vector<uint64_t> digests_;
  Reports reports_;
};

TEST_F(HostDeviceTest, WhatWasScatteredIsGatheredAgain) {
  auto device = make_host_device(2, 1 << 20).value();
  EXPECT_EQ(device->stats().name, "host");
  EXPECT_EQ(device->stats().threads, 2u);
  EXPECT_EQ(device->slab().size(), 1u << 20);
  auto load = scatter();
  device->submit(&load);
  EXPECT_EQ(reports_.wait_for(1), std::vector<std::string>{"scatter ok"});
  auto store = gather();
  device->submit(&store);
  EXPECT_EQ(reports_.wait_for(2).back(), "gather ok");
  EXPECT_TRUE(gathered_ == payload_);
  EXPECT_EQ(digests_, header_.shard_digests);
}

TEST_F(HostDeviceTest, ACorruptExtentIsReportedAndWritesNothing) {
  auto device = make_host_device(1, 0).value();
  payload_[5] ^= std::byte{1};
  const auto before = memory_.bytes;
  auto load = scatter();
  device->submit(&load);
  EXPECT_EQ(reports_.wait_for(1), std::vector<std::string>{"scatter corrupt"});
  EXPECT_TRUE(memory_.bytes == before);
}

/// Keeps a device thread inside a completion until it is opened.
class Gate {
 public:
  void arrive_and_wait() {
    std::unique_lock lock(mutex_);
    arrived_ = true;
    changed_.notify_all();
    changed_.wait(lock, [&] { return open_; });
  }
  void wait_until_reached() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return arrived_; });
  }
  void open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool arrived_ = false;
  bool open_ = false;
};

TEST_F(HostDeviceTest, QueuedScattersAreServedBeforeQueuedGathersInTheirOrder) {
  auto device = make_host_device(1, 0).value();
  Gate gate;
  auto holder = gather();
  holder.owner = &gate;
  holder.done = [](GatherWork* self, bool) { static_cast<Gate*>(self->owner)->arrive_and_wait(); };
  device->submit(&holder);
  gate.wait_until_reached();

  auto good = scatter();
  auto bad = scatter();
  auto damaged = header_;
  damaged.shard_digests[0] ^= 1;
  bad.header = &damaged;
  auto last = scatter();
  auto first_store = gather();
  auto second_store = gather();
  device->submit(&first_store);
  device->submit(&good);
  device->submit(&second_store);
  device->submit(&bad);
  device->submit(&last);
  gate.open();
  EXPECT_EQ(reports_.wait_for(5), (std::vector<std::string>{"scatter ok", "scatter corrupt", "scatter ok",
                                                            "gather ok", "gather ok"}));
}

TEST_F(HostDeviceTest, DestructionFinishesWhatIsQueued) {
  auto damaged = header_;  // so that the works, which run side by side, write nothing
  damaged.shard_digests[1] ^= 1;
  std::vector<ScatterWork> loads(50, scatter());
  std::vector<GatherWork> stores(1, gather());
  for (auto& load : loads) load.header = &damaged;
  {
    auto device = make_host_device(3, 0).value();
    for (auto& load : loads) device->submit(&load);
    for (auto& store : stores) device->submit(&store);
  }
  EXPECT_EQ(reports_.count(), 51u);
}

TEST_F(HostDeviceTest, ACompletionMaySubmitMore) {
  struct Chain {
    Device* device;
    Reports* reports;
    int left;
  };
  auto device = make_host_device(1, 0).value();
  Chain chain{device.get(), &reports_, 10};
  auto load = scatter();
  load.owner = &chain;
  load.done = [](ScatterWork* self, ScatterOutcome outcome) {
    auto* links = static_cast<Chain*>(self->owner);
    if (--links->left == 0) {
      links->reports->add(name_of(outcome));
    } else {
      links->device->submit(self);
    }
  };
  device->submit(&load);
  EXPECT_EQ(reports_.wait_for(1), std::vector<std::string>{"scatter ok"});
}

TEST_F(HostDeviceTest, ManyThreadsSubmitAtOnce) {
  auto device = make_host_device(4, 0).value();
  constexpr int kSubmitters = 4, kEach = 50;
  std::vector<std::vector<ScatterWork>> loads(kSubmitters, std::vector<ScatterWork>(kEach, scatter()));
  std::vector<std::thread> submitters;
  // Different blocks for each submitter would need a larger cache; damaged headers make the works write
  // nothing.
  auto damaged = header_;
  damaged.shard_digests[1] ^= 1;
  for (auto& own : loads) {
    for (auto& load : own) load.header = &damaged;
    submitters.emplace_back([&] {
      for (auto& load : own) device->submit(&load);
    });
  }
  for (auto& submitter : submitters) submitter.join();
  const auto reports = reports_.wait_for(kSubmitters * kEach);
  EXPECT_EQ(std::count(reports.begin(), reports.end(), "scatter corrupt"), kSubmitters * kEach);
}

/// A file of the payload, mapped; it can be cut short behind the mapping's back.
class MappedPayload {
 public:
  explicit MappedPayload(std::span<const std::byte> payload) : path_(make_temporary()) {
    auto opened = File::open(path_, {.write = true});
    TD_CHECK(opened.has_value());
    file_ = std::move(*opened);
    TD_CHECK(file_.write_at(payload, 0).has_value());
    auto mapped = Mapping::map(file_, payload.size(), true);
    TD_CHECK(mapped.has_value());
    mapping_ = std::move(*mapped);
  }
  ~MappedPayload() { unlink(path_.c_str()); }

  std::span<std::byte> bytes() const { return {mapping_.data(), mapping_.size()}; }
  void truncate(uint64_t to) { TD_CHECK(file_.truncate(to).has_value()); }

 private:
  static std::string make_temporary() {
    std::string path = testing::TempDir() + "host_device_test_XXXXXX";
    const int fd = mkstemp(path.data());
    TD_CHECK(fd >= 0);
    close(fd);
    return path;
  }

  std::string path_;
  File file_;
  Mapping mapping_;
};

TEST_F(HostDeviceTest, ATruncatedMappingIsGoneAndTheDeviceLivesOn) {
  auto device = make_host_device(1, 0).value();
  for (const uint64_t left : {uint64_t{0}, kPageBytes, payload_.size() - kPageBytes}) {
    SCOPED_TRACE(left);
    const size_t before = reports_.count();
    MappedPayload mapped(payload_);
    auto load = scatter();
    load.payload = mapped.bytes();
    load.guarded = true;
    auto store = gather();
    store.payload = mapped.bytes();
    store.guarded = true;
    device->submit(&load);
    EXPECT_EQ(reports_.wait_for(before + 1).back(), "scatter ok");
    device->submit(&store);
    EXPECT_EQ(reports_.wait_for(before + 2).back(), "gather ok");

    mapped.truncate(left);
    const auto untouched = memory_.bytes;
    device->submit(&load);
    EXPECT_EQ(reports_.wait_for(before + 3).back(), "scatter gone");
    EXPECT_TRUE(memory_.bytes == untouched);
    device->submit(&store);
    EXPECT_EQ(reports_.wait_for(before + 4).back(), "gather gone");

    auto plain = scatter();
    device->submit(&plain);
    EXPECT_EQ(reports_.wait_for(before + 5).back(), "scatter ok");
  }
}

std::vector<std::string> device_thread_states() {
  std::vector<std::string> states;
  DIR* tasks = opendir("/proc/self/task");
  while (const dirent* task = readdir(tasks)) {
    std::ifstream file(std::string("/proc/self/task/") + task->d_name + "/status");
    std::string status{std::istreambuf_iterator<char>(file), {}};
    if (status.find("Name:\ttd-dev\n") != std::string::npos) states.push_back(std::move(status));
  }
  closedir(tasks);
  return states;
}

TEST(HostDevice, ThreadsCarryItsNameAndTakeNoSignalsOfTheProcess) {
  auto device = make_host_device(3, 0).value();
  const auto blocked_in = [](const std::string& status) {
    return std::stoull(status.substr(status.find("SigBlk:") + 7), nullptr, 16);
  };
  // The C library starts every thread with all signals blocked and sets its mask in its first instructions.
  auto states = device_thread_states();
  for (int tries = 0; tries < 5000; ++tries, states = device_thread_states()) {
    if (std::ranges::none_of(
            states, [&](const auto& status) { return (blocked_in(status) >> (SIGBUS - 1) & 1) != 0; }))
      break;
    usleep(1000);
  }
  ASSERT_EQ(states.size(), 3u);
  for (const std::string& status : states) {
    const auto is_blocked = [blocked = blocked_in(status)](int number) {
      return (blocked >> (number - 1) & 1) != 0;
    };
    for (const int number : {SIGINT, SIGTERM, SIGCHLD, SIGUSR1, SIGALRM, SIGHUP, SIGPROF}) {
      EXPECT_TRUE(is_blocked(number)) << number;
    }
    EXPECT_FALSE(is_blocked(SIGBUS));
    EXPECT_FALSE(is_blocked(SIGSEGV));
  }
  device.reset();
  EXPECT_TRUE(device_thread_states().empty());
}

TEST(HostDevice, TheCallersSignalMaskIsLeftAsItWas) {
  sigset_t before, after;
  pthread_sigmask(SIG_SETMASK, nullptr, &before);
  auto device = make_host_device(1, 0).value();
  pthread_sigmask(SIG_SETMASK, nullptr, &after);
  for (int number = 1; number < 65; ++number)
    EXPECT_EQ(sigismember(&before, number), sigismember(&after, number));
}

TEST(HostDeviceDeathTest, AnImpossibleNumberOfThreadsIsABug) {
  EXPECT_DEATH(make_host_device(0, 0), "check failed");
  EXPECT_DEATH(make_host_device(65, 0), "check failed");
}

}  // namespace
}  // namespace tokendepot::paged_test
