/* The kernels for one storage type: T, with LOAD and STORE to and from float and NAME(x) to name the functions.
 * Included by window_kernel.c once per type; arithmetic is float throughout. */

/* One head's part of a window, by tokens: out (N, stride) and, transposed, across (D, width); zero where padded. */
INLINE void NAME(gather)(float *out, int64_t stride, float *across, const T *image, int64_t pitch, const Window *window,
                         float scale, const int64_t N, const int64_t D, const int64_t width)
{
    for (int64_t n = 0; n < N; ++n) {
        const T *from = image + window->pixel[n] * pitch;
        for (int64_t d = 0; d < D; ++d) {
            const float value = scale * LOAD(from[d]);
            if (out) out[n * stride + d] = value;
            if (across) across[d * width + n] = value;
        }
    }
    if (across)
        for (int64_t d = 0; d < D; ++d)
            for (int64_t n = N; n < width; ++n) across[d * width + n] = 0.0f;
    if (out)
        for (int64_t n = 0; n < N; ++n)
            for (int64_t d = D; d < stride; ++d) out[n * stride + d] = 0.0f;
}

/* The pixels of a window, C channels each, as (C, width) with zeros where padded; and back. */
INLINE void NAME(take)(float *out, const T *image, const Window *window, int64_t C, const int64_t N, const int64_t width)
{
    for (int64_t n = 0; n < N; ++n) {
        const T *from = image + window->pixel[n] * C;
        for (int64_t c = 0; c < C; ++c) out[c * width + n] = LOAD(from[c]);
    }
    for (int64_t n = N; n < width; ++n)
        for (int64_t c = 0; c < C; ++c) out[c * width + n] = 0.0f;
}

INLINE void NAME(put)(T *image, const float *x, const Window *window, int64_t C, const int64_t N, const int64_t width)
{
    for (int64_t n = 0; n < N; ++n) {
        T *to = image + window->pixel[n] * C;
        for (int64_t c = 0; c < C; ++c) to[c] = STORE(x[c * width + n]);
    }
}

INLINE void NAME(forward_window)(const T *qkv, const float *bias, T *y, const Window *window, const Shape *s,
                                 const int64_t N)
{
    const int64_t width = ROUND_UP(N, LANES), C = s->heads * s->D;
    float in[3 * C * width], out[C * width];
    NAME(take)(in, qkv, window, 3 * C, N, width);
    attend(out, in, bias, window, s, N, width);
    NAME(put)(y, out, window, C, N, width);
}

INLINE void NAME(block_window)(const T *x, const Weights *w, T *y, const Window *window, const Shape *s, const int64_t N)
{
    const int64_t width = ROUND_UP(N, LANES), C = s->heads * s->D;
    float state[C * width];
    NAME(take)(state, x, window, C, N, width);
    swin_block(state, w, window, s, N, width);
    NAME(put)(y, state, window, C, N, width);
}

INLINE void NAME(backward_window)(const T *qkv, const float *bias, const T *gy, T *gqkv, float *gbias,
                                  const Window *window, const Shape *s, const int64_t N)
{
    const int64_t D = s->D, width = ROUND_UP(N, LANES), deep = ROUND_UP(D, LANES), C = s->heads * D;
    float share[N * width], slope[N * width], inverse[width], q[D * width], g[D * width], gq[D * width];
    float q_rows[N * deep], g_rows[N * deep], k[N * D], v[N * D], gk[N * deep], gv[N * deep];
    const float scale = 1.0f / sqrtf((float)D);
    for (int64_t h = 0; h < s->heads; ++h) {
        const T *image = qkv + h * D;
        NAME(gather)(q_rows, deep, q, image, 3 * C, window, scale, N, D, width);
        NAME(gather)(g_rows, deep, g, gy + h * D, C, window, 1.0f, N, D, width);
        NAME(gather)(k, D, 0, image + C, 3 * C, window, 1.0f, N, D, width);
        NAME(gather)(v, D, 0, image + 2 * C, 3 * C, window, 1.0f, N, D, width);
        multiply(share, initial(slope, bias + h * N * N, window, N, width), 0, k, D, 1, q, N, D, width);
        exponentials(share, inverse, N, width);
        multiply(slope, 0, 0, v, D, 1, g, N, D, width);
        for (int64_t c = 0; c < width; c += LANES) { /* of the softmax: share * (slope - sum of share * slope) */
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
        for (int64_t j = 0; j < N; ++j)
            for (int64_t i = 0; i < N; ++i) gbias[(h * N + j) * N + i] += slope[j * width + i];
        multiply(gq, 0, 0, k, 1, D, slope, D, N, width);
        multiply(gk, 0, 0, slope, width, 1, q_rows, N, N, deep);
        multiply(gv, 0, 0, share, width, 1, g_rows, N, N, deep);
        for (int64_t n = 0; n < N; ++n) {
            T *to = gqkv + window->pixel[n] * 3 * C + h * D;
            for (int64_t d = 0; d < D; ++d) {
                to[d] = STORE(scale * gq[d * width + n]);
                to[C + d] = STORE(gk[n * deep + d]);
                to[2 * C + d] = STORE(gv[n * deep + d]);
            }
        }
    }
}

#define EACH_WINDOW                                                              \
    const int64_t columns = s.W / s.side, count = s.H / s.side * columns;        \
    const int64_t C = s.heads * s.D, tokens = s.side * s.side, all = s.M * count;
#define PLACED                                                                   \
    const int64_t image = n / count * s.H * s.W;                                 \
    Window window;                                                               \
    place(&window, n % count / columns, n % columns, &s);

void NAME(window_forward)(const T *qkv, const float *bias, T *y, Shape s, int threads)
{
    EACH_WINDOW
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < all; ++n) {
        PLACED
#define FORWARD(N) NAME(forward_window)(qkv + 3 * C * image, bias, y + C * image, &window, &s, N);
        DISPATCH(tokens, FORWARD)
#undef FORWARD
    }
}

void NAME(swin_forward)(const T *x, Weights w, T *y, Shape s, int threads)
{
    EACH_WINDOW
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < all; ++n) {
        PLACED
#define BLOCK(N) NAME(block_window)(x + C * image, &w, y + C * image, &window, &s, N);
        DISPATCH(tokens, BLOCK)
#undef BLOCK
    }
}

/* gbias (threads, heads, N, N) must be zero on entry: every thread adds to its own. */
void NAME(window_backward)(const T *qkv, const float *bias, const T *gy, T *gqkv, float *gbias, Shape s, int threads)
{
    EACH_WINDOW
#pragma omp parallel num_threads(threads)
    {
        float *mine = gbias + omp_get_thread_num() * s.heads * tokens * tokens;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < all; ++n) {
            PLACED
#define BACKWARD(N)                                                                                                \
    NAME(backward_window)(qkv + 3 * C * image, bias, gy + C * image, gqkv + 3 * C * image, mine, &window, &s, N);
            DISPATCH(tokens, BACKWARD)
#undef BACKWARD
        }
    }
}
#undef EACH_WINDOW
#undef PLACED
