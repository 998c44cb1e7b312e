/* The kernels for one storage type: T, with LOAD and STORE to and from float and NAME(x) to name the functions.
 * Included by deform_kernel.c once per type; arithmetic is float throughout. */

/* A sample that `locate_all` has found, given its SLOT. */
INLINE void NAME(sample_at)(const T *restrict image, const int32_t *corner, const float *weight, int64_t C,
                            float *restrict out, const int64_t c)
{
    const T *restrict p0 = image + corner[0] * C, *restrict p1 = image + corner[LANES] * C;
    const T *restrict p2 = image + corner[2 * LANES] * C, *restrict p3 = image + corner[3 * LANES] * C;
    const float w0 = weight[0], w1 = weight[LANES], w2 = weight[2 * LANES], w3 = weight[3 * LANES];
    for (int64_t j = 0; j < c; ++j) out[j] = w0 * LOAD(p0[j]) + w1 * LOAD(p1[j]) + w2 * LOAD(p2[j]) + w3 * LOAD(p3[j]);
}

INLINE void NAME(forward_pixel)(int mode, const T *restrict image, const T *restrict query, const Place *at,
                                T *restrict y, float *restrict relevance, const Shape *s, const int64_t c)
{
    const int64_t n = PADDED(s);
    int32_t corner[4 * n];
    float weight[4 * n], sum[MAX_CHANNELS], one[MAX_CHANNELS];
    locate_all(at, s, corner, weight);
    if (mode == DOT) memset(relevance, 0, (size_t)s->K * sizeof(float));
    for (int64_t g = 0; g < s->G; ++g) {
        if (mode == SUM) memset(sum, 0, sizeof(float) * (size_t)c);
        for (int64_t k = 0; k < s->K; ++k) {
            const int64_t slot = SLOT(g * s->K + k);
            NAME(sample_at)(image + g * c, corner + slot, weight + slot, s->C, one, c);
            if (mode == TAPS)
                for (int64_t i = 0; i < c; ++i) y[k * s->C + g * c + i] = STORE(one[i]);
            else if (mode == SUM)
                for (int64_t i = 0; i < c; ++i) sum[i] += one[i];
            else {
                float dot = 0.0f;
                for (int64_t i = 0; i < c; ++i) dot += one[i] * LOAD(query[g * c + i]);
                relevance[k] += dot;
            }
        }
        if (mode == SUM)
            for (int64_t i = 0; i < c; ++i) y[g * c + i] = STORE(sum[i]);
    }
}

void NAME(deform_forward)(const T *x, const T *query, const float *displacement, const float *weight, T *y,
                          float *relevance, int64_t B, int64_t H, int64_t W, int64_t G, int64_t K, int64_t c,
                          int64_t mode, int threads)
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

/* DCNv2: the samples of a stretch of a row, then their product with the weights (K, C, D), D a multiple of LANES. */
INLINE void NAME(convolve_stretch)(const T *image, const Place *first, int64_t pixels, const float *mix, const float *bias,
                                   T *y, int64_t D, const Shape *s, const int64_t c)
{
    const int64_t n = PADDED(s), places = s->G * s->K;
    int32_t corner[4 * n];
    float weight[4 * n], columns[s->K * STRETCH * s->C], sum[STRETCH * D];
    for (int64_t p = 0; p < pixels; ++p) {
        const Place at = {first->row, first->column + (float)p, first->shift + 2 * places * p,
                          first->weight + places * p};
        locate_all(&at, s, corner, weight);
        for (int64_t g = 0; g < s->G; ++g)
            for (int64_t k = 0; k < s->K; ++k) {
                const int64_t slot = SLOT(g * s->K + k);
                NAME(sample_at)(image + g * c, corner + slot, weight + slot, s->C,
                                columns + (k * STRETCH + p) * s->C + g * c, c);
            }
        memcpy(sum + p * D, bias, (size_t)D * sizeof(float));
    }
    for (int64_t k = 0; k < s->K; ++k)
        product(sum, sum, columns + k * STRETCH * s->C, s->C, 1, mix + k * s->C * D, pixels, s->C, D);
    for (int64_t i = 0; i < pixels * D; ++i) y[i] = STORE(sum[i]);
}

