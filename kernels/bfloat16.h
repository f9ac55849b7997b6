/* bfloat16 in C: the upper half of a float32. */

#include <stdint.h>
#include <string.h>

static inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* A float's bits, whose upper half then is the nearest bfloat16 (ties to even); NaN stays NaN. */
static inline uint32_t rounded(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return x != x ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);
}
