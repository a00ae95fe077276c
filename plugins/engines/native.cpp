// What the torch engine computes on CPUs by itself: for the few rows of a step that decodes, torch's own operators take
// several times as long as reading what they read. native.py compiles this for the machine that it runs on, and calls it.
//
// All is computed in fp32, whatever it is kept in. Tensors are dense in their last dimension; a stride counts elements.
// Whatever is parallel runs in torch's own OpenMP team.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512DQ__)
constexpr int LANES = 16, MOST_ROWS = 12, MOST_NARROW = 12;  // of 32 registers, 24 are sums
#elif defined(__AVX2__)
constexpr int LANES = 8, MOST_ROWS = 6, MOST_NARROW = 12;  // 12 of 16
#else
constexpr int LANES = 4, MOST_ROWS = 6, MOST_NARROW = 12;
#endif
constexpr int PANEL = 2 * LANES;
constexpr long FEW = 4;          // rows
constexpr long SMALL = 1 << 14;  // numbers: fewer are not worth waking the team for

struct Bf16 {
    uint16_t bits;  // the upper half of a float's
};

inline float widen(float x) { return x; }
inline float widen(int8_t x) { return x; }
inline float widen(Bf16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }
inline void narrow(float x, float &to) { to = x; }
inline void narrow(float x, Bf16 &to) {
    uint32_t bits = __builtin_bit_cast(uint32_t, x);
    to.bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}

// e^x to 1e-7 or so of itself, of operations that a compiler can do for many numbers at once, as with libm's it cannot:
// 2^n e^rest, where x is n ln 2 and a rest that the first terms of the series are enough for.
inline float exponential(float x) {
    x = std::min(std::max(x, -87.f), 88.f);
    float n = std::floor(x * 1.44269504f + 0.5f);
    float rest = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts, the first of few digits
    float e = 1 / 5040.f;
    for (float term : {1 / 720.f, 1 / 120.f, 1 / 24.f, 1 / 6.f, 1 / 2.f, 1.f, 1.f}) e = e * rest + term;
    return e * __builtin_bit_cast(float, uint32_t(int(n) + 127) << 23);
}

using Floats = float __attribute__((vector_size(4 * LANES)));
using Halves = uint16_t __attribute__((vector_size(2 * LANES)));
using Integers = uint32_t __attribute__((vector_size(4 * LANES)));
template <class V> inline V bits(const void *from) {
    V made;
    std::memcpy(&made, from, sizeof made);
    return made;
}
// Of vectors, not a loop over numbers: that may be made of two halves, and what reads both then waits for both.
inline Floats load(const float *from) { return bits<Floats>(from); }
inline Floats load(const Bf16 *from) {
    return Floats(__builtin_convertvector(bits<Halves>(from), Integers) << 16);
}
inline Floats load(const int8_t *from) {
#if defined(__AVX512DQ__)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from))));
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from))));
#else
    using Bytes = int8_t __attribute__((vector_size(LANES)));
    return __builtin_convertvector(bits<Bytes>(from), Floats);
#endif
}

template <class V> inline void store(V x, void *to) { std::memcpy(to, &x, sizeof x); }
inline void narrow(Floats x, float *to) { store(x, to); }
inline void narrow(Floats x, Bf16 *to) {
    Integers made = Integers(x);
    store(__builtin_convertvector((made + 0x7fff + (made >> 16 & 1)) >> 16, Halves), to);
}

// In halves, onto each other.
inline float total(Floats x) {
    float all[LANES];
    std::memcpy(all, &x, sizeof all);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) all[i] += all[i + half];
    return all[0];
}

template <class T> inline float squares(const T *x, long count) {
    Floats some = {};
    long i = 0;
    for (; i + LANES <= count; i += LANES) some += load(x + i) * load(x + i);
    float all = total(some);
    for (; i < count; i++) all += widen(x[i]) * widen(x[i]);
    return all;
}

// Products

constexpr long AHEAD = 128;  // inputs, whose weights are fetched before they are multiplied

