#include "tokendepot/plan.h"

#include <gtest/gtest.h>

#include "damage.h"

namespace tokendepot {
namespace {

using damage::Bytes;

std::vector<int32_t> random_blocks(damage::Random& random, uint64_t least, int32_t lowest) {
  std::vector<int32_t> blocks(random.number(least, 40));
  for (int32_t& block : blocks) block = static_cast<int32_t>(random.number(0, 1u << 30)) + lowest;
  return blocks;
}

LoadPlan random_load(damage::Random& random, size_t items) {
  LoadPlan plan;
  plan.ns = random.digest<NamespaceDigest>();
  plan.deadline_ns = random.any<uint64_t>();
  for (size_t i = 0; i < items; ++i) {
    LoadItem item;
    item.key = random.digest<Key>();
    item.chunk = random.any<uint32_t>();
    item.group = random.any<uint16_t>();
    item.kind = random.number(0, 1) == 0 ? LayoutKind::canonical : LayoutKind::opaque;
    item.part = random.part();
    item.tokens = static_cast<uint32_t>(random.number(1, 1 << 20));
    item.where = {.segment = {.writer = random.any<uint64_t>(), .sequence = random.any<uint32_t>()},
                  .offset = random.number(0, 1ull << 40) * kPageBytes,
                  .bytes = random.number(1, 1ull << 20) * kPageBytes};
    item.blocks = random_blocks(random, 0, kSkipBlock);
    plan.items.push_back(item);
  }
  return plan;
}

StorePlan random_store(damage::Random& random, size_t items) {
  StorePlan plan;
  plan.ns = random.digest<NamespaceDigest>();
  for (size_t i = 0; i < items; ++i) {
    StoreItem item;
    item.key = random.digest<Key>();
    item.chunk = random.any<uint32_t>();
    item.group = random.any<uint16_t>();
    item.blocks = random_blocks(random, 0, 0);
    plan.items.push_back(item);
  }
  return plan;
}

TEST(LoadPlanTest, what_is_sent_arrives) {
  damage::Random random(20);
  for (int round = 0; round < 200; ++round) {
    const LoadPlan plan = random_load(random, random.number(0, 20));
    const Bytes bytes = encode(plan);
    const auto read = decode_load_plan(bytes);
    ASSERT_TRUE(read.has_value()) << read.error().message;
    EXPECT_EQ(read->ns, plan.ns);
    EXPECT_EQ(read->deadline_ns, plan.deadline_ns);
    ASSERT_EQ(read->items.size(), plan.items.size());
    for (size_t i = 0; i < plan.items.size(); ++i) {
      EXPECT_EQ(read->items[i].key, plan.items[i].key);
      EXPECT_EQ(read->items[i].chunk, plan.items[i].chunk);
      EXPECT_EQ(read->items[i].group, plan.items[i].group);
      EXPECT_EQ(read->items[i].kind, plan.items[i].kind);
      EXPECT_EQ(read->items[i].part, plan.items[i].part);
      EXPECT_EQ(read->items[i].tokens, plan.items[i].tokens);
      EXPECT_EQ(read->items[i].where, plan.items[i].where);
      EXPECT_EQ(read->items[i].blocks, plan.items[i].blocks);
    }
  }
}

TEST(StorePlanTest, what_is_sent_arrives) {
  damage::Random random(21);
  for (int round = 0; round < 200; ++round) {
    const StorePlan plan = random_store(random, random.number(0, 20));
    const auto read = decode_store_plan(encode(plan));
    ASSERT_TRUE(read.has_value()) << read.error().message;
    EXPECT_EQ(read->ns, plan.ns);
    ASSERT_EQ(read->items.size(), plan.items.size());
    for (size_t i = 0; i < plan.items.size(); ++i) {
      EXPECT_EQ(read->items[i].key, plan.items[i].key);
      EXPECT_EQ(read->items[i].chunk, plan.items[i].chunk);
      EXPECT_EQ(read->items[i].group, plan.items[i].group);
      EXPECT_EQ(read->items[i].blocks, plan.items[i].blocks);
    }
  }
}

TEST(PlanTest, every_changed_byte_is_seen) {
  damage::Random random(22);
  damage::expect_every_changed_byte_is_seen(encode(random_load(random, 3)),
                                            [](const Bytes& b) { return decode_load_plan(b); });
  damage::expect_every_changed_byte_is_seen(encode(random_store(random, 3)),
                                            [](const Bytes& b) { return decode_store_plan(b); });
}

TEST(PlanTest, every_shortened_plan_is_seen) {
  damage::Random random(23);
  damage::expect_every_shortened_copy_is_seen(encode(random_load(random, 3)),
                                              [](const Bytes& b) { return decode_load_plan(b); });
  damage::expect_every_shortened_copy_is_seen(encode(random_store(random, 3)),
                                              [](const Bytes& b) { return decode_store_plan(b); });
}

TEST(PlanTest, a_load_plan_is_not_a_store_plan) {
  damage::Random random(24);
  EXPECT_EQ(decode_store_plan(encode(random_load(random, 1))).error().kind, ErrorKind::corrupt);
  EXPECT_EQ(decode_load_plan(encode(random_store(random, 1))).error().kind, ErrorKind::corrupt);
}

TEST(PlanTest, another_version_is_unsupported) {
  damage::Random random(25);
  Bytes bytes = encode(random_load(random, 1));
  damage::set<uint32_t>(bytes, 8, 2);
  damage::reseal(bytes);
  EXPECT_EQ(decode_load_plan(bytes).error().kind, ErrorKind::unsupported);
}

TEST(PlanTest, counts_larger_than_the_bytes_are_refused_before_memory_is_taken) {
  damage::Random random(26);
  for (const uint32_t count : {4u, 1000u, 0x7fffffffu, 0xffffffffu}) {
    Bytes items = encode(random_load(random, 3));
    damage::set(items, 12, count);
    damage::reseal(items);
    EXPECT_FALSE(decode_load_plan(items).has_value()) << count;

    Bytes stores = encode(random_store(random, 3));
    damage::set(stores, 12, count);
    damage::reseal(stores);
    EXPECT_FALSE(decode_store_plan(stores).has_value()) << count;

    Bytes blocks = encode(random_load(random, 1));
    damage::set(blocks, 56 + 80, count);
    damage::reseal(blocks);
    const uint64_t fitting = (blocks.size() - 56 - 84 - 8) / 4;
    EXPECT_EQ(decode_load_plan(blocks).has_value(), count == fitting) << count;
  }
}

TEST(PlanTest, fewer_items_than_bytes_are_refused) {
  damage::Random random(27);
  Bytes bytes = encode(random_store(random, 3));
  damage::set<uint32_t>(bytes, 12, 2);
  damage::reseal(bytes);
  EXPECT_FALSE(decode_store_plan(bytes).has_value());
}

TEST(LoadPlanTest, fields_lie_where_the_format_says) {
  damage::Random random(28);
  LoadPlan plan = random_load(random, 1);
  LoadItem& item = plan.items[0];
  item.blocks = {5, kSkipBlock};
  const Bytes bytes = encode(plan);
  using damage::get;
  ASSERT_EQ(bytes.size(), 56u + 84 + 8 + 8);
  EXPECT_EQ(std::memcmp(bytes.data(), "TDLOADPL", 8), 0);
  EXPECT_EQ(get<uint32_t>(bytes, 8), 1u);
  EXPECT_EQ(get<uint32_t>(bytes, 12), 1u);
  EXPECT_EQ(std::memcmp(bytes.data() + 16, plan.ns.bytes.data(), 32), 0);
  EXPECT_EQ(get<uint64_t>(bytes, 48), plan.deadline_ns);
  EXPECT_EQ(std::memcmp(bytes.data() + 56, item.key.bytes.data(), 32), 0);
  EXPECT_EQ(get<uint32_t>(bytes, 56 + 32), item.chunk);
  EXPECT_EQ(get<uint16_t>(bytes, 56 + 36), item.group);
  EXPECT_EQ(get<uint8_t>(bytes, 56 + 38), static_cast<uint8_t>(item.kind));
  EXPECT_EQ(get<uint16_t>(bytes, 56 + 40), item.part.layer_begin);
  EXPECT_EQ(get<uint16_t>(bytes, 56 + 46), item.part.head_end);
  EXPECT_EQ(get<uint32_t>(bytes, 56 + 48), item.tokens);
  EXPECT_EQ(get<uint32_t>(bytes, 56 + 52), item.where.segment.sequence);
  EXPECT_EQ(get<uint64_t>(bytes, 56 + 56), item.where.segment.writer);
  EXPECT_EQ(get<uint64_t>(bytes, 56 + 64), item.where.offset);
  EXPECT_EQ(get<uint64_t>(bytes, 56 + 72), item.where.bytes);
  EXPECT_EQ(get<uint32_t>(bytes, 56 + 80), 2u);
  EXPECT_EQ(get<int32_t>(bytes, 56 + 84), 5);
  EXPECT_EQ(get<int32_t>(bytes, 56 + 88), -1);
}

TEST(StorePlanTest, fields_lie_where_the_format_says) {
  damage::Random random(29);
  StorePlan plan = random_store(random, 1);
  StoreItem& item = plan.items[0];
  item.blocks = {7};
  const Bytes bytes = encode(plan);
  using damage::get;
  ASSERT_EQ(bytes.size(), 56u + 44 + 4 + 8);
  EXPECT_EQ(std::memcmp(bytes.data(), "TDSTORPL", 8), 0);
  EXPECT_EQ(std::memcmp(bytes.data() + 56, item.key.bytes.data(), 32), 0);
  EXPECT_EQ(get<uint32_t>(bytes, 56 + 32), item.chunk);
  EXPECT_EQ(get<uint16_t>(bytes, 56 + 36), item.group);
  EXPECT_EQ(get<uint32_t>(bytes, 56 + 40), 1u);
  EXPECT_EQ(get<int32_t>(bytes, 56 + 44), 7);
}

template <typename Change>
void expect_refused(Change change) {
  damage::Random random(30);
  LoadPlan plan = random_load(random, 2);
  plan.items[1].blocks = {1, 2, 3};
  ASSERT_TRUE(decode_load_plan(encode(plan)).has_value());
  change(plan.items[1]);
  const auto read = decode_load_plan(encode(plan));
  ASSERT_FALSE(read.has_value());
  EXPECT_EQ(read.error().kind, ErrorKind::corrupt);
}

TEST(LoadPlanTest, an_item_that_no_scheduler_sends_is_refused) {
  expect_refused([](LoadItem& item) { item.blocks[2] = -2; });
  expect_refused([](LoadItem& item) { item.kind = static_cast<LayoutKind>(3); });
  expect_refused([](LoadItem& item) { item.part.layer_end = item.part.layer_begin; });
  expect_refused([](LoadItem& item) { item.part.head_end = item.part.head_begin; });
  expect_refused([](LoadItem& item) { item.tokens = 0; });
  expect_refused([](LoadItem& item) { item.tokens = (1u << 20) + 1; });
  expect_refused([](LoadItem& item) { item.where.offset += 1; });
  expect_refused([](LoadItem& item) { item.where.offset = ~uint64_t{4095}; });
  expect_refused([](LoadItem& item) { item.where.bytes += 512; });
  expect_refused([](LoadItem& item) { item.where.bytes = 0; });
  expect_refused([](LoadItem& item) { item.where.bytes = ~uint64_t{4095}; });
}

TEST(StorePlanTest, a_skipped_block_is_refused) {
  damage::Random random(31);
  StorePlan plan = random_store(random, 1);
  plan.items[0].blocks = {3, kSkipBlock};
  EXPECT_EQ(decode_store_plan(encode(plan)).error().kind, ErrorKind::corrupt);
}

}  // namespace
}  // namespace tokendepot
