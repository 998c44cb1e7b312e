/* 3x3 convolutions with stride 1 and zero padding by Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray, CVPR
 * 2016): 36 products of matrices for every tile of 4 x 4 outputs take a quarter of the multiplications.
 *
 * Layouts are channels-last, dense and of float:
 *   x (M, H, W, C)   y, gy (M, H, W, K)   bias, gbias (K)
 *   u (36, C, KP)    the transformed filters, KP is K rounded up to whole vectors of every kind (16), zero beyond K
 *   gu (threads, 36, C, KP), gbias (threads, K): each thread adds to its own
 *
 * The points of the transforms are 0, +-sqrt(1/2), +-sqrt(2) and infinity, not the usual 0, +-1, +-2: for 64 channels
 * rounding is then twice that of a direct sum at worst, not eight times. Transforms have channels in the lanes; what a
 * block of tiles needs stays in the second-level cache, and of one product in the first.
 */
#include <omp.h>
#include <stdlib.h>

#include "vector.h"

#define TILES 24 /* of a block: whole blocks of 6, 8 and 12 rows */
#define SIDE 6   /* of a tile's input */
#define PLACES (SIDE * SIDE)
#define P 0.70710678118654752f /* the points: P * P = 1/2, Q * Q = 2, P * Q = 1 */
#define Q 1.41421356237309505f

typedef struct {
    int64_t M, H, W, C, K;
} Shape;

/* B^T d: of six inputs in a row, what is multiplied. */
INLINE void spread(vec *t, const vec *d, const int64_t step)
{
    const vec d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
    const vec even_p = d4 - splat(2.0f) * d2, odd_p = splat(P) * (d3 - splat(2.0f) * d1);
    const vec even_q = d4 - splat(0.5f) * d2, odd_q = splat(Q) * (d3 - splat(0.5f) * d1);
    t[0] = d0 + d4 - splat(2.5f) * d2;
    t[step] = even_p + odd_p;
    t[2 * step] = even_p - odd_p;
    t[3 * step] = even_q + odd_q;
    t[4 * step] = even_q - odd_q;
    t[5 * step] = d1 + d5 - splat(2.5f) * d3;
}

/* A^T m: of six products, the four outputs. */
INLINE void gather(vec *y, int64_t y_step, const vec *m, const int64_t step)
{
    const vec even_p = m[step] + m[2 * step], odd_p = splat(P) * (m[step] - m[2 * step]);
    const vec even_q = m[3 * step] + m[4 * step], odd_q = splat(Q) * (m[3 * step] - m[4 * step]);
    y[0] = m[0] + even_p + even_q;
    y[y_step] = odd_p + odd_q;
    y[2 * y_step] = splat(0.5f) * even_p + splat(2.0f) * even_q;
    y[3 * y_step] = splat(0.5f) * odd_p + splat(2.0f) * odd_q + m[5 * step];
}

/* A g: what the gradients of four outputs are for the six products. */
INLINE void scatter(vec *m, const int64_t step, const vec *g, int64_t g_step)
{
    const vec g0 = g[0], g1 = g[g_step], g2 = g[2 * g_step], g3 = g[3 * g_step];
    const vec even_p = g0 + splat(0.5f) * g2, odd_p = splat(P) * (g1 + splat(0.5f) * g3);
    const vec even_q = g0 + splat(2.0f) * g2, odd_q = splat(Q) * (g1 + splat(2.0f) * g3);
    m[0] = g0;
    m[step] = even_p + odd_p;
    m[2 * step] = even_p - odd_p;
    m[3 * step] = even_q + odd_q;
    m[4 * step] = even_q - odd_q;
    m[5 * step] = g3;
}

/* Where a tile lies: its image and its first output. */
typedef struct {
    int64_t image, y, x;
} Tile;

INLINE Tile tile_at(int64_t n, const Shape *s)
{
    const int64_t across = (s->W + 3) / 4, down = (s->H + 3) / 4;
    return (Tile){n / (across * down), n / across % down * 4, n % across * 4};
}

