/* Decoding rows with AVX-512: sums of R packets, in registers, 64 values at a time. See avx512_decode.h. */
#ifndef LOWBIT_AVX512_SUMS_H
#define LOWBIT_AVX512_SUMS_H

#include "avx512_decode.h"

#ifdef HAS_AVX512

/* Where sums go: rows of out, or scratch. `body`: only these features are written, or null. `whole`: a row whose values
 * less the sums are written, or null. */
typedef struct {
    float *row;
    int64_t row_values, n;
    int add, one_nan;
    const uint64_t *body;
    const float *whole;
} Out;

/* What values are added to. Adding to -0 leaves any number as it is. */
VECTOR void start_sums(const Out *out, int64_t q, int64_t b, __m512 sum[4]) {
    const float *from = out->row + q * out->row_values + BLOCK * b;
    const int64_t left = out->n - BLOCK * b;
    if (!out->add) for (int k = 0; k < 4; k++) sum[k] = _mm512_set1_ps(-0.0f);
    else if (left >= BLOCK) for (int k = 0; k < 4; k++) {
        _mm_prefetch((const char *)(from + 512 + 16 * k), _MM_HINT_T0);
        sum[k] = _mm512_loadu_ps(from + 16 * k);
    }
    else for (int k = 0; k < 4; k++) sum[k] = _mm512_maskz_loadu_ps(first16(left - 16 * k), from + 16 * k);
}

VECTOR void store_sums(const Out *out, int64_t q, int64_t b, __m512 sum[4]) {
    float *to = out->row + q * out->row_values + BLOCK * b;
    if (out->one_nan) for (int k = 0; k < 4; k++) sum[k] = one_nan512(sum[k]);
    if (out->whole) {
        const float *whole = out->whole + BLOCK * b;
        const int64_t left = out->n - BLOCK * b;
        for (int k = 0; k < 4; k++)
            sum[k] = _mm512_sub_ps(_mm512_maskz_loadu_ps(first16(left - 16 * k), whole + 16 * k), sum[k]);
    }
    if (out->n - BLOCK * b >= BLOCK && !out->body) {
        for (int k = 0; k < 4; k++) _mm512_storeu_ps(to + 16 * k, sum[k]);
    } else {
        const uint64_t mask = out->body ? out->body[b] : first64(out->n - BLOCK * b);
        for (int k = 0; k < 4; k++) _mm512_mask_storeu_ps(to + 16 * k, (__mmask16)(mask >> 16 * k), sum[k]);
    }
}

/* Values of the body among 64 features, without scale. What is not body is arbitrary. */
VECTOR void static_values(const Decode512 *plan, const uint8_t *codes, uint64_t mask, int64_t before,
                          const Nibbles *nibbles, const __m512i *e4m3, const __m512 *nibble, const int way, __m512 v[4]) {
    const uint8_t *from = codes + (way == NIBBLES ? before / 2 : before);
    const int64_t count = (int64_t)_mm_popcnt_u64(mask);
    const int64_t nbytes = way == NIBBLES ? (count + (before & 1) + 1) / 2 : count;
    __m512i all;
    /* a whole vector where there is one, which is faster */
    if (from + BLOCK <= codes + plan->readable) all = _mm512_loadu_si512(from);
    else all = _mm512_maskz_loadu_epi8(first64(nbytes), from);
    if (way == NIBBLES) {
        __m512i index[4];
        nibble_codes(all, nibbles, index);
        for (int k = 0; k < 4; k++) v[k] = _mm512_permutexvar_ps(index[k], nibble[0]);
        return;
    }
    if (plan->body.mask) all = _mm512_maskz_expand_epi8(mask, all);
    if (way == E4M3_BYTES) {
        e4m3_values(all, e4m3, v);
        return;
    }
    v[0] = byte_values(_mm512_castsi512_si128(all), nibble, way);
    v[1] = byte_values(_mm512_extracti32x4_epi32(all, 1), nibble, way);
    v[2] = byte_values(_mm512_extracti32x4_epi32(all, 2), nibble, way);
    v[3] = byte_values(_mm512_extracti32x4_epi32(all, 3), nibble, way);
    const __mmask64 lost = _mm512_cmpeq_epi8_mask(all, _mm512_set1_epi8((char)plan->lost));
    if (lost)
        for (int k = 0; k < 4; k++)
            v[k] = _mm512_mask_mov_ps(v[k], (__mmask16)(lost >> 16 * k), _mm512_set1_ps(as_float(NAN_BITS)));
}

