/* Encoding one row in plain C: for every layout, input and machine. See rows.h.
 *
 * Rounding: adding 1.5 * 2^23 rounds half to even and leaves the integer in the low bits, in two's complement.
 * The clamp follows, on those bits as a signed integer: they order as the sums do, and what lies too far out for the
 * addition to be exact (infinite products included) is clamped whatever it is; sums below 0 are negative integers too.
 */
#ifndef LOWBIT_ENCODE_ROW_H
#define LOWBIT_ENCODE_ROW_H

#include "formats.h"
#include "moves.h"
#include "avx512_trellis.h"

#define ROUND_TO_INTEGER 12582912.0f /* 1.5 * 2^23 */
#define ROUNDED_ZERO 0x4B400000      /* its bits */

/* What encoding prepares once a call. */
typedef struct {
    const Layout *at;
    Static with;
    int is_bf16;
    Coding coding;
    Pieces pieces;
    uint8_t *compacted, *codes;
    float *body, *peak, *lowest, *inverse;
    Subsets subsets; /* of a trellis, with room for a row's products and for 16 groups */
    float *products;
    uint8_t *scratch;
    int wide; /* whether AVX-512 may be used for it */
} EncodePlan;

INLINE void plan_encode(EncodePlan *plan, const Layout *at, Static with, int is_bf16, Arena *from) {
    const int64_t H = at->features, G = at->groups;
    plan->at = at, plan->with = with, plan->is_bf16 = is_bf16, plan->coding = coding_of(at);
    plan->pieces.of = 0;
    plan->pieces.piece = take(from, most_pieces(at), sizeof(Piece));
    plan->compacted = take(from, H, 4), plan->codes = take(from, H, 1), plan->body = take(from, H, 4);
    if (has_trellis(at)) {
        fill_subsets(&plan->subsets, at);
        plan->products = take(from, H, 4), plan->scratch = take(from, least(at->group_size, H) + LANES, 5 * LANES);
    }
    plan->peak = take(from, G, 4), plan->lowest = take(from, G, 4), plan->inverse = take(from, G, 4);
}

INLINE uint8_t integer_code(float product, int32_t lowest, int32_t highest) {
    int32_t code = (int32_t)as_bits(product + ROUND_TO_INTEGER);
    code = code < ROUNDED_ZERO + lowest ? ROUNDED_ZERO + lowest : code;
    return (uint8_t)(code > ROUNDED_ZERO + highest ? ROUNDED_ZERO + highest : code);
}

/* The code of a product. e2m1 has no minus zero. */
INLINE uint8_t code_of(float product, int kind, int lowest, int highest) {
    if (kind == INTEGER) return integer_code(product, lowest, highest);
    if (kind == E4M3) return (uint8_t)small_float_code(product, AS_E4M3);
    uint32_t code = small_float_code(product, AS_E2M1);
    return (uint8_t)(code == 8 ? 0 : code);
}

/* `body`: n values of bf16 or fp32. */
INLINE void codes_static(uint8_t *restrict codes, const uint8_t *restrict body, const int is_bf16,
                         const Coding *coding, const float *restrict inverse, const float *restrict minimum, int64_t n,
                         int kind, int has_minimum, int finite) {
    const int lowest = coding->lowest, highest = coding->highest;
    const uint8_t lost = (uint8_t)coding->lost;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = element_bits(body, i, is_bf16);
        float x = has_minimum ? as_float(bits) - minimum[i] : as_float(bits);
        uint8_t code = code_of(x * inverse[i], kind, lowest, highest);
        codes[i] = !finite && (bits & EXPONENT) == EXPONENT ? lost : code;
    }
}

INLINE int all_finite(const uint8_t *restrict body, const int is_bf16, int64_t n) {
    if (is_bf16) {
        uint16_t highest = 0;
        for (int64_t i = 0; i < n; i++) {
            uint16_t magnitude = load_u16(body + 2 * i) & 0x7FFF;
            highest = magnitude > highest ? magnitude : highest;
        }
        return highest < 0x7F80;
    }
    int32_t highest = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t magnitude = (int32_t)(load_u32(body + 4 * i) & ~SIGN);
        highest = magnitude > highest ? magnitude : highest;
    }
    return highest < (int32_t)EXPONENT;
}

/* Codes of a group, of which all are finite: without a minimum it is 0, whose subtraction changes no product. */
INLINE void codes_group(uint8_t *restrict codes, const uint8_t *restrict body, const int is_bf16, int64_t n,
                        float inverse, float minimum, int kind, int lowest, int highest) {
    for (int64_t i = 0; i < n; i++)
        codes[i] = code_of((as_float(element_bits(body, i, is_bf16)) - minimum) * inverse, kind, lowest, highest);
}

