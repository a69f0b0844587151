#include "tokendepot/key.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "format/manifest.h"

namespace tokendepot {
namespace {

using Tokens = std::vector<uint32_t>;

NamespaceDigest counting_namespace() {
  NamespaceDigest ns;
  std::iota(ns.bytes.begin(), ns.bytes.end(), uint8_t{0});
  return ns;
}

std::vector<Key> keys_of(const Tokens& tokens, uint32_t chunk_tokens, std::string_view salt = {},
                         std::string_view lora = {}, const std::vector<MediaSpan>& media = {},
                         const NamespaceDigest& ns = counting_namespace()) {
  KeyChain chain(ns, chunk_tokens, salt, lora);
  chain.append(tokens, media);
  return chain.keys();
}

Tokens counting(uint32_t count) {
  Tokens tokens(count);
  std::iota(tokens.begin(), tokens.end(), 0u);
  return tokens;
}

size_t matched(const std::vector<Key>& stored, const std::vector<Key>& asked) {
  return static_cast<size_t>(std::ranges::mismatch(stored, asked).in1 - stored.begin());
}

// Computed apart from this code, by the text of docs/format.md.
TEST(KeyChainTest, known_prompts_have_the_documented_keys) {
  const std::vector<Key> plain = keys_of({0, 1, 2, 3, 4, 5, 6, 0xffffffff}, 4);
  ASSERT_EQ(plain.size(), 2u);
  EXPECT_EQ(to_hex(plain[0].bytes), "9042001fd4171e3d07043769dcd26fa03685417d40e036b1159ed596b228f8d4");
  EXPECT_EQ(to_hex(plain[1].bytes), "1d0d244c509ab817ff231c74b32e28647374e7fa4295a42da09076a05288307c");
  const std::vector<MediaSpan> media = {{"image-b", 7, 1}, {"image-a", 2, 4}};
  const std::vector<Key> extras = keys_of(counting(8), 4, "salt", "lora@d1", media);
  ASSERT_EQ(extras.size(), 2u);
  EXPECT_EQ(to_hex(extras[0].bytes), "deb9d61f25e2fa47e1dc798ca0702ce874587d260a8a449a4b2afd29126d2c05");
  EXPECT_EQ(to_hex(extras[1].bytes), "4c6c37dbe29392d7bf58685242da70f0c891d1f0cd6005847177f3baa50e73e4");
}

TEST(KeyChainTest, only_full_chunks_have_keys) {
  for (uint32_t count = 0; count < 40; ++count) {
    KeyChain chain(counting_namespace(), 16);
    chain.append(counting(count));
    EXPECT_EQ(chain.keys().size(), count / 16);
    EXPECT_EQ(chain.tokens_seen(), count);
  }
}

TEST(KeyChainTest, a_changed_token_ends_the_match_before_its_chunk_also_at_the_edges) {
  const Tokens stored = counting(48);
  const std::map<size_t, size_t> tokens_matched = {{0, 0}, {15, 0}, {16, 16}, {31, 16}, {32, 32}, {47, 32}};
  for (const auto& [changed, expected] : tokens_matched) {
    Tokens asked = stored;
    asked[changed] += 1000;
    EXPECT_EQ(matched(keys_of(stored, 16), keys_of(asked, 16)) * 16, expected) << changed;
  }
  EXPECT_EQ(matched(keys_of(stored, 16), keys_of(stored, 16)), 3u);
}

TEST(KeyChainTest, tokens_that_differ_in_width_sign_or_order_only_have_different_keys) {
  std::set<Key> keys;
  const std::vector<Tokens> prompts = {{1, 256},        {256, 1},   {65537, 0}, {1, 0}, {0x7fffffff, 0},
                                       {0xffffffff, 0}, {0, 65537}, {0, 1},     {0, 0}};
  for (const Tokens& prompt : prompts) keys.insert(keys_of(prompt, 2).at(0));
  EXPECT_EQ(keys.size(), prompts.size());
}

TEST(KeyChainTest, a_prompt_has_the_same_keys_however_it_arrives) {
  std::mt19937_64 random(50);
  Tokens tokens(3000);
  for (uint32_t& token : tokens) token = static_cast<uint32_t>(random());
  std::vector<std::string> hashes;
  for (int i = 0; i < 20; ++i) hashes.push_back("hash " + std::to_string(random()));
  std::vector<MediaSpan> media;
  for (const std::string& hash : hashes) media.push_back({hash, random() % 3000, random() % 200});
  const std::vector<Key> expected = keys_of(tokens, 64, "s", "l", media);
  ASSERT_EQ(expected.size(), 46u);
  for (int round = 0; round < 50; ++round) {
    KeyChain chain(counting_namespace(), 64, "s", "l");
    std::span<const uint32_t> rest = tokens;
    while (!rest.empty()) {
      const size_t taken = std::min<size_t>(random() % 200, rest.size());
      std::ranges::shuffle(media, random);
      chain.append(rest.first(taken), media);
      rest = rest.subspan(taken);
    }
    ASSERT_EQ(chain.keys(), expected);
  }
}

TEST(KeyChainTest, a_copy_goes_its_own_way) {
  KeyChain first(counting_namespace(), 4);
  first.append(Tokens{1, 2, 3});
  KeyChain second = first;
  first.append(Tokens{4});
  second.append(Tokens{5});
  EXPECT_EQ(first.keys(), keys_of({1, 2, 3, 4}, 4));
  EXPECT_EQ(second.keys(), keys_of({1, 2, 3, 5}, 4));
}

TEST(KeyChainTest, namespaces_that_differ_in_the_cache_dtype_share_no_key) {
  std::set<Key> keys;
  for (const char* dtype : {"float16", "bfloat16", "fp8_e4m3", "fp8_e5m2"}) {
    const auto manifest = make_manifest(std::string(R"({"dtype":")") + dtype + "\"}");
    ASSERT_TRUE(manifest.has_value());
    for (const Key& key : keys_of(counting(32), 16, {}, {}, {}, manifest->digest)) keys.insert(key);
  }
  EXPECT_EQ(keys.size(), 8u);
}

TEST(KeyChainTest, a_salt_hits_itself_only_and_an_empty_one_is_none) {
  const std::string hex(64, 'f');
  const std::vector<std::string_view> salts = {{}, "", "a", "b", "a@b", hex};
  for (size_t writer = 0; writer < salts.size(); ++writer) {
    for (size_t reader = 0; reader < salts.size(); ++reader) {
      const size_t hits =
          matched(keys_of(counting(512), 256, salts[writer]), keys_of(counting(512), 256, salts[reader]));
      const bool same = salts[writer] == salts[reader];
      EXPECT_EQ(hits, same ? 2u : 0u) << writer << " " << reader;
    }
  }
}

TEST(KeyChainTest, salt_and_adapter_are_never_taken_for_each_other) {
  const std::vector<std::pair<std::string, std::string>> owners = {
      {"", ""},
      {"ab", "c"},
      {"a", "bc"},
      {"abc", ""},
      {"", "abc"},
      {"c", "ab"},
      {std::string(1, '\0'), ""},
      {"", std::string(1, '\0')},
      {std::string(8, '\0'), std::string(8, '\0')},
      {std::string(16, '\0'), ""}};
  std::set<Key> keys;
  for (const auto& [salt, lora] : owners) keys.insert(keys_of(counting(16), 16, salt, lora).at(0));
  EXPECT_EQ(keys.size(), owners.size());
}

TEST(KeyChainMediaTest, a_thousand_images_behind_equal_placeholders_share_no_key) {
  const Tokens placeholders(576, 32000);
  std::set<Key> keys;
  std::mt19937_64 random(51);
  for (int i = 0; i < 1024; ++i) {
    std::string hash(32, '\0');
    for (char& c : hash) c = static_cast<char>(random());
    const std::vector<MediaSpan> media = {{hash, 0, 576}};
    for (const Key& key : keys_of(placeholders, 192, {}, {}, media)) keys.insert(key);
  }
  EXPECT_EQ(keys.size(), 3u * 1024);
}

TEST(KeyChainMediaTest, hashes_that_differ_in_the_last_byte_only_differ) {
  const std::string a = std::string(63, 'x') + "a";
  const std::string b = std::string(63, 'x') + "b";
  EXPECT_NE(keys_of(counting(16), 16, {}, {}, {{a, 0, 8}}), keys_of(counting(16), 16, {}, {}, {{b, 0, 8}}));
}

TEST(KeyChainMediaTest, the_same_image_hits_at_the_same_place_and_misses_one_token_later) {
  const Tokens tokens(64, 7);
  const auto at = [&](uint64_t place) { return keys_of(tokens, 32, {}, {}, {{"image", place, 8}}); };
  EXPECT_EQ(at(4), at(4));
  EXPECT_NE(at(4)[0], at(5)[0]);
  EXPECT_NE(at(30)[0], at(31)[0]);
  EXPECT_NE(at(30)[1], at(31)[1]);
}

TEST(KeyChainMediaTest, two_images_in_swapped_order_miss) {
  const Tokens tokens(64, 7);
  EXPECT_NE(keys_of(tokens, 64, {}, {}, {{"one", 0, 16}, {"two", 16, 16}}),
            keys_of(tokens, 64, {}, {}, {{"two", 0, 16}, {"one", 16, 16}}));
}

TEST(KeyChainMediaTest, an_image_counts_in_every_chunk_that_it_fills_and_in_none_before) {
  const Tokens tokens(64, 7);
  const std::vector<Key> none = keys_of(tokens, 16);
  const std::vector<Key> one = keys_of(tokens, 16, {}, {}, {{"one", 31, 18}});
  const std::vector<Key> two = keys_of(tokens, 16, {}, {}, {{"two", 31, 18}});
  EXPECT_EQ(matched(none, one), 1u);
  EXPECT_EQ(matched(one, two), 1u);
  // The length counts before the end is seen: a cut image is another image.
  EXPECT_NE(keys_of(tokens, 16, {}, {}, {{"one", 0, 64}})[0],
            keys_of(tokens, 16, {}, {}, {{"one", 0, 63}})[0]);
}

TEST(KeyChainMediaTest, an_image_that_ends_where_a_chunk_begins_is_not_of_that_chunk) {
  const Tokens tokens(32, 7);
  KeyChain with(counting_namespace(), 16);
  with.append(std::span(tokens).first(16));
  KeyChain without = with;
  with.append(std::span(tokens).last(16),
              std::vector<MediaSpan>{{"one", 4, 12}, {"two", 32, 5}, {"none", 20, 0}});
  without.append(std::span(tokens).last(16));
  EXPECT_EQ(with.keys(), without.keys());
}

TEST(KeyChainMediaTest, a_span_to_the_end_of_all_numbers_is_taken_as_it_is) {
  const Tokens tokens(32, 7);
  const uint64_t huge = ~uint64_t{0};
  const std::vector<Key> endless = keys_of(tokens, 16, {}, {}, {{"one", 1, huge}});
  EXPECT_NE(endless, keys_of(tokens, 16));
  EXPECT_NE(endless, keys_of(tokens, 16, {}, {}, {{"one", 1, huge - 1}}));
  EXPECT_EQ(keys_of(tokens, 16, {}, {}, {{"one", huge, huge}}), keys_of(tokens, 16));
}

TEST(HexTest, bytes_become_two_lower_case_digits_each) {
  Key key;
  key.bytes[0] = 0x0f;
  key.bytes[31] = 0xa0;
  EXPECT_EQ(to_hex(key.bytes), "0f" + std::string(60, '0') + "a0");
}

TEST(KeyChainDeathTest, a_chunk_of_no_tokens_is_a_bug) {
  EXPECT_DEATH(KeyChain(counting_namespace(), 0), "check failed");
}

}  // namespace
}  // namespace tokendepot