// What will be read soon. A CPU does so by itself, but not far enough ahead where it multiplies much in between.
inline void fetch(const void *from, long bytes) {
    for (long line = 0; line < bytes; line += 64) __builtin_prefetch(static_cast<const char *>(from) + line);
}

// Good until the next call.
inline const float *widened(const float *x, long) { return x; }
inline const float *widened(const Bf16 *x, long count) {
    static thread_local std::vector<float> made;
    made.resize(count);
    for (long i = 0; i < count; i++) made[i] = widen(x[i]);
    return made.data();
}

template <class X> struct Product {
    long rows, inputs, outputs;
    const X *x;  // [rows, inputs]
    // Of PANEL outputs each, zeros after the last: [panels, inputs / 2, 2, 2, LANES], a panel's halves and in each the weights
    // of two inputs; for bf16 in tiles [..., 2, LANES, 2]. There inputs are a multiple of 32, else of 2.
    const void *panels;
    const float *scales;  // [outputs], or null
    const float *bias;    // [outputs], or null
    const X *to;          // [rows, outputs], what the product is added to, or null
    X *result;            // [rows, outputs]
};

// What the sums of a row make of the outputs from `at` on.
template <class X> inline void finish(const Product<X> &p, long row, long at, const float *sums, long count) {
    long place = row * p.outputs + at, i = 0;
    count = std::min(count, p.outputs - at);
    for (; i + LANES <= count; i += LANES) {
        Floats value = load(sums + i);
        if (p.scales) value *= load(p.scales + at + i);
        if (p.bias) value += load(p.bias + at + i);
        if (p.to) value += load(p.to + place + i);
        narrow(value, p.result + place + i);
    }
    for (; i < count; i++) {
        float value = sums[i];
        if (p.scales) value *= p.scales[at + i];
        if (p.bias) value += p.bias[at + i];
        if (p.to) value += widen(p.to[place + i]);
        narrow(value, p.result[place + i]);
    }
}

// ROWS rows of `x`, from row `first` on, times VECTORS vectors of weights: those of the outputs from `at` on, in panels that
// follow each other. The sums stay in registers. Each is made in the order of the inputs, so that a row's numbers are the
// same to the bit whatever rows are beside it.
template <class W, int ROWS, int VECTORS, class X>
__attribute__((noinline)) void block(const Product<X> &p, const float *x, const W *weights, long at, long first) {
    x += first * p.inputs;
    Floats sums[ROWS][VECTORS] = {};
    for (long k = 0; k < p.inputs; k += 2) {
        for (long v = 0; v < VECTORS && k + AHEAD < p.inputs; v += 2)
            fetch(weights + (v / 2 * p.inputs + k + AHEAD) * PANEL, 2 * PANEL * sizeof(W));
        for (int second = 0; second < 2; second++) {
            const W *those = weights + k * PANEL + second * LANES;
            Floats mine[VECTORS];
            for (int v = 0; v < VECTORS; v++) mine[v] = load(those + (v / 2 * p.inputs + v % 2) * PANEL);
            for (int row = 0; row < ROWS; row++)
                for (int v = 0; v < VECTORS; v++) sums[row][v] += mine[v] * x[row * p.inputs + k + second];
        }
    }
    for (int row = 0; row < ROWS; row++) {
        float sum[VECTORS * LANES];
        std::memcpy(sum, sums[row], sizeof sum);
        finish(p, first + row, at, sum, VECTORS * LANES);
    }
}

// As `block`, of `rows` rows, at most ROWS, and whole panels. Few rows take several panels at once, since a sum has to wait
// for what was added before; more than MOST_ROWS take half a panel.
template <class W, int ROWS = MOST_NARROW, class X>
void blocks(const Product<X> &p, const float *x, const W *weights, long at, long panels, long first, long rows) {
    if (rows < ROWS) {
        if constexpr (ROWS > 1) blocks<W, ROWS - 1>(p, x, weights, at, panels, first, rows);
        return;
    }
    constexpr int SIDE_BY_SIDE = 4 * ROWS <= MOST_ROWS ? 4 : 2 * ROWS <= MOST_ROWS ? 2 : 1;
    while (panels > 0) {
        int done = panels >= SIDE_BY_SIDE ? SIDE_BY_SIDE : 1;
        if constexpr (ROWS > MOST_ROWS) {
            block<W, ROWS, 1>(p, x, weights, at, first);
            block<W, ROWS, 1>(p, x, weights + PANEL, at + LANES, first);
        } else if (done > 1) {
            block<W, ROWS, 2 * SIDE_BY_SIDE>(p, x, weights, at, first);
        } else {
            block<W, ROWS, 2>(p, x, weights, at, first);
        }
        panels -= done, at += done * PANEL, weights += done * PANEL * p.inputs;
    }
}

