/* The codec for a CPU: encode() and decode_sum(), one pass over the rows each, single-threaded, called with ctypes.
 *
 * Bit-identical to reference.py; encode_rows.h and decode_rows.h hold the steps and say why. The compiler makes one clone
 * of each entry point for every instruction set, and the loader picks one. Must be built without -ffast-math.
 */
#include <stdlib.h>

#include "decode_rows.h"
#include "encode_rows.h"

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

enum { DONE = 0, NO_MEMORY = 1, BAD_OUTLIER_INDEX = 2 };

/* A bad index would write outside the row, so it is worth one pass over K numbers a call. */
static int ascending(const int64_t *index, int64_t K, int64_t H) {
    int64_t last = -1;
    for (int64_t k = 0; k < K; k++) {
        if (index[k] <= last || index[k] >= H) return 0;
        last = index[k];
    }
    return 1;
}

/* Bytes of a scratch row of n elements, whole blocks, with a block to spare. */
static int64_t row_of(int64_t n, int64_t element_nbytes) {
    return (n * element_nbytes / BLOCK_NBYTES + 2) * BLOCK_NBYTES;
}

INLINE void encode_rows(const Layout *at, const uint8_t *x, int64_t x_row_nbytes, int64_t T, uint8_t *packet,
                        int64_t packet_row_nbytes, const float *inverse_scale, const int64_t *outlier_index,
                        uint8_t *scratch, int is_bf16, int bits) {
    const int64_t K = at->outliers, n = at->body, element_nbytes = is_bf16 ? 2 : 4;
    const int static_scales = bits <= 8 && !at->group_size;
    uint8_t *compacted = scratch, *wide = compacted + row_of(at->features, 4), *codes = wide + row_of(at->features, 4);
    float *even = (float *)wide, *odd = even + (n + 1) / 2; /* wide itself serves groups only */
    Block *blocks = (Block *)(codes + row_of(at->features, 1));
    int64_t rest = 0, count = 0;
    if (K) count = list_blocks(blocks, at, outlier_index, BLOCK_NBYTES / element_nbytes, at->features, &rest);
    if (bits == 4 && static_scales) {
        for (int64_t j = 0; j < n / 2; j++) even[j] = inverse_scale[2 * j], odd[j] = inverse_scale[2 * j + 1];
        if (n % 2) even[n / 2] = inverse_scale[n - 1];
    }
    for (int64_t t = 0; t < T; t++, x += x_row_nbytes, packet += packet_row_nbytes) {
        const uint8_t *body = x;
        uint8_t *to = bits == 4 ? codes : packet;
        int packed = bits != 4;
        if (K) {
            compact(compacted, x, at, outlier_index, blocks, count, rest, element_nbytes);
            body = compacted;
        }
        if (bits == 16) {
            store_bf16(packet, body, n, is_bf16);
        } else if (bits == 32) {
            store_fp32(packet, body, n, is_bf16);
        } else if (!static_scales) {
            if (is_bf16) {
                for (int64_t i = 0; i < n; i++) {
                    uint32_t v = element_bits(body, i, 1);
                    memcpy(wide + 4 * i, &v, 4);
                }
                body = wide;
            }
            codes_groups(to, packet + at->scales_offset, body, n, at->group_size, bits);
        } else if (!all_finite(body, n, is_bf16)) {
            codes_static(to, body, inverse_scale, n, is_bf16, bits, 0);
        } else if (bits == 4) {
            pack_static_pairs(packet, body, even, odd, n, is_bf16);
            packed = 1;
        } else {
            codes_static(to, body, inverse_scale, n, is_bf16, bits, 1);
        }
        if (!packed) {
            codes[n] = 0; /* the nibble behind an odd tail */
            pack_nibbles(packet, codes, at->codes_nbytes);
        }
        memset(packet + at->codes_nbytes, 0, (size_t)(at->scales_offset - at->codes_nbytes));
        uint8_t *end = packet + at->outliers_offset;
        for (int64_t k = 0; k < K; k++, end += 2) store_u16(end, bf16_bits(element_bits(x, outlier_index[k], is_bf16)));
        memset(end, 0, (size_t)(packet + at->row_nbytes - end));
    }
}

