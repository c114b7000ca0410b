/* The codec for a CPU, single-threaded, called with ctypes: encode, decode, decode_sum and requantize, and what of these
 * a predictor and a closed loop go with.
 *
 * Bit-identical to reference.py and foretell.py whichever way a row takes: AVX-512 where the processor has it, else the plain C of
 * encode_row.h and decode_row.h, of which the compiler makes a clone for AVX2. Must be built without -ffast-math.
 */
#include "feedback.h"
#include "mixed.h"

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

enum { DONE = 0, NO_MEMORY = 1, BAD_OUTLIER_INDEX = 2 };

EXPORT void lowbit_only_plain(int on) { only_plain = on; }

EXPORT int lowbit_uses_avx512(void) { return takes_avx512(); }

/* A bad index would write outside the row, so it is worth one pass over K numbers a call. */
static int within(const int64_t *index, int64_t count, int64_t features) {
    int64_t last = -1;
    for (int64_t k = 0; k < count; k++) {
        if (index[k] <= last || index[k] >= features) return 0;
        last = index[k];
    }
    return 1;
}

static int ascending(const Layout *at, const int64_t *index) { return within(index, at->outliers, at->features); }

/* Write x (T rows of fp32 or bf16) into packet. Strides are in bytes. Pointers a layout has no use for may be null. */
EXPORT int lowbit_encode(const Layout *at, const uint8_t *x, int64_t x_row_nbytes, int is_bf16, int64_t T,
                         uint8_t *packet, int64_t packet_row_nbytes, const float *inverse_scale, const float *minimum,
                         const int64_t *outlier_index) {
    const Static with = {inverse_scale, minimum, 0, 0, outlier_index};
    Encoder encoder;
    Arena arena = {0, 0};
    void *room;
    if (!ascending(at, outlier_index)) return BAD_OUTLIER_INDEX;
    plan_encoder(&encoder, at, with, is_bf16, &arena);
    if (!allocate(&arena, &room)) return NO_MEMORY;
    plan_encoder(&encoder, at, with, is_bf16, &arena);
    run_encoder(&encoder, x, x_row_nbytes, packet, packet_row_nbytes, T);
    free(room);
    return DONE;
}

/* Write the sum of R packets, in rank order, into out (T rows of fp32), or add that of one. Strides of packets are in
 * bytes, one a packet, all others in values. */
EXPORT int lowbit_decode_sum(const Layout *at, const uint8_t *const *packets, const int64_t *packet_row_nbytes,
                             int64_t R, int64_t T, float *out, int64_t out_row_values, const float *scale,
                             int64_t scale_row, const float *minimum, int64_t minimum_row, const int64_t *outlier_index,
                             int add) {
    const Static with = {scale, minimum, scale_row, minimum_row, outlier_index};
    Decoder decoder;
    Arena arena = {0, 0};
    void *room;
    if (!ascending(at, outlier_index)) return BAD_OUTLIER_INDEX;
    plan_decoder(&decoder, at, with, R, &arena);
    if (!allocate(&arena, &room)) return NO_MEMORY;
    plan_decoder(&decoder, at, with, R, &arena);
    run_decoder(&decoder, packets, packet_row_nbytes, 0, T, out, out_row_values, add);
    free(room);
    return DONE;
}

EXPORT int lowbit_decode(const Layout *at, const uint8_t *packet, int64_t packet_row_nbytes, int64_t T, float *out,
                         int64_t out_row_values, const float *scale, const float *minimum, const int64_t *outlier_index,
                         int add) {
    return lowbit_decode_sum(at, &packet, &packet_row_nbytes, 1, T, out, out_row_values, scale, 0, minimum, 0,
                             outlier_index, add);
}

/* Write the sum of R packets into another, whose layout and static numbers are those of `gather`; row by row, so that a
 * sum never leaves the cache. */
