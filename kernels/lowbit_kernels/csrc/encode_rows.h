/* Encoding: the steps on one row. See rows.h.
 *
 * Rounding: adding 1.5 * 2^23 rounds half to even and leaves the integer in the low bits of the sum, in two's complement.
 * The clamp follows, on those bits as a signed integer: they order as the sums do, and what lies too far out for the
 * addition to be exact (infinite products included) is clamped whatever it is; sums below 0 are negative integers too.
 */
#ifndef LOWBIT_ENCODE_ROWS_H
#define LOWBIT_ENCODE_ROWS_H

#include "rows.h"

#define ROUND_TO_INTEGER 12582912.0f /* 1.5 * 2^23 */
#define ROUNDED_ZERO 0x4B400000      /* its bits */
#define SCALE_FLOOR 0x1p-100f
#define INVERSE_127 (1.0f / 127.0f)

INLINE uint16_t bf16_bits(uint32_t bits) {
    uint16_t rounded = (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
    return (bits & 0x7FFFFFFFu) > EXPONENT ? 0x7FC0 : rounded;
}

/* fp32 bits of element i of a row of fp32 or bf16. */
INLINE uint32_t element_bits(const uint8_t *row, int64_t i, int is_bf16) {
    return is_bf16 ? (uint32_t)load_u16(row + 2 * i) << 16 : load_u32(row + 4 * i);
}

/* The code of a product, two's complement in the low bits. */
INLINE int32_t code_of(float product, int32_t lowest, int32_t highest) {
    int32_t code = (int32_t)as_bits(product + ROUND_TO_INTEGER);
    code = code < ROUNDED_ZERO + lowest ? ROUNDED_ZERO + lowest : code;
    return code > ROUNDED_ZERO + highest ? ROUNDED_ZERO + highest : code;
}

/* Body elements of a row, without the outliers between them. */
INLINE void compact(uint8_t *restrict to, const uint8_t *restrict row, const Layout *at, const int64_t *outlier_index,
                    const Block *blocks, int64_t count, int64_t rest, int64_t element_nbytes) {
    for (int64_t i = 0; i < count; i++)
        memcpy(to + blocks[i].body * element_nbytes, row + blocks[i].full * element_nbytes, BLOCK_NBYTES);
    for (int64_t k = rest; k <= at->outliers; k++) {
        int64_t start = k ? outlier_index[k - 1] + 1 : 0;
        int64_t stop = k < at->outliers ? outlier_index[k] : at->features;
        memcpy(to + (start - k) * element_nbytes, row + start * element_nbytes, (size_t)((stop - start) * element_nbytes));
    }
}

INLINE int all_finite(const uint8_t *restrict row, int64_t n, int is_bf16) {
    if (is_bf16) {
        uint16_t highest = 0;
        for (int64_t i = 0; i < n; i++) {
            uint16_t v = load_u16(row + 2 * i) & 0x7FFF;
            highest = v > highest ? v : highest;
        }
        return highest < 0x7F80;
    }
    int32_t highest = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t v = (int32_t)(load_u32(row + 4 * i) & 0x7FFFFFFFu);
        highest = v > highest ? v : highest;
    }
    return highest < (int32_t)EXPONENT;
}

/* 4-bit codes of static scales, two to a byte, of finite values. `even` and `odd` are the inverse scales of the values of
 * low and high nibbles: apart, they meet the halves of a word of two bf16 without a shuffle. */
INLINE void pack_static_pairs(uint8_t *restrict to, const uint8_t *restrict body, const float *restrict even,
                              const float *restrict odd, int64_t n, int is_bf16) {
    for (int64_t j = 0; j < n / 2; j++) {
        uint32_t low = is_bf16 ? load_u32(body + 4 * j) << 16 : load_u32(body + 8 * j);
        uint32_t high = is_bf16 ? load_u32(body + 4 * j) & 0xFFFF0000u : load_u32(body + 8 * j + 4);
        int32_t low_code = code_of(as_float(low) * even[j], -7, 7), high_code = code_of(as_float(high) * odd[j], -7, 7);
        to[j] = (uint8_t)((low_code & 0xF) | high_code << 4);
    }
    if (n % 2) to[n / 2] = (uint8_t)(code_of(as_float(element_bits(body, n - 1, is_bf16)) * even[n / 2], -7, 7) & 0xF);
}

