/* Vectors of floats for the kernels of this folder, in the vector extension that GCC and Clang share: they become the
 * processor's own where it has them. And products and transposes of small matrices, and bfloat16, which C lacks. */
#ifndef RESTORE_VECTOR_H
#define RESTORE_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define APART static __attribute__((noinline, unused)) /* compiled once, not at every call */

#ifdef __AVX512F__
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* Let this thread take what is below 1e-38 for zero until `count_tiny`: such numbers, which a softmax over masked tokens
 * makes, take a hundred cycles each, and -ffast-math switches them off in the thread that loads a library only. */
#ifdef __AVX__
INLINE unsigned ignore_tiny(void)
{
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
}
INLINE void count_tiny(unsigned before) { _mm_setcsr(before); }
#else
INLINE unsigned ignore_tiny(void) { return 0; }
INLINE void count_tiny(unsigned before) { (void)before; }
#endif

#define ROUND_UP(n, to) (((n) + (to) - 1) / (to) * (to))
/* A local array of floats that begins with a cache line, for a vector across two of them is loaded twice. */
#define ARRAY(name, size) float name[size] __attribute__((aligned(64)))

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
INLINE vec splat(float v) { return v - (vec){0}; }
INLINE vec choose(ivec which, vec a, vec b) { return (vec)(((ivec)a & which) | ((ivec)b & ~which)); }
INLINE ivec choose_int(ivec which, ivec a, ivec b) { return (a & which) | (b & ~which); }
/* The larger and the smaller; of NaN and b: b. Compilers do not find the instruction that does just this. */
#if LANES == 16
INLINE vec larger(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vec smaller(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }
#elif LANES == 8
INLINE vec larger(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vec smaller(vec a, vec b) { return (vec)_mm256_min_ps((__m256)a, (__m256)b); }
#else
INLINE vec larger(vec a, vec b) { return choose(a > b, a, b); }
INLINE vec smaller(vec a, vec b) { return choose(a < b, a, b); }
#endif
INLINE ivec within(ivec i, int32_t low, int32_t high) { return choose_int(i < low, i - i + low, choose_int(i > high, i - i + high, i)); }

/* 1 / x to rounding, for x far from the largest and the smallest numbers. */
INLINE vec reciprocal(vec x)
{
#if LANES == 16 /* a division takes as long as 16 other operations: an estimate, and a step of Newton's */
    const vec near = (vec)_mm512_rcp14_ps((__m512)x);
    return near * (splat(2.0f) - x * near);
#else
    return splat(1.0f) / x;
#endif
}

/* Every second float, from the first (0) or the second (1) on, of two vectors in a row. */
#if LANES == 16
#define SECONDS(a, b, s) __builtin_shufflevector(a, b, s, s + 2, s + 4, s + 6, s + 8, s + 10, s + 12, s + 14, s + 16, \
                                                 s + 18, s + 20, s + 22, s + 24, s + 26, s + 28, s + 30)
#elif LANES == 8
#define SECONDS(a, b, s) __builtin_shufflevector(a, b, s, s + 2, s + 4, s + 6, s + 8, s + 10, s + 12, s + 14)
#else
#define SECONDS(a, b, s) __builtin_shufflevector(a, b, s, s + 2, s + 4, s + 6)
#endif

/* Every fourth float, from float j on in v[j], of four vectors in a row. */
INLINE void fourths(const float *p, vec *v)
{
    const vec a = load(p), b = load(p + LANES), c = load(p + 2 * LANES), d = load(p + 3 * LANES);
    const vec even = SECONDS(a, b, 0), odd = SECONDS(a, b, 1), evens = SECONDS(c, d, 0), odds = SECONDS(c, d, 1);
    v[0] = SECONDS(even, evens, 0), v[1] = SECONDS(odd, odds, 0);
    v[2] = SECONDS(even, evens, 1), v[3] = SECONDS(odd, odds, 1);
}

/* The first (or second) halves of two vectors, float by float in turn. */
#if LANES == 16
#define FIRST_HALVES(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define SECOND_HALVES(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif LANES == 8
#define FIRST_HALVES(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define SECOND_HALVES(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define FIRST_HALVES(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define SECOND_HALVES(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#endif

/* e^x for x <= 0, to 4e-7 of its value; what would be less than 1e-37 is 1e-37, and NaN stays NaN. */
INLINE vec exponential(vec x)
{
    x = larger(splat(-86.0f), x);
    const ivec power = __builtin_convertvector(x * splat(1.44269504f) - splat(0.5f), ivec); /* nearest, since x <= 0 */
    const vec r = x - __builtin_convertvector(power, vec) * splat(0.693147181f); /* at most ln(2)/2 in size */
    vec p = splat(0.00829761849f); /* our fit, 1.5e-7 off */
    p = p * r + splat(0.0419156305f);
    p = p * r + splat(0.166675766f);
    p = p * r + splat(0.499988927f);
    p = p * r + splat(0.999999691f);
    p = p * r + splat(1.0f);
    return (vec)((ivec)p + (power << 23));
}

/* Phi(x), the share of a normal distribution below x, to rounding: Phi - 1/2 is odd, x times a quotient of polynomials
 * in x^2 (our fit, 4e-9 off), and 1/2 from 5.3 on. */
INLINE vec normal_share(vec x)
{
    const vec near = larger(smaller(x, splat(5.3f)), splat(-5.3f));
    const vec u = near * near;
    vec p = splat(2.40502983e-8f), q = splat(1.23716104e-6f);
    p = p * u + splat(6.37896233e-6f), q = q * u + splat(7.13501773e-5f);
    p = p * u + splat(1.60328797e-4f), q = q * u + splat(1.83653976e-3f);
    p = p * u + splat(4.6279584e-3f), q = q * u + splat(2.81385253e-2f);
    p = p * u + splat(3.29352817e-2f), q = q * u + splat(0.249222738f);
    p = p * u + splat(0.398942254f), q = q * u + splat(1.0f);
    return splat(0.5f) + near * p * reciprocal(q);
}

/* The exact GELU, and its derivative given Phi(x). */
INLINE vec gelu(vec x) { return x * normal_share(x); }
INLINE vec gelu_slope(vec x, vec share)
{
    return share + x * splat(0.398942280f) * exponential(x * x * splat(-0.5f));
}

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

/* Few floats at once, whatever the processor's vectors: channels of a group. */
typedef float single __attribute__((may_alias));
typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));
typedef float oct __attribute__((vector_size(32), aligned(4), may_alias));

