#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/errors.h"
#include "base/log.h"
#include "tokendepot/c.h"
#include "tokendepot/depot.h"

using namespace tokendepot;  // this file speaks both languages in every line

struct td_depot {
  std::unique_ptr<Depot> engine;
  pid_t owner = getpid();
  // Completions taken from the engine but not yet handed out: only when memory ran out in between.
  std::mutex mutex;
  std::vector<Completion> undelivered;
};

struct td_key_chain {
  KeyChain chain;
};

namespace {

struct LastError {
  std::string text;
  const char* shown = "";
  int error_number = 0;
};
thread_local LastError last_error;

td_status status_of(ErrorKind kind) {
  return static_cast<td_status>(static_cast<int>(kind) + 1);
}
static_assert(static_cast<int>(ErrorKind::invalid_argument) + 1 == TD_INVALID_ARGUMENT);
static_assert(static_cast<int>(ErrorKind::closed) + 1 == TD_CLOSED);
static_assert(static_cast<int>(ItemFailure::Reason::absent) == TD_FAILED_ABSENT);
static_assert(static_cast<int>(ItemFailure::Reason::pinned) == TD_FAILED_PINNED);
static_assert(static_cast<int>(JobKind::store) == TD_STORE);
static_assert(sizeof(Key) == TD_KEY_BYTES && kSkipBlock == TD_SKIP_BLOCK);

td_status report(const Error& error) {
  last_error.text = error.message;
  last_error.shown = last_error.text.c_str();
  last_error.error_number = error.os_errno;
  return status_of(error.kind);
}

// No exception crosses the C boundary. The engine throws none of its own; the library may run out of memory.
template <typename Body>
td_status guarded(Body body) noexcept {
  try {
    Status status = body();
    return status ? TD_OK : report(status.error());
  } catch (const std::bad_alloc&) {
  } catch (const std::length_error&) {
  }
  last_error.shown = "out of memory";
  last_error.error_number = ENOMEM;
  return TD_NO_MEMORY;
}

struct Required {
  const char* name;
  const void* value;
};

Status require(std::initializer_list<Required> arguments) {
  for (const Required& argument : arguments) {
    if (argument.value == nullptr) {
      return fail(ErrorKind::invalid_argument, "the argument {} is NULL; allowed is a valid pointer",
                  argument.name);
    }
  }
  return {};
}

// For every call on a handle: asked before any lock, which a fork may have copied in its locked state.
Status require_open(const td_depot* depot, std::initializer_list<Required> arguments = {}) {
  if (auto given = require({{"depot", depot}}); !given) return given;
  if (depot->owner != getpid()) {
    return fail(ErrorKind::closed, "the depot was opened by process {} and cannot be used after fork()",
                depot->owner);
  }
  return require(arguments);
}

// A list may be NULL only when it is empty.
const void* unless_empty(const void* list, size_t count) {
  return count == 0 ? "" : list;
}

template <typename Digest>
Digest digest_from(const uint8_t* bytes) {
  Digest digest;
  std::memcpy(digest.bytes.data(), bytes, digest.bytes.size());
  return digest;
}

std::vector<Key> keys_from(const uint8_t* bytes, size_t count) {
  std::vector<Key> keys(count);
  if (count > 0) std::memcpy(keys.data(), bytes, count * sizeof(Key));
  return keys;
}

std::string_view text_from(const void* bytes, size_t count) {
  return count == 0 ? std::string_view() : std::string_view(static_cast<const char*>(bytes), count);
}

Result<LayoutKind> kind_from(uint16_t kind) {
  if (kind == TD_CANONICAL) return LayoutKind::canonical;
  if (kind == TD_OPAQUE) return LayoutKind::opaque;
  return fail(ErrorKind::invalid_argument,
              "the layout kind is {}; allowed are {} (canonical) and {} (opaque)", kind,
              static_cast<int>(TD_CANONICAL), static_cast<int>(TD_OPAQUE));
}

Part part_from(const td_part& part) {
  return {part.layer_begin, part.layer_end, part.head_begin, part.head_end};
}

Result<GroupWant> want_from(const td_group_want& want) {
  const auto kind = kind_from(want.kind);
  if (!kind) return std::unexpected(kind.error());
  return GroupWant{want.group, *kind, part_from(want.part), want.tokens, want.window_chunks};
}

std::chrono::nanoseconds duration_from(uint64_t ns) {
  constexpr uint64_t kMost =
      std::numeric_limits<int64_t>::max() / 4;  // far enough from any clock's end to add to now
  return std::chrono::nanoseconds(static_cast<int64_t>(std::min(ns, kMost)));
}

template <typename T>
T* allocate(size_t bytes) {
  void* memory = std::malloc(std::max<size_t>(bytes, 1));
  if (memory == nullptr) throw std::bad_alloc();
  return static_cast<T*>(memory);
}

td_bytes hand_out(std::span<const std::byte> bytes) {
  td_bytes out{allocate<uint8_t>(bytes.size()), bytes.size()};
  std::memcpy(out.data, bytes.data(), bytes.size());
  return out;
}

Status timed(bool in_time, const char* what) {
  if (in_time) return {};
  return fail(ErrorKind::timed_out, "{} did not finish in the time given", what);
}

template <typename Plan>
td_status submit(td_depot* depot, uint64_t job, const void* plan, size_t plan_bytes,
                 Result<Plan> (*decode)(std::span<const std::byte>),
                 Status (Depot::*hand_over)(uint64_t, Plan)) {
  return guarded([&]() -> Status {
    if (auto given = require_open(depot, {{"plan", plan}}); !given) return given;
    auto decoded = decode({static_cast<const std::byte*>(plan), plan_bytes});
    if (!decoded) return std::unexpected(decoded.error());
    return (*depot->engine.*hand_over)(job, std::move(*decoded));
  });
}

td_completion* flatten(const std::vector<Completion>& completions) {
  size_t failures = 0;
  for (const Completion& c : completions) failures += c.failures.size();
  static_assert(sizeof(td_completion) % alignof(td_item_failure) == 0);
  auto* const out = allocate<td_completion>(completions.size() * sizeof(td_completion) +
                                            failures * sizeof(td_item_failure));
  auto* next = reinterpret_cast<td_item_failure*>(out + completions.size());
  for (size_t i = 0; i < completions.size(); ++i) {
    const Completion& c = completions[i];
    out[i] = {
        c.job, static_cast<uint32_t>(c.kind), c.items_ok, c.bytes, c.nanoseconds, next, c.failures.size()};
    for (const ItemFailure& f : c.failures)
      *next++ = {f.item, f.chunk, f.group, static_cast<uint16_t>(f.reason)};
  }
  return out;
}

}  // namespace

