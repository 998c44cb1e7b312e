/* The kernels for one storage type: T, with LOAD and STORE to and from float and NAME(x) to name the functions.
 * Included by deform_kernel.c once per type; arithmetic is float throughout. */

/* One bilinear sample of c channels, times its weight. */
INLINE void NAME(sample)(const T *restrict image, const Bilinear *at, float weight, float *restrict out, const int64_t c)
{
    const T *restrict p0 = image + at->corner[0], *restrict p1 = image + at->corner[1];
    const T *restrict p2 = image + at->corner[2], *restrict p3 = image + at->corner[3];
    const float w0 = weight * at->weight[0], w1 = weight * at->weight[1];
    const float w2 = weight * at->weight[2], w3 = weight * at->weight[3];
    for (int64_t i = 0; i < c; ++i) out[i] = w0 * LOAD(p0[i]) + w1 * LOAD(p1[i]) + w2 * LOAD(p2[i]) + w3 * LOAD(p3[i]);
}

/* Gradients of one sample, given the gradient of its c channels: adds to gimage, returns those of dy, dx and weight. */
INLINE void NAME(sample_backward)(const T *restrict image, float *restrict gimage, const Bilinear *at, float weight,
                                  const float *restrict grad, float *restrict gplace, const int64_t c)
{
    gplace[0] = gplace[1] = gplace[2] = 0.0f;
    for (int j = 0; j < 4; ++j) {
        const T *restrict p = image + at->corner[j];
        float *restrict gp = gimage + at->corner[j];
        const float scale = weight * at->weight[j];
        float dot = 0.0f;
        for (int64_t i = 0; i < c; ++i) {
            dot += grad[i] * LOAD(p[i]);
            gp[i] += scale * grad[i];
        }
        gplace[0] += weight * at->slope_y[j] * dot;
        gplace[1] += weight * at->slope_x[j] * dot;
        gplace[2] += at->weight[j] * dot;
    }
}

INLINE void NAME(forward_pixel)(int mode, const T *restrict image, const T *restrict query, const Place *at,
                                T *restrict y, float *restrict relevance, const Shape *s, const int64_t c)
{
    float sum[MAX_CHANNELS], one[MAX_CHANNELS];
    if (mode == DOT) memset(relevance, 0, (size_t)s->K * sizeof(float));
    for (int64_t g = 0; g < s->G; ++g) {
        if (mode == SUM) memset(sum, 0, sizeof(float) * (size_t)c);
        for (int64_t k = 0; k < s->K; ++k) {
            const int64_t n = g * s->K + k;
            Bilinear b;
            const int inside = locate(at, n, s, &b);
            if (mode == TAPS) {
                T *restrict out = y + k * s->C + g * c;
                if (inside) {
                    NAME(sample)(image + g * c, &b, at->weight[n], one, c);
                    for (int64_t i = 0; i < c; ++i) out[i] = STORE(one[i]);
                } else
                    memset(out, 0, (size_t)c * sizeof(T));
            } else if (inside) {
                NAME(sample)(image + g * c, &b, at->weight[n], one, c);
                if (mode == SUM)
                    for (int64_t i = 0; i < c; ++i) sum[i] += one[i];
                else {
                    float dot = 0.0f;
                    for (int64_t i = 0; i < c; ++i) dot += one[i] * LOAD(query[g * c + i]);
                    relevance[k] += dot;
                }
            }
        }
        if (mode == SUM)
            for (int64_t i = 0; i < c; ++i) y[g * c + i] = STORE(sum[i]);
    }
}

INLINE void NAME(backward_pixel)(int mode, const T *restrict image, const T *restrict query, const Place *at,
                                 const T *restrict gy, const float *restrict grelevance, float *restrict gimage,
                                 float *restrict gquery, float *restrict gshift, float *restrict gweight,
                                 const Shape *s, int64_t g, const int64_t c)
{
    float grad[MAX_CHANNELS], one[MAX_CHANNELS], place[3], gq[MAX_CHANNELS];
    if (mode == DOT) memset(gq, 0, sizeof(float) * (size_t)c);
    if (mode == SUM)
        for (int64_t i = 0; i < c; ++i) grad[i] = LOAD(gy[g * c + i]);
    for (int64_t k = 0; k < s->K; ++k) {
        const int64_t n = g * s->K + k;
        Bilinear b;
        gshift[2 * n] = gshift[2 * n + 1] = gweight[n] = 0.0f;
        if (!locate(at, n, s, &b)) continue;
        if (mode == TAPS)
            for (int64_t i = 0; i < c; ++i) grad[i] = LOAD(gy[k * s->C + g * c + i]);
        if (mode == DOT) {
            const float gr = grelevance[k];
            NAME(sample)(image + g * c, &b, at->weight[n] * gr, one, c);
            for (int64_t i = 0; i < c; ++i) {
                gq[i] += one[i];
                grad[i] = gr * LOAD(query[g * c + i]);
            }
        }
        NAME(sample_backward)(image + g * c, gimage + g * c, &b, at->weight[n], grad, place, c);
        gshift[2 * n] = place[0];
        gshift[2 * n + 1] = place[1];
        gweight[n] = place[2];
    }
    if (mode == DOT)
        for (int64_t i = 0; i < c; ++i) gquery[g * c + i] = gq[i];
}

void NAME(deform_forward)(int mode, const T *x, const T *query, const float *displacement, const float *weight, T *y,
                          float *relevance, int64_t B, int64_t H, int64_t W, int64_t G, int64_t K, int64_t c,
                          int threads)
{
    const Shape s = {H, W, G, K, G * c};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t line = 0; line < B * H; ++line) {
        const T *image = x + (line / H) * H * W * s.C;
        for (int64_t column = 0; column < W; ++column) {
            const int64_t p = line * W + column;
            const Place at = {(float)(line % H), (float)column, displacement + 2 * G * K * p, weight + G * K * p};
#define FORWARD(mode, n)                                                                                          \
    NAME(forward_pixel)(mode, image, query + s.C * p, &at, y + (mode == TAPS ? K : 1) * s.C * p, relevance + K * p, \
                        &s, n)
            DISPATCH(mode, c, FORWARD)
#undef FORWARD
        }
    }
}

/* gx must be zero on entry. A part is an image, or one group of an image where there are fewer images than threads:
 * parts own disjoint pieces of gx, so threads never write to the same place. */
void NAME(deform_backward)(int mode, const T *x, const T *query, const float *displacement, const float *weight,
                           const T *gy, const float *grelevance, float *gx, float *gquery, float *gdisplacement,
                           float *gweight, int64_t B, int64_t H, int64_t W, int64_t G, int64_t K, int64_t c,
                           int threads)
{
    const Shape s = {H, W, G, K, G * c};
    const int64_t parts = B >= threads ? 1 : G, groups = G / parts;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < B * parts; ++part) {
        const int64_t image = part / parts * H * W, first = part % parts * groups;
        for (int64_t q = 0; q < H * W; ++q) {
            const int64_t p = image + q;
            const Place at = {(float)(q / W), (float)(q % W), displacement + 2 * G * K * p, weight + G * K * p};
            for (int64_t g = first; g < first + groups; ++g) {
#define BACKWARD(mode, n)                                                                                        \
    NAME(backward_pixel)(mode, x + image * s.C, query + s.C * p, &at, gy + (mode == TAPS ? K : 1) * s.C * p,     \
                         grelevance + K * p, gx + image * s.C, gquery + s.C * p, gdisplacement + 2 * G * K * p, \
                         gweight + G * K * p, &s, g, n)
                DISPATCH(mode, c, BACKWARD)
#undef BACKWARD
            }
        }
    }
}
