/* Decoding one row, the sum of one or more packets, in plain C: for every layout and machine. See rows.h. */
#ifndef LOWBIT_DECODE_ROW_H
#define LOWBIT_DECODE_ROW_H

#include "formats.h"
#include "moves.h"
#include "trellis.h"

enum { TILE = 256 }; /* values of a tile, which stay in the first-level cache while all ranks add to it */

/* What decoding prepares once a call. */
typedef struct {
    const Layout *at;
    Static with;
    int64_t R;
    int tame; /* static numbers are so small that no sum overflows: all NaN come from codes */
    Pieces pieces;
    uint8_t *codes, *bits;
    float *values, *sum, *full, *scale, *minimum, e4m3[256];
} DecodePlan;

INLINE void plan_decode(DecodePlan *plan, const Layout *at, Static with, int64_t R, Arena *from) {
    const int64_t H = at->features, G = at->groups;
    plan->at = at, plan->with = with, plan->R = R;
    plan->pieces.of = 0;
    plan->pieces.piece = take(from, most_pieces(at), sizeof(Piece));
    plan->codes = take(from, H, 1), plan->values = take(from, H, 4);
    plan->bits = take(from, least(at->group_size, H), 1);
    plan->sum = take(from, H, 4), plan->full = take(from, H, 4);
    plan->scale = take(from, G, 4), plan->minimum = take(from, G, 4);
}

INLINE void prepare_decode(DecodePlan *plan) {
    const int64_t n = plan->at->body;
    plan->tame = plan->at->values != E4M3 && plan->R < 1 << 16; /* e4m3 has a NaN of each sign */
    for (int64_t r = 0; r < plan->R; r++) {
        if (plan->with.scale) plan->tame &= all_small(plan->with.scale + r * plan->with.scale_row, n);
        if (plan->with.minimum) plan->tame &= all_small(plan->with.minimum + r * plan->with.minimum_row, n);
    }
    for (uint32_t code = 0; plan->at->scale_format == SCALE_E4M3 && code < 256; code++)
        plan->e4m3[code] = small_float_value(code, AS_E4M3);
}

/* What a row of codes means, beside the scales. */
typedef struct { int32_t sign, lost; const float *levels; } Meaning;

/* The value of a code before any scale. `lost`, where a code says "not finite", gives NaN. */
INLINE float value_of(uint32_t code, Meaning means, int kind, int has_lost) {
    float value;
    if (kind >= LM) return means.levels[code];
    if (kind == INTEGER) {
        value = (float)((int32_t)(code ^ (uint32_t)means.sign) - means.sign);
    } else if (kind == E4M3) {
        uint32_t magnitude = code & 0x7F;
        uint32_t bits = as_bits((float)(int32_t)magnitude * 0x1p-9f);
        bits = magnitude < 8 ? bits : (magnitude << 20) + (120u << 23);
        bits = magnitude == 0x7F ? NAN_BITS : bits | (code & 0x80) << 24;
        return as_float(bits);
    } else {
        uint32_t magnitude = code & 7;
        uint32_t bits = magnitude < 2 ? magnitude * as_bits(0.5f) : (magnitude << 22) + (126u << 23);
        value = as_float(bits | (code & 8) << 28);
    }
    return has_lost && code == (uint32_t)means.lost ? as_float(NAN_BITS) : value;
}

/* Add n values to `sum`, or start it with them. Each has a scale of its own, and a minimum where `has_minimum`, or they
 * share the first. */
INLINE void add_values(float *restrict sum, const uint8_t *restrict codes, const float *restrict scale,
                       const float *restrict minimum, int64_t n, Meaning means, const int kind, const int shared,
                       const int has_minimum, const int start) {
    const float of_all = shared ? scale[0] : 0.0f, low = shared && has_minimum ? minimum[0] : 0.0f;
    for (int64_t i = 0; i < n; i++) {
        float value = value_of(codes[i], means, kind, !shared) * (shared ? of_all : scale[i]);
        if (has_minimum) value += shared ? low : minimum[i];
        sum[i] = start ? value : sum[i] + value;
    }
}