// In fp32.
template <class W, class X> void product(const Product<X> &p) {
    long panels = (p.outputs + PANEL - 1) / PANEL, size = p.inputs * PANEL;
    bool few = p.rows <= MOST_NARROW, widens = !few && !std::is_same_v<W, float>;  // for many rows a panel is widened once
    long parts = few ? 1 : (p.rows + MOST_ROWS - 1) / MOST_ROWS, together = few ? 4 : 1;
    const float *x = widened(p.x, p.rows * p.inputs);
#pragma omp parallel
    {
        static thread_local std::vector<float> wide;
        if (widens && long(wide.size()) < size) wide.resize(size);
        // Whoever is free takes the next: a thread that another process has put off its core holds up the others less.
#pragma omp for schedule(dynamic, 1)
        for (long panel = 0; panel < panels; panel += together) {
            const W *weights = static_cast<const W *>(p.panels) + panel * size;
            for (long i = 0; widens && i < size; i += LANES) store(load(weights + i), &wide[i]);
            for (long part = 0; part < parts; part++) {  // as even as can be: a single row would take as long as three
                long first = p.rows * part / parts, rows = p.rows * (part + 1) / parts - first;
                if (widens)
                    blocks<float>(p, x, wide.data(), panel * PANEL, 1, first, rows);
                else
                    blocks<W>(p, x, weights, panel * PANEL, std::min(together, panels - panel), first, rows);
            }
        }
    }
}

#if defined(__AMX_BF16__)

constexpr long TILE = 16;     // rows
constexpr long TOGETHER = 4;  // panels of many rows: more of a result's row is written at once

struct alignas(64) Tiles {  // what is in them, as ldtilecfg reads it
    uint8_t palette = 1, start = 0, none[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
    // 0 to 3: sums, [rows, 16 outputs]. 4, 5: of x, [rows, 32 inputs]. 6, 7: of weights, [16 pairs of inputs, 16 outputs].
    explicit Tiles(long count) {
        for (int upper : {0, 1, 4}) rows[upper] = std::min(count, TILE);
        for (int lower : {2, 3, 5}) rows[lower] = std::max(count - TILE, 1L);
        for (int weights : {6, 7}) rows[weights] = TILE;
    }
};

// What was written before is in memory then: GCC's intrinsics do not say that the instructions for tiles read it.
inline void written(const void *where) { asm volatile("" ::"r"(where) : "memory"); }

using Sums = float[TOGETHER * PANEL];  // of a row

// A vector's weights for two inputs, side by side as the CPU multiplies them. Small integers need only a float's upper half.
inline Integers pairs(const int8_t *from) { return Integers(load(from)) >> 16 | Integers(load(from + LANES)); }

constexpr long STEP = 2 * TILE, STEPS_HELD = 2 * AHEAD / STEP;  // inputs

// Of a panel's weights, those of the step at input `k`.
inline void widen(const int8_t *weights, long k, long inputs, Bf16 *to) {
    if (k + AHEAD < inputs) fetch(weights + (k + AHEAD) * PANEL, STEP * PANEL);
    for (long i = 0; i < STEP * PANEL; i += 2 * LANES) store(pairs(weights + k * PANEL + i), to + i);
}

// The weights of a panel, a step at a time.
template <class W> struct Steps {
    const W *weights;
    long inputs;
    const Bf16 *operator()(long k) {
        if (k + AHEAD < inputs) fetch(weights + (k + AHEAD) * PANEL, STEP * PANEL * sizeof(Bf16));
        return weights + k * PANEL;
    }
};
// Widened, some steps before they are multiplied: tiles have to wait for what is being written.
template <> struct Steps<int8_t> {
    const int8_t *weights;
    long inputs;
    alignas(64) Bf16 wide[STEPS_HELD][STEP * PANEL];
    Steps(const int8_t *weights, long inputs) : weights(weights), inputs(inputs) {
        for (long k = 0; k < AHEAD; k += STEP) prepare(k);
    }
    const Bf16 *operator()(long k) {
        prepare(k + AHEAD);
        written(wide);
        return wide[k / STEP % STEPS_HELD];
    }
    void prepare(long k) {
        if (k < inputs) widen(weights, k, inputs, wide[k / STEP % STEPS_HELD]);
    }
};

// The sums of at most 32 rows, with a panel.
template <class W> void tiles(const Bf16 *x, const W *panel, long inputs, long rows, Sums *sums) {
    long across = inputs * sizeof(Bf16), pair = 2 * PANEL * sizeof(Bf16);
    bool both = rows > TILE;
    written(panel);
    Steps<W> steps{panel, inputs};
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long k = 0; k < inputs; k += STEP) {
        const Bf16 *weights = steps(k);
        _tile_loadd(4, x + k, across);
        _tile_loadd(6, weights, pair);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, weights + PANEL, pair);
        _tile_dpbf16ps(1, 4, 7);
        if (both) {
            _tile_loadd(5, x + TILE * inputs + k, across);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0], sizeof sums[0]);
    _tile_stored(1, sums[0] + TILE, sizeof sums[0]);
    if (both) {
        _tile_stored(2, sums[TILE], sizeof sums[0]);
        _tile_stored(3, sums[TILE] + TILE, sizeof sums[0]);
    }
}

