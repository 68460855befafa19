/* Operations of a decoding step on a CPU. Defined by reference.py; described in docs/kernels.md.

Written with the vector types of GCC and Clang, so that one source serves AVX-512, AVX2 and NEON: it is compiled for the
processor that runs it. Products are summed in float32. Results are rounded where torch rounds them: after a linear
layer, after an activation, after an addition.

Shapes: M rows of activations, K inputs, N outputs, H heads, D head size, T tokens in the cache.
Types of values: 0 float32, 1 bfloat16, 2 float16. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined __AVX2__ || defined __AVX512BW__
#include <immintrin.h>
#endif

extern int omp_get_thread_num(void), omp_get_num_threads(void);

#ifdef __AVX512F__
#define V 16 /* floats in a vector */
#else
#define V 8
#endif
#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

typedef float floats __attribute__((vector_size(4 * V)));
typedef int32_t ints __attribute__((vector_size(4 * V)));
typedef uint32_t words __attribute__((vector_size(4 * V)));
typedef uint8_t bytes __attribute__((vector_size(V)));
typedef uint16_t halves __attribute__((vector_size(2 * V)));
#ifdef __FLT16_MAX__
typedef _Float16 half;
typedef half float16s __attribute__((vector_size(2 * V)));
#endif

enum { FLOAT32, BFLOAT16, FLOAT16, BYTES };

/* -- Conversions -- */

#ifdef __clang__
#define SHUFFLE(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define SHUFFLE(x, ...) __builtin_shuffle(x, (ints){__VA_ARGS__})
#endif
/* A value at an address of any alignment and type. */
#define AT(type, pointer) (((struct { type value; } __attribute__((packed, may_alias)) *)(pointer))->value)

INLINE floats load_floats(const void *x, int64_t i, const int type) {
    if (type == FLOAT32) return AT(floats, (const float *)x + i);
    if (type == BFLOAT16) return (floats)(__builtin_convertvector(AT(halves, (const uint16_t *)x + i), words) << 16);
    if (type == BYTES) return __builtin_convertvector(__builtin_convertvector(AT(bytes, (const uint8_t *)x + i), ints), floats);
#ifdef __FLT16_MAX__
    return __builtin_convertvector(AT(float16s, (const half *)x + i), floats);
#else
    return (floats){0};
#endif
}

INLINE float load_float(const void *x, int64_t i, int type) {
    if (type == FLOAT32) return ((const float *)x)[i];
    if (type == BYTES) return ((const uint8_t *)x)[i];
    if (type == BFLOAT16) {
        uint32_t bits = (uint32_t)((const uint16_t *)x)[i] << 16;
        return AT(float, &bits);
    }
#ifdef __FLT16_MAX__
    return ((const half *)x)[i];
#else
    return 0;
#endif
}

INLINE void store_float(void *x, int64_t i, float value, int type) {
    if (type == FLOAT32) ((float *)x)[i] = value;
    if (type == BFLOAT16) {
        uint32_t bits = AT(uint32_t, &value);
        ((uint16_t *)x)[i] = isnan(value) ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    }
#ifdef __FLT16_MAX__
    if (type == FLOAT16) ((half *)x)[i] = value;
#endif
}

INLINE float rounded(float value, int type) {
    float stored = 0;
    store_float(&stored, 0, value, type);
    return load_float(&stored, 0, type);
}

INLINE floats where(ints mask, floats x, floats y) { return (floats)((mask & (ints)x) | (~mask & (ints)y)); }

