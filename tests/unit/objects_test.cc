// Objects in the caller's memory: what a cache server stores, finds, loads and deletes without a paged cache.
#include <algorithm>
#include <array>
#include <fstream>

#include "depot_fixture.h"

namespace tokendepot::testing {
namespace {

class ObjectsOn : public ::testing::TestWithParam<std::string> {
 protected:
  ObjectsOn() : directory_(GetParam() == "tmpfs" ? "/dev/shm" : "/tmp") { open(); }

  void open(uint64_t capacity = 64 << 20) {
    depot_.reset();
    Options options;
    RootOptions root;
    root.path = directory_.path() + "/root";
    root.capacity_bytes = capacity;
    root.segment_bytes = 1 << 20;
    options.roots.push_back(root);
    options.slab_bytes = 16 << 20;
    options.poll_ms = 20;
    options.free_space_reserve = 0;
    options.scrub_bytes_per_second = 0;  // it would find planted damage before a load does
    auto opened = Depot::open(options);
    ASSERT_TRUE(opened) << opened.error().message;
    depot_ = std::move(*opened);
    ns_ = *depot_->register_namespace(R"({"model":"m"})");
  }
  static Key key(uint8_t id) {
    Key key;
    key.bytes.fill(id);
    return key;
  }
  static std::vector<std::byte> bytes(size_t size, uint32_t seed) {
    std::mt19937 random(seed);
    std::vector<std::byte> out(size);
    for (std::byte& byte : out) byte = static_cast<std::byte>(random());
    return out;
  }
  Completion store(uint8_t id, std::span<std::byte> memory) {
    const Depot::Object object{ns_, key(id), memory};
    EXPECT_TRUE(depot_->submit_store_objects(++job_, {&object, 1}));
    return wait_for(*depot_, job_);
  }
  Completion load(uint8_t id, std::span<std::byte> memory) {
    const Depot::Object object{ns_, key(id), memory};
    EXPECT_TRUE(depot_->submit_load_objects(++job_, {&object, 1}, 10s));
    return wait_for(*depot_, job_);
  }
  bool stored(uint8_t id) {
    const Key wanted = key(id);
    uint8_t found = 0;
    depot_->stored({&wanted, 1}, Depot::object_want(), {&found, 1});
    return found != 0;
  }
  static ItemFailure::Reason reason(const Completion& done) {
    EXPECT_EQ(done.failures.size(), 1u);
    return done.failures.empty() ? ItemFailure::Reason::cancelled : done.failures[0].reason;
  }

