/* Encoding groups of a row with AVX-512: their largest magnitudes or ranges, then scales and codes; and the row as a
 * whole. See avx512_encode.h.
 */
#ifndef LOWBIT_AVX512_GROUPS_H
#define LOWBIT_AVX512_GROUPS_H

#include "avx512_encode.h"

#ifdef HAS_AVX512

enum { LARGEST_KEY, LARGEST, SMALLEST };

/* fp32 bits to keys. LARGEST_KEY: magnitude above, positive before negative below, unsigned. Else signed integers that
 * order as values do, -0 below 0. */
VECTOR __m512i to_keys(__m512i bits, int by) {
    if (by == LARGEST_KEY) return _mm512_rol_epi32(_mm512_xor_si512(bits, _mm512_set1_epi32((int)SIGN)), 1);
    __m512i turned = _mm512_srli_epi32(_mm512_srai_epi32(bits, 31), 1);
    return _mm512_xor_si512(bits, turned);
}

VECTOR __m512 from_keys(__m512i keys, int by) {
    if (by == LARGEST_KEY)
        return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_ror_epi32(keys, 1), _mm512_set1_epi32((int)SIGN)));
    return _mm512_castsi512_ps(to_keys(keys, by));
}

VECTOR __m512i best(__m512i a, __m512i b, int by) {
    return by == LARGEST_KEY ? _mm512_max_epu32(a, b) : by == LARGEST ? _mm512_max_epi32(a, b) : _mm512_min_epi32(a, b);
}

/* Lane i of the result: the best of all lanes of part[i]. Halves at a time: two vectors, each folded, share one. */
VECTOR __m512i best_of_each(__m512i *part, int by) {
    const __m512i low8 = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    for (int i = 0; i < 8; i++) { /* part i and i + 8: 8 lanes each */
        __m512i low = _mm512_permutex2var_epi32(part[i], low8, part[i + 8]);
        __m512i high = _mm512_shuffle_i64x2(part[i], part[i + 8], 0xEE);
        part[i] = best(low, high, by);
    }
    for (int i = 0; i < 4; i++) { /* 4 lanes each: i, i + 4 (within 256 bits), then i + 8, i + 12 */
        __m512i even = _mm512_shuffle_i64x2(part[i], part[i + 4], 0x88), odd = _mm512_shuffle_i64x2(part[i], part[i + 4], 0xDD);
        part[i] = best(even, odd, by); /* 128-bit lanes: i, i + 8, i + 4, i + 12 */
    }
    for (int i = 0; i < 2; i++)
        part[i] = best(_mm512_unpacklo_epi64(part[i], part[i + 2]), _mm512_unpackhi_epi64(part[i], part[i + 2]), by);
    __m512 a = _mm512_castsi512_ps(part[0]), b = _mm512_castsi512_ps(part[1]);
    __m512i even = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)), odd = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xDD));
    __m512i found = best(even, odd, by); /* lane 4 * L + j: group j-th of 0 2 1 3, plus the L-th of 0 8 4 12 */
    const __m512i in_order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    return _mm512_permutexvar_epi32(in_order, found);
}

/* The best values of all groups to `found`, 16 groups at a time. */
VECTOR void best_of_groups(float *found, const uint8_t *row, const Layout *at, int is_bf16, int by) {
    const int64_t n = at->body, size = at->group_size;
    for (int64_t first = 0; first < at->groups; first += 16) {
        __m512i part[16];
        for (int64_t g = 0; g < 16; g++) {
            const int64_t start = least(first + g, at->groups - 1) * size, stop = least(start + size, n);
            __m512i all = _mm512_setzero_si512();
            int64_t i = start;
            if (by == LARGEST_KEY && is_bf16 && size >= 32) {
                __m512i words = _mm512_setzero_si512();
                for (; i + 32 <= stop; i += 32) {
                    __m512i x = _mm512_xor_si512(_mm512_loadu_si512(row + 2 * i), _mm512_set1_epi16((short)0x8000));
                    words = _mm512_max_epu16(words, _mm512_shldi_epi16(x, x, 1));
                }
                /* as fp32: 15 bits of magnitude and 17 more, of which the lowest says "positive" */
                __m512i odd = _mm512_and_si512(words, _mm512_set1_epi32((int)0xFFFF0000)), even = _mm512_slli_epi32(words, 16);
                all = _mm512_max_epu32(odd, even);
                __m512i positive = _mm512_and_si512(_mm512_srli_epi32(all, 16), _mm512_set1_epi32(1));
                all = _mm512_or_si512(_mm512_and_si512(all, _mm512_set1_epi32((int)0xFFFE0000)), positive);
            } else if (by != LARGEST_KEY) {
                all = _mm512_set1_epi32(by == LARGEST ? INT32_MIN : INT32_MAX);
            }
            for (; i + 16 <= stop; i += 16) all = best(all, to_keys(_mm512_castps_si512(load16(row, i, is_bf16)), by), by);
            if (i < stop) {
                __mmask16 here = first16(stop - i);
                __m512i x = is_bf16 ? _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, row + 2 * i)), 16)
                                    : _mm512_maskz_loadu_epi32(here, row + 4 * i);
                all = _mm512_mask_mov_epi32(all, here, best(all, to_keys(x, by), by));
            }
            part[g] = all;
        }
        _mm512_storeu_ps(found + first, from_keys(best_of_each(part, by), by));
    }
}

