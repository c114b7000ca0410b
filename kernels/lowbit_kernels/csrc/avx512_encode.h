/* Encoding rows with AVX-512 whose values are all finite: encode_row.h, which defines the results, does the others.
 *
 * Values are taken 32 at a time as those at even and those at odd places, which is how they lie in bf16; numbers that
 * each value has for itself are kept in that order. See avx512.h.
 */
#ifndef LOWBIT_AVX512_ENCODE_H
#define LOWBIT_AVX512_ENCODE_H

#include "avx512_levels.h"

#ifdef HAS_AVX512

enum { SIGNED, UNSIGNED, FP8, FP4, LEVELS };   /* how products become codes */
enum { OF_EACH, OF_16, OF_32, OF_64, OF_ANY }; /* values that share an inverse scale; OF_64: or a multiple */
enum { TO_CODES, TO_NIBBLES, TO_BYTES };       /* where codes go: to scratch, or right into the only plane */

typedef struct {
    const Layout *at;
    Static with;
    int is_bf16, kind;
    int64_t codes_nbytes; /* of a row of `codes` */
    Coding coding;
    Levels levels;
    Body body;
    int shared; /* by values of a group */
    Places places;
    uint8_t *codes, *row, *prescaled, *tail;
    float *scale, *minimum; /* of each value in the order that codes are made in, even and odd places apart */
    float *peak, *lowest, *inverse;
} Encode512;

VECTOR void even_odd(__m512 first, __m512 second, __m512 v[2]) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    v[0] = _mm512_permutex2var_ps(first, even, second);
    v[1] = _mm512_permutex2var_ps(first, _mm512_or_si512(even, _mm512_set1_epi32(1)), second);
}

/* 32 values of a row of fp32 or bf16. */
VECTOR void load32(const uint8_t *row, int64_t i, int is_bf16, __m512 v[2]) {
    if (is_bf16) {
        __m512i both = _mm512_loadu_si512(row + 2 * i);
        v[0] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        v[1] = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xFFFF0000)));
    } else {
        even_odd(_mm512_loadu_ps(row + 4 * i), _mm512_loadu_ps(row + 4 * i + 64), v);
    }
}

/* Numbers in order to even and odd places apart, in place. */
VECTOR void part(float *numbers, int64_t n) {
    for (int64_t i = 0; i < n; i += 32) {
        __m512 v[2];
        even_odd(_mm512_loadu_ps(numbers + i), _mm512_loadu_ps(numbers + i + 16), v);
        _mm512_storeu_ps(numbers + i, v[0]), _mm512_storeu_ps(numbers + i + 16, v[1]);
    }
}

/* Numbers of the body in that order, at the places of their features. */
VECTOR void spread(float *to, const float *from, const Body *body, int64_t n, int64_t H, float factor) {
    for (int64_t i = 0; i < H; i += 32) {
        __m512i numbers[2];
        __m512 v[2];
        body32(from, body, i, n, numbers);
        even_odd(_mm512_castsi512_ps(numbers[0]), _mm512_castsi512_ps(numbers[1]), v);
        for (int k = 0; k < 2; k++) _mm512_storeu_ps(to + i + 16 * k, _mm512_mul_ps(v[k], _mm512_set1_ps(factor)));
    }
}

INLINE int shared_of(int64_t size) {
    return size == 16                                 ? OF_16
           : size == 32                               ? OF_32
           : size && size % BLOCK == 0                ? OF_64
           : size % 2 == 0 && size >= SMALLEST_PLACED ? OF_ANY
                                                      : OF_EACH;
}

/* Returns 0 where this code cannot do it: levels that are too near to each other. */
AVX512 static int plan_encode512(Encode512 *plan, const Layout *at, Static with, int is_bf16, Arena *from) {
    const int64_t H = at->features, G = at->groups;
    plan->at = at, plan->with = with, plan->is_bf16 = is_bf16, plan->coding = coding_of(at);
    plan->kind = has_levels(at)       ? LEVELS
                 : at->values == E4M3 ? FP8
                 : at->values == E2M1 ? FP4
                 : at->asymmetric     ? UNSIGNED
                                      : SIGNED;
    plan->shared = shared_of(at->group_size);
    if (plan->shared == OF_ANY) plan_places(&plan->places, at->group_size, at->body, 1, from);
    plan_body(&plan->body, at, with.outlier_index, from);
    plan->codes_nbytes = H + BLOCK, plan->codes = take(from, TOGETHER * plan->codes_nbytes, 1);
    plan->tail = take(from, BLOCK, 4);
    plan->row = take(from, at->outliers ? H : 0, 4), plan->prescaled = take(from, at->prescaled ? H : 0, 4);
    plan->scale = take(from, H, 4), plan->minimum = take(from, H, 4);
    plan->peak = take(from, G + 16, 4), plan->lowest = take(from, G + 16, 4), plan->inverse = take(from, G + 16, 4);
    if (has_trellis(at) || (has_levels(at) && !fill_levels(&plan->levels, at))) return 0;
    if (!from->base || at->group_size) return 1;
    spread(plan->scale, with.scale, &plan->body, at->body, H, plan->kind == FP4 ? 4.0f : 1.0f);
    if (with.minimum) spread(plan->minimum, with.minimum, &plan->body, at->body, H, 1.0f);
    return 1;
}