// In bf16, with sums in fp32, in the CPU's tiles.
template <class W> void in_tiles(const Product<Bf16> &p) {
    constexpr bool WIDENS = !std::is_same_v<W, Bf16>;
    if (WIDENS && p.rows <= FEW) return product<W>(p);  // a panel takes longer to be widened than to be multiplied
    long panels = (p.outputs + PANEL - 1) / PANEL, size = p.inputs * PANEL;
    long parts = (p.rows + 2 * TILE - 1) / (2 * TILE);
    long together = parts > 1 ? TOGETHER : 1;
#pragma omp parallel
    {
        static thread_local std::vector<Bf16> wide;
        if (WIDENS && long(wide.size()) < size) wide.resize(size);
        static thread_local std::vector<float> room;
        if (long(room.size()) < p.rows * TOGETHER * PANEL) room.resize(p.rows * TOGETHER * PANEL);
        long configured = 0;
#pragma omp for schedule(dynamic, 1)
        for (long some = 0; some < panels; some += together) {
            for (long panel = some; panel < std::min(some + together, panels); panel++) {
                const W *kept = static_cast<const W *>(p.panels) + panel * size;
                bool at_once = WIDENS && parts > 1;  // for many rows a panel is widened once
                if constexpr (WIDENS)
                    for (long k = 0; at_once && k < p.inputs; k += STEP) widen(kept, k, p.inputs, &wide[k * PANEL]);
                Sums *sums = reinterpret_cast<Sums *>(&room[(panel - some) * PANEL]);
                for (long part = 0; part < parts; part++) {
                    long first = p.rows * part / parts, rows = p.rows * (part + 1) / parts - first;
                    if (rows != configured) {
                        Tiles of(rows);
                        written(&of);
                        _tile_loadconfig(&of);
                        configured = rows;
                    }
                    const Bf16 *x = p.x + first * p.inputs;
                    if (at_once)
                        tiles(x, wide.data(), p.inputs, rows, sums + first);
                    else
                        tiles(x, kept, p.inputs, rows, sums + first);
                }
            }
            for (long row = 0; row < p.rows; row++)
                finish(p, row, some * PANEL, &room[row * TOGETHER * PANEL], together * PANEL);
        }
        _tile_release();
    }
}

#endif

// What lies between them

