/* Moving rows between all features and the body only, and codes between bytes and planes. Plain loops. See rows.h. */
#ifndef LOWBIT_MOVES_H
#define LOWBIT_MOVES_H

#include "rows.h"

enum { PIECE_NBYTES = 64 }; /* rows move in pieces of it; scratch has this much room behind its end */

/* Where one piece lies in a row of all features, and in a row of the body only, counted in elements. */
typedef struct { int32_t full, body; } Piece;

/* The pieces that a row moves in, ascending: one that runs past the end of its segment (the body features between two
 * outliers) spoils what the next ones put right. One flat list, as nested loops over segments of ever other lengths
 * mispredict. Stops before the first segment whose pieces pass H; the caller moves those from `rest` on. */
typedef struct { Piece *piece; int64_t count, rest, of; } Pieces;

INLINE int64_t most_pieces(const Layout *at) { return at->features / (PIECE_NBYTES / 4) + at->outliers + 1; }

INLINE void list_pieces(Pieces *list, const Layout *at, const int64_t *outlier_index, int64_t element_nbytes) {
    const int64_t in_piece = PIECE_NBYTES / element_nbytes;
    int64_t count = 0, start = 0, k = 0;
    if (list->of == element_nbytes) return;
    for (; k <= at->outliers; k++) {
        int64_t stop = k < at->outliers ? outlier_index[k] : at->features;
        if (stop + in_piece > at->features) break;
        for (int64_t i = start; i < stop; i += in_piece, count++) {
            list->piece[count].full = (int32_t)i;
            list->piece[count].body = (int32_t)(i - k);
        }
        start = stop + 1;
    }
    list->count = count, list->rest = k, list->of = element_nbytes;
}

/* Body elements of a row of all features, without the outliers between them; or back, where `expand`. */
INLINE void move_body(uint8_t *restrict to, const uint8_t *restrict from, const Layout *at,
                      const int64_t *outlier_index, Pieces *list, int64_t element_nbytes, int expand) {
    list_pieces(list, at, outlier_index, element_nbytes);
    for (int64_t i = 0; i < list->count; i++) {
        int64_t full = list->piece[i].full * element_nbytes, body = list->piece[i].body * element_nbytes;
        memcpy(to + (expand ? full : body), from + (expand ? body : full), PIECE_NBYTES);
    }
    for (int64_t k = list->rest; k <= at->outliers; k++) {
        int64_t start = k ? outlier_index[k - 1] + 1 : 0, stop = k < at->outliers ? outlier_index[k] : at->features;
        int64_t full = start * element_nbytes, body = (start - k) * element_nbytes;
        memcpy(to + (expand ? full : body), from + (expand ? body : full), (size_t)((stop - start) * element_nbytes));
    }
}

/* Bits `shift` and up of codes, one to a byte, to a plane of `width`. What follows the n codes is 0. */
INLINE void pack_plane(uint8_t *restrict to, const uint8_t *restrict codes, int64_t n, int width, int shift) {
    if (width == 8) {
        memcpy(to, codes, (size_t)n);
    } else if (width == 4) {
        for (int64_t j = 0; j < (n + 1) / 2; j++) {
            uint32_t pair = (uint32_t)load_u16(codes + 2 * j) >> shift;
            to[j] = (uint8_t)((pair & 0xF) | (pair >> 4 & 0xF0));
        }
    } else if (width == 2) {
        for (int64_t j = 0; j < (n + 3) / 4; j++) {
            uint32_t four = load_u32(codes + 4 * j) >> shift & 0x03030303u;
            four |= four >> 6;
            to[j] = (uint8_t)(four | four >> 12);
        }
    } else {
        for (int64_t j = 0; j < (n + 7) / 8; j++)
            to[j] = (uint8_t)((load_u64(codes + 8 * j) >> shift & 0x0101010101010101u) * 0x0102040810204080u >> 56);
    }
}

INLINE void pack_planes(const Layout *at, uint8_t *restrict packet, const uint8_t *restrict codes) {
    for (int64_t p = 0, shift = 0; p < at->planes; shift += at->plane_widths[p], p++)
        pack_plane(packet + at->plane_offsets[p], codes, at->body, (int)at->plane_widths[p], (int)shift);
}

