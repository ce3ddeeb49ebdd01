/* Plain C, for every machine. */
#include "kernel.h"

#define ROWS 4

typedef struct { uint16_t at[16]; } half_table;
typedef struct { float at[16]; } full_table;
typedef struct { float at[8]; } lanes;

static inline half_table make_half(const float *value, float scale, int dtype) {
    half_table t;
    for (int i = 0; i < 16; i++) store(t.at, dtype, i, value[i] * scale);
    return t;
}

static inline full_table make_full(const float *value, float scale, int dtype) {
    full_table t;
    for (int i = 0; i < 16; i++) t.at[i] = through(value[i] * scale, dtype);
    return t;
}

static inline uint16_t half_at(half_table t, int nibble) { return t.at[nibble]; }
static inline float full_at(full_table t, int nibble) { return t.at[nibble]; }

static inline void expand_half(half_table t, const uint8_t *codes, int64_t n, uint16_t *out) {
    for (int64_t i = 0; i < n; i += 2, codes++) {
        out[i] = t.at[*codes >> 4];
        out[i + 1] = t.at[*codes & 15];
    }
}

static inline void expand_full(full_table t, const uint8_t *codes, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i += 2, codes++) {
        out[i] = t.at[*codes >> 4];
        out[i + 1] = t.at[*codes & 15];
    }
}

static inline int32_t largest(const void *x, int dtype, int64_t n) {
    int32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t bits = (int32_t)(bits_of(load(x, dtype, i)) & 0x7fffffffu);
        most = bits > most ? bits : most;
    }
    return most;
}

static inline __attribute__((always_inline)) void encode_from(
    const void *x, int dtype, int64_t n, float inverse, const struct dw_codebook *book, uint8_t *codes) {
    for (int64_t i = 0; i < n; i += 2) {
        uint8_t even = nibble_of(load(x, dtype, i) * inverse, book);
        codes[i / 2] = (uint8_t)(even << 4 | nibble_of(load(x, dtype, i + 1) * inverse, book));
    }
}

static inline lanes no_lanes(void) { return (lanes){{0}}; }

static inline __attribute__((always_inline)) void dot(
    const uint8_t *codes, full_table t, int64_t n, const float *x, int64_t stride, const int rows, lanes *sum) {
    for (int64_t i = 0; i < n; i += 8) {
        float weight[8];
        expand_full(t, codes + i / 2, 8, weight);
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < 8; j++) sum[r].at[j] += weight[j] * x[r * stride + i + j];
    }
}

static inline float total(lanes sum) {
    float all = 0;
    for (int j = 0; j < 8; j++) all += sum.at[j];
    return all;
}

#include "body.h"

const struct dw_kernels dw_generic = {
    "generic", quantize_4bit, dequantize_4bit, linear_4bit, 0, quantize_8bit, dequantize_8bit, adamw_8bit,
};