// RMSNorm of each of `heads` heads of a token; a token's others, up to `stride`, are passed over. `result` may be x, or dense.
template <class T>
void norm(long tokens, long heads, long width, const T *x, long stride, const T *weight, float eps, T *result) {
    long apart = result == x ? stride : heads * width;
#pragma omp parallel for schedule(static) if (tokens * heads * width > SMALL)
    for (long row = 0; row < tokens * heads; row++) {
        const T *from = x + row / heads * stride + row % heads * width;
        T *to = result + row / heads * apart + row % heads * width;
        float factor = 1 / std::sqrt(squares(from, width) / float(width) + eps);
        for (long i = 0; i < width; i++) narrow(widen(from[i]) * factor * widen(weight[i]), to[i]);
    }
}

template <class T> void gate(long rows, long width, const T *both, T *result) {
#pragma omp parallel for schedule(static) if (rows * width > SMALL)
    for (long row = 0; row < rows; row++) {
        const T *left = both + 2 * row * width, *right = left + width;
        T *to = result + row * width;
        for (long i = 0; i < width; i++) {
            float x = widen(left[i]);
            narrow(x / (1 + exponential(-x)) * widen(right[i]), to[i]);
        }
    }
}

template <class T>
void rotate(long tokens, long heads, long width, T *x, long stride, const T *cosines, const T *sines) {
    long half = width / 2;
#pragma omp parallel for schedule(static) if (tokens * heads * width > SMALL)
    for (long token = 0; token < tokens; token++) {
        const T *cosine = cosines + token * width, *sine = sines + token * width;
        for (long head = 0; head < heads; head++) {
            T *left = x + token * stride + head * width, *right = left + half;
#pragma omp simd
            for (long i = 0; i < half; i++) {
                float a = widen(left[i]), b = widen(right[i]);
                narrow(a * widen(cosine[i]) + b * widen(sine[i]), left[i]);  // that half of the sines is negative
                narrow(b * widen(cosine[half + i]) + a * widen(sine[half + i]), right[i]);
            }
        }
    }
}

// Attention

struct Heads {
    long sequences, kv_heads, group;  // `group` heads of a query share a KV head
    long width, value_width;
    const void *query, *key, *value;              // [tokens, heads, width], [tokens, KV heads, ...]: the step's
    long query_stride, key_stride, value_stride;  // from a token to the next
    // Of each sequence, its row of the cache: keys [KV heads, capacity / LANES, width, LANES], so that scores with LANES of
    // them are made side by side; values [KV heads, capacity, value width].
    void *const *keys, *const *values;
    const long *capacities;                // of each sequence: the tokens that its row has room for
    const long *firsts, *counts, *starts;  // of each sequence: its tokens in this step, and where they come in itself
    float scale;
    long window;    // tokens that are seen, itself included; 0: all
    float softcap;  // 0: none
    void *result;   // [tokens, heads, value width]
};

constexpr long QUERIES = 12;                           // rows of a task, or one token's, if that has more
constexpr int MOST_QUERIES = MOST_ROWS / 2, WIDE = 4;  // at a time; with so many vectors of keys, or of values

// ROWS queries with MANY * LANES keys. A score is made in the order of the width, whatever is beside it. `to` [ROWS, apart].
template <int ROWS, int MANY, class T> void score(const float *query, const T *keys, long width, float *to, long apart) {
    Floats sums[ROWS][MANY] = {};
    for (long i = 0; i < width; i++)
        for (int v = 0; v < MANY; v++) {
            Floats mine = load(keys + (v * width + i) * LANES);
            for (int row = 0; row < ROWS; row++) sums[row][v] += mine * query[row * width + i];
        }
    for (int row = 0; row < ROWS; row++) std::memcpy(to + row * apart, sums[row], sizeof sums[row]);
}

