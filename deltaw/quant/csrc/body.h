/* The loops over blocks, the same for every instruction set. The file that includes this one has defined, for whole
 * chunks of 32 elements (16 bytes of codes):
 *
 *   half_table  make_half(value, scale, dtype)            value[16] * scale, rounded to a dtype of two bytes
 *   full_table  make_full(value, scale, dtype)            value[16] * scale, rounded to `dtype`, in float32
 *   uint16_t    half_at(table, nibble)                    one of them
 *   float       full_at(table, nibble)
 *   void        expand_half(table, codes, n, out)         n values, in the order of the elements
 *   void        expand_full(table, codes, n, out)
 *   int32_t     largest(x, dtype, n)                      the bits of the largest magnitude, 0 for none
 *   void        encode_from(x, dtype, n, inverse, book, codes)  always inlined: the dtype is a constant in it
 *   void        dot(codes, table, n, x, stride, rows, sum)  sum[r] += <the n values, x + r * stride>, rows <= ROWS
 *   float       total(sum)                                one number of a `lanes`, in which `dot` sums
 *
 * A block has only 16 values, so each is scaled and rounded once a block, and an
 * element costs no more than a look-up. */

/* scales of this many blocks at a time */
#define GROUP 64
/* below this a block is divided by it instead of by its absmax, whose reciprocal would not be finite */
#define SMALLEST 1e-38f
/* the largest block of 8-bit values */
#define MOST 4096

static inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

static inline void encode(
    const void *x, int dtype, int64_t n, float inverse, const struct dw_codebook *book, uint8_t *codes) {
    if (dtype == DW_FLOAT32)
        encode_from(x, DW_FLOAT32, n, inverse, book, codes);
    else if (dtype == DW_BFLOAT16)
        encode_from(x, DW_BFLOAT16, n, inverse, book, codes);
    else
        encode_from(x, DW_FLOAT16, n, inverse, book, codes);
}

static void quantize_4bit(
    const void *x, int dtype, int64_t n, int64_t blocksize, const struct dw_codebook *book, uint8_t *codes,
    float *absmax, int64_t first, int64_t last) {
    int64_t width = dtype == DW_FLOAT32 ? 4 : 2;
    for (int64_t b = first; b < last; b++) {
        int64_t start = b * blocksize, count = at_most(blocksize, n - start), whole = count & ~(int64_t)31;
        const void *values = (const char *)x + start * width;
        uint8_t *out = codes + start / 2;
        int32_t most = largest(values, dtype, whole);
        for (int64_t i = whole; i < count; i++) {
            int32_t bits = (int32_t)(bits_of(load(values, dtype, i)) & 0x7fffffffu);
            most = bits > most ? bits : most;
        }
        absmax[b] = absmax_of(most);
        float inverse = 1.0f / (absmax[b] < SMALLEST ? SMALLEST : absmax[b]);
        encode(values, dtype, whole, inverse, book, out);
        for (int64_t i = whole; i < count; i += 2) {
            uint8_t even = nibble_of(load(values, dtype, i) * inverse, book);
            uint8_t odd = nibble_of(i + 1 < count ? load(values, dtype, i + 1) * inverse : 0.0f, book);
            out[i / 2] = (uint8_t)(even << 4 | odd);
        }
    }
}

/* The scales of blocks [b, b + count). */
static inline void scales(const struct dw_packed *w, int64_t b, int64_t count, float *scale) {
    if (!w->nested_absmax) {
        memcpy(scale, (const float *)w->absmax + b, (size_t)count * sizeof *scale);
        return;
    }
    const uint8_t *codes = w->absmax;
    float offset = *w->nested_offset;
    for (int64_t i = 0; i < count;) {
        int64_t group = (b + i) / w->nested_blocksize;
        int64_t end = at_most(count, (group + 1) * w->nested_blocksize - b);
        float outer = w->nested_absmax[group];
        for (; i < end; i++) scale[i] = w->nested_map[codes[b + i]] * outer + offset; /* no fused multiply-add */
    }
}

