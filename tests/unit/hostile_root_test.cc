// What comes from outside a depot: salts and model names of requests, links that another user planted before
// it was opened, and ways of I/O that were demanded where the system refuses them.
#include <fcntl.h>
#include <sys/syscall.h>

#include <filesystem>
#include <fstream>
#include <mutex>
#include <set>

#include "base/log.h"
#include "depot_fixture.h"
#include "forked_child.h"

namespace tokendepot::testing {
namespace {

constexpr uint32_t kBlocks = 64;

class HostileRoot : public ::testing::Test {
 protected:
  explicit HostileRoot(const std::string& base = "/dev/shm") : directory_(base) {}

  std::string root() const { return directory_.path() + "/depot"; }
  Options options() const {
    Options options;
    options.roots = {{.path = root(), .capacity_bytes = 16 << 20, .segment_bytes = 1 << 20}};
    options.slab_bytes = 4 << 20;
    options.free_space_reserve = 0;
    options.poll_ms = 20;
    return options;
  }
  /// Everything below the directory but the root's own files, by path.
  std::set<std::string> outside() const {
    std::set<std::string> paths;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(directory_.path())) {
      const std::string path = entry.path();
      if (path != root() && !path.starts_with(root() + "/")) paths.insert(path);
    }
    return paths;
  }

  TemporaryDirectory directory_;
};

// I6, first half.
TEST_F(HostileRoot, NamesAndSaltsOfRequestsAreNeverPaths) {
  const std::vector<std::string> names{
      "../../../../tmp/pwn",    "a/b", "..", ".", "%2e%2e/x", std::string("\0x", 2), "\n",
      std::string(1 << 20, 'a')};
  const auto before = outside();
  auto depot = Depot::open(options());
  ASSERT_TRUE(depot) << depot.error().message;
  HostCache cache(small_shape(), kBlocks);
  ASSERT_TRUE((*depot)->attach(cache.paged()));
  cache.fill(1);
  const auto plain = (*depot)->register_namespace(R"({"model":"m"})");
  ASSERT_TRUE(plain);
  std::set<std::string> seen;
  uint64_t job = 0;
  for (const std::string& name : names) {
    std::string escaped;
    for (const char c : name) {
      char code[8];
      std::snprintf(code, sizeof code, "\\u%04x", static_cast<unsigned char>(c));
      escaped += code;
    }
    // As a model's name: hashed into the namespace, or refused with a reason.
    const auto ns = (*depot)->register_namespace("{\"model\":\"" + escaped + "\"}");
    if (!ns) {
      EXPECT_FALSE(ns.error().message.empty());
    }
    // As a salt: hashed into the keys, and every one is a tenant of its own.
    KeyChain chain(*plain, kChunkTokens, name);
    chain.append(std::vector<uint32_t>(kChunkTokens, 7));
    const auto keys = chain.keys();
    EXPECT_TRUE(
        seen.emplace(reinterpret_cast<const char*>(keys[0].bytes.data()), keys[0].bytes.size()).second);
    ASSERT_EQ(store_chunks(**depot, ++job, *plain, keys, 0, 1).items_ok, 1u);
  }
  depot->reset();
  EXPECT_EQ(outside(), before);
  for (const auto& entry : std::filesystem::recursive_directory_iterator(root())) {
    const std::string name = entry.path().filename();
    EXPECT_EQ(name.find_first_not_of("0123456789abcdefghijklmnopqrstuvwxyzDEPOT.-_"), std::string::npos)
        << name;
    EXPECT_FALSE(entry.is_symlink()) << name;
    // A manifest names its model, which is no secret.
    if (!entry.is_regular_file() || entry.path().parent_path().filename() == "manifests") continue;
    std::ifstream file(entry.path(), std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(file)), {});
    EXPECT_EQ(bytes.find("tmp/pwn"), std::string::npos) << "a salt in clear in " << name;
  }
}

