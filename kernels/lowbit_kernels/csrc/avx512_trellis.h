/* The codes of trellis-coded groups with AVX-512, 16 groups side by side: the sums of trellis.h in the same order. */
#ifndef LOWBIT_AVX512_TRELLIS_H
#define LOWBIT_AVX512_TRELLIS_H

#include "avx512.h"
#include "trellis.h"

#ifdef HAS_AVX512

/* Levels and thresholds of the four subsets, eight places each, the thresholds also one place on. */
typedef struct { __m512 level[2], threshold[2], next[2]; int count; } Tables;

/* Of each number, in the subset whose first place is `first`: how many thresholds it exceeds. */
VECTOR __m512i nearest16(const Tables *of, __m512 x, __m512i first) {
    __m512i near = first;
    if (of->count > 2) {
        const __m512i half = _mm512_add_epi32(near, _mm512_set1_epi32(of->count / 2 - 1));
        const __m512 middle = _mm512_permutex2var_ps(of->threshold[0], half, of->threshold[1]);
        const __mmask16 above = _mm512_cmp_ps_mask(x, middle, _CMP_GT_OQ);
        near = _mm512_mask_add_epi32(near, above, near, _mm512_set1_epi32(of->count / 2));
    }
    if (of->count > 4) {
        const __m512 middle = _mm512_permutex2var_ps(of->next[0], near, of->next[1]);
        const __mmask16 above = _mm512_cmp_ps_mask(x, middle, _CMP_GT_OQ);
        near = _mm512_mask_add_epi32(near, above, near, _mm512_set1_epi32(2));
    }
    const __m512 last = _mm512_permutex2var_ps(of->threshold[0], near, of->threshold[1]);
    return _mm512_mask_add_epi32(near, _mm512_cmp_ps_mask(x, last, _CMP_GT_OQ), near, _mm512_set1_epi32(1));
}

VECTOR __m512 distance16(const Tables *of, __m512 x, int k) {
    const __m512i near = nearest16(of, x, _mm512_set1_epi32(8 * k));
    const __m512 error = _mm512_sub_ps(x, _mm512_permutex2var_ps(of->level[0], near, of->level[1]));
    return _mm512_mul_ps(error, error);
}

/* Values t to t + 15 of 16 groups, from groups `apart` to a vector for each of these t: four rounds of interleaving. */
VECTOR void side_by_side(float *to, const float *x, const int64_t apart[LANES]) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    __m512 v[2][LANES];
#pragma GCC unroll 16
    for (int g = 0; g < LANES; g++) v[0][g] = _mm512_loadu_ps(x + apart[g]);
#pragma GCC unroll 4
    for (int round = 0; round < 4; round++)
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            const __m512 a = v[round & 1][i], b = v[round & 1][i + 8];
            v[~round & 1][2 * i] = _mm512_permutex2var_ps(a, low, b);
            v[~round & 1][2 * i + 1] = _mm512_permutex2var_ps(a, high, b);
        }
#pragma GCC unroll 16
    for (int t = 0; t < LANES; t++) _mm512_storeu_ps(to + LANES * t, v[0][t]);
}

/* Bytes of 16 groups side by side back to one group after the other, in the same way. */
VECTOR void one_by_one(uint8_t *codes, const uint8_t *from, int64_t size, int64_t groups) {
    __m128i v[2][LANES];
#pragma GCC unroll 16
    for (int t = 0; t < LANES; t++) v[0][t] = _mm_loadu_si128((const void *)(from + LANES * t));
#pragma GCC unroll 4
    for (int round = 0; round < 4; round++)
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            const __m128i a = v[round & 1][i], b = v[round & 1][i + 8];
            v[~round & 1][2 * i] = _mm_unpacklo_epi8(a, b);
            v[~round & 1][2 * i + 1] = _mm_unpackhi_epi8(a, b);
        }
    for (int64_t g = 0; g < groups; g++) _mm_storeu_si128((void *)(codes + g * size), v[0][g]);
}

/* Codes of up to 16 whole groups that follow each other. x: their products. scratch: 80 bytes for each value of a
 * group, and for 16 more. */
