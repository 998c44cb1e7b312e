/* Deformable sampling on the CPU: every (pixel, tap, group) reads one bilinear sample of its group's channels.
 *
 * Layouts are channels-last and dense:
 *   x             (B, H, W, C)           C = G * c, group g owns the channels [g*c, (g+1)*c); float or bfloat16
 *   displacement  (B, H, W, G, K, 2)     (dy, dx) from the pixel, in pixels
 *   weight        (B, H, W, G, K)        multiplies the sample
 * and by mode
 *   TAPS          y (B, H, W, K, C)      every tap by itself
 *   SUM           y (B, H, W, C)         the taps added up
 *   DOT           relevance (B, H, W, K) every tap's scalar product with query (B, H, W, C)
 * Outside the image every corner counts as zero, as in DCNv2.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define MAX_CHANNELS 256 /* of a group; the caller checks */

enum { TAPS, SUM, DOT };

typedef struct {
    int64_t H, W, G, K, C;
} Shape;

typedef struct {
    float row, column;
    const float *shift;  /* (G, K, 2) of this pixel */
    const float *weight; /* (G, K) of this pixel */
} Place;

typedef struct {
    int64_t corner[4]; /* offsets of the four corners into one (H, W, C) image; 0 where the corner is outside */
    float weight[4];   /* bilinear weights; 0 where the corner is outside */
    float slope_y[4];  /* d weight / d dy */
    float slope_x[4];  /* d weight / d dx */
} Bilinear;

/* Returns 0 when all four corners lie outside. */
INLINE int locate(const Place *at, int64_t n, const Shape *s, Bilinear *b)
{
    const float py = at->row + at->shift[2 * n], px = at->column + at->shift[2 * n + 1];
    if (!(py > -1.0f && py < (float)s->H && px > -1.0f && px < (float)s->W)) return 0;
    const float fy = floorf(py), fx = floorf(px);
    const int64_t y0 = (int64_t)fy, x0 = (int64_t)fx;
    const float ty = py - fy, tx = px - fx;
    for (int i = 0; i < 4; ++i) {
        const int64_t y = y0 + (i >> 1), x = x0 + (i & 1);
        const float inside = (y >= 0 && y < s->H && x >= 0 && x < s->W) ? 1.0f : 0.0f;
        const float wy = (i >> 1) ? ty : 1.0f - ty, wx = (i & 1) ? tx : 1.0f - tx;
        b->corner[i] = inside > 0.0f ? (y * s->W + x) * s->C : 0;
        b->weight[i] = inside * wy * wx;
        b->slope_y[i] = inside * ((i >> 1) ? wx : -wx);
        b->slope_x[i] = inside * ((i & 1) ? wy : -wy);
    }
    return 1;
}

/* Modes and channel counts known at compile time let the compiler unroll and vectorise the inner loops. */
#define DISPATCH(mode, c, CALL)                        \
    switch (mode) {                                    \
        case TAPS: WITH_CHANNELS(TAPS, c, CALL) break; \
        case SUM: WITH_CHANNELS(SUM, c, CALL) break;   \
        default: WITH_CHANNELS(DOT, c, CALL)           \
    }
#define WITH_CHANNELS(mode, c, CALL)     \
    switch (c) {                         \
        case 3: CALL(mode, 3); break;    \
        case 4: CALL(mode, 4); break;    \
        case 8: CALL(mode, 8); break;    \
        case 9: CALL(mode, 9); break;    \
        case 16: CALL(mode, 16); break;  \
        case 20: CALL(mode, 20); break;  \
        case 24: CALL(mode, 24); break;  \
        case 32: CALL(mode, 32); break;  \
        default: CALL(mode, c);          \
    }

#define T float
#define LOAD(v) (v)
#define STORE(v) (v)
#define NAME(x) x##_f32
#include "deform_kernel.h"
#undef T
#undef LOAD
#undef STORE
#undef NAME

INLINE float from_bf16(uint16_t v)
{
    const union { uint32_t bits; float value; } x = {.bits = (uint32_t)v << 16};
    return x.value;
}

INLINE uint16_t to_bf16(float v) /* to nearest, halves to even */
{
    const union { float value; uint32_t bits; } x = {.value = v};
    return (uint16_t)((x.bits + 0x7fffu + ((x.bits >> 16) & 1u)) >> 16);
}

#define T uint16_t
#define LOAD(v) from_bf16(v)
#define STORE(v) to_bf16(v)
#define NAME(x) x##_bf16
#include "deform_kernel.h"
