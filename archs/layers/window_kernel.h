/* The kernels for one storage type: T, with LOAD and STORE to and from float and NAME(x) to name the functions.
 * Included by window_kernel.c once per type; arithmetic is float throughout. */
#include "window_pixels.h"

INLINE void NAME(forward_window)(const T *qkv, const float *bias, T *y, const Window *window, const Shape *s,
                                 const int64_t N)
{
    const int64_t width = ROUND_UP(N, LANES), D = s->D, C = s->heads * D, part = D * width;
    ARRAY(in, 3 * part);
    ARRAY(out, part);
    ARRAY(share, N * width);
    ARRAY(inverse, width);
    for (int64_t h = 0; h < s->heads; ++h) {
        for (int i = 0; i < 3; ++i) NAME(take)(in + i * part, qkv + i * C + h * D, 3 * C, window, D, N, width);
        scale_queries(in, D, D, width);
        attend(out, share, inverse, in, in + part, in + 2 * part, bias + h * N * N, window, D, N, width);
        NAME(put)(y + h * D, C, out, window, D, N, width);
    }
}

INLINE void NAME(backward_window)(const T *qkv, const float *bias, const T *gy, T *gqkv, float *gbias,
                                  const Window *window, const Shape *s, const int64_t N)
{
    const int64_t width = ROUND_UP(N, LANES), D = s->D, C = s->heads * D, part = D * width;
    ARRAY(in, 3 * part);
    ARRAY(to, 3 * part);
    ARRAY(g, part);
    ARRAY(share, N * width);
    ARRAY(inverse, width);
    for (int64_t h = 0; h < s->heads; ++h) {
        for (int i = 0; i < 3; ++i) NAME(take)(in + i * part, qkv + i * C + h * D, 3 * C, window, D, N, width);
        NAME(take)(g, gy + h * D, C, window, D, N, width);
        scale_queries(in, D, D, width);
        shares(share, inverse, in, in + part, bias + h * N * N, window, D, N, width);
        attend_backward(to, gbias + h * N * N, g, in, part, share, inverse, D, N, width);
        for (int i = 0; i < 3; ++i) NAME(put)(gqkv + i * C + h * D, 3 * C, to + i * part, window, D, N, width);
    }
}

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

/* gbias (threads, heads, N, N) must be zero on entry: every thread adds to its own. */
void NAME(window_backward)(const T *qkv, const float *bias, const T *gy, T *gqkv, float *gbias, Shape s, int threads)
{
    EACH_WINDOW
#pragma omp parallel num_threads(threads)
    {
        const unsigned tiny = ignore_tiny();
        float *mine = gbias + omp_get_thread_num() * s.heads * tokens * tokens;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < all; ++n) {
            PLACED
#define BACKWARD(N)                                                                                                \
    NAME(backward_window)(qkv + 3 * C * image, bias, gy + C * image, gqkv + 3 * C * image, mine, &window, &s, N);
            DISPATCH(tokens, BACKWARD)
#undef BACKWARD
        }
        count_tiny(tiny);
    }
}
