/* What the files of one instruction set give to dispatch.c, and the arithmetic of single numbers that they share. */
#ifndef DELTAW_KERNEL_H
#define DELTAW_KERNEL_H

#include <string.h>

#include "deltaw.h"

/* Each works on blocks, or outputs, [first, last) and on the calling thread. */
struct dw_kernels {
    const char *name;
    void (*quantize_4bit)(
        const void *x, int dtype, int64_t n, int64_t blocksize, const struct dw_codebook *book, uint8_t *codes,
        float *absmax, int64_t first, int64_t last);
    void (*dequantize_4bit)(const struct dw_packed *w, void *out, int dtype, int64_t first, int64_t last);
    /* x float32 (rows, columns), rows `stride` apart; adds to sums (outputs, rows); `scratch` holds `columns` floats */
    void (*linear_4bit)(
        const struct dw_packed *w, int weight_dtype, int64_t columns, const float *x, int64_t stride, int64_t rows,
        float *sums, float *scratch, int64_t first, int64_t last);
    /* the same for x and weight bfloat16 and columns in whole chunks of 32; NULL where the machine cannot */
    void (*linear_4bit_bf16)(
        const struct dw_packed *w, int64_t columns, const uint16_t *x, int64_t stride, int64_t rows, float *sums,
        int64_t first, int64_t last);
    void (*quantize_8bit)(
        const float *x, int64_t n, int64_t blocksize, const struct dw_map *map, uint8_t *codes, float *absmax,
        int64_t first, int64_t last);
    void (*dequantize_8bit)(
        const uint8_t *codes, const float *absmax, int64_t n, int64_t blocksize, const float *map, float *out,
        int64_t first, int64_t last);
    void (*adamw_8bit)(const struct dw_adamw *step, int64_t first, int64_t last);
};

extern const struct dw_kernels dw_generic;
#if defined(DW_X86)
extern const struct dw_kernels dw_avx2;
extern const struct dw_kernels dw_avx512;
extern const struct dw_kernels dw_avx512_bf16;
#endif

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float bf16_to_float(uint16_t half) { return float_of((uint32_t)half << 16); }

/* to nearest even; NaN stays NaN */
static inline uint16_t float_to_bf16(float value) {
    uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

static inline float fp16_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) { /* infinite or NaN, made quiet as the hardware does */
        uint32_t mantissa = (rest & 0x3ff) << 13;
        return float_of(sign | 0x7f800000u | mantissa | (mantissa ? 0x400000u : 0));
    }
    if (rest < 0x400) { /* subnormal: 2^-24 each, exact in float32 */
        float value = (float)rest * 5.9604644775390625e-8f;
        return sign ? -value : value;
    }
    return float_of(sign | ((rest << 13) + (112u << 23)));
}

/* to nearest even, subnormals and infinities too */
static inline uint16_t float_to_fp16(float value) {
    uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00 | ((rest >> 13) & 0x3ff));
    if (rest >= 0x477ff000u) return (uint16_t)(sign | 0x7c00); /* 65,520 and more */
    if (rest < 0x38800000u) {
        /* below 2^-14 adding 1/2 leaves just the bits of a subnormal, rounded by the adder */
        float shifted = float_of(rest) + 0.5f;
        return (uint16_t)(sign | (bits_of(shifted) - bits_of(0.5f)));
    }
    return (uint16_t)(sign | ((rest - (112u << 23) + 0xfffu + ((rest >> 13) & 1)) >> 13));
}

static inline float load(const void *x, int dtype, int64_t i) {
    if (dtype == DW_FLOAT32) return ((const float *)x)[i];
    uint16_t half = ((const uint16_t *)x)[i];
    return dtype == DW_BFLOAT16 ? bf16_to_float(half) : fp16_to_float(half);
}

static inline void store(void *out, int dtype, int64_t i, float value) {
    if (dtype == DW_FLOAT32)
        ((float *)out)[i] = value;
    else
        ((uint16_t *)out)[i] = dtype == DW_BFLOAT16 ? float_to_bf16(value) : float_to_fp16(value);
}

/* What is left of a number once it went through a dtype. */
static inline float through(float value, int dtype) {
    if (dtype == DW_BFLOAT16) return bf16_to_float(float_to_bf16(value));
    if (dtype == DW_FLOAT16) return fp16_to_float(float_to_fp16(value));
    return value;
}

/* How many thresholds lie below a number: a tie goes to the lower side, NaN above all. */
static inline int place_of(float value, const float *threshold, int steps) {
    int at = 0;
    for (int step = steps; step; step >>= 1)
        if (!(value <= threshold[at + step - 1])) at += step;
    return at;
}

static inline uint8_t nibble_of(float value, const struct dw_codebook *book) {
    return book->order[place_of(value, book->threshold, 8)];
}

/* A block's scale is the largest magnitude; its bits order as the magnitudes do, NaN last. */
static inline float absmax_of(int32_t bits) { return float_of(bits > 0x7f800000 ? 0x7fc00000u : (uint32_t)bits); }

#endif
