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

/* What becomes of sums times `scale` (where it is given), as fp32. */
enum { WRITTEN, ADDED, TAKEN_FROM_BF16, TAKEN_FROM_FP32 };

/* Where they go: rows of out. WRITTEN there, ADDED to what is there, or TAKEN_FROM rows of x, plus `missed` (or null),
 * in this order, and written. */
typedef struct {
    float *out;
    int64_t out_row_values;
    const uint8_t *x;
    int64_t x_row_nbytes;
    const float *missed;
    int64_t missed_row_values;
} Ending;

/* Sums of rows q to q + count. */
static CLONES void multiply_plain(const Factors *factors, int64_t q, int64_t count, const float *scale,
                                  const Ending *with, int way) {
    const int64_t O = factors->of.outputs, tile_nbytes = 64 * factors->chunks;
    for (int64_t first = 0, t = 0; first < O; first += OUTPUTS, t++) {
        const uint8_t *tile = factors->of.packed + t * tile_nbytes;
        const int64_t here = least(OUTPUTS, O - first);
        for (int64_t r = q; r < q + count; r++) {
            const uint8_t *x = with->x + r * with->x_row_nbytes;
            const float *missed = with->missed ? with->missed + r * with->missed_row_values + first : 0;
            float *to = with->out + r * with->out_row_values + first;
            int32_t sum[OUTPUTS];
            if (factors->of.width == 1) sums_plain(factors, tile, r, 1, sum);
            else sums_plain(factors, tile, r, 2, sum);
            for (int64_t o = 0; o < here; o++) {
                float v = scale ? (float)sum[o] * scale[first + o] : (float)sum[o];
                if (way == ADDED) v = to[o] + v;
                if (way >= TAKEN_FROM_BF16) v = as_float(element_bits(x, first + o, way == TAKEN_FROM_BF16)) - v;
                if (way >= TAKEN_FROM_BF16 && missed) v = v + missed[o];
                to[o] = v;
            }
        }
    }
}

#ifdef HAS_AVX512
#define VNNI \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,popcnt,bmi2")))

/* Tiles that are multiplied together: four with one row, two with four, whose sums are as many as hide the latency of a
 * product. With more of either, gcc 12 keeps sums in memory. */
enum { MOST_TILES = 4, MOST_ROWS = 4 };

INLINE int takes_vnni(void) { return takes_avx512() && __builtin_cpu_supports("avx512vnni"); }

/* Sums of 16 outputs, `scale` times, to their place: written, taken from a value of x before what was missed is added,
 * or added to what is there. */
static inline __attribute__((always_inline)) AVX512 void finish16(__m512i sum, __m512 scale, const Ending *with, int64_t row, int64_t first, __mmask16 here,
                     const int way) {
    float *to = with->out + row * with->out_row_values + first;
    __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale);
    if (way == ADDED) v = _mm512_add_ps(_mm512_maskz_loadu_ps(here, to), v);
    if (way == TAKEN_FROM_BF16 || way == TAKEN_FROM_FP32) {
        const uint8_t *x = with->x + row * with->x_row_nbytes + (way == TAKEN_FROM_BF16 ? 2 : 4) * first;
        const __m512 from = way == TAKEN_FROM_BF16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(
                                                         _mm256_maskz_loadu_epi16(here, x)), 16))
                                                   : _mm512_maskz_loadu_ps(here, x);
        v = _mm512_sub_ps(from, v);
        if (with->missed) {
            const float *missed = with->missed + row * with->missed_row_values + first;
            v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(here, missed));
        }
    }
    _mm512_mask_storeu_ps(to, here, v);
}

/* What two tiles of outputs of a row will end with some time later: products leave time to fetch it from memory. */
VECTOR void fetch_ahead(const Ending *with, int64_t row, int64_t first, const int way) {
    enum { AHEAD = 192 };
    const int64_t nbytes = way == TAKEN_FROM_BF16 ? 2 : 4;
    _mm_prefetch((const char *)with->x + row * with->x_row_nbytes + nbytes * (first + AHEAD), _MM_HINT_T0);
    if (!with->missed) return;
    const float *missed = with->missed + row * with->missed_row_values + first + AHEAD;
    _mm_prefetch((const char *)missed, _MM_HINT_T0), _mm_prefetch((const char *)(missed + 16), _MM_HINT_T0);
}