/* Codes of static scales, one to a byte, of any values (or finite ones, where the caller has looked). */
INLINE void codes_static(uint8_t *restrict codes, const uint8_t *restrict body, const float *restrict inverse_scale,
                         int64_t n, int is_bf16, int bits, int finite) {
    const int32_t highest = bits == 4 ? 7 : 127;
    for (int64_t i = 0; i < n; i++) {
        uint32_t x = element_bits(body, i, is_bf16);
        int32_t code = code_of(as_float(x) * inverse_scale[i], -highest, highest);
        codes[i] = (uint8_t)(!finite && (x & EXPONENT) == EXPONENT ? -highest - 1 : code);
    }
}

/* Scale of one group as bf16 bits, or NaN where a value is not finite. The order of magnitudes is that of their bits as
 * integers, whose maximum, unlike that of floats, vectorises. */
INLINE uint16_t group_scale(const uint8_t *restrict x, int64_t n, int bits) {
    float exact;
    int32_t highest;
    if (bits == 4) {
        int32_t positive = 0, negative = 0; /* a value of the other sign is a negative integer: it never wins */
        for (int64_t i = 0; i < n; i++) {
            int32_t v = (int32_t)load_u32(x + 4 * i), w = (int32_t)(load_u32(x + 4 * i) ^ 0x80000000u);
            positive = v > positive ? v : positive;
            negative = w > negative ? w : negative;
        }
        highest = positive > negative ? positive : negative;
        exact = as_float(positive >= negative ? (uint32_t)positive : (uint32_t)negative | 0x80000000u) * -0.125f;
    } else {
        highest = 0;
        for (int64_t i = 0; i < n; i++) {
            int32_t v = (int32_t)(load_u32(x + 4 * i) & 0x7FFFFFFFu);
            highest = v > highest ? v : highest;
        }
        exact = as_float((uint32_t)highest) * INVERSE_127;
    }
    if (highest >= (int32_t)EXPONENT) return 0x7FC0;
    uint16_t scale = bf16_bits(as_bits(exact));
    return bf16_value(scale & 0x7FFF) < SCALE_FLOOR ? bf16_bits(as_bits(SCALE_FLOOR)) : scale;
}

/* Codes of group scales, one to a byte, and the scales; `body` holds fp32. */
INLINE void codes_groups(uint8_t *restrict codes, uint8_t *restrict scales, const uint8_t *restrict body, int64_t n,
                         int64_t group_size, int bits) {
    for (int64_t start = 0; start < n; start += group_size, scales += 2) {
        int64_t stop = n - start < group_size ? n : start + group_size;
        uint16_t scale = group_scale(body + 4 * start, stop - start, bits);
        store_u16(scales, scale);
        if (scale == 0x7FC0) {
            memset(codes + start, 0, (size_t)(stop - start));
            continue;
        }
        float inverse = 1.0f / bf16_value(scale);
        for (int64_t i = start; i < stop; i++) {
            float product = as_float(load_u32(body + 4 * i)) * inverse;
            codes[i] = (uint8_t)(bits == 4 ? code_of(product, -8, 7) : code_of(product, -127, 127));
        }
    }
}

/* Pairs of 4-bit codes to bytes. */
INLINE void pack_nibbles(uint8_t *restrict to, const uint8_t *restrict codes, int64_t nbytes) {
    for (int64_t j = 0; j < nbytes; j++) {
        uint16_t pair = load_u16(codes + 2 * j);
        to[j] = (uint8_t)((pair & 0xF) | (pair >> 4 & 0xF0));
    }
}

INLINE void store_bf16(uint8_t *restrict to, const uint8_t *restrict row, int64_t n, int is_bf16) {
    for (int64_t i = 0; i < n; i++) store_u16(to + 2 * i, bf16_bits(element_bits(row, i, is_bf16)));
}

INLINE void store_fp32(uint8_t *restrict to, const uint8_t *restrict row, int64_t n, int is_bf16) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t v = element_bits(row, i, is_bf16);
        v = (v & 0x7FFFFFFFu) > EXPONENT ? NAN_BITS : v;
        memcpy(to + 4 * i, &v, 4);
    }
}

#endif
