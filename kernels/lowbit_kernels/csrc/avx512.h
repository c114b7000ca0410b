/* AVX-512 with its byte instructions (Intel from Ice Lake, AMD from Zen 4): vectors, blocks of 64 features, planes.
 *
 * Vectors v[0..3] hold 16 consecutive values each, in order. Compiled by attributes on any x86-64 gcc or clang, run where
 * the processor has it. Bit-identical to the plain C of encode_row.h and decode_row.h.
 */
#ifndef LOWBIT_AVX512_H
#define LOWBIT_AVX512_H

#include "rows.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_AVX512 1
#include <immintrin.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,popcnt,bmi2")))
#define VECTOR static inline __attribute__((always_inline, unused)) AVX512

INLINE int runs_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
           __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("bmi2");
}

/* Body features of each block of 64 features, and how many of them come before it. Null where there are no outliers. */
typedef struct { uint64_t *mask; int32_t *before; } Body;

INLINE int64_t blocks_of(int64_t values) { return (values + BLOCK - 1) / BLOCK; }

INLINE void plan_body(Body *body, const Layout *at, const int64_t *outlier_index, Arena *from) {
    const int64_t blocks = blocks_of(at->features);
    if (!at->outliers) {
        body->mask = 0, body->before = 0;
        return;
    }
    body->mask = take(from, blocks, 8), body->before = take(from, blocks, 4);
    if (!from->base) return;
    memset(body->mask, 0xFF, (size_t)(8 * blocks));
    if (at->features % BLOCK) body->mask[blocks - 1] = ~0ull >> (BLOCK - at->features % BLOCK);
    for (int64_t k = 0; k < at->outliers; k++) body->mask[outlier_index[k] / BLOCK] ^= 1ull << outlier_index[k] % BLOCK;
    int32_t before = 0;
    for (int64_t b = 0; b < blocks; b++) {
        body->before[b] = before;
        before += (int32_t)__builtin_popcountll(body->mask[b]);
    }
}

VECTOR __mmask16 first16(int64_t n) { return (__mmask16)(n >= 16 ? 0xFFFF : n <= 0 ? 0 : (1u << n) - 1); }
VECTOR __mmask64 first64(int64_t n) { return n >= 64 ? ~0ull : n <= 0 ? 0 : (1ull << n) - 1; }

/* 16 values of a row of fp32 or bf16, from value i on. */
VECTOR __m512 load16(const uint8_t *row, int64_t i, int is_bf16) {
    if (!is_bf16) return _mm512_loadu_ps(row + 4 * i);
    __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(row + 2 * i)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}

/* 64 codes, one to a byte, to one plane; `tail` is how many of them there are. */
VECTOR void pack_plane64(uint8_t *to, __m512i codes, int64_t tail, int width, int shift) {
    if (width == 8) {
        _mm512_mask_storeu_epi8(to, first64(tail), codes);
    } else if (width == 4) {
        __m512i low = _mm512_and_si512(codes, _mm512_set1_epi8(0xF));
        __m256i bytes = _mm512_cvtepi16_epi8(_mm512_maddubs_epi16(low, _mm512_set1_epi16(0x1001)));
        if (tail >= BLOCK) _mm256_storeu_si256((__m256i *)to, bytes);
        else _mm256_mask_storeu_epi8(to, (__mmask32)first64((tail + 1) / 2), bytes);
    } else if (width == 2) {
        __m512i low = _mm512_and_si512(_mm512_srl_epi16(codes, _mm_cvtsi32_si128(shift)), _mm512_set1_epi8(3));
        __m512i pairs = _mm512_maddubs_epi16(low, _mm512_set1_epi16(0x0401));
        __m128i bytes = _mm512_cvtepi32_epi8(_mm512_madd_epi16(pairs, _mm512_set1_epi32(0x00100001)));
        if (tail >= BLOCK) _mm_storeu_si128((__m128i *)to, bytes);
        else _mm_mask_storeu_epi8(to, (__mmask16)first64((tail + 3) / 4), bytes);
    } else {
        uint64_t bits = _mm512_test_epi8_mask(codes, _mm512_set1_epi8((char)(1 << shift)));
        if (tail >= BLOCK) memcpy(to, &bits, 8);
        else memcpy(to, &bits, (size_t)((tail + 7) / 8));
    }
}

