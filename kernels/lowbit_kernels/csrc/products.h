/* Products of whole numbers, as a predictor's: rows of int8 codes times a matrix, exact, with VNNI or in plain C.
 *
 * The matrix [I, O] lies as foretell.py packs it: in tiles of 16 outputs, and in a tile 64 bytes for every 4 / width
 * inputs, those of one output together. One byte a coefficient: it plus 128, as VNNI wants; two: it as it is.
 */
#ifndef LOWBIT_PRODUCTS_H
#define LOWBIT_PRODUCTS_H

#include "coders.h"

enum { OUTPUTS = 16, ROWS = 8 }; /* of a tile; rows that are worked on together */

typedef struct {
    const uint8_t *packed;
    int64_t inputs, outputs, width;
} Matrix;

/* Codes of up to ROWS rows as the products take them: `chunks` words of 4 / width codes each. Rows are an odd number of
 * cache lines apart: were it a page, one column of all rows would share a set of the cache. */
typedef struct {
    Matrix of;
    int64_t chunks, apart;
    uint32_t *word;      /* [ROWS, apart] */
    int32_t start[ROWS]; /* what the 128 in every coefficient adds, taken away */
} Factors;

INLINE void plan_factors(Factors *factors, Matrix of, Arena *from) {
    factors->of = of;
    factors->chunks = (of.inputs * of.width + 3) / 4;
    factors->apart = (factors->chunks + 31) / 32 * 32 + 16;
    factors->word = take(from, ROWS * factors->apart, 4);
}

/* What the products of row q start with, once its codes of one byte are there. */
INLINE void start_bytes(Factors *factors, int64_t q) {
    const int8_t *codes = (const int8_t *)(factors->word + q * factors->apart);
    int32_t sum = 0;
    for (int64_t i = 0; i < 4 * factors->chunks; i++) sum += codes[i];
    factors->start[q] = -128 * sum;
}

/* Take a row of codes as row q. */
INLINE void put_codes(Factors *factors, int64_t q, const int8_t *codes) {
    uint8_t *to = (uint8_t *)(factors->word + q * factors->apart);
    const int64_t n = factors->of.inputs;
    memset(to, 0, (size_t)(4 * factors->chunks));
    if (factors->of.width == 1) {
        memcpy(to, codes, (size_t)n);
        start_bytes(factors, q);
    } else {
        for (int64_t i = 0; i < n; i++) store_u16(to + 2 * i, (uint16_t)(int16_t)codes[i]);
        factors->start[q] = 0;
    }
}

/* Sums of a tile's 16 outputs for one row. */
INLINE void sums_plain(const Factors *factors, const uint8_t *tile, int64_t q, const int width,
                       int32_t *restrict sum) {
    const uint8_t *word = (const uint8_t *)(factors->word + q * factors->apart);
    for (int o = 0; o < OUTPUTS; o++) sum[o] = factors->start[q];
    for (int64_t c = 0; c < factors->chunks; c++, tile += 64, word += 4) {
        for (int o = 0; o < OUTPUTS; o++) {
            if (width == 1)
                for (int j = 0; j < 4; j++) sum[o] += (int32_t)tile[4 * o + j] * (int8_t)word[j];
            else
                for (int j = 0; j < 2; j++)
                    sum[o] += (int32_t)(int16_t)load_u16(tile + 4 * o + 2 * j) * (int16_t)load_u16(word + 2 * j);
        }
    }
}

/* Sums of rows q to q + count times `scale`, where it is given, as fp32. */
static CLONES void multiply_plain(const Factors *factors, int64_t q, int64_t count, const float *scale, float *out,
                                  int64_t out_row_values) {
    const int64_t O = factors->of.outputs, tile_nbytes = 64 * factors->chunks;
    for (int64_t first = 0, t = 0; first < O; first += OUTPUTS, t++) {
        const uint8_t *tile = factors->of.packed + t * tile_nbytes;
        const int64_t here = least(OUTPUTS, O - first);
        for (int64_t r = q; r < q + count; r++) {
            int32_t sum[OUTPUTS];
            float *to = out + r * out_row_values + first;
            if (factors->of.width == 1) sums_plain(factors, tile, r, 1, sum);
            else sums_plain(factors, tile, r, 2, sum);
            for (int64_t o = 0; o < here; o++) to[o] = scale ? (float)sum[o] * scale[first + o] : (float)sum[o];
        }
    }
}

#ifdef HAS_AVX512
#define VNNI \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,popcnt,bmi2")))

INLINE int takes_vnni(void) { return takes_avx512() && __builtin_cpu_supports("avx512vnni"); }