// I5.
class LongNames : public HostileRoot {
 protected:
  /// Stores 200 chunks under a model path of 240 and a salt of 128 characters, looks all up and loads them,
  /// and looks for the salt wherever it could have gone.
  void store_and_load(const Options& options) {
    const std::string salt = std::string("s3cret-").append(121, '~');
    const std::string model = std::string(240, 'm');
    std::string said;
    std::mutex saying;
    set_log_sink([&](LogLevel, std::string_view line) {
      const std::lock_guard lock(saying);
      said.append(line).append("\n");
    });
    {
      auto depot = Depot::open(options);
      ASSERT_TRUE(depot) << depot.error().message;
      const auto ns = (*depot)->register_namespace(fmt::format(R"({{"model":"{}"}})", model));
      ASSERT_TRUE(ns) << ns.error().message;
      HostCache cache(small_shape(), kBlocks);
      ASSERT_TRUE((*depot)->attach(cache.paged()));
      cache.fill(1);
      HostCache expected(small_shape(), kBlocks);
      expected.fill(1);
      KeyChain chain(*ns, kChunkTokens, salt);
      std::vector<uint32_t> tokens(200 * kChunkTokens);
      for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<uint32_t>(i);
      chain.append(tokens);
      const auto keys = chain.keys();
      const std::vector want{want_of(small_shape())};
      uint64_t job = 0;
      for (uint32_t i = 0; i < 200; ++i) {
        StorePlan put;
        put.ns = *ns;
        put.items.push_back({keys[i], i, 0, iota_blocks(static_cast<int32_t>(i % 8 * kBlocksPerChunk), 4)});
        until_stored([&] {
          EXPECT_TRUE((*depot)->submit_store(++job, put));
          return wait_for(**depot, job).items_ok == 1;
        });
      }
      ASSERT_EQ((*depot)->longest_prefix(keys, want), 200u);
      for (uint32_t i = 0; i < 200; ++i) {
        const auto plan = plan_chunks(**depot, *ns, keys, want[0], i, i + 1, 40);
        ASSERT_TRUE(plan) << plan.error().message;
        ASSERT_TRUE((*depot)->submit_load(++job, *plan));
        ASSERT_EQ(wait_for(**depot, job).items_ok, 1u) << i;
        for (int32_t b = 0; b < 4; ++b)
          ASSERT_EQ(cache.block(40 + b), expected.block(static_cast<int32_t>(i % 8 * kBlocksPerChunk) + b))
              << i;
      }
      LoadPlan gone;  // provokes the log line of a failed load
      gone.ns = *ns;
      gone.items.push_back({keys[0],
                            0,
                            0,
                            LayoutKind::canonical,
                            small_shape().part,
                            kChunkTokens,
                            {{1, 1}, 0, 69632},
                            iota_blocks(0, 4)});
      ASSERT_TRUE((*depot)->submit_load(++job, gone));
      EXPECT_EQ(wait_for(**depot, job).failures.size(), 1u);
      const std::string stats = to_json((*depot)->stats());
      const std::lock_guard lock(saying);
      said += stats;
    }
    set_log_sink(nullptr);
    EXPECT_EQ(said.find("s3cret"), std::string::npos) << said;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(options.roots[0].path)) {
      EXPECT_EQ(entry.path().string().find("s3cret"), std::string::npos) << entry.path();
      if (!entry.is_regular_file()) continue;
      std::ifstream file(entry.path(), std::ios::binary);
      const std::string bytes((std::istreambuf_iterator<char>(file)), {});
      EXPECT_EQ(bytes.find("s3cret"), std::string::npos) << "the salt in clear in " << entry.path();
    }
  }
  /// A directory below the test's own whose path has this many bytes.
  std::string deep_directory(size_t bytes) {
    std::string path = directory_.path();
    while (bytes - path.size() > 250) path.append("/").append(200, 'd');
    path.append("/");
    path.resize(bytes, 'e');
    std::filesystem::create_directories(std::filesystem::path(path).parent_path());
    return path;
  }
};

TEST_F(LongNames, AreStoredAndFoundAndTheSaltIsNowhereInClear) {
  Options roomy = options();
  roomy.roots[0].capacity_bytes = 32 << 20;
  store_and_load(roomy);
}

