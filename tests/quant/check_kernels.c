/* Runs every kernel of every instruction set of this machine over odd sizes, in buffers that are not a byte longer than
 * they must be, and compares it with plain C: bit for bit, and products of matrices to what float32 sums allow. Built
 * with the sanitizers by `make sanitize`; prints the instruction sets that passed. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "kernel.h"

static const int64_t SIZES[] = {0, 1, 2, 31, 32, 33, 63, 64, 65, 100, 127, 1000, 4097, 9999};
static const int64_t BLOCKSIZES[] = {32, 64, 512, 4096};
static const int WIDTH[] = {4, 2, 2};
#define COUNT(a) (sizeof(a) / sizeof *(a))
#define LARGE 300001 /* enough for four threads */

static const float NF4[16] = {
    -1.0f, -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f, -0.09105004f, 0.0f,
    0.0795803f, 0.1609302f, 0.2461123f, 0.33791524f, 0.44070983f, 0.562617f, 0.72295684f, 1.0f,
};

static const char *running = "";
static int64_t running_n;

static void require(int fine, const char *what) {
    if (fine) return;
    fprintf(stderr, "%s, n = %lld: %s\n", running, (long long)running_n, what);
    exit(1);
}

static void *room(int64_t bytes) {
    char *memory = malloc((size_t)bytes);
    require(memory || !bytes, "no memory");
    if (bytes) memset(memory, 0xa5, (size_t)bytes);
    return memory;
}

static uint64_t seed = 1;
static float uniform(void) { /* [-1, 1) */
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(seed >> 32) / 2147483648.0f;
}

/* numbers of all sizes, with zeros, subnormals, infinities and NaN among them */
static float number(int64_t i) {
    switch (i % 1117) {
        case 3: return 0.0f;
        case 5: return -0.0f;
        case 500: return 1e-41f;
        case 900: return INFINITY;
        case 1100: return NAN;
        default: return ldexpf(uniform(), (int)(i / 97 % 40) - 30);
    }
}

static int is_nan(const void *x, int dtype, int64_t i) { return isnan(load(x, dtype, i)); }

static void same(const void *a, const void *b, int dtype, int64_t n, const char *what) {
    for (int64_t i = 0; i < n; i++) {
        if (is_nan(a, dtype, i) && is_nan(b, dtype, i)) continue;
        const char *x = (const char *)a + i * WIDTH[dtype], *y = (const char *)b + i * WIDTH[dtype];
        require(!memcmp(x, y, (size_t)WIDTH[dtype]), what);
    }
}

static void same_bytes(const void *a, const void *b, int64_t n, const char *what) {
    require(!n || !memcmp(a, b, (size_t)n), what);
}

static int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

static void check_4bit(const char *isa, int64_t n, int64_t blocksize, const struct dw_map *map) {
    struct dw_codebook book;
    memcpy(book.value, NF4, sizeof NF4);
    for (int i = 0; i < 15; i++) book.threshold[i] = (NF4[i] + NF4[i + 1]) / 2;
    for (int i = 0; i < 16; i++) book.order[i] = (uint8_t)i;
    int64_t blocks = blocks_of(n, blocksize), groups = blocks_of(blocks, 256), bytes = (n + 1) / 2;
    /* one byte off, as a view may be */
    uint8_t *codes = (uint8_t *)room(bytes + 1) + 1, *expected = room(bytes);
    float *absmax = room(blocks * 4), *expected_absmax = room(blocks * 4);
    for (int dtype = 0; dtype < 3; dtype++) {
        char *x = room(n * WIDTH[dtype]);
        for (int64_t i = 0; i < n; i++) store(x, dtype, i, number(i));
        dw_select("generic");
        dw_quantize_4bit(x, dtype, n, blocksize, &book, expected, expected_absmax, 4);
        dw_select(isa);
        dw_quantize_4bit(x, dtype, n, blocksize, &book, codes, absmax, 4);
        same_bytes(codes, expected, bytes, "quantize_4bit: codes");
        same(absmax, expected_absmax, DW_FLOAT32, blocks, "quantize_4bit: absmax");
        free(x);
    }
    uint8_t *inner = room(blocks);
    float *outer = room(groups * 4), offset = 0.25f;
    dw_quantize_8bit(absmax, blocks, 256, map, inner, outer, 1);
    for (int nested = 0; nested < 2; nested++) {
        struct dw_packed w = {n, blocksize, codes, absmax, 0, 0, 0, 256, book.value};
        if (nested) w.absmax = inner, w.nested_absmax = outer, w.nested_offset = &offset, w.nested_map = map->value;
        for (int dtype = 0; dtype < 3; dtype++) {
            void *out = room(n * WIDTH[dtype]), *wanted = room(n * WIDTH[dtype]);
            dw_select("generic");
            dw_dequantize_4bit(&w, wanted, dtype, 4);
            dw_select(isa);
            dw_dequantize_4bit(&w, out, dtype, 4);
            same(out, wanted, dtype, n, "dequantize_4bit");
            free(out), free(wanted);
        }
    }
    free(codes - 1), free(expected), free(absmax), free(expected_absmax), free(inner), free(outer);
}