// Of `rows` queries, at most ROWS, with keys of `blocks` times LANES tokens.
template <int ROWS = MOST_QUERIES, class T>
void scores(const float *query, const T *keys, long width, long rows, long blocks, float *to, long apart) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return scores<ROWS - 1>(query, keys, width, rows, blocks, to, apart);
    long i = 0;
    for (; i + WIDE <= blocks; i += WIDE)
        score<ROWS, WIDE>(query, keys + i * width * LANES, width, to + i * LANES, apart);
    for (; i < blocks; i++) score<ROWS, 1>(query, keys + i * width * LANES, width, to + i * LANES, apart);
}

// The sums of `count` values, each times its share, one after another: MANY * LANES numbers of each, for ROWS queries.
// `shares` [ROWS, apart].
template <int ROWS, int MANY, class T>
void add(const float *shares, long apart, const T *values, long width, long count, float *to) {
    Floats sums[ROWS][MANY] = {};
    for (long k = 0; k < count; k++)
        for (int v = 0; v < MANY; v++) {
            Floats mine = load(values + k * width + v * LANES);
            for (int row = 0; row < ROWS; row++) sums[row][v] += mine * shares[row * apart + k];
        }
    for (int row = 0; row < ROWS; row++) std::memcpy(to + row * width, sums[row], sizeof sums[row]);
}

// Of `rows` queries, at most ROWS, all numbers of the values.
template <int ROWS = MOST_QUERIES, class T>
void add(const float *shares, long apart, const T *values, long width, long rows, long count, float *to) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return add<ROWS - 1>(shares, apart, values, width, rows, count, to);
    long i = 0;
    for (; i + WIDE * LANES <= width; i += WIDE * LANES)
        add<ROWS, WIDE>(shares, apart, values + i, width, count, to + i);
    for (; i + LANES <= width; i += LANES) add<ROWS, 1>(shares, apart, values + i, width, count, to + i);
    for (int row = 0; row < ROWS && i < width; row++) {  // what is left of a vector
        float *mine = to + row * width;
        std::fill(mine + i, mine + width, 0.f);
        for (long k = 0; k < count; k++)
            for (long each = i; each < width; each++) mine[each] += shares[row * apart + k] * widen(values[k * width + each]);
    }
}

// Scores to shares of the keys that are seen, but for a factor: their sum, which is returned.
float softmax(float *x, long count, float softcap) {
    if (softcap != 0)
        for (long k = 0; k < count; k++) x[k] = (1 - 2 / (1 + exponential(2 * x[k] / softcap))) * softcap;  // tanh
    float most = x[0];
    for (long k = 1; k < count; k++) most = std::max(most, x[k]);
    for (long k = 0; k < count; k++) x[k] = exponential(x[k] - most);
    Floats some = {};
    long k = 0;
    for (; k + LANES <= count; k += LANES) some += load(x + k);
    float all = total(some);
    for (; k < count; k++) all += x[k];
    return all;
}

template <class T> T *row_of(void *const *rows, const Heads &h, long sequence, long head, long width) {
    return static_cast<T *>(rows[sequence]) + head * h.capacities[sequence] * width;
}

// What is new goes into the cache.
template <class T> void keep(const Heads &h, long sequence, long head) {
    T *keys = row_of<T>(h.keys, h, sequence, head, h.width);
    T *values = row_of<T>(h.values, h, sequence, head, h.value_width);
    for (long i = 0; i < h.counts[sequence]; i++) {
        long token = h.firsts[sequence] + i, place = h.starts[sequence] + i;
        const T *key = static_cast<const T *>(h.key) + token * h.key_stride + head * h.width;
        const T *value = static_cast<const T *>(h.value) + token * h.value_stride + head * h.value_width;
        T *block = keys + place / LANES * LANES * h.width + place % LANES;
        for (long each = 0; each < h.width; each++) block[each * LANES] = key[each];
        std::copy(value, value + h.value_width, values + place * h.value_width);
    }
}

