/* Encoding one row in plain C: for every layout, input and machine. See rows.h.
 *
 * Rounding: adding 1.5 * 2^23 rounds half to even and leaves the integer in the low bits of the sum, in two's complement.
 * The clamp follows, on those bits as a signed integer: they order as the sums do, and what lies too far out for the
 * addition to be exact (infinite products included) is clamped whatever it is; sums below 0 are negative integers too.
 */
#ifndef LOWBIT_ENCODE_ROW_H
#define LOWBIT_ENCODE_ROW_H

#include "formats.h"
#include "moves.h"

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
} EncodePlan;

INLINE void plan_encode(EncodePlan *plan, const Layout *at, Static with, int is_bf16, Arena *from) {
    const int64_t H = at->features, G = at->groups;
    plan->at = at, plan->with = with, plan->is_bf16 = is_bf16, plan->coding = coding_of(at);
    plan->pieces.of = 0;
    plan->pieces.piece = take(from, most_pieces(at), sizeof(Piece));
    plan->compacted = take(from, H, 4), plan->codes = take(from, H, 1), plan->body = take(from, H, 4);
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

INLINE void codes_static(uint8_t *restrict codes, const float *restrict body, const Coding *coding,
                         const float *restrict inverse, const float *restrict minimum, int64_t n, int kind,
                         int has_minimum) {
    const int lowest = coding->lowest, highest = coding->highest;
    const uint8_t lost = (uint8_t)coding->lost;
    for (int64_t i = 0; i < n; i++) {
        float x = has_minimum ? body[i] - minimum[i] : body[i];
        uint8_t code = code_of(x * inverse[i], kind, lowest, highest);
        codes[i] = (as_bits(body[i]) & EXPONENT) == EXPONENT ? lost : code;
    }
}

/* Codes of a group, of which all are finite: without a minimum it is 0, whose subtraction changes no product. */
INLINE void codes_group(uint8_t *restrict codes, const float *restrict body, int64_t n, float inverse, float minimum,
                        int kind, int lowest, int highest) {
    for (int64_t i = 0; i < n; i++) codes[i] = code_of((body[i] - minimum) * inverse, kind, lowest, highest);
}

/* The value of largest magnitude of a group, positive on a tie (or that magnitude), NaN where a value is not finite. The
 * order of magnitudes is that of their bits as integers, whose maximum, unlike that of floats, vectorises. */
INLINE float group_peak(const float *restrict body, int64_t n, int is_signed) {
    int32_t positive = 0, negative = 0; /* a value of the other sign is a negative integer: it never wins */
    for (int64_t i = 0; i < n; i++) {
        int32_t v = (int32_t)as_bits(body[i]), w = (int32_t)(as_bits(body[i]) ^ SIGN);
        positive = v > positive ? v : positive;
        negative = w > negative ? w : negative;
    }
    uint32_t highest = (uint32_t)(positive > negative ? positive : negative);
    if (highest >= EXPONENT) return as_float(NAN_BITS);
    return as_float(is_signed && negative > positive ? highest | SIGN : highest);
}

/* The largest value (returned) and the smallest of a group; NaN where one is not finite. Integers again: bits of negative
 * values, but for the sign, turned round, which puts -0 below 0. */
INLINE float group_range(const float *restrict body, int64_t n, float *lowest) {
    int32_t low = INT32_MAX, high = INT32_MIN;
    for (int64_t i = 0; i < n; i++) {
        int32_t v = (int32_t)as_bits(body[i]);
        v ^= (v >> 31) & 0x7FFFFFFF;
        low = v < low ? v : low;
        high = v > high ? v : high;
    }
    if (high >= (int32_t)EXPONENT || low <= ~(int32_t)EXPONENT) return *lowest = as_float(NAN_BITS);
    *lowest = as_float((uint32_t)(low ^ ((low >> 31) & 0x7FFFFFFF)));
    return as_float((uint32_t)(high ^ ((high >> 31) & 0x7FFFFFFF)));
}

INLINE void encode_groups(EncodePlan *plan, const float *body, uint8_t *codes, uint8_t *packet) {
    const Layout *at = plan->at;
    const int is_signed = peak_is_signed(at);
    for (int64_t g = 0; g < at->groups; g++) {
        const float *group = body + g * at->group_size;
        int64_t size = least(at->group_size, at->body - g * at->group_size);
        plan->peak[g] = at->asymmetric ? group_range(group, size, plan->lowest + g) : group_peak(group, size, is_signed);
    }
    if (at->asymmetric) group_minimums(at, plan->peak, plan->lowest, packet);
    group_scales(at, plan->peak, plan->inverse, packet);
    for (int64_t g = 0; g < at->groups; g++) {
        const int64_t start = g * at->group_size, size = least(at->group_size, at->body - start);
        const Coding *as = &plan->coding;
        const float inverse = plan->inverse[g], minimum = at->asymmetric ? plan->lowest[g] : 0.0f;
        if (plan->peak[g] != plan->peak[g] || minimum != minimum) memset(codes + start, 0, (size_t)size);
        else if (as->kind == INTEGER)
            codes_group(codes + start, body + start, size, inverse, minimum, INTEGER, as->lowest, as->highest);
        else if (as->kind == E4M3) codes_group(codes + start, body + start, size, inverse, 0.0f, E4M3, 0, 0);
        else codes_group(codes + start, body + start, size, inverse, 0.0f, E2M1, 0, 0);
    }
}

/* Write one row of x into one of the packet. */
INLINE void encode_row(EncodePlan *plan, const uint8_t *x, uint8_t *packet) {
    const Layout *at = plan->at;
    const int64_t n = at->body;
    const int is_bf16 = plan->is_bf16;
    const uint8_t *from = x;
    float *restrict body = plan->body;
    if (at->outliers) {
        move_body(plan->compacted, x, at, plan->with.outlier_index, &plan->pieces, is_bf16 ? 2 : 4, 0);
        from = plan->compacted;
    }
    if (at->bits == 16) {
        for (int64_t i = 0; i < n; i++) store_u16(packet + 2 * i, bf16_bits(element_bits(from, i, is_bf16)));
        return;
    }
    if (is_bf16) for (int64_t i = 0; i < n; i++) body[i] = as_float((uint32_t)load_u16(from + 2 * i) << 16);
    else memcpy(body, from, (size_t)(4 * n));
    if (at->bits == 32) {
        for (int64_t i = 0; i < n; i++) store_u32(packet + 4 * i, as_bits(one_nan(body[i])));
        return;
    }
    uint8_t *codes = plan->codes;
    const float *scale = plan->with.scale, *minimum = plan->with.minimum;
    if (at->group_size) {
        if (at->prescaled) for (int64_t i = 0; i < n; i++) body[i] *= scale[i];
        encode_groups(plan, body, codes, packet);
    } else if (at->values == E4M3) codes_static(codes, body, &plan->coding, scale, 0, n, E4M3, 0);
    else if (at->values == E2M1) codes_static(codes, body, &plan->coding, scale, 0, n, E2M1, 0);
    else if (at->asymmetric) codes_static(codes, body, &plan->coding, scale, minimum, n, INTEGER, 1);
    else codes_static(codes, body, &plan->coding, scale, 0, n, INTEGER, 0);
    memset(codes + n, 0, 8);
    pack_planes(at, packet, codes);
    clear_gaps(at, packet);
    store_outliers(at, packet, x, is_bf16, plan->with.outlier_index);
}

#endif