/* Rounded to a type, to the nearest, ties to even. */
INLINE floats round_floats(floats x, const int type) {
    if (type == BFLOAT16) {
        words bits = (words)x;
        return where(x != x, x, (floats)((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u));
    }
#ifdef __FLT16_MAX__
    if (type == FLOAT16) return __builtin_convertvector(__builtin_convertvector(x, float16s), floats);
#endif
    return x;
}

/* Up to V values; the other lanes are 0. */
INLINE floats load_some(const void *x, int64_t i, int64_t count, const int type) {
    if (count >= V) return load_floats(x, i, type);
    floats values = {0};
    for (int k = 0; k < count; k++) values[k] = load_float(x, i + k, type);
    return values;
}

INLINE void store_some(void *x, int64_t i, int64_t count, floats values, const int type) {
    if (count < V) {
        for (int k = 0; k < count; k++) store_float(x, i + k, values[k], type);
    } else if (type == FLOAT32) {
        AT(floats, (float *)x + i) = values;
    } else if (type == BFLOAT16) {
        AT(halves, (uint16_t *)x + i) = __builtin_convertvector((words)round_floats(values, type) >> 16, halves);
    }
#ifdef __FLT16_MAX__
    else {
        AT(float16s, (half *)x + i) = __builtin_convertvector(values, float16s);
    }
#endif
}

/* The sum of all lanes. */
INLINE float total(floats x) {
#if V == 16
    x += SHUFFLE(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x += SHUFFLE(x, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3);
    x += SHUFFLE(x, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1);
    x += SHUFFLE(x, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0);
#else
    x += SHUFFLE(x, 4, 5, 6, 7, 0, 1, 2, 3);
    x += SHUFFLE(x, 2, 3, 0, 1, 2, 3, 0, 1);
    x += SHUFFLE(x, 1, 0, 1, 0, 1, 0, 1, 0);
#endif
    return x[0];
}

/* e^x with a relative error of 2e-7: 2^n times a polynomial (Cephes). 0 below -87, and no more than e^88. */
INLINE floats exponential(floats x) {
    const floats zero = {0}, least = zero - 87.0f, most = zero + 88.0f;
    ints below = x < least;
    x = where(x > most, most, where(below, least, x));
    floats n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* rounded to an integer */
    floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    floats p = zero + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    p = p * (floats)((__builtin_convertvector(n, ints) + 127) << 23);
    return where(below, zero, p);
}

/* The part of `count` items, in units of `unit`, that this thread works on. OpenMP may have started fewer threads than
   were asked for. */
INLINE void own_part(int64_t count, int64_t unit, int64_t *begin, int64_t *end) {
    int64_t units = (count + unit - 1) / unit, thread = omp_get_thread_num(), threads = omp_get_num_threads();
    *begin = MIN(count, units * thread / threads * unit);
    *end = MIN(count, units * (thread + 1) / threads * unit);
}

/* -- Linear layers of a few rows -- */

typedef struct {
    int64_t n, k, group;  /* outputs, inputs, inputs per scale */
    int32_t type, stored; /* types of values, and of plain weights: that of values, or 16 bits in float32 */
    int32_t bits;         /* of packed weights, 0 for plain ones */
    const void *weight;   /* (N, K), or packed (K · bits / 32, N), lowest bits first */
    const void *bias;     /* (N) values, or NULL */
    const float *scales;  /* (groups, N) */
    const uint8_t *zeros; /* (groups, N), or NULL if all are `zero` */
    const int32_t *order; /* (K) input of each weight, or NULL */
    float zero;
} matrix;

INLINE int64_t groups_of(const matrix *w) { return (w->k + w->group - 1) / w->group; }

#define PLAIN_TILE 4
#define LANES 1024 /* outputs of packed weights at a time */

/* Adds the products of one step of inputs, read at `w`, with m rows of activations. 16-bit weights are read in pairs: x
   has the values of even places first, then those of odd ones, for each 2 V inputs. */
INLINE void add_products(const void *w, const float *x, int64_t padded, const int type, const int m, floats *sums) {
    floats first, second = {0};
    if (type == BFLOAT16) {
        words pairs = AT(words, w);
        first = (floats)(pairs << 16), second = (floats)(pairs & 0xFFFF0000u);
    } else {
        first = load_floats(w, 0, type);
        if (type == FLOAT16) second = load_floats(w, V, type);
    }
    for (int j = 0; j < m; j++) {
        sums[j] += first * AT(floats, x + j * padded);
        if (type != FLOAT32) sums[j] += second * AT(floats, x + j * padded + V);
    }
}

/* Products of `rows` rows of weights with m rows of activations. */
INLINE void dot_rows(const char *w, int64_t pitch, const float *x, int64_t k, int64_t padded, const int type,
                     const int rows, const int m, float *y, int64_t n) {
    floats sums[PLAIN_TILE][4];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < m; j++) sums[r][j] = (floats){0};
    const int size = type == FLOAT32 ? 4 : 2, step = 4 * V / size;
    const int are_short = pitch <= 4096; /* a new stream every few lines, which the processor does not foresee */
    int64_t i = 0;
    for (; i + step <= k; i += step)
        for (int r = 0; r < rows; r++) {
            if (are_short) __builtin_prefetch(w + (rows + r) * pitch + i * size);
            add_products(w + r * pitch + i * size, x + i, padded, type, m, sums[r]);
        }
    for (int r = 0; r < rows && i < k; r++) {
        char tail[4 * V] = {0};
        memcpy(tail, w + r * pitch + i * size, (k - i) * size);
        add_products(tail, x + i, padded, type, m, sums[r]);
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < m; j++) y[j * n + r] = total(sums[r][j]);
}

INLINE void plain_product(const matrix *w, const float *x, int64_t padded, float *y, int64_t begin, int64_t end,
                          const int type, const int m) {
    const int tile = m == 1 ? PLAIN_TILE : 2;
    int64_t pitch = w->k * (type == FLOAT32 ? 4 : 2), row = begin;
    const char *weight = w->weight;
    for (; row + tile <= end; row += tile)
        dot_rows(weight + row * pitch, pitch, x, w->k, padded, type, tile, m, y + row, w->n);
    for (; row < end; row++) dot_rows(weight + row * pitch, pitch, x, w->k, padded, type, 1, m, y + row, w->n);
}

/* Packed weights as GPTQ stores them: lanes are outputs, and the fields of a word are multiplied in pairs, half a word
   apart, with pairs of activations. Activations are integers of 16 bits with a scale for up to PART inputs, so that their
   products are exact: 128 · 255 · 32767 is less than 2^31. In float32 there are two levels of them, the second for what
   the first leaves, each a row. A row: (K / 2) pairs, then (parts) scales, then (parts) sums. */
#define PART 128

INLINE int64_t part_size(const matrix *w) { return MIN(PART, w->group); }
INLINE int64_t parts_of(const matrix *w) { return groups_of(w) * ((w->group + part_size(w) - 1) / part_size(w)); }
INLINE int64_t pairs_row(const matrix *w) { return w->k / 2 + 2 * parts_of(w); }
INLINE int levels_of(const matrix *w) { return w->type == FLOAT32 ? 2 : 1; }

/* low · low + high · high of the halves of each word, which are signed. */
INLINE ints multiply_pairs(words a, words b) {
#if defined __AVX512BW__ && V == 16
    return (ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined __AVX2__ && V == 8
    return (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return ((ints)(a << 16) >> 16) * ((ints)(b << 16) >> 16) + ((ints)a >> 16) * ((ints)b >> 16);
#endif
}

INLINE words load_lanes(const int32_t *packed, int64_t count) {
    if (count >= V) return AT(words, packed);
    words lanes = {0};
    memcpy(&lanes, packed, 4 * count);
    return lanes;
}

/* Adds the products of `number` rows of words with m rows of activations. */
INLINE void add_words(const int32_t *packed, int64_t n, int64_t count, const int32_t *x, int64_t row, int32_t (*sums)[LANES],
                      const int bits, const int m, const int number) {
    const int pairs = 16 / bits;
    for (int64_t lane = 0; lane < count; lane += V) {
        ints s[4];
        for (int j = 0; j < m; j++) s[j] = AT(ints, sums[j] + lane);
        for (int word = 0; word < number; word++) {
            const int32_t *here = packed + word * n + lane;
            /* the processor does not foresee the rows to come, which are far away; beyond the last one is harmless */
            if (lane % 16 == 0) __builtin_prefetch(here + number * n);
            words fields = load_lanes(here, count - lane);
            for (int i = 0; i < pairs; i++) {
                words pair = fields >> bits * i & ((1u << bits) - 1) * 0x10001u;
                for (int j = 0; j < m; j++) s[j] += multiply_pairs(pair, (words){0} + (uint32_t)x[j * row + word * pairs + i]);
            }
        }
        for (int j = 0; j < m; j++) AT(ints, sums[j] + lane) = s[j];
    }
}

INLINE void packed_product(const matrix *w, const int32_t *x, float *y, int64_t begin, int64_t end, const int bits,
                           const int levels, const int m) {
    const int per_word = 32 / bits, pairs = per_word / 2, unrolled = 4;
    int64_t num_words = w->k / per_word, group_words = w->group / per_word, part_words = part_size(w) / per_word;
    int64_t row = pairs_row(w), parts = parts_of(w);
    for (int64_t first = begin; first < end; first += LANES) {
        int64_t count = MIN(LANES, end - first), part = 0;
        const int32_t *weight = (const int32_t *)w->weight + first;
        float all[4][LANES];
        int32_t sums[4][LANES];
        memset(all, 0, m * sizeof all[0]);
        for (int64_t word = 0; word < num_words; part++) {
            int64_t group = word / group_words, last = MIN(MIN(num_words, (group + 1) * group_words), word + part_words);
            memset(sums, 0, m * sizeof sums[0]);
            for (; word + unrolled <= last; word += unrolled)
                add_words(weight + word * w->n, w->n, count, x + word * pairs, row, sums, bits, m, unrolled);
            for (; word < last; word++) add_words(weight + word * w->n, w->n, count, x + word * pairs, row, sums, bits, m, 1);
            const float *scales = w->scales + group * w->n + first;
            const uint8_t *zeros = w->zeros ? w->zeros + group * w->n + first : 0;
            for (int j = 0; j < m; j++) {
                const float scale = AT(float, x + j * row + w->k / 2 + part);
                const int32_t sum = x[j * row + w->k / 2 + parts + part];
                for (int64_t lane = 0; lane < count; lane++) {
                    int32_t offset = (zeros ? zeros[lane] : (int32_t)w->zero) * sum;
                    all[j][lane] += scales[lane] * (scale * (float)(sums[j][lane] - offset));
                }
            }
        }
        for (int j = 0; j < m; j += levels) {
            for (int64_t lane = 0; levels == 2 && lane < count; lane++) all[j][lane] += all[j + 1][lane];
            memcpy(y + j / levels * w->n + first, all[j], 4 * count);
        }
    }
}

#define FOR_ROWS(call, m) \
    switch (m) { \
        case 1: call(1); break; \
        case 2: call(2); break; \
        case 3: call(3); break; \
        default: call(4); \
    }

INLINE int64_t padded_inputs(const matrix *w) { return (w->k + 2 * V - 1) / (2 * V) * (2 * V); }

static void product(const matrix *w, const float *x, float *y, int64_t begin, int64_t end, int m) {
    int64_t padded = padded_inputs(w);
#define PLAIN32(m) plain_product(w, x, padded, y, begin, end, FLOAT32, m)
#define PLAINB(m) plain_product(w, x, padded, y, begin, end, BFLOAT16, m)
#define PLAINH(m) plain_product(w, x, padded, y, begin, end, FLOAT16, m)
#define PACKED(bits, levels, m) packed_product(w, (const int32_t *)x, y, begin, end, bits, levels, m)
#define PACKED4(m) PACKED(4, 1, m)
#define PACKED8(m) PACKED(8, 1, m)
    if (w->bits && levels_of(w) == 2) {
        if (w->bits == 4 && m == 1) PACKED(4, 2, 2);
        else if (w->bits == 4) PACKED(4, 2, 4);
        else if (m == 1) PACKED(8, 2, 2);
        else PACKED(8, 2, 4);
    }
    else if (w->bits == 4) { FOR_ROWS(PACKED4, m) }
    else if (w->bits == 8) { FOR_ROWS(PACKED8, m) }
    else if (w->stored == FLOAT32) { FOR_ROWS(PLAIN32, m) }
    else if (w->stored == BFLOAT16) { FOR_ROWS(PLAINB, m) }
    else { FOR_ROWS(PLAINH, m) }
}

/* Floats, or words, of a row of activations as `prepare` arranges it. */
INLINE int64_t prepared_row(const matrix *w) { return w->bits ? levels_of(w) * pairs_row(w) : padded_inputs(w); }

/* Products with m rows of activations, a few at a time. More share what they read: a few outputs that stay in the cache. */
static void products(const matrix *w, const float *prepared, float *y, int64_t begin, int64_t end, int m) {
    int64_t row_bytes = w->k * (w->stored == FLOAT32 ? 4 : 2), step = w->bits ? LANES : MAX(16, (1 << 17) / row_bytes / 16 * 16);
    int64_t rows = w->bits ? 4 / levels_of(w) : 4;
    if (m <= rows) step = MAX(1, end - begin);
    for (int64_t n = begin; n < end; n += step)
        for (int j = 0; j < m; j += rows)
            product(w, prepared + j * prepared_row(w), y + j * w->n, n, MIN(n + step, end), MIN(rows, m - j));
}

/* Integers for up to PART values, padded to full vectors, in pairs; returns their scale, which is NaN if a value is
   not finite. Subtracts what they stand for. */
INLINE float to_pairs(float *x, int64_t count, int bits, int32_t *pairs, int32_t *sum) {
    const int half = 16 / bits;
    floats most = {0}, not_finite = {0};
    for (int64_t i = 0; i < count; i += V) {
        floats value = AT(floats, x + i), size = where(value < 0, -value, value);
        most = where(size > most, size, most), not_finite += value * 0.0f;
    }
    float largest = 0;
    for (int i = 0; i < V; i++) largest = MAX(largest, most[i]);
    float scale = largest / 32767, inverse = largest > 1e-30f ? 32767 / largest : 0;
    int32_t q[PART + V];
    *sum = 0;
    for (int64_t i = 0; i < count; i += V) {
        floats n = (AT(floats, x + i) * inverse + 12582912.0f) - 12582912.0f; /* rounded to an integer */
        ints whole = __builtin_convertvector(where(n == n, n, (floats){0}), ints);
        AT(floats, x + i) -= n * scale;
        AT(ints, q + i) = whole;
    }
    for (int64_t i = 0; i < count; i++) *sum += q[i];
    for (int64_t i = 0; i < count; i += 2 * half)
        for (int k = 0; k < half; k++) pairs[i / 2 + k] = (q[i + k] & 0xFFFF) | (int32_t)((uint32_t)q[i + k + half] << 16);
    return scale + total(not_finite);
}

/* A row of activations as pairs of integers, in the order of the weights. */
static void prepare_pairs(const matrix *w, const void *x, int64_t from, int32_t *row) {
    int64_t parts = parts_of(w), part = 0;
    for (int64_t k = 0, count; k < w->k; k += count, part++) {
        float values[PART + V] = {0};
        count = MIN(MIN(part_size(w), w->group - k % w->group), w->k - k);
        for (int64_t i = 0; i < count; i++) values[i] = load_float(x, from + (w->order ? w->order[k + i] : k + i), w->type);
        for (int level = 0; level < levels_of(w); level++) {
            int32_t *pairs = row + level * pairs_row(w), *ends = pairs + w->k / 2 + part;
            AT(float, ends) = to_pairs(values, count, w->bits, pairs + k / 2, ends + parts);
        }
    }
}

/* Activations, arranged for `product`: in float32, (M, padded K), or for packed weights pairs of integers. */
static void prepare(const matrix *w, const void *x, float *prepared, int m) {
    int64_t padded = padded_inputs(w);
    for (int j = 0; j < m; j++) {
        float *row = prepared + j * prepared_row(w);
        if (w->bits) {
            prepare_pairs(w, x, j * w->k, (int32_t *)row);
            continue;
        }
        for (int64_t i = 0; i < padded; i++) row[i] = 0;
        for (int64_t i = 0; i < w->k; i++) {
            int64_t to = w->stored == BFLOAT16 ? i / (2 * V) * (2 * V) + i % 2 * V + i % (2 * V) / 2 : i;
            row[to] = load_float(x, j * w->k + i, w->type);
        }
    }
}

INLINE floats silu(floats x) { return x / (exponential(-x) + 1.0f); }

#define BY_TYPE(call, type) \
    switch (type) { \
        case FLOAT32: call(FLOAT32); break; \
        case BFLOAT16: call(BFLOAT16); break; \
        default: call(FLOAT16); \
    }

/* Writes a layer's outputs from `begin` to `end`: y + bias, · silu(gate + its bias), + residual; rounded each time. */
INLINE void finish(const matrix *w, const float *y, const matrix *gates, const float *gate, const void *residual,
                   void *out, int64_t m, int64_t begin, int64_t end, const int type) {
    for (int64_t j = 0; j < m; j++)
        for (int64_t n = begin; n < end; n += V) {
            int64_t count = MIN(V, end - n), at = j * w->n + n;
            floats value = load_some(y, at, count, FLOAT32);
            if (w->bias) value += load_some(w->bias, n, count, type);
            value = round_floats(value, type);
            if (gates) {
                floats g = load_some(gate, at, count, FLOAT32);
                if (gates->bias) g += load_some(gates->bias, n, count, type);
                value *= round_floats(silu(round_floats(g, type)), type);
            }
            if (residual) value += load_some(residual, at, count, type);
            store_some(out, at, count, value, type);
        }
}

/* Whether two layers need the same arrangement of their inputs. */
static int same_inputs(const matrix *a, const matrix *b) {
    if (a->bits != b->bits || a->group != b->group || a->stored != b->stored || !a->order != !b->order) return 0;
    return !a->order || !memcmp(a->order, b->order, a->k * sizeof *a->order);
}

static void fused_linear(const matrix *w, const matrix *gates, const void *x, int64_t m, const void *residual, void *out,
                         float *scratch, int threads) {
    float *y = scratch, *gate = y + m * w->n, *prepared = gate + (gates ? m * w->n : 0);
    const int prepare_again = gates && !same_inputs(w, gates);
    prepare(w, x, prepared, m);
#pragma omp parallel num_threads(threads)
    {
        int64_t begin, end;
        own_part(w->n, 16, &begin, &end);
        products(w, prepared, y, begin, end, m);
        if (prepare_again) {
#pragma omp barrier
#pragma omp single
            prepare(gates, x, prepared, m);
        }
        if (gates) products(gates, prepared, gate, begin, end, m);
#define FINISH(type) finish(w, y, gates, gate, residual, out, m, begin, end, type)
        BY_TYPE(FINISH, w->type)
    }
}

/* out (M, N) = x (M, K) wᵀ + bias, + residual (M, N) if it is given. scratch: M (2 K + N + 64) floats. */
void linear(const matrix *w, const void *x, int64_t m, const void *residual, void *out, float *scratch, int threads) {
    fused_linear(w, 0, x, m, residual, out, scratch, threads);
}

/* out (M, N) = (x wᵀ + bias) · silu(x gatesᵀ + bias). scratch: M (2 K + 2 N + 64) floats. */
void swiglu_linear(const matrix *w, const matrix *gates, const void *x, int64_t m, void *out, float *scratch, int threads) {
    fused_linear(w, gates, x, m, 0, out, scratch, threads);
}

/* Packed weights as values: out (K, N). */
void dequantize(const matrix *w, void *out, int threads) {
    const int per_word = 32 / w->bits;
    const uint32_t *weight = w->weight;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t word = 0; word < w->k / per_word; word++) {
        const float *scales = w->scales + word * per_word / w->group * w->n;
        const uint8_t *zeros = w->zeros ? w->zeros + word * per_word / w->group * w->n : 0;
        for (int j = 0; j < per_word; j++) {
            int64_t k = word * per_word + j, to = (w->order ? w->order[k] : k) * w->n;
            for (int64_t n = 0; n < w->n; n++) {
                float q = weight[word * w->n + n] >> w->bits * j & ((1u << w->bits) - 1);
                store_float(out, to + n, scales[n] * (q - (zeros ? zeros[n] : w->zero)), w->type);
            }
        }
    }
}

/* -- Norm and activation -- */

INLINE void norm_row(const void *x, const void *weight, float eps, int64_t row, int64_t channels, void *out, const int type) {
    int64_t at = row * channels;
    floats squares = {0};
    for (int64_t i = 0; i < channels; i += V) {
        floats value = load_some(x, at + i, channels - i, type);
        squares += value * value;
    }
    float scale = 1 / sqrtf(total(squares) / channels + eps);
    for (int64_t i = 0; i < channels; i += V) {
        floats value = round_floats(load_some(x, at + i, channels - i, type) * scale, type);
        store_some(out, at + i, channels - i, value * load_some(weight, i, channels - i, type), type);
    }
}

void rms_norm(const void *x, const void *weight, float eps, int64_t rows, int64_t channels, int type, void *out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
#define NORM(type) norm_row(x, weight, eps, row, channels, out, type)
        BY_TYPE(NORM, type)
    }
}

/* x · silu(gate), each of `count` values. */
void swiglu(const void *x, const void *gate, int64_t count, int type, void *out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i += V) {
#define ACTIVATE(type) \
    store_some(out, i, count - i, \
               load_some(x, i, count - i, type) * round_floats(silu(load_some(gate, i, count - i, type)), type), type)
        BY_TYPE(ACTIVATE, type)
    }
}