// Of `tokens` tokens of a sequence, from its `from`th in this step on: all queries that share a KV head.
template <class T>
void attend(const Heads &h, long sequence, long head, long from, long tokens, std::vector<float> &scratch) {
    long first = h.firsts[sequence] + from, start = h.starts[sequence] + from, rows = tokens * h.group;
    auto seen_from = [&](long token) { return h.window ? std::max(0L, start + token + 1 - h.window) : 0L; };
    long begin = seen_from(0) / LANES * LANES, count = start + tokens - begin;
    long blocks = (count + LANES - 1) / LANES, apart = blocks * LANES;
    const T *keys = row_of<T>(h.keys, h, sequence, head, h.width) + begin * h.width;
    const T *values = row_of<T>(h.values, h, sequence, head, h.value_width) + begin * h.value_width;
    scratch.resize(rows * (h.width + apart + h.value_width + 1));
    float *queries = scratch.data(), *shares = queries + rows * h.width, *sums = shares + rows * apart;
    float *totals = sums + rows * h.value_width;

    for (long row = 0; row < rows; row++) {  // [tokens, group]
        const T *query = static_cast<const T *>(h.query) + (first + row / h.group) * h.query_stride;
        query += (head * h.group + row % h.group) * h.width;
        for (long i = 0; i < h.width; i++) queries[row * h.width + i] = widen(query[i]) * h.scale;
    }
    for (long row = 0; row < rows; row += MOST_QUERIES)
        scores(queries + row * h.width, keys, h.width, rows - row, blocks, shares + row * apart, apart);
    for (long row = 0; row < rows; row++) {
        float *mine = shares + row * apart;
        long token = row / h.group, hidden = seen_from(token) - begin, end = start + token + 1 - begin;
        std::fill(mine, mine + hidden, 0.f);
        totals[row] = softmax(mine + hidden, end - hidden, h.softcap);
        std::fill(mine + end, mine + apart, 0.f);
    }
    for (long row = 0; row < rows; row += MOST_QUERIES)
        add(shares + row * apart, apart, values, h.value_width, rows - row, count, sums + row * h.value_width);
    for (long row = 0; row < rows; row++) {
        long place = ((first + row / h.group) * h.kv_heads + head) * h.group + row % h.group;
        T *result = static_cast<T *>(h.result) + place * h.value_width;
        for (long i = 0; i < h.value_width; i++) narrow(sums[row * h.value_width + i] / totals[row], result[i]);
    }
}

template <class T> void attend(const Heads &h) {
    long together = std::max(1L, QUERIES / h.group);
    std::vector<std::pair<long, long>> tasks;  // a sequence, and which of its tokens come first
    for (long sequence = 0; sequence < h.sequences; sequence++)
        for (long from = 0; from < h.counts[sequence]; from += together) tasks.emplace_back(sequence, from);
#pragma omp parallel
    {
        static thread_local std::vector<float> scratch;
#pragma omp for schedule(static)
        for (long each = 0; each < h.sequences * h.kv_heads; each++) keep<T>(h, each / h.kv_heads, each % h.kv_heads);
#pragma omp for schedule(dynamic, 1)
        for (long each = 0; each < long(tasks.size()) * h.kv_heads; each++) {
            auto [sequence, from] = tasks[each / h.kv_heads];
            long tokens = std::min(together, h.counts[sequence] - from);
            attend<T>(h, sequence, each % h.kv_heads, from, tokens, scratch);
        }
    }
}

// Whole layers, one after another, in one call: what lean.py computes by the operators above

struct Weights {
    const void *panels;
    const float *scales, *bias;
    long inputs, outputs, kind;  // fp32, bf16, int8
};

struct Layer {
    Weights qkv, o, gate_up, down;
    const void *before, *after, *of_query, *of_key;  // RMSNorms; the last two may be null
    float eps, scale;
    long window;
};

struct Layers {
    long count, heads, width;  // of a query; the KV heads' are in `rows`
    const Layer *layers;
    long tokens;
    void *x;  // [tokens, inputs]: what goes in, and what comes out
    const void *cosines, *sines;
    Heads rows;  // `keys` and `values` those of the first layer
};

template <class T> void multiply(const Weights &w, long rows, const T *x, const T *to, T *result) {
    Product<T> p{rows, w.inputs, w.outputs, x, w.panels, w.scales, w.bias, to, result};
    if constexpr (std::is_same_v<T, float>) {
        w.kind == 0 ? product<float>(p) : w.kind == 1 ? product<Bf16>(p) : product<int8_t>(p);
    } else {
#if defined(__AMX_BF16__)
        w.kind == 1 ? in_tiles<Bf16>(p) : in_tiles<int8_t>(p);
#endif
    }
}

