/* A whole Swin block, forward and backward, in one pass over the image: of a window everything between input and output
 * stays in the caches. The backward pass computes the window anew, which takes no more time than to write and read all
 * that it needs.
 *
 * Images x, y, gx, gy are (M, H, W, C), dense, float or bfloat16; weights are float, as nn.Linear holds them. The layer
 * norms are without gain and shift: those are part of the linear layers that follow. Each of the two branches of an
 * image has a factor, stochastic depth: (2, M).
 */
#include <omp.h>

#include "window.h"

typedef struct {
    const float *qkv, *qkv_bias, *project, *project_bias, *position;
    const float *widen, *widen_bias, *narrow, *narrow_bias;
} Weights;

/* Layer norm over the channels of x (C, width), and what it multiplies by. */
INLINE void normalise(float *out, float *inverse, const float *x, int64_t C, const int64_t width)
{
    for (int64_t i = 0; i < width; i += LANES) {
        vec mean = splat(0.0f), variance = splat(0.0f);
        for (int64_t c = 0; c < C; ++c) mean += load(x + c * width + i);
        mean *= splat(1.0f / (float)C);
        for (int64_t c = 0; c < C; ++c) {
            const vec d = load(x + c * width + i) - mean;
            variance += d * d;
        }
        store(inverse + i, variance * splat(1.0f / (float)C) + splat(1e-5f));
        for (int n = 0; n < LANES; ++n) inverse[i + n] = 1.0f / sqrtf(inverse[i + n]);
        for (int64_t c = 0; c < C; ++c)
            store(out + c * width + i, (load(x + c * width + i) - mean) * load(inverse + i));
    }
}

/* Adds to gx the gradient of the norm's input from g of its output, `normed`. */
INLINE void normalise_backward(float *gx, const float *g, const float *normed, const float *inverse, int64_t C,
                               const int64_t width)
{
    for (int64_t i = 0; i < width; i += LANES) {
        vec mean = splat(0.0f), along = splat(0.0f);
        for (int64_t c = i; c < C * width; c += width) {
            mean += load(g + c);
            along += load(g + c) * load(normed + c);
        }
        mean *= splat(1.0f / (float)C), along *= splat(1.0f / (float)C);
        for (int64_t c = i; c < C * width; c += width)
            store(gx + c, load(gx + c) + load(inverse + i) * (load(g + c) - mean - along * load(normed + c)));
    }
}

/* x += factor * y */
INLINE void add(float *x, float factor, const float *y, int64_t count)
{
    for (int64_t i = 0; i < count; i += LANES) store(x + i, load(x + i) + splat(factor) * load(y + i));
}

/* y = factor * x */
INLINE void scale(float *y, float factor, const float *x, int64_t count)
{
    for (int64_t i = 0; i < count; i += LANES) store(y + i, splat(factor) * load(x + i));
}

/* x + attention(norm(x)), then x + mlp(norm(x)), branches times their factors, in place on x (C, width). */
INLINE void block_of(float *x, const Weights *w, const float *factor, const Window *window, const Shape *s,
                     const int64_t N, const int64_t width)
{
    const int64_t D = s->D, C = s->heads * D, part = C * width, inside = s->hidden > 3 * C ? s->hidden : 3 * C;
    ARRAY(normed, part);
    ARRAY(wide, inside * width);
    ARRAY(y, part);
    ARRAY(inverse, width);
    ARRAY(share, N * width);
    if (factor[0] != 0) {
        normalise(normed, inverse, x, C, width);
        multiply(wide, 0, w->qkv_bias, w->qkv, C, 1, normed, 3 * C, C, width);
        scale_queries(wide, C, D, width);
        for (int64_t h = 0; h < s->heads; ++h) {
            const float *q = wide + h * D * width;
            attend(y + h * D * width, share, inverse, q, q + part, q + 2 * part, w->position + h * N * N, window, D, N,
                   width);
        }
        multiply(normed, 0, w->project_bias, w->project, C, 1, y, C, C, width);
        add(x, factor[0], normed, part);
    }
    if (factor[1] != 0) {
        normalise(normed, inverse, x, C, width);
        multiply(wide, 0, w->widen_bias, w->widen, C, 1, normed, s->hidden, C, width);
        for (int64_t i = 0; i < s->hidden * width; i += LANES) store(wide + i, gelu(load(wide + i)));
        multiply(normed, 0, w->narrow_bias, w->narrow, s->hidden, 1, wide, C, s->hidden, width);
        add(x, factor[1], normed, part);
    }
}

