/* An embedding in C99: stores two chunks, closes, opens again, finds both, loads them into another place. */
#define _POSIX_C_SOURCE 200809L
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tokendepot/c.h"

enum {
  LAYERS = 2,
  HEADS = 3,
  BLOCK_TOKENS = 4,
  CHUNK_TOKENS = 16,
  ROW_BYTES = 64,
  BLOCKS = 16,
  BLOCK_BYTES = HEADS * BLOCK_TOKENS * ROW_BYTES,
  PLANE_BYTES = BLOCKS * BLOCK_BYTES,
  CACHE_BYTES = LAYERS * 2 * PLANE_BYTES,
  BLOCKS_PER_CHUNK = CHUNK_TOKENS / BLOCK_TOKENS
};

static void stop(int line, const char* what) {
  fprintf(stderr, "embed.c:%d: %s (%s)\n", line, what, td_last_error());
  exit(1);
}
#define EXPECT(condition)                         \
  do {                                            \
    if (!(condition)) stop(__LINE__, #condition); \
  } while (0)
#define OK(call) EXPECT((call) == TD_OK)

static const td_part kPart = {0, LAYERS, 0, HEADS};

static td_depot* open_depot(const char* root, unsigned char* cache, uint8_t digest[TD_KEY_BYTES]) {
  char config[4200];
  td_plane views[LAYERS * 2];
  td_paged_cache paged;
  td_depot* depot = NULL;
  int i;

  snprintf(config, sizeof config,
           "{\"roots\":[\"%s?capacity=16MiB&segment=1MiB\"],\"slab\":\"4MiB\",\"free_space_reserve\":0}",
           root);
  OK(td_open(config, 0, &depot));
  OK(td_register_namespace(depot, "{\"model\":\"embedded\"}", digest));

  for (i = 0; i < LAYERS * 2; ++i) {
    views[i].base = cache + (size_t)i * PLANE_BYTES;
    views[i].block_stride = BLOCK_BYTES;
    views[i].head_stride = BLOCK_TOKENS * ROW_BYTES;
    views[i].token_stride = ROW_BYTES;
    views[i].piece_bytes = 0;
  }
  memset(&paged, 0, sizeof paged);
  paged.kind = TD_CANONICAL;
  paged.part = kPart;
  paged.tokens = CHUNK_TOKENS;
  paged.block_tokens = BLOCK_TOKENS;
  paged.planes = 2;
  paged.row_bytes = ROW_BYTES;
  paged.block_count = BLOCKS;
  paged.views = views;
  paged.views_per_layer = 2;
  OK(td_attach(depot, &paged));
  return depot;
}

/* Waits for the one job and returns how many of its items went well. */
static uint32_t finish(td_depot* depot, uint64_t job) {
  const struct timespec pause = {0, 1000000};
  int round;
  for (round = 0; round < 20000; ++round) {
    td_completion* done = NULL;
    size_t count = 0;
    OK(td_poll(depot, &done, &count));
    if (count > 0) {
      uint32_t ok = done[0].items_ok;
      EXPECT(count == 1 && done[0].job == job);
      td_free(done);
      return ok;
    }
    td_free(done);
    nanosleep(&pause, NULL);
  }
  stop(__LINE__, "the job does not end");
  return 0;
}

int main(int argc, char** argv) {
  static unsigned char cache[CACHE_BYTES];
  static unsigned char before[CACHE_BYTES];
  static const int32_t stored_blocks[2 * BLOCKS_PER_CHUNK] = {5, 2, 9, 0, 1, 3, 4, 6};
  static const int32_t loaded_blocks[2 * BLOCKS_PER_CHUNK] = {7, 8, 10, 11, 12, 13, 14, 15};
  uint32_t tokens[2 * CHUNK_TOKENS + 3];
  uint8_t digest[TD_KEY_BYTES];
  td_store_item items[2];
  td_group_want want;
  td_load_group group;
  td_key_chain* chain = NULL;
  td_depot* depot;
  td_bytes plan;
  const uint8_t* keys;
  size_t count = 0;
  char* stats = NULL;
  size_t i, view;

  if (argc != 2) {
    fprintf(stderr, "usage: embed ROOT\n");
    return 2;
  }
  EXPECT(td_abi_version() == TD_ABI_VERSION);
  EXPECT(td_open("{\"roots\":[]}", 0, &depot) == TD_INVALID_ARGUMENT);
  EXPECT(strstr(td_last_error(), "roots") != NULL);

  for (i = 0; i < CACHE_BYTES; ++i) cache[i] = (unsigned char)((i * 2654435761u) >> 13);
  memcpy(before, cache, sizeof cache);
  depot = open_depot(argv[1], cache, digest);

  for (i = 0; i < sizeof tokens / sizeof tokens[0]; ++i) tokens[i] = (uint32_t)(i * i);
  OK(td_key_chain_new(digest, CHUNK_TOKENS, NULL, 0, NULL, 0, &chain));
  OK(td_key_chain_append(chain, tokens, sizeof tokens / sizeof tokens[0], NULL, 0));
  keys = td_key_chain_keys(chain, &count);
  EXPECT(count == 2);
  EXPECT(td_key_chain_tokens_seen(chain) == sizeof tokens / sizeof tokens[0]);

  for (i = 0; i < 2; ++i) {
    memset(&items[i], 0, sizeof items[i]);
    memcpy(items[i].key, keys + i * TD_KEY_BYTES, TD_KEY_BYTES);
    items[i].chunk = (uint32_t)i;
    items[i].blocks = stored_blocks + i * BLOCKS_PER_CHUNK;
    items[i].block_count = BLOCKS_PER_CHUNK;
  }
  OK(td_plan_store(digest, items, 2, &plan));
  OK(td_submit_store(depot, 1, plan.data, plan.size));
  td_free(plan.data);
  OK(td_wait_gathered(depot, UINT64_MAX));
  memset(cache, 0, sizeof cache);
  OK(td_flush(depot, 30000000000u));
  EXPECT(finish(depot, 1) == 2);
  td_close(depot);

  depot = open_depot(argv[1], cache, digest);
  memset(&want, 0, sizeof want);
  want.kind = TD_CANONICAL;
  want.part = kPart;
  want.tokens = CHUNK_TOKENS;
  OK(td_longest_prefix(depot, keys, 2, &want, 1, &count));
  EXPECT(count == 2);
  memset(&group, 0, sizeof group);
  group.want = want;
  group.blocks_per_chunk = BLOCKS_PER_CHUNK;
  group.blocks = loaded_blocks;
  group.block_count = 2 * BLOCKS_PER_CHUNK;
  OK(td_plan_load(depot, digest, keys, 2, &group, 1, 10000000000u, &plan));
  OK(td_submit_load(depot, 7, plan.data, plan.size));
  td_free(plan.data);
  EXPECT(finish(depot, 7) == 2);
  for (view = 0; view < LAYERS * 2; ++view) {
    for (i = 0; i < 2 * BLOCKS_PER_CHUNK; ++i) {
      const size_t from = view * PLANE_BYTES + (size_t)stored_blocks[i] * BLOCK_BYTES;
      const size_t to = view * PLANE_BYTES + (size_t)loaded_blocks[i] * BLOCK_BYTES;
      EXPECT(memcmp(before + from, cache + to, BLOCK_BYTES) == 0);
    }
  }

  OK(td_forget(depot, keys, 0));
  OK(td_longest_prefix(depot, keys, 2, &want, 1, &count));
  EXPECT(count == 0);
  OK(td_stats_json(depot, &stats));
  EXPECT(strstr(stats, "\"entries\"") != NULL);
  td_free(stats);
  td_key_chain_free(chain);
  td_close(depot);
  return 0;
}