TEST_F(LongNames, ARootPathNearPathMaxWorksAndOneBeyondTheLimitIsRefusedByIt) {
  for (const size_t bytes : {3900, 3967}) {
    SCOPED_TRACE(bytes);
    const auto parsed = parse_options(
        fmt::format(R"({{"roots":["{}?capacity=32MiB&segment=1MiB"]}})", deep_directory(bytes)));
    ASSERT_TRUE(parsed) << parsed.error().message;
    Options deep = *parsed;
    deep.slab_bytes = 4 << 20;
    deep.free_space_reserve = 0;
    store_and_load(deep);
    std::filesystem::remove_all(deep.roots[0].path);
  }
  for (const size_t bytes : {3968, 4090}) {
    Options beyond = options();
    beyond.roots[0].path = deep_directory(bytes);
    const auto refused = Depot::open(beyond);
    ASSERT_FALSE(refused) << bytes;
    EXPECT_EQ(refused.error().kind, ErrorKind::invalid_argument);
    EXPECT_NE(refused.error().message.find("3967"), std::string::npos) << refused.error().message;
    EXPECT_FALSE(std::filesystem::exists(beyond.roots[0].path));
  }
}

// I6, second half.
TEST_F(HostileRoot, PlantedLinksAreNotFollowed) {
  const std::string elsewhere = directory_.path() + "/elsewhere";
  for (const char* name : {"segments", "journals", "manifests"}) {
    SCOPED_TRACE(name);
    std::filesystem::remove_all(root());
    std::filesystem::remove_all(elsewhere);
    {
      ASSERT_TRUE(Depot::open(options()));
    }
    std::filesystem::remove_all(root() + "/" + name);
    std::filesystem::create_directory(elsewhere);
    std::filesystem::create_directory_symlink(elsewhere, root() + "/" + name);
    const auto opened = Depot::open(options());
    EXPECT_FALSE(opened) << "a directory outside would be written to";
    if (!opened) {
      EXPECT_NE(opened.error().message.find(root()), std::string::npos) << opened.error().message;
    }
    EXPECT_TRUE(std::filesystem::is_empty(elsewhere));
  }
  std::filesystem::remove_all(root());
  {
    ASSERT_TRUE(Depot::open(options()));
  }
  const std::string victim = directory_.path() + "/victim";
  std::ofstream(victim) << "mine";
  std::filesystem::remove(root() + "/DEPOT");
  std::filesystem::create_symlink(victim, root() + "/DEPOT");
  EXPECT_FALSE(Depot::open(options()));
  std::ifstream file(victim);
  EXPECT_EQ(std::string((std::istreambuf_iterator<char>(file)), {}), "mine");
}

class DemandedIo : public HostileRoot {
 protected:
  DemandedIo() : HostileRoot("/var/tmp") {}
};

// P1.
TEST_F(DemandedIo, DirectIsRefusedAtTheStartWhereItIsNotPossibleAndAutomaticFallsBack) {
  Options demanded = options();
  demanded.roots[0].transport = TransportChoice::direct;
  EXPECT_EQ(exit_code_of_child([&] {
              if (!forbid_open_flag(O_DIRECT, EINVAL)) return 1;
              const auto refused = Depot::open(demanded);
              if (refused) return 2;
              if (refused.error().message.find("transport=direct is not possible here") == std::string::npos)
                return 3;
              const auto opened = Depot::open(options());
              if (!opened) return 4;
              return (*opened)->stats().roots[0].transport.starts_with("buffered-") ? 0 : 5;
            }),
            0);
}

// P4.
TEST_F(DemandedIo, IoUringIsRefusedAtTheStartWhereItIsBlockedAndAutomaticTakesThreads) {
  Options demanded = options();
  demanded.roots[0].io = IoChoice::uring;
  for (const int error : {EPERM, ENOSYS}) {
    EXPECT_EQ(exit_code_of_child([&] {
                if (!forbid_calls({SYS_io_uring_setup}, error)) return 1;
                const auto refused = Depot::open(demanded);
                if (refused) return 2;
                if (refused.error().message.find("io=uring is not possible here") == std::string::npos)
                  return 3;
                const auto opened = Depot::open(options());
                if (!opened) return 4;
                return (*opened)->stats().roots[0].transport.ends_with("-threads") ? 0 : 5;
              }),
              0);
  }
}

}  // namespace
}  // namespace tokendepot::testing
