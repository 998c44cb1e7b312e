/* Pixels of a window in images of one storage type; included once per type, see both_types.h. */

/* C of a window's channels as (C, width) with zeros where padded; `pitch` channels lie from pixel to pixel. */
INLINE void NAME(take)(float *out, const T *image, int64_t pitch, const Window *window, int64_t C, const int64_t N,
                       const int64_t width)
{
    const int64_t wide = ROUND_UP(C, LANES);
    ARRAY(rows, N * wide);
    for (int64_t n = 0; n < N; ++n) {
        const T *from = image + window->pixel[n] * pitch;
        for (int64_t c = 0; c < C; ++c) rows[n * wide + c] = LOAD(from[c]);
    }
    transpose(out, width, rows, wide, N, C);
}

/* And back. */
INLINE void NAME(put)(T *image, int64_t pitch, const float *x, const Window *window, int64_t C, const int64_t N,
                      const int64_t width)
{
    const int64_t wide = ROUND_UP(C, LANES);
    ARRAY(rows, N * wide);
    transpose(rows, wide, x, width, C, N);
    for (int64_t n = 0; n < N; ++n) {
        T *to = image + window->pixel[n] * pitch;
        for (int64_t c = 0; c < C; ++c) to[c] = STORE(rows[n * wide + c]);
    }
}
