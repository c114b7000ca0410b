/* The codec for a CPU: encode() and decode_sum(), one pass over the rows each, single-threaded, called with ctypes.
 *
 * Bit-identical to reference.py; rows.h holds the steps and says why. The compiler makes one clone of each entry point
 * for every instruction set, and the loader picks one. Must be built without -ffast-math.
 */
#include "rows.h"

#include <stdlib.h>

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

/* PacketLayout with its properties, field by field as cpu.py fills them in: layout.py alone does the arithmetic. */
typedef struct {
    int64_t features, bits, group_size, outliers;
    int64_t body, codes_nbytes, scales_offset, outliers_offset, row_nbytes;
} Layout;

/* A bad index would write outside the row, so it is worth one pass over K numbers a call. */
static int ascending(const int64_t *index, int64_t K, int64_t H) {
    int64_t last = -1;
    for (int64_t k = 0; k < K; k++) {
        if (index[k] <= last || index[k] >= H) return 0;
        last = index[k];
    }
    return 1;
}

INLINE void encode_rows(const Layout *at, const uint8_t *x, int64_t x_row_nbytes, int64_t T, uint8_t *packet,
                        int64_t packet_row_nbytes, const float *inverse_scale, const int64_t *outlier_index,
                        uint8_t *scratch, int is_bf16, int bits) {
    const int64_t H = at->features, K = at->outliers, n = at->body, element_nbytes = is_bf16 ? 2 : 4;
    uint8_t *compacted = scratch;
    uint32_t *wide = (uint32_t *)(scratch + 4 * H + BLOCK_NBYTES);
    uint8_t *codes = scratch + 2 * (4 * H + BLOCK_NBYTES);
    for (int64_t t = 0; t < T; t++, x += x_row_nbytes, packet += packet_row_nbytes) {
        const uint8_t *body = x;
        if (K) {
            compact(compacted, x, H, K, outlier_index, element_nbytes);
            body = compacted;
        }
        if (bits == 16) {
            store_bf16(packet, body, n, is_bf16);
        } else if (bits == 32) {
            store_fp32(packet, body, n, is_bf16);
        } else {
            uint8_t *to = bits == 8 ? packet : codes;
            if (!at->group_size) {
                codes_static(to, body, inverse_scale, n, is_bf16, bits);
            } else if (is_bf16) {
                for (int64_t i = 0; i < n; i++) wide[i] = element_bits(body, i, 1);
                codes_groups(to, packet + at->scales_offset, wide, n, at->group_size, bits);
            } else {
                codes_groups(to, packet + at->scales_offset, (const uint32_t *)body, n, at->group_size, bits);
            }
            if (bits == 4) {
                codes[n] = 0; /* the nibble behind an odd tail */
                pack_nibbles(packet, codes, at->codes_nbytes);
            }
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
    if (!ascending(outlier_index, at->outliers, at->features)) return BAD_OUTLIER_INDEX;
    uint8_t *scratch = malloc((size_t)(3 * (4 * at->features + BLOCK_NBYTES)));
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

/* Add the body of one packet row to `sum`, or start it. */
INLINE void add_body(float *sum, const uint8_t *row, const Layout *at, const float *scale, uint8_t *unpacked, int bits,
                     int first) {
    const uint8_t *codes = row;
    if (bits == 16) {
        add_bf16(sum, row, at->body, first);
        return;
    }
    if (bits == 32) {
        add_fp32(sum, row, at->body, first);
        return;
    }
    if (bits == 4) {
        unpack_nibbles(unpacked, row, at->codes_nbytes);
        codes = unpacked;
    }
    if (at->group_size)
        add_groups(sum, codes, row + at->scales_offset, at->body, at->group_size, bits, first);
    else
        add_static(sum, codes, scale, at->body, bits, first);
}

INLINE void decode_rows(const Layout *at, const uint8_t *const *packets, const int64_t *packet_row_nbytes, int64_t R,
                        int64_t T, float *out, int64_t out_row_values, const float *scale, int64_t scale_row_values,
                        const int64_t *outlier_index, uint8_t *scratch, int bits) {
    const int64_t H = at->features, K = at->outliers;
    float *sum = (float *)scratch, *outliers = (float *)(scratch + 4 * H + BLOCK_NBYTES);
    uint8_t *unpacked = scratch + 2 * (4 * H + BLOCK_NBYTES);
    for (int64_t t = 0; t < T; t++) {
        for (int64_t r = 0; r < R; r++) {
            const uint8_t *row = packets[r] + t * packet_row_nbytes[r];
            const float *scale_of_r = scale ? scale + r * scale_row_values : 0;
            if (r == 0) {
                add_body(sum, row, at, scale_of_r, unpacked, bits, 1);
                add_bf16(outliers, row + at->outliers_offset, K, 1);
            } else {
                add_body(sum, row, at, scale_of_r, unpacked, bits, 0);
                add_bf16(outliers, row + at->outliers_offset, K, 0);
            }
        }
        expand(out + t * out_row_values, sum, outliers, H, K, outlier_index);
    }
}

/* Write the sum of R packets, in rank order, into out (T rows of fp32). Packet strides are in bytes, one a packet; those
 * of out and scale in values. `scale` holds R rows of static scales, or is null. */
EXPORT CLONES int lowbit_decode_sum(const Layout *at, const uint8_t *const *packets, const int64_t *packet_row_nbytes,
                                    int64_t R, int64_t T, float *out, int64_t out_row_values, const float *scale,
                                    int64_t scale_row_values, const int64_t *outlier_index) {
    if (!ascending(outlier_index, at->outliers, at->features)) return BAD_OUTLIER_INDEX;
    uint8_t *scratch = malloc((size_t)(3 * (4 * at->features + BLOCK_NBYTES)));
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
