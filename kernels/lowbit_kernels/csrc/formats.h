/* Formats of values and of group scales: codes of single numbers, and the scales of all groups of a row. Plain loops
 * without branches on data, which compilers vectorise wherever they are inlined. See rows.h.
 */
#ifndef LOWBIT_FORMATS_H
#define LOWBIT_FORMATS_H

#include "rows.h"

/* How values become codes: what stays the same for a whole call. */
typedef struct {
    int kind; /* Layout.values */
    int is_signed, lowest, highest;
    int lost; /* with static scales, the code of a value that is not finite */
} Coding;

/* A small float: `lowest` is the exponent, as bits of fp32, that exponent fields 0 and 1 stand for. */
typedef struct { int bits, mantissa_bits; uint32_t lowest; float largest; } SmallFloat;

#define AS_E4M3 ((SmallFloat){8, 3, 121u << 23, 448.0f})
#define AS_E2M1 ((SmallFloat){4, 1, 127u << 23, 6.0f})

INLINE Coding coding_of(const Layout *at) {
    const int top = at->bits > 8 ? 1 : 1 << (at->bits - 1); /* plain values have no codes */
    Coding coding = {(int)at->values, !at->asymmetric && !has_levels(at), -top, top - 1, 0};
    if (at->asymmetric) {
        coding.lowest = 0, coding.highest = 2 * top - 1;
        if (!at->group_size) coding.highest--, coding.lost = coding.highest + 1;
    } else {
        if (!at->group_size || at->bits == 8 || at->scale_format == SCALE_E8M0) coding.lowest++;
        coding.lost = top; /* two's complement of the lowest; e2m1's minus zero */
    }
    if (at->values == E4M3) coding.lost = 0x7F;
    return coding;
}

/* Nearest even, saturating, NaN to anything. Added to a power of two whose last bit is the unit of the result, a
 * magnitude is rounded to units, and leaves their number in the low bits of the sum. */
INLINE uint32_t small_float_code(float x, SmallFloat as) {
    const int shift = 23 - as.mantissa_bits;
    uint32_t magnitude = as_bits(x) & ~SIGN;
    magnitude = magnitude > as_bits(as.largest) ? as_bits(as.largest) : magnitude;
    uint32_t exponent = (magnitude > as.lowest ? magnitude : as.lowest) & EXPONENT;
    uint32_t power = exponent + ((uint32_t)shift << 23);
    uint32_t units = as_bits(as_float(magnitude) + as_float(power)) - power;
    uint32_t code = units + ((exponent - as.lowest) >> shift);
    return code | (as_bits(x) >> 31 << (as.bits - 1));
}

INLINE float small_float_value(uint32_t code, SmallFloat as) {
    const int mask = (1 << as.mantissa_bits) - 1;
    int32_t magnitude = (int32_t)(code & ((1u << (as.bits - 1)) - 1));
    int32_t field = magnitude >> as.mantissa_bits, mantissa = magnitude & mask;
    float units = (float)(field ? mantissa + mask + 1 : mantissa);
    float unit = as_float(as.lowest + ((uint32_t)((field ? field : 1) - 1 - as.mantissa_bits) << 23));
    float value = code >> (as.bits - 1) ? -(units * unit) : units * unit;
    return as.bits == 8 && magnitude == 0x7F ? as_float(NAN_BITS) : value;
}

INLINE uint16_t raised(uint16_t bf16_scale) {
    return bf16_value(bf16_scale & 0x7FFF) < SCALE_FLOOR ? bf16_bits(as_bits(SCALE_FLOOR)) : bf16_scale;
}

/* A power of two; smaller ones than 2^-100 do not occur, and read as that. */
INLINE float e8m0_value(uint32_t byte) {
    return byte == 255 ? as_float(NAN_BITS) : as_float((byte < 27 ? 27 : byte) << 23);
}

/* Factor from the largest magnitude of a group (signed: see peak_is_signed) to the step it asks for; that of the code
 * range for asymmetric layouts. Rounded once, from double. */
INLINE float step_of_peak(const Layout *at) {
    const int top = 1 << (at->bits - 1);
    if (has_levels(at)) return at->values == NF4 ? 1.0f : -1.0f;
    if (at->asymmetric) return (float)(1.0 / (2 * top - 1));
    if (at->scale_format == SCALE_E8M0) return at->values == INTEGER ? (float)(1.0 / (top - 1)) : 1.0f;
    if (at->values == INTEGER) return at->bits == 8 ? (float)(1.0 / 127) : -1.0f / (float)top;
    return (float)(1.0 / (at->values == E4M3 ? 448 : 6));
}

INLINE int peak_is_signed(const Layout *at) {
    if (at->values == LM || has_trellis(at)) return 1;
    return at->values == INTEGER && at->bits < 8 && !at->asymmetric && at->scale_format != SCALE_E8M0;
}