/* `multiply_plain` of `count` rows. */
static inline __attribute__((always_inline)) VNNI void multiply_rows(
    const Factors *factors, int64_t q, const int count, const int width, const float *scale, float *out,
    int64_t out_row_values) {
    const int64_t O = factors->of.outputs, chunks = factors->chunks;
    const uint8_t *tile = factors->of.packed;
    const uint32_t *word = factors->word + q * factors->apart;
    for (int64_t first = 0; first < O; first += OUTPUTS) {
        const __mmask16 here = first16(O - first);
        __m512i sum[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < count; r++) sum[r] = _mm512_set1_epi32(factors->start[q + r]);
        for (int64_t c = 0; c < chunks; c++, tile += 64) {
            const __m512i coefficients = _mm512_loadu_si512(tile);
#pragma GCC unroll 8
            for (int r = 0; r < count; r++) {
                const __m512i codes = _mm512_set1_epi32((int)word[r * factors->apart + c]);
                sum[r] = width == 1 ? _mm512_dpbusd_epi32(sum[r], coefficients, codes)
                                    : _mm512_dpwssd_epi32(sum[r], coefficients, codes);
            }
        }
        const __m512 by = scale ? _mm512_maskz_loadu_ps(here, scale + first) : _mm512_set1_ps(1.0f);
#pragma GCC unroll 8
        for (int r = 0; r < count; r++) {
            const __m512 values = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r]), by);
            float *to = out + (q + r) * out_row_values + first;
            if (here == 0xFFFF) _mm512_storeu_ps(to, values);
            else _mm512_mask_storeu_ps(to, here, values);
        }
    }
}

#define MULTIPLY(name, count) \
    static VNNI void name(const Factors *factors, int64_t q, const float *scale, float *out, int64_t values) { \
        if (factors->of.width == 1) multiply_rows(factors, q, count, 1, scale, out, values); \
        else multiply_rows(factors, q, count, 2, scale, out, values); \
    }
MULTIPLY(multiply_eight, ROWS)
MULTIPLY(multiply_four, 4)
MULTIPLY(multiply_one, 1)
#endif

/* Sums of the first `count` rows times `scale`, where it is given, as fp32: rows of out, which lie apart by so many
 * values. */
static void multiply_factors(const Factors *factors, int64_t count, const float *scale, float *out,
                             int64_t out_row_values) {
#ifdef HAS_AVX512
    if (takes_vnni()) {
        for (int64_t q = 0; q < count;) {
            if (count - q >= ROWS) multiply_eight(factors, q, scale, out, out_row_values), q += ROWS;
            else if (count - q >= 4) multiply_four(factors, q, scale, out, out_row_values), q += 4;
            else multiply_one(factors, q, scale, out, out_row_values), q++;
        }
        return;
    }
#endif
    multiply_plain(factors, 0, count, scale, out, out_row_values);
}

/* Nearest even, within +-127; 0 for NaN. Adding 1.5 * 2^23 rounds to a whole number. */
INLINE float whole_code(float x) {
    x = x > 127.0f ? 127.0f : x;
    x = x < -127.0f ? -127.0f : x;
    x = x == x ? x : 0.0f;
    return (x + 0x1.8p23f) - 0x1.8p23f;
}

/* A row of values times `scale` to codes. */
static CLONES void make_row_codes(int8_t *restrict codes, const uint8_t *restrict row, const int is_bf16,
                                const float *restrict scale, int64_t n) {
    if (is_bf16)
        for (int64_t i = 0; i < n; i++)
            codes[i] = (int8_t)(int32_t)whole_code(as_float(element_bits(row, i, 1)) * scale[i]);
    else
        for (int64_t i = 0; i < n; i++)
            codes[i] = (int8_t)(int32_t)whole_code(as_float(element_bits(row, i, 0)) * scale[i]);
}

#ifdef HAS_AVX512
/* The same, and the sum of them. Writes zeros to the end of a vector. */
VECTOR int32_t codes_and_sum512(int8_t *codes, const uint8_t *row, const int is_bf16, const float *scale, int64_t n) {
    const __m512 most = _mm512_set1_ps(127.0f), least_code = _mm512_set1_ps(-127.0f);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 here = first16(n - i);
        __m512 x;
        if (is_bf16) {
            const __m256i bits = _mm256_maskz_loadu_epi16(here, row + 2 * i);
            x = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
        } else {
            x = _mm512_maskz_loadu_ps(here, row + 4 * i);
        }
        x = _mm512_mul_ps(x, _mm512_maskz_loadu_ps(here, scale + i));
        const __mmask16 numbers = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
        const __m512i code = _mm512_maskz_cvtps_epi32(numbers, _mm512_max_ps(_mm512_min_ps(x, most), least_code));
        sum = _mm512_add_epi32(sum, code);
        _mm_storeu_si128((__m128i *)(codes + i), _mm512_cvtepi32_epi8(code));
    }
    return _mm512_reduce_add_epi32(sum);
}

AVX512 static int32_t make_row_codes512(int8_t *codes, const uint8_t *row, int is_bf16, const float *scale, int64_t n) {
    return is_bf16 ? codes_and_sum512(codes, row, 1, scale, n) : codes_and_sum512(codes, row, 0, scale, n);
}
#endif

/* A row of values times `scale` as codes of row q. */
static void put_values(Factors *factors, int64_t q, const uint8_t *row, int is_bf16, const float *scale) {
    int8_t *codes = (int8_t *)(factors->word + q * factors->apart);
    const int64_t n = factors->of.inputs;
#ifdef HAS_AVX512
    if (takes_avx512()) {
        factors->start[q] = -128 * make_row_codes512(codes, row, is_bf16, scale, n);
        return;
    }
#endif
    memset(codes + n, 0, (size_t)(4 * factors->chunks - n));
    make_row_codes(codes, row, is_bf16, scale, n);
    start_bytes(factors, q);
}

#endif
