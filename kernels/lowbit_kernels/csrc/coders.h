/* Encoding and decoding rows whichever way they take: AVX-512 where the processor has it, else plain C.
 *
 * A plan is made twice: from an empty arena, which counts, and from the one that is allocated then.
 */
#ifndef LOWBIT_CODERS_H
#define LOWBIT_CODERS_H

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

/* The tests' switch: plain C on every processor. It changes no result. */
static int only_plain;

INLINE int takes_avx512(void) {
#ifdef HAS_AVX512
    return !only_plain && runs_avx512();
#else
    return 0;
#endif
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
    encoder->plain.wide = takes_avx512();
    encoder->fast = at->bits <= 8 && takes_avx512();
#ifdef HAS_AVX512
    if (encoder->fast) encoder->fast = plan_encode512(&encoder->wide, at, with, is_bf16, from);
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
    decoder->fast = at->bits <= 8 && takes_avx512();
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

#endif
