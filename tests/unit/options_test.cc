#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <string>

#include "tokendepot/depot.h"

namespace tokendepot {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

std::string with_root(const std::string& more) {
  return R"({"roots":["/var/lib/depot?capacity=8GiB"])" + (more.empty() ? "" : "," + more) + "}";
}

std::string refusal_of(const std::string& json) {
  const auto options = parse_options(json);
  if (options) return "accepted: " + to_json(*options);
  EXPECT_EQ(options.error().kind, ErrorKind::invalid_argument);
  EXPECT_THAT(options.error().message, Not(HasSubstr("\n")));
  return options.error().message;
}

std::string refusal_of_root(const std::string& root) {
  return refusal_of(R"({"roots":[)" + root + "]}");
}

TEST(ParseOptions, OneRootIsEnoughAndTheRestHasDefaults) {
  const auto options = parse_options(R"({"roots":["/dev/shm/depot?capacity=8GiB"]})");
  ASSERT_TRUE(options) << options.error().message;
  ASSERT_EQ(options->roots.size(), 1u);
  EXPECT_EQ(options->roots[0].path, "/dev/shm/depot");
  EXPECT_EQ(options->roots[0].capacity_bytes, 8ull << 30);
  EXPECT_EQ(options->roots[0].segment_bytes, 0u);
  EXPECT_EQ(options->roots[0].transport, TransportChoice::automatic);
  EXPECT_FALSE(options->roots[0].read_only);
  EXPECT_TRUE(options->catalog);
  EXPECT_TRUE(options->writer);
  EXPECT_EQ(options->slab_bytes, Options{}.slab_bytes);
}

TEST(ParseOptions, AStringAndAnObjectSayTheSame) {
  const auto text = parse_options(
      R"({"roots":["/a?capacity=1GiB&segment=64MiB&transport=direct&io=uring&read_only=true"]})");
  const auto object = parse_options(
      R"({"roots":[{"path":"/a","capacity":1073741824,"segment":"64 MiB","transport":"direct","io":"uring","read_only":true}]})");
  ASSERT_TRUE(text) << text.error().message;
  ASSERT_TRUE(object) << object.error().message;
  EXPECT_EQ(to_json(*text), to_json(*object));
  EXPECT_EQ(text->roots[0].segment_bytes, 64ull << 20);
  EXPECT_EQ(text->roots[0].transport, TransportChoice::direct);
  EXPECT_EQ(text->roots[0].io, IoChoice::uring);
  EXPECT_TRUE(text->roots[0].read_only);
}

TEST(ParseOptions, RequireGdsIsForRootsOnCuFile) {
  const auto options =
      parse_options(R"({"roots":["/a?capacity=1GiB&transport=gds&require_gds=true","/b?capacity=1GiB"]})");
  ASSERT_TRUE(options) << options.error().message;
  EXPECT_EQ(options->roots[0].transport, TransportChoice::gds);
  EXPECT_TRUE(options->roots[0].require_gds);
  EXPECT_FALSE(options->roots[1].require_gds);
  EXPECT_EQ(to_json(*parse_options(to_json(*options))), to_json(*options));
  EXPECT_THAT(refusal_of_root(R"("/a?capacity=1GiB&transport=direct&require_gds=true")"),
              AllOf(HasSubstr("roots[0].require_gds"), HasSubstr("\"transport\": \"gds\"")));
  EXPECT_THAT(refusal_of_root(R"("/a?capacity=1GiB&transport=gds&require_gds=1")"),
              HasSubstr("true or false"));
}

TEST(ParseOptions, WhatIsSaidOfTheNextRootWantsOne) {
  const auto options = parse_options(
      R"({"roots":["/r?capacity=1GiB&read_only=true","/a?capacity=1GiB&write_through=true&demotion_lag=64MiB&reads_at_once=8MiB","/b?capacity=1GiB&reads_at_once=auto"]})");
  ASSERT_TRUE(options) << options.error().message;
  EXPECT_TRUE(options->roots[1].write_through);
  EXPECT_EQ(options->roots[1].demotion_lag_bytes, 64ull << 20);
  EXPECT_EQ(options->roots[1].reads_at_once_bytes, 8ull << 20);
  EXPECT_EQ(options->roots[2].reads_at_once_bytes, 0u);
  EXPECT_EQ(to_json(*parse_options(to_json(*options))), to_json(*options));
  const auto refused = [](const char* roots) {
    return refusal_of(std::string(R"({"roots":)") + roots + "}");
  };
  const char* const allowed = "only on the first root that is not read_only, with another such root after it";
  for (const char* roots :
       {R"(["/a?capacity=1GiB&write_through=true"])", R"(["/a?capacity=1GiB&demotion_lag=64MiB"])",
        R"(["/a?capacity=1GiB&write_through=true","/b?capacity=1GiB&read_only=true"])",
        R"(["/a?capacity=1GiB&write_through=true&read_only=true","/b?capacity=1GiB"])",
        R"(["/a?capacity=1GiB","/b?capacity=1GiB&write_through=true","/c?capacity=1GiB"])",
        R"(["/a?capacity=1GiB",{"path":"/b","capacity":"1GiB","demotion_lag":"64MiB"}])"}) {
    EXPECT_THAT(refused(roots), HasSubstr(allowed)) << roots;
  }
  EXPECT_THAT(refusal_of_root(R"("/a?capacity=1GiB&write_through=1")"), HasSubstr("true or false"));
  EXPECT_THAT(refusal_of_root(R"("/a?capacity=1GiB&demotion_lag=1MiB")"), HasSubstr("from three segments"));
  EXPECT_THAT(refusal_of_root(R"("/a?capacity=1GiB&demotion_lag=2GiB")"), HasSubstr("to the capacity"));
  for (const char* const size : {"1023KiB", "65GiB"})
    EXPECT_THAT(refusal_of_root(R"("/a?capacity=1GiB&reads_at_once=)" + std::string(size) + "\""),
                HasSubstr("from 1MiB to 64GiB"));
}