EXPORT int lowbit_requantize(const Layout *at, const uint8_t *const *packets, const int64_t *packet_row_nbytes,
                             int64_t R, int64_t T, const float *scale, int64_t scale_row, const float *minimum,
                             int64_t minimum_row, const int64_t *outlier_index, const Layout *gather, uint8_t *packet,
                             int64_t to_row_nbytes, const float *gather_inverse_scale, const float *gather_minimum,
                             const int64_t *gather_outlier_index) {
    const Static with = {scale, minimum, scale_row, minimum_row, outlier_index};
    const Static gather_with = {gather_inverse_scale, gather_minimum, 0, 0, gather_outlier_index};
    Decoder decoder;
    Encoder encoder;
    Arena arena = {0, 0};
    void *room;
    if (!ascending(at, outlier_index) || !ascending(gather, gather_outlier_index)) return BAD_OUTLIER_INDEX;
    plan_decoder(&decoder, at, with, R, &arena), plan_encoder(&encoder, gather, gather_with, 0, &arena);
    take(&arena, TOGETHER * at->features, 4);
    if (!allocate(&arena, &room)) return NO_MEMORY;
    plan_decoder(&decoder, at, with, R, &arena), plan_encoder(&encoder, gather, gather_with, 0, &arena);
    float *sum = take(&arena, TOGETHER * at->features, 4);
    /* Several rows at once where that saves reading static numbers, else one, which stays closer. */
    const int64_t together = at->group_size && gather->group_size ? 1 : TOGETHER;
    for (int64_t t = 0, count; t < T; t += count, packet += count * to_row_nbytes) {
        count = least(together, T - t);
        run_decoder(&decoder, packets, packet_row_nbytes, t, count, sum, at->features, 0);
        run_encoder(&encoder, (const uint8_t *)sum, 4 * at->features, packet, to_row_nbytes, count);
    }
    free(room);
    return DONE;
}

/* Codes int8 [T, O] of T rows of fp32 or bf16: rounded times `input_scale`, multiplied, plus `offset`, times `factor`. */
EXPORT int lowbit_foretell_codes(const uint8_t *input, int64_t input_row_nbytes, int is_bf16, int64_t T,
                                 const float *input_scale, const uint8_t *packed, int64_t H, int64_t K,
                                 const float *offset, const float *factor, int8_t *codes) {
    const Matrix first = {packed, H, K, 1};
    const int64_t apart = (K + BLOCK - 1) / BLOCK * BLOCK;
    Factors factors;
    Arena arena = {0, 0};
    void *room;
    plan_factors(&factors, first, &arena), take(&arena, ROWS * apart, 4);
    if (!allocate(&arena, &room)) return NO_MEMORY;
    plan_factors(&factors, first, &arena);
    float *sum = take(&arena, ROWS * apart, 4);
    const Ending with = {sum, apart, 0, 0, 0, 0};
    for (int64_t t = 0, count; t < T; t += count) {
        count = least(ROWS, T - t);
        for (int64_t q = 0; q < count; q++)
            put_values(&factors, q, input + (t + q) * input_row_nbytes, is_bf16, input_scale);
        multiply_factors(&factors, count, 0, &with, WRITTEN);
        for (int64_t q = 0; q < count; q++, codes += K)
            for (int64_t k = 0; k < K; k++)
                codes[k] = (int8_t)whole_code((sum[q * apart + k] + offset[k]) * factor[k]);
    }
    free(room);
    return DONE;
}

/* lowbit_encode of x, less what is foretold of it, plus `missed`, where these are given; `missed` becomes what the
 * packet misses of that. At least one of them is given. */
