/* Decoding sums of R packet rows with AVX-512: what is prepared once a call, and the values of 64 codes. See avx512.h.
 *
 * Codes of 4 bits index a table of 16 fp32 numbers, with the scale of a group already in it; levels of fewer bits, and
 * those of a trellis, one of up to 32 without the scale. e4m3 becomes bf16, which holds all its values exactly, by tables
 * of high and low bytes. Other integers are converted.
 */
#ifndef LOWBIT_AVX512_DECODE_H
#define LOWBIT_AVX512_DECODE_H

#include "avx512.h"

#ifdef HAS_AVX512

/* Codes, and how they become values. */
enum { NIBBLES, SIGNED_BYTES, UNSIGNED_BYTES, E4M3_BYTES, LEVEL_BYTES };
enum { EACH_BF16, EACH_FP32, GROUPS_OF_16, GROUPS_OF_32, GROUPS_OF_64, GROUPS_OF_ANY }; /* scales */

/* One rank's part of a row. */
typedef struct {
    const uint8_t *codes;                 /* nibbles in the packet, or one to a byte */
    const uint8_t *pairs, *minimum_pairs; /* static numbers as `to_pairs` puts them */
    float *scale, *minimum;               /* of the groups, or of all values where groups are small */
} Rank512;

typedef struct {
    const Layout *at;
    const int64_t *outlier_index;
    int64_t R, order_n; /* values in the order that sums are made in: all features with static scales, else the body */
    Body body;
    Places places;
    int way, scales;
    int tame; /* static numbers are so small that no sum overflows: all NaN come from tables, which have but one */
    uint8_t lost; /* with static scales, the byte that says "not finite" */
    float nibble[32] /* or levels of bytes */, *group, *group_minimum, *sum;
    uint8_t *codes, *tail, *bits;
    int64_t codes_nbytes, readable; /* of a row of one rank: in `codes`, and wherever its codes are */
    Rank512 *rank;                  /* TOGETHER rows of R */
} Decode512;

/* Two vectors of 16 share the words of one: what `to_pairs` made. */
VECTOR void from_pairs(const uint8_t *pairs, __m512 v[2]) {
    __m512i both = _mm512_loadu_si512(pairs);
    v[0] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    v[1] = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xFFFF0000)));
}

/* fp32 numbers of the body, at the places of their features where `body` says so, to bf16. Returns all their bits
 * together. */
VECTOR __m512i to_pairs(uint8_t *to, const float *from, int64_t n, int64_t order_n, const Body *body, __m512i bits) {
    for (int64_t i = 0; i < order_n; i += 32) {
        __m512i v[2];
        body32(from, body, i, n, v);
        bits = _mm512_ternarylogic_epi32(bits, v[0], v[1], 0xFE);
        __m512i high = _mm512_and_si512(v[1], _mm512_set1_epi32((int)0xFFFF0000));
        _mm512_storeu_si512(to + 2 * i, _mm512_or_si512(_mm512_srli_epi32(v[0], 16), high));
    }
    return bits;
}

/* Static numbers of all ranks. Returns 0 where bf16 does not hold them. `plan->tame` where the exponents of all of them
 * together, a bound on each, are below 2^33. */
VECTOR int plan_static512(Decode512 *plan, Static with, uint8_t *pairs, uint8_t *minimum_pairs) {
    const int64_t n = plan->at->body;
    const Body in_body_order = {0, 0}, *body = plan->at->group_size ? &in_body_order : &plan->body;
    __m512i bits = _mm512_setzero_si512();
    for (int64_t r = 0; r < plan->R; r++) {
        uint8_t *to = pairs + 2 * r * plan->codes_nbytes, *minimum_to = minimum_pairs + 2 * r * plan->codes_nbytes;
        if (with.scale) bits = to_pairs(to, with.scale + r * with.scale_row, n, plan->order_n, body, bits);
        if (with.minimum)
            bits = to_pairs(minimum_to, with.minimum + r * with.minimum_row, n, plan->order_n, body, bits);
        for (int64_t q = 0; q < TOGETHER; q++) {
            plan->rank[q * plan->R + r].pairs = to;
            plan->rank[q * plan->R + r].minimum_pairs = minimum_to;
        }
    }
    const uint32_t all = (uint32_t)_mm512_reduce_or_epi32(bits);
    plan->tame = (all & EXPONENT) < 160u << 23 && plan->R < 1 << 16 && plan->way != E4M3_BYTES;
    return (all & 0xFFFF) == 0;
}

