/* Decoding one row, the sum of R packets, with AVX-512: for every layout of codes whose static scales fit bf16.
 *
 * Codes become bf16 numbers, which hold all their values exactly, by tables of high and low bytes. The sum of 64 values
 * stays in registers while all ranks add to it. See avx512.h.
 */
#ifndef LOWBIT_AVX512_DECODE_H
#define LOWBIT_AVX512_DECODE_H

#include "avx512.h"
#include "formats.h"

#ifdef HAS_AVX512

enum { OF_4_BITS, OF_6_BITS, OF_7_BITS, OF_8_BITS, WITH_SIGN };                      /* tables of codes */
enum { EACH_BF16, EACH_FP32, GROUPS_OF_16, GROUPS_OF_32, GROUPS_OF_64 };             /* scales */

/* One rank's part of a row. */
typedef struct {
    const uint8_t *codes;
    const uint8_t *pairs, *minimum_pairs; /* static numbers, in the order of `to_pairs` */
    float *scale, *minimum;               /* of the groups, or of all values where groups fit no vector */
} Rank512;

typedef struct {
    const Layout *at;
    int64_t R, order_n; /* values in the order that sums are made in: all features with static scales, else the body */
    Body body;
    int table_kind, scales;
    uint8_t high[256], low[256];
    float *e4m3, *group, *group_minimum, *sum;
    uint8_t *codes;
    Rank512 *rank;
} Decode512;

/* Where scales are bf16, two vectors of 16 share the words of one: what follows the `shift` of pairs. */
VECTOR void from_pairs(const uint8_t *pairs, __m512 v[2]) {
    __m512i both = _mm512_loadu_si512(pairs);
    v[0] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    v[1] = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xFFFF0000)));
}

/* fp32 numbers of the body, at the places of their features where there are outliers, to bf16 in that order. Returns
 * whether they fit. */
VECTOR int to_pairs(uint8_t *to, const float *from, int64_t n, int64_t order_n, const Body *body) {
    __m512i lost = _mm512_setzero_si512();
    for (int64_t i = 0; i < order_n; i += 32) {
        const uint32_t mask = body ? (uint32_t)(body->mask[i / BLOCK] >> i % BLOCK) : ~0u;
        int64_t at = i;
        if (body) at = body->before[i / BLOCK] + (i % BLOCK ? __builtin_popcount((uint32_t)body->mask[i / BLOCK]) : 0);
        __m512i v[2];
        for (int k = 0; k < 2; k++) {
            __mmask16 here = (__mmask16)(mask >> 16 * k);
            int count = __builtin_popcount(here);
            v[k] = _mm512_maskz_loadu_epi32(first16(least(count, n - at)), from + at);
            if (body) v[k] = _mm512_maskz_expand_epi32(here, v[k]);
            lost = _mm512_or_si512(lost, v[k]);
            at += count;
        }
        __m512i high = _mm512_and_si512(v[1], _mm512_set1_epi32((int)0xFFFF0000));
        _mm512_storeu_si512(to + 2 * i, _mm512_or_si512(_mm512_srli_epi32(v[0], 16), high));
    }
    return _mm512_test_epi32_mask(lost, _mm512_set1_epi32(0xFFFF)) == 0;
}