  TemporaryDirectory directory_;
  std::unique_ptr<Depot> depot_;
  NamespaceDigest ns_;
  uint64_t job_ = 0;
};

TEST_P(ObjectsOn, AreTheSameBytesAgainAtAnySizeAndAddress) {
  uint8_t id = 0;
  for (const size_t size : {1, 1'000, 4'095, 4'096, 4'097, 65'536, 116'992, 3'098'112}) {
    for (const size_t shift : {0, 1, 511}) {
      auto memory = bytes(size + shift, ++id);
      const auto object = std::span(memory).subspan(shift);
      ASSERT_EQ(store(id, object).items_ok, 1u) << size;
      std::vector<std::byte> out(size + shift + 1, std::byte{0xEE});
      ASSERT_EQ(load(id, std::span(out).subspan(shift, size)).items_ok, 1u) << size;
      EXPECT_TRUE(std::ranges::equal(object, std::span(out).subspan(shift, size))) << size;
      EXPECT_EQ(out.back(), std::byte{0xEE}) << "padding is not written";
    }
  }
}

TEST_P(ObjectsOn, AreThereAfterAReopen) {
  auto memory = bytes(100'000, 1);
  ASSERT_EQ(store(1, memory).items_ok, 1u);
  open();
  EXPECT_TRUE(stored(1));
  std::vector<std::byte> out(memory.size());
  EXPECT_EQ(load(1, out).items_ok, 1u);
  EXPECT_EQ(out, memory);
}

TEST_P(ObjectsOn, AnotherSizeIsAMismatchAndWritesNothing) {
  auto memory = bytes(8'192, 1);
  ASSERT_EQ(store(1, memory).items_ok, 1u);
  for (const size_t size : {4'096, 8'191, 20'000}) {
    std::vector<std::byte> out(size, std::byte{0xEE});
    EXPECT_EQ(reason(load(1, out)), ItemFailure::Reason::mismatch) << size;
    EXPECT_TRUE(std::ranges::all_of(out, [](std::byte byte) { return byte == std::byte{0xEE}; })) << size;
  }
}

TEST_P(ObjectsOn, AnotherNamespaceUnderTheSameKeyIsAMiss) {
  auto memory = bytes(8'192, 1);
  ASSERT_EQ(store(1, memory).items_ok, 1u);
  ns_ = *depot_->register_namespace(R"({"model":"other"})");
  std::vector<std::byte> out(memory.size(), std::byte{0xEE});
  EXPECT_EQ(reason(load(1, out)), ItemFailure::Reason::absent);
  EXPECT_EQ(out[0], std::byte{0xEE});
}

TEST_P(ObjectsOn, AFlippedByteIsAMiss) {
  auto memory = bytes(8'192, 1);
  ASSERT_EQ(store(1, memory).items_ok, 1u);
  depot_.reset();
  for (const auto& entry : std::filesystem::directory_iterator(directory_.path() + "/root/segments")) {
    std::fstream file(entry.path(), std::ios::in | std::ios::out | std::ios::binary);
    std::string content((std::istreambuf_iterator<char>(file)), {});
    const size_t at = content.find(std::string(reinterpret_cast<const char*>(memory.data()), 64));
    if (at == std::string::npos) continue;
    file.clear();
    file.seekp(static_cast<std::streamoff>(at + 20));
    file.put(static_cast<char>(content[at + 20] ^ 1));
  }
  open();
  std::vector<std::byte> out(memory.size(), std::byte{0xEE});
  EXPECT_EQ(reason(load(1, out)), ItemFailure::Reason::corrupt);
  EXPECT_EQ(out[0], std::byte{0xEE});
}

TEST_P(ObjectsOn, WhatIsStoredAtThisSizeIsNotWrittenAgain) {
  auto memory = bytes(100'000, 1);
  EXPECT_GT(store(1, memory).bytes, 0u);
  const Completion again = store(1, memory);
  EXPECT_EQ(again.items_ok, 1u);
  EXPECT_EQ(again.bytes, 0u);
}

TEST_P(ObjectsOn, CondemnedOnesAreGoneForGood) {
  auto memory = bytes(8'192, 1);
  ASSERT_EQ(store(1, memory).items_ok, 1u);
  ASSERT_EQ(store(2, memory).items_ok, 1u);
  const std::array keys = {key(1), key(9)};
  std::array<uint8_t, 2> found{};
  depot_->condemn(keys, Depot::object_want(), found);
  EXPECT_EQ(found, (std::array<uint8_t, 2>{1, 0}));
  EXPECT_FALSE(stored(1));
  open();
  EXPECT_FALSE(stored(1));
  EXPECT_TRUE(stored(2));
}

TEST_P(ObjectsOn, WhatCannotBeKeptFailsAlone) {
  auto small = bytes(4'096, 1);
  std::vector<std::byte> huge(48 << 20);  // a root must hold three segments
  const std::array objects = {Depot::Object{ns_, key(1), huge}, Depot::Object{ns_, key(2), {}},
                              Depot::Object{ns_, key(3), small}};
  ASSERT_TRUE(depot_->submit_store_objects(++job_, objects));
  const Completion done = wait_for(*depot_, job_);
  EXPECT_EQ(done.items_ok, 1u);
  ASSERT_EQ(done.failures.size(), 2u);
  EXPECT_EQ(done.failures[0].reason, ItemFailure::Reason::dropped);
  EXPECT_EQ(done.failures[1].reason, ItemFailure::Reason::mismatch);
  EXPECT_TRUE(stored(3));
}

TEST_P(ObjectsOn, ObjectsOfGrowingSizesFindLargerSegments) {
  for (const size_t size : {100'000, 1'000'000, 3'000'000, 6'000'000}) {
    auto memory = bytes(size, static_cast<uint32_t>(size));
    const auto id = static_cast<uint8_t>(size / 100'000);
    ASSERT_EQ(store(id, memory).items_ok, 1u) << size;
    std::vector<std::byte> out(size);
    EXPECT_EQ(load(id, out).items_ok, 1u) << size;
    EXPECT_EQ(out, memory) << size;
  }
}

INSTANTIATE_TEST_SUITE_P(Media, ObjectsOn, ::testing::Values("tmpfs", "disk"),
                         [](const auto& medium) { return medium.param; });

}  // namespace
}  // namespace tokendepot::testing
