// Four rows of a weight times a few rows of tokens, as dot products: lanes are positions along k, the
// direction in which a quantised row lies in memory.
//
// A source of four rows has VECTORS, the float32 vectors of a row in one step; spans(), steps() and
// enter(span), which loads a step; left(), the elements behind the last whole step, and load_last().
#pragma once
#if defined(__SSE4_1__)
#include <immintrin.h>
#endif
#include "panel.h"

constexpr int QUAD = 4;
typedef float v4 __attribute__((vector_size(16)));

// LANES bytes as integers. gcc compiles the vector extension's own conversion byte by byte.
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

// The sum of the lanes of each of four vectors.
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

// Four rows that were widened before, interleaved by vector in the order in which they are multiplied.
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
    vf sum[R][QUAD] = {};
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
    copy_tile(sum, acc);
}