/* Minimums of asymmetric groups: `lowest` becomes what the packet gets, and `peak` the step wanted; NaN where bf16
 * cannot hold the minimum. Returns whether it can everywhere. */
INLINE int group_minimums(const Layout *at, float *restrict peak, float *restrict lowest, uint8_t *restrict packet) {
    const float share = step_of_peak(at);
    int32_t largest = 0;
    for (int64_t g = 0; g < at->groups; g++) {
        int32_t low = bf16_bits(as_bits(lowest[g])), exponent = low & 0x7F80;
        low = low == 0x8000 ? 0 : low;
        low = exponent == 0x7F80 || peak[g] != peak[g] ? NAN_BF16 : low;
        largest = largest > exponent ? largest : exponent;
        store_u16(packet + at->minimums_offset + 2 * g, (uint16_t)low);
        lowest[g] = as_float((uint32_t)low << 16);
        float wanted = peak[g] * share - lowest[g] * share;
        peak[g] = as_float(as_bits(wanted) & ~SIGN);
    }
    return largest < 0x7F80;
}

/* Scales of all groups: their bytes, and 1 / scale. `peak` is NaN for a group that is not finite: its bytes say so, its
 * inverse means nothing. */
INLINE void group_scales(const Layout *at, const float *restrict peak, float *restrict inverse,
                         uint8_t *restrict packet) {
    const int64_t G = at->groups;
    const float factor = at->asymmetric ? 1.0f : step_of_peak(at);
    uint8_t *restrict scales = packet + at->scales_offset;
    if (at->scale_format == SCALE_BF16) {
        for (int64_t g = 0; g < G; g++) {
            uint16_t bits = raised(bf16_bits(as_bits(peak[g] * factor)));
            store_u16(scales + 2 * g, bits);
            inverse[g] = 1.0f / bf16_value(bits);
        }
    } else if (at->scale_format == SCALE_E8M0) {
        const int32_t is_integer = at->values == INTEGER, offset = is_integer ? 0 : at->values == E4M3 ? 8 : 2;
        for (int64_t g = 0; g < G; g++) {
            uint32_t step = as_bits(peak[g] * factor);
            int32_t byte = (int32_t)(step >> 23) - offset + (is_integer && (step & 0x7FFFFF) ? 1 : 0);
            byte = byte < 27 ? 27 : byte > 254 ? 254 : byte;
            scales[g] = (uint8_t)(step > EXPONENT ? 255 : byte);
            inverse[g] = 1.0f / as_float((uint32_t)byte << 23);
        }
    } else {
        int32_t largest = 0;
        for (int64_t g = 0; g < G; g++) {
            int32_t wanted = (int32_t)(as_bits(peak[g] * factor) & ~SIGN);
            wanted = wanted > (int32_t)EXPONENT ? 0 : wanted;
            largest = wanted > largest ? wanted : largest;
        }
        uint16_t row_bits = raised(bf16_bits(as_bits(as_float((uint32_t)largest) * (float)(1.0 / 448))));
        store_u16(packet + at->row_scale_offset, row_bits);
        const float row_scale = bf16_value(row_bits), row_inverse = 1.0f / row_scale;
        for (int64_t g = 0; g < G; g++) {
            float wanted = peak[g] * factor;
            uint32_t code = small_float_code(wanted * row_inverse, AS_E4M3);
            code = code & 0x7F ? code : 1;
            scales[g] = (uint8_t)(wanted != wanted ? 0x7F : code);
            inverse[g] = 1.0f / (small_float_value(code, AS_E4M3) * row_scale);
        }
    }
}

/* Effective scales (and minimums) of all groups of a packet row; `e4m3` holds the values of all its codes. */
INLINE void read_group_sides(const Layout *at, const uint8_t *restrict row, const float *restrict e4m3,
                             float *restrict scale, float *restrict minimum) {
    const uint8_t *restrict scales = row + at->scales_offset;
    if (at->scale_format == SCALE_BF16) {
        for (int64_t g = 0; g < at->groups; g++) scale[g] = bf16_value(load_u16(scales + 2 * g));
    } else if (at->scale_format == SCALE_E8M0) {
        for (int64_t g = 0; g < at->groups; g++) scale[g] = e8m0_value(scales[g]);
    } else {
        const float row_scale = bf16_value(load_u16(row + at->row_scale_offset));
        for (int64_t g = 0; g < at->groups; g++) scale[g] = e4m3[scales[g]] * row_scale;
    }
    if (at->asymmetric)
        for (int64_t g = 0; g < at->groups; g++) minimum[g] = bf16_value(load_u16(row + at->minimums_offset + 2 * g));
}

/* Whether all numbers, finite ones, are far below the largest: their exponents together are a bound on each. */
INLINE int all_small(const float *restrict numbers, int64_t n) {
    uint32_t bits = 0;
    for (int64_t i = 0; i < n; i++) bits |= as_bits(numbers[i]);
    return (bits & EXPONENT) < 160u << 23;
}

#endif
