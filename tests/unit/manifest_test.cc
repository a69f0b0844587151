#include "format/manifest.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "base/sha256.h"

namespace tokendepot {
namespace {

using ::testing::HasSubstr;

std::string canonical(std::string_view json) {
  const auto manifest = make_manifest(json);
  EXPECT_TRUE(manifest.has_value()) << manifest.error().message;
  return manifest ? manifest->canonical : "";
}

void expect_refused(std::string_view json, const std::string& why) {
  const auto manifest = make_manifest(json);
  ASSERT_FALSE(manifest.has_value()) << json.substr(0, 80);
  EXPECT_EQ(manifest.error().kind, ErrorKind::invalid_argument);
  EXPECT_THAT(manifest.error().message, HasSubstr(why));
}

TEST(ManifestTest, the_same_object_written_differently_is_one_namespace) {
  const auto a = make_manifest(R"({"b": [1.0, "\u00e4"], "a": 1})");
  const auto b = make_manifest("\n{ \"a\" :1,\t\"b\":[1.0,\"\xc3\xa4\"]}\r\n");
  ASSERT_TRUE(a && b);
  EXPECT_EQ(a->canonical, "{\"a\":1,\"b\":[1.0,\"\xc3\xa4\"]}");
  EXPECT_EQ(a->canonical, b->canonical);
  EXPECT_EQ(a->digest, b->digest);
  EXPECT_EQ(to_hex(a->digest.bytes), "446c477148ea72c482e4947c0edd4b9a260f01ae26f53d8ae3a378fdbd049b06");
}

TEST(ManifestTest, canonical_form_is_its_own_canonical_form) {
  for (const std::string_view json :
       {R"({})", R"({"z":{"y":{"x":[]}},"a":[null,true,false,-0.0,1e-7,1e300,18446744073709551615]})",
        R"({"\u0000":"\ud83d\ude00\n\"\\\/","":""})", R"({"A":1,"a":2,"Z":3,"\u00e4":4})"}) {
    const std::string once = canonical(json);
    EXPECT_EQ(canonical(once), once);
  }
}

TEST(ManifestTest, numbers_and_escapes_have_one_form) {
  EXPECT_EQ(canonical("{\"v\":[1e22,1E-7,100.00,1e5,0.0001,0.00001,1e14,1e15,-0,7]}"),
            "{\"v\":[1e+22,1e-07,100.0,100000.0,0.0001,1e-05,100000000000000.0,1e+15,0,7]}");
  EXPECT_EQ(canonical(R"({"v":"\u0001\u0008\u001f\u007f\/\u0022"})"),
            "{\"v\":\"\\u0001\\b\\u001f\x7f/\\\"\"}");
}

TEST(ManifestTest, key_order_never_matters) {
  std::vector<std::string> members = {R"("model":"m")", R"("dtype":"bf16")", R"("layers":32)",
                                      R"("rope":{"b":1,"a":2})", R"("chunk_tokens":256)"};
  std::mt19937_64 random(40);
  std::set<std::string> forms;
  for (int round = 0; round < 50; ++round) {
    std::ranges::shuffle(members, random);
    std::string json = "{";
    for (const std::string& member : members) json += (json.size() > 1 ? "," : "") + member;
    forms.insert(canonical(json + "}"));
  }
  EXPECT_EQ(forms.size(), 1u);
}

TEST(ManifestTest, values_that_differ_in_type_or_last_digit_are_different_namespaces) {
  std::set<std::string> forms;
  for (const char* value : {"1", "1.0", "\"1\"", "true", "null", "[1]", "-1", "9007199254740992",
                            "9007199254740993", "9007199254740992.0", "0.1", "0.10000000000000002",
                            "18446744073709551615", "-9223372036854775808", "0.0", "-0.0"}) {
    forms.insert(canonical(std::string("{\"v\":") + value + "}"));
  }
  EXPECT_EQ(forms.size(), 16u);
}

TEST(ManifestTest, a_cache_dtype_is_part_of_the_identity) {
  std::set<std::string> digests;
  for (const char* dtype : {"float16", "bfloat16", "fp8_e4m3", "fp8_e5m2", "fp8"}) {
    const auto manifest = make_manifest(std::string(R"({"model":"m","dtype":")") + dtype + "\"}");
    ASSERT_TRUE(manifest.has_value());
    digests.insert(to_hex(manifest->digest.bytes));
  }
  EXPECT_EQ(digests.size(), 5u);
}

TEST(ManifestTest, a_key_given_twice_is_refused_at_any_depth) {
  expect_refused(R"({"a":1,"b":2,"a":1})", "key \"a\" twice");
  expect_refused(R"({"x":[{"a":1,"\u0061":2}]})", "key \"a\" twice");
  EXPECT_EQ(canonical(R"({"a":{"a":{"a":1}},"b":{"a":1}})"), R"({"a":{"a":{"a":1}},"b":{"a":1}})");
}

TEST(ManifestTest, an_integer_that_would_be_rounded_is_refused) {
  expect_refused(R"({"v":18446744073709551616})", "18446744073709551616");
  expect_refused(R"({"v":-9223372036854775809})", "-9223372036854775809");
}

TEST(ManifestTest, what_is_not_an_object_is_refused_by_its_type) {
  expect_refused("[]", "array");
  expect_refused("\"x\"", "string");
  expect_refused("1", "number");
  expect_refused("null", "null");
}

TEST(ManifestTest, what_is_not_json_is_refused_with_the_place) {
  for (const char* json : {"", "{", "{\"a\":}", "{\"a\":1}x", "{'a':1}", "{\"a\":NaN}", "{\"a\":1e999}",
                           "{\"a\":01}", "{\"a\":1,}", "\xff", "{\"a\":\"\xff\"}", "{\"a\":\"\\ud800\"}",
                           "{\"a\":\"\xed\xa0\x80\"}", "{\"a\":\"\n\"}", "// x\n{}"}) {
    expect_refused(json, "not JSON from byte");
  }
}

TEST(ManifestTest, a_cut_through_a_long_repeated_key_leaves_a_readable_message) {
  std::string key;
  for (int i = 0; i < 200; ++i) key += "\xc3\xa4";
  const auto manifest = make_manifest("{\"" + key + "\":1,\"" + key + "\":2}");
  ASSERT_FALSE(manifest.has_value());
  EXPECT_LT(manifest.error().message.size(), 200u);
  EXPECT_TRUE(std::ranges::all_of(manifest.error().message, [](char c) { return c >= 0x20 && c < 0x7f; }));
}

TEST(ManifestTest, nesting_ends_at_64) {
  const auto nested = [](size_t depth) {
    return "{\"a\":" + std::string(depth - 1, '[') + std::string(depth - 1, ']') + "}";
  };
  EXPECT_TRUE(make_manifest(nested(64)).has_value());
  expect_refused(nested(65), "deeper than 64");
  expect_refused("{\"a\":" + std::string(500'000, '['), "deeper than 64");
}

TEST(ManifestTest, size_ends_at_one_mebibyte) {
  const auto sized = [](size_t bytes) { return "{\"a\":\"" + std::string(bytes - 8, 'x') + "\"}"; };
  EXPECT_TRUE(make_manifest(sized(1 << 20)).has_value());
  expect_refused(sized((1 << 20) + 1), "1048577 bytes");
}

TEST(StoredManifestTest, what_was_stored_is_accepted_under_its_digest_only) {
  const auto manifest = make_manifest(R"({"model":"m","layers":3})");
  ASSERT_TRUE(manifest.has_value());
  const auto read = check_manifest(manifest->canonical, manifest->digest);
  ASSERT_TRUE(read.has_value());
  EXPECT_EQ(read->canonical, manifest->canonical);
  EXPECT_EQ(read->digest, manifest->digest);
  EXPECT_EQ(check_manifest(manifest->canonical, NamespaceDigest{}).error().kind, ErrorKind::corrupt);
}

TEST(StoredManifestTest, every_changed_byte_and_every_shortened_file_is_seen) {
  const auto manifest = make_manifest(R"({"model":"m","layers":3,"rope":{"theta":1e6}})");
  ASSERT_TRUE(manifest.has_value());
  const std::string& good = manifest->canonical;
  for (size_t at = 0; at < good.size(); ++at) {
    for (int mask = 1; mask < 256; ++mask) {
      std::string bad = good;
      bad[at] = static_cast<char>(bad[at] ^ mask);
      ASSERT_FALSE(check_manifest(bad, manifest->digest).has_value()) << at;
    }
    ASSERT_FALSE(check_manifest(good.substr(0, at), manifest->digest).has_value()) << at;
  }
  EXPECT_FALSE(check_manifest(good + "\n", manifest->digest).has_value());
}

TEST(StoredManifestTest, text_that_is_not_canonical_is_refused_though_its_digest_is_right) {
  const std::string stored = R"({"b":1, "a":2})";
  EXPECT_EQ(check_manifest(stored, NamespaceDigest{sha256(stored)}).error().kind, ErrorKind::corrupt);
}

}  // namespace
}  // namespace tokendepot
