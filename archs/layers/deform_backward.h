/* Gradients of deformable sampling and of DCNv2 for one storage type, as deform_kernel.h; arithmetic is float.
 *
 * The pixels of all images are cut into one range a thread. Samples may lie anywhere in their image, so a thread adds
 * to the gradient of an image itself only if its range holds the first pixel, and to one of its own, `spare`, where the
 * range begins within an image; those are added up at the end, in order.
 */

/* Of one sample of c channels, given its SLOT: writes it to out, adds the gradients of its corners, which may coincide,
 * to gimage, and gives the products of grad with the corners. */
INLINE quad NAME(tap_backward)(const T *image, float *gimage, const int32_t *corner, const float *weight, int64_t C,
                               const float *grad, float *out, const int64_t c)
{
    oct octs[4] = {0};
    quad quads[4] = {0};
    single singles[4] = {0};
    int64_t at[4], i = 0;
    for (int j = 0; j < 4; ++j) at[j] = corner[j * LANES] * C;
#define CHANNELS(type, count)                                              \
    for (; i + count <= c; i += count) {                                   \
        const type g = *(const type *)(grad + i);                          \
        type sample = {0};                                                 \
        for (int j = 0; j < 4; ++j) {                                      \
            const type pixel = READ(type, image + at[j] + i);              \
            type##s[j] += g * pixel;                                       \
            sample += weight[j * LANES] * pixel;                           \
            *(type *)(gimage + at[j] + i) += weight[j * LANES] * g;        \
        }                                                                  \
        *(type *)(out + i) = sample;                                       \
    }
    CHANNELS(oct, 8)
    CHANNELS(quad, 4)
    CHANNELS(single, 1)
#undef CHANNELS
    quad sums = *(quad *)singles;
    if (c >= 8) sums += sums_of_octs(octs);
    if (c % 8 >= 4) sums += sums_of_quads(quads);
    return sums;
}

/* All samples of one pixel: grad of sample (g, k) at grad + k * step + g * c, and so the samples in out (NULL: not
 * wanted). With scale both are times scale[k], and samples are added to out. */
INLINE void NAME(taps_backward)(const T *image, float *gimage, const Place *at, const float *grad, float *out,
                                int64_t step, const float *scale, float *gshift, float *gweight, const Shape *s,
                                const int64_t c)
{
    const int64_t n = PADDED(s), K = s->K, C = s->C;
    int32_t corner[4 * n];
    float weight[4 * n], slope[12 * n], dots[4 * n], one[MAX_CHANNELS];
    const int direct = out && !scale;
    locate_slopes(at, s, corner, weight, slope);
    for (int64_t g = 0, i = 0; g < s->G; ++g)
        for (int64_t k = 0; k < K; ++k, ++i) {
            const int64_t slot = SLOT(i), to = k * step + g * c;
            if (scale)
                for (int j = 0; j < 4; ++j) weight[slot + j * LANES] *= scale[k];
            quad dot = NAME(tap_backward)(image + g * c, gimage + g * c, corner + slot, weight + slot, C, grad + to,
                                          direct ? out + to : one, c);
            if (scale) {
                dot *= scale[k];
                for (int64_t j = 0; j < c; ++j) out[to + j] += one[j];
            }
            *(quad *)(dots + 4 * i) = dot;
        }
    place_gradients(slope, dots, gshift, gweight, s);
}

APART void NAME(pixel_backward)(const T *image, float *gimage, const Place *at, const float *grad, float *out,
                                int64_t step, const float *scale, float *gshift, float *gweight, const Shape *s)
{
#define BACKWARD(mode, c) NAME(taps_backward)(image, gimage, at, grad, out, step, scale, gshift, gweight, s, c)
    const int64_t channels = s->C / s->G;
    WITH_CHANNELS(0, channels, BACKWARD)
#undef BACKWARD
}

/* By mode as in deform_forward; gquery is written in mode DOT. */
INLINE void NAME(sample_backward)(int64_t mode, const T *image, float *gimage, const Place *at, const T *query,
                                  const T *gy, const float *grelevance, float *gquery, float *gshift, float *gweight,
                                  const Shape *s)
{
    const int64_t length = (mode == TAPS ? s->K : 1) * s->C;
    const T *from = mode == DOT ? query : gy;
    float grad[length];
    for (int64_t i = 0; i < length; ++i) grad[i] = LOAD(from[i]);
    if (mode == DOT) memset(gquery, 0, (size_t)s->C * sizeof(float));
    NAME(pixel_backward)(image, gimage, at, grad, mode == DOT ? gquery : 0, mode == TAPS ? s->C : 0,
                         mode == DOT ? grelevance : 0, gshift, gweight, s);
}