/* Write x (T rows of fp32 or bf16) into packet. Strides are in bytes. Pointers a layout has no use for may be null. */
EXPORT CLONES int lowbit_encode(const Layout *at, const uint8_t *x, int64_t x_row_nbytes, int is_bf16, int64_t T,
                                uint8_t *packet, int64_t packet_row_nbytes, const float *inverse_scale,
                                const int64_t *outlier_index) {
    const int64_t H = at->features, max_blocks = H / (BLOCK_NBYTES / 4) + at->outliers + 1;
    if (!ascending(outlier_index, at->outliers, H)) return BAD_OUTLIER_INDEX;
    /* The two halves of the inverse scales need a spare block each. */
    uint8_t *scratch = malloc((size_t)(2 * row_of(H, 4) + 2 * row_of(H, 1) + max_blocks * (int64_t)sizeof(Block)));
    if (!scratch) return NO_MEMORY;
#define ROWS(is_bf16, bits) \
    encode_rows(at, x, x_row_nbytes, T, packet, packet_row_nbytes, inverse_scale, outlier_index, scratch, is_bf16, bits)
    if (at->bits == 4 && is_bf16) ROWS(1, 4);
    else if (at->bits == 4) ROWS(0, 4);
    else if (at->bits == 8 && is_bf16) ROWS(1, 8);
    else if (at->bits == 8) ROWS(0, 8);
    else if (at->bits == 16 && is_bf16) ROWS(1, 16);
    else if (at->bits == 16) ROWS(0, 16);
    else if (is_bf16) ROWS(1, 32);
    else ROWS(0, 32);
#undef ROWS
    free(scratch);
    return DONE;
}

/* What decode_rows prepares once a call. */
typedef struct {
    const uint8_t *scale; /* R rows of static scales of all features, bf16 where `narrow`, else fp32 */
    int64_t scale_row_nbytes, R, count;
    const Block *blocks;
    uint8_t *unpacked, *expanded;
    int narrow, small;
} Prepared;

/* Add the body of packet row `row` of rank r to `sum`, or start it. With static scales, `sum` is of all features, else of
 * the body. Returns whether the sum may hold a NaN, of whichever bits. */
INLINE int add_row(float *sum, const uint8_t *row, int64_t r, const Layout *at, const Prepared *with, int bits,
                   int first) {
    if (bits == 16) {
        add_bf16(sum, row, at->body, first);
        return 1;
    }
    if (bits == 32) {
        add_fp32(sum, row, at->body, first);
        return 1;
    }
    const uint8_t *codes = with->unpacked, *scale = with->scale + r * with->scale_row_nbytes;
    if (bits == 4)
        unpack_nibbles(with->unpacked, row, at->codes_nbytes);
    else
        unpack_bytes(with->unpacked, row, at->codes_nbytes);
    if (at->group_size) {
        add_groups(sum, codes, row + at->scales_offset, at->body, at->group_size, bits, first);
        return !are_small(row + at->scales_offset, (at->outliers_offset - at->scales_offset) / 2, with->R);
    }
    const int with_nan = any_zero(codes, at->body);
    if (at->outliers) {
        expand_codes(with->expanded, codes, with->blocks, with->count);
        codes = with->expanded;
    }
    if (!with->narrow)
        add_static(sum, codes, scale, at->features, bits, 0, 1, first);
    else if (with_nan)
        add_static(sum, codes, scale, at->features, bits, 1, 1, first);
    else
        add_static(sum, codes, scale, at->features, bits, 1, 0, first);
    return with_nan || !with->small;
}

