/* Encoding groups of a row with AVX-512: their largest magnitudes or ranges, then scales and codes; and the row as a
 * whole. See avx512_encode.h.
 */
#ifndef LOWBIT_AVX512_GROUPS_H
#define LOWBIT_AVX512_GROUPS_H

#include "avx512_encode.h"
#include "moves.h"

#ifdef HAS_AVX512

/* What is sought in a group: the largest magnitude, the value of largest magnitude (positive on a tie), a largest or a
 * smallest value; by the order of keys, made from bits of values, that are integers of 16 bits for bf16, else of 32. */
enum { MAGNITUDE, PEAK, LARGEST, SMALLEST };

VECTOR __m512i best(__m512i a, __m512i b, int by, int is_bf16) {
    if (by == LARGEST) return is_bf16 ? _mm512_max_epi16(a, b) : _mm512_max_epi32(a, b);
    if (by == SMALLEST) return is_bf16 ? _mm512_min_epi16(a, b) : _mm512_min_epi32(a, b);
    return is_bf16 ? _mm512_max_epu16(a, b) : _mm512_max_epu32(a, b);
}

VECTOR __m512i to_keys(__m512i bits, int by, int is_bf16) {
    const __m512i sign = _mm512_set1_epi32((int)(is_bf16 ? 0x80008000 : SIGN));
    if (by == MAGNITUDE) return _mm512_andnot_si512(sign, bits);
    if (by == PEAK) { /* the sign, turned round, below the magnitude */
        bits = _mm512_xor_si512(bits, sign);
        return is_bf16 ? _mm512_shldi_epi16(bits, bits, 1) : _mm512_rol_epi32(bits, 1);
    }
    /* magnitudes of negative values turned round: -0 comes below 0 */
    __m512i turned = is_bf16 ? _mm512_srli_epi16(_mm512_srai_epi16(bits, 15), 1)
                             : _mm512_srli_epi32(_mm512_srai_epi32(bits, 31), 1);
    return _mm512_xor_si512(bits, turned);
}

VECTOR __m512i from_keys(__m512i keys, int by, int is_bf16) {
    const __m512i sign = _mm512_set1_epi32((int)(is_bf16 ? 0x80008000 : SIGN));
    if (by == PEAK)
        return _mm512_xor_si512(is_bf16 ? _mm512_shrdi_epi16(keys, keys, 1) : _mm512_ror_epi32(keys, 1), sign);
    return by == MAGNITUDE ? keys : to_keys(keys, by, is_bf16);
}

/* What `best_of_each` starts with: the best of the halves of two vectors. */
VECTOR __m512i halves(__m512i a, __m512i b, int by, int is_bf16) {
    return best(_mm512_shuffle_i64x2(a, b, 0x44), _mm512_shuffle_i64x2(a, b, 0xEE), by, is_bf16);
}

/* Each of part[0..7] holds the candidates of two groups in its halves. To the best of each, as fp32 in the order that
 * `order` says, given as the places of the lower halves' groups, then of the upper halves'. */
VECTOR __m512 best_of_each(__m512i part[8], __m512i order, int by, int is_bf16) {
    __m512i even, odd;
    for (int i = 0; i < 4; i++) {
        even = _mm512_shuffle_i64x2(part[i], part[i + 4], 0x88), odd = _mm512_shuffle_i64x2(part[i], part[i + 4], 0xDD);
        part[i] = best(even, odd, by, is_bf16);
    }
    for (int i = 0; i < 2; i++) {
        even = _mm512_unpacklo_epi64(part[i], part[i + 2]), odd = _mm512_unpackhi_epi64(part[i], part[i + 2]);
        part[i] = best(even, odd, by, is_bf16);
    }
    __m512 a = _mm512_castsi512_ps(part[0]), b = _mm512_castsi512_ps(part[1]);
    even = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)), odd = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xDD));
    __m512i found = best(even, odd, by, is_bf16);
    if (is_bf16) found = best(found, _mm512_rol_epi32(found, 16), by, 1);
    found = from_keys(_mm512_permutexvar_epi32(order, found), by, is_bf16);
    return _mm512_castsi512_ps(is_bf16 ? _mm512_and_si512(found, _mm512_set1_epi32((int)0xFFFF0000)) : found);
}

