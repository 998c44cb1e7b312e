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
#include "vector.h"

#define MAX_CHANNELS 256 /* of a group; the caller checks */

#define STRETCH 48 /* pixels whose samples a convolution holds: 110 KB for 64 channels */

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

#define PADDED(s) ROUND_UP((s)->G * (s)->K, LANES)

/* The corners of all samples of one pixel, in its image, and their weights, modulation included: [corner][PADDED]. Of
 * a corner outside the weight is 0. */
INLINE void locate_all(const Place *at, const Shape *s, int32_t *corner, float *weight)
{
    const int64_t n = s->G * s->K, padded = PADDED(s);
    const int32_t H = (int32_t)s->H, W = (int32_t)s->W;
    float shift[2 * padded], modulation[padded];
    memset(shift + 2 * padded - 2 * LANES, 0, 2 * LANES * sizeof(float));
    memset(modulation + padded - LANES, 0, LANES * sizeof(float));
    memcpy(shift, at->shift, (size_t)(2 * n) * sizeof(float));
    memcpy(modulation, at->weight, (size_t)n * sizeof(float));
    for (int64_t i = 0; i < padded; i += LANES) {
        const vec even = load(shift + 2 * i), odd = load(shift + 2 * i + LANES), none = splat(0.0f);
        vec py = splat(at->row) + SECONDS(even, odd, 0), px = splat(at->column) + SECONDS(even, odd, 1);
        py = smaller(larger(py, splat(-2.0f)), splat((float)(H + 1))); /* NaN, too, is far outside */
        px = smaller(larger(px, splat(-2.0f)), splat((float)(W + 1)));
        ivec y0 = __builtin_convertvector(py, ivec), x0 = __builtin_convertvector(px, ivec);
        y0 += __builtin_convertvector(y0, vec) > py; /* down to the floor: true is -1 */
        x0 += __builtin_convertvector(x0, vec) > px;
        const ivec y1 = y0 + 1, x1 = x0 + 1;
        const vec ty = py - __builtin_convertvector(y0, vec), tx = px - __builtin_convertvector(x0, vec);
        const vec m = load(modulation + i), one = splat(1.0f);
        const vec top = choose((y0 >= 0) & (y0 < H), m * (one - ty), none), low = choose((y1 >= 0) & (y1 < H), m * ty, none);
        const vec near = choose((x0 >= 0) & (x0 < W), one - tx, none), far = choose((x1 >= 0) & (x1 < W), tx, none);
        const ivec up = within(y0, 0, H - 1) * W, down = within(y1, 0, H - 1) * W;
        const ivec left = within(x0, 0, W - 1), right = within(x1, 0, W - 1);
        *(ivec *)(corner + i) = up + left, *(ivec *)(corner + padded + i) = up + right;
        *(ivec *)(corner + 2 * padded + i) = down + left, *(ivec *)(corner + 3 * padded + i) = down + right;
        store(weight + i, top * near), store(weight + padded + i, top * far);
        store(weight + 2 * padded + i, low * near), store(weight + 3 * padded + i, low * far);
    }
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

#define KERNELS "deform_kernel.h"
#include "both_types.h"
