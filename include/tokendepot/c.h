/* The C interface: everything an inference engine in any language needs to keep KV-cache chunks in a depot.
 *
 * Errors.    Functions that can fail return td_status; TD_OK is 0. td_last_error() then has one sentence. A
 * failed call leaves its out parameters untouched. NULL for a required pointer is TD_INVALID_ARGUMENT.
 * Ownership. Handles belong to the caller: each td_..._open/new has one td_..._close/free. Memory that a
 * function returns through `td_bytes`, `char**` or `td_completion**` belongs to the caller and goes back
 * through td_free(). Pointers passed in are read during the call only, with one exception: the paged cache
 * given to td_attach() must stay valid until td_close() has returned. Threads.   A td_depot may be used from
 * any number of threads at once; td_close() must be the last call on it. A td_key_chain is for one thread at
 * a time. td_last_error() is per thread. fork().    In the child every call on an inherited td_depot answers
 * TD_CLOSED; td_close() is allowed there. Strings    are UTF-8 and end with a zero byte unless a length is
 * passed with them.
 *
 * The meaning of each operation, its bounds and guarantees are those of the C++ function of the same name in
 * depot.h.
 */
#ifndef TOKENDEPOT_C_H_
#define TOKENDEPOT_C_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Grows when a struct or a meaning below changes; new functions alone do not change it. */
#define TD_ABI_VERSION 1
/* What the library that is loaded was built with: compare with TD_ABI_VERSION before anything else. */
uint32_t td_abi_version(void);

typedef enum td_status {
  TD_OK = 0,
  TD_INVALID_ARGUMENT = 1,
  TD_NOT_FOUND = 2,
  TD_CORRUPT = 3,
  TD_IO = 4,
  TD_NO_SPACE = 5,
  TD_PERMISSION = 6,
  TD_UNSUPPORTED = 7,
  TD_BUSY = 8,
  TD_TIMED_OUT = 9,
  TD_CLOSED = 10,
  TD_NO_MEMORY = 11
} td_status;

/* "ok", "invalid_argument", ...; "unknown" for any other number. Static. */
const char* td_status_name(td_status status);
/* The sentence of this thread's last call that failed, "" before the first. Valid until the next one fails.
 */
const char* td_last_error(void);
/* The errno behind it, 0 when no system call was involved. */
int td_last_errno(void);
/* Gives back what a function returned. NULL is fine. */
void td_free(void* memory);

typedef struct td_bytes {
  uint8_t* data;
  size_t size;
} td_bytes;

enum { TD_KEY_BYTES = 32, TD_SKIP_BLOCK = -1 };

typedef enum td_log_level {
  TD_LOG_DEBUG = 0,
  TD_LOG_INFO = 1,
  TD_LOG_WARNING = 2,
  TD_LOG_ERROR = 3
} td_log_level;
/* Called from any thread, also several at once, until replaced; must not call back into a td_depot. */
typedef void (*td_log_callback)(td_log_level level, const char* text, void* user);
/* One sink for the process; NULL restores stderr. */
td_status td_set_log(td_log_callback callback, void* user);

/* --- depot
 * ------------------------------------------------------------------------------------------------------ */

typedef struct td_depot td_depot;

enum {
  TD_OPEN_NO_CATALOG = 1, /* a worker that only executes plans */
  TD_OPEN_NO_WRITER = 2   /* never stores */
};

/* `config_json`: e.g. {"roots":["/dev/shm/depot?capacity=8GiB"]}; unknown keys are errors. */
td_status td_open(const char* config_json, uint32_t flags, td_depot** out);
/* Cancels and waits for the work in flight, then frees the handle. NULL is fine. */
void td_close(td_depot* depot);

/* `manifest_json`: a JSON object of everything that must be equal for KV bytes to be exchangeable. */
td_status td_register_namespace(td_depot* depot, const char* manifest_json, uint8_t digest[TD_KEY_BYTES]);

/* --- keys
 * ------------------------------------------------------------------------------------------------------- */

typedef struct td_key_chain td_key_chain;

typedef struct td_media {
  const void* content_hash;
  size_t content_hash_bytes;
  uint64_t first_token;
  uint64_t tokens;
} td_media;

/* `salt` and `lora` may be NULL with length 0. */
td_status td_key_chain_new(const uint8_t namespace_digest[TD_KEY_BYTES], uint32_t chunk_tokens,
                           const void* salt, size_t salt_bytes, const void* lora, size_t lora_bytes,
                           td_key_chain** out);
void td_key_chain_free(td_key_chain* chain);
td_status td_key_chain_append(td_key_chain* chain, const uint32_t* tokens, size_t token_count,
                              const td_media* media, size_t media_count);
/* `*count` keys of TD_KEY_BYTES each; belongs to the chain, valid until its next append or free. NULL for a
 * NULL chain. */
const uint8_t* td_key_chain_keys(const td_key_chain* chain, size_t* count);
uint64_t td_key_chain_tokens_seen(const td_key_chain* chain);

/* --- scheduler half: memory only, no I/O
 * ------------------------------------------------------------------------ */

typedef enum td_layout_kind { TD_CANONICAL = 1, TD_OPAQUE = 2 } td_layout_kind;

typedef struct td_part {
  uint16_t layer_begin;
  uint16_t layer_end;
  uint16_t head_begin;
  uint16_t head_end;
} td_part;