/* Magnitudes to codes: small_float_code without the sign. What is beyond the largest stays so. */
VECTOR __m512i magnitude_codes(__m512 product, const SmallFloat as, int clamp) {
    const int shift = 23 - as.mantissa_bits;
    __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(product), _mm512_set1_epi32(0x7FFFFFFF));
    if (clamp) magnitude = _mm512_min_epu32(magnitude, _mm512_castps_si512(_mm512_set1_ps(as.largest)));
    __m512i exponent = _mm512_max_epu32(magnitude, _mm512_set1_epi32((int)as.lowest));
    exponent = _mm512_and_si512(exponent, _mm512_set1_epi32((int)EXPONENT));
    __m512i power = _mm512_add_epi32(exponent, _mm512_set1_epi32(shift << 23));
    __m512 sum = _mm512_add_ps(_mm512_castsi512_ps(magnitude), _mm512_castsi512_ps(power));
    __m512i units = _mm512_sub_epi32(_mm512_castps_si512(sum), power);
    return _mm512_add_epi32(units, _mm512_srli_epi32(exponent, (unsigned)shift)); /* plus `lowest`, shifted */
}

/* Products of 32 values to words: their codes for integers, which saturate, and for e4m3, without the sign. For e2m1,
 * where they are four times the product, q, what its table wants: floor(q) + ceil(q), which is odd between two integers
 * and even on one, where ties are. `least_seen` catches what is not finite or beyond 32 bits. `thresholds`: of levels. */
VECTOR __m512i words32(const __m512 product[2], int kind, int clamp, __m512i thresholds, __m512i *least_seen) {
    __m512i words;
    if (kind == LEVELS) return places32(product, thresholds);
    if (kind == FP8) {
        const __m512i lowest = _mm512_set1_epi16((short)(AS_E4M3.lowest >> 20));
        words = _mm512_packs_epi32(magnitude_codes(product[0], AS_E4M3, clamp),
                                   magnitude_codes(product[1], AS_E4M3, clamp));
        return _mm512_sub_epi16(words, lowest);
    }
    if (kind == FP4) {
        enum { DOWN = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC, UP = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC };
        words = _mm512_packs_epi32(_mm512_cvt_roundps_epi32(product[0], DOWN),
                                   _mm512_cvt_roundps_epi32(product[1], DOWN));
        __m512i up = _mm512_packs_epi32(_mm512_cvt_roundps_epi32(product[0], UP),
                                        _mm512_cvt_roundps_epi32(product[1], UP));
        *least_seen = _mm512_min_epi16(*least_seen, words);
        return _mm512_adds_epi16(words, up);
    }
    words = _mm512_packs_epi32(_mm512_cvtps_epi32(product[0]), _mm512_cvtps_epi32(product[1]));
    *least_seen = _mm512_min_epi16(*least_seen, words);
    return words;
}

/* Codes of 64 values, one to a byte, in order. */
VECTOR __m512i codes64(__m512i low, __m512i high, const Encode512 *plan, int kind, const uint8_t *from, int is_bf16) {
    const __m512i in_order = _mm512_set_epi64(
        0x3F3B3E3A3D393C38, 0x2F2B2E2A2D292C28, 0x1F1B1E1A1D191C18, 0x0F0B0E0A0D090C08,
        0x3733363235313430, 0x2723262225212420, 0x1713161215111410, 0x0703060205010400);
    __m512i codes = kind == SIGNED || kind == FP4 ? _mm512_packs_epi16(low, high) : _mm512_packus_epi16(low, high);
    const __m512i lowest = _mm512_set1_epi8((char)plan->coding.lowest);
    const __m512i highest = _mm512_set1_epi8((char)plan->coding.highest);
    if (kind == SIGNED) codes = _mm512_min_epi8(_mm512_max_epi8(codes, lowest), highest);
    if (kind == UNSIGNED) codes = _mm512_min_epu8(codes, highest);
    if (kind == FP8) codes = _mm512_min_epu8(codes, _mm512_set1_epi8(0x7E));
    if (kind == LEVELS) codes = _mm512_permutexvar_epi8(codes, _mm512_loadu_si512(plan->levels.code));
    if (kind == FP4) {
        codes = _mm512_min_epi8(_mm512_max_epi8(codes, _mm512_set1_epi8(-64)), _mm512_set1_epi8(63));
        codes = _mm512_permutex2var_epi8(_mm512_loadu_si512(e2m1_codes), codes, _mm512_loadu_si512(e2m1_codes + 64));
    }
    codes = _mm512_permutexvar_epi8(in_order, codes);
    if (kind == FP8) {
        uint64_t negative = 0;
        if (is_bf16) {
            for (int k = 0; k < 2; k++)
                negative |= (uint64_t)_mm512_movepi16_mask(_mm512_loadu_si512(from + 64 * k)) << 32 * k;
        } else {
            for (int k = 0; k < 4; k++)
                negative |= (uint64_t)_mm512_movepi32_mask(_mm512_loadu_si512(from + 64 * k)) << 16 * k;
        }
        codes = _mm512_or_si512(codes, _mm512_maskz_mov_epi8(negative, _mm512_set1_epi8((char)0x80)));
    }
    return codes;
}

