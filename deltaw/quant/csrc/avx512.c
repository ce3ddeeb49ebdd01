/* AVX-512 with F, BW, VL and VBMI; what also wants BF16 is marked. */
#include <immintrin.h>

#include "kernel.h"

#define ROWS 4

typedef __m512i half_table; /* the sixteen values twice: of an index word only five bits count, the fifth for nothing */
typedef __m512 full_table;
typedef struct { __m512 even, odd; } lanes;

/* to nearest even in the upper two bytes; NaN stays NaN */
static inline __m512i round_bf16(__m512 value) {
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
}

static inline half_table make_half(const float *value, float scale, int dtype) {
    __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(value), _mm512_set1_ps(scale));
    __m256i half = dtype == DW_BFLOAT16 ? _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(scaled), 16))
                                        : _mm512_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT);
    return _mm512_broadcast_i64x4(half);
}

static inline full_table make_full(const float *value, float scale, int dtype) {
    __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(value), _mm512_set1_ps(scale));
    if (dtype == DW_BFLOAT16)
        return _mm512_castsi512_ps(_mm512_and_si512(round_bf16(scaled), _mm512_set1_epi32((int)0xffff0000)));
    if (dtype == DW_FLOAT16) return _mm512_cvtph_ps(_mm512_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT));
    return scaled;
}

static inline uint16_t half_at(half_table t, int nibble) {
    uint16_t at[32];
    _mm512_storeu_si512(at, t);
    return at[nibble];
}

static inline float full_at(full_table t, int nibble) {
    float at[16];
    _mm512_storeu_ps(at, t);
    return at[nibble];
}

/* 16 bytes of codes -> 32 words, whose low four bits are the nibbles in order; what is above them is noise */
static inline __m512i spread_words(const uint8_t *codes) {
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
    /* of each pair of double words the bits from 4, 0, 36, 32 on, into the first byte of each word */
    return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x2020242400000404), bytes);
}

/* 8 bytes -> 16 double words, in the same way */
static inline __m512i spread_dwords(const uint8_t *codes) {
    __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)codes));
    return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x0000000004040404), bytes);
}

static inline void expand_half(half_table t, const uint8_t *codes, int64_t n, uint16_t *out) {
    for (int64_t i = 0; i < n; i += 32)
        _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(spread_words(codes + i / 2), t));
}

static inline void expand_full(full_table t, const uint8_t *codes, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i += 16)
        _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(spread_dwords(codes + i / 2), t));
}

static inline __attribute__((always_inline)) __m512 load16(const void *x, int dtype, int64_t i) {
    if (dtype == DW_FLOAT32) return _mm512_loadu_ps((const float *)x + i);
    __m256i half = _mm256_loadu_si256((const __m256i *)((const uint16_t *)x + i));
    if (dtype == DW_FLOAT16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static inline __attribute__((always_inline)) int32_t largest_of(const void *x, const int dtype, int64_t n) {
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += 16) {
        __m512i bits = _mm512_castps_si512(load16(x, dtype, i));
        most = _mm512_max_epi32(most, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
    }
    return _mm512_reduce_max_epi32(most);
}

/* the dtype is a constant in each loop */
static inline int32_t largest(const void *x, int dtype, int64_t n) {
    if (dtype == DW_FLOAT32) return largest_of(x, DW_FLOAT32, n);
    return dtype == DW_BFLOAT16 ? largest_of(x, DW_BFLOAT16, n) : largest_of(x, DW_FLOAT16, n);
}

static inline __attribute__((always_inline)) void encode_from(
    const void *x, const int dtype, int64_t n, float inverse, const struct dw_codebook *book, uint8_t *codes) {
    /* a binary search: what remains to be compared with is looked up by what was found so far */
    __m512 all = _mm512_maskz_loadu_ps(0x7fff, book->threshold);
    __m512 middle = _mm512_set1_ps(book->threshold[7]);
    __m512 fourth = _mm512_maskz_loadu_ps(0x0fff, book->threshold + 3);
    __m512 second = _mm512_maskz_loadu_ps(0x3fff, book->threshold + 1);
    __m128i order = _mm_loadu_si128((const __m128i *)book->order);
    for (int64_t i = 0; i < n; i += 16) {
        __m512 value = _mm512_mul_ps(load16(x, dtype, i), _mm512_set1_ps(inverse));
        __mmask16 above = _mm512_cmp_ps_mask(value, middle, _CMP_NLE_UQ);
        __m512i at = _mm512_maskz_set1_epi32(above, 8);
        above = _mm512_cmp_ps_mask(value, _mm512_permutexvar_ps(at, fourth), _CMP_NLE_UQ);
        at = _mm512_mask_or_epi32(at, above, at, _mm512_set1_epi32(4));
        above = _mm512_cmp_ps_mask(value, _mm512_permutexvar_ps(at, second), _CMP_NLE_UQ);
        at = _mm512_mask_or_epi32(at, above, at, _mm512_set1_epi32(2));
        above = _mm512_cmp_ps_mask(value, _mm512_permutexvar_ps(at, all), _CMP_NLE_UQ);
        at = _mm512_mask_or_epi32(at, above, at, _mm512_set1_epi32(1));
        __m128i nibbles = _mm_shuffle_epi8(order, _mm512_cvtepi32_epi8(at));
        /* even * 16 + odd, pair by pair */
        __m128i pairs = _mm_maddubs_epi16(nibbles, _mm_set1_epi16(0x0110));
        _mm_storel_epi64((__m128i *)(codes + i / 2), _mm_packus_epi16(pairs, pairs));
    }
}

static inline lanes no_lanes(void) { return (lanes){_mm512_setzero_ps(), _mm512_setzero_ps()}; }

static inline __attribute__((always_inline)) void dot(
    const uint8_t *codes, full_table t, int64_t n, const float *x, int64_t stride, const int rows, lanes *sum) {
    for (int64_t i = 0; i < n; i += 32) {
        __m512 even = _mm512_permutexvar_ps(spread_dwords(codes + i / 2), t);
        __m512 odd = _mm512_permutexvar_ps(spread_dwords(codes + i / 2 + 8), t);
        for (int r = 0; r < rows; r++) {
            const float *row = x + r * stride + i;
            sum[r].even = _mm512_fmadd_ps(even, _mm512_loadu_ps(row), sum[r].even);
            sum[r].odd = _mm512_fmadd_ps(odd, _mm512_loadu_ps(row + 16), sum[r].odd);
        }
    }
}

static inline float total(lanes sum) { return _mm512_reduce_add_ps(_mm512_add_ps(sum.even, sum.odd)); }

#include "body.h"

/* --- with BF16: its conversion takes subnormal numbers for zero, and its products do too ----------------------- */

#define BF16 __attribute__((target("avx512bf16")))
#define MORE_ROWS 8

/* A block's sixteen values twice, for scales of which no value is subnormal, or where that does not matter. */
BF16 static inline half_table convert(const float *value, float scale) {
    __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(value), _mm512_set1_ps(scale));
    return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(scaled));
}

