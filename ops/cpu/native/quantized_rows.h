// Rows of quantised weights: how four of them at a time become float32, and their products with tokens.
#pragma once
#if defined(__SSE4_1__)
#include <immintrin.h>
#endif
#include "panel.h"

constexpr int QUAD = 4;
typedef float v4 __attribute__((vector_size(16)));

// LANES bytes as integers: of the vector extension's own conversion, gcc makes one instruction for every
// byte.
static INLINE vi widen_signed(const uint8_t* p) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepi8_epi32(load<__m128i>(p));
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#elif defined(__SSE4_1__) && !defined(__AVX__)
    return (vi)_mm_cvtepi8_epi32(_mm_cvtsi32_si128(load<int32_t>(p)));
#else
    typedef int8_t vb __attribute__((vector_size(LANES)));
    return __builtin_convertvector(load<vb>(p), vi);
#endif
}
static INLINE vi widen_unsigned(const uint8_t* p) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepu8_epi32(load<__m128i>(p));
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#elif defined(__SSE4_1__) && !defined(__AVX__)
    return (vi)_mm_cvtepu8_epi32(_mm_cvtsi32_si128(load<int32_t>(p)));
#else
    typedef uint8_t vb __attribute__((vector_size(LANES)));
    return __builtin_convertvector(load<vb>(p), vi);
#endif
}

// Values, scales, zero points, as Python has them.
struct QuantizedWords {
    const uint8_t* values;
    const float* scales;
    const uint8_t* zeros;  // null: 8, the middle of 0 .. 15
};

// The lanes of each of four vectors added up.
static INLINE v4 lane_sums(const vf (&v)[QUAD]) {
    constexpr auto all = std::make_index_sequence<LANES>{};
    const vf first = zip<1, 0>(v[0], v[1], all) + zip<1, 2>(v[0], v[1], all),
             second = zip<1, 0>(v[2], v[3], all) + zip<1, 2>(v[2], v[3], all);
    const vf four = zip<2, 0>(first, second, all) + zip<2, 2>(first, second, all);
    v4 part[LANES / 4];
    memcpy(part, &four, sizeof(four));
    for (int step = LANES / 8; step > 0; step /= 2)
        for (int i = 0; i < step; i++)
            part[i] += part[i + step];
    return part[0];
}

// Four rows of int8 [k], whose scales are those of the results.
struct Int8Rows {
    static constexpr int VECTORS = 1;  // of float32 in a step
    static constexpr bool GROUPED = false;
    const uint8_t* row[QUAD];
    int k;

    static constexpr int place(int i) { return i; }
    static size_t stride_of(int k) {
        return ((((size_t)k + LANES - 1) / LANES * LANES * 4 + 63) / 64 | 1) * 64 / 4;
    }
    template <class T> static void unpack_like(const T* from, int k, float* to) {
        int i = 0;
        for (; i + LANES <= k; i += LANES)
            store(to + i, load_wide(from + i));
        if (i == k) return;
        T rest[LANES] = {};
        memcpy((void*)rest, from + i, (k - i) * sizeof(T));
        store(to + i, load_wide(rest));
    }

    int spans() const { return 1; }
    int steps() const { return k / LANES; }
    int left() const { return k % LANES; }
    int vectors() const { return (k + LANES - 1) / LANES; }
    struct Span {
        const Int8Rows& rows;
        INLINE void load(int c, int step, vf (&w)[1]) const {
            w[0] = __builtin_convertvector(widen_signed(rows.row[c] + step * LANES), vf);
        }
    };
    INLINE Span enter(int) const { return {*this}; }
    INLINE vf load_last(int c) const {
        uint8_t rest[LANES] = {};
        memcpy(rest, row[c] + k - left(), left());
        return __builtin_convertvector(widen_signed(rest), vf);
    }
};

// Four rows of values of four bits, two in a byte, the even one in the lower half; a scale and perhaps a zero
// point for every `group` of them. A step takes LANES bytes, its even values and then its odd ones, and what
// they are multiplied by has the same order.
struct Int4Rows {
    static constexpr int VECTORS = 2, STEP = 2 * LANES;
    static constexpr bool GROUPED = true;
    const uint8_t* row[QUAD];
    const float* scale[QUAD];
    const uint8_t* zero[QUAD];  // all null, or none
    int k, group;

    static constexpr int place(int i) { return i / STEP * STEP + i % 2 * LANES + i % STEP / 2; }
    static size_t stride_of(int k) { return ((size_t)k * 4 / 64 | 1) * 64 / 4; }
    template <class T> static void unpack_like(const T* from, int k, float* to) {
        for (int i = 0; i < k; i++)
            to[place(i)] = widen(from[i]);
    }