uint32_t td_abi_version(void) {
  return TD_ABI_VERSION;
}

const char* td_status_name(td_status status) {
  if (status == TD_OK) return "ok";
  if (status == TD_NO_MEMORY) return "no_memory";
  if (status < TD_OK || status > TD_NO_MEMORY) return "unknown";
  return name(static_cast<ErrorKind>(status - 1));
}

const char* td_last_error(void) {
  return last_error.shown;
}

int td_last_errno(void) {
  return last_error.error_number;
}

void td_free(void* memory) {
  std::free(memory);
}

td_status td_set_log(td_log_callback callback, void* user) {
  return guarded([&]() -> Status {
    if (callback == nullptr) {
      set_log_sink(nullptr);
      return {};
    }
    set_log_sink([callback, user](LogLevel level, std::string_view text) {
      callback(static_cast<td_log_level>(level), std::string(text).c_str(), user);
    });
    return {};
  });
}

td_status td_open(const char* config_json, uint32_t flags, td_depot** out) {
  return guarded([&]() -> Status {
    if (auto given = require({{"config_json", config_json}, {"out", out}}); !given) return given;
    constexpr uint32_t kKnown = TD_OPEN_NO_CATALOG | TD_OPEN_NO_WRITER;
    if ((flags & ~kKnown) != 0) {
      return fail(ErrorKind::invalid_argument, "the flags are {:#x}; allowed are the bits {:#x}", flags,
                  kKnown);
    }
    auto options = parse_options(config_json);
    if (!options) return std::unexpected(options.error());
    options->catalog = (flags & TD_OPEN_NO_CATALOG) == 0;
    options->writer = (flags & TD_OPEN_NO_WRITER) == 0;
    auto handle = std::make_unique<td_depot>();
    auto engine = Depot::open(*options);
    if (!engine) return std::unexpected(engine.error());
    handle->engine = std::move(*engine);
    *out = handle.release();
    return {};
  });
}

