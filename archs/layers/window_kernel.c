/* Multi-head attention within square windows of an image, forward and backward, without rolled or cut copies of it; and
 * a whole Swin block, forward.
 *
 * Layouts are channels-last and dense:
 *   qkv, gqkv   (M, H, W, 3, heads, D)   float or bfloat16
 *   y, gy       (M, H, W, heads, D)      the same type
 *   bias, gbias (heads, N, N)            [head][key][query], float; N = side * side tokens, row by row
 * Windows lie on the image rolled by -shift in both directions. There the last row and the last column of windows hold
 * pixels of opposite borders, which do not see each other: their logits get -100, as published.
 *
 * A window's head is computed with queries in the lanes of vectors, so that maximum and sum of a softmax are as
 * vectorised as the products; its logits (16 KB for 8 x 8) stay in the first-level cache.
 */
#include <omp.h>

#include "vector.h"

#define MAX_TOKENS 256

typedef struct {
    int64_t M, H, W, heads, D, side, shift, hidden;
} Shape;

/* e^(s - max) in the place of the logits s (keys, queries), and 1 / their sum per query. */
INLINE void exponentials(float *s, float *inverse, int64_t keys, const int64_t width)
{
    for (int64_t v = 0; v < width; v += LANES) {
        vec most = load(s + v), sum = splat(0.0f);
        for (int64_t j = 1; j < keys; ++j) most = larger(load(s + j * width + v), most);
        for (int64_t j = 0; j < keys; ++j) {
            const vec e = exponential(load(s + j * width + v) - most);
            store(s + j * width + v, e);
            sum += e;
        }
        store(inverse + v, splat(1.0f) / sum);
    }
}

/* Of one window: where its tokens lie in the image, and which of them see each other. */
typedef struct {
    int64_t pixel[MAX_TOKENS];
    int region[MAX_TOKENS];
    int mixed; /* more than one region */
} Window;

INLINE void place(Window *window, int64_t row, int64_t column, const Shape *s)
{
    const int last_row = s->shift && (row + 1) * s->side == s->H, last_column = s->shift && (column + 1) * s->side == s->W;
    window->mixed = last_row || last_column;
    for (int64_t i = 0; i < s->side; ++i)
        for (int64_t j = 0; j < s->side; ++j) {
            const int64_t y = (row * s->side + i + s->shift) % s->H, x = (column * s->side + j + s->shift) % s->W;
            const int64_t n = i * s->side + j;
            window->pixel[n] = y * s->W + x;
            window->region[n] = 2 * (last_row && i >= s->side - s->shift) + (last_column && j >= s->side - s->shift);
        }
}

/* Bias and mask of one head, (N keys, width queries): the bias itself where that is all. */
INLINE const float *initial(float *scratch, const float *bias, const Window *window, const int64_t N, const int64_t width)
{
    if (N == width && !window->mixed) return bias;
    for (int64_t j = 0; j < N; ++j)
        for (int64_t i = 0; i < N; ++i)
            scratch[j * width + i] = bias[j * N + i] - (window->region[i] != window->region[j] ? 100.0f : 0.0f);
    return scratch;
}

/* All heads of one window, channels by queries: y (heads * D, width) of qkv (3 * heads * D, width). */
INLINE void attend(float *y, float *qkv, const float *bias, const Window *window, const Shape *s, const int64_t N,
                   const int64_t width)
{
    float logits[N * width], scratch[N * width], inverse[width];
    const int64_t D = s->D, C = s->heads * D;
    const vec scale = splat(1.0f / sqrtf((float)D));
    for (int64_t i = 0; i < C * width; i += LANES) store(qkv + i, scale * load(qkv + i));
    for (int64_t h = 0; h < s->heads; ++h) {
        const float *q = qkv + h * D * width, *k = q + C * width, *v = k + C * width;
        float *out = y + h * D * width;
        multiply(logits, initial(scratch, bias + h * N * N, window, N, width), 0, k, 1, width, q, N, D, width);
        exponentials(logits, inverse, N, width);
        multiply(out, 0, 0, v, width, 1, logits, D, N, width);
        for (int64_t d = 0; d < D; ++d)
            for (int64_t i = 0; i < width; i += LANES)
                store(out + d * width + i, load(out + d * width + i) * load(inverse + i));
    }
}

/* Layer norm over the channels of x (C, width). */
INLINE void normalise(float *out, const float *x, const float *gain, const float *shift, int64_t C, const int64_t width)
{
    for (int64_t i = 0; i < width; i += LANES) {
        vec mean = splat(0.0f), variance = splat(0.0f);
        for (int64_t c = 0; c < C; ++c) mean += load(x + c * width + i);
        mean *= splat(1.0f / (float)C);
        for (int64_t c = 0; c < C; ++c) {
            const vec d = load(x + c * width + i) - mean;
            variance += d * d;
        }
        float scale[LANES];
        store(scale, variance * splat(1.0f / (float)C) + splat(1e-5f));
        for (int n = 0; n < LANES; ++n) scale[n] = 1.0f / sqrtf(scale[n]);
        for (int64_t c = 0; c < C; ++c)
            store(out + c * width + i, (load(x + c * width + i) - mean) * load(scale) * splat(gain[c]) + splat(shift[c]));
    }
}

/* Of a Swin block, as nn.LayerNorm and nn.Linear hold them. */
typedef struct {
    const float *gain1, *shift1, *qkv, *qkv_bias, *project, *project_bias, *position;
    const float *gain2, *shift2, *widen, *widen_bias, *narrow, *narrow_bias;
} Weights;

/* x + attention(norm(x)), then x + mlp(norm(x)), in place on x (C, width). */
INLINE void swin_block(float *x, const Weights *w, const Window *window, const Shape *s, const int64_t N,
                       const int64_t width)
{
    const int64_t C = s->heads * s->D, inside = s->hidden > 3 * C ? s->hidden : 3 * C;
    float normed[C * width], wide[inside * width], y[C * width];
    normalise(normed, x, w->gain1, w->shift1, C, width);
    multiply(wide, 0, w->qkv_bias, w->qkv, C, 1, normed, 3 * C, C, width);
    attend(y, wide, w->position, window, s, N, width);
    multiply(x, x, w->project_bias, w->project, C, 1, y, C, C, width);
    normalise(normed, x, w->gain2, w->shift2, C, width);
    multiply(wide, 0, w->widen_bias, w->widen, C, 1, normed, s->hidden, C, width);
    for (int64_t i = 0; i < s->hidden * width; i += LANES) store(wide + i, gelu(load(wide + i)));
    multiply(x, x, w->narrow_bias, w->narrow, s->hidden, 1, wide, C, s->hidden, width);
}

/* The number of tokens known at compile time lets the compiler unroll. */
#define DISPATCH(N, CALL) \
    if (N == 64) CALL(64) \
    else CALL(N)

#define KERNELS "window_kernel.h"
#include "both_types.h"