/* Numbers of groups to all their values. */
VECTOR void repeat(float *to, const float *of_group, const Layout *at) {
    for (int64_t g = 0, start = 0; g < at->groups; g++, start += at->group_size) {
        const __m512 number = _mm512_set1_ps(of_group[g]);
        const int64_t stop = least(start + at->group_size, at->body);
        for (int64_t i = start; i < stop; i += 16) _mm512_storeu_ps(to + i, number);
    }
}

AVX512 static int all_finite512(const float *values, int64_t n) {
    uint32_t highest = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t magnitude = as_bits(values[i]) & ~SIGN;
        highest = magnitude > highest ? magnitude : highest;
    }
    return highest < EXPONENT;
}

AVX512 static int encode_groups512(Encode512 *plan, const uint8_t *row, uint8_t *packet, int is_bf16) {
    const Layout *at = plan->at;
    const int64_t n = at->body, size = at->group_size;
    const float *inverse = plan->inverse, *minimum = plan->lowest;
    if (at->asymmetric) {
        if (is_bf16) best_of_groups(plan->peak, row, at, 1, LARGEST), best_of_groups(plan->lowest, row, at, 1, SMALLEST);
        else best_of_groups(plan->peak, row, at, 0, LARGEST), best_of_groups(plan->lowest, row, at, 0, SMALLEST);
        if (!all_finite512(plan->peak, at->groups) || !group_minimums(at, plan->peak, plan->lowest, packet)) return 0;
    } else {
        if (is_bf16) best_of_groups(plan->peak, row, at, 1, LARGEST_KEY);
        else best_of_groups(plan->peak, row, at, 0, LARGEST_KEY);
        if (!all_finite512(plan->peak, at->groups)) return 0;
        if (!peak_is_signed(at))
            for (int64_t g = 0; g < at->groups; g++) plan->peak[g] = as_float(as_bits(plan->peak[g]) & ~SIGN);
    }
    group_scales(at, plan->peak, plan->inverse, packet);
    if (size == 16) return make_codes_OF_16(plan, row, n, inverse, minimum, is_bf16, 0);
    if (size == 32) return make_codes_OF_32(plan, row, n, inverse, minimum, is_bf16, 0);
    if (size % BLOCK == 0) return make_codes_OF_64(plan, row, n, inverse, minimum, is_bf16, 0);
    repeat(plan->scale, plan->inverse, at);
    if (at->asymmetric) repeat(plan->minimum, plan->lowest, at);
    return make_codes_OF_EACH(plan, row, n, plan->scale, plan->minimum, is_bf16, 0);
}

/* Write one row of x into one of the packet, but for its outliers and gaps. Returns 0 where it cannot: a value that is
 * not finite, or about to be. */
AVX512 static int encode_row512(Encode512 *plan, const uint8_t *x, uint8_t *packet) {
    const Layout *at = plan->at;
    int is_bf16 = plan->is_bf16, done;
    if (at->group_size) {
        const uint8_t *row = x;
        if (at->outliers) {
            if (is_bf16) compact(plan->row, x, plan, 1);
            else compact(plan->row, x, plan, 0);
            row = plan->row;
        }
        if (at->prescaled) {
            prescale((float *)plan->prescaled, row, plan->with.scale, at->body, is_bf16);
            row = plan->prescaled, is_bf16 = 0;
        }
        done = encode_groups512(plan, row, packet, is_bf16);
    } else {
        done = make_codes_OF_EACH(plan, x, at->features, plan->scale, plan->minimum, is_bf16, at->outliers > 0);
    }
    if (!done) return 0;
    FOR_BITS(at->bits, pack_row(packet, plan->codes, at, BITS));
    return 1;
}

#endif
#endif