/* Values of all codes of 4 bits, or of all levels, before any scale; with static scales, NaN for the one that says "not
 * finite". */
INLINE void fill_nibbles(float values[32], const Layout *at) {
    if (has_levels(at)) {
        memcpy(values, at->levels, sizeof at->levels);
        return;
    }
    for (int code = 0; code < 16; code++)
        values[code] = at->values == E2M1 ? small_float_value((uint32_t)code, AS_E2M1)
                                          : (float)(at->asymmetric ? code : (code ^ 8) - 8);
    if (!at->group_size) values[coding_of(at).lost] = as_float(NAN_BITS);
}

/* Whether codes are looked up where they lie in a packet, as nibbles or whole bytes. Those of a trellis are not: what is
 * looked up are the places that they say. */
INLINE int in_nibbles(const Layout *at) { return at->bits == 4 && !has_trellis(at); }
INLINE int in_place(const Layout *at) { return in_nibbles(at) || at->bits == 8; }

/* Returns 0 where this code cannot do it: static scales that bf16 does not hold. */
AVX512 static int plan_decode512(Decode512 *plan, const Layout *at, Static with, int64_t R, Arena *from) {
    const int64_t H = at->features, G = at->groups, size = at->group_size, row = H + BLOCK;
    const int fits = size == 16 || size == 32 || size % BLOCK == 0, each = size && !fits && size < SMALLEST_PLACED;
    const int64_t numbers = (each ? H : G) + BLOCK;
    plan->at = at, plan->outlier_index = with.outlier_index, plan->R = R, plan->order_n = size ? at->body : H;
    plan->scales = !size        ? EACH_BF16
                   : each       ? EACH_FP32
                   : size == 16 ? GROUPS_OF_16
                   : size == 32 ? GROUPS_OF_32
                   : fits       ? GROUPS_OF_64
                                : GROUPS_OF_ANY;
    if (plan->scales == GROUPS_OF_ANY) plan_places(&plan->places, size, at->body, 0, from);
    plan->way = in_nibbles(at)        ? NIBBLES
                : has_levels(at)      ? LEVEL_BYTES
                : at->values == E4M3  ? E4M3_BYTES
                : at->asymmetric      ? UNSIGNED_BYTES
                                      : SIGNED_BYTES;
    plan->lost = (uint8_t)(at->asymmetric ? coding_of(at).lost : -coding_of(at).lost);
    plan->codes_nbytes = row, plan->readable = in_place(at) ? at->row_nbytes : row;
    plan_body(&plan->body, at, with.outlier_index, from);
    plan->group = take(from, G, 4), plan->group_minimum = take(from, G, 4);
    plan->sum = take(from, H, 4), plan->rank = take(from, TOGETHER * R, sizeof(Rank512));
    plan->codes = take(from, in_place(at) ? 0 : TOGETHER * R * row, 1), plan->bits = take(from, least(size, H), 1);
    plan->tail = take(from, TOGETHER * R * BLOCK, 1);
    uint8_t *pairs = take(from, with.scale ? R * row : 0, 2);
    uint8_t *minimum_pairs = take(from, with.minimum ? R * row : 0, 2);
    float *scale = take(from, size ? R * numbers : 0, 4);
    float *minimum = take(from, at->asymmetric && size ? R * numbers : 0, 4);
    if (!from->base) return 1;
    if (at->bits == 4 || has_levels(at)) fill_nibbles(plan->nibble, at);
    for (int64_t r = 0; r < R; r++) {
        plan->rank[r].scale = scale + r * numbers;
        plan->rank[r].minimum = minimum + r * numbers;
    }
    return plan_static512(plan, with, pairs, minimum_pairs);
}