/* The same of levels: how many thresholds a product exceeds, out of `count`, a constant. */
INLINE void codes_levels(uint8_t *restrict codes, const uint8_t *restrict body, const int is_bf16, int64_t n,
                         float inverse, const float *restrict thresholds, const int count) {
    for (int64_t i = 0; i < n; i++) {
        const float product = as_float(element_bits(body, i, is_bf16)) * inverse;
        int32_t code = 0;
        for (int k = 0; k < count; k++) code += product > thresholds[k];
        codes[i] = (uint8_t)code;
    }
}

INLINE void codes_levels_of(const Layout *at, uint8_t *codes, const uint8_t *body, const int is_bf16, int64_t n,
                            float inverse) {
    if (at->bits == 2) codes_levels(codes, body, is_bf16, n, inverse, at->thresholds, 3);
    else if (at->bits == 3) codes_levels(codes, body, is_bf16, n, inverse, at->thresholds, 7);
    else codes_levels(codes, body, is_bf16, n, inverse, at->thresholds, 15);
}

/* The value of largest magnitude of a group, positive on a tie (or that magnitude); NaN where one is not finite. The
 * order of magnitudes is that of their bits as integers, whose maximum, unlike that of floats, vectorises. */
INLINE float group_peak(const uint8_t *restrict body, const int is_bf16, int64_t n, int is_signed) {
    int32_t positive = 0, negative = 0; /* a value of the other sign is a negative integer: it never wins */
    for (int64_t i = 0; i < n; i++) {
        int32_t v = (int32_t)element_bits(body, i, is_bf16), w = (int32_t)((uint32_t)v ^ SIGN);
        positive = v > positive ? v : positive;
        negative = w > negative ? w : negative;
    }
    uint32_t highest = (uint32_t)(positive > negative ? positive : negative);
    if (highest >= EXPONENT) return as_float(NAN_BITS);
    return as_float(is_signed && negative > positive ? highest | SIGN : highest);
}

/* The largest value (returned) and the smallest of a group; NaN where one is not finite. Integers again: the bits of
 * negative values, but for the sign, turned round, which puts -0 below 0. */
INLINE float group_range(const uint8_t *restrict body, const int is_bf16, int64_t n, float *lowest) {
    int32_t low = INT32_MAX, high = INT32_MIN;
    for (int64_t i = 0; i < n; i++) {
        int32_t v = (int32_t)element_bits(body, i, is_bf16);
        v ^= (v >> 31) & 0x7FFFFFFF;
        low = v < low ? v : low;
        high = v > high ? v : high;
    }
    if (high >= (int32_t)EXPONENT || low <= ~(int32_t)EXPONENT) return *lowest = as_float(NAN_BITS);
    *lowest = as_float((uint32_t)(low ^ ((low >> 31) & 0x7FFFFFFF)));
    return as_float((uint32_t)(high ^ ((high >> 31) & 0x7FFFFFFF)));
}

/* Codes of all groups of a row that are trellis-coded: those of a group that is not finite are 0. */
INLINE void trellis_groups(EncodePlan *plan, const uint8_t *body, const int is_bf16, uint8_t *codes) {
    const Layout *at = plan->at;
    const int64_t size = at->group_size, G = at->groups, whole = at->body / size;
    int64_t g = 0;
    for (int64_t first = 0, i = 0; first < G; first++)
        for (const int64_t end = least((first + 1) * size, at->body); i < end; i++)
            plan->products[i] = as_float(element_bits(body, i, is_bf16)) * plan->inverse[first];
#ifdef HAS_AVX512
    for (int64_t count; plan->wide && g < whole; g += count) {
        count = least(LANES, whole - g);
        codes_trellis512(&plan->subsets, codes + g * size, plan->products + g * size, plan->scratch, size, count);
    }
#endif
    for (; g < G; g++)
        codes_trellis(&plan->subsets, codes + g * size, plan->products + g * size, plan->scratch,
                      least(size, at->body - g * size));
    for (g = 0; g < G; g++)
        if (plan->peak[g] != plan->peak[g]) memset(codes + g * size, 0, (size_t)least(size, at->body - g * size));
}