/* -- Attention over a cache -- */

typedef struct {
    int64_t heads, channels, rotary;  /* H, D, rotated channels */
    int64_t head_stride, slot_stride; /* of keys and values, in vectors of D */
    int64_t block_size;               /* tokens */
    int64_t window;                   /* tokens that a query attends back to; 0 for all */
    int32_t type;                     /* of values */
    int32_t quantized;                /* whether keys and values are bytes with a scale and a zero point each */
    void *key, *key_scale, *key_zero, *value, *value_scale, *value_zero;
    float scaling;
} pages;

INLINE void quantize(const float *x, int64_t channels, int type, uint8_t *q, void *scales, void *zeros, int64_t at) {
    float low = 0, high = 0, not_finite = 0; /* NaN if a value is not */
    for (int64_t i = 0; i < channels; i++) low = MIN(x[i], low), high = MAX(x[i], high), not_finite += 0 * x[i];
    /* the smallest normal number of the type */
    float scale = rounded(MAX((high - low) / 254, type == FLOAT16 ? 6.103515625e-05f : 1.17549435e-38f), type) + not_finite;
    float zero = rounded(-low / scale, type);
    store_float(scales, at, scale, type);
    store_float(zeros, at, zero, type);
    for (int64_t i = 0; i < channels; i++) q[i] = MAX(MIN(rintf(x[i] / scale + zero), 255.0f), 0.0f);
}