/* A number of each of 32 values: its own, or that of its group. `g`: the group of the block. */
VECTOR void numbers32(const float *numbers, int64_t i, int64_t g, int shared, __m512 v[2]) {
    if (shared == OF_EACH) {
        v[0] = _mm512_loadu_ps(numbers + i), v[1] = _mm512_loadu_ps(numbers + i + 16);
    } else if (shared == OF_16) {
        v[0] = v[1] = _mm512_mask_mov_ps(_mm512_set1_ps(numbers[i / 16 + 1]), 0xFF, _mm512_set1_ps(numbers[i / 16]));
    } else {
        v[0] = v[1] = _mm512_set1_ps(numbers[shared == OF_32 ? i / 32 : g]);
    }
}

/* Rows that are encoded together, so that numbers which each feature has for itself are read once for all of them. */
typedef struct {
    const uint8_t *from;
    uint8_t *to;
    int64_t count, from_nbytes, to_nbytes; /* distances */
} Rows;

/* Codes of n values of each of `count` rows, of all values, or those of the body where `leave_out`. Returns a bit for
 * each row with a value that is not finite, or so large that its code cannot be made here. */
VECTOR int make_codes(Encode512 *plan, const Rows *rows, const int count, int64_t n, const float *inverse,
                      const float *minimum, int is_bf16, const int kind, const int shared, const int to,
                      const int leave_out) {
    const int64_t in_group = plan->at->group_size / BLOCK, nbytes = is_bf16 ? 2 : 4;
    __m512 not_finite[TOGETHER];
    __m512i least_seen[TOGETHER], thresholds = _mm512_loadu_si512(plan->levels.threshold);
    for (int q = 0; q < count; q++) not_finite[q] = _mm512_setzero_ps(), least_seen[q] = _mm512_setzero_si512();
    int64_t blocks_left = in_group, g = 0;
    Placed at = {0, 0};
    for (int64_t b = 0; b < blocks_of(n); b++) {
        const int64_t left = n - BLOCK * b;
        __m512 by[2][2], low[2][2];
        if (shared == OF_ANY) {
            placed64(inverse, &plan->places, at, by[0], by[1]);
            if (kind == UNSIGNED) placed64(minimum, &plan->places, at, low[0], low[1]);
            at = next_block(&plan->places, at);
        }
        for (int k = 0; k < 2 && shared != OF_ANY; k++) {
            numbers32(inverse, BLOCK * b + 32 * k, g, shared, by[k]);
            if (kind == UNSIGNED) numbers32(minimum, BLOCK * b + 32 * k, g, shared, low[k]);
        }
        if (shared == OF_64 && --blocks_left == 0) g++, blocks_left = in_group;
#pragma GCC unroll 4
        for (int q = 0; q < count; q++) {
            const uint8_t *from = rows->from + q * rows->from_nbytes + BLOCK * b * nbytes;
            uint8_t *packet = rows->to + q * rows->to_nbytes, *codes_of_row = plan->codes + q * plan->codes_nbytes;
            if (left < BLOCK) {
                memset(plan->tail, 0, BLOCK * 4);
                memcpy(plan->tail, from, (size_t)(left * nbytes));
                from = plan->tail;
            }
            __m512i words[2];
#pragma GCC unroll 2
            for (int k = 0; k < 2; k++) {
                __m512 x[2];
                load32(from, 32 * k, is_bf16, x);
                for (int j = 0; j < 2; j++) {
                    if (kind == FP8 && shared == OF_EACH)
                        not_finite[q] = _mm512_fmadd_ps(x[j], _mm512_setzero_ps(), not_finite[q]);
                    if (kind == UNSIGNED) x[j] = _mm512_sub_ps(x[j], low[k][j]);
                    x[j] = _mm512_mul_ps(x[j], by[k][j]);
                }
                words[k] = words32(x, kind, shared == OF_EACH, thresholds, &least_seen[q]);
            }
            __m512i codes = codes64(words[0], words[1], plan, kind, from, is_bf16);
            if (to == TO_NIBBLES) {
                if (left < BLOCK) codes = _mm512_maskz_mov_epi8(first64(left), codes);
                pack_plane64(packet + BLOCK / 2 * b, codes, left, 4, 0);
            } else if (to == TO_BYTES) {
                pack_plane64(packet + BLOCK * b, codes, left, 8, 0);
            } else if (leave_out) {
                codes = _mm512_maskz_compress_epi8(plan->body.mask[b], codes);
                _mm512_storeu_si512(codes_of_row + plan->body.before[b], codes);
            } else {
                _mm512_storeu_si512(codes_of_row + BLOCK * b, codes);
            }
        }
    }
    int failed = 0;
    for (int q = 0; q < count; q++) {
        if (to == TO_CODES)
            _mm512_storeu_si512(plan->codes + q * plan->codes_nbytes + plan->at->body, _mm512_setzero_si512());
        if (_mm512_cmp_ps_mask(not_finite[q], not_finite[q], _CMP_UNORD_Q) ||
            _mm512_cmpeq_epi16_mask(least_seen[q], _mm512_set1_epi16(INT16_MIN)))
            failed |= 1 << q;
    }
    return failed;
}