static void check_linear(const char *isa, int64_t outputs, int64_t columns, int64_t rows) {
    running_n = outputs * columns;
    int64_t blocks = blocks_of(running_n, 64);
    uint8_t *codes = room((running_n + 1) / 2);
    float *absmax = room(blocks * 4), *weight = room(running_n * 4);
    for (int64_t i = 0; i < (running_n + 1) / 2; i++) codes[i] = (uint8_t)(uniform() * 128 + 128);
    for (int64_t i = 0; i < blocks; i++) absmax[i] = fabsf(uniform()) + 0.01f;
    struct dw_packed w = {running_n, 64, codes, absmax, 0, 0, 0, 256, NF4};
    for (int weight_dtype = 0; weight_dtype < 3; weight_dtype++)
        for (int dtype = 0; dtype < 3; dtype++) {
            void *x = room(rows * columns * WIDTH[dtype]), *out = room(rows * outputs * WIDTH[dtype]);
            for (int64_t i = 0; i < rows * columns; i++) store(x, dtype, i, uniform());
            dw_select(isa);
            dw_dequantize_4bit(&w, weight, DW_FLOAT32, 1);
            require(!dw_linear_4bit(&w, weight_dtype, outputs, x, dtype, rows, out, 4), "linear_4bit: memory");
            for (int64_t r = 0; r < rows; r++)
                for (int64_t o = 0; o < outputs; o++) {
                    double sum = 0, size = 0;
                    for (int64_t i = 0; i < columns; i++) {
                        double term = (double)through(weight[o * columns + i], weight_dtype) * load(x, dtype, r * columns + i);
                        sum += term, size += fabs(term);
                    }
                    double rounding = dtype == DW_FLOAT32 ? 1e-7 : dtype == DW_BFLOAT16 ? 1.0 / 256 : 1.0 / 2048;
                    double error = fabs(load(out, dtype, r * outputs + o) - sum);
                    require(error <= rounding * fabs(sum) + 2e-6 * size + 1e-7, "linear_4bit");
                }
            free(x), free(out);
        }
    free(codes), free(absmax), free(weight);
}

static void check_8bit(const char *isa, int64_t n, int64_t blocksize, const struct dw_map *map) {
    int64_t blocks = blocks_of(n, blocksize);
    float *x = room(n * 4), *absmax = room(blocks * 4), *wanted_absmax = room(blocks * 4);
    float *out = room(n * 4), *wanted_out = room(n * 4);
    uint8_t *codes = room(n), *wanted = room(n);
    for (int64_t i = 0; i < n; i++) x[i] = number(i);
    dw_select("generic");
    dw_quantize_8bit(x, n, blocksize, map, wanted, wanted_absmax, 4);
    dw_dequantize_8bit(wanted, wanted_absmax, n, blocksize, map->value, wanted_out, 4);
    dw_select(isa);
    dw_quantize_8bit(x, n, blocksize, map, codes, absmax, 4);
    dw_dequantize_8bit(codes, absmax, n, blocksize, map->value, out, 4);
    same_bytes(codes, wanted, n, "quantize_8bit: codes");
    same(absmax, wanted_absmax, DW_FLOAT32, blocks, "quantize_8bit: absmax");
    same(out, wanted_out, DW_FLOAT32, n, "dequantize_8bit");
    free(x), free(absmax), free(wanted_absmax), free(out), free(wanted_out), free(codes), free(wanted);
}

static void check_adamw(const char *isa, int64_t n, const struct dw_map *both, const struct dw_map *positive) {
    int64_t blocks = blocks_of(n, 256);
    float *parameter[2], *absmax[2][2];
    uint8_t *codes[2][2];
    for (int dtype = 0; dtype < 2; dtype++) {
        void *gradient = room(n * WIDTH[dtype]);
        for (int64_t i = 0; i < n; i++) store(gradient, dtype, i, uniform());
        for (int which = 0; which < 2; which++) {
            parameter[which] = room(n * 4);
            for (int64_t i = 0; i < n; i++) parameter[which][i] = (float)(i % 17) / 16;
            for (int moment = 0; moment < 2; moment++) {
                codes[which][moment] = room(n), absmax[which][moment] = room(blocks * 4);
                for (int64_t i = 0; i < n; i++) codes[which][moment][i] = (uint8_t)(i * 7 + moment);
                for (int64_t i = 0; i < blocks; i++) absmax[which][moment][i] = (float)(i % 5) / 64;
            }
            struct dw_adamw step = {
                n, 256, parameter[which], gradient, dtype, codes[which][0], codes[which][1], absmax[which][0],
                absmax[which][1], both, positive, 0.999f, 0.1f, 0.999f, 0.001f, 0.1f, 1e-8f, -0.01f,
            };
            dw_select(which ? isa : "generic");
            dw_adamw_8bit(&step, 4);
        }
        same(parameter[0], parameter[1], DW_FLOAT32, n, "adamw_8bit: parameters");
        for (int moment = 0; moment < 2; moment++) {
            same_bytes(codes[0][moment], codes[1][moment], n, "adamw_8bit: codes");
            same(absmax[0][moment], absmax[1][moment], DW_FLOAT32, blocks, "adamw_8bit: absmax");
        }
        for (int which = 0; which < 2; which++) {
            free(parameter[which]);
            for (int moment = 0; moment < 2; moment++) free(codes[which][moment]), free(absmax[which][moment]);
        }
        free(gradient);
    }
}