/* Rotates queries and keys, scales queries, and writes keys and values to their slots.

qkv: (tokens, 3, H, D); cos and sin: (tokens, rotary) floats; query_scale: (tokens) floats, or NULL; slots: (tokens), or NULL
for the number of the token;
query: (tokens, H, D). */
void rope_append(const pages *p, const void *qkv, const float *cos, const float *sin, const float *query_scale,
                 const int64_t *slots, int64_t tokens, void *query, int threads) {
    int64_t size = p->channels, half_size = p->rotary / 2;
    int type = p->type;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t item = 0; item < tokens * p->heads; item++) {
        int64_t token = item / p->heads, head = item % p->heads;
        int64_t slot = head * p->head_stride + (slots ? slots[token] : token) * p->slot_stride;
        float x[2][size];
        for (int part = 0; part < 2; part++) {
            int64_t from = ((token * 3 + part) * p->heads + head) * size;
            for (int64_t i = 0; i < size; i++) x[part][i] = load_float(qkv, from + i, type);
            for (int64_t i = 0; i < half_size; i++) {
                float a = x[part][i], b = x[part][i + half_size];
                int64_t low = token * p->rotary + i, high = low + half_size;
                x[part][i] = a * cos[low] - b * sin[low];
                x[part][i + half_size] = b * cos[high] + a * sin[high];
            }
        }
        float factor = query_scale ? query_scale[token] : 1;
        for (int64_t i = 0; i < size; i++) store_float(query, item * size + i, x[0][i] * factor, type);
        int64_t from = ((token * 3 + 2) * p->heads + head) * size;
        if (!p->quantized) {
            for (int64_t i = 0; i < size; i++) store_float(p->key, slot * size + i, x[1][i], type);
            memcpy((char *)p->value + slot * size * (type == FLOAT32 ? 4 : 2),
                   (const char *)qkv + from * (type == FLOAT32 ? 4 : 2), size * (type == FLOAT32 ? 4 : 2));
            continue;
        }
        for (int64_t i = 0; i < size; i++) x[1][i] = rounded(x[1][i], type), x[0][i] = load_float(qkv, from + i, type);
        quantize(x[1], size, type, (uint8_t *)p->key + slot * size, p->key_scale, p->key_zero, slot);
        quantize(x[0], size, type, (uint8_t *)p->value + slot * size, p->value_scale, p->value_zero, slot);
    }
}