/* The candidates of one group: 16 fp32 or 32 bf16 keys. */
VECTOR __m512i best_of_group(const uint8_t *row, int64_t start, int64_t stop, int by, int is_bf16) {
    const int64_t step = is_bf16 ? 32 : 16, nbytes = is_bf16 ? 2 : 4;
    __m512i all = by == LARGEST    ? _mm512_set1_epi32((int)(is_bf16 ? 0x80008000 : SIGN))
                  : by == SMALLEST ? _mm512_set1_epi32(is_bf16 ? 0x7FFF7FFF : INT32_MAX)
                                   : _mm512_setzero_si512();
    int64_t i = start;
    for (; i + step <= stop; i += step)
        all = best(all, to_keys(_mm512_loadu_si512(row + nbytes * i), by, is_bf16), by, is_bf16);
    if (i < stop) {
        __mmask64 here = first64(nbytes * (stop - i));
        __m512i keys = to_keys(_mm512_maskz_loadu_epi8(here, row + nbytes * i), by, is_bf16);
        all = _mm512_mask_mov_epi8(all, here, best(all, keys, by, is_bf16));
    }
    return all;
}

/* The best values of all groups to `found`, 16 groups at a time. `size` is theirs, a constant for usual ones. */
VECTOR void best_of_groups(float *found, const uint8_t *row, const Layout *at, const int64_t size, int is_bf16,
                           int by) {
    const __m512i by_halves = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    const __m512i by_pairs = _mm512_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7, 8, 12, 10, 14, 9, 13, 11, 15);
    const int64_t n = at->body, step = is_bf16 ? 32 : 16;
    for (int64_t first = 0; first < at->groups; first += 16) {
        __m512i part[8];
        if (is_bf16 && size == 16 && (first + 16) * 16 <= n) {
            for (int i = 0; i < 8; i++) part[i] = to_keys(_mm512_loadu_si512(row + 2 * (16 * first + 32 * i)), by, 1);
            _mm512_storeu_ps(found + first, best_of_each(part, by_pairs, by, 1));
            continue;
        }
        /* whole vectors, no branches; the last of a group may overlap the one before */
        if (size >= step && size <= 8 * step && (first + 16) * size <= n) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                __m512i both[2];
#pragma GCC unroll 2
                for (int k = 0; k < 2; k++) {
                    const int64_t nbytes = is_bf16 ? 2 : 4;
                    const uint8_t *group = row + nbytes * size * (first + i + 8 * k);
                    both[k] = to_keys(_mm512_loadu_si512(group + nbytes * (size - step)), by, is_bf16);
#pragma GCC unroll 8
                    for (int64_t j = 0; j < (size - 1) / step; j++)
                        both[k] = best(both[k], to_keys(_mm512_loadu_si512(group + 64 * j), by, is_bf16), by, is_bf16);
                }
                part[i] = halves(both[0], both[1], by, is_bf16);
            }
            _mm512_storeu_ps(found + first, best_of_each(part, by_halves, by, is_bf16));
            continue;
        }
        for (int i = 0; i < 8; i++) {
            __m512i both[2];
            for (int k = 0; k < 2; k++) {
                const int64_t start = least((first + i + 8 * k) * size, n); /* behind the last group there is nothing */
                both[k] = best_of_group(row, start, least(start + size, n), by, is_bf16);
            }
            part[i] = halves(both[0], both[1], by, is_bf16);
        }
        _mm512_storeu_ps(found + first, best_of_each(part, by_halves, by, is_bf16));
    }
}

#define FIND(name, by) \
    AVX512 static void name(float *found, const uint8_t *row, const Layout *at, int is_bf16) { \
        switch (at->group_size) { \
        case 16: FIND_OF(16, by); break; \
        case 32: FIND_OF(32, by); break; \
        case 40: FIND_OF(40, by); break; \
        case 64: FIND_OF(64, by); break; \
        case 128: FIND_OF(128, by); break; \
        default: FIND_OF(at->group_size, by); \
        } \
    }
#define FIND_OF(size, by) \
    (is_bf16 ? best_of_groups(found, row, at, size, 1, by) : best_of_groups(found, row, at, size, 0, by))
FIND(find_magnitudes, MAGNITUDE)
FIND(find_peaks, PEAK)
FIND(find_largest, LARGEST)
FIND(find_smallest, SMALLEST)

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