void td_close(td_depot* depot) {
  delete depot;
}

td_status td_register_namespace(td_depot* depot, const char* manifest_json, uint8_t digest[TD_KEY_BYTES]) {
  return guarded([&]() -> Status {
    auto given = require_open(depot, {{"manifest_json", manifest_json}, {"digest", digest}});
    if (!given) return given;
    const auto registered = depot->engine->register_namespace(manifest_json);
    if (!registered) return std::unexpected(registered.error());
    std::ranges::copy(registered->bytes, digest);
    return {};
  });
}

td_status td_key_chain_new(const uint8_t namespace_digest[TD_KEY_BYTES], uint32_t chunk_tokens,
                           const void* salt, size_t salt_bytes, const void* lora, size_t lora_bytes,
                           td_key_chain** out) {
  return guarded([&]() -> Status {
    auto given = require({{"namespace_digest", namespace_digest},
                          {"salt", unless_empty(salt, salt_bytes)},
                          {"lora", unless_empty(lora, lora_bytes)},
                          {"out", out}});
    if (!given) return given;
    if (chunk_tokens == 0) {
      return fail(ErrorKind::invalid_argument, "chunk_tokens is 0; allowed is a number greater than 0");
    }
    *out = new td_key_chain{KeyChain(digest_from<NamespaceDigest>(namespace_digest), chunk_tokens,
                                     text_from(salt, salt_bytes), text_from(lora, lora_bytes))};
    return {};
  });
}

void td_key_chain_free(td_key_chain* chain) {
  delete chain;
}

td_status td_key_chain_append(td_key_chain* chain, const uint32_t* tokens, size_t token_count,
                              const td_media* media, size_t media_count) {
  return guarded([&]() -> Status {
    auto given = require({{"chain", chain},
                          {"tokens", unless_empty(tokens, token_count)},
                          {"media", unless_empty(media, media_count)}});
    if (!given) return given;
    std::vector<MediaSpan> spans;
    for (const td_media& m : std::span(media, media_count)) {
      if (auto hash = require({{"media content_hash", unless_empty(m.content_hash, m.content_hash_bytes)}});
          !hash) {
        return hash;
      }
      spans.push_back({text_from(m.content_hash, m.content_hash_bytes), m.first_token, m.tokens});
    }
    chain->chain.append({tokens, token_count}, spans);
    return {};
  });
}

const uint8_t* td_key_chain_keys(const td_key_chain* chain, size_t* count) {
  if (count != nullptr) *count = chain == nullptr ? 0 : chain->chain.keys().size();
  return chain == nullptr ? nullptr : reinterpret_cast<const uint8_t*>(chain->chain.keys().data());
}

uint64_t td_key_chain_tokens_seen(const td_key_chain* chain) {
  return chain == nullptr ? 0 : chain->chain.tokens_seen();
}