/* Whether any of the scales makes values that may be subnormal; codes are zero or 2^-8 and more. */
static inline int any_tiny(const float *scale, int64_t n) {
    int tiny = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t magnitude = bits_of(scale[i]) & 0x7fffffffu;
        tiny |= magnitude - 1 < (20u << 23) - 1; /* 2^-107; zero itself is not tiny */
    }
    return tiny;
}

BF16 static void dequantize_4bit_bf16(const struct dw_packed *w, void *out, int dtype, int64_t first, int64_t last) {
    float scale[GROUP];
    int64_t full = dtype == DW_BFLOAT16 ? at_most(last, w->n / w->blocksize) : first, count;
    for (int64_t b = first; b < full; b += count) {
        count = at_most(GROUP, full - b);
        scales(w, b, count, scale);
        if (any_tiny(scale, count)) {
            dequantize_4bit(w, out, dtype, b, b + count);
            continue;
        }
        const uint8_t *codes = w->codes + b * w->blocksize / 2;
        uint16_t *to = (uint16_t *)out + b * w->blocksize;
        for (int64_t i = 0; i < count; i++, codes += w->blocksize / 2, to += w->blocksize)
            expand_half(convert(w->value, scale[i]), codes, w->blocksize, to);
    }
    dequantize_4bit(w, out, dtype, full > first ? full : first, last);
}

BF16 static inline __attribute__((always_inline)) void one_output_bf16(
    const struct dw_packed *w, int64_t at, int64_t end, const uint16_t *x, int64_t stride, const int rows,
    float *sums) {
    __m512 sum[MORE_ROWS];
    for (int r = 0; r < rows; r++) sum[r] = _mm512_setzero_ps();
    float scale[GROUP];
    for (int64_t b = at / w->blocksize; at < end;) {
        int64_t count = at_most(GROUP, (end - 1) / w->blocksize + 1 - b);
        scales(w, b, count, scale);
        for (int64_t i = 0; i < count; i++, b++) {
            int64_t n = at_most(end, (b + 1) * w->blocksize) - at;
            const uint8_t *codes = w->codes + at / 2;
            half_table table = convert(w->value, scale[i]);
            for (int64_t j = 0; j < n; j += 32) {
                __m512i weight = _mm512_permutexvar_epi16(spread_words(codes + j / 2), table);
                for (int r = 0; r < rows; r++)
                    sum[r] = _mm512_dpbf16_ps(
                        sum[r], (__m512bh)weight, (__m512bh)_mm512_loadu_si512(x + r * stride + j));
            }
            at += n, x += n;
        }
    }
    for (int r = 0; r < rows; r++) sums[r] += _mm512_reduce_add_ps(sum[r]);
}

BF16 static void linear_4bit_bf16(
    const struct dw_packed *w, int64_t columns, const uint16_t *x, int64_t stride, int64_t rows, float *sums,
    int64_t first, int64_t last) {
    for (int64_t r = 0, many; r < rows; r += many) {
        many = rows - r >= 8 ? 8 : rows - r >= 4 ? 4 : rows - r >= 2 ? 2 : 1;
        for (int64_t o = first; o < last; o++) {
            const uint16_t *from = x + r * stride;
            float *to = sums + o * rows + r;
            int64_t at = o * columns, end = at + columns;
            if (many == 8)
                one_output_bf16(w, at, end, from, stride, 8, to);
            else if (many == 4)
                one_output_bf16(w, at, end, from, stride, 4, to);
            else if (many == 2)
                one_output_bf16(w, at, end, from, stride, 2, to);
            else
                one_output_bf16(w, at, end, from, stride, 1, to);
        }
    }
}

const struct dw_kernels dw_avx512 = {
    "avx512", quantize_4bit, dequantize_4bit, linear_4bit, 0, quantize_8bit, dequantize_8bit, adamw_8bit,
};
const struct dw_kernels dw_avx512_bf16 = {
    "avx512_bf16",    quantize_4bit, dequantize_4bit_bf16, linear_4bit,
    linear_4bit_bf16, quantize_8bit, dequantize_8bit,      adamw_8bit,
};
