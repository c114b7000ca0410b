/* Steps of the codec on one row, written so that a compiler vectorises them: plain loops, no branch on data.
 *
 * Everything is inlined into the clones of codec.c, one for each instruction set, and specialised there on `bits` and on
 * the input type, which are constants at the call. Names and meaning follow reference.py; H, K, R, B likewise.
 *
 * Rounding: clamp first, then add 1.5 * 2^23. That rounds half to even, and leaves the integer in the low bits of the
 * sum in two's complement. Clamping to integers before rounding gives the same as after it.
 */
#ifndef LOWBIT_ROWS_H
#define LOWBIT_ROWS_H

#include <float.h>
#include <stdint.h>
#include <string.h>

#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0
#error "fp32 arithmetic must be done in fp32, or the codec is not bit-exact"
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packets are little endian; this codec reads them without swapping bytes"
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

#define EXPONENT 0x7F800000u
#define NAN_BITS 0x7FC00000u
#define ROUND_TO_INTEGER 12582912.0f /* 1.5 * 2^23 */
#define SCALE_FLOOR 0x1p-100f
#define INVERSE_127 (1.0f / 127.0f)

enum { BLOCK_NBYTES = 64 }; /* segments are copied in blocks; scratch has this much room behind its end */

INLINE float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE uint32_t as_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
INLINE float one_nan(float x) { return x != x ? as_float(NAN_BITS) : x; }

INLINE uint16_t load_u16(const uint8_t *from) { uint16_t v; memcpy(&v, from, 2); return v; }
INLINE void store_u16(uint8_t *to, uint16_t v) { memcpy(to, &v, 2); }
INLINE uint32_t load_u32(const uint8_t *from) { uint32_t v; memcpy(&v, from, 4); return v; }

INLINE uint16_t bf16_bits(uint32_t bits) {
    uint16_t rounded = (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
    return (bits & 0x7FFFFFFFu) > EXPONENT ? 0x7FC0 : rounded;
}
INLINE float bf16_value(uint16_t bits) { return as_float((uint32_t)bits << 16); }

/* fp32 bits of element i of a row of fp32 or bf16. */
INLINE uint32_t element_bits(const void *row, int64_t i, int is_bf16) {
    return is_bf16 ? (uint32_t)((const uint16_t *)row)[i] << 16 : ((const uint32_t *)row)[i];
}

/* ---- encode ---- */

/* Body elements of a row, without the outliers between them. Blocks run past the end of a segment, which the next one
 * overwrites, but never past the end of the row. */
INLINE void compact(uint8_t *restrict to, const uint8_t *restrict row, int64_t H, int64_t K,
                    const int64_t *restrict outlier_index, int64_t element_nbytes) {
    const uint8_t *row_end = row + H * element_nbytes;
    int64_t start = 0;
    for (int64_t k = 0; k <= K; k++) {
        int64_t stop = k < K ? outlier_index[k] : H;
        int64_t nbytes = (stop - start) * element_nbytes;
        const uint8_t *from = row + start * element_nbytes;
        if (nbytes + BLOCK_NBYTES <= row_end - from)
            for (int64_t i = 0; i < nbytes; i += BLOCK_NBYTES) memcpy(to + i, from + i, BLOCK_NBYTES);
        else
            memcpy(to, from, (size_t)nbytes);
        to += nbytes;
        start = stop + 1;
    }
}

/* Codes of static scales, two's complement in the low `bits` of each byte. */
INLINE void codes_static(uint8_t *restrict codes, const void *restrict body, const float *restrict inverse_scale,
                         int64_t n, int is_bf16, int bits) {
    const float limit = bits == 4 ? 7.0f : 127.0f;
    const uint32_t mask = bits == 4 ? 0xFu : 0xFFu, not_finite = bits == 4 ? 0x8u : 0x80u;
    for (int64_t i = 0; i < n; i++) {
        uint32_t x = element_bits(body, i, is_bf16);
        float p = as_float(x) * inverse_scale[i];
        p = p > -limit ? p : -limit;
        p = p < limit ? p : limit;
        uint32_t code = as_bits(p + ROUND_TO_INTEGER) & mask;
        codes[i] = (uint8_t)((x & EXPONENT) == EXPONENT ? not_finite : code);
    }
}

/* Scale of one group as bf16 bits, or NaN where a value is not finite. The order of magnitudes is that of their bits as
 * integers, whose maximum, unlike that of floats, vectorises. */
INLINE uint16_t group_scale(const uint32_t *restrict x, int64_t n, int bits) {
    float exact;
    int32_t highest;
    if (bits == 4) {
        int32_t positive = 0, negative = 0; /* a value of the other sign is a negative integer: it never wins */
        for (int64_t i = 0; i < n; i++) {
            int32_t v = (int32_t)x[i], w = (int32_t)(x[i] ^ 0x80000000u);
            positive = v > positive ? v : positive;
            negative = w > negative ? w : negative;
        }
        highest = positive > negative ? positive : negative;
        exact = as_float(positive >= negative ? (uint32_t)positive : (uint32_t)negative | 0x80000000u) * -0.125f;
    } else {
        highest = 0;
        for (int64_t i = 0; i < n; i++) {
            int32_t v = (int32_t)(x[i] & 0x7FFFFFFFu);
            highest = v > highest ? v : highest;
        }
        exact = as_float((uint32_t)highest) * INVERSE_127;
    }
    if (highest >= (int32_t)EXPONENT) return 0x7FC0;
    uint16_t scale = bf16_bits(as_bits(exact));
    float magnitude = bf16_value(scale & 0x7FFF);
    return magnitude < SCALE_FLOOR ? bf16_bits(as_bits(SCALE_FLOOR)) : scale;
}

INLINE void codes_groups(uint8_t *restrict codes, uint8_t *restrict scales, const uint32_t *restrict body, int64_t n,
                         int64_t group_size, int bits) {
    const float lowest = bits == 4 ? -8.0f : -127.0f, highest = bits == 4 ? 7.0f : 127.0f;
    const uint32_t mask = bits == 4 ? 0xFu : 0xFFu;
    for (int64_t start = 0; start < n; start += group_size, scales += 2) {
        int64_t stop = n - start < group_size ? n : start + group_size;
        uint16_t scale = group_scale(body + start, stop - start, bits);
        store_u16(scales, scale);
        if (scale == 0x7FC0) {
            memset(codes + start, 0, (size_t)(stop - start));
            continue;
        }
        float inverse = 1.0f / bf16_value(scale);
        for (int64_t i = start; i < stop; i++) {
            float p = as_float(body[i]) * inverse;
            p = p > lowest ? p : lowest;
            p = p < highest ? p : highest;
            codes[i] = (uint8_t)(as_bits(p + ROUND_TO_INTEGER) & mask);
        }
    }
}

/* Pairs of 4-bit codes to bytes. */
INLINE void pack_nibbles(uint8_t *restrict to, const uint8_t *restrict codes, int64_t nbytes) {
    for (int64_t j = 0; j < nbytes; j++) {
        uint16_t pair = load_u16(codes + 2 * j);
        to[j] = (uint8_t)(pair | pair >> 4);
    }
}

INLINE void store_bf16(uint8_t *restrict to, const void *restrict row, int64_t n, int is_bf16) {
    for (int64_t i = 0; i < n; i++) store_u16(to + 2 * i, bf16_bits(element_bits(row, i, is_bf16)));
}

INLINE void store_fp32(uint8_t *restrict to, const void *restrict row, int64_t n, int is_bf16) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t v = element_bits(row, i, is_bf16);
        v = (v & 0x7FFFFFFFu) > EXPONENT ? NAN_BITS : v;
        memcpy(to + 4 * i, &v, 4);
    }
}

