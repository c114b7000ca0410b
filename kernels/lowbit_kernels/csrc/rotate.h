/* Rotations: see rotation.py. A row is rotated from its first step to its last while it is in the first-level cache.
 *
 * Every value is a sum or difference of the same two as there, so that ways through the work give the same bits.
 */
#ifndef LOWBIT_ROTATE_H
#define LOWBIT_ROTATE_H

#include "coders.h"

/* `count` transforms of `size` values from `start` on; signs: a bit for each value, set where its sign is flipped, in
 * whole words, or null. As cpu_rotation.py fills it in. */
typedef struct {
    int64_t start, size, count;
    const uint32_t *signs;
} Run;

INLINE uint32_t sign_of(const uint32_t *signs, int64_t i) { return signs[i / 32] >> i % 32 << 31; }

/* fp32 next to 1 / sqrt(size). */
INLINE float scale_of(int64_t size) {
    float scale = 1.0f;
    for (; size > 2; size /= 4) scale *= 0.5f;
    return size == 2 ? scale * 0x1.6A09E6p-1f : scale;
}

INLINE void butterflies(float *restrict a, float *restrict b, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const float x = a[i], y = b[i];
        a[i] = x + y, b[i] = x - y;
    }
}

/* Three steps on 8 neighbours. */
INLINE void butterflies8(float *x) {
    float y[8];
    for (int i = 0; i < 8; i += 2) y[i] = x[i] + x[i + 1], y[i + 1] = x[i] - x[i + 1];
    for (int i = 0; i < 8; i += 4)
        for (int j = i; j < i + 2; j++) x[j] = y[j] + y[j + 2], x[j + 2] = y[j] - y[j + 2];
    for (int i = 0; i < 4; i++) y[i] = x[i] + x[i + 4], y[i + 4] = x[i] - x[i + 4];
    memcpy(x, y, sizeof y);
}

/* One transform. Signs are flipped before or after it; either may be null. */
static CLONES void rotate_plain(float *x, int64_t size, const uint32_t *before, const uint32_t *after, float scale) {
    if (before)
        for (int64_t i = 0; i < size; i++) x[i] = as_float(as_bits(x[i]) ^ sign_of(before, i));
    int64_t h = 1;
    if (size >= 8) {
        for (int64_t i = 0; i < size; i += 8) butterflies8(x + i);
        h = 8;
    }
    for (; h < size; h *= 2)
        for (int64_t i = 0; i < size; i += 2 * h) butterflies(x + i, x + i + h, h);
    if (after)
        for (int64_t i = 0; i < size; i++) x[i] = one_nan(as_float(as_bits(x[i] * scale) ^ sign_of(after, i)));
    else
        for (int64_t i = 0; i < size; i++) x[i] = one_nan(x[i] * scale);
}

#ifdef HAS_AVX512

/* What happens to values where they leave a transform. */
typedef struct {
    int last;
    float scale;
    const uint32_t *signs; /* or null */
} Leave512;

/* 16 values from `at` on with their signs flipped. */
VECTOR __m512 flip512(__m512 v, const uint32_t *signs, int64_t at) {
    const __mmask16 flipped = load_u16((const uint8_t *)signs + at / 8);
    const __m512i bits = _mm512_castps_si512(v);
    return _mm512_castsi512_ps(_mm512_mask_xor_epi32(bits, flipped, bits, _mm512_set1_epi32((int)SIGN)));
}

VECTOR void store_left512(float *to, __m512 v, const Leave512 *leave, int64_t at) {
    if (leave->last) {
        v = _mm512_mul_ps(v, _mm512_set1_ps(leave->scale));
        if (leave->signs) v = flip512(v, leave->signs, at);
        const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        v = _mm512_mask_mov_ps(v, nan, _mm512_castsi512_ps(_mm512_set1_epi32(NAN_BITS)));
    }
    _mm512_storeu_ps(to + at, v);
}

/* Neighbours inside of a vector: `swapped` has each in the other's place, the second one of each pair is in `second`. */
#define INSIDE512(v, swapped, second) \
    do { \
        const __m512 other = swapped; \
        v = _mm512_mask_sub_ps(_mm512_add_ps(v, other), second, other, v); \
    } while (0)