/* Sums of `count` rows with static scales, which are read once for all of them. `of_one`: of one packet. */
VECTOR void sum_static_of(const Decode512 *plan, const Out *out, const int count, const int of_one, const int way) {
    const __m512 nibble[2] = {_mm512_loadu_ps(plan->nibble), _mm512_loadu_ps(plan->nibble + 16)};
    const int asymmetric = (int)plan->at->asymmetric;
    __m512i e4m3[4];
    if (way == E4M3_BYTES) load_e4m3(e4m3);
    for (int64_t b = 0; b < blocks_of(out->n); b++) {
        const uint64_t mask = plan->body.mask ? plan->body.mask[b] : first64(out->n - BLOCK * b);
        const int64_t before = plan->body.mask ? plan->body.before[b] : BLOCK * b;
        const Nibbles nibbles = nibbles_of(mask, before & 1);
        __m512 sum[TOGETHER][4];
        if (!of_one) for (int q = 0; q < count; q++) start_sums(out, q, b, sum[q]);
        for (int64_t r = 0; r < (of_one ? 1 : plan->R); r++) {
            __m512 scale[4], minimum[4];
            from_pairs(plan->rank[r].pairs + 128 * b, scale), from_pairs(plan->rank[r].pairs + 128 * b + 64, scale + 2);
            if (asymmetric) {
                from_pairs(plan->rank[r].minimum_pairs + 128 * b, minimum);
                from_pairs(plan->rank[r].minimum_pairs + 128 * b + 64, minimum + 2);
            }
#pragma GCC unroll 4
            for (int q = 0; q < count; q++) {
                __m512 v[4];
                static_values(plan, plan->rank[q * plan->R + r].codes, mask, before, &nibbles, e4m3, nibble, way, v);
                for (int k = 0; k < 4; k++) v[k] = _mm512_mul_ps(v[k], scale[k]);
                if (asymmetric) for (int k = 0; k < 4; k++) v[k] = _mm512_add_ps(v[k], minimum[k]);
                if (of_one && !out->add) {
                    store_sums(out, q, b, v);
                    continue;
                }
                if (of_one) start_sums(out, q, b, sum[q]);
                for (int k = 0; k < 4; k++) sum[q][k] = _mm512_add_ps(sum[q][k], v[k]);
                if (of_one) store_sums(out, q, b, sum[q]);
            }
        }
#pragma GCC unroll 2
        for (int q = 0; !of_one && q < count; q++) store_sums(out, q, b, sum[q]);
    }
}

/* Where a block of 64 is among groups: `group` where these are of whole blocks, `placed` where they fit no vector. */
typedef struct { int64_t block, group; Placed placed; } Where;

/* Numbers of the 4 vectors of a block. */
VECTOR void group_numbers(const float *of_group, const Places *places, Where at, int scales, __m512 v[4]) {
    const int64_t b = at.block, g = at.group;
    if (scales == GROUPS_OF_ANY) {
        placed64(of_group, places, at.placed, v, v + 2);
        return;
    }
    for (int k = 0; k < 4; k++) {
        const int64_t group = scales == GROUPS_OF_16 ? 4 * b + k : scales == GROUPS_OF_32 ? 2 * b + k / 2 : g;
        v[k] = scales == EACH_FP32 ? _mm512_loadu_ps(of_group + BLOCK * b + 16 * k) : _mm512_set1_ps(of_group[group]);
    }
}

/* Values of block b of one rank. Nibbles are looked up in tables that have what values of a group share in them. */
VECTOR void group_values(const Decode512 *plan, const Rank512 *rank, Where at, int64_t left,
                         const Nibbles *nibbles, const __m512i *e4m3, const __m512 *nibble, const int way, const int scales,
                         __m512 v[4]) {
    const int shared = scales == GROUPS_OF_64 ? 4 : scales == GROUPS_OF_32 ? 2 : 1; /* vectors of a group */
    const int asymmetric = (int)plan->at->asymmetric, of_vectors = scales != EACH_FP32 && scales != GROUPS_OF_ANY;
    const int64_t b = at.block;
    __m512 scale[4], minimum[4];
    group_numbers(rank->scale, &plan->places, at, scales, scale);
    if (asymmetric) group_numbers(rank->minimum, &plan->places, at, scales, minimum);
    if (way == NIBBLES) {
        const uint8_t *from = rank->codes + BLOCK / 2 * b;
        __m512i index[4];
        __m256i bytes = left >= BLOCK ? _mm256_loadu_si256((const __m256i *)from)
                                      : _mm256_maskz_loadu_epi8((__mmask32)first64((left + 1) / 2), from);
        nibble_codes(_mm512_castsi256_si512(bytes), nibbles, index);
        __m512 scaled[4];
        for (int k = 0; k < 4 && of_vectors; k += shared) {
            scaled[k] = _mm512_mul_ps(nibble[0], scale[k]);
            if (asymmetric) scaled[k] = _mm512_add_ps(scaled[k], minimum[k]);
        }
        for (int k = 0; k < 4; k++)
            v[k] = _mm512_permutexvar_ps(index[k], of_vectors ? scaled[k / shared * shared] : nibble[0]);
        if (of_vectors) return;
    } else {
        const uint8_t *from = left >= BLOCK ? rank->codes + BLOCK * b : plan->tail + BLOCK * (rank - plan->rank);
        if (way == E4M3_BYTES) e4m3_values(_mm512_loadu_si512(from), e4m3, v);
        else
            for (int k = 0; k < 4; k++)
                v[k] = byte_values(_mm_loadu_si128((const __m128i *)(from + 16 * k)), nibble, way);
    }
    for (int k = 0; k < 4; k++) {
        v[k] = _mm512_mul_ps(v[k], scale[k]);
        if (asymmetric) v[k] = _mm512_add_ps(v[k], minimum[k]);
    }
}