/* The same for any number of tokens; compiled once for both types of images. */
static __attribute__((noinline)) void block(float *x, const Weights *w, const float *factor, const Window *window,
                                            const Shape *s, const int64_t tokens)
{
#define BLOCK(N) block_of(x, w, factor, window, s, N, ROUND_UP(N, LANES));
    DISPATCH(tokens, BLOCK)
#undef BLOCK
}

/* ---- backward */

/* Gradients of weights lie transposed, (in, out), with rows that end with whole vectors of any kind. */
#define PITCH(n) ROUND_UP(n, 16)

/* What a thread adds to, and where it works. */
typedef struct {
    float *qkv, *qkv_bias, *project, *project_bias, *position, *widen, *widen_bias, *narrow, *narrow_bias;
} Gradients;
typedef struct {
    float *x, *gy, *normed, *inverse, *wide, *share, *y, *g, *sum, *between, *gbetween, *turned;
} Space;

/* Lays the parts out in memory one after the other; the number of floats they take. */
static int64_t lay_out(float *memory, float **parts, const int64_t *sizes, int count)
{
    int64_t total = 0;
    for (int i = 0; i < count; ++i) {
        parts[i] = memory ? memory + total : 0;
        total += PITCH(sizes[i]);
    }
    return total;
}

static int64_t lay_gradients(Gradients *to, float *memory, const Shape *s)
{
    const int64_t C = s->heads * s->D, N = s->side * s->side, F = s->hidden;
    const int64_t sizes[] = {C * PITCH(3 * C), 3 * C, C * PITCH(C), C, s->heads * N * N,
                             C * PITCH(F), F, F * PITCH(C), C};
    return lay_out(memory, (float **)to, sizes, 9);
}

static int64_t lay_space(Space *to, float *memory, const Shape *s)
{
    const int64_t C = s->heads * s->D, N = s->side * s->side, width = ROUND_UP(N, LANES), part = C * width;
    const int64_t most = s->hidden > 3 * C ? s->hidden : 3 * C;
    const int64_t sizes[] = {part, part, 2 * part, 2 * width, 3 * part, s->heads * (N + 1) * width, part, part, part,
                             most * width, most * width, N * PITCH(most)};
    return lay_out(memory, (float **)to, sizes, 12);
}

int64_t swin_gradient_floats(Shape s) { Gradients none; return lay_gradients(&none, 0, &s); }
int64_t swin_space_floats(Shape s) { Space none; return lay_space(&none, 0, &s); }

/* Of y = w x + bias: adds the gradients of w (out, in) and bias from x (in, width) and g (out, width) of y. */
INLINE void learn(float *gw, float *gbias, const float *x, const float *g, int64_t in, int64_t out, float *turned,
                  const int64_t N, const int64_t width)
{
    const int64_t pitch = PITCH(out);
    transpose(turned, pitch, g, width, out, N);
    multiply(gw, gw, 0, x, width, 1, turned, in, N, pitch);
    for (int64_t n = 0; n < N; ++n)
        for (int64_t c = 0; c < out; ++c) gbias[c] += turned[n * pitch + c];
}