EXPORT int lowbit_encode_feedback(const Layout *at, const uint8_t *x, int64_t x_row_nbytes, int is_bf16, int64_t T,
                                  uint8_t *packet, int64_t packet_row_nbytes, const float *inverse_scale,
                                  const float *scale, const float *minimum, const int64_t *outlier_index,
                                  const Share *share, float *missed, int64_t missed_row_values) {
    const Static with = {inverse_scale, minimum, 0, 0, outlier_index};
    const Static back = {scale, minimum, 0, 0, outlier_index};
    Encoder encoder;
    Decoder decoder;
    Feedback feedback;
    Arena arena = {0, 0};
    void *room;
    if (!ascending(at, outlier_index)) return BAD_OUTLIER_INDEX;
    plan_encoder(&encoder, at, with, 0, &arena), plan_decoder(&decoder, at, back, 1, &arena);
    plan_feedback(&feedback, share, at->features, &arena);
    if (!allocate(&arena, &room)) return NO_MEMORY;
    plan_encoder(&encoder, at, with, 0, &arena), plan_decoder(&decoder, at, back, 1, &arena);
    plan_feedback(&feedback, share, at->features, &arena);
    for (int64_t t = 0, count; t < T; t += count, packet += count * packet_row_nbytes) {
        count = least(ROWS, T - t);
        feed_rows(&feedback, t, count, x, x_row_nbytes, is_bf16, missed, missed_row_values);
        run_encoder(&encoder, (const uint8_t *)feedback.value, 4 * feedback.apart, packet, packet_row_nbytes, count);
        if (missed)
            keep_missed(&feedback, &decoder, packet, packet_row_nbytes, count, missed + t * missed_row_values,
                        missed_row_values);
    }
    free(room);
    return DONE;
}

/* lowbit_requantize of the sum plus `owed`, which becomes what the packet misses of that. */
EXPORT int lowbit_requantize_feedback(const Layout *at, const uint8_t *const *packets,
                                      const int64_t *packet_row_nbytes, int64_t R, int64_t T, const float *scale,
                                      int64_t scale_row, const float *minimum, int64_t minimum_row,
                                      const int64_t *outlier_index, const Layout *gather, uint8_t *packet,
                                      int64_t to_row_nbytes, const float *gather_inverse_scale,
                                      const float *gather_scale, const float *gather_minimum,
                                      const int64_t *gather_outlier_index, float *owed, int64_t owed_row_values) {
    const Static with = {scale, minimum, scale_row, minimum_row, outlier_index};
    const Static gather_with = {gather_inverse_scale, gather_minimum, 0, 0, gather_outlier_index};
    const Static back = {gather_scale, gather_minimum, 0, 0, gather_outlier_index};
    Decoder decoder, gather_decoder;
    Encoder encoder;
    Feedback feedback;
    Arena arena = {0, 0};
    void *room;
    if (!ascending(at, outlier_index) || !ascending(gather, gather_outlier_index)) return BAD_OUTLIER_INDEX;
    plan_decoder(&decoder, at, with, R, &arena), plan_encoder(&encoder, gather, gather_with, 0, &arena);
    plan_decoder(&gather_decoder, gather, back, 1, &arena), plan_feedback(&feedback, 0, at->features, &arena);
    if (!allocate(&arena, &room)) return NO_MEMORY;
    plan_decoder(&decoder, at, with, R, &arena), plan_encoder(&encoder, gather, gather_with, 0, &arena);
    plan_decoder(&gather_decoder, gather, back, 1, &arena), plan_feedback(&feedback, 0, at->features, &arena);
    for (int64_t t = 0, count; t < T; t += count, packet += count * to_row_nbytes) {
        count = least(ROWS, T - t);
        run_decoder(&decoder, packets, packet_row_nbytes, t, count, feedback.value, feedback.apart, 0);
        for (int64_t q = 0; q < count; q++)
            add_row(feedback.value + q * feedback.apart, owed + (t + q) * owed_row_values, at->features);
        run_encoder(&encoder, (const uint8_t *)feedback.value, 4 * feedback.apart, packet, to_row_nbytes, count);
        keep_missed(&feedback, &gather_decoder, packet, to_row_nbytes, count, owed + t * owed_row_values,
                    owed_row_values);
    }
    free(room);
    return DONE;
}

