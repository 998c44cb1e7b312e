/* Square windows of an image and multi-head attention within them, forward and backward, shared by the kernels of the
 * attention and of a whole Swin block.
 *
 * Windows lie on the image rolled by -shift in both directions. There the last row and the last column of windows hold
 * pixels of opposite borders, which do not see each other: their logits get -100, as published.
 *
 * A window is held as (channels, width): its tokens in the lanes of vectors, width of them with those that fill up the
 * last. So a head is computed with queries in the lanes, maximum and sum of a softmax are as vectorised as the
 * products, and its logits (16 KB for 8 x 8) stay in the first-level cache.
 */
#ifndef RESTORE_WINDOW_H
#define RESTORE_WINDOW_H

#include "vector.h"

#define MAX_TOKENS 256

typedef struct {
    int64_t M, H, W, heads, D, side, shift, hidden;
} Shape;

/* Of one window: where its tokens lie in the image, and which of them see each other. */
typedef struct {
    int64_t pixel[MAX_TOKENS];
    int region[MAX_TOKENS];
    int mixed; /* more than one region */
} Window;

INLINE void place(Window *window, int64_t row, int64_t column, const Shape *s)
{
    const int last_row = s->shift && (row + 1) * s->side == s->H;
    const int last_column = s->shift && (column + 1) * s->side == s->W;
    window->mixed = last_row || last_column;
    for (int64_t i = 0; i < s->side; ++i)
        for (int64_t j = 0; j < s->side; ++j) {
            const int64_t y = (row * s->side + i + s->shift) % s->H, x = (column * s->side + j + s->shift) % s->W;
            const int64_t n = i * s->side + j;
            window->pixel[n] = y * s->W + x;
            window->region[n] = 2 * (last_row && i >= s->side - s->shift) + (last_column && j >= s->side - s->shift);
        }
}

/* In a function of a Shape s: the number of windows, and the one of number n with the image (in pixels) it is of. */
#define EACH_WINDOW                                                              \
    const int64_t columns = s.W / s.side, count = s.H / s.side * columns;        \
    const int64_t C = s.heads * s.D, tokens = s.side * s.side, all = s.M * count;
#define PLACED                                                                   \
    const int64_t image = n / count * s.H * s.W;                                 \
    Window window;                                                               \
    place(&window, n % count / columns, n % columns, &s);

/* The number of tokens known at compile time lets the compiler unroll. */
#define DISPATCH(N, CALL) \
    if (N == 64) CALL(64) \
    else CALL(N)

/* e^(s - max) in the place of the logits s (keys, width), and 1 / their sum per query; of V vectors of queries. */
INLINE void exponentials_of(float *s, float *inverse, int64_t keys, const int64_t width, const int V)
{
    vec most[V], sum[V];
    for (int v = 0; v < V; ++v) most[v] = load(s + v * LANES), sum[v] = splat(0.0f);
    for (int64_t j = 1; j < keys; ++j)
        for (int v = 0; v < V; ++v) most[v] = larger(load(s + j * width + v * LANES), most[v]);
    for (int64_t j = 0; j < keys; ++j)
        for (int v = 0; v < V; ++v) {
            const vec e = exponential(load(s + j * width + v * LANES) - most[v]);
            store(s + j * width + v * LANES, e);
            sum[v] += e;
        }
    for (int v = 0; v < V; ++v) store(inverse + v * LANES, splat(1.0f) / sum[v]);
}

/* Of all queries. */
INLINE void exponentials(float *s, float *inverse, int64_t keys, const int64_t width)
{
    int64_t v = 0;
    for (; v + 4 * LANES <= width; v += 4 * LANES) exponentials_of(s + v, inverse + v, keys, width, 4);
    for (; v < width; v += LANES) exponentials_of(s + v, inverse + v, keys, width, 1);
}

