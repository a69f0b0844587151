#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/log.h"
#include "forked_child.h"
#include "temporary_directory.h"
#include "tokendepot/c.h"
#include "tokendepot/depot.h"

namespace tokendepot {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr std::array<uint8_t, TD_KEY_BYTES> kNamespace{1, 2, 3};

struct CloseDepot {
  void operator()(td_depot* depot) const { td_close(depot); }
};
struct FreeChain {
  void operator()(td_key_chain* chain) const { td_key_chain_free(chain); }
};
using DepotHandle = std::unique_ptr<td_depot, CloseDepot>;
using ChainHandle = std::unique_ptr<td_key_chain, FreeChain>;

std::string config_of(const std::string& root) {
  return R"({"roots":[")" + root + R"(?capacity=16MiB&segment=1MiB"],"slab":"4MiB","free_space_reserve":0})";
}

class CApi : public ::testing::Test {
 protected:
  DepotHandle open(uint32_t flags = 0) {
    td_depot* depot = nullptr;
    EXPECT_EQ(td_open(config_of(directory_ / "root").c_str(), flags, &depot), TD_OK) << td_last_error();
    return DepotHandle(depot);
  }
  TemporaryDirectory directory_;
};

ChainHandle new_chain(uint32_t chunk_tokens, const char* salt = "") {
  td_key_chain* chain = nullptr;
  EXPECT_EQ(td_key_chain_new(kNamespace.data(), chunk_tokens, salt, std::strlen(salt), nullptr, 0, &chain),
            TD_OK);
  return ChainHandle(chain);
}

TEST(CApiErrors, StatusesHaveTheNamesOfTheErrorKinds) {
  EXPECT_STREQ(td_status_name(TD_OK), "ok");
  EXPECT_STREQ(td_status_name(TD_INVALID_ARGUMENT), name(ErrorKind::invalid_argument));
  EXPECT_STREQ(td_status_name(TD_TIMED_OUT), name(ErrorKind::timed_out));
  EXPECT_STREQ(td_status_name(TD_CLOSED), name(ErrorKind::closed));
  EXPECT_STREQ(td_status_name(static_cast<td_status>(12)), "unknown");
  EXPECT_STREQ(td_failure_reason_name(TD_FAILED_CORRUPT), name(ItemFailure::Reason::corrupt));
  EXPECT_STREQ(td_failure_reason_name(8), "unknown");
}

TEST(CApiErrors, ARefusalSaysWhyAndLeavesTheOutParameterAlone) {
  int somewhere = 0;
  auto* const untouched = reinterpret_cast<td_depot*>(&somewhere);
  td_depot* depot = untouched;
  EXPECT_EQ(td_open(R"({"rots":[]})", 0, &depot), TD_INVALID_ARGUMENT);
  EXPECT_THAT(td_last_error(), AllOf(HasSubstr("rots"), HasSubstr("roots")));
  EXPECT_EQ(td_last_errno(), 0);
  EXPECT_EQ(depot, untouched);
}

TEST(CApiErrors, TheLastErrorBelongsToItsThread) {
  EXPECT_EQ(td_open("[]", 0, nullptr), TD_INVALID_ARGUMENT);
  const std::string mine = td_last_error();
  std::string fresh = "not asked";
  std::thread([&] {
    fresh = td_last_error();
    EXPECT_EQ(td_refresh(nullptr), TD_INVALID_ARGUMENT);
  }).join();
  EXPECT_EQ(fresh, "");
  EXPECT_EQ(td_last_error(), mine);
}

TEST_F(CApi, NullWhereAPointerIsNeededIsRefusedByName) {
  const DepotHandle depot = open();
  const ChainHandle chain = new_chain(4);
  size_t count = 0;
  EXPECT_EQ(td_open(nullptr, 0, nullptr), TD_INVALID_ARGUMENT);
  EXPECT_THAT(td_last_error(), HasSubstr("config_json"));
  EXPECT_EQ(td_longest_prefix(depot.get(), nullptr, 1, nullptr, 0, &count), TD_INVALID_ARGUMENT);
  EXPECT_THAT(td_last_error(), HasSubstr("keys"));
  EXPECT_EQ(td_key_chain_append(chain.get(), nullptr, 1, nullptr, 0), TD_INVALID_ARGUMENT);
  EXPECT_THAT(td_last_error(), HasSubstr("tokens"));
  EXPECT_EQ(td_attach(depot.get(), nullptr), TD_INVALID_ARGUMENT);
  EXPECT_EQ(td_submit_load(depot.get(), 1, nullptr, 8), TD_INVALID_ARGUMENT);
  EXPECT_EQ(td_poll(depot.get(), nullptr, &count), TD_INVALID_ARGUMENT);
  EXPECT_EQ(td_key_chain_keys(nullptr, &count), nullptr);
  EXPECT_EQ(count, 0u);
  td_close(nullptr);
  td_free(nullptr);
  td_key_chain_free(nullptr);
}

TEST_F(CApi, UnknownFlagsAndKindsAreRefused) {
  td_depot* none = nullptr;
  EXPECT_EQ(td_open(config_of(directory_ / "root").c_str(), 4, &none), TD_INVALID_ARGUMENT);
  const DepotHandle depot = open();
  td_group_want want{};
  want.kind = 9;
  uint8_t out = 7;
  EXPECT_EQ(td_stored(depot.get(), kNamespace.data(), 1, &want, &out), TD_INVALID_ARGUMENT);
  EXPECT_THAT(td_last_error(), HasSubstr("9"));
  EXPECT_EQ(out, 7);
}

TEST_F(CApi, NothingIsStoredInAFreshDepot) {
  const DepotHandle depot = open();
  td_group_want want{};
  want.kind = TD_CANONICAL;
  want.part = {0, 1, 0, 1};
  want.tokens = 4;
  size_t chunks = 9;
  EXPECT_EQ(td_longest_prefix(depot.get(), kNamespace.data(), 1, &want, 1, &chunks), TD_OK);
  EXPECT_EQ(chunks, 0u);
  uint8_t out = 7;
  EXPECT_EQ(td_stored(depot.get(), kNamespace.data(), 1, &want, &out), TD_OK);
  EXPECT_EQ(out, 0);
  td_bytes plan{};
  const std::array<int32_t, 1> blocks{0};
  const td_load_group group{want, 0, 1, blocks.data(), blocks.size()};
  EXPECT_EQ(td_plan_load(depot.get(), kNamespace.data(), kNamespace.data(), 1, &group, 1, 0, &plan),
            TD_NOT_FOUND);
  EXPECT_EQ(plan.data, nullptr);
}

TEST_F(CApi, AnIdleDepotHasNoCompletionsAndNothingToWaitFor) {
  const DepotHandle depot = open();
  td_completion* done = nullptr;
  size_t count = 9;
  EXPECT_EQ(td_poll(depot.get(), &done, &count), TD_OK);
  EXPECT_EQ(count, 0u);
  td_free(done);
  EXPECT_EQ(td_wait_gathered(depot.get(), 0), TD_OK);
  EXPECT_EQ(td_flush(depot.get(), 0), TD_OK);
  EXPECT_EQ(td_refresh(depot.get()), TD_OK);
  EXPECT_EQ(td_cancel(depot.get(), 42), TD_OK);
  EXPECT_EQ(td_depot_mark_stream(depot.get(), nullptr), TD_OK);
  EXPECT_EQ(td_depot_mark_stream(nullptr, nullptr), TD_INVALID_ARGUMENT);
  EXPECT_EQ(td_depot_engine_step(depot.get(), 1), TD_OK);
  EXPECT_EQ(td_depot_engine_step(depot.get(), 0), TD_OK);
  EXPECT_EQ(td_depot_engine_step(nullptr, 0), TD_INVALID_ARGUMENT);
}

TEST_F(CApi, PlansThatDoNotProveThemselvesAreRefused) {
  const DepotHandle depot = open();
  const std::string junk(200, 'x');
  EXPECT_EQ(td_submit_load(depot.get(), 1, junk.data(), junk.size()), TD_CORRUPT);
  EXPECT_EQ(td_submit_store(depot.get(), 1, junk.data(), 0), TD_CORRUPT);
  td_bytes plan{};
  EXPECT_EQ(td_plan_store(kNamespace.data(), nullptr, 0, &plan), TD_OK);
  EXPECT_NE(td_submit_load(depot.get(), 1, plan.data, plan.size), TD_OK) << "a store plan is not a load plan";
  td_free(plan.data);
}

TEST_F(CApi, AJobThatHasNothingToDoIsReportedOnce) {
  const DepotHandle depot = open();
  uint8_t digest[TD_KEY_BYTES];
  ASSERT_EQ(td_register_namespace(depot.get(), R"({"model":"m"})", digest), TD_OK) << td_last_error();
  td_bytes plan{};
  ASSERT_EQ(td_plan_store(digest, nullptr, 0, &plan), TD_OK);
  EXPECT_EQ(td_submit_store(depot.get(), 5, plan.data, plan.size), TD_OK) << td_last_error();
  td_free(plan.data);
  EXPECT_EQ(td_flush(depot.get(), 10'000'000'000u), TD_OK);
  std::vector<uint64_t> jobs;
  for (int round = 0; round < 100; ++round) {
    td_completion* done = nullptr;
    size_t count = 0;
    ASSERT_EQ(td_poll(depot.get(), &done, &count), TD_OK);
    for (size_t i = 0; i < count; ++i) {
      jobs.push_back(done[i].job);
      EXPECT_EQ(done[i].kind, static_cast<uint32_t>(TD_STORE));
      EXPECT_EQ(done[i].failure_count, 0u);
    }
    td_free(done);
  }
  EXPECT_EQ(jobs, std::vector<uint64_t>{5});
}

TEST_F(CApi, StatisticsAreJsonWithTheFieldNamesOfTheHeader) {
  const DepotHandle depot = open();
  char* json = nullptr;
  ASSERT_EQ(td_stats_json(depot.get(), &json), TD_OK);
  const std::string text = json;
  td_free(json);
  for (const char* field : {"load", "store", "failures", "timed_out", "entries", "catalog_bytes",
                            "bad_records", "roots", "transport", "used_bytes", "suspended"}) {
    EXPECT_THAT(text, HasSubstr("\"" + std::string(field) + "\":"));
  }
}

TEST_F(CApi, AfterForkEveryCallAnswersClosed) {
  DepotHandle depot = open();
  const int code = exit_code_of_child([&] {
    td_completion* done = nullptr;
    size_t count = 0;
    uint8_t digest[TD_KEY_BYTES];
    if (td_poll(depot.get(), &done, &count) != TD_CLOSED) return 1;
    if (td_refresh(depot.get()) != TD_CLOSED) return 2;
    if (td_register_namespace(depot.get(), "{}", digest) != TD_CLOSED) return 3;
    if (std::strstr(td_last_error(), "fork") == nullptr) return 4;
    td_close(depot.release());
    return 0;
  });
  EXPECT_EQ(code, 0);
  EXPECT_EQ(td_refresh(depot.get()), TD_OK);
}

TEST(CApiKeys, AreTheKeysOfTheCppChain) {
  std::vector<uint32_t> tokens(100);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<uint32_t>(i * 77);
  const ChainHandle chain = new_chain(16, "tenant");
  const td_media media{"hash", 4, 20, 10};
  ASSERT_EQ(td_key_chain_append(chain.get(), tokens.data(), 50, &media, 1), TD_OK);
  ASSERT_EQ(td_key_chain_append(chain.get(), tokens.data() + 50, 50, &media, 1), TD_OK);

  NamespaceDigest ns;
  std::ranges::copy(kNamespace, ns.bytes.begin());
  KeyChain same(ns, 16, "tenant");
  const std::array<MediaSpan, 1> spans{MediaSpan{"hash", 20, 10}};
  same.append(tokens, spans);

  size_t count = 0;
  const uint8_t* keys = td_key_chain_keys(chain.get(), &count);
  ASSERT_EQ(count, 6u);
  ASSERT_EQ(same.keys().size(), 6u);
  EXPECT_EQ(std::memcmp(keys, same.keys().data(), 6 * sizeof(Key)), 0);
  EXPECT_EQ(td_key_chain_tokens_seen(chain.get()), 100u);
}

TEST(CApiKeys, AChunkHasAtLeastOneToken) {
  td_key_chain* chain = nullptr;
  EXPECT_EQ(td_key_chain_new(kNamespace.data(), 0, nullptr, 0, nullptr, 0, &chain), TD_INVALID_ARGUMENT);
  EXPECT_EQ(chain, nullptr);
}

TEST(CApiLog, LinesReachTheCallbackUntilItIsTakenBack) {
  std::vector<std::string> lines;
  const auto keep = [](td_log_level level, const char* text, void* user) {
    static_cast<std::vector<std::string>*>(user)->push_back(std::to_string(level) + " " + text);
  };
  ASSERT_EQ(td_set_log(keep, &lines), TD_OK);
  log(LogLevel::warning, "something {}", 7);
  ASSERT_EQ(td_set_log(nullptr, nullptr), TD_OK);
  log(LogLevel::debug, "nobody hears this");
  EXPECT_THAT(lines, ElementsAre("2 something 7"));
}

}  // namespace
}  // namespace tokendepot