typedef struct td_group_want {
  uint16_t group;
  uint16_t kind; /* td_layout_kind */
  td_part part;  /* over all ranks */
  uint32_t tokens;
  uint32_t window_chunks; /* 0 = every chunk of the prefix */
} td_group_want;

td_status td_longest_prefix(td_depot* depot, const uint8_t* keys, size_t key_count,
                            const td_group_want* wants, size_t want_count, size_t* chunks);
/* out[i] = 1 when all of `want` is stored for key i, else 0. */
td_status td_stored(td_depot* depot, const uint8_t* keys, size_t key_count, const td_group_want* want,
                    uint8_t* out);

typedef struct td_load_group {
  td_group_want want;
  uint32_t first_chunk;
  uint32_t blocks_per_chunk;
  const int32_t* blocks; /* TD_SKIP_BLOCK where nothing is wanted */
  size_t block_count;
} td_load_group;

/* `deadline_ns` counts from submission; 0 = none. The plan may travel to another process. */
td_status td_plan_load(td_depot* depot, const uint8_t namespace_digest[TD_KEY_BYTES], const uint8_t* keys,
                       size_t key_count, const td_load_group* groups, size_t group_count,
                       uint64_t deadline_ns, td_bytes* plan);
td_status td_forget(td_depot* depot, const uint8_t key[TD_KEY_BYTES], uint16_t group);

typedef struct td_store_item {
  uint8_t key[TD_KEY_BYTES];
  uint32_t chunk;
  uint16_t group;
  const int32_t* blocks;
  size_t block_count;
} td_store_item;

td_status td_plan_store(const uint8_t namespace_digest[TD_KEY_BYTES], const td_store_item* items,
                        size_t item_count, td_bytes* plan);

/* --- worker half
 * ------------------------------------------------------------------------------------------------ */

typedef struct td_plane {
  void* base;
  int64_t block_stride; /* bytes, as are the next two */
  int64_t head_stride;
  int64_t token_stride;
  uint32_t piece_bytes;
} td_plane;

/* See layout.h: GroupShape and PagedCache. */
typedef struct td_paged_cache {
  uint16_t group;
  uint16_t kind; /* td_layout_kind */
  td_part part;
  uint32_t tokens;
  uint32_t block_tokens;
  uint16_t planes;     /* canonical: 2 = K and V, 1 = one tensor; opaque: 0 */
  uint32_t row_bytes;  /* canonical */
  uint32_t page_bytes; /* opaque */
  uint32_t block_count;
  const td_plane* views; /* [layer of part][plane or piece], layers * views_per_layer of them */
  size_t views_per_layer;
} td_paged_cache;

td_status td_attach(td_depot* depot, const td_paged_cache* cache);
td_status td_submit_load(td_depot* depot, uint64_t job, const void* plan, size_t plan_bytes);
td_status td_submit_store(td_depot* depot, uint64_t job, const void* plan, size_t plan_bytes);
/* `stream`: a cudaStream_t, NULL for the legacy default stream. */
td_status td_depot_mark_stream(td_depot* depot, void* stream);
/* Depot::engine_step(): `begins` is 1 before a step's work is queued on the device, 0 after. */
td_status td_depot_engine_step(td_depot* depot, int begins);
/* TD_OK, or TD_TIMED_OUT. */
td_status td_wait_gathered(td_depot* depot, uint64_t timeout_ns);
td_status td_cancel(td_depot* depot, uint64_t job);

typedef enum td_job_kind { TD_LOAD = 0, TD_STORE = 1 } td_job_kind;

typedef enum td_failure_reason {
  TD_FAILED_ABSENT = 0,
  TD_FAILED_MISMATCH = 1,
  TD_FAILED_CORRUPT = 2,
  TD_FAILED_IO_ERROR = 3,
  TD_FAILED_TIMED_OUT = 4,
  TD_FAILED_CANCELLED = 5,
  TD_FAILED_DROPPED = 6,
  TD_FAILED_PINNED = 7
} td_failure_reason;
/* "absent", "mismatch", ...; "unknown" for any other number. Static. */
const char* td_failure_reason_name(int reason);

typedef struct td_item_failure {
  uint32_t item;
  uint32_t chunk;
  uint16_t group;
  uint16_t reason; /* td_failure_reason */
} td_item_failure;

typedef struct td_completion {
  uint64_t job;
  uint32_t kind; /* td_job_kind */
  uint32_t items_ok;
  uint64_t bytes;
  uint64_t nanoseconds;
  const td_item_failure* failures; /* part of the same memory: not to be freed */
  size_t failure_count;
} td_completion;

/* The jobs that ended since the last call: `*count` of them, one td_free() for all (also when there are
 * none). */
td_status td_poll(td_depot* depot, td_completion** completions, size_t* count);
/* Waits until all stores submitted so far are acknowledged or failed: TD_OK, or TD_TIMED_OUT. */
td_status td_flush(td_depot* depot, uint64_t timeout_ns);

/* --- both
 * ------------------------------------------------------------------------------------------------------- */

td_status td_refresh(td_depot* depot);
/* The fields of stats.h by their names. */
td_status td_stats_json(td_depot* depot, char** json);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* TOKENDEPOT_C_H_ */