#define QUERIES 4 /* tokens of a sequence that read keys together */
#define CHUNK 256 /* keys whose softmax is computed together */

/* Attention to some of the keys: values weighted by e^(score - highest), and the total of the weights. */
typedef struct {
    float highest[QUERIES], total[QUERIES];
    float *sums; /* (QUERIES, D) */
} part;

/* Some tokens of a sequence. */
typedef struct {
    int32_t first, count; /* up to QUERIES tokens of the step */
    int32_t row, length;  /* row of `tables`, and tokens that the first one sees; each next one sees one more */
} query_tile;

/* Attention of a tile's queries to the keys of one chunk. query: (QUERIES, D), scaled, in float32; `queries` of them are
   computed, of which the tile may have fewer. */
INLINE void attend_chunk(const pages *p, const int32_t *table, query_tile tile, const float *query, int64_t head,
                         int64_t chunk, part *result, const int queries, const int type, const int stored) {
    int64_t size = p->channels, start = chunk * CHUNK, places[CHUNK];
    int64_t count = MIN(CHUNK, tile.length + tile.count - 1 - start);
    int64_t first = p->window ? MAX(0, tile.length - p->window - start) : 0; /* what lies before is not read */
    float scores[QUERIES][CHUNK + V], query_sums[QUERIES] = {0}, offsets[QUERIES] = {0};
    for (int64_t t = first; t < count; t++) {
        int64_t slot = table[(start + t) / p->block_size] * p->block_size + (start + t) % p->block_size;
        places[t] = head * p->head_stride + slot * p->slot_stride;
    }
    for (int j = 0; j < queries && stored == BYTES; j++)
        for (int64_t i = 0; i < size; i++) query_sums[j] += query[j * size + i];
    for (int64_t t = first; t < count; t++) {
        floats s[QUERIES];
        for (int j = 0; j < queries; j++) s[j] = (floats){0};
        int64_t i = 0, at = places[t] * size;
        for (; i + V <= size; i += V) {
            floats key = load_floats(p->key, at + i, stored);
            for (int j = 0; j < queries; j++) s[j] += key * AT(floats, query + j * size + i);
        }
        for (int j = 0; j < queries; j++) {
            float score = total(s[j]);
            for (int64_t k = i; k < size; k++) score += load_float(p->key, at + k, stored) * query[j * size + k];
            if (stored == BYTES)
                score = load_float(p->key_scale, places[t], type) *
                        (score - load_float(p->key_zero, places[t], type) * query_sums[j]);
            scores[j][t] = score;
        }
    }
    for (int j = 0; j < queries; j++) {
        int64_t end = tile.length + j - start, begin = p->window ? MAX(0, end - p->window) : 0;
        for (int64_t t = 0; t < MIN(begin, count); t++) scores[j][t] = -INFINITY;
        for (int64_t t = MAX(MIN(end, count), 0); t < count + V; t++) scores[j][t] = -INFINITY;
        floats highs = AT(floats, scores[j]), sum = {0};
        for (int64_t t = V; t < count; t += V) {
            floats score = AT(floats, scores[j] + t);
            highs = where(score > highs, score, highs);
        }
        float highest = highs[0];
        for (int i = 1; i < V; i++) highest = MAX(highest, highs[i]);
        for (int64_t t = 0; t < count; t += V) {
            floats weights = exponential(AT(floats, scores[j] + t) - (highest == -INFINITY ? 0 : highest));
            AT(floats, scores[j] + t) = weights;
            sum += weights;
        }
        result->highest[j] = highest, result->total[j] = total(sum);
        for (int64_t t = first; t < count && stored == BYTES; t++) {
            scores[j][t] *= load_float(p->value_scale, places[t], type);
            offsets[j] += scores[j][t] * load_float(p->value_zero, places[t], type);
        }
    }
    int64_t i = 0;
    for (; i + 2 * V <= size; i += 2 * V) {
        floats sums[QUERIES][2];
        for (int j = 0; j < queries; j++) sums[j][0] = sums[j][1] = (floats){0} - offsets[j];
        for (int64_t t = first; t < count; t++) {
            floats low = load_floats(p->value, places[t] * size + i, stored);
            floats high = load_floats(p->value, places[t] * size + i + V, stored);
            for (int j = 0; j < queries; j++) sums[j][0] += low * scores[j][t], sums[j][1] += high * scores[j][t];
        }
        for (int j = 0; j < queries; j++)
            for (int k = 0; k < 2; k++) AT(floats, result->sums + j * size + i + k * V) = sums[j][k];
    }
    for (; i < size; i++)
        for (int j = 0; j < queries; j++) {
            float sum = -offsets[j];
            for (int64_t t = first; t < count; t++) sum += load_float(p->value, places[t] * size + i, stored) * scores[j][t];
            result->sums[j * size + i] = sum;
        }
}

