/* Levels of a code book with AVX-512: codes of products, 32 at a time, by one table. See avx512_encode.h.
 *
 * Rounded up to units of 2^-15, a product exceeds a threshold that is a whole number of units exactly where it did
 * before. That is 16 bits, saturated, of which the upper 5 say a cell; a cell holds at most one threshold, so that one
 * comparison is left. Code books of other thresholds take the plain way.
 */
#ifndef LOWBIT_AVX512_LEVELS_H
#define LOWBIT_AVX512_LEVELS_H

#include "avx512.h"

#ifdef HAS_AVX512

enum { CELLS = 32, CELL = 65536 / CELLS };

/* threshold: of each cell, counted from 0 up, then from the lowest up. code: of what is not above it, then, from CELLS
 * on, of what is. */
typedef struct {
    int16_t threshold[CELLS];
    uint8_t code[2 * CELLS];
} Levels;

/* Returns whether the thresholds of the code book fit. */
INLINE int fill_levels(Levels *levels, const Layout *at) {
    const int count = (1 << at->bits) - 1;
    for (int k = 0; k < count; k++) {
        const float units = at->thresholds[k] * 0x1p15f;
        if (!(units >= -32767.0f && units <= 32766.0f) || units != (float)(int)units) return 0;
    }
    for (int cell = 0; cell < CELLS; cell++) {
        const int first = (cell < CELLS / 2 ? cell : cell - CELLS) * CELL;
        int below = 0, within = 0, threshold = INT16_MAX;
        for (int k = 0; k < count; k++) {
            const int units = (int)(at->thresholds[k] * 0x1p15f);
            if (units < first) below++;
            else if (units < first + CELL) within++, threshold = units;
        }
        if (within > 1) return 0;
        levels->threshold[cell] = (int16_t)threshold;
        levels->code[cell] = (uint8_t)below, levels->code[cell + CELLS] = (uint8_t)(below + 1);
    }
    return 1;
}

/* Products of 32 values to words: places in `Levels.code`. */
VECTOR __m512i places32(const __m512 product[2], __m512i thresholds) {
    enum { UP = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC };
    const __m512 units = _mm512_set1_ps(0x1p15f);
    __m512i q = _mm512_packs_epi32(_mm512_cvt_roundps_epi32(_mm512_mul_ps(product[0], units), UP),
                                   _mm512_cvt_roundps_epi32(_mm512_mul_ps(product[1], units), UP));
    __m512i cell = _mm512_srli_epi16(q, 11);
    __mmask32 above = _mm512_cmpgt_epi16_mask(q, _mm512_permutexvar_epi16(cell, thresholds));
    return _mm512_mask_add_epi16(cell, above, cell, _mm512_set1_epi16(CELLS));
}

#endif
#endif