TEST(ParseOptions, EveryKeyReachesItsOption) {
  const auto options = parse_options(with_root(
      R"("slab":"128MiB","device_threads":3,"io_depth":7,"store_queue":"1GB","free_space_reserve":0,"poll_ms":250,"rewrite_percent":7,"eviction_grace_ms":1500,"open_wait_ms":0,"device":"cuda:3","device_slab":"1GiB")"));
  ASSERT_TRUE(options) << options.error().message;
  EXPECT_EQ(options->slab_bytes, 128ull << 20);
  EXPECT_EQ(options->device_threads, 3u);
  EXPECT_EQ(options->io_depth, 7u);
  EXPECT_EQ(options->store_queue_bytes, 1'000'000'000u);
  EXPECT_EQ(options->free_space_reserve, 0u);
  EXPECT_EQ(options->poll_ms, 250u);
  EXPECT_EQ(options->rewrite_percent, 7u);
  EXPECT_EQ(options->eviction_grace_ms, 1500u);
  EXPECT_EQ(options->open_wait_ms, 0u);
  EXPECT_EQ(options->device, "cuda:3");
  EXPECT_EQ(options->device_slab_bytes, 1ull << 30);
}

TEST(ParseOptions, AGpuGetsMoreThreadsThanAHostUnlessTheirNumberIsNamed) {
  EXPECT_EQ(parse_options(with_root(R"("device":"host")"))->device_threads, 2u);
  EXPECT_EQ(parse_options(with_root(R"("device":"cuda:0")"))->device_threads, 12u);
  EXPECT_EQ(parse_options(with_root(R"("device_threads":3,"device":"cuda:0")"))->device_threads, 3u);
}

TEST(ParseOptions, TheEffectiveOptionsReadBackAsThemselves) {
  const auto options = parse_options(
      R"({"roots":["/a?capacity=1GiB",{"path":"/b?c","capacity":"3TB","segment":"1MiB","io":"threads"}],"slab":4096,"device":"cuda:255"})");
  ASSERT_TRUE(options) << options.error().message;
  const auto again = parse_options(to_json(*options));
  ASSERT_TRUE(again) << again.error().message;
  EXPECT_EQ(to_json(*again), to_json(*options));
  EXPECT_EQ(again->roots[1].path, "/b?c");
}

TEST(ParseOptions, AnUnknownKeyNamesTheNearestKnownOne) {
  EXPECT_THAT(refusal_of(with_root(R"("slap":1)")), AllOf(HasSubstr("\"slap\""), HasSubstr("is slab")));
  EXPECT_THAT(refusal_of(with_root(R"("iodepth":1)")), HasSubstr("is io_depth"));
  EXPECT_THAT(refusal_of_root(R"("/a?capcity=1GiB")"),
              AllOf(HasSubstr("roots[0]."), HasSubstr("is capacity")));
  EXPECT_THAT(refusal_of_root(R"({"path":"/a","capacity":1,"readonly":true})"), HasSubstr("is read_only"));
  EXPECT_THAT(refusal_of(with_root("\"" + std::string(100'000, 'k') + "\":1")), HasSubstr("unknown"));
}

TEST(ParseOptions, RootsAreRequiredAndSoIsTheirCapacity) {
  EXPECT_THAT(refusal_of("{}"), HasSubstr("roots is missing"));
  EXPECT_THAT(refusal_of(R"({"roots":[]})"), HasSubstr("a list of 1 to 8 roots"));
  EXPECT_THAT(refusal_of(R"({"roots":"/a?capacity=1GiB"})"), HasSubstr("a list of 1 to 8 roots"));
  EXPECT_THAT(refusal_of_root(R"("/a")"), HasSubstr("the key capacity, which is missing"));
  EXPECT_THAT(refusal_of_root(R"({"capacity":1})"), HasSubstr("the key path, which is missing"));
  EXPECT_THAT(refusal_of_root("7"), HasSubstr("roots[0]"));
}

TEST(ParseOptions, OnlyAbsolutePathsOfDirectoriesAreRoots) {
  for (const char* path : {"file:///x", "~/depot", "~root/depot", "depot", "./depot", "s3://bucket/x", "",
                           "/", "//", "/a/../b", "/..", "/a\\nb", "/a\\u0000b", "/a\\u007fb"}) {
    EXPECT_THAT(refusal_of_root("\"" + std::string(path) + "?capacity=1GiB\""),
                AllOf(HasSubstr("roots[0].path"), HasSubstr("an absolute path")))
        << path;
  }
}

TEST(ParseOptions, PathsAreTakenInTheirShortestForm) {
  const auto options = parse_options(R"({"roots":["//var/./lib//depot/?capacity=1GiB"]})");
  ASSERT_TRUE(options) << options.error().message;
  EXPECT_EQ(options->roots[0].path, "/var/lib/depot");
}

TEST(ParseOptions, APathThatLeavesNoRoomForFileNamesIsRefusedWithTheLimit) {
  std::string path;
  while (path.size() + 101 <= 3900) path += "/" + std::string(100, 'd');
  EXPECT_TRUE(parse_options(R"({"roots":[")" + path + R"(?capacity=1GiB"]})"));
  path += "/" + std::string(200, 'd');
  EXPECT_THAT(refusal_of_root("\"" + path + "?capacity=1GiB\""),
              AllOf(HasSubstr("3967"), HasSubstr("PATH_MAX")));
  EXPECT_THAT(refusal_of_root("\"/" + std::string(256, 'n') + "?capacity=1GiB\""), HasSubstr("255"));
}

TEST(ParseOptions, OneDirectoryIsOneRoot) {
  EXPECT_THAT(refusal_of(R"({"roots":["/a?capacity=1GiB","/b?capacity=1GiB","//a/?capacity=1GiB"]})"),
              AllOf(HasSubstr("roots[2].path"), HasSubstr("not also roots[0]")));
  EXPECT_THAT(refusal_of(R"({"roots":["/a/b?capacity=1GiB","/a?capacity=1GiB"]})"),
              HasSubstr("neither lies in"));
  EXPECT_THAT(refusal_of(R"({"roots":["/a?capacity=1GiB","/a/b?capacity=1GiB"]})"),
              HasSubstr("neither lies in"));
  EXPECT_TRUE(parse_options(R"({"roots":["/a?capacity=1GiB","/ab?capacity=1GiB"]})"));
}

TEST(ParseOptions, SizesThatAreNoSizeAreRefused) {
  for (const char* size : {"-1",
                           "0",
                           "1.5",
                           "1e9",
                           "true",
                           "null",
                           "[]",
                           "18446744073709551616",
                           "9223372036854775808",
                           R"("")",
                           R"("0")",
                           R"("0GiB")",
                           R"("-1GiB")",
                           R"("nan")",
                           R"("inf")",
                           R"("8G")",
                           R"("8Gb")",
                           R"("8gib")",
                           R"("8XiB")",
                           R"("GiB")",
                           R"("8  GiB")",
                           R"(" 8GiB")",
                           R"("8GiB ")",
                           R"("8,5GiB")",
                           R"("1.GiB")",
                           R"("0.5")",
                           R"("0.5B")",
                           R"("8388608TiB")",
                           R"("99999999999999999999")",
                           R"("0.0000001TiB")"}) {
    EXPECT_THAT(refusal_of(with_root(std::string("\"slab\":") + size)),
                AllOf(HasSubstr("config key slab"), HasSubstr("KiB MiB GiB TiB")))
        << size;
  }
}

TEST(ParseSize, UnitsCountAsTheySay) {
  EXPECT_EQ(parse_size("1"), 1u);
  EXPECT_EQ(parse_size("512B"), 512u);
  EXPECT_EQ(parse_size("1KiB"), 1024u);
  EXPECT_EQ(parse_size("1 KB"), 1000u);
  EXPECT_EQ(parse_size("1.5GiB"), 3ull << 29);
  EXPECT_EQ(parse_size("2TiB"), 2ull << 40);
  EXPECT_EQ(parse_size("0.25TB"), 250'000'000'000u);
  EXPECT_EQ(parse_size("9223372036854775807"), static_cast<uint64_t>(std::numeric_limits<int64_t>::max()));
  EXPECT_FALSE(parse_size("8G"));
}

TEST(ParseOptions, FlagsAndChoicesAreStrict) {
  for (const char* flag : {"1", "0", "yes", "True", ""}) {
    EXPECT_THAT(refusal_of_root(R"("/a?capacity=1GiB&read_only=)" + std::string(flag) + "\""),
                AllOf(HasSubstr("roots[0].read_only"), HasSubstr("true or false")))
        << flag;
  }
  EXPECT_THAT(refusal_of_root(R"({"path":"/a","capacity":1,"read_only":1})"), HasSubstr("true or false"));
  EXPECT_THAT(
      refusal_of_root(R"("/a?capacity=1GiB&transport=rdma")"),
      AllOf(HasSubstr("\"rdma\""), HasSubstr("\"auto\", \"mapped\", \"direct\", \"buffered\", \"gds\"")));
  EXPECT_THAT(refusal_of_root(R"("/a?capacity=1GiB&io=aio")"), HasSubstr("\"auto\", \"threads\", \"uring\""));
}

TEST(ParseOptions, CountsHaveBounds) {
  for (const char* count : {"0", "-1", "65", "1.0", "\"2\"", "true", "4294967297"}) {
    EXPECT_THAT(refusal_of(with_root(std::string("\"device_threads\":") + count)),
                AllOf(HasSubstr("device_threads"), HasSubstr("from 1 to 64")))
        << count;
  }
  EXPECT_THAT(refusal_of(with_root(R"("io_depth":129)")), HasSubstr("from 1 to 128"));
  EXPECT_THAT(refusal_of(with_root(R"("poll_ms":60001)")), HasSubstr("from 1 to 60000"));
  EXPECT_THAT(refusal_of(with_root(R"("rewrite_percent":11)")), HasSubstr("from 0 to 10"));
  EXPECT_THAT(refusal_of(with_root(R"("eviction_grace_ms":60001)")), HasSubstr("from 0 to 60000"));
  EXPECT_THAT(refusal_of(with_root(R"("open_wait_ms":600001)")), HasSubstr("from 0 to 600000"));
}

TEST(ParseOptions, ADeviceIsTheHostOrAGpuByNumber) {
  for (const char* device : {"host", "cuda:0", "cuda:7", "cuda:255"}) {
    const auto options = parse_options(with_root("\"device\":\"" + std::string(device) + "\""));
    ASSERT_TRUE(options) << device;
    EXPECT_EQ(options->device, device);
  }
  for (const char* device :
       {R"("cuda")", R"("cuda:")", R"("cuda:-1")", R"("cuda:256")", R"("cuda:00")", R"("cuda:1 ")",
        R"("cuda:0x1")", R"("CUDA:0")", R"("cpu")", R"("")", "0", "null"}) {
    EXPECT_THAT(refusal_of(with_root("\"device\":" + std::string(device))),
                AllOf(HasSubstr("config key device"), HasSubstr("\"host\" or \"cuda:N\"")))
        << device;
  }
}

TEST(ParseOptions, ASegmentIsWholePagesWithinTheCapacity) {
  EXPECT_THAT(refusal_of_root(R"("/a?capacity=1GiB&segment=2GiB")"), HasSubstr("at most the capacity"));
  EXPECT_THAT(refusal_of_root(R"("/a?capacity=1GiB&segment=5000")"), HasSubstr("a multiple of 4KiB"));
  const auto automatic = parse_options(R"({"roots":["/a?capacity=1GiB&segment=auto"]})");
  ASSERT_TRUE(automatic) << automatic.error().message;
  EXPECT_EQ(automatic->roots[0].segment_bytes, 0u);
}

TEST(ParseOptions, WhatIsSaidTwiceIsRefused) {
  EXPECT_THAT(refusal_of(with_root(R"("slab":1,"slab":2)")),
              AllOf(HasSubstr("\"slab\""), HasSubstr("twice")));
  EXPECT_THAT(refusal_of_root(R"("/a?capacity=1GiB&capacity=2GiB")"), HasSubstr("capacity comes twice"));
  EXPECT_THAT(refusal_of_root(R"("/a?path=/b&capacity=1GiB")"), HasSubstr("path comes twice"));
  EXPECT_THAT(refusal_of_root(R"({"path":"/a","capacity":1,"capacity":2})"), HasSubstr("twice"));
}

TEST(ParseOptions, BrokenQueriesAreRefused) {
  for (const char* query :
       {"?", "?capacity", "?=1", "?capacity=1GiB&", "?&capacity=1GiB", "?capacity=1GiB&&io=auto"}) {
    EXPECT_THAT(refusal_of_root("\"/a" + std::string(query) + "\""), HasSubstr("/path?key=value")) << query;
  }
}

TEST(ParseOptions, TextThatIsNoJsonObjectIsRefused) {
  EXPECT_THAT(refusal_of(""), HasSubstr("not valid JSON"));
  EXPECT_THAT(refusal_of("{\"roots\":"), HasSubstr("not valid JSON at byte"));
  EXPECT_THAT(refusal_of("{\"slab\":1e999}"), HasSubstr("out of range"));
  EXPECT_THAT(refusal_of("{\"slab\":NaN}"), HasSubstr("not valid JSON"));
  EXPECT_THAT(refusal_of("{\"roots\":[\"\xff\"]}"), HasSubstr("not valid JSON"));
  EXPECT_THAT(refusal_of("[]"), HasSubstr("config is []"));
  EXPECT_THAT(refusal_of(std::string(100'000, '[')), HasSubstr("not valid JSON"));
  EXPECT_THAT(refusal_of(std::string((1 << 20) + 1, ' ')), HasSubstr("1048576"));
}

TEST(ParseOptions, LongValuesAreShownShortened) {
  EXPECT_LT(refusal_of(with_root("\"slab\":\"" + std::string(10'000, '9') + "\"")).size(), 400u);
}

}  // namespace
}  // namespace tokendepot
