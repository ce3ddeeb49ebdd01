/* The kernels of deltaw.quant, as a plain C interface: no Python, no torch, no state but which instruction set runs.
 *
 * A 4-bit weight has n elements in blocks of `blocksize` (a power of two, 32 at least) over the flat array, two a byte,
 * the even one in the high nibble. All arrays are contiguous; those of bytes may start anywhere, all others where their
 * dtype asks for. `threads` is an upper bound: little work runs on the caller alone. */
#ifndef DELTAW_H
#define DELTAW_H

#include <stdint.h>

#if defined(__GNUC__)
#define DW_API __attribute__((visibility("default")))
#else
#define DW_API
#endif

/* Raised at each change of a signature or of a struct below; the loader refuses another number. */
#define DW_ABI 1

enum dw_dtype { DW_FLOAT32 = 0, DW_BFLOAT16 = 1, DW_FLOAT16 = 2 };

/* The sixteen values of a 4-bit type by nibble, the midpoints between neighbours in ascending order, and the nibble of
 * each place in that order. */
struct dw_codebook {
    float value[16];
    float threshold[15];
    uint8_t order[16];
};

/* 2^-23 to 1 in steps of a float's top seven bits of mantissa: in each lies at most one threshold of a dynamic map */
#define DW_CELLS (23 * 128 + 1)

/* An 8-bit map in ascending order, with its thresholds and, for a magnitude's cell and sign, the lowest code in it. */
struct dw_map {
    float value[256];
    float threshold[256];
    uint8_t lowest[2][DW_CELLS];
};

/* A 4-bit weight. `absmax` holds float32, or, where `nested_absmax` is given, codes of `nested_map`; then the scale of
 * block i is nested_map[absmax[i]] * nested_absmax[i / nested_blocksize] + *nested_offset, rounded after each step. */
struct dw_packed {
    int64_t n;
    int64_t blocksize;
    const uint8_t *codes;
    const void *absmax;
    const float *nested_absmax;
    const float *nested_offset;
    const float *nested_map;
    int64_t nested_blocksize;
    const float *value; /* [16], of the codebook */
};

DW_API int32_t dw_abi(void);
/* Whether it was built with OpenMP; without, `threads` is ignored. */
DW_API int32_t dw_openmp(void);
/* "avx512", "avx2", "generic", or "" for the best that this machine has. 0 when it was taken, 1 for an unknown name,
 * 2 when this machine or this build lacks it. */
DW_API int32_t dw_select(const char *isa);
DW_API const char *dw_isa(void);

/* Fills everything from value[256]. 1 when two thresholds share a cell: not a dynamic map. */
DW_API int32_t dw_map_init(struct dw_map *map, const float *value);

DW_API void dw_quantize_4bit(
    const void *x, int32_t dtype, int64_t n, int64_t blocksize, const struct dw_codebook *book, uint8_t *codes,
    float *absmax, int32_t threads);
DW_API void dw_dequantize_4bit(const struct dw_packed *weight, void *out, int32_t dtype, int32_t threads);

/* x (rows, n / outputs) W^T -> out (rows, outputs), both of dtype `dtype`; W is rounded to
 * `weight_dtype`; sums are float32. 1 when memory ran out, and then nothing was written. */
DW_API int32_t dw_linear_4bit(
    const struct dw_packed *weight, int32_t weight_dtype, int64_t outputs, const void *x, int32_t dtype, int64_t rows,
    void *out, int32_t threads);

DW_API void dw_quantize_8bit(
    const float *x, int64_t n, int64_t blocksize, const struct dw_map *map, uint8_t *codes, float *absmax,
    int32_t threads);
DW_API void dw_dequantize_8bit(
    const uint8_t *codes, const float *absmax, int64_t n, int64_t blocksize, const float *map, float *out,
    int32_t threads);

/* One parameter's state and settings for a step of AdamW whose moments are kept in 8 bits. */
struct dw_adamw {
    int64_t n;
    int64_t blocksize;
    float *parameter;
    const void *gradient;
    int32_t gradient_dtype;
    uint8_t *first, *second;
    float *first_absmax, *second_absmax;
    const struct dw_map *first_map, *second_map;
    float decay;           /* 1 - lr * weight_decay */
    float first_weight;    /* 1 - beta1 */
    float beta2;
    float second_weight;   /* 1 - beta2 */
    float root_correction; /* sqrt(1 - beta2^step) */
    float eps;
    float step_size;       /* -lr / (1 - beta1^step) */
};
DW_API void dw_adamw_8bit(const struct dw_adamw *step, int32_t threads);

#endif
