/* Encoding one row with AVX-512, where all its values are finite: encode_row.h, which defines the results, does the rest.
 * See avx512.h.
 */
#ifndef LOWBIT_AVX512_ENCODE_H
#define LOWBIT_AVX512_ENCODE_H

#include "avx512.h"
#include "formats.h"

#ifdef HAS_AVX512

enum { SIGNED, UNSIGNED, FP8, FP4 };             /* how products become codes */
enum { OF_EACH = 0, OF_16 = 1, OF_32 = 2, OF_64 = 4 }; /* values to an inverse scale, in vectors of 16 */

typedef struct {
    const Layout *at;
    Static with;
    int is_bf16, kind;
    Coding coding;
    Body body;
    uint8_t *codes, *row, *prescaled, *tail;
    float *scale, *minimum;      /* of each value, in the order that codes are made in */
    float *peak, *lowest, *inverse;
} Encode512;

/* Numbers of the body at the places of their features, 0 elsewhere. */
VECTOR void spread(float *to, const float *from, const Body *body, int64_t H) {
    if (!body->mask) {
        memcpy(to, from, (size_t)(4 * H)); /* to where whole blocks can be read */
        return;
    }
    for (int64_t b = 0; b < blocks_of(H); b++) {
        const float *at = from + body->before[b];
        uint64_t mask = body->mask[b];
        for (int k = 0; k < 4; k++, mask >>= 16) {
            int count = __builtin_popcountll(mask & 0xFFFF);
            __m512 some = _mm512_maskz_loadu_ps(first16(count), at);
            _mm512_storeu_ps(to + BLOCK * b + 16 * k, _mm512_maskz_expand_ps((__mmask16)mask, some));
            at += count;
        }
    }
}

AVX512 static void plan_encode512(Encode512 *plan, const Layout *at, Static with, int is_bf16, Arena *from) {
    const int64_t H = at->features, G = at->groups;
    plan->at = at, plan->with = with, plan->is_bf16 = is_bf16, plan->coding = coding_of(at);
    plan->kind = at->values == E4M3 ? FP8 : at->values == E2M1 ? FP4 : at->asymmetric ? UNSIGNED : SIGNED;
    plan_body(&plan->body, at, with.outlier_index, from);
    plan->codes = take(from, H, 1), plan->tail = take(from, BLOCK, 4);
    plan->row = take(from, at->outliers ? H : 0, 4), plan->prescaled = take(from, at->prescaled ? H : 0, 4);
    plan->scale = take(from, H, 4), plan->minimum = take(from, H, 4);
    plan->peak = take(from, G + 16, 4), plan->lowest = take(from, G + 16, 4), plan->inverse = take(from, G + 16, 4);
    if (!from->base || at->group_size) return;
    spread(plan->scale, with.scale, &plan->body, H);
    if (with.minimum) spread(plan->minimum, with.minimum, &plan->body, H);
}