/* The steps between `count` vectors. */
VECTOR void between512(__m512 *v, const int count) {
#pragma GCC unroll 4
    for (int h = 1; h < count; h *= 2)
#pragma GCC unroll 16
        for (int j = 0; j < count; j++)
            if (!(j & h)) {
                const __m512 a = v[j], b = v[j + h];
                v[j] = _mm512_add_ps(a, b), v[j + h] = _mm512_sub_ps(a, b);
            }
}

/* The first steps of values `at` and up of a transform: those of 16 `count` neighbours. */
VECTOR void first512(float *x, int64_t at, const uint32_t *signs, const Leave512 *leave, const int count) {
    __m512 v[16];
#pragma GCC unroll 16
    for (int j = 0; j < count; j++) {
        v[j] = _mm512_loadu_ps(x + at + 16 * j);
        if (signs) v[j] = flip512(v[j], signs, at + 16 * j);
        INSIDE512(v[j], _mm512_permute_ps(v[j], 0xB1), 0xAAAA);
        INSIDE512(v[j], _mm512_permute_ps(v[j], 0x4E), 0xCCCC);
        INSIDE512(v[j], _mm512_shuffle_f32x4(v[j], v[j], 0xB1), 0xF0F0);
        INSIDE512(v[j], _mm512_shuffle_f32x4(v[j], v[j], 0x4E), 0xFF00);
    }
    between512(v, count);
#pragma GCC unroll 16
    for (int j = 0; j < count; j++) store_left512(x, v[j], leave, at + 16 * j);
}

/* The steps of `count` values that lie h apart, for all of a transform. */
VECTOR void next512(float *x, int64_t size, int64_t h, const Leave512 *leave, const int count) {
    for (int64_t start = 0; start < size; start += count * h)
        for (int64_t at = start; at < start + h; at += 16) {
            __m512 v[16];
#pragma GCC unroll 16
            for (int j = 0; j < count; j++) v[j] = _mm512_loadu_ps(x + at + j * h);
            between512(v, count);
#pragma GCC unroll 16
            for (int j = 0; j < count; j++) store_left512(x, v[j], leave, at + j * h);
        }
}

#define FOR_COUNT(count, call) \
    switch (count) { \
    case 1: { enum { COUNT = 1 }; call; break; } \
    case 2: { enum { COUNT = 2 }; call; break; } \
    case 4: { enum { COUNT = 4 }; call; break; } \
    case 8: { enum { COUNT = 8 }; call; break; } \
    default: { enum { COUNT = 16 }; call; break; } \
    }

/* One transform of at least 16 values. */
static AVX512 void rotate512(float *x, int64_t size, const uint32_t *before, const uint32_t *after, float scale) {
    const int64_t first = least(size, 256);
    Leave512 leave = {first == size, scale, after};
    for (int64_t at = 0; at < size; at += first) FOR_COUNT(first / 16, first512(x, at, before, &leave, COUNT));
    for (int64_t h = first, count; h < size; h *= count) {
        count = least(size / h, 16);
        leave.last = h * count == size;
        FOR_COUNT(count, next512(x, size, h, &leave, COUNT));
    }
}

#endif

/* All runs of one row, forwards or back. */
static void rotate_row(float *row, const Run *runs, int64_t count, int inverse, int fast) {
    for (int64_t r = 0; r < count; r++) {
        const Run *run = runs + (inverse ? count - 1 - r : r);
        const uint32_t *before = inverse ? 0 : run->signs, *after = inverse ? run->signs : 0;
        const float scale = scale_of(run->size);
        float *x = row + run->start;
        for (int64_t c = 0; c < run->count; c++, x += run->size) {
#ifdef HAS_AVX512
            if (fast && run->size >= 16) {
                rotate512(x, run->size, before, after, scale);
                continue;
            }
#endif
            rotate_plain(x, run->size, before, after, scale);
        }
    }
    (void)fast;
}

#endif
