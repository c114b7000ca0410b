/* Decoding rows with AVX-512, put together: codes to bytes, scales, sums, outliers. See avx512_sums.h. */
#ifndef LOWBIT_AVX512_ROWS_H
#define LOWBIT_AVX512_ROWS_H

#include "avx512_sums.h"
#include "moves.h"
#include "trellis.h"

#ifdef HAS_AVX512

/* Sums of the body to the places of their features. */
VECTOR void spread_sums(float *out, const float *sum, const Body *body, int64_t H, int add) {
    for (int64_t b = 0; b < blocks_of(H); b++) {
        const float *from = sum + body->before[b];
        uint64_t mask = body->mask[b];
        for (int k = 0; k < 4; k++, mask >>= 16) {
            float *to = out + BLOCK * b + 16 * k;
            __m512 v = _mm512_maskz_expand_ps((__mmask16)mask, _mm512_loadu_ps(from));
            if (add) v = one_nan512(_mm512_add_ps(_mm512_maskz_loadu_ps((__mmask16)mask, to), v));
            _mm512_mask_storeu_ps(to, (__mmask16)mask, v);
            from += _mm_popcnt_u32((uint32_t)mask & 0xFFFF);
        }
    }
}

/* Numbers of groups to all their values. */
VECTOR void repeat_groups(float *to, const float *of_group, const Layout *at) {
    for (int64_t g = 0, start = 0; g < at->groups; g++, start += at->group_size) {
        const __m512 number = _mm512_set1_ps(of_group[g]);
        const int64_t stop = least(start + at->group_size, at->body);
        for (int64_t i = start; i < stop; i += 16) _mm512_storeu_ps(to + i, number);
    }
}

VECTOR void read_e4m3_scales(const Layout *at, const uint8_t *row, float *scale) {
    const __m512 row_scale = _mm512_set1_ps(bf16_value(load_u16(row + at->row_scale_offset)));
    __m512i table[4];
    load_e4m3(table);
    for (int64_t g = 0; g < at->groups; g += BLOCK) {
        __m512 v[4];
        e4m3_values(_mm512_maskz_loadu_epi8(first64(at->groups - g), row + at->scales_offset + g), table, v);
        for (int k = 0; k < 4; k++) _mm512_storeu_ps(scale + g + 16 * k, _mm512_mul_ps(v[k], row_scale));
    }
}

/* Scales of the groups of a row of one rank. Returns whether they are small, see `tame`. */
AVX512 static int read_groups(const Decode512 *plan, const Rank512 *rank, const uint8_t *row) {
    const Layout *at = plan->at;
    const int each = plan->scales == EACH_FP32;
    float *scale = each ? plan->group : rank->scale, *minimum = each ? plan->group_minimum : rank->minimum;
    if (at->scale_format == SCALE_E4M3) read_e4m3_scales(at, row, scale);
    else read_group_sides(at, row, 0, scale, minimum);
    if (each) repeat_groups(rank->scale, scale, at);
    if (each && at->asymmetric) repeat_groups(rank->minimum, minimum, at);
    return all_small(scale, at->groups) && (!at->asymmetric || all_small(minimum, at->groups));
}

/* Codes of one rank's row: those that are whole bytes, and nibbles, stay where they are, but for the end of a row of
 * groups. */
VECTOR void read_codes(const Decode512 *plan, int64_t index, const uint8_t *row) {
    const Layout *at = plan->at;
    const int64_t left = at->body % BLOCK;
    plan->rank[index].codes = row;
    if (!in_place(at)) {
        uint8_t *codes = plan->codes + index * plan->codes_nbytes;
        FOR_BITS(at->bits, unpack_row(codes, row, at, coding_of(at).is_signed, BITS));
        if (has_trellis(at)) trellis_places(codes, plan->bits, at->group_size, at->body);
        plan->rank[index].codes = codes;
    }
    if (plan->way != NIBBLES && at->group_size && left)
        memcpy(plan->tail + BLOCK * index, plan->rank[index].codes + at->body - left, (size_t)left);
}

/* Sums with static scales, of `count` rows at once. */
VECTOR void decode_static512(Decode512 *plan, const uint8_t *const *rows, int64_t count, float *out,
                             int64_t out_row_values, int add) {
    const Out to = {out, out_row_values, plan->at->features, add, !plan->tame || add, add ? plan->body.mask : 0, 0};
    for (int64_t i = 0; i < count * plan->R; i++) read_codes(plan, i, rows[i]);
    if (count == TOGETHER) decode_static_of_four(plan, &to);
    else if (count == 2) sum_static_of_two(plan, &to);
    else sum_static(plan, &to);
}

/* One row of sums with scales of groups; or of `whole`, if given, less these. */
VECTOR void decode_groups512(Decode512 *plan, const uint8_t *const *rows, float *out, int add, const float *whole) {
    const Layout *at = plan->at;
    int tame = plan->tame && !add;
    for (int64_t r = 0; r < plan->R; r++) {
        read_codes(plan, r, rows[r]);
        tame &= read_groups(plan, &plan->rank[r], rows[r]);
    }
    const Out to = {at->outliers ? plan->sum : out, 0, at->body, add && !at->outliers, !tame, 0, whole};
    switch (plan->scales) {
    case EACH_FP32: sum_groups_EACH_FP32(plan, &to); break;
    case GROUPS_OF_16: sum_groups_GROUPS_OF_16(plan, &to); break;
    case GROUPS_OF_32: sum_groups_GROUPS_OF_32(plan, &to); break;
    case GROUPS_OF_ANY: sum_groups_GROUPS_OF_ANY(plan, &to); break;
    default: sum_groups_GROUPS_OF_64(plan, &to);
    }
    if (at->outliers) spread_sums(out, plan->sum, &plan->body, at->features, add);
}

/* What a packet's row misses of `whole`, where `misses_at_once`. */
INLINE int misses_at_once(const Decode512 *plan) { return plan->at->group_size && !plan->at->outliers; }

AVX512 static void missed_row512(Decode512 *plan, const uint8_t *const *row, const float *whole, float *missed) {
    decode_groups512(plan, row, missed, 0, whole);
}

/* Write the sums of R packet rows, for the first of `left` rows, into rows of out, or add those of one packet. Returns
 * how many it took: with static scales so many that these and the sums fit in registers. `rows`: R for each. */
AVX512 static int64_t decode_rows512(Decode512 *plan, const uint8_t *const *rows, int64_t left, float *out,
                                     int64_t out_row_values, int add) {
    int64_t count = 1;
    if (plan->at->group_size) {
        decode_groups512(plan, rows, out, add, 0);
    } else {
        count = left < 2 ? 1 : plan->R > 1 ? 2 : left < TOGETHER ? 1 : TOGETHER;
        decode_static512(plan, rows, count, out, out_row_values, add);
    }
    for (int64_t q = 0; q < count; q++)
        add_outliers(plan->at, out + q * out_row_values, rows + q * plan->R, plan->R, add, plan->outlier_index);
    return count;
}

#endif
#endif