/* Adds the attention to further keys (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867, eq. 4). */
INLINE void combine(part *whole, const part *next, int count, int64_t size) {
    for (int j = 0; j < count; j++) {
        float highest = MAX(whole->highest[j], next->highest[j]), base = highest == -INFINITY ? 0 : highest;
        float old = expf(whole->highest[j] - base), new = expf(next->highest[j] - base);
        for (int64_t i = 0; i < size; i++)
            whole->sums[j * size + i] = whole->sums[j * size + i] * old + next->sums[j * size + i] * new;
        whole->total[j] = whole->total[j] * old + next->total[j] * new;
        whole->highest[j] = highest;
    }
}

#define ATTEND_CHUNK(chunk) \
    if (tile.count == 1) attend_chunk(p, table, tile, queries, head, chunk, &next, 1, type, stored); \
    else attend_chunk(p, table, tile, queries, head, chunk, &next, QUERIES, type, stored)

INLINE void attend_tiles(const pages *p, const void *query, const int32_t *tables, int64_t width,
                         const query_tile *tiles, int64_t num_tiles, int64_t splits, float *parts, void *out, int threads, const int type,
                         const int stored) {
    int64_t size = p->channels, record = QUERIES * (size + 2);
#pragma omp parallel num_threads(threads)
    {
        float queries[QUERIES * size], sums[2][QUERIES * size];
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < num_tiles * p->heads * splits; item++) {
            query_tile tile = tiles[item / splits / p->heads];
            int64_t head = item / splits % p->heads, chunks = (tile.length + tile.count - 1 + CHUNK - 1) / CHUNK;
            int64_t first = p->window ? MAX(0, tile.length - p->window) / CHUNK : 0;
            part whole = {.sums = sums[0]}, next = {.sums = sums[1]};
            memset(sums[0], 0, sizeof sums[0]);
            memset(queries, 0, sizeof queries);
            for (int j = 0; j < tile.count; j++) {
                whole.highest[j] = -INFINITY;
                int64_t from = ((tile.first + j) * p->heads + head) * size;
                for (int64_t i = 0; i < size; i++) queries[j * size + i] = load_float(query, from + i, type) * p->scaling;
            }
            const int32_t *table = tables + tile.row * width;
            if (splits > 1) { /* one chunk each; combined below */
                next.sums = parts + item * record;
                for (int j = 0; j < QUERIES; j++) next.highest[j] = -INFINITY, next.total[j] = 0;
                memset(next.sums, 0, 4 * record);
                if (item % splits >= first && item % splits < chunks) {
                    ATTEND_CHUNK(item % splits);
                }
                memcpy(next.sums + QUERIES * size, next.highest, sizeof next.highest);
                memcpy(next.sums + QUERIES * (size + 1), next.total, sizeof next.total);
                continue;
            }
            for (int64_t chunk = first; chunk < chunks; chunk++) {
                ATTEND_CHUNK(chunk);
                combine(&whole, &next, tile.count, size);
            }
            for (int j = 0; j < tile.count; j++)
                for (int64_t i = 0; i < size; i++)
                    store_float(out, ((tile.first + j) * p->heads + head) * size + i,
                                whole.sums[j * size + i] / whole.total[j], type);
        }
        if (splits > 1) {
#pragma omp for schedule(static)
            for (int64_t item = 0; item < num_tiles * p->heads; item++) {
                query_tile tile = tiles[item / p->heads];
                part whole = {.sums = sums[0]};
                memset(sums[0], 0, sizeof sums[0]);
                for (int j = 0; j < QUERIES; j++) whole.highest[j] = -INFINITY;
                for (int64_t split = 0; split < splits; split++) {
                    part next = {.sums = parts + (item * splits + split) * record};
                    memcpy(next.highest, next.sums + QUERIES * size, sizeof next.highest);
                    memcpy(next.total, next.sums + QUERIES * (size + 1), sizeof next.total);
                    combine(&whole, &next, tile.count, size);
                }
                for (int j = 0; j < tile.count; j++)
                    for (int64_t i = 0; i < size; i++)
                        store_float(out, ((tile.first + j) * p->heads + item % p->heads) * size + i,
                                    whole.sums[j * size + i] / whole.total[j], type);
            }
        }
    }
}