static inline int nibble(const uint8_t *codes, int64_t i) { return i & 1 ? codes[i / 2] & 15 : codes[i / 2] >> 4; }

static void dequantize_4bit(const struct dw_packed *w, void *out, int dtype, int64_t first, int64_t last) {
    float scale[GROUP];
    for (int64_t b = first; b < last; b++) {
        if ((b - first) % GROUP == 0) scales(w, b, at_most(GROUP, last - b), scale);
        float s = scale[(b - first) % GROUP];
        int64_t start = b * w->blocksize, count = at_most(w->blocksize, w->n - start), whole = count & ~(int64_t)31;
        const uint8_t *codes = w->codes + start / 2;
        if (dtype == DW_FLOAT32) {
            full_table table = make_full(w->value, s, DW_FLOAT32);
            float *to = (float *)out + start;
            expand_full(table, codes, whole, to);
            for (int64_t i = whole; i < count; i++) to[i] = full_at(table, nibble(codes, i));
        } else {
            half_table table = make_half(w->value, s, dtype);
            uint16_t *to = (uint16_t *)out + start;
            expand_half(table, codes, whole, to);
            for (int64_t i = whole; i < count; i++) to[i] = half_at(table, nibble(codes, i));
        }
    }
}

/* The n elements from `start` on, which may be any, in float32. */
static void read_any(const struct dw_packed *w, int dtype, int64_t start, int64_t n, float *out) {
    while (n > 0) {
        int64_t b = start / w->blocksize, count = at_most(n, (b + 1) * w->blocksize - start);
        float scale;
        scales(w, b, 1, &scale);
        full_table table = make_full(w->value, scale, dtype);
        for (int64_t i = 0; i < count; i++) out[i] = full_at(table, nibble(w->codes, start + i));
        start += count, out += count, n -= count;
    }
}

/* The elements [at, end), which lie in one output, times as many columns of each of `rows` rows of x: added to `sums`.
 * Both ends lie on whole chunks. Always with a constant number of rows. */
static inline __attribute__((always_inline)) void one_output(
    const struct dw_packed *w, int weight_dtype, int64_t at, int64_t end, const float *x, int64_t stride,
    const int rows, float *sums) {
    lanes sum[ROWS];
    for (int r = 0; r < rows; r++) sum[r] = no_lanes();
    float scale[GROUP];
    for (int64_t b = at / w->blocksize; at < end;) {
        int64_t count = at_most(GROUP, (end - 1) / w->blocksize + 1 - b);
        scales(w, b, count, scale);
        for (int64_t i = 0; i < count; i++, b++) {
            int64_t n = at_most(end, (b + 1) * w->blocksize) - at;
            full_table table = make_full(w->value, scale[i], weight_dtype);
            dot(w->codes + at / 2, table, n, x, stride, rows, sum);
            at += n, x += n;
        }
    }
    for (int r = 0; r < rows; r++) sums[r] += total(sum[r]);
}

/* Output o where a row may begin anywhere: the weights are written out once. */
static void any_output(
    const struct dw_packed *w, int weight_dtype, int64_t columns, const float *x, int64_t stride, int64_t o,
    int64_t rows, float *sums, float *scratch) {
    read_any(w, weight_dtype, o * columns, columns, scratch);
    for (int64_t r = 0; r < rows; r++, x += stride) {
        float part[16] = {0}, sum = 0;
        int64_t whole = columns & ~(int64_t)15;
        for (int64_t i = 0; i < whole; i += 16)
            for (int j = 0; j < 16; j++) part[j] += scratch[i + j] * x[i + j];
        for (int j = 0; j < 16; j++) sum += part[j];
        for (int64_t i = whole; i < columns; i++) sum += scratch[i] * x[i];
        sums[r] += sum;
    }
}