/* Codes, one to a byte, 0 behind the n, to their planes. */
VECTOR void pack_row(uint8_t *packet, const uint8_t *codes, const Layout *at, const int bits) {
    const int64_t n = at->body;
    uint8_t *p0 = packet, *p1 = packet + at->plane_offsets[1], *p2 = packet + at->plane_offsets[2];
    const int w0 = bits >= 8 ? 8 : bits >= 4 ? 4 : 2, w1 = bits == 6 || bits == 7 ? 2 : 1;
    for (int64_t i = 0; i < n; i += BLOCK) {
        __m512i block = _mm512_loadu_si512(codes + i);
        pack_plane64(p0 + i * w0 / 8, block, n - i, w0, 0);
        if (bits != w0) pack_plane64(p1 + i * w1 / 8, block, n - i, w1, w0);
        if (bits == 7) pack_plane64(p2 + i / 8, block, n - i, 1, 6);
    }
}

/* 64 codes of one plane, one to a byte, shifted to their place. Reads no byte behind the plane. */
VECTOR __m512i unpack_plane64(const uint8_t *from, int64_t tail, int width, int shift) {
    if (width == 8) return _mm512_maskz_loadu_epi8(first64(tail), from);
    if (width == 4) {
        __m256i bytes = tail >= BLOCK ? _mm256_loadu_si256((const __m256i *)from)
                                      : _mm256_maskz_loadu_epi8((__mmask32)first64((tail + 1) / 2), from);
        __m512i words = _mm512_cvtepu8_epi16(bytes);
        return _mm512_and_si512(_mm512_or_si512(words, _mm512_slli_epi16(words, 4)), _mm512_set1_epi8(0xF));
    }
    if (width == 2) {
        __m128i bytes = tail >= BLOCK ? _mm_loadu_si128((const __m128i *)from)
                                      : _mm_maskz_loadu_epi8((__mmask16)first64((tail + 3) / 4), from);
        __m512i fours = _mm512_cvtepu8_epi32(bytes);
        fours = _mm512_or_si512(fours, _mm512_slli_epi32(fours, 12));
        fours = _mm512_or_si512(fours, _mm512_slli_epi32(fours, 6));
        return _mm512_slli_epi16(_mm512_and_si512(fours, _mm512_set1_epi8(3)), (unsigned)shift);
    }
    uint64_t bits = 0;
    if (tail >= BLOCK) memcpy(&bits, from, 8);
    else memcpy(&bits, from, (size_t)((tail + 7) / 8));
    return _mm512_maskz_mov_epi8(bits, _mm512_set1_epi8((char)(1 << shift)));
}

/* The planes of a packet row to codes, one to a byte; some block of codes behind the n is written too. */
VECTOR void unpack_row(uint8_t *codes, const uint8_t *row, const Layout *at, const int bits) {
    const int64_t n = at->body;
    const uint8_t *p0 = row, *p1 = row + at->plane_offsets[1], *p2 = row + at->plane_offsets[2];
    const int w0 = bits >= 8 ? 8 : bits >= 4 ? 4 : 2, w1 = bits == 6 || bits == 7 ? 2 : 1;
    for (int64_t i = 0; i < n; i += BLOCK) {
        __m512i block = unpack_plane64(p0 + i * w0 / 8, n - i, w0, 0);
        if (bits != w0) block = _mm512_or_si512(block, unpack_plane64(p1 + i * w1 / 8, n - i, w1, w0));
        if (bits == 7) block = _mm512_or_si512(block, unpack_plane64(p2 + i / 8, n - i, 1, 6));
        _mm512_storeu_si512(codes + i, block);
    }
}

#define FOR_BITS(bits, call) \
    switch (bits) { \
    case 2: { enum { BITS = 2 }; call; break; } \
    case 3: { enum { BITS = 3 }; call; break; } \
    case 4: { enum { BITS = 4 }; call; break; } \
    case 5: { enum { BITS = 5 }; call; break; } \
    case 6: { enum { BITS = 6 }; call; break; } \
    case 7: { enum { BITS = 7 }; call; break; } \
    default: { enum { BITS = 8 }; call; break; } \
    }

#endif
#endif