/* Conversions of single numbers: there and back, and what lies between two neighbours goes to the even one. */
static void check_halves(void) {
    running = "conversions";
    for (uint32_t half = 0; half < 0x7c00; half++) {
        float low = fp16_to_float((uint16_t)half), high = fp16_to_float((uint16_t)(half + 1));
        require(float_to_fp16(low) == half && float_to_fp16(-low) == (half | 0x8000), "float16 there and back");
        if (half == 0x7bff) break;
        require(float_to_fp16((low + high) / 2) == (half & 1 ? half + 1 : half), "float16 to even");
    }
    require(float_to_fp16(65520.0f) == 0x7c00 && float_to_fp16(65519.9f) == 0x7bff, "float16 to infinity");
    require(isnan(fp16_to_float(float_to_fp16(NAN))) && isnan(bf16_to_float(float_to_bf16(NAN))), "NaN");
    require(isnan(bf16_to_float(float_to_bf16(float_of(0x7fffffff)))), "NaN of all bits");
    require(float_to_bf16(float_of(0x3f808000)) == 0x3f80 && float_to_bf16(float_of(0x3f818000)) == 0x3f82, "bfloat16 to even");
}

/* The dynamic maps of arXiv 2110.02861: decades of evenly spaced fractions, zero and one. */
static int ascending(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static void dynamic_map(int with_sign, struct dw_map *map) {
    float value[256] = {0, 1};
    int at = 2;
    for (int i = 0; i < 7; i++) {
        int parts = 1 << (with_sign ? i : i + 1);
        for (int j = 0; j < parts; j++) {
            float size = (float)(pow(10, i - 6) * (0.1 + 0.9 * (j + 0.5) / parts));
            value[at++] = size;
            if (with_sign) value[at++] = -size;
        }
    }
    require(at == 256, "a map has 256 values");
    qsort(value, 256, sizeof *value, ascending);
    require(!dw_map_init(map, value), "a dynamic map has at most one threshold a cell");
    for (int i = 0; i < 256; i++) value[i] = 0.5f + (float)i * 1e-6f;
    struct dw_map *dense = room(sizeof *dense);
    require(dw_map_init(dense, value) == 1, "a denser map is refused");
    free(dense);
}

int main(void) {
    static const char *const sets[] = {"generic", "avx2", "avx512", "avx512_bf16"};
    struct dw_map *both = room(sizeof *both), *positive = room(sizeof *positive);
    check_halves();
    dynamic_map(1, both), dynamic_map(0, positive);
    require(dw_select("mmx") == 1, "an unknown instruction set is refused");
    for (size_t s = 0; s < COUNT(sets); s++) {
        running = sets[s];
        if (dw_select(running)) continue;
        require(!strcmp(dw_isa(), running), "the instruction set was not taken");
        for (size_t b = 0; b < COUNT(BLOCKSIZES); b++) {
            for (size_t i = 0; i < COUNT(SIZES); i++) {
                running_n = SIZES[i];
                check_4bit(running, running_n, BLOCKSIZES[b], both);
                check_8bit(running, running_n, BLOCKSIZES[b], i % 2 ? both : positive);
            }
            running_n = LARGE;
            check_4bit(running, LARGE, BLOCKSIZES[b], both);
        }
        check_8bit(running, LARGE, 256, both);
        for (size_t i = 0; i < COUNT(SIZES); i++) check_adamw(running, running_n = SIZES[i], both, positive);
        check_adamw(running, running_n = LARGE, both, positive);
        for (int64_t rows = 1; rows <= 11; rows += rows < 5 ? 1 : 3) {
            check_linear(running, 3, 32, rows);
            check_linear(running, 5, 96, rows); /* rows begin inside of a block */
            check_linear(running, 7, 33, rows); /* and inside of a byte */
            check_linear(running, 2, 1, rows);
        }
        check_linear(running, 300, 1024, 2); /* more than one thread */
        check_linear(running, 300, 1001, 9);
        check_linear(running, 0, 64, 1);
        printf("%s\n", running);
    }
    free(both), free(positive);
    return 0;
}