/* Encode the bodies of rows: `make_codes`, made for what the layout and the rows are. Returns its bits. */
#define ENCODE_BODY(name, shared, count) \
    AVX512 static int name(Encode512 *plan, const Rows *rows, int64_t n, const float *inverse, const float *minimum, \
                           int is_bf16) { \
        const int leave_out = shared == OF_EACH && n != plan->at->body, bits = (int)plan->at->bits; \
        int failed; \
        if (leave_out) failed = MAKE_ANY(shared, count, shared == OF_EACH); \
        else if (plan->kind == FP8) failed = MAKE(FP8, shared, count, TO_BYTES, 0); \
        else if (plan->kind == FP4) failed = MAKE(FP4, shared, count, TO_NIBBLES, 0); \
        else if (plan->kind == LEVELS && bits == 4) failed = MAKE(LEVELS, shared, count, TO_NIBBLES, 0); \
        else if (plan->kind == LEVELS) failed = MAKE(LEVELS, shared, count, TO_CODES, 0); \
        else if (bits == 4) failed = MAKE_INTEGERS(shared, count, TO_NIBBLES); \
        else if (bits == 8) failed = MAKE_INTEGERS(shared, count, TO_BYTES); \
        else failed = MAKE_INTEGERS(shared, count, TO_CODES); \
        if (!leave_out && (bits == 4 || bits == 8)) return failed; \
        for (int q = 0; q < count; q++) \
            pack_codes(rows->to + q * rows->to_nbytes, plan->codes + q * plan->codes_nbytes, plan->at); \
        return failed; \
    }
#define MAKE(kind, shared, count, to, leave_out) \
    (is_bf16 ? make_codes(plan, rows, count, n, inverse, minimum, 1, kind, shared, to, leave_out) \
             : make_codes(plan, rows, count, n, inverse, minimum, 0, kind, shared, to, leave_out))
#define MAKE_INTEGERS(shared, count, to) \
    (plan->kind == UNSIGNED ? MAKE(UNSIGNED, shared, count, to, 0) : MAKE(SIGNED, shared, count, to, 0))
#define MAKE_ANY(shared, count, leave_out) \
    (plan->kind == SIGNED     ? MAKE(SIGNED, shared, count, TO_CODES, leave_out) \
     : plan->kind == UNSIGNED ? MAKE(UNSIGNED, shared, count, TO_CODES, leave_out) \
     : plan->kind == FP8      ? MAKE(FP8, shared, count, TO_CODES, leave_out) \
                              : MAKE(FP4, shared, count, TO_CODES, leave_out))

AVX512 static void pack_codes(uint8_t *packet, const uint8_t *codes, const Layout *at) {
    FOR_BITS(at->bits, pack_row(packet, codes, at, BITS));
}

ENCODE_BODY(encode_together, OF_EACH, TOGETHER)
ENCODE_BODY(encode_of_each, OF_EACH, 1)
ENCODE_BODY(encode_of_16, OF_16, 1)
ENCODE_BODY(encode_of_32, OF_32, 1)
ENCODE_BODY(encode_of_64, OF_64, 1)
ENCODE_BODY(encode_of_any, OF_ANY, 1)

#endif
#endif