    int spans() const { return k / group; }
    int steps() const { return group / STEP; }
    static constexpr int left() { return 0; }
    int vectors() const { return k / LANES; }
    // W = (q - zero) * scale, rounded once. With vectors of 16 it is looked up in the group's 16 values.
    struct Span {
        const Int4Rows& rows;
        int byte;
#if defined(__AVX512F__)
        vf table[QUAD];
        INLINE void start(int c, float scale, float zero) {
            constexpr vf ascending = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
            table[c] = (ascending - splat(zero)) * splat(scale);
        }
        INLINE void load(int c, int step, vf (&w)[2]) const {
            const __m512i q = (__m512i)widen_unsigned(rows.row[c] + byte + step * LANES);
            w[0] = (vf)_mm512_permutexvar_ps(q, (__m512)table[c]);
            w[1] = (vf)_mm512_permutexvar_ps(_mm512_srli_epi32(q, 4), (__m512)table[c]);
        }
#else
        float scale[QUAD], zero[QUAD];
        INLINE void start(int c, float s, float z) { scale[c] = s, zero[c] = z; }
        INLINE void load(int c, int step, vf (&w)[2]) const {
            const vi q = widen_unsigned(rows.row[c] + byte + step * LANES);
            w[0] = (__builtin_convertvector(q & 15, vf) - splat(zero[c])) * splat(scale[c]);
            w[1] = (__builtin_convertvector(q >> 4, vf) - splat(zero[c])) * splat(scale[c]);
        }
#endif
    };
    INLINE Span enter(int span) const {
        Span s{*this, span * group / 2, {}};
        for (int c = 0; c < QUAD; c++)
            s.start(c, scale[c][span], zero[c] ? zero[c][span] : 8.f);
        return s;
    }
    INLINE vf load_last(int) const { return vf{}; }
};

// Memory that is read next, asked for a line or two at a time, at each of the steps before.
class LinesAhead {
    static constexpr int MOST = 4;
    const char* run[MOST] = {};
    ptrdiff_t left[MOST] = {};
    int runs = 0, at = 0, lines = 1;

  public:
    void add(const void* first, size_t bytes) {
        if (bytes) {
            run[runs] = (const char*)first;
            left[runs++] = (ptrdiff_t)bytes;
        }
    }
    void over(int64_t steps) {
        int64_t all = 0;
        for (int i = 0; i < runs; i++)
            all += left[i] / 64 + 1;
        lines = (int)((all + steps - 1) / std::max<int64_t>(steps, 1));
    }
    INLINE void step() {
        for (int i = 0; i < lines && at < runs; i++) {
            __builtin_prefetch(run[at], 0, 3);
            run[at] += 64;
            left[at] -= 64;
            if (left[at] <= 0) at++;
        }
    }
};
struct NothingAhead {
    void step() const {}
};

// Four rows that were widened before: vectors of each in turns, in the order in which they are multiplied.
struct MadeQuad {
    static constexpr int VECTORS = 1;
    const float* made;
    int count;

    int spans() const { return 1; }
    int steps() const { return count; }
    static constexpr int left() { return 0; }
    struct Span {
        const float* made;
        INLINE void load(int c, int step, vf (&w)[1]) const {
            w[0] = ::load<vf>(made + (step * QUAD + c) * LANES);
        }
    };
    INLINE Span enter(int) const { return {made}; }
    INLINE vf load_last(int) const { return vf{}; }
};
template <class Rows, class Ahead>
static inline MadeQuad make_quad(const Rows& quad, Ahead& ahead, float* made) {
    MadeQuad to{made, quad.vectors()};
    for (int span = 0; span < quad.spans(); span++) {
        const auto here = quad.enter(span);
        for (int step = 0; step < quad.steps(); step++, made += Rows::VECTORS * QUAD * LANES) {
            ahead.step();
            for (int c = 0; c < QUAD; c++) {
                vf w[Rows::VECTORS];
                here.load(c, step, w);
                for (int v = 0; v < Rows::VECTORS; v++)
                    store(made + (v * QUAD + c) * LANES, w[v]);
            }
        }
    }
    if (quad.left())
        for (int c = 0; c < QUAD; c++)
            store(made + c * LANES, quad.load_last(c));
    return to;
}