/* ---- decode: each adds its values to `sum`, or starts it where `first` ---- */

/* Bytes to pairs of codes + 8. */
INLINE void unpack_nibbles(uint8_t *restrict to, const uint8_t *restrict packed, int64_t nbytes) {
    for (int64_t j = 0; j < nbytes; j++) {
        uint16_t pair = packed[j];
        store_u16(to + 2 * j, (uint16_t)(((pair & 0xF) | (pair & 0xF0) << 4) ^ 0x0808));
    }
}

INLINE void add_static(float *restrict sum, const uint8_t *restrict codes, const float *restrict scale, int64_t n,
                       int bits, int first) {
    for (int64_t i = 0; i < n; i++) {
        int32_t code = bits == 4 ? (int32_t)codes[i] - 8 : (int32_t)(int8_t)codes[i];
        float value = (float)code * scale[i];
        value = code == (bits == 4 ? -8 : -128) ? as_float(NAN_BITS) : value;
        sum[i] = first ? value : sum[i] + value;
    }
}

INLINE void add_groups(float *restrict sum, const uint8_t *restrict codes, const uint8_t *restrict scales, int64_t n,
                       int64_t group_size, int bits, int first) {
    for (int64_t start = 0; start < n; start += group_size, scales += 2) {
        int64_t stop = n - start < group_size ? n : start + group_size;
        float scale = bf16_value(load_u16(scales));
        for (int64_t i = start; i < stop; i++) {
            int32_t code = bits == 4 ? (int32_t)codes[i] - 8 : (int32_t)(int8_t)codes[i];
            float value = (float)code * scale;
            sum[i] = first ? value : sum[i] + value;
        }
    }
}

INLINE void add_bf16(float *restrict sum, const uint8_t *restrict from, int64_t n, int first) {
    for (int64_t i = 0; i < n; i++) {
        float value = bf16_value(load_u16(from + 2 * i));
        sum[i] = first ? value : sum[i] + value;
    }
}

INLINE void add_fp32(float *restrict sum, const uint8_t *restrict from, int64_t n, int first) {
    for (int64_t i = 0; i < n; i++) {
        float value = as_float(load_u32(from + 4 * i));
        sum[i] = first ? value : sum[i] + value;
    }
}

/* The finished row: body sums with the outlier sums between them, every NaN the same. Blocks as in `compact`. */
INLINE void expand(float *restrict row, const float *restrict body, const float *restrict outliers, int64_t H, int64_t K,
                   const int64_t *restrict outlier_index) {
    enum { BLOCK = BLOCK_NBYTES / 4 };
    int64_t start = 0;
    for (int64_t k = 0; k <= K; k++) {
        int64_t stop = k < K ? outlier_index[k] : H;
        if (stop + BLOCK <= H) {
            for (int64_t i = start; i < stop; i += BLOCK)
                for (int64_t j = 0; j < BLOCK; j++) row[i + j] = one_nan(body[i - start + j]);
        } else {
            for (int64_t i = start; i < stop; i++) row[i] = one_nan(body[i - start]);
        }
        body += stop - start;
        start = stop + 1;
    }
    for (int64_t k = 0; k < K; k++) row[outlier_index[k]] = one_nan(outliers[k]);
}

#endif
