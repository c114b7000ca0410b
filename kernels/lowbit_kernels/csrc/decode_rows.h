/* Decoding: the steps on one row. See rows.h. Each `add_` adds its values to `sum`, or starts it where `first`.
 *
 * NaN costs little where there is none: whether a row holds a code for "not finite", and whether scales are so large that
 * a sum might overflow, is seen from bytes and scales; only then are values looked at.
 */
#ifndef LOWBIT_DECODE_ROWS_H
#define LOWBIT_DECODE_ROWS_H

#include "rows.h"

INLINE float one_nan(float x) { return x != x ? as_float(NAN_BITS) : x; }

/* Bytes to pairs of codes + 8: the code for "not finite" is 0. */
INLINE void unpack_nibbles(uint8_t *restrict to, const uint8_t *restrict packed, int64_t nbytes) {
    for (int64_t j = 0; j < nbytes; j++) {
        uint16_t pair = packed[j];
        store_u16(to + 2 * j, (uint16_t)(((pair & 0xF) | (pair & 0xF0) << 4) ^ 0x0808));
    }
}

/* Bytes of 8-bit codes to codes + 128. */
INLINE void unpack_bytes(uint8_t *restrict to, const uint8_t *restrict packed, int64_t nbytes) {
    for (int64_t j = 0; j < nbytes; j++) to[j] = packed[j] ^ 0x80;
}

INLINE int any_zero(const uint8_t *restrict bytes, int64_t n) {
    uint8_t lowest = 255;
    for (int64_t i = 0; i < n; i++) lowest = bytes[i] < lowest ? bytes[i] : lowest;
    return lowest == 0;
}

/* Codes of the body to their places among all features. What lands on outliers is arbitrary, to be overwritten. */
INLINE void expand_codes(uint8_t *restrict to, const uint8_t *restrict codes, const Block *blocks, int64_t count) {
    for (int64_t i = 0; i < count; i++) memcpy(to + blocks[i].full, codes + blocks[i].body, BLOCK_NBYTES);
}

/* `codes` are shifted up by 8 or 128. `scale` is bf16 where `narrow`, else fp32: two bytes a feature leave room in the
 * first-level cache for the row being written, and more than double the speed. */
INLINE void add_static(float *restrict sum, const uint8_t *restrict codes, const uint8_t *restrict scale, int64_t n,
                       int bits, int narrow, int with_nan, int first) {
    for (int64_t i = 0; i < n; i++) {
        float of_i = narrow ? bf16_value(load_u16(scale + 2 * i)) : as_float(load_u32(scale + 4 * i));
        float value = (float)((int32_t)codes[i] - (1 << (bits - 1))) * of_i;
        if (with_nan) value = codes[i] == 0 ? as_float(NAN_BITS) : value;
        sum[i] = first ? value : sum[i] + value;
    }
}

INLINE void add_groups(float *restrict sum, const uint8_t *restrict codes, const uint8_t *restrict scales, int64_t n,
                       int64_t group_size, int bits, int first) {
    for (int64_t start = 0; start < n; start += group_size, scales += 2) {
        int64_t stop = n - start < group_size ? n : start + group_size;
        float scale = bf16_value(load_u16(scales));
        for (int64_t i = start; i < stop; i++) {
            float value = (float)((int32_t)codes[i] - (1 << (bits - 1))) * scale;
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

INLINE void one_nan_row(float *row, int64_t n) {
    for (int64_t i = 0; i < n; i++) row[i] = one_nan(row[i]);
}

/* Body sums to their places among all features. */
INLINE void expand_sums(float *restrict row, const float *restrict body, const Layout *at, const int64_t *outlier_index,
                        const Block *blocks, int64_t count, int64_t rest) {
    for (int64_t i = 0; i < count; i++) memcpy(row + blocks[i].full, body + blocks[i].body, BLOCK_NBYTES);
    for (int64_t k = rest; k <= at->outliers; k++) {
        int64_t start = k ? outlier_index[k - 1] + 1 : 0;
        int64_t stop = k < at->outliers ? outlier_index[k] : at->features;
        memcpy(row + start, body + start - k, (size_t)(4 * (stop - start)));
    }
}

/* True where no sum of R values code * scale can overflow, so that only a code can make a NaN: |code| <= 128. */
INLINE int are_small(const uint8_t *restrict bf16_scales, int64_t n, int64_t R) {
    const float limit = 1e38f / 128.0f / (float)R;
    uint16_t highest = 0;
    for (int64_t i = 0; i < n; i++) {
        uint16_t v = load_u16(bf16_scales + 2 * i) & 0x7FFF;
        highest = v > highest ? v : highest;
    }
    return highest < 0x7F80 && bf16_value(highest) < limit;
}

/* True where all n scales are representable in bf16, as they should be. */
INLINE int are_bf16(const float *restrict scale, int64_t n) {
    uint32_t low = 0;
    for (int64_t i = 0; i < n; i++) low |= as_bits(scale[i]);
    return (low & 0xFFFF) == 0;
}

/* Scales of the body to their places among all features, as bf16 where `narrow`. */
INLINE void expand_scale(uint8_t *restrict to, const float *restrict scale, const Layout *at,
                         const int64_t *outlier_index, int narrow) {
    for (int64_t k = 0, i = 0; k <= at->outliers; k++) {
        int64_t stop = k < at->outliers ? outlier_index[k] : at->features;
        if (narrow)
            for (int64_t j = i; j < stop; j++) store_u16(to + 2 * j, (uint16_t)(as_bits(scale[j - k]) >> 16));
        else
            memcpy(to + 4 * i, scale + i - k, (size_t)(4 * (stop - i)));
        if (k < at->outliers) memset(to + (narrow ? 2 : 4) * stop, 0, narrow ? 2 : 4);
        i = stop + 1;
    }
}

#endif