// acc[r][c] = token r times row c, lane by lane.
template <int R, class Source, class Ahead>
static INLINE void multiply_quad(const Source& source, const float* const (&token)[R], Ahead& ahead,
                                 vf (&acc)[R][QUAD]) {
    constexpr int V = Source::VECTORS;
    vf sum[R][QUAD];  // not acc itself: what a caller can see does not stay in registers
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < QUAD; c++)
            sum[r][c] = vf{};
    int at = 0;
    for (int span = 0; span < source.spans(); span++) {
        const auto here = source.enter(span);
        for (int step = 0; step < source.steps(); step++, at += V) {
            ahead.step();
            vf w[QUAD][V];
#pragma GCC unroll 4
            for (int c = 0; c < QUAD; c++)
                here.load(c, step, w[c]);
#pragma GCC unroll 2
            for (int v = 0; v < V; v++)
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    const vf x = load<vf>(token[r] + (at + v) * LANES);
#pragma GCC unroll 4
                    for (int c = 0; c < QUAD; c++)
                        sum[r][c] += x * w[c][v];
                }
        }
    }
    if (source.left())
        for (int c = 0; c < QUAD; c++) {
            const vf w = source.load_last(c);
            for (int r = 0; r < R; r++)
                sum[r][c] += load<vf>(token[r] + at * LANES) * w;
        }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < QUAD; c++)
            acc[r][c] = sum[r][c];
}

// One of the two weights: [E, count] rows of k values.
template <class Rows> struct QuantizedWeights {
    QuantizedWords words;
    int count, k, group;
    size_t row_bytes;

    QuantizedWeights(const QuantizedWords& words, int count, int k, int group)
        : words(words), count(count), k(k), group(group), row_bytes(Rows::GROUPED ? k / 2 : k) {}

    const uint8_t* values(int e, ptrdiff_t row) const {
        return words.values + ((size_t)e * count + row) * row_bytes;
    }
    template <class RowOf> Rows quad(int e, RowOf row_of) const {
        Rows rows;
        rows.k = k;
        for (int i = 0; i < QUAD; i++) {
            const ptrdiff_t row = row_of(i);
            rows.row[i] = values(e, row);
            if constexpr (Rows::GROUPED) {
                const size_t first = ((size_t)e * count + row) * (k / group);
                rows.scale[i] = words.scales + first;
                rows.zero[i] = words.zeros ? words.zeros + first : nullptr;
            }
        }
        if constexpr (Rows::GROUPED) rows.group = group;
        return rows;
    }
    // `n` rows that lie side by side, to be read ahead.
    void look_ahead(int e, ptrdiff_t row, int n, LinesAhead& ahead) const {
        ahead.add(values(e, row), n * row_bytes);
        if constexpr (Rows::GROUPED)
            ahead.add(words.scales + ((size_t)e * count + row) * (k / group),
                      (size_t)n * (k / group) * sizeof(float));
    }
    // What the sums of some rows are multiplied by: scales that groups have of their own are in the values
    // already.
    template <class RowOf> vf scales_of_rows(int e, RowOf row_of, int n) const {
        if (Rows::GROUPED) return splat(1.f);
        vf v = {};
        for (int i = 0; i < n; i++)
            v[i] = words.scales[(size_t)e * count + row_of(i)];
        return v;
    }
    // Elements [begin, end) of a row, as they are: begin and end are multiples of `group` or the ends of the
    // row.
    void widen_row(int e, ptrdiff_t row, int begin, int end, float* to) const {
        const uint8_t* from = values(e, row);
        if constexpr (!Rows::GROUPED) {
            const float scale = words.scales[(size_t)e * count + row];
            for (int i = begin; i < end; i++)
                *to++ = (float)(int8_t)from[i] * scale;
        } else {
            for (int i = begin; i < end;) {
                const size_t g = ((size_t)e * count + row) * (k / group) + i / group;
                const float scale = words.scales[g], zero = words.zeros ? words.zeros[g] : 8.f;
                const int stop = std::min(end, (i / group + 1) * group);
                for (; i < stop; i += 2) {
                    *to++ = ((float)(from[i / 2] & 15) - zero) * scale;
                    *to++ = ((float)(from[i / 2] >> 4) - zero) * scale;
                }
            }
        }
    }
};

// A pass over weights of 8 or of 4 bits.
template <class M, template <class T, class Rows> class Pass, class Args> class OfBits {
    const Args& a;

  public:
    explicit OfBits(const Args& a) : a(a) {}
    void run() {
        if (a.bits == 8)
            Pass<typename M::T, Int8Rows>(a).run();
        else
            Pass<typename M::T, Int4Rows>(a).run();
    }
};
