/* Codes of what a predictor reads: rows of fp32 or bf16 to whole numbers that products take. See foretell.py. */
#ifndef LOWBIT_INPUT_CODES_H
#define LOWBIT_INPUT_CODES_H

#include "products.h"

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
/* The same, and the sum of them. Writes zeros to the end of 64. */
static inline __attribute__((always_inline)) VNNI int32_t codes_and_sum512(int8_t *codes, const uint8_t *row,
                                                                           const int is_bf16, const float *scale,
                                                                           int64_t n) {
    const __m512 most = _mm512_set1_ps(127.0f), least_code = _mm512_set1_ps(-127.0f);
    const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i no_number = _mm512_set1_epi8(-128), ones = _mm512_set1_epi8(1);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += BLOCK) {
        __m512 x[4];
        __m512i code[4];
        _mm_prefetch((const char *)row + (is_bf16 ? 2 : 4) * (i + 8 * BLOCK), _MM_HINT_T0);
        if (i + BLOCK <= n) {
            for (int k = 0; k < 4; k++)
                x[k] = _mm512_mul_ps(values16(row, is_bf16, i + 16 * k, INT64_MAX), _mm512_loadu_ps(scale + i + 16 * k));
        } else {
            for (int k = 0; k < 4; k++)
                x[k] = _mm512_mul_ps(values16(row, is_bf16, i + 16 * k, n),
                                     _mm512_maskz_loadu_ps(first16(n - i - 16 * k), scale + i + 16 * k));
        }
        for (int k = 0; k < 4; k++) /* of a NaN and a number these take the second, so that NaN alone becomes -128 */
            code[k] = _mm512_cvtps_epi32(_mm512_max_ps(least_code, _mm512_min_ps(most, x[k])));
        __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(code[0], code[1]), _mm512_packs_epi32(code[2], code[3]));
        bytes = _mm512_permutexvar_epi32(in_order, bytes);
        bytes = _mm512_maskz_mov_epi8(_mm512_cmpneq_epi8_mask(bytes, no_number), bytes);
        sum = _mm512_dpbusd_epi32(sum, ones, bytes);
        _mm512_storeu_si512(codes + i, bytes);
    }
    return _mm512_reduce_add_epi32(sum);
}

static VNNI int32_t make_row_codes512(int8_t *codes, const uint8_t *row, int is_bf16, const float *scale, int64_t n) {
    return is_bf16 ? codes_and_sum512(codes, row, 1, scale, n) : codes_and_sum512(codes, row, 0, scale, n);
}
#endif

/* A row of values times `scale` as codes of row q. */
static void put_values(Factors *factors, int64_t q, const uint8_t *row, int is_bf16, const float *scale) {
    int8_t *codes = (int8_t *)(factors->word + q * factors->apart);
    const int64_t n = factors->of.inputs;
#ifdef HAS_AVX512
    if (takes_vnni()) {
        factors->start[q] = -128 * make_row_codes512(codes, row, is_bf16, scale, n);
        return;
    }
#endif
    memset(codes + n, 0, (size_t)(4 * factors->chunks - n));
    make_row_codes(codes, row, is_bf16, scale, n);
    start_bytes(factors, q);
}

#endif