INLINE void add_values_of(float *sum, const uint8_t *codes, const float *scale, const float *minimum, int64_t n,
                          Meaning means, int kind, const int shared, const int start) {
    if (kind == E4M3) add_values(sum, codes, scale, 0, n, means, E4M3, shared, 0, start);
    else if (kind == E2M1) add_values(sum, codes, scale, 0, n, means, E2M1, shared, 0, start);
    else if (kind >= LM) add_values(sum, codes, scale, 0, n, means, LM, shared, 0, start);
    else if (minimum) add_values(sum, codes, scale, minimum, n, means, INTEGER, shared, 1, start);
    else add_values(sum, codes, scale, 0, n, means, INTEGER, shared, 0, start);
}

/* Add the body values of a packet row of rank r to `sum`, or start it with them. Returns whether scales of groups are
 * small, see `tame`. */
INLINE int add_body(DecodePlan *plan, float *sum, const uint8_t *row, int64_t r, const int start) {
    const Layout *at = plan->at;
    const int64_t n = at->body, size = at->group_size;
    const int kind = (int)at->values, asymmetric = (int)at->asymmetric;
    const float *scale = plan->with.scale ? plan->with.scale + r * plan->with.scale_row : 0;
    const float *minimum = plan->with.minimum ? plan->with.minimum + r * plan->with.minimum_row : 0;
    const Meaning means = {asymmetric ? 0 : 1 << (at->bits - 1), coding_of(at).lost, at->levels};
    unpack_planes(at, plan->codes, row);
    if (has_trellis(at)) trellis_places(plan->codes, plan->bits, size, n);
    if (!size) {
        add_values_of(sum, plan->codes, scale, minimum, n, means, kind, 0, start);
        return 1;
    }
    read_group_sides(at, row, plan->e4m3, plan->scale, plan->minimum);
    for (int64_t g = 0, first = 0; g < at->groups; g++, first += size) {
        const float *low = asymmetric ? plan->minimum + g : 0;
        const int64_t count = least(size, n - first);
        if (at->prescaled)
            add_values_of(plan->values + first, plan->codes + first, plan->scale + g, low, count, means, kind, 1, 1);
        else add_values_of(sum + first, plan->codes + first, plan->scale + g, low, count, means, kind, 1, start);
    }
    if (at->prescaled && start) for (int64_t i = 0; i < n; i++) sum[i] = plan->values[i] * scale[i];
    else if (at->prescaled) for (int64_t i = 0; i < n; i++) sum[i] += plan->values[i] * scale[i];
    return all_small(plan->scale, at->groups) && (!asymmetric || all_small(plan->minimum, at->groups));
}

/* Plain bf16 or fp32 values, tile by tile. */
INLINE void add_plain(float *restrict out, const uint8_t *const *rows, int64_t R, int64_t n, int add, int is_bf16) {
    for (int64_t start = 0; start < n; start += TILE) {
        const int64_t size = least(TILE, n - start);
        for (int64_t r = 0; r < R; r++) {
            const uint8_t *restrict from = rows[r] + start * (is_bf16 ? 2 : 4);
            float *restrict to = out + start;
            if (r || add) for (int64_t i = 0; i < size; i++) to[i] += as_float(element_bits(from, i, is_bf16));
            else for (int64_t i = 0; i < size; i++) to[i] = as_float(element_bits(from, i, is_bf16));
        }
        for (int64_t i = start; i < start + size; i++) out[i] = one_nan(out[i]);
    }
}

/* Write the sum of R packet rows into a row of out, or add that of one. */
INLINE void decode_row(DecodePlan *plan, const uint8_t *const *rows, float *restrict out, int add) {
    const Layout *at = plan->at;
    const int64_t n = at->body, H = at->features;
    if (at->bits == 16) {
        add_plain(out, rows, plan->R, n, add, 1);
        return;
    }
    if (at->bits == 32) {
        add_plain(out, rows, plan->R, n, add, 0);
        return;
    }
    float *restrict sum = at->outliers ? plan->sum : out;
    int tame = plan->tame && !add;
    for (int64_t r = 0; r < plan->R; r++)
        tame &= r || (add && !at->outliers) ? add_body(plan, sum, rows[r], r, 0) : add_body(plan, sum, rows[r], r, 1);
    if (at->outliers) {
        float *restrict to = add ? plan->full : out;
        move_body((uint8_t *)to, (const uint8_t *)sum, at, plan->with.outlier_index, &plan->pieces, 4, 1);
        add_outliers(at, to, rows, plan->R, 0, plan->with.outlier_index);
        if (add) for (int64_t i = 0; i < H; i++) out[i] += to[i];
    }
    if (!tame) for (int64_t i = 0; i < H; i++) out[i] = one_nan(out[i]);
}

#endif
