/* AVX-512 with its byte instructions (Intel from Ice Lake, AMD from Zen 4): vectors, blocks of 64 features, planes.
 *
 * Compiled by attributes on any x86-64 gcc or clang, run where the processor has it. Bit-identical to the plain C of
 * encode_row.h and decode_row.h. Vectors v[0..3] hold 16 consecutive values each, in order.
 */
#ifndef LOWBIT_AVX512_H
#define LOWBIT_AVX512_H

#include "formats.h"

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

/* Which group each value is of, for groups that fit no vector: of a block of 64 from the first group in it on, after
 * which everything comes again a period later, some groups further on. */
typedef struct {
    int32_t *place, *first; /* [period, 64], [period] */
    int64_t period, groups;
} Places;

/* Smallest groups of which 64 values have no more than a vector has places. */
enum { SMALLEST_PLACED = 8 };

/* In order, or `parted`: of each 32 values first those at even places, then those at odd ones. Only for an even size are
 * these the same. */
INLINE void plan_places(Places *places, int64_t size, int64_t n, int parted, Arena *from) {
    int64_t common = size, rest = BLOCK;
    while (rest) { const int64_t next = common % rest; common = rest, rest = next; }
    places->period = least(size / common, (n + BLOCK - 1) / BLOCK), places->groups = BLOCK / common;
    places->place = take(from, BLOCK * places->period, 4), places->first = take(from, places->period, 4);
    if (!from->base) return;
    int32_t group = 0;
    for (int64_t b = 0, left = size; b < places->period; b++) {
        const int32_t first = group;
        places->first[b] = first;
        for (int i = 0; i < BLOCK; i++) {
            const int to = parted ? (i & 32) + i % 2 * 16 + (i & 31) / 2 : i;
            places->place[BLOCK * b + to] = group - first;
            if (--left == 0) group++, left = size;
        }
    }
}

/* The block that is at hand. */
typedef struct { int64_t block, group; } Placed;

INLINE Placed next_block(const Places *places, Placed at) {
    if (++at.block == places->period) at.block = 0, at.group += places->groups;
    return at;
}

VECTOR __mmask16 first16(int64_t n) { return (__mmask16)(n >= 16 ? 0xFFFF : n <= 0 ? 0 : (1u << n) - 1); }
VECTOR __mmask64 first64(int64_t n) { return n >= 64 ? ~0ull : n <= 0 ? 0 : (1ull << n) - 1; }

/* 16 values of a row of fp32 or bf16, from number i of n on; 0 where there are none. */
VECTOR __m512 values16(const uint8_t *row, const int is_bf16, int64_t i, int64_t n) {
    const __mmask16 here = i + 16 <= n ? 0xFFFF : first16(n - i);
    if (!is_bf16) return _mm512_maskz_loadu_ps(here, row + 4 * i);
    const __m256i bits = _mm256_maskz_loadu_epi16(here, row + 2 * i);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

/* 16 of n numbers, from number `at` on; 0 for those that there are not. */
VECTOR __m512i numbers16(const float *numbers, int64_t at, int64_t n) {
    if (at + 16 <= n) return _mm512_loadu_si512(numbers + at);
    return _mm512_maskz_loadu_epi32(first16(n - at), numbers + at);
}

/* Numbers of the groups of 64 values, of which `of_group` has 16 to spare at its end. */
VECTOR void placed64(const float *of_group, const Places *places, Placed at, __m512 v[2], __m512 w[2]) {
    const __m512 some = _mm512_loadu_ps(of_group + at.group + places->first[at.block]);
    const int32_t *place = places->place + BLOCK * at.block;
    for (int k = 0; k < 2; k++) v[k] = _mm512_permutexvar_ps(_mm512_loadu_si512(place + 16 * k), some);
    for (int k = 0; k < 2; k++) w[k] = _mm512_permutexvar_ps(_mm512_loadu_si512(place + 16 * k + 32), some);
}

/* Two vectors of the n numbers of the body: those of features i to i + 32 in their places, the rest 0, or, where there
 * are no outliers, numbers i to i + 32. */
VECTOR void body32(const float *numbers, const Body *body, int64_t i, int64_t n, __m512i v[2]) {
    if (!body->mask) {
        for (int k = 0; k < 2; k++) v[k] = numbers16(numbers, i + 16 * k, n);
        return;
    }
    const uint64_t mask = body->mask[i / BLOCK];
    int64_t at = body->before[i / BLOCK] + (i % BLOCK ? (int64_t)_mm_popcnt_u64(mask & 0xFFFFFFFF) : 0);
    for (int k = 0; k < 2; k++) {
        const __mmask16 here = (__mmask16)(mask >> (i % BLOCK + 16 * k));
        v[k] = _mm512_maskz_expand_epi32(here, numbers16(numbers, at, n));
        at += (int64_t)_mm_popcnt_u32(here);
    }
}

/* Tables, filled when the library is loaded: bf16 values of e4m3 without the sign, low bytes, then high ones; see
 * `words32` for that of e2m1. */
static uint8_t e4m3_bytes[2][128], e2m1_codes[128];

__attribute__((constructor)) static void fill_tables(void) {
    for (uint32_t code = 0; code < 128; code++) {
        uint32_t bits = as_bits(small_float_value(code, AS_E4M3));
        e4m3_bytes[0][code] = (uint8_t)(bits >> 16), e4m3_bytes[1][code] = (uint8_t)(bits >> 24);
    }
    for (int sum = -64; sum < 64; sum++) {
        uint32_t code = small_float_code((float)sum / 8.0f, AS_E2M1);
        e2m1_codes[sum & 127] = (uint8_t)(code == 8 ? 0 : code);
    }
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

/* The planes of a packet row to codes, one to a byte, and to the end of a block; two's complement becomes that of bytes
 * where `is_signed`. */
VECTOR void unpack_row(uint8_t *codes, const uint8_t *row, const Layout *at, int is_signed, const int bits) {
    const int64_t n = at->body;
    const uint8_t *p0 = row, *p1 = row + at->plane_offsets[1], *p2 = row + at->plane_offsets[2];
    const int w0 = bits >= 8 ? 8 : bits >= 4 ? 4 : 2, w1 = bits == 6 || bits == 7 ? 2 : 1;
    const __m512i sign = _mm512_set1_epi8((char)(is_signed ? 1 << (bits - 1) : 0));
    for (int64_t i = 0; i < n; i += BLOCK, codes += BLOCK) {
        __m512i block = unpack_plane64(p0 + i * w0 / 8, n - i, w0, 0);
        if (bits != w0) block = _mm512_or_si512(block, unpack_plane64(p1 + i * w1 / 8, n - i, w1, w0));
        if (bits == 7) block = _mm512_or_si512(block, unpack_plane64(p2 + i / 8, n - i, 1, 6));
        _mm512_storeu_si512(codes, _mm512_sub_epi8(_mm512_xor_si512(block, sign), sign));
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
