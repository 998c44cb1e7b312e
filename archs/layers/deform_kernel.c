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
#define WIDEST 16  /* channels are padded to a multiple where matrices of the caller are multiplied */

enum { TAPS, SUM, DOT };

typedef struct {
    int64_t H, W, G, K, C;
} Shape;

typedef struct {
    float row, column;
    const float *shift;  /* (G, K, 2) of this pixel */
    const float *weight; /* (G, K) of this pixel */
} Place;

#define PADDED(s) ROUND_UP((s)->G * (s)->K, LANES)
#define SLOT(i) (4 * ((i) & -LANES) + ((i) & (LANES - 1))) /* of sample i; its next corner lies LANES further */

INLINE void store_corners(float *to, vec top, vec low, vec near, vec far)
{
    store(to, top * near), store(to + LANES, top * far);
    store(to + 2 * LANES, low * near), store(to + 3 * LANES, low * far);
}

/* The corners of all samples of one pixel, in its image, and their weights, modulation included, at SLOT. Of a corner
 * outside the weight is 0. Where slope is not NULL: d weight / d (dy, dx, modulation), 4 * PADDED each. */
INLINE void locate_with(const Place *at, const Shape *s, int32_t *corner, float *weight, float *slope)
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
        const ivec above = (y0 >= 0) & (y0 < H), below = (y1 >= 0) & (y1 < H); /* which sides are inside */
        const ivec before = (x0 >= 0) & (x0 < W), behind = (x1 >= 0) & (x1 < W);
        const vec top = choose(above, one - ty, none), low = choose(below, ty, none);
        const vec near = choose(before, one - tx, none), far = choose(behind, tx, none);
        const ivec up = within(y0, 0, H - 1) * W, down = within(y1, 0, H - 1) * W;
        const ivec left = within(x0, 0, W - 1), right = within(x1, 0, W - 1);
        ivec *pixel = (ivec *)(corner + 4 * i);
        pixel[0] = up + left, pixel[1] = up + right, pixel[2] = down + left, pixel[3] = down + right;
        store_corners(weight + 4 * i, m * top, m * low, near, far);
        if (!slope) continue;
        float *of = slope + 4 * i;
        store_corners(of, choose(above, -m, none), choose(below, m, none), near, far);
        store_corners(of + 4 * padded, m * top, m * low, choose(before, -one, none), choose(behind, one, none));
        store_corners(of + 8 * padded, top, low, near, far);
    }
}

APART void locate_all(const Place *at, const Shape *s, int32_t *corner, float *weight)
{
    locate_with(at, s, corner, weight, 0);
}

APART void locate_slopes(const Place *at, const Shape *s, int32_t *corner, float *weight, float *slope)
{
    locate_with(at, s, corner, weight, slope);
}

/* ---- backward: which gradients a thread adds to, see deform_backward.h */

/* Of a thread's pixels: from `pixel` to `stop` in the image that begins at pixel `image`, and on to `end`. */
typedef struct {
    int64_t image, pixel, stop, end, thread;
} Range;

INLINE int64_t first_pixel(int64_t thread, int64_t threads, int64_t B, const Shape *s)
{
    return B * s->H * s->W * thread / threads;
}

INLINE void enter(Range *r, int64_t pixel, const Shape *s)
{
    const int64_t size = s->H * s->W, next = pixel / size * size + size;
    r->image = next - size, r->pixel = pixel, r->stop = next < r->end ? next : r->end;
}

INLINE Range range_of(int64_t thread, int64_t threads, int64_t B, const Shape *s)
{
    Range r = {.end = first_pixel(thread + 1, threads, B, s), .thread = thread};
    enter(&r, first_pixel(thread, threads, B, s), s);
    return r;
}

/* Where this thread adds to the gradient of its present image, set to zero. */
INLINE float *claim(float *gx, float *spare, const Range *r, const Shape *s)
{
    const int64_t size = s->H * s->W * s->C;
    float *mine = r->pixel == r->image ? gx + r->image * s->C : spare + r->thread * size;
    return memset(mine, 0, (size_t)size * sizeof(float));
}

/* Adds the images of those threads whose range begins within one. */
APART void add_spare(float *gx, const float *spare, int64_t B, const Shape *s, int threads)
{
    const int64_t size = s->H * s->W * s->C;
    for (int64_t t = 1; t < threads; ++t) {
        const Range r = range_of(t, threads, B, s);
        float *to = gx + r.image * s->C;
        const float *from = spare + t * size;
        if (r.pixel == r.image || r.pixel == r.end) continue;
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t i = 0; i < size; ++i) to[i] += from[i];
    }
}

INLINE Place place(int64_t p, const float *displacement, const float *weight, const Shape *s)
{
    const int64_t n = s->G * s->K * p, pixel = p % (s->H * s->W);
    return (Place){(float)(pixel / s->W), (float)(pixel % s->W), displacement + 2 * n, weight + n};
}

/* Gradients (G, K, 2) and (G, K) of one pixel's places, given the products [sample][corner] of the gradients of its
 * samples with their corners. */
APART void place_gradients(const float *slope, const float *dots, float *gshift, float *gweight, const Shape *s)
{
    const int64_t n = PADDED(s), count = s->G * s->K;
    float sums[3 * n];
    for (int64_t i = 0; i < n; i += LANES) {
        vec dot[4];
        fourths(dots + 4 * i, dot);
        for (int q = 0; q < 3; ++q) {
            vec sum = splat(0.0f);
            for (int j = 0; j < 4; ++j) sum += load(slope + 4 * (q * n + i) + j * LANES) * dot[j];
            store(sums + q * n + i, sum);
        }
    }
    for (int64_t i = 0; i < count; ++i) gshift[2 * i] = sums[i], gshift[2 * i + 1] = sums[n + i];
    memcpy(gweight, sums + 2 * n, (size_t)count * sizeof(float));
}

/* Pixels whose samples and their gradients fit into 250 KB, but for very wide images. */
INLINE int64_t stretch(const Shape *s)
{
    const int64_t fit = 32 * 1024 / (s->K * ROUND_UP(s->C, WIDEST));
    return fit < 8 ? 8 : fit > STRETCH ? STRETCH : fit;
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
#undef KERNELS
#define KERNELS "deform_backward.h"
#include "both_types.h"
