/* Rows on their way into and out of packets, with what a predictor foretells and with what packets missed.
 *
 * ROWS rows at a time, which stay in the second-level cache from the first step to the last. Bit-identical to
 * foretell.py: the same FP32 operations in the same order.
 */
#ifndef LOWBIT_FEEDBACK_H
#define LOWBIT_FEEDBACK_H

#include "input_codes.h"

/* What is foretold of T rows: codes times a matrix times `scale`. Field by field as cpu_foretell.py fills it in. */
typedef struct {
    const int8_t *codes;
    int64_t codes_row_nbytes;
    Matrix matrix;
    const float *scale;
} Share;

/* Scratch of one call: ROWS rows of values, apart by `apart`. */
typedef struct {
    const Share *share; /* or null */
    Factors factors;
    int64_t H, apart;
    float *value, *arrived;
} Feedback;

/* Distance of scratch rows: no multiple of a page, or one column of all rows would share a set of the cache. */
INLINE int64_t apart_of(int64_t H) { return (H + BLOCK - 1) / (2 * BLOCK) * (2 * BLOCK) + BLOCK; }

INLINE void plan_feedback(Feedback *feedback, const Share *share, int64_t H, Arena *from) {
    feedback->share = share, feedback->H = H, feedback->apart = apart_of(H);
    if (share) plan_factors(&feedback->factors, share->matrix, from);
    feedback->value = take(from, ROWS * feedback->apart, 4), feedback->arrived = take(from, ROWS * feedback->apart, 4);
}

/* Rows t to t + count of what is foretold, to an ending. */
static void foretell_rows(Feedback *feedback, int64_t t, int64_t count, const Ending *with, int way) {
    const Share *share = feedback->share;
    for (int64_t q = 0; q < count; q++)
        put_codes(&feedback->factors, q, share->codes + (t + q) * share->codes_row_nbytes);
    multiply_factors(&feedback->factors, count, share->scale, with, way);
}

/* value = x + missed. */
INLINE void feed(float *restrict value, const uint8_t *restrict x, const float *restrict missed, int64_t n,
                 const int is_bf16) {
    for (int64_t i = 0; i < n; i++) value[i] = as_float(element_bits(x, i, is_bf16)) + missed[i];
}

static CLONES void feed_plain(float *value, const uint8_t *x, const float *missed, int64_t n, int is_bf16) {
    if (is_bf16) feed(value, x, missed, n, 1);
    else feed(value, x, missed, n, 0);
}

#ifdef HAS_AVX512
VECTOR void feed16(float *value, const uint8_t *x, const float *missed, int64_t n, const int is_bf16) {
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 here = first16(n - i);
        _mm_prefetch((const char *)(missed + i + 4 * BLOCK), _MM_HINT_T0);
        const __m512 sum = _mm512_add_ps(values16(x, is_bf16, i, n), _mm512_maskz_loadu_ps(here, missed + i));
        _mm512_mask_storeu_ps(value + i, here, sum);
    }
}

AVX512 static void feed512(float *value, const uint8_t *x, const float *missed, int64_t n, int is_bf16) {
    if (is_bf16) feed16(value, x, missed, n, 1);
    else feed16(value, x, missed, n, 0);
}
#endif

static void feed_row(float *value, const uint8_t *x, const float *missed, int64_t n, int is_bf16) {
#ifdef HAS_AVX512
    if (takes_avx512()) {
        feed512(value, x, missed, n, is_bf16);
        return;
    }
#endif
    feed_plain(value, x, missed, n, is_bf16);
}

/* Rows t to t + count that are encoded: x, less what is foretold of it, plus what was missed, where these are given. */
static void feed_rows(Feedback *feedback, int64_t t, int64_t count, const uint8_t *x, int64_t x_row_nbytes, int is_bf16,
                      const float *missed, int64_t missed_row_values) {
    x += t * x_row_nbytes;
    if (missed) missed += t * missed_row_values;
    if (feedback->share) {
        const Ending with = {feedback->value, feedback->apart, x, x_row_nbytes, missed, missed_row_values};
        foretell_rows(feedback, t, count, &with, is_bf16 ? TAKEN_FROM_BF16 : TAKEN_FROM_FP32);
        return;
    }
    for (int64_t q = 0; q < count; q++)
        feed_row(feedback->value + q * feedback->apart, x + q * x_row_nbytes, missed + q * missed_row_values,
                 feedback->H, is_bf16);
}

static CLONES void add_row(float *restrict to, const float *restrict from, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] += from[i];
}

static CLONES void subtract_rows(float *restrict to, const float *restrict a, const float *restrict b, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = a[i] - b[i];
}

/* What a packet of `count` rows of `value` misses of them. */
static void keep_missed(Feedback *feedback, Decoder *decoder, const uint8_t *packet, int64_t packet_row_nbytes,
                        int64_t count, float *missed, int64_t missed_row_values) {
#ifdef HAS_AVX512
    if (decoder->fast && misses_at_once(&decoder->wide)) {
        for (int64_t q = 0; q < count; q++, packet += packet_row_nbytes)
            missed_row512(&decoder->wide, &packet, feedback->value + q * feedback->apart, missed + q * missed_row_values);
        return;
    }
#endif
    run_decoder(decoder, &packet, &packet_row_nbytes, 0, count, feedback->arrived, feedback->apart, 0);
    for (int64_t q = 0; q < count; q++)
        subtract_rows(missed + q * missed_row_values, feedback->value + q * feedback->apart,
                      feedback->arrived + q * feedback->apart, feedback->H);
}

#endif
