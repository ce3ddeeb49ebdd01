/* Which instruction set runs, and how the work is shared among threads. */
#include <stdlib.h>

#include "kernel.h"

/* a thread is woken for no less than this many elements */
#define LEAST (1 << 16)

static const struct dw_kernels *chosen = &dw_generic;

int32_t dw_abi(void) { return DW_ABI; }

int32_t dw_openmp(void) {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}

const char *dw_isa(void) { return chosen->name; }

#if defined(DW_X86)
static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi");
}
static int has_avx512_bf16(void) { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
static int always(void) { return 1; }

/* the best first */
static const struct {
    const struct dw_kernels *kernels;
    int (*here)(void);
} known[] = {
#if defined(DW_X86)
    {&dw_avx512_bf16, has_avx512_bf16},
    {&dw_avx512, has_avx512},
    {&dw_avx2, has_avx2},
#endif
    {&dw_generic, always},
};

int32_t dw_select(const char *isa) {
    static const char *const elsewhere[] = {"avx512_bf16", "avx512", "avx2"};
#if defined(DW_X86)
    __builtin_cpu_init();
#endif
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (*isa && strcmp(isa, known[i].kernels->name)) continue;
        if (known[i].here()) return chosen = known[i].kernels, 0;
        if (*isa) return 2;
    }
    for (size_t i = 0; i < sizeof elsewhere / sizeof *elsewhere; i++)
        if (!strcmp(isa, elsewhere[i])) return 2;
    return 1;
}

/* How many parts the work falls into. */
static int parts_of(int64_t work, int threads) {
#if defined(_OPENMP)
    int64_t most = work / LEAST;
    return most < 2 || threads < 2 ? 1 : most < threads ? (int)most : threads;
#else
    (void)work, (void)threads;
    return 1;
#endif
}

/* Runs the rest for each `part` of `total`: `first` to `last`. */
#if defined(_OPENMP)
#define TOGETHER _Pragma("omp parallel for num_threads(parts) schedule(static, 1) if (parts > 1)")
#else
#define TOGETHER
#endif
#define SHARE(parts, total, ...)                                                                    \
    do {                                                                                            \
        int64_t whole_ = (total);                                                                   \
        TOGETHER for (int part = 0; part < parts; part++) {                                         \
            int64_t first = whole_ * part / parts, last = whole_ * (part + 1) / parts;              \
            __VA_ARGS__;                                                                            \
        }                                                                                           \
    } while (0)

static int64_t blocks_of(int64_t n, int64_t blocksize) { return (n + blocksize - 1) / blocksize; }

void dw_quantize_4bit(
    const void *x, int32_t dtype, int64_t n, int64_t blocksize, const struct dw_codebook *book, uint8_t *codes,
    float *absmax, int32_t threads) {
    const struct dw_kernels *k = chosen;
    int parts = parts_of(n, threads);
    SHARE(parts, blocks_of(n, blocksize), k->quantize_4bit(x, dtype, n, blocksize, book, codes, absmax, first, last));
}

void dw_dequantize_4bit(const struct dw_packed *w, void *out, int32_t dtype, int32_t threads) {
    const struct dw_kernels *k = chosen;
    int parts = parts_of(w->n, threads);
    SHARE(parts, blocks_of(w->n, w->blocksize), k->dequantize_4bit(w, out, dtype, first, last));
}

/* Rows of x for the kernels, a cache line more than `columns` apart: powers of two would all fall on the same lines. */
static int64_t stride_of(int64_t columns) { return columns + 32; }

/* x in bfloat16, where that changes nothing; 0 where it would. A float32 x mostly comes from a bfloat16 model, to which
 * the caller wants to add before it rounds. */
static int copy_bf16(const void *x, int dtype, int64_t rows, int64_t columns, uint16_t *to) {
    for (int64_t r = 0; r < rows; r++, to += stride_of(columns)) {
        if (dtype == DW_BFLOAT16) {
            memcpy(to, (const uint16_t *)x + r * columns, (size_t)columns * sizeof *to);
            continue;
        }
        const float *from = (const float *)x + r * columns;
        uint32_t lost = 0;
        for (int64_t i = 0; i < columns; i++) {
            uint32_t bits = bits_of(from[i]);
            lost |= bits & 0xffffu;
            to[i] = (uint16_t)(bits >> 16);
        }
        if (lost) return 0;
    }
    return 1;
}

