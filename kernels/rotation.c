/* ST-RoPE on the CPU in one pass: each channel pair is read, turned and written once.
 *
 * kernels/c_rotation.py compiles this for the machine it runs on. The arithmetic is a complex
 * product's in float32, rounded where PyTorch rounds it: the compiler may not fuse multiplication
 * and addition (-ffp-contract=off).
 */

#include <stdint.h>
#include <string.h>

#include "bfloat16.h"

/* What c_rotation.py fills in, field by field, each eight bytes wide. B clips of 1 + T*N tokens (the
 * CLS first, then N patches of each of T frames), H heads, P pairs. */
typedef struct {
    const float *spatial, *temporal;
    int64_t clip_factors; /* floats from one clip's spatial factors to the next's; 0: one for all */
    int64_t clips, frames, patches, heads, pairs;
    int64_t bytes;        /* of a number: 4 is float32, 2 is bfloat16 */
    int64_t sign;         /* -1 turns back */
    int64_t num_turned;   /* so many of the parts are turned, the others copied */
    int64_t num_parts;
    struct {
        const char *x;
        char *out;              /* may be x itself */
        int64_t from[3], to[3]; /* bytes from one clip, token, head to the next, in x and in out */
    } parts[];
} Rotation;

/* The loops below are safe in place, which is what `omp simd` vouches for. */
static inline void turn_float32(const float *x, float *out, const float *cos, const float *sin,
                                int64_t pairs) {
#pragma omp simd
    for (int64_t p = 0; p < pairs; ++p) {
        float even = x[2 * p], odd = x[2 * p + 1];
        out[2 * p] = even * cos[p] - odd * sin[p];
        out[2 * p + 1] = even * sin[p] + odd * cos[p];
    }
}

/* A pair of bfloat16 is one word, the even channel in its lower half: nothing to shuffle. */
static inline void turn_bfloat16(const uint32_t *x, uint32_t *out, const float *cos,
                                 const float *sin, int64_t pairs) {
#pragma omp simd
    for (int64_t p = 0; p < pairs; ++p) {
        float even = float_of(x[p] << 16), odd = float_of(x[p] & 0xffff0000u);
        out[p] = rounded(even * cos[p] - odd * sin[p]) >> 16 |
                 (rounded(even * sin[p] + odd * cos[p]) & 0xffff0000u);
    }
}

/* The factor of a token: the product of its patch's and its frame's, turned back if sign is -1. */
static inline void multiply(const float *space, const float *time, float *cos, float *sin,
                            float sign, int64_t pairs) {
#pragma omp simd
    for (int64_t p = 0; p < pairs; ++p) {
        float a = space[2 * p], b = space[2 * p + 1], c = time[2 * p], d = time[2 * p + 1];
        cos[p] = a * c - b * d;
        sin[p] = sign * (a * d + b * c);
    }
}

/* Threads are started from PyTorch's own grain size on. */
void rotate(const Rotation *rotation) {
    const Rotation s = *rotation;
    const int64_t tokens = 1 + s.frames * s.patches, all = s.clips * tokens;
#pragma omp parallel for if (all * s.num_parts * s.heads * s.pairs * 2 > 32768)
    for (int64_t i = 0; i < all; ++i) {
        const int64_t clip = i / tokens, token = i % tokens;
        float cos[s.pairs], sin[s.pairs];
        if (token > 0) {
            const int64_t frame = (token - 1) / s.patches, patch = (token - 1) % s.patches;
            multiply(s.spatial + clip * s.clip_factors + patch * s.pairs * 2,
                     s.temporal + frame * s.pairs * 2, cos, sin, s.sign, s.pairs);
        }
        for (int64_t r = 0; r < s.num_parts; ++r) {
            const int64_t *from = rotation->parts[r].from, *to = rotation->parts[r].to;
            const char *x = rotation->parts[r].x + clip * from[0] + token * from[1];
            char *out = rotation->parts[r].out + clip * to[0] + token * to[1];
            for (int64_t h = 0; h < s.heads; ++h, x += from[2], out += to[2]) {
                if (token == 0 || r >= s.num_turned)
                    memmove(out, x, s.pairs * 2 * s.bytes);
                else if (s.bytes == 4)
                    turn_float32((const float *)x, (float *)out, cos, sin, s.pairs);
                else
                    turn_bfloat16((const uint32_t *)x, (uint32_t *)out, cos, sin, s.pairs);
            }
        }
    }
}