/* Body values of a row without the outliers between them, times the static scale where there is one (then fp32). */
VECTOR void compact(uint8_t *to, const uint8_t *x, const Encode512 *plan, int is_bf16) {
    const int64_t H = plan->at->features;
    for (int64_t b = 0; b < blocks_of(H); b++) {
        uint64_t mask = plan->body.mask[b];
        int64_t before = plan->body.before[b];
        if (is_bf16) {
            for (int k = 0; k < 2; k++, mask >>= 32) {
                __mmask32 here = (__mmask32)first64(H - BLOCK * b - 32 * k);
                __m512i words = _mm512_maskz_loadu_epi16(here, x + 2 * (BLOCK * b + 32 * k));
                _mm512_storeu_si512(to + 2 * before, _mm512_maskz_compress_epi16((__mmask32)mask, words));
                before += __builtin_popcountll(mask & 0xFFFFFFFF);
            }
        } else {
            for (int k = 0; k < 4; k++, mask >>= 16) {
                __m512 values = _mm512_maskz_loadu_ps(first16(H - BLOCK * b - 16 * k), x + 4 * (BLOCK * b + 16 * k));
                _mm512_storeu_ps(to + 4 * before, _mm512_maskz_compress_ps((__mmask16)mask, values));
                before += __builtin_popcountll(mask & 0xFFFF);
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

/* small_float_code, but for the sign. */
VECTOR __m512i magnitude_codes(__m512 x, const SmallFloat as) {
    const int shift = 23 - as.mantissa_bits;
    __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF));
    magnitude = _mm512_min_epu32(magnitude, _mm512_castps_si512(_mm512_set1_ps(as.largest)));
    __m512i exponent = _mm512_max_epu32(magnitude, _mm512_set1_epi32((int)as.lowest));
    exponent = _mm512_and_si512(exponent, _mm512_set1_epi32((int)EXPONENT));
    __m512i power = _mm512_add_epi32(exponent, _mm512_set1_epi32(shift << 23));
    __m512 sum = _mm512_add_ps(_mm512_castsi512_ps(magnitude), _mm512_castsi512_ps(power));
    __m512i units = _mm512_sub_epi32(_mm512_castps_si512(sum), power);
    __m512i fields = _mm512_srli_epi32(_mm512_sub_epi32(exponent, _mm512_set1_epi32((int)as.lowest)), (unsigned)shift);
    return _mm512_add_epi32(units, fields);
}

/* Products to codes before they are packed: integers of 32 bits, that saturate on the way to 8. */
VECTOR __m512i wide_codes(__m512 product, int kind, __m512 highest) {
    if (kind == SIGNED || kind == UNSIGNED) return _mm512_cvtps_epi32(_mm512_min_ps(product, highest));
    __m512i codes = magnitude_codes(product, kind == FP8 ? AS_E4M3 : AS_E2M1);
    __m512i sign = _mm512_srli_epi32(_mm512_castps_si512(product), kind == FP8 ? 24 : 28);
    const int sign_bit = kind == FP8 ? 0x80 : 8;
    return _mm512_ternarylogic_epi32(codes, sign, _mm512_set1_epi32(sign_bit), 0xF8); /* codes | (sign & bit) */
}

/* 64 codes, one to a byte, of 4 vectors of products. */
VECTOR __m512i codes64(const __m512 product[4], int kind, __m512 highest, __m512i lowest) {
    const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i low = _mm512_packs_epi32(wide_codes(product[0], kind, highest), wide_codes(product[1], kind, highest));
    __m512i high = _mm512_packs_epi32(wide_codes(product[2], kind, highest), wide_codes(product[3], kind, highest));
    __m512i codes = kind == SIGNED ? _mm512_packs_epi16(low, high) : _mm512_packus_epi16(low, high);
    if (kind == SIGNED) codes = _mm512_max_epi8(codes, lowest);
    if (kind == FP4) codes = _mm512_mask_mov_epi8(codes, _mm512_cmpeq_epi8_mask(codes, _mm512_set1_epi8(8)), _mm512_setzero_si512());
    return _mm512_permutexvar_epi32(in_order, codes);
}

/* Codes of n values of `row` to plan->codes. `each`: 16 * `each` values share an inverse scale (and a minimum), or every
 * value has its own. Codes of values at outliers are left out where `leave_out`. Returns whether all values are finite. */
VECTOR int make_codes(Encode512 *plan, const uint8_t *row, int64_t n, const float *inverse, const float *minimum,
                      int is_bf16, const int kind, const int each, int leave_out) {
    const __m512 highest = _mm512_set1_ps((float)plan->coding.highest), zero = _mm512_setzero_ps();
    const __m512i lowest = _mm512_set1_epi8((char)plan->coding.lowest);
    const int64_t in_group = plan->at->group_size / BLOCK;
    __m512 not_finite = zero;
    int64_t to = 0, blocks_left = in_group, g = 0;
    for (int64_t b = 0; b < blocks_of(n); b++) {
        const uint8_t *from = row + BLOCK * b * (is_bf16 ? 2 : 4);
        if (n - BLOCK * b < BLOCK) {
            memset(plan->tail, 0, BLOCK * 4);
            memcpy(plan->tail, from, (size_t)((n - BLOCK * b) * (is_bf16 ? 2 : 4)));
            from = plan->tail;
        }
        __m512 product[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            __m512 x = load16(from, 16 * k, is_bf16), by;
            const int64_t i = BLOCK * b + 16 * k, group = each == OF_16 ? 4 * b + k : each == OF_32 ? 2 * b + k / 2 : g;
            not_finite = _mm512_fmadd_ps(x, zero, not_finite);
            if (kind == UNSIGNED)
                x = _mm512_sub_ps(x, each == OF_EACH ? _mm512_loadu_ps(minimum + i) : _mm512_set1_ps(minimum[group]));
            by = each == OF_EACH ? _mm512_loadu_ps(inverse + i) : _mm512_set1_ps(inverse[group]);
            product[k] = _mm512_mul_ps(x, by);
        }
        if (each == OF_64 && --blocks_left == 0) g++, blocks_left = in_group;
        __m512i codes = codes64(product, kind, highest, lowest);
        if (leave_out) {
            codes = _mm512_maskz_compress_epi8(plan->body.mask[b], codes);
            to = plan->body.before[b];
        }
        _mm512_storeu_si512(plan->codes + to, codes);
        to += BLOCK;
    }
    _mm512_storeu_si512(plan->codes + plan->at->body, _mm512_setzero_si512());
    return _mm512_cmp_ps_mask(not_finite, not_finite, _CMP_UNORD_Q) == 0;
}

VECTOR int make_codes_of(Encode512 *plan, const uint8_t *row, int64_t n, const float *inverse, const float *minimum,
                         int is_bf16, const int each, int leave_out) {
#define MAKE(type, kind) make_codes(plan, row, n, inverse, minimum, type, kind, each, leave_out)
#define MAKE_EITHER(kind) (is_bf16 ? MAKE(1, kind) : MAKE(0, kind))
    switch (plan->kind) {
    case SIGNED: return MAKE_EITHER(SIGNED);
    case UNSIGNED: return MAKE_EITHER(UNSIGNED);
    case FP8: return MAKE_EITHER(FP8);
    default: return MAKE_EITHER(FP4);
    }
}

/* One function for each, so that each is compiled on its own. */
#define MAKE_CODES(each) \
    AVX512 static int make_codes_##each(Encode512 *plan, const uint8_t *row, int64_t n, const float *inverse, \
                                        const float *minimum, int is_bf16, int leave_out) { \
        return make_codes_of(plan, row, n, inverse, minimum, is_bf16, each, leave_out); \
    }
MAKE_CODES(OF_EACH)
MAKE_CODES(OF_16)
MAKE_CODES(OF_32)
MAKE_CODES(OF_64)

#endif
#endif