/* Bias and mask of one head, (N keys, width queries): the bias itself where that is all. */
INLINE const float *initial(float *scratch, const float *bias, const Window *window, const int64_t N,
                            const int64_t width)
{
    if (N == width && !window->mixed) return bias;
    for (int64_t j = 0; j < N; ++j)
        for (int64_t i = 0; i < N; ++i)
            scratch[j * width + i] = bias[j * N + i] - (window->region[i] != window->region[j] ? 100.0f : 0.0f);
    return scratch;
}

/* `channels` of queries times 1 / sqrt(D), in place, as all that follows takes them. */
INLINE void scale_queries(float *q, int64_t channels, int64_t D, const int64_t width)
{
    const vec scale = splat(1.0f / sqrtf((float)D));
    for (int64_t i = 0; i < channels * width; i += LANES) store(q + i, scale * load(q + i));
}

/* How queries of a head (D, width) share their attention among the keys: share (N, width), still to be multiplied by
 * inverse. */
INLINE void shares(float *share, float *inverse, const float *q, const float *k, const float *bias,
                   const Window *window, int64_t D, const int64_t N, const int64_t width)
{
    ARRAY(scratch, N * width);
    multiply(share, initial(scratch, bias, window, N, width), 0, k, 1, width, q, N, D, width);
    exponentials(share, inverse, N, width);
}

/* One head: y (D, width) of q, k and v (D, width), and its shares. */
INLINE void attend(float *y, float *share, float *inverse, const float *q, const float *k, const float *v,
                   const float *bias, const Window *window, int64_t D, const int64_t N, const int64_t width)
{
    shares(share, inverse, q, k, bias, window, D, N, width);
    multiply(y, 0, 0, v, width, 1, share, D, N, width);
    for (int64_t d = 0; d < D; ++d)
        for (int64_t i = 0; i < width; i += LANES)
            store(y + d * width + i, load(y + d * width + i) * load(inverse + i));
}

/* Through the softmax: slope from that of the shares to that of the logits, share * (slope - sum of share * slope), and
 * share multiplied by inverse. */
INLINE void softmax_slope(float *slope, float *share, const float *inverse, const int64_t N, const int64_t width)
{
    for (int64_t c = 0; c < width; c += LANES) {
        vec mean = splat(0.0f);
        for (int64_t j = 0; j < N; ++j) {
            const vec p = load(share + j * width + c) * load(inverse + c);
            store(share + j * width + c, p);
            mean += p * load(slope + j * width + c);
        }
        for (int64_t j = 0; j < N; ++j) {
            float *at = slope + j * width + c;
            store(at, load(share + j * width + c) * (load(at) - mean));
        }
    }
}

/* out (D, width) = x (D, queries) times the transpose of a (N keys, queries). */
INLINE void to_keys(float *out, const float *a, const float *x, const int64_t N, const int64_t D, const int64_t width)
{
    ARRAY(turned, N * width);
    transpose(turned, width, a, width, N, N);
    multiply(out, 0, 0, x, width, 1, turned, D, N, width);
}

/* Gradients of one head from g (D, width) of its output. q, k and v lie at in[0], in[apart] and in[2 apart], their
 * gradients come to the same places of to; adds to gbias (N, N). share and inverse are those of `shares`; share is
 * multiplied by inverse. Lanes of g that are no tokens must be zero. */
INLINE void attend_backward(float *to, float *gbias, const float *g, const float *in, int64_t apart, float *share,
                            const float *inverse, int64_t D, const int64_t N, const int64_t width)
{
    const float *k = in + apart, *v = k + apart;
    ARRAY(slope, N * width);
    multiply(slope, 0, 0, v, 1, width, g, N, D, width);
    softmax_slope(slope, share, inverse, N, width);
    for (int64_t j = 0; j < N; ++j)
        for (int64_t i = 0; i < N; ++i) gbias[j * N + i] += slope[j * width + i];
    multiply(to, 0, 0, k, width, 1, slope, D, N, width);
    scale_queries(to, D, D, width);
    to_keys(to + apart, slope, in, N, D, width);
    to_keys(to + 2 * apart, share, g, N, D, width);
}

#endif