void NAME(deform_convolve)(const T *x, const float *displacement, const float *weight, const float *mix,
                           const float *bias, T *y, int64_t B, int64_t H, int64_t W, int64_t G, int64_t K, int64_t c,
                           int64_t D, int threads)
{
    const Shape s = {H, W, G, K, G * c};
    const int64_t stretches = (W + STRETCH - 1) / STRETCH;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < B * H * stretches; ++part) {
        const int64_t line = part / stretches, column = part % stretches * STRETCH, p = line * W + column;
        const int64_t pixels = W - column < STRETCH ? W - column : STRETCH;
        const Place at = {(float)(line % H), (float)column, displacement + 2 * G * K * p, weight + G * K * p};
        const T *image = x + line / H * H * W * s.C;
#define CONVOLVE(mode, n) NAME(convolve_stretch)(image, &at, pixels, mix, bias, y + D * p, D, &s, n)
        WITH_CHANNELS(0, c, CONVOLVE)
#undef CONVOLVE
    }
}

/* One pixel's attention: relevance of its K taps of the keys, the best of them, values there. */
INLINE void NAME(attend_pixel)(const T *query, const T *keys, const T *values, const Place *at, int64_t count, T *y,
                               float *best, int64_t *taps, const Shape *s, const int64_t c)
{
    const int64_t n = PADDED(s);
    int32_t corner[4 * n];
    float weight[4 * n], relevance[s->K], share[s->K], one[MAX_CHANNELS], sum[MAX_CHANNELS], total = 0.0f;
    locate_all(at, s, corner, weight);
    memset(relevance, 0, sizeof relevance);
    for (int64_t g = 0; g < s->G; ++g)
        for (int64_t k = 0; k < s->K; ++k) {
            float dot = 0.0f;
            const int64_t slot = SLOT(g * s->K + k);
            NAME(sample_at)(keys + g * c, corner + slot, weight + slot, s->C, one, c);
            for (int64_t i = 0; i < c; ++i) dot += one[i] * LOAD(query[g * c + i]);
            relevance[k] += dot;
        }
    for (int64_t i = 0; i < count; ++i) {
        int64_t most = -1;
        for (int64_t k = 0; k < s->K; ++k) {
            int taken = 0;
            for (int64_t j = 0; j < i; ++j) taken |= taps[j] == k;
            if (!taken && (most < 0 || relevance[k] > relevance[most])) most = k;
        }
        taps[i] = most;
        best[i] = relevance[most];
        share[i] = expf(best[i] - best[0]);
        total += share[i];
    }
    for (int64_t g = 0; g < s->G; ++g) {
        memset(sum, 0, sizeof(float) * (size_t)c);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t slot = SLOT(g * s->K + taps[i]);
            NAME(sample_at)(values + g * c, corner + slot, weight + slot, s->C, one, c);
            for (int64_t j = 0; j < c; ++j) sum[j] += share[i] / total * one[j];
        }
        for (int64_t j = 0; j < c; ++j) y[g * c + j] = STORE(sum[j]);
    }
}

void NAME(deform_attend)(const T *query, const T *keys, const T *values, const float *displacement, const float *weight,
                         T *y, float *best, int64_t *taps, int64_t B, int64_t H, int64_t W, int64_t G, int64_t K,
                         int64_t c, int64_t count, int threads)
{
    const Shape s = {H, W, G, K, G * c};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t line = 0; line < B * H; ++line) {
        const int64_t image = line / H * H * W * s.C;
        for (int64_t column = 0; column < W; ++column) {
            const int64_t p = line * W + column;
            const Place at = {(float)(line % H), (float)column, displacement + 2 * G * K * p, weight + G * K * p};
#define ATTEND(mode, n)                                                                                             \
    NAME(attend_pixel)(query + s.C * p, keys + image, values + image, &at, count, y + s.C * p, best + count * p,     \
                       taps + count * p, &s, n)
            WITH_CHANNELS(0, c, ATTEND)
#undef ATTEND
        }
    }
}
