// One step of a product, and the register tile that reads rows in place. An element of the result is one
// chain of fused multiply-adds over k in ascending order, for every shape of tile and all neighbours. A
// token's bits are therefore independent of the batch, of T and of the threads.
#pragma once
#include "vector.h"

// Memory that is read soon, prefetched a few lines at a time: the products would wait for a burst of
// prefetches.
template <int LOCALITY> class LinesAhead {
    static constexpr int MOST_RUNS = 4;
    const char* run[MOST_RUNS] = {};
    ptrdiff_t left[MOST_RUNS] = {};
    int runs = 0, at = 0, lines = 1;

  public:
    void add(const void* first, size_t bytes) {
        if (!bytes) return;
        run[runs] = (const char*)first;
        left[runs++] = (ptrdiff_t)bytes;
    }
    // Spreads the lines over this many steps.
    void over(int64_t steps) {
        int64_t all = 0;
        for (int i = 0; i < runs; i++)
            all += left[i] / 64 + 1;
        steps = std::max<int64_t>(steps, 1);
        lines = (int)((all + steps - 1) / steps);
    }
    INLINE void step() {
        for (int i = 0; i < lines && at < runs; i++) {
            __builtin_prefetch(run[at], 0, LOCALITY);
            run[at] += 64;
            left[at] -= 64;
            if (left[at] <= 0) at++;
        }
    }
};

struct NothingAhead {
    void step() const {}
};

// One step along k takes a unit of PER neighbouring elements, of type U when it is multiplied and Stored in
// packed panels. MacWidened multiplies elements as float32.
template <class Element> struct MacWidened {
    using T = Element;
    using U = float;
    using Stored = Element;
    static constexpr int PER = 1;
    static INLINE U unit(const T* p, int) { return widen(*p); }
    static INLINE vf units_of(const T* p) { return load_wide(p); }  // LANES of them
    static INLINE vf step(vf acc, U a, vf b) { return acc + splat(a) * b; }
};
using MacF32 = MacWidened<float>;
using MacF16 = MacWidened<f16>;
#if defined(__AVX512BF16__)
struct MacBF16 {
    using T = bf16;
    using U = uint32_t;
    using Stored = uint32_t;
    static constexpr int PER = 2;
    // Two elements, or one and a zero at the end of a row.
    static INLINE U unit(const T* p, int count) {
        if (count < 2) return p->bits;
        U u;
        memcpy(&u, p, 4);
        return u;
    }
    static INLINE vf units_of(const T* p) { return load<vf>(p); }
    static INLINE vf step(vf acc, U a, vf b) {
        return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
    }
};
#else
using MacBF16 = MacWidened<bf16>;
#endif

template <class M> static constexpr size_t units(size_t k) { return (k + M::PER - 1) / M::PER; }

// LANES units of a row from `unit` on; `left` elements exist, and the rest are zeros.
template <class M> static INLINE vf units_at(const typename M::T* row, int unit, int left) {
    using T = typename M::T;
    row += (size_t)unit * M::PER;
    if (left >= LANES * M::PER) return M::units_of(row);
    T rest[LANES * M::PER] = {};
    memcpy((void*)rest, row, left * sizeof(T));
    return M::units_of(rest);
}

// Calls body.template operator()<R>() with the first R of the list that is at least n.
template <int... R, class Body> static INLINE void with_rows(int n, Body body) {
    (void)((n <= R && (body.template operator()<R>(), true)) || ...);
}

// Copies sums to the caller's array: gcc keeps only a function's own array in registers.
template <int R, int C> static INLINE void copy_tile(const vf (&sum)[R][C], vf (*acc)[C]) {
#pragma GCC unroll 32
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++)
            acc[r][c] = sum[r][c];
}

// acc[r][c] = sum_k row_r[k] * b[k][c]. Rows are read in place; b is a packed panel [units of k][C * LANES].
// A few units of all rows at a time are copied to a buffer: rows that are a multiple of 4 KiB apart evict
// each other from the first cache.
template <class M, int R, int C, class Row, class Ahead>
static INLINE void lanes_tile(Row row, const typename M::U* b, int k, Ahead& ahead, vf (&acc)[R][C]) {
    vf sum[R][C] = {};
    const int whole = (int)units<M>(k);
    for (int unit = 0; unit < whole; unit += LANES, b += LANES * C * LANES) {
        alignas(64) typename M::U buffer[R][LANES];
        const int left = k - unit * M::PER;
        for (int r = 0; r < R; r++)
            store(buffer[r], units_at<M>(row(r), unit, left));
        ahead.step();
        const int count = std::min(LANES, whole - unit);
        for (int i = 0; i < count; i++) {
            vf x[C];
#pragma GCC unroll 8
            for (int c = 0; c < C; c++)
                x[c] = load<vf>(b + (i * C + c) * LANES);
#pragma GCC unroll 32
            for (int r = 0; r < R; r++)
#pragma GCC unroll 8
                for (int c = 0; c < C; c++)
                    sum[r][c] = M::step(sum[r][c], buffer[r][i], x[c]);
        }
    }
    copy_tile(sum, acc);
}