template <class T> void layers(const Layers &all) {
    const Layer &like = *all.layers;
    long tokens = all.tokens, width = all.width, kv_heads = all.rows.kv_heads, turned = all.heads + kv_heads;
    long stride = like.qkv.outputs, inputs = like.qkv.inputs, inner = like.down.inputs;
    static thread_local std::vector<T> scratch;
    scratch.resize(tokens * (inputs + stride + like.o.inputs + 3 * inner));
    T *x = static_cast<T *>(all.x), *normed = scratch.data(), *heads = normed + tokens * inputs;
    T *seen = heads + tokens * stride, *both = seen + tokens * like.o.inputs, *gated = both + 2 * tokens * inner;
    const T *cosines = static_cast<const T *>(all.cosines), *sines = static_cast<const T *>(all.sines);
    Heads h = all.rows;
    h.query = heads, h.key = heads + all.heads * width, h.value = heads + turned * width;
    h.query_stride = h.key_stride = h.value_stride = stride;
    h.result = seen;
    for (long i = 0; i < all.count; i++) {
        const Layer &layer = all.layers[i];
        norm<T>(tokens, 1, inputs, x, inputs, static_cast<const T *>(layer.before), layer.eps, normed);
        multiply<T>(layer.qkv, tokens, normed, nullptr, heads);
        if (layer.of_query) {
            T *keys = heads + all.heads * width;
            norm<T>(tokens, all.heads, width, heads, stride, static_cast<const T *>(layer.of_query), layer.eps, heads);
            norm<T>(tokens, kv_heads, width, keys, stride, static_cast<const T *>(layer.of_key), layer.eps, keys);
        }
        rotate<T>(tokens, turned, width, heads, stride, cosines, sines);
        h.scale = layer.scale, h.window = layer.window;
        attend<T>(h);
        h.keys += h.sequences, h.values += h.sequences;
        multiply<T>(layer.o, tokens, seen, x, x);
        norm<T>(tokens, 1, inputs, x, inputs, static_cast<const T *>(layer.after), layer.eps, normed);
        multiply<T>(layer.gate_up, tokens, normed, nullptr, both);
        gate<T>(tokens, inner, both, gated);
        multiply<T>(layer.down, tokens, gated, x, x);
    }
}

}  // namespace

extern "C" {

long manta_panel() { return PANEL; }
long manta_threads() { return omp_get_max_threads(); }

void manta_product_fp32(const Product<float> *p) { product<float>(*p); }
void manta_product_bf16(const Product<float> *p) { product<Bf16>(*p); }
void manta_product_int8(const Product<float> *p) { product<int8_t>(*p); }

#if defined(__AMX_BF16__)
long manta_has_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
void manta_tiles_bf16(const Product<Bf16> *p) { in_tiles<Bf16>(*p); }
void manta_tiles_int8(const Product<Bf16> *p) { in_tiles<int8_t>(*p); }
#else
long manta_has_tiles() { return 0; }
#endif

#define OF(TYPE, T)                                                                                                      \
    void manta_norm_##TYPE(long tokens, long heads, long width, const T *x, long stride, const T *weight, float eps,     \
                           T *result) {                                                                                  \
        norm<T>(tokens, heads, width, x, stride, weight, eps, result);                                                   \
    }                                                                                                                    \
    void manta_gate_##TYPE(long rows, long width, const T *both, T *result) { gate<T>(rows, width, both, result); }      \
    void manta_rotate_##TYPE(long tokens, long heads, long width, T *x, long stride, const T *cosines, const T *sines) { \
        rotate<T>(tokens, heads, width, x, stride, cosines, sines);                                                      \
    }                                                                                                                    \
    void manta_attend_##TYPE(const Heads *h) { attend<T>(*h); }                                                          \
    void manta_layers_##TYPE(const Layers *all) { layers<T>(*all); }

OF(fp32, float)
OF(bf16, Bf16)
}