AVX512 static void codes_trellis512(const Subsets *from, uint8_t *codes, const float *x, uint8_t *scratch,
                                    int64_t size, int64_t groups) {
    Tables of;
    of.count = from->count;
    for (int half = 0; half < 2; half++) {
        of.level[half] = _mm512_loadu_ps(from->level[2 * half]);
        of.threshold[half] = _mm512_loadu_ps(from->threshold[2 * half]);
        of.next[half] = _mm512_loadu_ps(from->threshold[2 * half] + 1);
    }
    const __m512i one = _mm512_set1_epi32(1);
    const int64_t padded = (size + LANES - 1) / LANES * LANES;
    float *const values = (float *)scratch;
    scratch += 4 * LANES * padded;
    int64_t apart[LANES];
    for (int64_t g = 0; g < LANES; g++) apart[g] = least(g, groups - 1) * size; /* spare ones repeat the last */
    for (int64_t t = 0; t < size; t += LANES) side_by_side(values + LANES * t, x + t, apart);
    __m512 cost[STATES];
    for (int s = 0; s < STATES; s++) cost[s] = s ? _mm512_set1_ps(as_float(EXPONENT)) : _mm512_setzero_ps();
    for (int64_t t = 0; t < size; t++) {
        const __m512 value = _mm512_loadu_ps(values + LANES * t);
        __m512 distance[4], following[STATES];
        __m512i high = _mm512_setzero_si512();
        for (int k = 0; k < 4; k++) distance[k] = distance16(&of, value, k);
#pragma GCC unroll 8
        for (int s = 0; s < STATES; s++) {
            const int first = s >> 1, second = s >> 1 | STATES >> 1;
            const __m512 by_low = _mm512_add_ps(cost[first], distance[subset_of(first, s & 1)]);
            const __m512 by_high = _mm512_add_ps(cost[second], distance[subset_of(second, s & 1)]);
            const __mmask16 less = _mm512_cmp_ps_mask(by_high, by_low, _CMP_LT_OQ);
            following[s] = _mm512_mask_mov_ps(by_low, less, by_high);
            high = _mm512_mask_or_epi32(high, less, high, _mm512_set1_epi32(1 << s));
        }
#pragma GCC unroll 8
        for (int s = 0; s < STATES; s++) cost[s] = following[s];
        _mm_storeu_si128((void *)(scratch + LANES * t), _mm512_cvtepi32_epi8(high));
    }
    __m512i state = _mm512_setzero_si512();
    __m512 least_cost = cost[0];
    for (int s = 1; s < STATES; s++) {
        const __mmask16 less = _mm512_cmp_ps_mask(cost[s], least_cost, _CMP_LT_OQ);
        least_cost = _mm512_mask_mov_ps(least_cost, less, cost[s]);
        state = _mm512_mask_mov_epi32(state, less, _mm512_set1_epi32(s));
    }
    for (int64_t t = size - 1; t >= 0; t--) {
        const __m512i high = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(scratch + LANES * t)));
        const __m512i bit = _mm512_and_si512(state, one), half = _mm512_srli_epi32(state, 1);
        const __m512i before =
            _mm512_or_si512(half, _mm512_slli_epi32(_mm512_and_si512(_mm512_srlv_epi32(high, state), one), 2));
        /* its subset: 2 ((bit ^ before >> 1 ^ before >> 2) & 1) + (before & 1), eight places each */
        const __m512i odd = _mm512_xor_si512(
            bit, _mm512_xor_si512(_mm512_srli_epi32(before, 1), _mm512_srli_epi32(before, 2)));
        const __m512i first = _mm512_add_epi32(_mm512_slli_epi32(_mm512_and_si512(odd, one), 4),
                                               _mm512_slli_epi32(_mm512_and_si512(before, one), 3));
        const __m512i near = _mm512_sub_epi32(nearest16(&of, _mm512_loadu_ps(values + LANES * t), first), first);
        const __m512i code = _mm512_or_si512(_mm512_slli_epi32(near, 1), bit);
        _mm_storeu_si128((void *)(scratch + LANES * t), _mm512_cvtepi32_epi8(code));
        state = before;
    }
    int64_t t = 0;
    for (; t + LANES <= size; t += LANES) one_by_one(codes + t, scratch + LANES * t, size, groups);
    for (int64_t g = 0; g < groups; g++)
        for (int64_t i = t; i < size; i++) codes[g * size + i] = scratch[LANES * i + g];
}

#endif
#endif
