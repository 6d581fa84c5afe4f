// The two register tiles that all products are made of. An element of the result is one chain of fused multiply-adds over
// k in ascending order, whatever the tile's shape and whoever its neighbours are: that is what makes a token's bits
// independent of the batch, of T and of the threads.
#pragma once
#include "vector.h"

// One step along k takes PER consecutive elements. U is such a unit, as it stands in a packed operand.
struct MacF32 {
    using T = float;
    using U = float;
    static constexpr int PER = 1;
    static INLINE U unit(const T* p, int) { return *p; }
    static INLINE vf step(vf acc, U a, vf b) { return acc + splat(a) * b; }
};
#if defined(__AVX512BF16__)
struct MacBF16 {
    using T = bf16;
    using U = uint32_t;
    static constexpr int PER = 2;
    // Two elements, or one and a zero where the row has ended.
    static INLINE U unit(const T* p, int count) {
        if (count < 2) return p->bits;
        U u;
        memcpy(&u, p, 4);
        return u;
    }
    static INLINE vf step(vf acc, U a, vf b) {
        return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
    }
};
#else
struct MacBF16 {
    using T = bf16;
    using U = float;
    static constexpr int PER = 1;
    static INLINE U unit(const T* p, int) { return widen(*p); }
    static INLINE vf step(vf acc, U a, vf b) { return acc + splat(a) * b; }
};
#endif

template <class M> static constexpr size_t units(size_t k) { return (k + M::PER - 1) / M::PER; }

// Lanes are tokens: acc[r][c] = sum_k row_r[k] * b[k][lane]. Rows are weights in memory order, b is a panel of packed
// tokens, [units of k][C * LANES]. While it computes, it asks for the rows of `next`, which come from memory: that is
// where the bandwidth is won.
template <class M, int R, int C, class Row, class Next>
static INLINE void tokens_tile(Row row, Next next, const typename M::U* b, int k, vf (&acc)[R][C]) {
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) acc[r][c] = vf{};
    constexpr int LINE = 64 / sizeof(typename M::T) / M::PER;
    const int whole = k / M::PER;
    for (int line = 0; line < whole; line += LINE) {
#pragma GCC unroll 32
        for (int r = 0; r < R; r++) __builtin_prefetch(next(r) + (size_t)line * M::PER, 0, 2);
        const int end = std::min(line + LINE, whole);
        for (int i = line; i < end; i++) {
            vf x[C];
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) x[c] = load<vf>(b + ((size_t)i * C + c) * LANES);
#pragma GCC unroll 32
            for (int r = 0; r < R; r++) {
                const auto a = M::unit(row(r) + (size_t)i * M::PER, M::PER);
#pragma GCC unroll 8
                for (int c = 0; c < C; c++) acc[r][c] = M::step(acc[r][c], a, x[c]);
            }
        }
    }
    if (int rest = k - whole * M::PER)
        for (int r = 0; r < R; r++) {
            const auto a = M::unit(row(r) + (size_t)whole * M::PER, rest);
            for (int c = 0; c < C; c++) acc[r][c] = M::step(acc[r][c], a, load<vf>(b + ((size_t)whole * C + c) * LANES));
        }
}

// The same for R rows that are two runs of R / 2, of which n0 and n1 exist; the last of a run stands in for the missing.
template <class M, int R, int C>
static INLINE void two_runs(const typename M::T* a0, const typename M::T* a1, ptrdiff_t stride, ptrdiff_t ahead, int n0, int n1,
                            const typename M::U* b, int k, vf (&acc)[R][C]) {
    constexpr int H = R / 2;
    auto next = [=](int r) { return (r < H ? a0 + r * stride : a1 + (r - H) * stride) + ahead; };
    if (n0 >= H && n1 >= H) {
        tokens_tile<M, R, C>([=](int r) { return r < H ? a0 + r * stride : a1 + (r - H) * stride; }, next, b, k, acc);
        return;
    }
    const typename M::T* rows[R];
    for (int r = 0; r < H; r++) {
        rows[r] = a0 + std::min(r, n0 - 1) * stride;
        rows[H + r] = n1 > 0 ? a1 + std::min(r, n1 - 1) * stride : rows[r];
    }
    tokens_tile<M, R, C>([&](int r) { return rows[r]; }, next, b, k, acc);
}