INLINE single single_of_bf16(const uint16_t *p) { return from_bf16(*p); }

#define OF_BF16(type, n)                                                                            \
    INLINE type type##_of_bf16(const uint16_t *p)                                                   \
    {                                                                                               \
        typedef uint16_t halves __attribute__((vector_size(2 * n), aligned(2), may_alias));         \
        typedef uint32_t wide __attribute__((vector_size(4 * n)));                                  \
        return (type)(__builtin_convertvector(*(const halves *)p, wide) << 16);                     \
    }
OF_BF16(quad, 4)
#ifdef __AVX2__
INLINE oct oct_of_bf16(const uint16_t *p) /* GCC 12 takes five instructions for the same */
{
    return (oct)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
}
#else
OF_BF16(oct, 8)
#endif

/* The sums of each of four vectors. */
INLINE quad sums_of_quads(const quad *v)
{
    const quad a = __builtin_shufflevector(v[0], v[1], 0, 4, 1, 5) + __builtin_shufflevector(v[0], v[1], 2, 6, 3, 7);
    const quad b = __builtin_shufflevector(v[2], v[3], 0, 4, 1, 5) + __builtin_shufflevector(v[2], v[3], 2, 6, 3, 7);
    return __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
}

INLINE quad sums_of_octs(const oct *v) /* the same within both halves, then these */
{
    const oct a = __builtin_shufflevector(v[0], v[1], 0, 8, 1, 9, 4, 12, 5, 13) +
                  __builtin_shufflevector(v[0], v[1], 2, 10, 3, 11, 6, 14, 7, 15);
    const oct b = __builtin_shufflevector(v[2], v[3], 0, 8, 1, 9, 4, 12, 5, 13) +
                  __builtin_shufflevector(v[2], v[3], 2, 10, 3, 11, 6, 14, 7, 15);
    const oct sums = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
                     __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    return __builtin_shufflevector(sums, sums, 0, 1, 2, 3) + __builtin_shufflevector(sums, sums, 4, 5, 6, 7);
}