td_status td_longest_prefix(td_depot* depot, const uint8_t* keys, size_t key_count,
                            const td_group_want* wants, size_t want_count, size_t* chunks) {
  return guarded([&]() -> Status {
    auto given = require_open(depot, {{"keys", unless_empty(keys, key_count)},
                                      {"wants", unless_empty(wants, want_count)},
                                      {"chunks", chunks}});
    if (!given) return given;
    std::vector<GroupWant> groups;
    for (const td_group_want& want : std::span(wants, want_count)) {
      const auto group = want_from(want);
      if (!group) return std::unexpected(group.error());
      groups.push_back(*group);
    }
    *chunks = depot->engine->longest_prefix(keys_from(keys, key_count), groups);
    return {};
  });
}

td_status td_stored(td_depot* depot, const uint8_t* keys, size_t key_count, const td_group_want* want,
                    uint8_t* out) {
  return guarded([&]() -> Status {
    auto given = require_open(
        depot,
        {{"keys", unless_empty(keys, key_count)}, {"want", want}, {"out", unless_empty(out, key_count)}});
    if (!given) return given;
    const auto group = want_from(*want);
    if (!group) return std::unexpected(group.error());
    depot->engine->stored(keys_from(keys, key_count), *group, {out, key_count});
    return {};
  });
}

td_status td_plan_load(td_depot* depot, const uint8_t namespace_digest[TD_KEY_BYTES], const uint8_t* keys,
                       size_t key_count, const td_load_group* groups, size_t group_count,
                       uint64_t deadline_ns, td_bytes* plan) {
  return guarded([&]() -> Status {
    auto given = require_open(depot, {{"namespace_digest", namespace_digest},
                                      {"keys", unless_empty(keys, key_count)},
                                      {"groups", unless_empty(groups, group_count)},
                                      {"plan", plan}});
    if (!given) return given;
    std::vector<Depot::LoadGroup> wanted;
    for (const td_load_group& g : std::span(groups, group_count)) {
      if (auto list = require({{"group blocks", unless_empty(g.blocks, g.block_count)}}); !list) return list;
      const auto want = want_from(g.want);
      if (!want) return std::unexpected(want.error());
      wanted.push_back({*want, g.first_chunk, g.blocks_per_chunk, {g.blocks, g.block_count}});
    }
    const auto planned =
        depot->engine->plan_load(digest_from<NamespaceDigest>(namespace_digest), keys_from(keys, key_count),
                                 wanted, duration_from(deadline_ns));
    if (!planned) return std::unexpected(planned.error());
    *plan = hand_out(encode(*planned));
    return {};
  });
}

td_status td_forget(td_depot* depot, const uint8_t key[TD_KEY_BYTES], uint16_t group) {
  return guarded([&]() -> Status {
    if (auto given = require_open(depot, {{"key", key}}); !given) return given;
    depot->engine->forget(digest_from<Key>(key), group);
    return {};
  });
}

td_status td_plan_store(const uint8_t namespace_digest[TD_KEY_BYTES], const td_store_item* items,
                        size_t item_count, td_bytes* plan) {
  return guarded([&]() -> Status {
    auto given = require(
        {{"namespace_digest", namespace_digest}, {"items", unless_empty(items, item_count)}, {"plan", plan}});
    if (!given) return given;
    StorePlan stores{digest_from<NamespaceDigest>(namespace_digest), {}};
    for (const td_store_item& item : std::span(items, item_count)) {
      if (auto list = require({{"item blocks", unless_empty(item.blocks, item.block_count)}}); !list)
        return list;
      stores.items.push_back({digest_from<Key>(item.key), item.chunk, item.group,
                              std::vector<int32_t>(item.blocks, item.blocks + item.block_count)});
    }
    *plan = hand_out(encode(stores));
    return {};
  });
}