/* Attention of tokens to the cache, up to themselves. query: (tokens, H, D); tables: (rows, width) blocks;
   out: (tokens, H, D).

splits: 1, or the number of chunks of the longest sequence, which then work in parallel: worthwhile for few tokens.
parts: for each tile, head and split QUERIES (D + 2) floats, unless splits is 1. What a token gets depends neither on
the others nor on splits: chunks begin at fixed positions, and are combined in their order. */
void attend(const pages *p, const void *query, const int32_t *tables, int64_t width, const query_tile *tiles,
            int64_t num_tiles, int64_t splits, float *parts, void *out, int threads) {
#define ATTEND(type, stored) attend_tiles(p, query, tables, width, tiles, num_tiles, splits, parts, out, threads, type, stored)
    if (p->quantized && p->type == FLOAT32) ATTEND(FLOAT32, BYTES);
    else if (p->quantized && p->type == BFLOAT16) ATTEND(BFLOAT16, BYTES);
    else if (p->quantized) ATTEND(FLOAT16, BYTES);
    else if (p->type == FLOAT32) ATTEND(FLOAT32, FLOAT32);
    else if (p->type == BFLOAT16) ATTEND(BFLOAT16, BFLOAT16);
    else ATTEND(FLOAT16, FLOAT16);
}