/* Returns 0 where this code cannot do it: static scales that bf16 does not hold. */
AVX512 static int plan_decode512(Decode512 *plan, const Layout *at, Static with, int64_t R, Arena *from) {
    const int64_t H = at->features, G = at->groups, size = at->group_size;
    const int each = size && size != 16 && size != 32 && size % BLOCK;
    plan->at = at, plan->R = R, plan->order_n = size ? at->body : H;
    plan->scales = !size ? EACH_BF16 : each ? EACH_FP32 : size == 16 ? GROUPS_OF_16 : size == 32 ? GROUPS_OF_32 : GROUPS_OF_64;
    plan->table_kind = at->values == E4M3 ? WITH_SIGN : at->bits == 8 ? OF_8_BITS : at->bits == 7 ? OF_7_BITS
                       : at->bits > 4 ? OF_6_BITS : OF_4_BITS;
    plan_body(&plan->body, at, with.outlier_index, from);
    plan->e4m3 = take(from, 256, 4), plan->group = take(from, G, 4), plan->group_minimum = take(from, G, 4);
    plan->sum = take(from, H, 4);
    plan->rank = take(from, R, sizeof(Rank512)), plan->codes = take(from, R * (H + BLOCK), 1);
    uint8_t *pairs = take(from, R * (H + BLOCK), 2), *minimum_pairs = take(from, with.minimum ? R * (H + BLOCK) : 0, 2);
    float *scale = take(from, R * ((each ? H : G) + BLOCK), 4), *minimum = take(from, R * ((each ? H : G) + BLOCK), 4);
    if (!from->base) return 1;
    float values[256];
    code_values(values, at);
    for (int code = 0; code < 1 << at->bits; code++) {
        plan->high[code] = (uint8_t)(as_bits(values[code]) >> 24);
        plan->low[code] = (uint8_t)(as_bits(values[code]) >> 16);
    }
    for (uint32_t code = 0; at->scale_format == SCALE_E4M3 && code < 256; code++)
        plan->e4m3[code] = small_float_value(code, AS_E4M3);
    for (int64_t r = 0; r < R; r++) {
        const Body *body = at->outliers && !size ? &plan->body : 0;
        plan->rank[r] = (Rank512){plan->codes + r * (H + BLOCK), pairs + 2 * r * (H + BLOCK), minimum_pairs + 2 * r * (H + BLOCK),
                                  scale + r * ((each ? H : G) + BLOCK), minimum + r * ((each ? H : G) + BLOCK)};
        if (with.scale && !to_pairs((uint8_t *)plan->rank[r].pairs, with.scale + r * with.scale_row, at->body, plan->order_n, body))
            return 0;
        if (with.minimum && !to_pairs((uint8_t *)plan->rank[r].minimum_pairs, with.minimum + r * with.minimum_row, at->body,
                                      plan->order_n, body))
            return 0;
    }
    return 1;
}

/* 64 codes, one to a byte, to 4 vectors of their values. */
VECTOR void look_up(__m512i codes, const __m512i *table, int kind, __m512 v[4]) {
    /* byte 16 * L + 8 * (k / 2) + 2 * d + k % 2 is code 16 * k + 4 * L + d, so that unpacking leaves vectors in order */
    const __m512i order = _mm512_set_epi64(
        0x3F2F3E2E3D2D3C2C, 0x1F0F1E0E1D0D1C0C, 0x3B2B3A2A39293828, 0x1B0B1A0A19091808,
        0x3727362635253424, 0x1707160615051404, 0x3323322231213020, 0x1303120211011000);
    __m512i low, high;
    codes = _mm512_permutexvar_epi8(order, codes);
    if (kind == OF_4_BITS) {
        low = _mm512_shuffle_epi8(table[0], codes), high = _mm512_shuffle_epi8(table[1], codes);
    } else if (kind == OF_6_BITS) {
        low = _mm512_permutexvar_epi8(codes, table[0]), high = _mm512_permutexvar_epi8(codes, table[1]);
    } else {
        low = _mm512_permutex2var_epi8(table[0], codes, table[2]), high = _mm512_permutex2var_epi8(table[1], codes, table[3]);
        if (kind == WITH_SIGN) high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8((char)0x80), 0xF8);
        if (kind == OF_8_BITS) {
            __mmask64 upper = _mm512_movepi8_mask(codes);
            low = _mm512_mask_mov_epi8(low, upper, _mm512_permutex2var_epi8(table[4], codes, table[6]));
            high = _mm512_mask_mov_epi8(high, upper, _mm512_permutex2var_epi8(table[5], codes, table[7]));
        }
    }
    __m512i first = _mm512_unpacklo_epi8(low, high), second = _mm512_unpackhi_epi8(low, high);
    const __m512i upper_word = _mm512_set1_epi32((int)0xFFFF0000);
    v[0] = _mm512_castsi512_ps(_mm512_slli_epi32(first, 16)), v[1] = _mm512_castsi512_ps(_mm512_and_si512(first, upper_word));
    v[2] = _mm512_castsi512_ps(_mm512_slli_epi32(second, 16)), v[3] = _mm512_castsi512_ps(_mm512_and_si512(second, upper_word));
}

