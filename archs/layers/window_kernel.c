/* Multi-head attention within square windows of an image, forward and backward, without rolled or cut copies of it.
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
#define MAX_DIM 64

typedef struct {
    int64_t M, H, W, heads, D, side, shift;
} Shape;

/* out (rows, width) = init + a b, with a (rows, inner) of any strides, b (inner, width) dense and init (rows, width)
 * dense or NULL for zeros. Blocks of R x V vectors are held in registers; R and V must be literal for that. */
#define DEFINE_BLOCK(R, V)                                                                                          \
    INLINE void block_##R##x##V(float *out, const float *init, const float *a, int64_t a_row, int64_t a_inner,      \
                                const float *b, int64_t inner, int64_t width)                                       \
    {                                                                                                               \
        vec sum[R][V];                                                                                              \
        for (int r = 0; r < R; ++r)                                                                                 \
            for (int v = 0; v < V; ++v) sum[r][v] = init ? load(init + r * width + v * LANES) : splat(0.0f);        \
        for (int64_t n = 0; n < inner; ++n) {                                                                       \
            vec row[V];                                                                                             \
            for (int v = 0; v < V; ++v) row[v] = load(b + n * width + v * LANES);                                   \
            for (int r = 0; r < R; ++r)                                                                             \
                for (int v = 0; v < V; ++v) sum[r][v] += splat(a[r * a_row + n * a_inner]) * row[v];                \
        }                                                                                                           \
        for (int r = 0; r < R; ++r)                                                                                 \
            for (int v = 0; v < V; ++v) store(out + r * width + v * LANES, sum[r][v]);                              \
    }
DEFINE_BLOCK(1, 1)
DEFINE_BLOCK(8, 1)
DEFINE_BLOCK(1, 4)
DEFINE_BLOCK(2, 4)
#if LANES == 16
DEFINE_BLOCK(6, 4) /* 24 sums, 4 of b and a factor in 32 registers */
#endif

INLINE void multiply(float *out, const float *init, const float *a, int64_t a_row, int64_t a_inner, const float *b,
                     int64_t rows, int64_t inner, const int64_t width)
{
#define BLOCKS(R, V)                                                                                             \
    for (; r + R <= rows; r += R)                                                                                \
        block_##R##x##V(out + r * width + v, init ? init + r * width + v : 0, a + r * a_row, a_row, a_inner, b + v, \
                        inner, width);
    int64_t v = 0;
    for (; v + 4 * LANES <= width; v += 4 * LANES) {
        int64_t r = 0;
#if LANES == 16
        BLOCKS(6, 4)
#endif
        BLOCKS(2, 4)
        BLOCKS(1, 4)
    }
    for (; v < width; v += LANES) {
        int64_t r = 0;
        BLOCKS(8, 1)
        BLOCKS(1, 1)
    }
#undef BLOCKS
}

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

/* Sizes known at compile time let the compiler unroll; the second is that of every other network. */
#define DISPATCH(N, D, CALL)        \
    if (N == 64 && D == 12) CALL(64, 12) \
    else if (N == 64 && D == 24) CALL(64, 24) \
    else CALL(N, D)

#define T float
#define LOAD(v) (v)
#define STORE(v) (v)
#define NAME(x) x##_f32
#include "window_kernel.h"
#undef T
#undef LOAD
#undef STORE
#undef NAME

#define T uint16_t
#define LOAD(v) from_bf16(v)
#define STORE(v) to_bf16(v)
#define NAME(x) x##_bf16
#include "window_kernel.h"