/* `multiply_plain` of `count` rows and `tiles` tiles: a coefficient that is loaded serves all rows, a code all tiles. */
static inline __attribute__((always_inline)) VNNI void multiply_tiles(
    const Factors *factors, int64_t q, const int count, int64_t tile, const int tiles, const int width,
    const float *scale, const Ending *with, const int way) {
    const int64_t O = factors->of.outputs, chunks = factors->chunks, apart = factors->apart;
    const uint8_t *coefficients = factors->of.packed + tile * 64 * chunks;
    const uint32_t *word = factors->word + q * apart;
    __m512i sum[MOST_ROWS][MOST_TILES];
    if (way == TAKEN_FROM_BF16 || way == TAKEN_FROM_FP32)
        for (int r = 0; r < count; r++) fetch_ahead(with, q + r, OUTPUTS * tile, way);
#pragma GCC unroll 4
    for (int r = 0; r < count; r++)
#pragma GCC unroll 4
        for (int k = 0; k < tiles; k++) sum[r][k] = _mm512_set1_epi32(factors->start[q + r]);
    for (int64_t c = 0; c < chunks; c++) {
        __m512i by[MOST_TILES];
#pragma GCC unroll 4
        for (int k = 0; k < tiles; k++) by[k] = _mm512_loadu_si512(coefficients + 64 * (k * chunks + c));
#pragma GCC unroll 4
        for (int r = 0; r < count; r++) {
            const __m512i codes = _mm512_set1_epi32((int)word[r * apart + c]);
#pragma GCC unroll 4
            for (int k = 0; k < tiles; k++)
                sum[r][k] = width == 1 ? _mm512_dpbusd_epi32(sum[r][k], by[k], codes)
                                       : _mm512_dpwssd_epi32(sum[r][k], by[k], codes);
        }
    }
#pragma GCC unroll 4
    for (int k = 0; k < tiles; k++) {
        const int64_t first = OUTPUTS * (tile + k);
        const __mmask16 here = first16(O - first);
        const __m512 times = scale ? _mm512_maskz_loadu_ps(here, scale + first) : _mm512_set1_ps(1.0f);
#pragma GCC unroll 4
        for (int r = 0; r < count; r++) finish16(sum[r][k], times, with, q + r, first, here, way);
    }
}

static inline __attribute__((always_inline)) VNNI void multiply_rows(
    const Factors *factors, int64_t q, const int count, const int together, const int width, const float *scale,
    const Ending *with, const int way) {
    const int64_t tiles = (factors->of.outputs + OUTPUTS - 1) / OUTPUTS;
    int64_t tile = 0;
    for (; tile + together <= tiles; tile += together)
        multiply_tiles(factors, q, count, tile, together, width, scale, with, way);
    for (; tile < tiles; tile++) multiply_tiles(factors, q, count, tile, 1, width, scale, with, way);
}

/* `multiply_plain` of the first `count` rows. */
static inline __attribute__((always_inline)) VNNI void multiply_some(
    const Factors *factors, int64_t count, const int width, const float *scale, const Ending *with, const int way) {
    int64_t q = 0;
    for (; q + 4 <= count; q += 4) multiply_rows(factors, q, 4, 2, width, scale, with, way);
    for (; q < count; q++) multiply_rows(factors, q, 1, MOST_TILES, width, scale, with, way);
}

/* One function for each way that sums end, so that each is compiled on its own. */
#define MULTIPLY(name, way) \
    static VNNI void name(const Factors *factors, int64_t count, const float *scale, const Ending *with) { \
        if (factors->of.width == 1) multiply_some(factors, count, 1, scale, with, way); \
        else multiply_some(factors, count, 2, scale, with, way); \
    }
MULTIPLY(multiply_written, WRITTEN)
MULTIPLY(multiply_added, ADDED)
MULTIPLY(multiply_from_bf16, TAKEN_FROM_BF16)
MULTIPLY(multiply_from_fp32, TAKEN_FROM_FP32)
#endif

/* Sums of the first `count` rows, at most ROWS. */
static void multiply_factors(const Factors *factors, int64_t count, const float *scale, const Ending *with, int way) {
#ifdef HAS_AVX512
    if (takes_vnni()) {
        switch (way) {
        case WRITTEN: multiply_written(factors, count, scale, with); break;
        case ADDED: multiply_added(factors, count, scale, with); break;
        case TAKEN_FROM_BF16: multiply_from_bf16(factors, count, scale, with); break;
        default: multiply_from_fp32(factors, count, scale, with);
        }
        return;
    }
#endif
    multiply_plain(factors, 0, count, scale, with, way);
}

#endif
