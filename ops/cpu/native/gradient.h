// Weight gradients: sums of outer products over an expert's rows. Both operands are stored in strips, [strips
// of LANES columns][units of rows][LANES]. Rows of tokens are interleaved in pairs (where M::PER is 2) but
// not transposed, so one strip serves as the vectors of a product or as its scalars. One task owns each row
// of a gradient.
#pragma once
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#include "columns.h"

static constexpr int strips_of(int columns) { return (columns + LANES - 1) / LANES; }
constexpr int GRADIENT_ROWS = std::min(8, LANES);
constexpr int ROWS_PER_TASK = 64;
// A gradient this large leaves the caches before it is read, so it is written past them.
constexpr size_t STREAMED_BYTES = size_t(16) << 20;

// The units of rows before each expert's, [E + 1]: an expert's part of an operand in strips begins there.
template <class M> static inline std::vector<size_t> units_before(const Plan& plan) {
    std::vector<size_t> before(plan.num_experts + 1, 0);
    for (int e = 0; e < plan.num_experts; e++)
        before[e + 1] = before[e] + units<M>(plan.count(e));
    return before;
}

// Copies columns [begin, end) of an expert's m rows into strips; begin is a multiple of 2 * LANES. Lanes that
// do not exist are zero.
template <class M, class Row>
static inline void pack_strips(Row row, int m, int begin, int end, typename M::U* strips) {
    const size_t um = units<M>(m);
    for (int c = begin; c < end; c += 2 * LANES) {
        typename M::U *first = strips + c / LANES * um * LANES,
                      *second = c + LANES < end ? first + um * LANES : nullptr;
        for (int i = 0; i < m; i += M::PER) {
            const typename M::T *even = row(i) + c,
                                *odd = M::PER == 2 && i + 1 < m ? row(i + 1) + c : nullptr;
            vf v[2];
            if (c + 2 * LANES <= end)
                unit_of_columns(even, odd, v);
            else
                unit_of_some_columns(even, odd, end - c, v);
            store(first + i / M::PER * LANES, v[0]);
            if (second) store(second + i / M::PER * LANES, v[1]);
        }
    }
}

// Stores two neighbouring vectors, into a cache or past it.
template <class T> static INLINE void store_pair(const vf (&v)[2], T* out) {
    store_narrow(v[0], out);
    store_narrow(v[1], out + LANES);
}
template <class T> static INLINE void stream(const vf (&v)[2], T* out) { store_pair(v, out); }
#if defined(__AVX512F__)
static INLINE void stream(const vf (&v)[2], float* out) {
    _mm512_stream_ps(out, (__m512)v[0]);
    _mm512_stream_ps(out + LANES, (__m512)v[1]);
}
static INLINE void stream(const vf (&v)[2], f16* out) {
    alignas(64) f16 narrowed[2 * LANES];
    store_pair(v, narrowed);
    _mm512_stream_si512((__m512i*)out, load<__m512i>(narrowed));
}
#endif
#if defined(__AVX512BF16__)
static INLINE __m512i narrowed(const vf (&v)[2]) {
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
}
static INLINE void store_pair(const vf (&v)[2], bf16* out) { _mm512_storeu_si512(out, narrowed(v)); }
static INLINE void stream(const vf (&v)[2], bf16* out) { _mm512_stream_si512((__m512i*)out, narrowed(v)); }
#endif
// Rounded to T, or unrounded where T would overflow: a gradient's factor may exceed float16 though it does
// not.
template <class T> static INLINE vf rounded_or_large(vf v) { return rounded(v, (const T*)nullptr); }
template <> INLINE vf rounded_or_large<f16>(vf v) {
    const vf narrow = rounded(v, (const f16*)nullptr), infinity = splat(INFINITY);
    return choose((narrow == infinity) | (narrow == -infinity), v, narrow);
}
// Stores one unit of a strip.
template <class T> static INLINE void store_unit(vf row, vf, float* out) {
    store(out, rounded_or_large<T>(row));
}
#if defined(__AVX512BF16__)
template <class T> static INLINE void store_unit(vf even, vf odd, uint32_t* out) {
    const vf v[2] = {even, odd};
    const __m512i turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23,
                                           7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_store_si512(out, _mm512_permutexvar_epi16(turns, narrowed(v)));
}
#endif

// Writes rows [begin, end) of a gradient, of `width` elements, to out(r); begin is a multiple of
// GRADIENT_ROWS. `scalars` and `vectors` are strips of um units, of the gradient's rows and columns.
template <class M, class Out>
static inline void weight_gradient(int begin, int end, int width, size_t um, const typename M::U* scalars,
                                   const typename M::U* vectors, bool streamed, Out out) {
    using T = typename M::T;
    if (um == 0) {
        for (int r = begin; r < end; r++)
            memset((void*)out(r), 0, width * sizeof(T));
        return;
    }
    constexpr int R = GRADIENT_ROWS;
    constexpr int BYTES = 256 << 10;  // of vectors, which stay in the second cache for all rows of a task
    const int block = (int)std::max<size_t>(BYTES / (um * 2 * LANES * sizeof(typename M::U)), 1) * 2 * LANES;
    for (int c_begin = 0; c_begin < width; c_begin += block)
        for (int r0 = begin; r0 < end; r0 += R) {
            const typename M::U* s = scalars + r0 / LANES * um * LANES + r0 % LANES;
            const int n = std::min(R, end - r0);
            T* rows[R];
            for (int r = 0; r < R; r++)
                rows[r] = out(r0 + std::min(r, n - 1));
            for (int c0 = c_begin; c0 < std::min(width, c_begin + block); c0 += 2 * LANES) {
                const typename M::U *first = vectors + c0 / LANES * um * LANES,
                                    *second = c0 + LANES < width ? first + um * LANES : first;
                vf acc[R][2];
#pragma GCC unroll 8
                for (int r = 0; r < R; r++)
                    acc[r][0] = acc[r][1] = vf{};
                for (size_t u = 0; u < um; u++) {
                    const vf b0 = load<vf>(first + u * LANES), b1 = load<vf>(second + u * LANES);
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) {
                        const auto unit = s[u * LANES + r];
                        acc[r][0] = M::step(acc[r][0], unit, b0);
                        acc[r][1] = M::step(acc[r][1], unit, b1);
                    }
                }
                if (n < R || c0 + 2 * LANES > width) {
                    for (int r = 0; r < n; r++)
                        for (int c = 0; c < 2; c++)
                            store_some(load<vf>(&acc[r][c]), rows[r] + c0 + c * LANES,
                                       std::clamp(width - c0 - c * LANES, 0, LANES));
                    continue;
                }
#pragma GCC unroll 8
                for (int r = 0; r < R; r++)
                    if (streamed)
                        stream(acc[r], rows[r] + c0);
                    else
                        store_pair(acc[r], rows[r] + c0);
            }
        }
}

// True for a gradient of `count` rows at `out` that is large and begins and ends with whole cache lines.
template <class T>
static inline bool is_streamed([[maybe_unused]] const T* out, [[maybe_unused]] size_t count,
                               [[maybe_unused]] int width) {
#if defined(__AVX512F__)
    return count * width * sizeof(T) >= STREAMED_BYTES && (uintptr_t)out % 64 == 0 &&
           width * sizeof(T) % 64 == 0;
#else
    return false;
#endif
}
// Call it behind the last streamed store of a thread, so that other threads see the stores.
static INLINE void end_of_streams() {
#if defined(__AVX512F__)
    _mm_sfence();
#endif
}
