/* AVX2 with FMA and F16C. */
#include <immintrin.h>

#include "kernel.h"

#define ROWS 4

typedef struct { __m256i low, high; } half_table; /* the lower and the upper bytes of the sixteen values, twice */
typedef struct { __m256 low, high; } full_table;  /* of nibbles 0 to 7, and 8 to 15 */
typedef struct { __m256 even, odd; } lanes;

/* to nearest even in the upper two bytes, the lower two zero; NaN stays NaN */
static inline __m256 round_bf16(__m256 value) {
    __m256i bits = _mm256_castps_si256(value);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    rounded = _mm256_and_si256(rounded, _mm256_set1_epi32((int)0xffff0000));
    __m256 nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
    return _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), nan);
}

static inline __m256 round_to(__m256 value, int dtype) {
    if (dtype == DW_BFLOAT16) return round_bf16(value);
    if (dtype == DW_FLOAT16) return _mm256_cvtph_ps(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    return value;
}

static inline full_table make_full(const float *value, float scale, int dtype) {
    __m256 s = _mm256_set1_ps(scale);
    return (full_table){
        round_to(_mm256_mul_ps(_mm256_loadu_ps(value), s), dtype),
        round_to(_mm256_mul_ps(_mm256_loadu_ps(value + 8), s), dtype),
    };
}

static inline half_table make_half(const float *value, float scale, int dtype) {
    __m256 s = _mm256_set1_ps(scale);
    __m256 a = _mm256_mul_ps(_mm256_loadu_ps(value), s), b = _mm256_mul_ps(_mm256_loadu_ps(value + 8), s);
    __m128i first, second; /* eight words each */
    if (dtype == DW_BFLOAT16) {
        __m256i x = _mm256_srli_epi32(_mm256_castps_si256(round_bf16(a)), 16);
        __m256i y = _mm256_srli_epi32(_mm256_castps_si256(round_bf16(b)), 16);
        __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(x, y), 0xd8);
        first = _mm256_castsi256_si128(both), second = _mm256_extracti128_si256(both, 1);
    } else {
        first = _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT);
        second = _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT);
    }
    __m128i byte = _mm_set1_epi16(0xff);
    __m128i low = _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte));
    __m128i high = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
    return (half_table){_mm256_broadcastsi128_si256(low), _mm256_broadcastsi128_si256(high)};
}

static inline uint16_t half_at(half_table t, int nibble) {
    uint8_t low[32], high[32];
    _mm256_storeu_si256((__m256i *)low, t.low);
    _mm256_storeu_si256((__m256i *)high, t.high);
    return (uint16_t)(low[nibble] | high[nibble] << 8);
}

static inline float full_at(full_table t, int nibble) {
    float at[16];
    _mm256_storeu_ps(at, t.low);
    _mm256_storeu_ps(at + 8, t.high);
    return at[nibble];
}

static inline void expand_half(half_table t, const uint8_t *codes, int64_t n, uint16_t *out) {
    for (int64_t i = 0; i < n; i += 32) {
        /* 16 bytes -> their 32 nibbles in order, with those that belong to one output vector in both lanes */
        __m128i bytes = _mm_loadu_si128((const __m128i *)(codes + i / 2)), four = _mm_set1_epi8(15);
        __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), four), odd = _mm_and_si128(bytes, four);
        __m256i nibbles = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
        nibbles = _mm256_permute4x64_epi64(nibbles, 0xd8);
        __m256i low = _mm256_shuffle_epi8(t.low, nibbles), high = _mm256_shuffle_epi8(t.high, nibbles);
        _mm256_storeu_si256((__m256i *)(out + i), _mm256_unpacklo_epi8(low, high));
        _mm256_storeu_si256((__m256i *)(out + i + 16), _mm256_unpackhi_epi8(low, high));
    }
}

/* 4 bytes of codes -> the 8 values */
static inline __m256 look_up(full_table t, const uint8_t *codes) {
    int32_t bytes;
    memcpy(&bytes, codes, sizeof bytes);
    /* each nibble into the top four bits of its double word: its sign there is what the blend asks for */
    __m256i top = _mm256_sllv_epi32(_mm256_set1_epi32(bytes), _mm256_setr_epi32(24, 28, 16, 20, 8, 12, 0, 4));
    __m256i index = _mm256_srli_epi32(top, 28); /* of it the permutation takes three bits */
    return _mm256_blendv_ps(
        _mm256_permutevar8x32_ps(t.low, index), _mm256_permutevar8x32_ps(t.high, index), _mm256_castsi256_ps(top));
}