static void copy_float(const void *x, int dtype, int64_t rows, int64_t columns, float *to) {
    for (int64_t r = 0; r < rows; r++, to += stride_of(columns))
        for (int64_t i = 0; i < columns; i++) to[i] = load(x, dtype, r * columns + i);
}

/* sums (outputs, rows) -> out (rows, outputs) */
static void write_out(
    const float *sums, int64_t outputs, int64_t rows, void *out, int dtype, int64_t first, int64_t last) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t o = first; o < last; o++) store(out, dtype, r * outputs + o, sums[o * rows + r]);
}

int32_t dw_linear_4bit(
    const struct dw_packed *w, int32_t weight_dtype, int64_t outputs, const void *x, int32_t dtype, int64_t rows,
    void *out, int32_t threads) {
    const struct dw_kernels *k = chosen;
    if (!outputs || !rows) return 0;
    int64_t columns = w->n / outputs, stride = stride_of(columns);
    int parts = parts_of(w->n, threads);
    int64_t spare = columns % 32 ? stride : 0; /* floats for each part */
    float *memory = calloc((size_t)(outputs * rows + stride * rows + spare * parts), sizeof *memory);
    if (!memory) return 1;
    float *sums = memory, *from = sums + outputs * rows, *scratch = from + stride * rows;
    int bf16 = k->linear_4bit_bf16 && weight_dtype == DW_BFLOAT16 && dtype != DW_FLOAT16 && !spare &&
               copy_bf16(x, dtype, rows, columns, (uint16_t *)from);
    if (!bf16) copy_float(x, dtype, rows, columns, from);
    SHARE(parts, outputs, {
        if (bf16)
            k->linear_4bit_bf16(w, columns, (const uint16_t *)from, stride, rows, sums, first, last);
        else
            k->linear_4bit(
                w, weight_dtype, columns, from, stride, rows, sums, scratch + spare * part, first, last);
        write_out(sums, outputs, rows, out, dtype, first, last);
    });
    free(memory);
    return 0;
}

void dw_quantize_8bit(
    const float *x, int64_t n, int64_t blocksize, const struct dw_map *map, uint8_t *codes, float *absmax,
    int32_t threads) {
    const struct dw_kernels *k = chosen;
    int parts = parts_of(n, threads);
    SHARE(parts, blocks_of(n, blocksize), k->quantize_8bit(x, n, blocksize, map, codes, absmax, first, last));
}

void dw_dequantize_8bit(
    const uint8_t *codes, const float *absmax, int64_t n, int64_t blocksize, const float *map, float *out,
    int32_t threads) {
    const struct dw_kernels *k = chosen;
    int parts = parts_of(n, threads);
    SHARE(parts, blocks_of(n, blocksize), k->dequantize_8bit(codes, absmax, n, blocksize, map, out, first, last));
}

void dw_adamw_8bit(const struct dw_adamw *step, int32_t threads) {
    const struct dw_kernels *k = chosen;
    int parts = parts_of(step->n, threads);
    SHARE(parts, blocks_of(step->n, step->blocksize), k->adamw_8bit(step, first, last));
}

int32_t dw_map_init(struct dw_map *map, const float *value) {
    memcpy(map->value, value, sizeof map->value);
    for (int i = 0; i < 255; i++) map->threshold[i] = (value[i] + value[i + 1]) / 2;
    map->threshold[255] = float_of(0x7f800000u);
    for (int cell = 0; cell < DW_CELLS; cell++) {
        /* the magnitudes of a cell, as bits; the first cell reaches down to zero and the last one up to infinity */
        uint32_t low = cell ? (uint32_t)(cell + (104 << 7)) << 16 : 0;
        uint32_t high = cell < DW_CELLS - 1 ? ((uint32_t)(cell + 1 + (104 << 7)) << 16) - 1 : 0x7f800000u;
        float ends[2][2] = {{float_of(low), float_of(high)}, {-float_of(high), -float_of(low)}};
        for (int sign = 0; sign < 2; sign++) {
            int first = place_of(ends[sign][0], map->threshold, 128);
            int last = place_of(ends[sign][1], map->threshold, 128);
            if (last - first > 1) return 1;
            map->lowest[sign][cell] = (uint8_t)first;
        }
    }
    return 0;
}