static void linear_4bit(
    const struct dw_packed *w, int weight_dtype, int64_t columns, const float *x, int64_t stride, int64_t rows,
    float *sums, float *scratch, int64_t first, int64_t last) {
    if (columns % 32) {
        for (int64_t o = first; o < last; o++)
            any_output(w, weight_dtype, columns, x, stride, o, rows, sums + o * rows, scratch);
        return;
    }
    for (int64_t r = 0, many; r < rows; r += many) {
        many = rows - r >= 4 ? 4 : rows - r >= 2 ? 2 : 1;
        for (int64_t o = first; o < last; o++) {
            const float *from = x + r * stride;
            float *to = sums + o * rows + r;
            int64_t at = o * columns, end = at + columns;
            if (many == 4)
                one_output(w, weight_dtype, at, end, from, stride, 4, to);
            else if (many == 2)
                one_output(w, weight_dtype, at, end, from, stride, 2, to);
            else
                one_output(w, weight_dtype, at, end, from, stride, 1, to);
        }
    }
}

/* --- 8 bits: plain loops, which the compiler makes wide ------------------------------------------------------ */

static inline uint8_t code_of(float value, const struct dw_map *map) {
    int32_t bits = (int32_t)bits_of(value), magnitude = bits & 0x7fffffff;
    int32_t cell = (magnitude >> 16) - (104 << 7); /* 104: the exponent of 2^-23 */
    cell = cell < 0 ? 0 : cell > DW_CELLS - 1 ? DW_CELLS - 1 : cell;
    uint8_t low = map->lowest[bits < 0][cell];
    uint8_t code = (uint8_t)(low + !(value <= map->threshold[low]));
    return magnitude > 0x7f800000 ? 255 : code; /* the last threshold is infinite: 255 stays 255 */
}

/* One block: its absmax, and its codes. */
static inline float pack_block(const float *x, int64_t n, const struct dw_map *map, uint8_t *codes) {
    int32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t bits = (int32_t)(bits_of(x[i]) & 0x7fffffffu);
        most = bits > most ? bits : most;
    }
    float absmax = absmax_of(most), inverse = 1.0f / (absmax < SMALLEST ? SMALLEST : absmax);
    for (int64_t i = 0; i < n; i++) codes[i] = code_of(x[i] * inverse, map);
    return absmax;
}

static void quantize_8bit(
    const float *x, int64_t n, int64_t blocksize, const struct dw_map *map, uint8_t *codes, float *absmax,
    int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++) {
        int64_t start = b * blocksize;
        absmax[b] = pack_block(x + start, at_most(blocksize, n - start), map, codes + start);
    }
}

static void dequantize_8bit(
    const uint8_t *codes, const float *absmax, int64_t n, int64_t blocksize, const float *map, float *out,
    int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++) {
        int64_t end = at_most(n, (b + 1) * blocksize);
        for (int64_t i = b * blocksize; i < end; i++) out[i] = map[codes[i]] * absmax[b];
    }
}

/* AdamW with decoupled decay (Loshchilov and Hutter, arXiv 1711.05101), in the order of torch.optim.AdamW, on moments
 * that are read from 8 bits before and written back after (Dettmers et al., arXiv 2110.02861). */
static void adamw_8bit(const struct dw_adamw *s, int64_t first, int64_t last) {
    float m[MOST], v[MOST];
    for (int64_t b = first; b < last; b++) {
        int64_t start = b * s->blocksize, n = at_most(s->blocksize, s->n - start);
        dequantize_8bit(s->first + start, s->first_absmax + b, n, n, s->first_map->value, m, 0, 1);
        dequantize_8bit(s->second + start, s->second_absmax + b, n, n, s->second_map->value, v, 0, 1);
        float *p = s->parameter + start;
        for (int64_t i = 0; i < n; i++) {
            float g = load(s->gradient, s->gradient_dtype, start + i);
            m[i] = __builtin_fmaf(s->first_weight, g - m[i], m[i]);
            v[i] = __builtin_fmaf(s->second_weight * g, g, v[i] * s->beta2); /* as torch's own kernel is compiled */
            p[i] = p[i] * s->decay + s->step_size * m[i] / (__builtin_sqrtf(v[i]) / s->root_correction + s->eps);
        }
        s->first_absmax[b] = pack_block(m, n, s->first_map, s->first + start);
        s->second_absmax[b] = pack_block(v, n, s->second_map, s->second + start);
    }
}