static inline void expand_full(full_table t, const uint8_t *codes, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i += 8) _mm256_storeu_ps(out + i, look_up(t, codes + i / 2));
}

static inline __attribute__((always_inline)) __m256 load8(const void *x, int dtype, int64_t i) {
    if (dtype == DW_FLOAT32) return _mm256_loadu_ps((const float *)x + i);
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)x + i));
    if (dtype == DW_FLOAT16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

static inline __attribute__((always_inline)) int32_t largest_of(const void *x, const int dtype, int64_t n) {
    __m256i most = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += 8) {
        __m256i bits = _mm256_castps_si256(load8(x, dtype, i));
        most = _mm256_max_epi32(most, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
    }
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

/* the dtype is a constant in each loop */
static inline int32_t largest(const void *x, int dtype, int64_t n) {
    if (dtype == DW_FLOAT32) return largest_of(x, DW_FLOAT32, n);
    return dtype == DW_BFLOAT16 ? largest_of(x, DW_BFLOAT16, n) : largest_of(x, DW_FLOAT16, n);
}

/* how many thresholds lie below each of 8 values */
static inline __m256i places(__m256 value, const __m256 *threshold) {
    __m256i at = _mm256_setzero_si256();
    for (int i = 0; i < 15; i++) {
        __m256 above = _mm256_cmp_ps(value, threshold[i], _CMP_NLE_UQ); /* -1 or 0 */
        at = _mm256_sub_epi32(at, _mm256_castps_si256(above));
    }
    return at;
}

static inline __attribute__((always_inline)) void encode_from(
    const void *x, const int dtype, int64_t n, float inverse, const struct dw_codebook *book, uint8_t *codes) {
    __m256 threshold[15], factor = _mm256_set1_ps(inverse);
    for (int i = 0; i < 15; i++) threshold[i] = _mm256_set1_ps(book->threshold[i]);
    __m256i order = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)book->order));
    for (int64_t i = 0; i < n; i += 32) {
        __m256i a = places(_mm256_mul_ps(load8(x, dtype, i), factor), threshold);
        __m256i b = places(_mm256_mul_ps(load8(x, dtype, i + 8), factor), threshold);
        __m256i c = places(_mm256_mul_ps(load8(x, dtype, i + 16), factor), threshold);
        __m256i d = places(_mm256_mul_ps(load8(x, dtype, i + 24), factor), threshold);
        /* packing works within each half: fours of bytes come out as 0 8 16 24 | 4 12 20 28 */
        __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
        bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        /* even * 16 + odd, pair by pair */
        __m256i pairs = _mm256_maddubs_epi16(_mm256_shuffle_epi8(order, bytes), _mm256_set1_epi16(0x0110));
        pairs = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
        _mm_storeu_si128((__m128i *)(codes + i / 2), _mm256_castsi256_si128(pairs));
    }
}

static inline lanes no_lanes(void) { return (lanes){_mm256_setzero_ps(), _mm256_setzero_ps()}; }

static inline __attribute__((always_inline)) void dot(
    const uint8_t *codes, full_table t, int64_t n, const float *x, int64_t stride, const int rows, lanes *sum) {
    for (int64_t i = 0; i < n; i += 16) {
        __m256 even = look_up(t, codes + i / 2), odd = look_up(t, codes + i / 2 + 4);
        for (int r = 0; r < rows; r++) {
            const float *row = x + r * stride + i;
            sum[r].even = _mm256_fmadd_ps(even, _mm256_loadu_ps(row), sum[r].even);
            sum[r].odd = _mm256_fmadd_ps(odd, _mm256_loadu_ps(row + 8), sum[r].odd);
        }
    }
}

static inline float total(lanes sum) {
    __m256 eight = _mm256_add_ps(sum.even, sum.odd);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

#include "body.h"

const struct dw_kernels dw_avx2 = {
    "avx2", quantize_4bit, dequantize_4bit, linear_4bit, 0, quantize_8bit, dequantize_8bit, adamw_8bit,
};
