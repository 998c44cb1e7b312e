/* Multi-head attention within square windows of an image, forward and backward, without rolled or cut copies of it.
 *
 * Layouts are channels-last and dense:
 *   qkv, gqkv   (M, H, W, 3, heads, D)   float or bfloat16
 *   y, gy       (M, H, W, heads, D)      the same type
 *   bias, gbias (heads, N, N)            [head][key][query], float; N = side * side tokens, row by row
 */
#include <omp.h>

#include "window.h"

#define KERNELS "window_kernel.h"
#include "both_types.h"
