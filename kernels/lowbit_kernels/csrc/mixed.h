/* Packets of mixed features: see mixed.py. A row stays in the first-level cache from its features to its packet, and
 * back.
 */
#ifndef LOWBIT_MIXED_H
#define LOWBIT_MIXED_H

#include "rotate.h"

/* How rows are mixed: factors (for encoding their inverses) or null, the K features that are outliers, and runs. */
typedef struct {
    const float *factor;
    const int64_t *outlier_index;
    const Run *runs;
    int64_t count;
} Mixing;

INLINE void enter(float *restrict row, const uint8_t *restrict x, const float *restrict factor, int64_t H,
                  const int is_bf16, const int has_factor) {
    for (int64_t i = 0; i < H; i++) {
        const float v = as_float(element_bits(x, i, is_bf16));
        row[i] = has_factor ? v * factor[i] : v;
    }
}

static CLONES void enter_row(float *row, const uint8_t *x, const float *factor, int64_t H, int is_bf16) {
    if (is_bf16 && factor) enter(row, x, factor, H, 1, 1);
    else if (is_bf16) enter(row, x, factor, H, 1, 0);
    else if (factor) enter(row, x, factor, H, 0, 1);
    else enter(row, x, factor, H, 0, 0);
}

/* row [H + K] of the features of x. */
static void mix_row(float *row, const uint8_t *x, const Mixing *mixing, int64_t H, int64_t K, int is_bf16, int fast) {
    enter_row(row, x, mixing->factor, H, is_bf16);
    for (int64_t k = 0; k < K; k++) {
        const int64_t i = mixing->outlier_index[k];
        row[i] = 0.0f, row[H + k] = as_float(element_bits(x, i, is_bf16));
    }
    rotate_row(row, mixing->runs, mixing->count, 0, fast);
}

static CLONES void multiply_row(float *restrict row, const float *restrict factor, int64_t H) {
    for (int64_t i = 0; i < H; i++) row[i] *= factor[i];
}

static CLONES void leave_row(float *restrict out, const float *restrict row, int64_t H, int add) {
    if (add)
        for (int64_t i = 0; i < H; i++) out[i] = one_nan(out[i] + row[i]);
    else
        for (int64_t i = 0; i < H; i++) out[i] = one_nan(row[i]);
}

/* The features that row [H + K] was made of, into out or added to it. */
static void unmix_row(float *out, float *row, const Mixing *mixing, int64_t H, int64_t K, int add, int fast) {
    rotate_row(row, mixing->runs, mixing->count, 1, fast);
    if (mixing->factor) multiply_row(row, mixing->factor, H);
    for (int64_t k = 0; k < K; k++) row[mixing->outlier_index[k]] = row[H + k];
    leave_row(out, row, H, add);
}

#endif