/* Bytes of e4m3 to 4 vectors of their values. */
VECTOR void e4m3_values(__m512i codes, const __m512i table[4], __m512 v[4]) {
    /* byte 16 * L + 8 * (k / 2) + 2 * d + k % 2: code 16 * k + 4 * L + d, so that unpacking leaves vectors in order */
    const __m512i order = _mm512_set_epi64(
        0x3F2F3E2E3D2D3C2C, 0x1F0F1E0E1D0D1C0C, 0x3B2B3A2A39293828, 0x1B0B1A0A19091808,
        0x3727362635253424, 0x1707160615051404, 0x3323322231213020, 0x1303120211011000);
    const __m512i upper_word = _mm512_set1_epi32((int)0xFFFF0000);
    codes = _mm512_permutexvar_epi8(order, codes);
    __m512i low = _mm512_permutex2var_epi8(table[0], codes, table[1]);
    __m512i high = _mm512_permutex2var_epi8(table[2], codes, table[3]);
    high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8((char)0x80), 0xF8); /* and the sign */
    __m512i first = _mm512_unpacklo_epi8(low, high), second = _mm512_unpackhi_epi8(low, high);
    v[0] = _mm512_castsi512_ps(_mm512_slli_epi32(first, 16));
    v[1] = _mm512_castsi512_ps(_mm512_and_si512(first, upper_word));
    v[2] = _mm512_castsi512_ps(_mm512_slli_epi32(second, 16));
    v[3] = _mm512_castsi512_ps(_mm512_and_si512(second, upper_word));
}

VECTOR void load_e4m3(__m512i table[4]) {
    for (int i = 0; i < 4; i++) table[i] = _mm512_loadu_si512(e4m3_bytes[i / 2] + 64 * (i % 2));
}

/* 16 codes of a byte each: integers, or places in `levels`. */
VECTOR __m512 byte_values(__m128i bytes, const __m512 levels[2], int way) {
    if (way == LEVEL_BYTES) return _mm512_permutex2var_ps(levels[0], _mm512_cvtepu8_epi32(bytes), levels[1]);
    return _mm512_cvtepi32_ps(way == SIGNED_BYTES ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
}

/* Where the nibbles of 64 features lie: byte 4 * i + k of the vectors is for feature 16 * k + i. */
typedef struct { __m512i byte; __mmask64 upper; } Nibbles;

/* For the features of `mask`, of which the first is the upper nibble of a byte where `odd`. */
VECTOR Nibbles nibbles_of(uint64_t mask, int odd) {
    const __m512i transposed = _mm512_set_epi64(
        0x3F2F1F0F3E2E1E0E, 0x3D2D1D0D3C2C1C0C, 0x3B2B1B0B3A2A1A0A, 0x3929190938281808,
        0x3727170736261606, 0x3525150534241404, 0x3323130332221202, 0x3121110130201000);
    const __m512i counted = _mm512_set_epi64(
        0x3F3E3D3C3B3A3938, 0x3736353433323130, 0x2F2E2D2C2B2A2928, 0x2726252423222120,
        0x1F1E1D1C1B1A1918, 0x1716151413121110, 0x0F0E0D0C0B0A0908, 0x0706050403020100);
    __m512i place = _mm512_permutexvar_epi8(transposed, _mm512_maskz_expand_epi8(mask, counted));
    place = _mm512_add_epi8(place, _mm512_set1_epi8((char)odd));
    Nibbles at = {_mm512_and_si512(_mm512_srli_epi16(place, 1), _mm512_set1_epi8(0x7F)),
                  _mm512_test_epi8_mask(place, _mm512_set1_epi8(1))};
    return at;
}

/* The bytes of 64 nibbles to 4 vectors whose low 4 bits are the codes. */
VECTOR void nibble_codes(__m512i bytes, const Nibbles *at, __m512i codes[4]) {
    __m512i all = _mm512_permutexvar_epi8(at->byte, bytes);
    codes[0] = _mm512_mask_mov_epi8(all, at->upper, _mm512_srli_epi16(all, 4));
    for (int k = 1; k < 4; k++) codes[k] = _mm512_srli_epi32(codes[0], 8 * k);
}

/* One bit pattern for NaN. */
VECTOR __m512 one_nan512(__m512 x) {
    return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_ps(as_float(NAN_BITS)));
}

#endif
#endif