INLINE void encode_groups(EncodePlan *plan, const uint8_t *body, const int is_bf16, uint8_t *codes, uint8_t *packet) {
    const Layout *at = plan->at;
    const Coding *as = &plan->coding;
    const int is_signed = peak_is_signed(at);
    const int64_t size = at->group_size, nbytes = is_bf16 ? 2 : 4;
    for (int64_t g = 0; g < at->groups; g++) {
        const uint8_t *group = body + nbytes * g * size;
        const int64_t n = least(size, at->body - g * size);
        if (at->asymmetric) plan->peak[g] = group_range(group, is_bf16, n, plan->lowest + g);
        else plan->peak[g] = group_peak(group, is_bf16, n, is_signed);
    }
    if (at->asymmetric) group_minimums(at, plan->peak, plan->lowest, packet);
    group_scales(at, plan->peak, plan->inverse, packet);
    if (has_trellis(at)) {
        trellis_groups(plan, body, is_bf16, codes);
        return;
    }
    for (int64_t g = 0; g < at->groups; g++, codes += size, body += nbytes * size) {
        const int64_t n = least(size, at->body - g * size);
        const float inverse = plan->inverse[g], minimum = at->asymmetric ? plan->lowest[g] : 0.0f;
        if (plan->peak[g] != plan->peak[g] || minimum != minimum) memset(codes, 0, (size_t)n);
        else if (as->kind == E4M3) codes_group(codes, body, is_bf16, n, inverse, 0.0f, E4M3, 0, 0);
        else if (as->kind == E2M1) codes_group(codes, body, is_bf16, n, inverse, 0.0f, E2M1, 0, 0);
        else if (has_levels(at)) codes_levels_of(at, codes, body, is_bf16, n, inverse);
        else codes_group(codes, body, is_bf16, n, inverse, minimum, INTEGER, as->lowest, as->highest);
    }
}

/* Body values as they are: bf16 and fp32 to one of these. */
INLINE void store_plain(uint8_t *restrict to, const uint8_t *restrict body, const int is_bf16, int64_t n, int bits) {
    if (bits == 32)
        for (int64_t i = 0; i < n; i++)
            store_u32(to + 4 * i, as_bits(one_nan(as_float(element_bits(body, i, is_bf16)))));
    else if (is_bf16) for (int64_t i = 0; i < n; i++) store_u16(to + 2 * i, one_nan_bf16(load_u16(body + 2 * i)));
    else for (int64_t i = 0; i < n; i++) store_u16(to + 2 * i, bf16_bits(load_u32(body + 4 * i)));
}

INLINE void multiply(float *restrict to, const uint8_t *restrict body, const int is_bf16,
                     const float *restrict inverse, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = as_float(element_bits(body, i, is_bf16)) * inverse[i];
}

/* Write one row of x into one of the packet. */
INLINE void encode_row(EncodePlan *plan, const uint8_t *x, uint8_t *packet, const int is_bf16) {
    const Layout *at = plan->at;
    const int64_t n = at->body;
    const float *inverse = plan->with.scale, *minimum = plan->with.minimum;
    const Coding *as = &plan->coding;
    const uint8_t *body = x;
    uint8_t *codes = plan->codes;
    if (at->outliers) {
        move_body(plan->compacted, x, at, plan->with.outlier_index, &plan->pieces, is_bf16 ? 2 : 4, 0);
        body = plan->compacted;
    }
    if (at->bits > 8) {
        store_plain(packet, body, is_bf16, n, (int)at->bits);
        return;
    }
    if (at->prescaled) {
        multiply(plan->body, body, is_bf16, inverse, n);
        encode_groups(plan, (const uint8_t *)plan->body, 0, codes, packet);
    } else if (at->group_size) encode_groups(plan, body, is_bf16, codes, packet);
    else if (as->kind == E4M3) codes_static(codes, body, is_bf16, as, inverse, 0, n, E4M3, 0, 0);
    else if (as->kind == E2M1) codes_static(codes, body, is_bf16, as, inverse, 0, n, E2M1, 0, 0);
    else if (at->asymmetric) codes_static(codes, body, is_bf16, as, inverse, minimum, n, INTEGER, 1, 0);
    else if (!all_finite(body, is_bf16, n)) codes_static(codes, body, is_bf16, as, inverse, 0, n, INTEGER, 0, 0);
    else codes_static(codes, body, is_bf16, as, inverse, 0, n, INTEGER, 0, 1);
    memset(codes + n, 0, 8);
    pack_planes(at, packet, codes);
    clear_gaps(at, packet);
    store_outliers(at, packet, x, is_bf16, plan->with.outlier_index);
}

#endif
