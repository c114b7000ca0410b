/* Decoding one row, the sum of one or more packets, in plain C: for every layout and machine. See rows.h. */
#ifndef LOWBIT_DECODE_ROW_H
#define LOWBIT_DECODE_ROW_H

#include "formats.h"
#include "moves.h"

enum { TILE = 256 }; /* values of a tile, which stay in the first-level cache while all ranks add to it */

/* What decoding prepares once a call. */
typedef struct {
    const Layout *at;
    Static with;
    int64_t R;
    Pieces pieces;
    uint8_t *codes;
    float *values, *sum, *full, *scale, *minimum, table[256], e4m3[256];
} DecodePlan;

INLINE void plan_decode(DecodePlan *plan, const Layout *at, Static with, int64_t R, Arena *from) {
    const int64_t H = at->features, G = at->groups;
    plan->at = at, plan->with = with, plan->R = R;
    plan->pieces.of = 0;
    plan->pieces.piece = take(from, most_pieces(at), sizeof(Piece));
    plan->codes = take(from, H, 1), plan->values = take(from, H, 4);
    plan->sum = take(from, H, 4), plan->full = take(from, H, 4);
    plan->scale = take(from, G, 4), plan->minimum = take(from, G, 4);
}

INLINE void fill_decode_tables(DecodePlan *plan) {
    const Layout *at = plan->at;
    if (at->bits <= 8) code_values(plan->table, at);
    for (uint32_t code = 0; at->scale_format == SCALE_E4M3 && code < 256; code++)
        plan->e4m3[code] = small_float_value(code, AS_E4M3);
}

INLINE void scale_values(float *restrict values, const float *restrict scale, const float *restrict minimum,
                         int64_t n) {
    if (minimum) for (int64_t i = 0; i < n; i++) values[i] = values[i] * scale[i] + minimum[i];
    else for (int64_t i = 0; i < n; i++) values[i] *= scale[i];
}

/* Body values of a packet row. */
INLINE void decode_body(DecodePlan *plan, float *restrict values, const uint8_t *row, int64_t r) {
    const Layout *at = plan->at;
    const int64_t n = at->body;
    const float *scale = plan->with.scale ? plan->with.scale + r * plan->with.scale_row : 0;
    const float *minimum = plan->with.minimum ? plan->with.minimum + r * plan->with.minimum_row : 0;
    const uint8_t *restrict codes = plan->codes;
    unpack_planes(at, plan->codes, row);
    if (at->values == INTEGER) {
        const int32_t sign = at->asymmetric ? 0 : 1 << (at->bits - 1);
        const uint8_t lost = (uint8_t)coding_of(at).lost;
        if (at->group_size)
            for (int64_t i = 0; i < n; i++) values[i] = (float)((codes[i] ^ sign) - sign);
        else
            for (int64_t i = 0; i < n; i++)
                values[i] = codes[i] == lost ? as_float(NAN_BITS) : (float)((codes[i] ^ sign) - sign);
    } else {
        for (int64_t i = 0; i < n; i++) values[i] = plan->table[codes[i]];
    }
    if (!at->group_size) {
        scale_values(values, scale, minimum, n);
        return;
    }
    read_group_sides(at, row, plan->e4m3, plan->scale, plan->minimum);
    for (int64_t g = 0, start = 0; g < at->groups; g++, start += at->group_size) {
        const int64_t stop = least(start + at->group_size, n);
        const float of_group = plan->scale[g], low = plan->minimum[g];
        if (at->asymmetric) for (int64_t i = start; i < stop; i++) values[i] = values[i] * of_group + low;
        else for (int64_t i = start; i < stop; i++) values[i] *= of_group;
    }
    if (scale) scale_values(values, scale, 0, n);
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
INLINE void decode_row(DecodePlan *plan, const uint8_t *const *rows, float *out, int add) {
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
    float *restrict sum = plan->sum, *restrict values = plan->values;
    decode_body(plan, sum, rows[0], 0);
    for (int64_t r = 1; r < plan->R; r++) {
        decode_body(plan, values, rows[r], r);
        for (int64_t i = 0; i < n; i++) sum[i] += values[i];
    }
    float *from = sum;
    if (at->outliers) {
        from = add ? plan->full : out;
        move_body((uint8_t *)from, (const uint8_t *)sum, at, plan->with.outlier_index, &plan->pieces, 4, 1);
        add_outliers(at, from, rows, plan->R, 0, plan->with.outlier_index);
    }
    if (add) for (int64_t i = 0; i < H; i++) out[i] = one_nan(out[i] + from[i]);
    else for (int64_t i = 0; i < H; i++) out[i] = one_nan(from[i]);
}

#endif
