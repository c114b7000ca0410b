/* What all parts share: a packet row's layout as C sees it, bits and floats.
 *
 * Names and meaning follow layout.py and reference.py; H features, K outliers, R ranks, T tokens, G groups, n values of
 * the body (all features that are not outliers).
 */
#ifndef LOWBIT_ROWS_H
#define LOWBIT_ROWS_H

#include <float.h>
#include <stdint.h>
#include <string.h>

#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0
#error "fp32 arithmetic must be done in fp32, or the codec is not bit-exact"
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packets are little endian; this codec reads them without swapping bytes"
#endif
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline, unused))
#else
#define INLINE static inline
#endif

#define EXPONENT 0x7F800000u
#define SIGN 0x80000000u
#define NAN_BITS 0x7FC00000u
#define NAN_BF16 0x7FC0
#define SCALE_FLOOR 0x1p-100f /* smaller scales are raised to it, so that 1 / scale is finite */

enum { INTEGER, E4M3, E2M1, LM, NF4, TC };   /* Layout.values; from LM on those with a code book */
enum { SCALE_BF16, SCALE_E4M3, SCALE_E8M0 }; /* Layout.scale_format */
enum { BLOCK = 64 };   /* values; scratch rows have this many to spare behind their end */
enum { TOGETHER = 4 }; /* rows that are worked on together, so that static numbers are read once for all of them */

/* PacketLayout with its properties, field by field as cpu.py fills them in: layout.py alone does the arithmetic. */
typedef struct {
    int64_t features, bits, group_size, outliers, values, scale_format, asymmetric, prescaled;
    int64_t body, groups, codes_nbytes, row_scale_offset, scales_offset, scales_end, minimums_offset, outliers_offset;
    int64_t row_nbytes, planes, plane_widths[3], plane_offsets[3];
    float levels[32], thresholds[16]; /* of the code book, where there is one, then infinite thresholds (not of TC) */
} Layout;

/* The numbers known to both ends, in body order: [n] for encoding, [R, n] for decoding; null where of no use. `scale`
 * is the inverse where values are encoded. Rows are apart by so many values. */
typedef struct {
    const float *scale, *minimum;
    int64_t scale_row, minimum_row;
    const int64_t *outlier_index;
} Static;

INLINE int has_levels(const Layout *at) { return at->values >= LM; }
INLINE int has_trellis(const Layout *at) { return at->values == TC; }

INLINE float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE uint32_t as_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
INLINE uint16_t load_u16(const uint8_t *from) { uint16_t v; memcpy(&v, from, 2); return v; }
INLINE uint32_t load_u32(const uint8_t *from) { uint32_t v; memcpy(&v, from, 4); return v; }
INLINE uint64_t load_u64(const uint8_t *from) { uint64_t v; memcpy(&v, from, 8); return v; }
INLINE void store_u16(uint8_t *to, uint16_t v) { memcpy(to, &v, 2); }
INLINE void store_u32(uint8_t *to, uint32_t v) { memcpy(to, &v, 4); }
INLINE void store_u64(uint8_t *to, uint64_t v) { memcpy(to, &v, 8); }

INLINE float bf16_value(uint16_t bits) { return as_float((uint32_t)bits << 16); }
INLINE float one_nan(float x) { return x != x ? as_float(NAN_BITS) : x; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Nearest even; one NaN. */
INLINE uint16_t bf16_bits(uint32_t bits) {
    uint16_t rounded = (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
    return (bits & ~SIGN) > EXPONENT ? NAN_BF16 : rounded;
}

INLINE uint16_t one_nan_bf16(uint16_t bits) { return (uint16_t)(bits & 0x7FFF) > 0x7F80 ? NAN_BF16 : bits; }

/* fp32 bits of element i of a row of fp32 or bf16. */
INLINE uint32_t element_bits(const uint8_t *row, int64_t i, int is_bf16) {
    return is_bf16 ? (uint32_t)load_u16(row + 2 * i) << 16 : load_u32(row + 4 * i);
}

/* Scratch of one call, cut from one allocation: a plan takes its parts from null first, which only counts. */
typedef struct { uint8_t *base; int64_t used; } Arena;

INLINE void *take(Arena *from, int64_t count, int64_t element_nbytes) {
    uint8_t *part = from->base ? from->base + from->used : 0;
    from->used += ((count + BLOCK) * element_nbytes + 63) / 64 * 64;
    return part;
}

#endif