void NAME(deform_backward)(const T *x, const T *query, const float *displacement, const float *weight, const T *gy,
                           const float *grelevance, float *gx, float *spare, float *gquery, float *gdisplacement,
                           float *gweight, int64_t B, int64_t H, int64_t W, int64_t G, int64_t K, int64_t c,
                           int64_t mode, int threads)
{
    const Shape s = {H, W, G, K, G * c};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < threads; ++t)
        for (Range r = range_of(t, threads, B, &s); r.pixel < r.end; enter(&r, r.stop, &s)) {
            float *gimage = claim(gx, spare, &r, &s);
            for (int64_t p = r.pixel; p < r.stop; ++p) {
                const int64_t n = G * K * p;
                const Place at = place(p, displacement, weight, &s);
                NAME(sample_backward)(mode, x + r.image * s.C, gimage, &at, query + s.C * p,
                                      gy + (mode == TAPS ? K : 1) * s.C * p, grelevance + K * p, gquery + s.C * p,
                                      gdisplacement + 2 * n, gweight + n, &s);
            }
        }
    add_spare(gx, spare, B, &s, threads);
}

/* Of a stretch of pixels, given gy (pixels, D): adds to gmix (K * C + 1, wide), the bias in the last row, where wide is
 * D padded with zeros; mix (K, D, deep), deep being C padded. */
INLINE void NAME(stretch_backward)(const T *image, float *gimage, int64_t first, int64_t pixels,
                                   const float *displacement, const float *modulation, const float *mix, const T *gy,
                                   float *gdisplacement, float *gmodulation, float *gmix, int64_t D, const Shape *s)
{
    const int64_t deep = ROUND_UP(s->C, WIDEST), wide = ROUND_UP(D, WIDEST), rows = s->K * s->C, step = pixels * deep;
    float grad[pixels * wide], gcolumns[s->K * step], columns[s->K * step];
    memset(grad, 0, sizeof grad);
    for (int64_t p = 0; p < pixels; ++p)
        for (int64_t i = 0; i < D; ++i) grad[p * wide + i] = LOAD(gy[p * D + i]);
    for (int64_t k = 0; k < s->K; ++k)
        product(gcolumns + k * step, 0, grad, wide, 1, mix + k * D * deep, pixels, D, deep);
    for (int64_t p = 0; p < pixels; ++p) {
        const Place at = place(first + p, displacement, modulation, s);
        const int64_t n = s->G * s->K * (first + p);
        NAME(pixel_backward)(image, gimage, &at, gcolumns + p * deep, columns + p * deep, step, 0,
                             gdisplacement + 2 * n, gmodulation + n, s);
    }
    if (!gmix) return;
    for (int64_t k = 0; k < s->K; ++k) {
        float *to = gmix + k * s->C * wide;
        product(to, to, columns + k * step, 1, deep, grad, s->C, pixels, wide);
    }
    for (int64_t p = 0; p < pixels; ++p)
        for (int64_t i = 0; i < wide; ++i) gmix[rows * wide + i] += grad[p * wide + i];
}

/* gmix (threads, K * C + 1, wide) as above, every thread's own, or NULL: not wanted. */
void NAME(convolve_backward)(const T *x, const float *displacement, const float *modulation, const float *mix,
                             const T *gy, float *gx, float *spare, float *gdisplacement, float *gmodulation,
                             float *gmix, int64_t B, int64_t H, int64_t W, int64_t G, int64_t K, int64_t c, int64_t D,
                             int threads)
{
    const Shape s = {H, W, G, K, G * c};
    const int64_t own = (K * s.C + 1) * ROUND_UP(D, WIDEST), length = stretch(&s);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < threads; ++t) {
        float *mine = gmix ? memset(gmix + t * own, 0, (size_t)own * sizeof(float)) : 0;
        for (Range r = range_of(t, threads, B, &s); r.pixel < r.end; enter(&r, r.stop, &s)) {
            float *gimage = claim(gx, spare, &r, &s);
            for (int64_t p = r.pixel; p < r.stop; p += length) {
                const int64_t pixels = r.stop - p < length ? r.stop - p : length;
                NAME(stretch_backward)(x + r.image * s.C, gimage, p, pixels, displacement, modulation, mix, gy + D * p,
                                       gdisplacement, gmodulation, mine, D, &s);
            }
        }
    }
    add_spare(gx, spare, B, &s, threads);
}