INLINE int64_t tiles_of(const Shape *s) { return s->M * ((s->H + 3) / 4) * ((s->W + 3) / 4); }

/* Floats from one place's matrix to the next: an odd number of cache lines, else all 36 would fall into a few sets. */
INLINE int64_t distance(int64_t width) { return (ROUND_UP(TILES * width, 16) / 16 | 1) * 16; }

/* The vectors of `channels`, the last of them overlapping the one before. */
#define FOR_VECTORS(c, channels) \
    for (int64_t c = 0, end = (channels); c < end; c = c + LANES < end && c + 2 * LANES > end ? end - LANES : c + LANES)

/* A pixel, or zeros outside of the image. */
INLINE vec pixel(const float *image, int64_t y, int64_t x, int64_t c, int64_t width, const Shape *s)
{
    const int inside = (uint64_t)y < (uint64_t)s->H && (uint64_t)x < (uint64_t)s->W;
    return inside ? load(image + (y * s->W + x) * width + c) : splat(0.0f);
}

/* The inputs of a block of tiles, spread: v[place][tile][channel]. */
static void spread_block(float *v, const float *x, int64_t first, int64_t tiles, const Shape *s)
{
    const int64_t apart = distance(s->C);
    for (int64_t t = 0; t < tiles; ++t) {
        const Tile tile = tile_at(first + t, s);
        const int64_t top = tile.y - 1, left = tile.x - 1;
        const float *image = x + tile.image * s->H * s->W * s->C;
        const int inside = top >= 0 && left >= 0 && top + SIDE <= s->H && left + SIDE <= s->W;
        FOR_VECTORS(c, s->C) {
            vec d[PLACES], half[PLACES];
            if (inside) {
                const float *corner = image + (top * s->W + left) * s->C + c;
                for (int i = 0; i < SIDE; ++i)
                    for (int j = 0; j < SIDE; ++j) d[i * SIDE + j] = load(corner + (i * s->W + j) * s->C);
            } else {
                for (int i = 0; i < SIDE; ++i)
                    for (int j = 0; j < SIDE; ++j) d[i * SIDE + j] = pixel(image, top + i, left + j, c, s->C, s);
            }
            for (int j = 0; j < SIDE; ++j) spread(half + j, d + j, SIDE);
            for (int i = 0; i < SIDE; ++i) spread(d + i * SIDE, half + i * SIDE, 1);
            for (int place = 0; place < PLACES; ++place) store(v + place * apart + t * s->C + c, d[place]);
        }
    }
}

/* Products to outputs: y of a block of tiles. K may be less than a vector. */
static void gather_block(float *y, const float *m, const float *bias, int64_t first, int64_t tiles, int64_t KP,
                         const Shape *s)
{
    const int64_t apart = distance(KP);
    for (int64_t t = 0; t < tiles; ++t) {
        const Tile tile = tile_at(first + t, s);
        float *corner = y + ((tile.image * s->H + tile.y) * s->W + tile.x) * s->K;
        const int64_t rows = s->H - tile.y < 4 ? s->H - tile.y : 4, columns = s->W - tile.x < 4 ? s->W - tile.x : 4;
        FOR_VECTORS(k, s->K < LANES ? LANES : s->K) {
            vec d[PLACES], half[4 * SIDE], out[16];
            for (int place = 0; place < PLACES; ++place) d[place] = load(m + place * apart + t * KP + k);
            for (int j = 0; j < SIDE; ++j) gather(half + j, SIDE, d + j, SIDE);
            for (int i = 0; i < 4; ++i) gather(out + i * 4, 1, half + i * SIDE, 1);
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t j = 0; j < columns; ++j) {
                    float *to = corner + (i * s->W + j) * s->K + k;
                    if (s->K < LANES) {
                        for (int64_t n = 0; n < s->K; ++n) to[n] = out[i * 4 + j][n] + bias[n];
                    } else {
                        store(to, out[i * 4 + j] + load(bias + k));
                    }
                }
        }
    }
}

