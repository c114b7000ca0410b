/* Decoding rows with AVX-512: the functions of avx512_decode.h for every kind of layout, put together. */
#ifndef LOWBIT_AVX512_ROWS_H
#define LOWBIT_AVX512_ROWS_H

#include "avx512_decode.h"

#ifdef HAS_AVX512

/* One function for each kind of scales, so that each is compiled on its own. */
#define SUM_CODES(scales) \
    AVX512 static void sum_codes_##scales(const Decode512 *plan, float *out, int add) { \
        switch (plan->table_kind) { \
        case OF_4_BITS: sum_codes(plan, out, add, OF_4_BITS, scales); break; \
        case OF_6_BITS: sum_codes(plan, out, add, OF_6_BITS, scales); break; \
        case OF_7_BITS: sum_codes(plan, out, add, OF_7_BITS, scales); break; \
        case OF_8_BITS: sum_codes(plan, out, add, OF_8_BITS, scales); break; \
        default: sum_codes(plan, out, add, WITH_SIGN, scales); \
        } \
    }
SUM_CODES(EACH_BF16)
SUM_CODES(EACH_FP32)
SUM_CODES(GROUPS_OF_16)
SUM_CODES(GROUPS_OF_32)
SUM_CODES(GROUPS_OF_64)

VECTOR void spread_sums(float *out, const float *sum, const Body *body, int64_t H, int add) {
    for (int64_t b = 0; b < blocks_of(H); b++) {
        const float *from = sum + body->before[b];
        uint64_t mask = body->mask[b];
        for (int k = 0; k < 4; k++, mask >>= 16) {
            float *to = out + BLOCK * b + 16 * k;
            __m512 v = _mm512_maskz_expand_ps((__mmask16)mask, _mm512_loadu_ps(from));
            if (add) {
                v = _mm512_add_ps(_mm512_maskz_loadu_ps((__mmask16)mask, to), v);
                __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
                v = _mm512_mask_mov_ps(v, nan, _mm512_castsi512_ps(_mm512_set1_epi32((int)NAN_BITS)));
            }
            _mm512_mask_storeu_ps(to, (__mmask16)mask, v);
            from += __builtin_popcount((uint32_t)mask & 0xFFFF);
        }
    }
}

AVX512 static void repeat_groups(float *to, const float *of_group, const Layout *at) {
    for (int64_t g = 0, start = 0; g < at->groups; g++, start += at->group_size) {
        const __m512 number = _mm512_set1_ps(of_group[g]);
        const int64_t stop = least(start + at->group_size, at->body);
        for (int64_t i = start; i < stop; i += 16) _mm512_storeu_ps(to + i, number);
    }
}

/* Write the sum of R packet rows into a row of out, or add that of one: the body only. */
AVX512 static void decode_row512(Decode512 *plan, const uint8_t *const *rows, float *out, int add) {
    const Layout *at = plan->at;
    for (int64_t r = 0; r < plan->R; r++) {
        Rank512 *rank = &plan->rank[r];
        FOR_BITS(at->bits, unpack_row((uint8_t *)rank->codes, rows[r], at, BITS));
        if (!at->group_size) continue;
        if (plan->scales != EACH_FP32) {
            read_group_sides(at, rows[r], plan->e4m3, rank->scale, rank->minimum);
        } else {
            read_group_sides(at, rows[r], plan->e4m3, plan->group, plan->group_minimum);
            repeat_groups(rank->scale, plan->group, at);
            if (at->asymmetric) repeat_groups(rank->minimum, plan->group_minimum, at);
        }
    }
    const int in_body_order = at->group_size && at->outliers;
    float *to = in_body_order ? plan->sum : out;
    const int add_here = add && !in_body_order;
    switch (plan->scales) {
    case EACH_BF16: sum_codes_EACH_BF16(plan, to, add_here); break;
    case EACH_FP32: sum_codes_EACH_FP32(plan, to, add_here); break;
    case GROUPS_OF_16: sum_codes_GROUPS_OF_16(plan, to, add_here); break;
    case GROUPS_OF_32: sum_codes_GROUPS_OF_32(plan, to, add_here); break;
    default: sum_codes_GROUPS_OF_64(plan, to, add_here);
    }
    if (in_body_order) spread_sums(out, plan->sum, &plan->body, at->features, add);
}

#endif
#endif