INLINE void decode_rows(const Layout *at, const uint8_t *const *packets, const int64_t *packet_row_nbytes, int64_t R,
                        int64_t T, float *out, int64_t out_row_values, const float *scale, int64_t scale_row_values,
                        const int64_t *outlier_index, uint8_t *scratch, int bits) {
    const int64_t H = at->features, K = at->outliers;
    const int of_body = K && at->group_size; /* sums of groups are made in body order, and expanded at the end */
    uint8_t *unpacked = scratch, *expanded = unpacked + row_of(H, 1);
    float *sum = (float *)(expanded + row_of(H, 1)), *outliers = (float *)((uint8_t *)sum + row_of(H, 4));
    Block *blocks = (Block *)((uint8_t *)outliers + row_of(K, 4));
    uint8_t *full_scale = (uint8_t *)(blocks + H / (BLOCK_NBYTES / 4) + K + 1);
    int64_t rest = 0;
    Prepared with = {full_scale, 0, R, 0, blocks, unpacked, expanded, 1, 1};
    if (of_body) with.count = list_blocks(blocks, at, outlier_index, BLOCK_NBYTES / 4, H, &rest);
    if (scale) {
        for (int64_t r = 0; r < R; r++) with.narrow &= are_bf16(scale + r * scale_row_values, at->body);
        with.scale_row_nbytes = H * (with.narrow ? 2 : 4);
        for (int64_t r = 0; r < R; r++)
            expand_scale(full_scale + r * with.scale_row_nbytes, scale + r * scale_row_values, at, outlier_index,
                         with.narrow);
        with.small = with.narrow && are_small(full_scale, R * H, R);
        with.count = list_blocks(blocks, at, outlier_index, BLOCK_NBYTES, H + BLOCK_NBYTES, &rest);
    }
    for (int64_t t = 0; t < T; t++) {
        float *out_row = out + t * out_row_values, *to = of_body ? sum : out_row;
        int maybe_nan = 0;
        for (int64_t r = 0; r < R; r++) {
            const uint8_t *row = packets[r] + t * packet_row_nbytes[r];
            if (r == 0) {
                maybe_nan |= add_row(to, row, r, at, &with, bits, 1);
                add_bf16(outliers, row + at->outliers_offset, K, 1);
            } else {
                maybe_nan |= add_row(to, row, r, at, &with, bits, 0);
                add_bf16(outliers, row + at->outliers_offset, K, 0);
            }
        }
        if (of_body) expand_sums(out_row, sum, at, outlier_index, blocks, with.count, rest);
        if (maybe_nan) one_nan_row(out_row, H);
        for (int64_t k = 0; k < K; k++) out_row[outlier_index[k]] = one_nan(outliers[k]);
    }
}

/* Write the sum of R packets, in rank order, into out (T rows of fp32). Packet strides are in bytes, one a packet; those
 * of out and scale in values. `scale` holds R rows of static scales, or is null. */
EXPORT CLONES int lowbit_decode_sum(const Layout *at, const uint8_t *const *packets, const int64_t *packet_row_nbytes,
                                    int64_t R, int64_t T, float *out, int64_t out_row_values, const float *scale,
                                    int64_t scale_row_values, const int64_t *outlier_index) {
    const int64_t H = at->features, K = at->outliers, max_blocks = H / (BLOCK_NBYTES / 4) + K + 1;
    if (!ascending(outlier_index, K, H)) return BAD_OUTLIER_INDEX;
    uint8_t *scratch = malloc((size_t)(2 * row_of(H, 1) + row_of(H, 4) + row_of(K, 4) +
                                       max_blocks * (int64_t)sizeof(Block) + (scale ? 4 * R * H : 0)));
    if (!scratch) return NO_MEMORY;
#define ROWS(bits) \
    decode_rows(at, packets, packet_row_nbytes, R, T, out, out_row_values, scale, scale_row_values, outlier_index, \
                scratch, bits)
    if (at->bits == 4) ROWS(4);
    else if (at->bits == 8) ROWS(8);
    else if (at->bits == 16) ROWS(16);
    else ROWS(32);
#undef ROWS
    free(scratch);
    return DONE;
}

/* setuptools expects a module here. It is loaded with ctypes, so that it needs neither Python.h nor a Python version. */
EXPORT void *PyInit__codec(void) { return 0; }
