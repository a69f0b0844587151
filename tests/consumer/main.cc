// Uses the depot as an application does: stores one chunk, opens the directory again, finds it and loads it
// back.
#include <tokendepot/depot.h>
#include <tokendepot/tools.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

namespace td = tokendepot;
using namespace std::chrono_literals;

namespace {

constexpr uint32_t kBlockTokens = 16;
constexpr uint32_t kChunkTokens = 64;
constexpr uint32_t kRowBytes = 128;
constexpr uint32_t kBlocks = 8;
constexpr td::Part kPart{0, 1, 0, 1};

// One layer and one head: K rows of all blocks, then V rows.
struct Cache {
  std::vector<std::byte> bytes = std::vector<std::byte>(size_t{2} * kBlocks * kBlockTokens * kRowBytes);

  td::PagedCache describe() {
    td::PagedCache cache;
    cache.shape.part = kPart;
    cache.shape.tokens = kChunkTokens;
    cache.shape.block_tokens = kBlockTokens;
    cache.shape.row_bytes = kRowBytes;
    cache.block_count = kBlocks;
    const int64_t block_stride = int64_t{kBlockTokens} * kRowBytes;
    td::Plane k{bytes.data(), block_stride, 0, kRowBytes, 0};
    td::Plane v{bytes.data() + kBlocks * block_stride, block_stride, 0, kRowBytes, 0};
    cache.layers = {{k, v}};
    return cache;
  }
};

int fail(const char* step, const std::string& why) {
  std::fprintf(stderr, "consumer: %s: %s\n", step, why.c_str());
  return 1;
}

// The job's completion, or one without items when none comes in ten seconds.
td::Completion wait(td::Depot& depot, uint64_t job) {
  for (int i = 0; i < 1000; ++i) {
    for (td::Completion& done : depot.poll()) {
      if (done.job == job) return done;
    }
    std::this_thread::sleep_for(10ms);
  }
  return {};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return fail("usage", "consumer ROOT");
  td::Options options;
  options.roots.push_back({.path = argv[1], .capacity_bytes = 64ull << 20});
  options.slab_bytes = 16ull << 20;

  const std::vector<uint32_t> tokens(kChunkTokens, 7);
  const td::GroupWant want{.part = kPart, .tokens = kChunkTokens};
  Cache cache;
  for (size_t i = 0; i < cache.bytes.size(); ++i) cache.bytes[i] = static_cast<std::byte>(i * 31 + i / 251);
  const std::vector<std::byte> written = cache.bytes;

  {
    auto depot = td::Depot::open(options);
    if (!depot) return fail("open", depot.error().message);
    auto ns = (*depot)->register_namespace(R"({"model":"consumer"})");
    if (!ns) return fail("register_namespace", ns.error().message);
    td::KeyChain chain(*ns, kChunkTokens);
    chain.append(tokens);
    if (auto attached = (*depot)->attach(cache.describe()); !attached)
      return fail("attach", attached.error().message);
    td::StorePlan plan{.ns = *ns, .items = {{.key = chain.keys()[0], .blocks = {0, 1, 2, 3}}}};
    if (auto queued = (*depot)->submit_store(1, plan); !queued)
      return fail("submit_store", queued.error().message);
    if (wait(**depot, 1).items_ok != 1) return fail("store", "the chunk was not acknowledged");
  }

  cache.bytes.assign(cache.bytes.size(), std::byte{0});
  auto depot = td::Depot::open(options);
  if (!depot) return fail("reopen", depot.error().message);
  auto ns = (*depot)->register_namespace(R"({"model":"consumer"})");
  if (!ns) return fail("register_namespace", ns.error().message);
  td::KeyChain chain(*ns, kChunkTokens);
  chain.append(tokens);
  const std::vector<td::GroupWant> wants{want};
  if ((*depot)->longest_prefix(chain.keys(), wants) != 1)
    return fail("longest_prefix", "the stored chunk is not found");
  if (auto attached = (*depot)->attach(cache.describe()); !attached)
    return fail("attach", attached.error().message);
  const std::vector<int32_t> blocks{0, 1, 2, 3};
  const std::vector<td::Depot::LoadGroup> groups{{.want = want, .blocks_per_chunk = 4, .blocks = blocks}};
  auto plan = (*depot)->plan_load(*ns, chain.keys(), groups, 10s);
  if (!plan) return fail("plan_load", plan.error().message);
  if (auto queued = (*depot)->submit_load(2, *plan); !queued)
    return fail("submit_load", queued.error().message);
  if (wait(**depot, 2).items_ok != 1) return fail("load", "the chunk did not come back");

  const size_t half = written.size() / 2;
  const size_t chunk = size_t{kChunkTokens} * kRowBytes;
  for (size_t plane : {size_t{0}, half}) {
    for (size_t i = 0; i < chunk; ++i) {
      if (cache.bytes[plane + i] != written[plane + i])
        return fail("compare", "loaded bytes differ from stored bytes");
    }
  }
  if (auto info = td::inspect_root(argv[1]); !info) return fail("inspect_root", info.error().message);
  std::puts("consumer: stored, reopened, loaded, equal");
  return 0;
}
