/* Trellis-coded values: see reference_trellis.py. Plain C, a group at a time, and AVX-512, 16 groups side by side: the
 * same sums in the same order.
 */
#ifndef LOWBIT_TRELLIS_H
#define LOWBIT_TRELLIS_H

#include "rows.h"

enum { STATES = 8, LANES = 16 };

/* Of every fourth level, from k on: how many there are, and the thresholds between them. Vectors of these are also
 * loaded from the second on, hence one to spare. */
typedef struct { int count; float level[4][8], threshold[4][8], spare[1]; } Subsets;

INLINE void fill_subsets(Subsets *of, const Layout *at) {
    memset(of, 0, sizeof *of);
    of->count = 1 << (at->bits - 1);
    for (int k = 0; k < 4; k++)
        for (int j = 0; j < of->count; j++) {
            of->level[k][j] = at->levels[4 * j + k];
            if (j + 1 < of->count) of->threshold[k][j] = (at->levels[4 * j + k] + at->levels[4 * j + 4 + k]) / 2;
        }
}

INLINE int subset_of(int state, int bit) { return 2 * ((bit ^ state >> 1 ^ state >> 2) & 1) + (state & 1); }

/* How many thresholds x exceeds. */
INLINE int nearest(const Subsets *of, int k, float x) {
    int near = 0;
    for (int j = 0; j + 1 < of->count; j++) near += x > of->threshold[k][j];
    return near;
}

/* Codes of a group, `x` its values in units of levels. from_high: [n], of which of the two states before each state was
 * the better, a bit a state. */
INLINE void codes_trellis(const Subsets *of, uint8_t *codes, const float *x, uint8_t *from_high, int64_t n) {
    float cost[STATES];
    for (int s = 0; s < STATES; s++) cost[s] = s ? as_float(EXPONENT) : 0.0f;
    for (int64_t t = 0; t < n; t++) {
        float distance[4], following[STATES];
        int high = 0;
        for (int k = 0; k < 4; k++) {
            const float error = x[t] - of->level[k][nearest(of, k, x[t])];
            distance[k] = error * error;
        }
        for (int s = 0; s < STATES; s++) {
            const int first = s >> 1, second = s >> 1 | STATES >> 1;
            const float by_low = cost[first] + distance[subset_of(first, s & 1)];
            const float by_high = cost[second] + distance[subset_of(second, s & 1)];
            high |= (by_high < by_low) << s;
            following[s] = by_high < by_low ? by_high : by_low;
        }
        memcpy(cost, following, sizeof cost);
        from_high[t] = (uint8_t)high;
    }
    int state = 0;
    for (int s = 1; s < STATES; s++)
        if (cost[s] < cost[state]) state = s;
    for (int64_t t = n - 1; t >= 0; t--) {
        const int bit = state & 1, before = state >> 1 | (from_high[t] >> state & 1) << 2;
        codes[t] = (uint8_t)(nearest(of, subset_of(before, bit), x[t]) << 1 | bit);
        state = before;
    }
}

/* Codes of a row's body to the places of their levels, in place. `bits` has room for n + 3 of a group. */
INLINE void trellis_places(uint8_t *restrict codes, uint8_t *restrict bits, int64_t size, int64_t n) {
    memset(bits, 0, 3);
    for (int64_t first = 0; first < n; first += size) {
        const int64_t count = least(size, n - first);
        uint8_t *restrict code = codes + first;
        for (int64_t i = 0; i < count; i++) bits[3 + i] = code[i] & 1;
        for (int64_t i = 0; i < count; i++)
            code[i] = (uint8_t)((code[i] >> 1) * 4 + 2 * (bits[i + 3] ^ bits[i + 1] ^ bits[i]) + bits[i + 2]);
    }
}

#endif
