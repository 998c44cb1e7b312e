/* Includes the header KERNELS twice: its functions for images of float, and for those of bfloat16. */
#define T float
#define LOAD(v) (v)
#define STORE(v) (v)
#define READ(type, p) (*(const type *)(p))
#define NAME(x) x##_f32
#include KERNELS
#undef T
#undef LOAD
#undef STORE
#undef READ
#undef NAME

#define T uint16_t
#define LOAD(v) from_bf16(v)
#define STORE(v) to_bf16(v)
#define READ(type, p) type##_of_bf16(p)
#define NAME(x) x##_bf16
#include KERNELS
#undef T
#undef LOAD
#undef STORE
#undef READ
#undef NAME