/* Gradients of outputs to those of products, m[place][tile][k], zero beyond K; gbias adds the gradients up. */
static void scatter_block(float *m, float *gbias, const float *gy, int64_t first, int64_t tiles, int64_t KP,
                          const Shape *s)
{
    const int64_t apart = distance(KP);
    for (int64_t t = 0; t < tiles; ++t) {
        const Tile tile = tile_at(first + t, s);
        const float *image = gy + tile.image * s->H * s->W * s->K;
        for (int64_t k = 0; k < KP; k += LANES) {
            vec g[16], half[4 * SIDE], d[PLACES], sum = splat(0.0f);
            for (int i = 0; i < 4; ++i)
                for (int j = 0; j < 4; ++j) {
                    vec value = splat(0.0f);
                    if (k + LANES <= s->K) {
                        value = pixel(image, tile.y + i, tile.x + j, k, s->K, s);
                    } else if (tile.y + i < s->H && tile.x + j < s->W) {
                        const float *from = image + ((tile.y + i) * s->W + tile.x + j) * s->K + k;
                        for (int64_t n = 0; n < s->K - k; ++n) value[n] = from[n];
                    }
                    g[i * 4 + j] = value;
                    sum += value;
                }
            for (int j = 0; j < 4; ++j) scatter(half + j, 4, g + j, 4);
            for (int i = 0; i < SIDE; ++i) scatter(d + i * SIDE, 1, half + i * 4, 1);
            for (int place = 0; place < PLACES; ++place) store(m + place * apart + t * KP + k, d[place]);
            store(gbias + k, load(gbias + k) + sum);
        }
    }
}

static float *workspace(int64_t floats) { return aligned_alloc(64, ROUND_UP(4 * floats, 64)); }

void winograd_forward(const float *x, const float *u, const float *bias, float *y, Shape s, int threads)
{
    const int64_t KP = ROUND_UP(s.K, 16), tiles = tiles_of(&s);
#pragma omp parallel num_threads(threads)
    {
        float *v = workspace(PLACES * distance(s.C)), *m = workspace(PLACES * distance(KP));
#pragma omp for schedule(static)
        for (int64_t first = 0; first < tiles; first += TILES) {
            const int64_t here = tiles - first < TILES ? tiles - first : TILES;
            spread_block(v, x, first, here, &s);
            for (int64_t place = 0; place < PLACES; ++place)
                product(m + place * distance(KP), 0, v + place * distance(s.C), s.C, 1, u + place * s.C * KP, here, s.C,
                        KP);
            gather_block(y, m, bias, first, here, KP, &s);
        }
        free(v);
        free(m);
    }
}

void winograd_weights(const float *x, const float *gy, float *gu, float *gbias, Shape s, int threads)
{
    const int64_t KP = ROUND_UP(s.K, 16), tiles = tiles_of(&s);
#pragma omp parallel num_threads(threads)
    {
        float *v = workspace(PLACES * distance(s.C)), *m = workspace(PLACES * distance(KP));
        float *own = gu + omp_get_thread_num() * PLACES * s.C * KP, *own_bias = gbias + omp_get_thread_num() * KP;
#pragma omp for schedule(static)
        for (int64_t first = 0; first < tiles; first += TILES) {
            const int64_t here = tiles - first < TILES ? tiles - first : TILES;
            spread_block(v, x, first, here, &s);
            scatter_block(m, own_bias, gy, first, here, KP, &s);
            for (int64_t place = 0; place < PLACES; ++place) {
                float *to = own + place * s.C * KP;
                product(to, to, v + place * distance(s.C), 1, s.C, m + place * distance(KP), s.C, here, KP);
            }
        }
        free(v);
        free(m);
    }
}
