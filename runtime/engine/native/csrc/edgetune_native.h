/* The C interface of edgetune's native decoder engine.
 *
 * A model is opened from a bundle: the text of its `native.json` and the path of its
 * `model.onnx.data`. Keys and values lie in memory of the caller's, one adapter may be named for
 * every row, and one call runs any number of tokens of any number of rows. Nothing here throws, and
 * nothing allocates while tokens are run. Calls on one model wait for each other.
 *
 * Functions that can fail return NULL or a number below 0 and write one line into `error`.
 */
#ifndef EDGETUNE_NATIVE_H
#define EDGETUNE_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define EDGETUNE_API __declspec(dllexport)
#else
#define EDGETUNE_API __attribute__((visibility("default")))
#endif

#define EDGETUNE_ABI 2

typedef struct edgetune_model edgetune_model;
typedef struct edgetune_adapter edgetune_adapter;

typedef struct {
    int32_t hidden, vocab, layers, heads, kv_heads, head_dim, positions;
    int32_t cache_bytes;    /* what one head's key or value of a token takes in the cache */
    int32_t cache_step;     /* the capacity of a cache is a multiple of this many tokens */
    int32_t most_tokens;    /* tokens that one call runs at most */
    int32_t threads;
    uint64_t weight_bytes;  /* what a token reads of the weights */
} edgetune_sizes;

/* Keys and values: (2 * layers, slots, kv_heads, capacity, cache_bytes), a layer's keys before its
 * values. `cache_step` tokens lie together, so tokens are copied between slots in whole steps. Zeros
 * at first. */
typedef struct {
    void *memory;
    int64_t slots, capacity;
} edgetune_cache;

/* `count` tokens of one row, appended behind `length` tokens that its slot already holds. */
typedef struct {
    const int32_t *ids;
    int32_t count, slot, length;
    const edgetune_adapter *adapter; /* NULL: none */
} edgetune_span;

EDGETUNE_API int edgetune_abi(void);

/* The instruction sets that were built and that this processor has, best first, with spaces
 * between; empty where the engine cannot run. */
EDGETUNE_API const char *edgetune_instruction_sets(void);

/* Open a model; `cache_bits` of a number in its caches: 16 (half precision) or 8 (a scale for each
 * token and head); `instruction_set` NULL takes the best. */
EDGETUNE_API edgetune_model *edgetune_open(const char *plan, size_t plan_bytes,
                                           const char *data_path, int threads, int cache_bits,
                                           const char *instruction_set, char *error,
                                           size_t error_bytes);
EDGETUNE_API void edgetune_close(edgetune_model *model);
EDGETUNE_API void edgetune_model_sizes(const edgetune_model *model, edgetune_sizes *sizes);
EDGETUNE_API const char *edgetune_model_instruction_set(const edgetune_model *model);

/* An adapter without layers; then for each site its A (in, rank) and B (rank, out) in float32, the
 * scaling already in B. `site` is the name in `native.json`. */
EDGETUNE_API edgetune_adapter *edgetune_adapter_new(edgetune_model *model);
EDGETUNE_API int edgetune_adapter_add(edgetune_adapter *adapter, const char *site, int rank,
                                      const float *a, const float *b, char *error,
                                      size_t error_bytes);
EDGETUNE_API uint64_t edgetune_adapter_bytes(const edgetune_adapter *adapter);
EDGETUNE_API void edgetune_adapter_free(edgetune_adapter *adapter);

/* Run tokens. `wanted` names tokens, counted over all spans in order and ascending; of each the
 * logits (vocab numbers) are written to `logits` and the final states (hidden numbers) to `states`,
 * one after the other; either may be NULL. 0, or below 0 with a line in `error`. */
EDGETUNE_API int edgetune_run(edgetune_model *model, const edgetune_cache *cache,
                              const edgetune_span *spans, int span_count, const int32_t *wanted,
                              int wanted_count, float *logits, float *states, char *error,
                              size_t error_bytes);

/* Read `bytes` of the model's weights with its own threads as fast as they can: seconds. What a
 * measured step is held against. */
EDGETUNE_API double edgetune_read_weights(edgetune_model *model);

#ifdef __cplusplus
}
#endif
#endif