/* out (rows, width) = init + each + a b, with a (rows, inner) of any strides, b (inner, width) and init (rows, width)
 * dense, each (rows); NULL is zero. Blocks of R x V vectors are held in registers; R and V must be literal for that. */
#define DEFINE_BLOCK(R, V)                                                                                          \
    INLINE void block_##R##x##V(float *out, const float *init, const float *each, const float *a, int64_t a_row,    \
                                int64_t a_inner, const float *b, int64_t inner, int64_t width)                      \
    {                                                                                                               \
        vec sum[R][V];                                                                                              \
        for (int r = 0; r < R; ++r)                                                                                 \
            for (int v = 0; v < V; ++v)                                                                             \
                sum[r][v] = splat(each ? each[r] : 0.0f) + (init ? load(init + r * width + v * LANES) : splat(0.0f)); \
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

INLINE void multiply(float *out, const float *init, const float *each, const float *a, int64_t a_row, int64_t a_inner,
                     const float *b, int64_t rows, int64_t inner, const int64_t width)
{
#define BLOCKS(R, V)                                                                                               \
    for (; r + R <= rows; r += R)                                                                                  \
        block_##R##x##V(out + r * width + v, init ? init + r * width + v : 0, each ? each + r : 0, a + r * a_row, a_row, \
                        a_inner, b + v, inner, width);
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

/* The same where the sizes are not known in advance, each left out; with blocks for the widths of compact networks. */
#if LANES == 16
DEFINE_BLOCK(8, 3)
DEFINE_BLOCK(1, 3)
DEFINE_BLOCK(12, 2)
DEFINE_BLOCK(1, 2)
#endif
APART void product(float *out, const float *init, const float *a, int64_t a_row, int64_t a_inner, const float *b,
                   int64_t rows, int64_t inner, int64_t width)
{
#define BLOCKS(R, V)                                                                                             \
    for (; r + R <= rows; r += R)                                                                                \
        block_##R##x##V(out + r * width, init ? init + r * width : 0, 0, a + r * a_row, a_row, a_inner, b, inner, \
                        width);
    int64_t r = 0;
#if LANES == 16
    if (width == 3 * LANES) {
        BLOCKS(8, 3)
        BLOCKS(1, 3)
    }
    if (width == 2 * LANES) {
        BLOCKS(12, 2)
        BLOCKS(1, 2)
    }
#endif
#undef BLOCKS
    if (r < rows) multiply(out, init, 0, a, a_row, a_inner, b, rows, inner, width);
}

/* out (columns, rows) = in (rows, columns) transposed, both with room for whole vectors in their rows: the last vector
 * of a row of out ends with zeros. Blocks of LANES x LANES, by shuffles that exchange one bit of row and column each. */
APART void transpose(float *out, int64_t out_pitch, const float *in, int64_t in_pitch, int64_t rows, int64_t columns)
{
    for (int64_t i = 0; i < rows; i += LANES)
        for (int64_t j = 0; j < columns; j += LANES) {
            vec a[LANES], b[LANES];
            for (int n = 0; n < LANES; ++n) a[n] = i + n < rows ? load(in + (i + n) * in_pitch + j) : splat(0.0f);
            for (int half = 1; half < LANES; half *= 2) {
                for (int n = 0; n < LANES / 2; ++n) {
                    b[2 * n] = FIRST_HALVES(a[n], a[n + LANES / 2]);
                    b[2 * n + 1] = SECOND_HALVES(a[n], a[n + LANES / 2]);
                }
                for (int n = 0; n < LANES; ++n) a[n] = b[n];
            }
            for (int n = 0; n < LANES; ++n)
                if (j + n < columns) store(out + (j + n) * out_pitch + i, a[n]);
        }
}

#endif