td_status td_attach(td_depot* depot, const td_paged_cache* cache) {
  return guarded([&]() -> Status {
    if (auto given = require_open(depot, {{"cache", cache}}); !given) return given;
    const auto kind = kind_from(cache->kind);
    if (!kind) return std::unexpected(kind.error());
    PagedCache paged;
    paged.shape = {cache->group,        *kind,         part_from(cache->part), cache->tokens,
                   cache->block_tokens, cache->planes, cache->row_bytes,       cache->page_bytes};
    paged.block_count = cache->block_count;
    const size_t layers =
        paged.shape.part.layer_end > paged.shape.part.layer_begin ? paged.shape.part.layers() : 0;
    if (auto given = require({{"views", unless_empty(cache->views, layers * cache->views_per_layer)}});
        !given) {
      return given;
    }
    for (size_t layer = 0; layer < layers; ++layer) {
      auto& planes = paged.layers.emplace_back();
      for (size_t i = 0; i < cache->views_per_layer; ++i) {
        const td_plane& view = cache->views[layer * cache->views_per_layer + i];
        planes.push_back({static_cast<std::byte*>(view.base), view.block_stride, view.head_stride,
                          view.token_stride, view.piece_bytes});
      }
    }
    return depot->engine->attach(paged);
  });
}

td_status td_submit_load(td_depot* depot, uint64_t job, const void* plan, size_t plan_bytes) {
  return submit(depot, job, plan, plan_bytes, &decode_load_plan, &Depot::submit_load);
}

td_status td_submit_store(td_depot* depot, uint64_t job, const void* plan, size_t plan_bytes) {
  return submit(depot, job, plan, plan_bytes, &decode_store_plan, &Depot::submit_store);
}

td_status td_wait_gathered(td_depot* depot, uint64_t timeout_ns) {
  return guarded([&]() -> Status {
    if (auto given = require_open(depot); !given) return given;
    return timed(depot->engine->wait_gathered(duration_from(timeout_ns)), "gathering");
  });
}

td_status td_depot_mark_stream(td_depot* depot, void* stream) {
  return guarded([&]() -> Status {
    if (auto given = require_open(depot); !given) return given;
    return depot->engine->mark_stream(stream);
  });
}

td_status td_depot_engine_step(td_depot* depot, int begins) {
  return guarded([&]() -> Status {
    if (auto given = require_open(depot); !given) return given;
    depot->engine->engine_step(begins != 0);
    return {};
  });
}

td_status td_cancel(td_depot* depot, uint64_t job) {
  return guarded([&]() -> Status {
    if (auto given = require_open(depot); !given) return given;
    depot->engine->cancel(job);
    return {};
  });
}

const char* td_failure_reason_name(int reason) {
  if (reason < TD_FAILED_ABSENT || reason > TD_FAILED_PINNED) return "unknown";
  return name(static_cast<ItemFailure::Reason>(reason));
}

td_status td_poll(td_depot* depot, td_completion** completions, size_t* count) {
  return guarded([&]() -> Status {
    auto given = require_open(depot, {{"completions", completions}, {"count", count}});
    if (!given) return given;
    std::lock_guard lock(depot->mutex);
    auto& done = depot->undelivered;
    auto fresh = depot->engine->poll();
    if (done.empty()) {
      done = std::move(fresh);
    } else {
      std::ranges::move(fresh, std::back_inserter(done));
    }
    *completions = flatten(done);
    *count = done.size();
    done.clear();
    return {};
  });
}

td_status td_flush(td_depot* depot, uint64_t timeout_ns) {
  return guarded([&]() -> Status {
    if (auto given = require_open(depot); !given) return given;
    return timed(depot->engine->flush(duration_from(timeout_ns)), "flushing");
  });
}

td_status td_refresh(td_depot* depot) {
  return guarded([&]() -> Status {
    if (auto given = require_open(depot); !given) return given;
    depot->engine->refresh();
    return {};
  });
}

td_status td_stats_json(td_depot* depot, char** json) {
  return guarded([&]() -> Status {
    if (auto given = require_open(depot, {{"json", json}}); !given) return given;
    const std::string text = to_json(depot->engine->stats());
    char* const out = allocate<char>(text.size() + 1);
    std::memcpy(out, text.c_str(), text.size() + 1);
    *json = out;
    return {};
  });
}
