/* The kernels of a Swin block for one storage type, see both_types.h. */
#include "window_pixels.h"

#define OF_WINDOW                                        \
    const int64_t width = ROUND_UP(tokens, LANES);       \
    const float factor[2] = {factors[n / count], factors[s.M + n / count]};

void NAME(swin_forward)(const T *x, Weights w, const float *factors, T *y, Shape s, int threads)
{
    EACH_WINDOW
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < all; ++n) {
        PLACED OF_WINDOW
        ARRAY(state, C * width);
        NAME(take)(state, x + C * image, C, &window, C, tokens, width);
        block(state, &w, factor, &window, &s, tokens);
        NAME(put)(y + C * image, C, state, &window, C, tokens, width);
    }
}

/* gradients (threads, swin_gradient_floats) must be zero on entry: every thread adds to its own. space: (threads,
 * swin_space_floats), of any content. */
void NAME(swin_backward)(const T *x, const T *gy, Weights w, const float *factors, T *gx, float *gradients,
                         float *space, Shape s, int threads)
{
    EACH_WINDOW
#pragma omp parallel num_threads(threads)
    {
        const unsigned tiny = ignore_tiny();
        Gradients to;
        Space m;
        lay_gradients(&to, gradients + omp_get_thread_num() * swin_gradient_floats(s), &s);
        lay_space(&m, space + omp_get_thread_num() * swin_space_floats(s), &s);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < all; ++n) {
            PLACED OF_WINDOW
            NAME(take)(m.x, x + C * image, C, &window, C, tokens, width);
            NAME(take)(m.gy, gy + C * image, C, &window, C, tokens, width);
            block_backward(&m, &to, &w, factor, &window, &s, tokens);
            NAME(put)(gx + C * image, C, m.gy, &window, C, tokens, width);
        }
        count_tiny(tiny);
    }
}
#undef OF_WINDOW
