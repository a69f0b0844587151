// What comes from outside a depot: salts and model names of requests, links that another user planted before
// it was opened, and ways of I/O that were demanded where the system refuses them.
#include <fcntl.h>
#include <sys/syscall.h>

#include <filesystem>
#include <fstream>
#include <set>

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