/* The first branch as `block_of` has it, added to m->x; keeps norm, qkv, shares and the attention's result. */
INLINE void first_branch(const Space *m, const Weights *w, float factor, const Window *window, const Shape *s,
                         const int64_t N, const int64_t width)
{
    const int64_t D = s->D, C = s->heads * D, part = C * width, step = (N + 1) * width;
    normalise(m->normed, m->inverse, m->x, C, width);
    multiply(m->wide, 0, w->qkv_bias, w->qkv, C, 1, m->normed, 3 * C, C, width);
    scale_queries(m->wide, C, D, width);
    for (int64_t h = 0; h < s->heads; ++h) {
        const float *q = m->wide + h * D * width;
        float *share = m->share + h * step;
        attend(m->y + h * D * width, share, share + N * width, q, q + part, q + 2 * part, w->position + h * N * N,
               window, D, N, width);
    }
    multiply(m->sum, 0, w->project_bias, w->project, C, 1, m->y, C, C, width);
    add(m->x, factor, m->sum, part);
}

/* m->gy from the gradient of the block's output to that of the first branch's. */
INLINE void second_backward(const Space *m, const Gradients *to, const Weights *w, float factor, const Shape *s,
                            const int64_t N, const int64_t width)
{
    const int64_t C = s->heads * s->D, part = C * width, F = s->hidden;
    float *normed = m->normed + part, *inverse = m->inverse + width, *a = m->between, *slope = m->gbetween;
    normalise(normed, inverse, m->x, C, width);
    multiply(a, 0, w->widen_bias, w->widen, C, 1, normed, F, C, width);
    scale(m->g, factor, m->gy, part);
    multiply(slope, 0, 0, w->narrow, 1, F, m->g, F, C, width);
    for (int64_t i = 0; i < F * width; i += LANES) {
        const vec x = load(a + i), below = normal_share(x);
        store(a + i, x * below);
        store(slope + i, load(slope + i) * gelu_slope(x, below));
    }
    learn(to->narrow, to->narrow_bias, a, m->g, F, C, m->turned, N, width);
    learn(to->widen, to->widen_bias, normed, slope, C, F, m->turned, N, width);
    multiply(m->sum, 0, 0, w->widen, 1, C, slope, C, F, width);
    normalise_backward(m->gy, m->sum, normed, inverse, C, width);
}

/* m->gy from the gradient of the first branch's output to that of the block's input. */
INLINE void first_backward(const Space *m, const Gradients *to, const Weights *w, float factor, const Shape *s,
                           const int64_t N, const int64_t width)
{
    const int64_t D = s->D, C = s->heads * D, part = C * width, step = (N + 1) * width;
    scale(m->g, factor, m->gy, part);
    learn(to->project, to->project_bias, m->y, m->g, C, C, m->turned, N, width);
    multiply(m->sum, 0, 0, w->project, 1, C, m->g, C, C, width);
    for (int64_t h = 0; h < s->heads; ++h) {
        const int64_t at = h * D * width;
        float *share = m->share + h * step;
        attend_backward(m->between + at, to->position + h * N * N, m->sum + at, m->wide + at, part, share,
                        share + N * width, D, N, width);
    }
    learn(to->qkv, to->qkv_bias, m->normed, m->between, C, 3 * C, m->turned, N, width);
    multiply(m->sum, 0, 0, w->qkv, 1, C, m->between, C, 3 * C, width);
    normalise_backward(m->gy, m->sum, m->normed, m->inverse, C, width);
}

/* m->gy from the gradient of the block's output to that of its input, m->x; m->x is overwritten. */
static __attribute__((noinline)) void block_backward(const Space *m, const Gradients *to, const Weights *w,
                                                     const float *factor, const Window *window, const Shape *s,
                                                     const int64_t tokens)
{
#define BLOCK(N)                                                                    \
    {                                                                               \
        const int64_t width = ROUND_UP(N, LANES);                                   \
        if (factor[0] != 0) first_branch(m, w, factor[0], window, s, N, width);     \
        if (factor[1] != 0) second_backward(m, to, w, factor[1], s, N, width);      \
        if (factor[0] != 0) first_backward(m, to, w, factor[0], s, N, width);       \
    }
    DISPATCH(tokens, BLOCK)
#undef BLOCK
}

#define KERNELS "swin_kernel.h"
#include "both_types.h"