/* Add a packet, then what is foretold, to T rows of out. */
EXPORT int lowbit_decode_foretold(const Layout *at, const uint8_t *packet, int64_t packet_row_nbytes, int64_t T,
                                  float *out, int64_t out_row_values, const float *scale, const float *minimum,
                                  const int64_t *outlier_index, const Share *share) {
    const Static with = {scale, minimum, 0, 0, outlier_index};
    Decoder decoder;
    Feedback feedback;
    Arena arena = {0, 0};
    void *room;
    if (!ascending(at, outlier_index)) return BAD_OUTLIER_INDEX;
    plan_decoder(&decoder, at, with, 1, &arena), plan_feedback(&feedback, share, at->features, &arena);
    if (!allocate(&arena, &room)) return NO_MEMORY;
    plan_decoder(&decoder, at, with, 1, &arena), plan_feedback(&feedback, share, at->features, &arena);
    for (int64_t t = 0, count; t < T; t += count, out += count * out_row_values) {
        count = least(ROWS, T - t);
        run_decoder(&decoder, &packet, &packet_row_nbytes, t, count, out, out_row_values, 1);
        const Ending with = {out, out_row_values, 0, 0, 0, 0};
        foretell_rows(&feedback, t, count, &with, ADDED);
    }
    free(room);
    return DONE;
}

/* Rotate T rows of fp32 in place, or back. */
EXPORT void lowbit_rotate(float *rows, int64_t row_values, int64_t T, const Run *runs, int64_t count, int inverse) {
    const int fast = takes_avx512();
    for (int64_t t = 0; t < T; t++) rotate_row(rows + t * row_values, runs, count, inverse, fast);
}

/* lowbit_encode of T rows of x that are mixed first. places: of outliers in the packet's rows. */
EXPORT int lowbit_encode_mixed(const Layout *at, const uint8_t *x, int64_t x_row_nbytes, int is_bf16, int64_t T,
                               uint8_t *packet, int64_t packet_row_nbytes, const int64_t *places,
                               const Mixing *mixing) {
    const Static with = {0, 0, 0, 0, places};
    const int64_t K = at->outliers, H = at->features - K;
    const int fast = takes_avx512();
    Encoder encoder;
    Arena arena = {0, 0};
    void *room;
    if (!ascending(at, places) || !within(mixing->outlier_index, K, H)) return BAD_OUTLIER_INDEX;
    plan_encoder(&encoder, at, with, 0, &arena), take(&arena, H + K, 4);
    if (!allocate(&arena, &room)) return NO_MEMORY;
    plan_encoder(&encoder, at, with, 0, &arena);
    float *row = take(&arena, H + K, 4);
    for (int64_t t = 0; t < T; t++, x += x_row_nbytes, packet += packet_row_nbytes) {
        mix_row(row, x, mixing, H, K, is_bf16, fast);
        run_encoder(&encoder, (const uint8_t *)row, 4 * (H + K), packet, packet_row_nbytes, 1);
    }
    free(room);
    return DONE;
}

/* lowbit_decode_sum of packets of rows that were mixed. */
EXPORT int lowbit_decode_mixed(const Layout *at, const uint8_t *const *packets, const int64_t *packet_row_nbytes,
                               int64_t R, int64_t T, float *out, int64_t out_row_values, const int64_t *places,
                               const Mixing *mixing, int add) {
    const Static with = {0, 0, 0, 0, places};
    const int64_t K = at->outliers, H = at->features - K;
    const int fast = takes_avx512();
    Decoder decoder;
    Arena arena = {0, 0};
    void *room;
    if (!ascending(at, places) || !within(mixing->outlier_index, K, H)) return BAD_OUTLIER_INDEX;
    plan_decoder(&decoder, at, with, R, &arena), take(&arena, H + K, 4);
    if (!allocate(&arena, &room)) return NO_MEMORY;
    plan_decoder(&decoder, at, with, R, &arena);
    float *row = take(&arena, H + K, 4);
    for (int64_t t = 0; t < T; t++, out += out_row_values) {
        run_decoder(&decoder, packets, packet_row_nbytes, t, 1, row, H + K, 0);
        unmix_row(out, row, mixing, H, K, add, fast);
    }
    free(room);
    return DONE;
}

/* setuptools expects a module here. It is loaded with ctypes: it needs neither Python.h nor a Python version. */
EXPORT void *PyInit__codec(void) { return 0; }
