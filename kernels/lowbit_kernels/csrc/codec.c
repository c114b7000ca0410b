/* The codec for a CPU: encode, decode, decode_sum and requantize, single-threaded, called with ctypes.
 *
 * Bit-identical to reference.py whichever way a row takes: AVX-512 where the processor has it, else the plain C of
 * encode_row.h and decode_row.h, of which the compiler makes a clone for AVX2. Must be built without -ffast-math.
 */
#include <stdlib.h>

#include "avx512_groups.h"
#include "avx512_rows.h"
#include "decode_row.h"
#include "encode_row.h"

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

enum { DONE = 0, NO_MEMORY = 1, BAD_OUTLIER_INDEX = 2 };

/* The tests' switch: plain C on every processor. It changes no result. */
static int only_plain;

EXPORT void lowbit_only_plain(int on) { only_plain = on; }

EXPORT int lowbit_uses_avx512(void) {
#ifdef HAS_AVX512
    return !only_plain && runs_avx512();
#else
    return 0;
#endif
}

/* A bad index would write outside the row, so it is worth one pass over K numbers a call. */
static int ascending(const Layout *at, const int64_t *index) {
    int64_t last = -1;
    for (int64_t k = 0; k < at->outliers; k++) {
        if (index[k] <= last || index[k] >= at->features) return 0;
        last = index[k];
    }
    return 1;
}

static CLONES void encode_plain(EncodePlan *plan, const uint8_t *x, uint8_t *packet) {
    if (plan->is_bf16) encode_row(plan, x, packet, 1);
    else encode_row(plan, x, packet, 0);
}

static CLONES void decode_plain(DecodePlan *plan, const uint8_t *const *rows, float *out, int add) {
    decode_row(plan, rows, out, add);
}

typedef struct {
    EncodePlan plain;
    int fast;
#ifdef HAS_AVX512
    Encode512 wide;
#endif
} Encoder;

static void plan_encoder(Encoder *encoder, const Layout *at, Static with, int is_bf16, Arena *from) {
    plan_encode(&encoder->plain, at, with, is_bf16, from);
    encoder->fast = at->bits <= 8 && lowbit_uses_avx512();
#ifdef HAS_AVX512
    if (encoder->fast) plan_encode512(&encoder->wide, at, with, is_bf16, from);
#endif
}

/* Encode T rows. */
static void run_encoder(Encoder *encoder, const uint8_t *x, int64_t x_row_nbytes, uint8_t *packet,
                        int64_t packet_row_nbytes, int64_t T) {
#ifdef HAS_AVX512
    for (int64_t t = 0; encoder->fast && t < T;) {
        const Rows rows = {x + t * x_row_nbytes, packet + t * packet_row_nbytes, T - t >= TOGETHER ? TOGETHER : 1,
                           x_row_nbytes, packet_row_nbytes};
        const int failed = encode_rows512(&encoder->wide, &rows);
        for (int64_t q = 0; q < rows.count; q++, t++) {
            const uint8_t *from = rows.from + q * x_row_nbytes;
            uint8_t *to = rows.to + q * packet_row_nbytes;
            if (failed >> q & 1) {
                encode_plain(&encoder->plain, from, to);
            } else {
                finish512(&encoder->wide, to, from);
            }
        }
    }
    if (encoder->fast) return;
#endif
    for (int64_t t = 0; t < T; t++)
        encode_plain(&encoder->plain, x + t * x_row_nbytes, packet + t * packet_row_nbytes);
}

typedef struct {
    DecodePlan plain;
    int fast;
    const uint8_t **rows;
#ifdef HAS_AVX512
    Decode512 wide;
#endif
} Decoder;

static void plan_decoder(Decoder *decoder, const Layout *at, Static with, int64_t R, Arena *from) {
    decoder->rows = take(from, TOGETHER * R, sizeof(uint8_t *));
    plan_decode(&decoder->plain, at, with, R, from);
    decoder->fast = at->bits <= 8 && lowbit_uses_avx512();
#ifdef HAS_AVX512
    if (decoder->fast) decoder->fast = plan_decode512(&decoder->wide, at, with, R, from);
#endif
    if (from->base && !decoder->fast) prepare_decode(&decoder->plain);
}

/* Decode rows t to t + T of R packets. */
static void run_decoder(Decoder *decoder, const uint8_t *const *packets, const int64_t *packet_row_nbytes, int64_t t,
                        int64_t T, float *out, int64_t out_row_values, int add) {
    const int64_t R = decoder->plain.R, stop = t + T;
    for (int64_t count; t < stop; t += count, out += count * out_row_values) {
        count = least(TOGETHER, stop - t);
        for (int64_t q = 0; q < count; q++)
            for (int64_t r = 0; r < R; r++) decoder->rows[q * R + r] = packets[r] + (t + q) * packet_row_nbytes[r];
#ifdef HAS_AVX512
        if (decoder->fast) {
            count = decode_rows512(&decoder->wide, decoder->rows, count, out, out_row_values, add);
            continue;
        }
#endif
        for (int64_t q = 0; q < count; q++)
            decode_plain(&decoder->plain, decoder->rows + q * R, out + q * out_row_values, add);
    }
}

/* Room for what the arena counted, which starts over in it. Freed by the caller through `room`. */
static int allocate(Arena *arena, void **room) {
    *room = malloc((size_t)arena->used + 64);
    arena->base = *room ? (uint8_t *)*room + (64 - (uintptr_t)*room % 64) : 0;
    arena->used = 0;
    return *room != 0;
}

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

/* setuptools expects a module here. It is loaded with ctypes: it needs neither Python.h nor a Python version. */
EXPORT void *PyInit__codec(void) { return 0; }