/* Numbers of 64 values from number `b` of their block. `g`: the group of the block, for groups of whole blocks. */
VECTOR void numbers64(const uint8_t *pairs, const float *of_group, int64_t b, int64_t g, int scales, __m512 v[4]) {
    if (scales == EACH_BF16) {
        from_pairs(pairs + 128 * b, v), from_pairs(pairs + 128 * b + 64, v + 2);
        return;
    }
    for (int k = 0; k < 4; k++)
        v[k] = scales == EACH_FP32 ? _mm512_loadu_ps(of_group + BLOCK * b + 16 * k)
               : _mm512_set1_ps(of_group[scales == GROUPS_OF_16 ? 4 * b + k : scales == GROUPS_OF_32 ? 2 * b + k / 2 : g]);
}

/* Add the values of one block of one rank to `sum`, or start it. */
VECTOR void add_block(__m512 sum[4], const Decode512 *plan, int64_t r, int64_t b, int64_t g, const __m512i *table, int start,
                      const int kind, const int scales, int expand) {
    const Rank512 *rank = &plan->rank[r];
    __m512 v[4], by[4];
    __m512i codes;
    if (expand) codes = _mm512_maskz_expand_epi8(plan->body.mask[b], _mm512_loadu_si512(rank->codes + plan->body.before[b]));
    else codes = _mm512_loadu_si512(rank->codes + BLOCK * b);
    look_up(codes, table, kind, v);
    numbers64(rank->pairs, rank->scale, b, g, scales, by);
    for (int k = 0; k < 4; k++) v[k] = _mm512_mul_ps(v[k], by[k]);
    if (plan->at->asymmetric) {
        numbers64(rank->minimum_pairs, rank->minimum, b, g, scales, by);
        for (int k = 0; k < 4; k++) v[k] = _mm512_add_ps(v[k], by[k]);
    }
    if (scales != EACH_BF16 && plan->at->prescaled) {
        numbers64(rank->pairs, 0, b, 0, EACH_BF16, by);
        for (int k = 0; k < 4; k++) v[k] = _mm512_mul_ps(v[k], by[k]);
    }
    for (int k = 0; k < 4; k++) sum[k] = start ? v[k] : _mm512_add_ps(sum[k], v[k]);
}

/* The sum of all ranks' codes to `out`, in the order of plan->order_n. */
VECTOR void sum_codes(const Decode512 *plan, float *out, int add, const int kind, const int scales) {
    const int expand = scales == EACH_BF16 && plan->body.mask;
    const int64_t in_group = plan->at->group_size / BLOCK, n = plan->order_n;
    int64_t g = 0, blocks_left = in_group;
    __m512i table[8];
    for (int i = 0; i < 8; i++) {
        const uint8_t *bytes = (i % 2 ? plan->high : plan->low) + 64 * (i / 2);
        table[i] = kind == OF_4_BITS ? _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)bytes)) : _mm512_loadu_si512(bytes);
    }
    for (int64_t b = 0; b < blocks_of(n); b++) {
        float *to = out + BLOCK * b;
        const int64_t here = n - BLOCK * b;
        __m512 sum[4];
        if (add) for (int k = 0; k < 4; k++) sum[k] = _mm512_maskz_loadu_ps(first16(here - 16 * k), to + 16 * k);
        if (add) add_block(sum, plan, 0, b, g, table, 0, kind, scales, expand);
        else add_block(sum, plan, 0, b, g, table, 1, kind, scales, expand);
        for (int64_t r = 1; r < plan->R; r++) add_block(sum, plan, r, b, g, table, 0, kind, scales, expand);
        for (int k = 0; k < 4; k++) {
            __mmask16 nan = _mm512_cmp_ps_mask(sum[k], sum[k], _CMP_UNORD_Q);
            sum[k] = _mm512_mask_mov_ps(sum[k], nan, _mm512_castsi512_ps(_mm512_set1_epi32((int)NAN_BITS)));
            if (add && expand) _mm512_mask_storeu_ps(to + 16 * k, (__mmask16)(plan->body.mask[b] >> 16 * k), sum[k]);
            else if (here >= BLOCK) _mm512_storeu_ps(to + 16 * k, sum[k]);
            else _mm512_mask_storeu_ps(to + 16 * k, first16(here - 16 * k), sum[k]);
        }
        if (scales == GROUPS_OF_64 && --blocks_left == 0) g++, blocks_left = in_group;
    }
}

#endif
#endif