/* -- A layer of the network -- */

typedef struct {
    const void *ln_1, *ln_2; /* weights of the norms */
    const matrix *c_attn, *c_proj, *w1, *w2, *mlp_c_proj;
    float eps;
} block;

/* The part of a layer before attention. hidden: (M, C); the rest as in `rope_append`.
   values: M (C + 3 H D) values; scratch: floats for `linear`. */
void begin_block(const block *b, const pages *p, const void *hidden, int64_t m, const float *cos, const float *sin,
                 const float *query_scale, const int64_t *slots, void *query, void *values, float *scratch, int threads) {
    void *qkv = (char *)values + m * b->c_attn->k * (p->type == FLOAT32 ? 4 : 2);
    rms_norm(hidden, b->ln_1, b->eps, m, b->c_attn->k, p->type, values, m > 4 ? threads : 1);
    linear(b->c_attn, values, m, 0, qkv, scratch, threads);
    rope_append(p, qkv, cos, sin, query_scale, slots, m, query, m > 4 ? threads : 1);
}

/* The part after attention, in place. attended: (M, H D); hidden: (M, C); values: M (C + intermediate size) values;
   scratch: floats for `linear` and `swiglu_linear`. */
void end_block(const block *b, const void *attended, void *hidden, int64_t m, void *values, float *scratch, int threads) {
    int64_t channels = b->c_attn->k;
    void *inner = (char *)values + m * channels * (b->c_attn->type == FLOAT32 ? 4 : 2);
    linear(b->c_proj, attended, m, hidden, hidden, scratch, threads);
    rms_norm(hidden, b->ln_2, b->eps, m, channels, b->c_attn->type, values, m > 4 ? threads : 1);
    swiglu_linear(b->w1, b->w2, values, m, inner, scratch, threads);
    linear(b->mlp_c_proj, inner, m, hidden, hidden, scratch, threads);
}

/* A layer, in place. query, attended: (M, H D); the rest as in the functions above. */
void decode_block(const block *b, const pages *p, void *hidden, int64_t m, const float *cos, const float *sin,
                  const float *query_scale, const int64_t *slots, const int32_t *tables, int64_t width,
                  const query_tile *tiles, int64_t num_tiles, int64_t splits, void *query, void *attended, void *values,
                  float *scratch, int threads) {
    begin_block(b, p, hidden, m, cos, sin, query_scale, slots, query, values, scratch, threads);
    attend(p, query, tables, width, tiles, num_tiles, splits, scratch, attended, threads);
    end_block(b, attended, hidden, m, values, scratch, threads);
}

/* Whether the compiler has 16-bit floats: GCC from version 12 on. */
int has_float16(void) {
#ifdef __FLT16_MAX__
    return 1;
#else
    return 0;
#endif
}

/* 1 if the processor runs these instructions. */
int self_test(void) {
    float x[V];
    for (int i = 0; i < V; i++) x[i] = i;
    return total(exponential(AT(floats, x) - (float)V)) > 0;
}
