/* What both directions share: bits and floats, and moving a row between all features and the body only.
 *
 * Written so that a compiler vectorises it: plain loops, no branch on data. Everything is inlined into the clones of
 * codec.c, one for each instruction set, and specialised there on `bits` and the input type, constants at the call.
 * Names and meaning follow reference.py; H, K, R, B likewise.
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

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

#define EXPONENT 0x7F800000u
#define NAN_BITS 0x7FC00000u

enum { BLOCK_NBYTES = 64 }; /* rows move in blocks of it; scratch has this much room behind its end */

/* PacketLayout with its properties, field by field as cpu.py fills them in: layout.py alone does the arithmetic. */
typedef struct {
    int64_t features, bits, group_size, outliers;
    int64_t body, codes_nbytes, scales_offset, outliers_offset, row_nbytes;
} Layout;

INLINE float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE uint32_t as_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
INLINE uint16_t load_u16(const uint8_t *from) { uint16_t v; memcpy(&v, from, 2); return v; }
INLINE void store_u16(uint8_t *to, uint16_t v) { memcpy(to, &v, 2); }
INLINE uint32_t load_u32(const uint8_t *from) { uint32_t v; memcpy(&v, from, 4); return v; }
INLINE float bf16_value(uint16_t bits) { return as_float((uint32_t)bits << 16); }

/* Where one block lies in a row of all features, and in a row of the body only, counted in elements. */
typedef struct { int32_t full, body; } Block;

/* The blocks that a row moves in, ascending: a block that runs past the end of its segment (the body features between two
 * outliers) spoils what the next ones put right. One flat list, made once a call, as nested loops over segments
 * of ever other lengths mispredict. Stops before the first segment whose blocks pass `limit`; the caller moves the
 * segments from *rest on. `blocks` holds H / per_block + K + 1. */
INLINE int64_t list_blocks(Block *blocks, const Layout *at, const int64_t *outlier_index, int64_t per_block,
                           int64_t limit, int64_t *rest) {
    int64_t count = 0, start = 0, k = 0;
    for (; k <= at->outliers; k++) {
        int64_t stop = k < at->outliers ? outlier_index[k] : at->features;
        if (stop + per_block > limit) break;
        for (int64_t i = start; i < stop; i += per_block, count++) {
            blocks[count].full = (int32_t)i;
            blocks[count].body = (int32_t)(i - k);
        }
        start = stop + 1;
    }
    *rest = k;
    return count;
}

#endif