/* The sum of one row of groups, in body order. */
VECTOR void sum_groups(const Decode512 *plan, const Out *out, const int of_one, const int way, const int scales) {
    const int64_t in_group = plan->at->group_size / BLOCK;
    const __m512 nibble[2] = {_mm512_loadu_ps(plan->nibble), _mm512_loadu_ps(plan->nibble + 16)};
    const Nibbles nibbles = nibbles_of(~0ull, 0);
    int64_t blocks_left = in_group;
    Where at = {0, 0, {0, 0}};
    __m512i e4m3[4];
    if (way == E4M3_BYTES) load_e4m3(e4m3);
    for (int64_t b = 0; b < blocks_of(out->n); b++) {
        __m512 sum[4], v[4], scale[4];
        if (!of_one) start_sums(out, 0, b, sum);
        for (int64_t r = 0; r < (of_one ? 1 : plan->R); r++) {
            const Rank512 *rank = &plan->rank[r];
            group_values(plan, rank, at, out->n - BLOCK * b, &nibbles, e4m3, nibble, way, scales, v);
            if (plan->at->prescaled) {
                from_pairs(rank->pairs + 128 * b, scale), from_pairs(rank->pairs + 128 * b + 64, scale + 2);
                for (int k = 0; k < 4; k++) v[k] = _mm512_mul_ps(v[k], scale[k]);
            }
            if (!of_one) for (int k = 0; k < 4; k++) sum[k] = _mm512_add_ps(sum[k], v[k]);
        }
        store_sums(out, 0, b, of_one ? v : sum);
        at.block++;
        if (scales == GROUPS_OF_64 && --blocks_left == 0) at.group++, blocks_left = in_group;
        if (scales == GROUPS_OF_ANY) at.placed = next_block(&plan->places, at.placed);
    }
}

/* One function for each kind of scales, so that each is compiled on its own. */
#define FOR_WAYS(call) \
    switch (plan->way) { \
    case NIBBLES: { enum { WAY = NIBBLES }; call; break; } \
    case SIGNED_BYTES: { enum { WAY = SIGNED_BYTES }; call; break; } \
    case UNSIGNED_BYTES: { enum { WAY = UNSIGNED_BYTES }; call; break; } \
    default: { enum { WAY = E4M3_BYTES }; call; break; } \
    }
#define FOR_WAYS_OF_GROUPS(call) \
    if (plan->way == LEVEL_BYTES) { enum { WAY = LEVEL_BYTES }; call; } \
    else FOR_WAYS(call)
#define SUM_STATIC(name, count, of_one) \
    AVX512 static void name(const Decode512 *plan, const Out *out) { \
        FOR_WAYS(sum_static_of(plan, out, count, of_one, WAY)); \
    }
#define SUM_GROUPS(scales) \
    AVX512 static void sum_groups_##scales(const Decode512 *plan, const Out *out) { \
        if (plan->R == 1 && !out->add) { \
            FOR_WAYS_OF_GROUPS(sum_groups(plan, out, 1, WAY, scales)) \
        } else { \
            FOR_WAYS_OF_GROUPS(sum_groups(plan, out, 0, WAY, scales)) \
        } \
    }
SUM_STATIC(sum_static, 1, 0)
SUM_STATIC(sum_static_of_two, 2, 0)
SUM_STATIC(decode_static_of_four, TOGETHER, 1)
SUM_GROUPS(EACH_FP32)
SUM_GROUPS(GROUPS_OF_16)
SUM_GROUPS(GROUPS_OF_32)
SUM_GROUPS(GROUPS_OF_64)
SUM_GROUPS(GROUPS_OF_ANY)

#endif
#endif