AVX512 static int encode_groups512(Encode512 *plan, const Rows *rows, int is_bf16) {
    const Layout *at = plan->at;
    const int64_t n = at->body;
    const float *inverse = plan->inverse, *minimum = plan->lowest;
    const uint8_t *row = rows->from;
    uint8_t *packet = rows->to;
    if (at->asymmetric) {
        find_largest(plan->peak, row, at, is_bf16), find_smallest(plan->lowest, row, at, is_bf16);
    } else if (peak_is_signed(at)) {
        find_peaks(plan->peak, row, at, is_bf16);
    } else {
        find_magnitudes(plan->peak, row, at, is_bf16);
    }
    if (!all_finite512(plan->peak, at->groups)) return 1;
    if (at->asymmetric && !group_minimums(at, plan->peak, plan->lowest, packet)) return 1;
    group_scales(at, plan->peak, plan->inverse, packet);
    if (plan->kind == FP4) for (int64_t g = 0; g < at->groups; g++) plan->inverse[g] *= 4.0f;
    switch (plan->shared) {
    case OF_16: return encode_of_16(plan, rows, n, inverse, minimum, is_bf16);
    case OF_32: return encode_of_32(plan, rows, n, inverse, minimum, is_bf16);
    case OF_64: return encode_of_64(plan, rows, n, inverse, minimum, is_bf16);
    case OF_ANY: return encode_of_any(plan, rows, n, inverse, minimum, is_bf16);
    }
    repeat(plan->scale, plan->inverse, at), part(plan->scale, n);
    if (at->asymmetric) repeat(plan->minimum, plan->lowest, at), part(plan->minimum, n);
    return encode_of_each(plan, rows, n, plan->scale, plan->minimum, is_bf16);
}

/* Body values of a row without the outliers between them. */
VECTOR void compact(uint8_t *to, const uint8_t *x, const Encode512 *plan, int is_bf16) {
    const int64_t nbytes = is_bf16 ? 2 : 4, blocks = blocks_of(plan->at->features), left = plan->at->features % BLOCK;
    for (int64_t b = 0; b < blocks; b++) {
        const uint8_t *from = x + nbytes * BLOCK * b;
        const uint64_t mask = plan->body.mask[b];
        uint8_t *at = to + nbytes * plan->body.before[b];
        if (b == blocks - 1 && left) from = memcpy(plan->tail, from, (size_t)(nbytes * left));
        if (is_bf16) {
            __m512i low = _mm512_loadu_si512(from), high = _mm512_loadu_si512(from + 64);
            _mm512_storeu_si512(at, _mm512_maskz_compress_epi16((__mmask32)mask, low));
            at += 2 * _mm_popcnt_u64(mask & 0xFFFFFFFF);
            _mm512_storeu_si512(at, _mm512_maskz_compress_epi16((__mmask32)(mask >> 32), high));
        } else {
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) {
                __mmask16 here = (__mmask16)(mask >> 16 * k);
                _mm512_storeu_ps(at, _mm512_maskz_compress_ps(here, _mm512_loadu_ps(from + 64 * k)));
                at += 4 * _mm_popcnt_u32(here);
            }
        }
    }
}

VECTOR void prescale(float *to, const uint8_t *from, const float *scale, int64_t n, int is_bf16) {
    for (int64_t i = 0; i < n; i += 16) {
        __m512 x = is_bf16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(
                                 first16(n - i), from + 2 * i)), 16))
                           : _mm512_maskz_loadu_ps(first16(n - i), from + 4 * i);
        _mm512_storeu_ps(to + i, _mm512_mul_ps(x, _mm512_maskz_loadu_ps(first16(n - i), scale + i)));
    }
}

/* Write rows, TOGETHER or one, into those of a packet, but for outliers and gaps. Returns a bit for each that it
 * cannot, as a value is not finite, or about to be. */
AVX512 static int encode_rows512(Encode512 *plan, const Rows *rows) {
    const Layout *at = plan->at;
    const int is_bf16 = plan->is_bf16;
    if (!at->group_size) {
        if (rows->count == 1) return encode_of_each(plan, rows, at->features, plan->scale, plan->minimum, is_bf16);
        return encode_together(plan, rows, at->features, plan->scale, plan->minimum, is_bf16);
    }
    int failed = 0;
    for (int q = 0; q < rows->count; q++) {
        Rows row = {rows->from + q * rows->from_nbytes, rows->to + q * rows->to_nbytes, 1, 0, 0};
        if (at->outliers) {
            if (is_bf16) compact(plan->row, row.from, plan, 1);
            else compact(plan->row, row.from, plan, 0);
            row.from = plan->row;
        }
        if (at->prescaled) {
            prescale((float *)plan->prescaled, row.from, plan->with.scale, at->body, is_bf16);
            row.from = plan->prescaled;
        }
        failed |= encode_groups512(plan, &row, is_bf16 && !at->prescaled) << q;
    }
    return failed;
}

/* The rest of such a row. */
AVX512 static void finish512(const Encode512 *plan, uint8_t *packet, const uint8_t *x) {
    clear_gaps(plan->at, packet);
    if (plan->is_bf16) store_outliers(plan->at, packet, x, 1, plan->with.outlier_index);
    else store_outliers(plan->at, packet, x, 0, plan->with.outlier_index);
}

#endif
#endif