/* A plane to codes, one to a byte, or into the bits `shift` and up of them. Writes whole bytes' worth. */
INLINE void unpack_plane(uint8_t *restrict codes, const uint8_t *restrict from, int64_t n, int width, int shift) {
    if (width == 8) {
        memcpy(codes, from, (size_t)n);
    } else if (width == 4) { /* always the first plane */
        for (int64_t j = 0; j < (n + 1) / 2; j++)
            store_u16(codes + 2 * j, (uint16_t)((from[j] & 0xF) | (from[j] & 0xF0) << 4));
    } else if (width == 2) {
        for (int64_t j = 0; j < (n + 3) / 4; j++) {
            uint32_t byte = from[j], four = (byte | byte << 6 | byte << 12 | byte << 18) & 0x03030303u;
            store_u32(codes + 4 * j, shift ? load_u32(codes + 4 * j) | four << shift : four);
        }
    } else {
        for (int64_t j = 0; j < (n + 7) / 8; j++) {
            uint64_t eight = from[j] * 0x0101010101010101u & 0x8040201008040201u;
            eight = (eight + 0x7F7F7F7F7F7F7F7Fu) >> 7 & 0x0101010101010101u;
            store_u64(codes + 8 * j, load_u64(codes + 8 * j) | eight << shift);
        }
    }
}

INLINE void unpack_planes(const Layout *at, uint8_t *restrict codes, const uint8_t *restrict row) {
    for (int64_t p = 0, shift = 0; p < at->planes; shift += at->plane_widths[p], p++)
        unpack_plane(codes, row + at->plane_offsets[p], at->body, (int)at->plane_widths[p], (int)shift);
}

/* The zero bytes between sections. */
INLINE void clear_gaps(const Layout *at, uint8_t *packet) {
    if (at->scale_format != SCALE_E8M0) memset(packet + at->codes_nbytes, 0, (size_t)(at->codes_nbytes & 1));
    memset(packet + at->scales_end, 0, (size_t)(at->minimums_offset - at->scales_end));
}

/* Outliers of a row to their section: first as they are, then, without gaps between them, to bf16 with one NaN. */
INLINE void store_outliers(const Layout *at, uint8_t *restrict packet, const uint8_t *restrict x, int is_bf16,
                           const int64_t *outlier_index) {
    for (int64_t start = 0; start < at->outliers; start += BLOCK) {
        const int64_t count = least(BLOCK, at->outliers - start), *restrict index = outlier_index + start;
        uint8_t *restrict to = packet + at->outliers_offset + 2 * start;
        uint32_t bits[BLOCK];
        if (is_bf16) {
            for (int64_t k = 0; k < count; k++) store_u16(to + 2 * k, load_u16(x + 2 * index[k]));
            for (int64_t k = 0; k < count; k++) store_u16(to + 2 * k, one_nan_bf16(load_u16(to + 2 * k)));
        } else {
            for (int64_t k = 0; k < count; k++) bits[k] = load_u32(x + 4 * index[k]);
            for (int64_t k = 0; k < count; k++) store_u16(to + 2 * k, bf16_bits(bits[k]));
        }
    }
}

/* Outliers of R packets, added in order, to their places; added to what is there where `add`. */
INLINE void add_outliers(const Layout *at, float *restrict out, const uint8_t *const *rows, int64_t R, int add,
                         const int64_t *outlier_index) {
    for (int64_t start = 0; start < at->outliers; start += BLOCK) {
        const int64_t count = least(BLOCK, at->outliers - start), *restrict index = outlier_index + start;
        float sum[BLOCK];
        if (add) for (int64_t k = 0; k < count; k++) sum[k] = out[index[k]];
        for (int64_t r = 0; r < R; r++) {
            const uint8_t *restrict from = rows[r] + at->outliers_offset + 2 * start;
            if (r || add) for (int64_t k = 0; k < count; k++) sum[k] += bf16_value(load_u16(from + 2 * k));
            else for (int64_t k = 0; k < count; k++) sum[k] = bf16_value(load_u16(from + 2 * k));
        }
        for (int64_t k = 0; k < count; k++) sum[k] = one_nan(sum[k]);
        for (int64_t k = 0; k < count; k++) out[index[k]] = sum[k];
    }
}

#endif
