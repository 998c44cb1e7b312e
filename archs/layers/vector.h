/* Vectors of floats for the kernels of this folder, in the vector extension that GCC and Clang share: they become the
 * processor's own where it has them. And bfloat16, which C does not know. */
#ifndef RESTORE_VECTOR_H
#define RESTORE_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#ifdef __AVX512F__
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define ROUND_UP(n, to) (((n) + (to) - 1) / (to) * (to))

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
INLINE vec splat(float v) { return v - (vec){0}; }
INLINE vec larger(vec a, vec b) { return (vec)(((ivec)a & (a > b)) | ((ivec)b & ~(a > b))); } /* of NaN and b: b */

/* e^x for x <= 0, to 3e-7 of its value; what would be less than 1e-37 is 1e-37, and NaN stays NaN. */
INLINE vec exponential(vec x)
{
    const vec low = splat(-86.0f);
    x = (vec)(((ivec)low & (x < low)) | ((ivec)x & ~(x < low)));
    const ivec power = __builtin_convertvector(x * splat(1.44269504f) - splat(0.5f), ivec); /* nearest, since x <= 0 */
    const vec r = x - __builtin_convertvector(power, vec) * splat(0.693147181f);
    vec p = splat(1.0f / 720.0f); /* Taylor: |r| is at most ln(2)/2 */
    p = p * r + splat(1.0f / 120.0f);
    p = p * r + splat(1.0f / 24.0f);
    p = p * r + splat(1.0f / 6.0f);
    p = p * r + splat(0.5f);
    p = p * r + splat(1.0f);
    p = p * r + splat(1.0f);
    return p * (vec)((power + 127) << 23);
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

#endif
