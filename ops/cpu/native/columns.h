// The product of rows of tokens and columns of a weight whose rows are contiguous in memory: for the backward
// passes and the merged projection. Lanes are columns.
#pragma once
#include "panel.h"

constexpr int ROWS_AT_ONCE = 6, VECTORS = ACCUMULATORS / ROWS_AT_ONCE, COLUMNS = VECTORS * LANES;
static constexpr int blocks_of(int columns) { return (columns + COLUMNS - 1) / COLUMNS; }
// Units of k that are packed and summed at once. A panel then has 64 KiB, a part of the second cache. Sums of
// chunks are added in order, so a row's bits depend on no other row.
constexpr int CHUNK_UNITS = 256;
// Rows that are multiplied by one panel; their unfinished sums fit into the second cache, too.
constexpr int ROWS_PER_PACKING = 40 * ROWS_AT_ONCE;
// Blocks of columns that are multiplied in turn: memory serves longer pieces of rows faster.
constexpr int BLOCKS_IN_TURNS = 4;

// One unit of k: two vectors of columns of a row, or of a pair of rows interleaved, the odd one or null.
template <class T> static INLINE void unit_of_columns(const T* row, const T*, vf (&v)[2]) {
    v[0] = load_wide(row);
    v[1] = load_wide(row + LANES);
}
#if defined(__AVX512BF16__)
typedef uint16_t two_vh __attribute__((vector_size(LANES * 4)));
template <int FROM, size_t... J> static INLINE vf paired(two_vh even, two_vh odd, std::index_sequence<J...>) {
    return (vf)__builtin_shufflevector(even, odd, (FROM + (int)J / 2 + (int)(J % 2) * 2 * LANES)...);
}
static INLINE void unit_of_columns(const bf16* even, const bf16* odd, vf (&v)[2]) {
    constexpr auto all = std::make_index_sequence<2 * LANES>{};
    const two_vh e = load<two_vh>(even), o = odd ? load<two_vh>(odd) : two_vh{};
    v[0] = paired<0>(e, o, all);
    v[1] = paired<LANES>(e, o, all);
}
#endif

// The same for fewer than 2 * LANES columns; the rest are zeros.
template <class T>
static INLINE void unit_of_some_columns(const T* even, const T* odd, int cols, vf (&v)[2]) {
    T some[2][2 * LANES] = {};
    memcpy((void*)some[0], even, cols * sizeof(T));
    if (odd) memcpy((void*)some[1], odd, cols * sizeof(T));
    unit_of_columns(some[0], some[1], v);
}

// Copies columns of k rows into a panel [units of k][COLUMNS]; columns that do not exist are zero.
template <class M, class Row>
static inline void pack_columns(Row row, int k, int cols, typename M::U* panel) {
    for (int i = 0; i < k; i += M::PER, panel += COLUMNS) {
        const typename M::T *even = row(i), *odd = M::PER == 2 && i + 1 < k ? row(i + 1) : nullptr;
        for (int c = 0; c < COLUMNS; c += 2 * LANES) {
            vf v[2];
            if (c + 2 * LANES <= cols)
                unit_of_columns(even + c, odd ? odd + c : nullptr, v);
            else
                unit_of_some_columns(even + std::min(c, cols), odd ? odd + std::min(c, cols) : nullptr,
                                     std::max(cols - c, 0), v);
            store(panel + c, v[0]);
            store(panel + c + LANES, v[1]);
        }
    }
}

template <class T> class RowsAhead;

// The first `cols` columns of `count` rows that begin `stride` elements apart: rows below `split` from
// `first` on, the others from `second` on.
template <class T> struct WeightRows {
    static constexpr bool IN_PLACE = true;  // a few rows of tokens are multiplied without a panel
    const T* first;
    ptrdiff_t stride;
    int count, cols;
    const T* second = nullptr;
    int split = 0x7fffffff;

    INLINE const T* row(int k) const {
        return k < split ? first + k * stride : second + (k - split) * stride;
    }
    // Rows [begin, begin + n), to be prefetched over this many steps.
    RowsAhead<T> ahead(int begin, int n, int64_t steps) const { return {*this, begin, begin + n, steps}; }
    template <class M> void pack(int k0, int k, int c0, int cols, typename M::U* panel) const {
        pack_columns<M>([&](int i) { return row(k0 + i) + c0; }, k, cols, panel);
    }
};

// Contiguous elements, to be prefetched.
template <class T> static inline WeightRows<T> run_of(const T* first, size_t count) {
    constexpr int LENGTH = 2048 / sizeof(T);
    return {first, LENGTH, (int)((count + LENGTH - 1) / LENGTH), LENGTH};
}

// Prefetches rows of weights, a few lines at each step, as LinesAhead does.
template <class T> class RowsAhead {
    WeightRows<T> rows{};
    int next = 0, end = 0, line = 0, lines = 1, at_once = 0;

  public:
    RowsAhead() {}
    RowsAhead(const WeightRows<T>& rows, int begin, int end, int64_t steps)
        : rows(rows), next(begin), end(std::min(end, rows.count)),
          lines((int)(rows.cols * sizeof(T) + 63) / 64) {
        at_once = (int)((int64_t)std::max(this->end - begin, 0) * lines / std::max<int64_t>(steps, 1)) + 1;
    }
    INLINE void step() {
        for (int i = 0; i < at_once; i++) {
            if (next >= end) return;
            __builtin_prefetch((const char*)rows.row(next) + 64 * line, 0, 2);
            if (++line == lines) {
                line = 0;
                next++;
            }
        }
    }
};

typedef vf Block[ROWS_AT_ONCE][VECTORS];

// acc[r] = rows[r] . panel for n rows, 1 <= n <= ROWS_AT_ONCE.
template <class M, class Ahead>
__attribute__((noinline)) static void multiply(const typename M::T* const* rows, int n,
                                               const typename M::U* panel, int k, Ahead& ahead, Block& acc) {
    with_rows<2, 4, ROWS_AT_ONCE>(n, [&]<int ROWS>() {
        const typename M::T* p[ROWS];
        for (int r = 0; r < ROWS; r++)
            p[r] = rows[std::min(r, n - 1)];
        auto& some = (vf(&)[ROWS][VECTORS])acc;
        lanes_tile<M, ROWS, VECTORS>([&](int r) { return p[r]; }, panel, k, ahead, some);
    });
}

// The same with rows [k0, k0 + k) of the weights in place, for too few rows of tokens to pack them.
template <class M, class Ahead>
__attribute__((noinline)) static void multiply_few(const typename M::T* const* rows, int n,
                                                   const WeightRows<typename M::T>& w, int c0, int k0, int k,
                                                   Ahead& ahead, Block& acc) {
    with_rows<1, 2, 4, ROWS_AT_ONCE>(n, [&]<int ROWS>() {
        using T = typename M::T;
        const T* p[ROWS];
        for (int r = 0; r < ROWS; r++)
            p[r] = rows[std::min(r, n - 1)];
        vf sum[ROWS][VECTORS] = {};
        for (int i = 0; i < k; i += M::PER) {
            if (i % (LANES * M::PER) == 0) ahead.step();
            const T *even = w.row(k0 + i) + c0,
                    *odd = M::PER == 2 && i + 1 < k ? w.row(k0 + i + 1) + c0 : nullptr;
            vf b[VECTORS / 2][2];
#pragma GCC unroll 8
            for (int c = 0; c < VECTORS / 2; c++)
                unit_of_columns(even + c * 2 * LANES, odd ? odd + c * 2 * LANES : nullptr, b[c]);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                const typename M::U unit = M::unit(p[r] + i, k - i);
#pragma GCC unroll 8
                for (int c = 0; c < VECTORS; c++)
                    sum[r][c] = M::step(sum[r][c], unit, b[c / 2][c % 2]);
            }
        }
        copy_tile(sum, acc);
    });
}

// Scratch memory of one thread for products.
template <class M> struct ProductScratch {
    alignas(64) typename M::U panel[CHUNK_UNITS * COLUMNS];
    vf sums[BLOCKS_IN_TURNS][ROWS_PER_PACKING][VECTORS];
};

// Multiplies m rows by the columns of w, and calls finish(b, r, n, block) with block = rows r .. r + n times
// block b of the columns; r is even. `next` is what this thread multiplies next.
template <class M, class Columns, class Row, class Finish>
static inline void product(Row row, int m, const Columns& w, const Columns& next, ProductScratch<M>& scratch,
                           Finish finish) {
    using T = typename M::T;
    constexpr int CHUNK = CHUNK_UNITS * M::PER;
    const int blocks = blocks_of(w.cols);
    for (int first = 0; first < m; first += ROWS_PER_PACKING) {
        const int count = std::min(ROWS_PER_PACKING, m - first),
                  tiles = (count + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
        int k0 = 0;
        do {
            const int k = std::min(CHUNK, w.count - k0);
            const bool last = k0 + k == w.count;
            const int64_t steps = (int64_t)blocks * tiles * (k / (LANES * M::PER));
            auto ahead = !last                          ? w.ahead(k0 + k, CHUNK, steps)
                         : first + ROWS_PER_PACKING < m ? w.ahead(0, CHUNK, steps)
                                                        : next.ahead(0, CHUNK, steps);
            for (int b = 0; b < blocks; b++) {
                const int c0 = b * COLUMNS, cols = std::min(COLUMNS, w.cols - c0);
                const bool few = Columns::IN_PLACE && m <= ROWS_AT_ONCE && cols == COLUMNS;
                if (!few) w.template pack<M>(k0, k, c0, cols, scratch.panel);
                for (int tile = 0, r = 0; tile < tiles; tile++) {
                    const int left = tiles - tile,
                              n = std::min(((count - r + left - 1) / left + 1) / 2 * 2, count - r);
                    const T* rows[ROWS_AT_ONCE];
                    for (int i = 0; i < n; i++)
                        rows[i] = row(first + r + i) + k0;
                    Block acc;
                    if (!few) multiply<M>(rows, n, scratch.panel, k, ahead, acc);
                    if constexpr (Columns::IN_PLACE)
                        if (few) multiply_few<M>(rows, n, w, c0, k0, k, ahead, acc);
                    vf(*sums)[VECTORS] = scratch.sums[b] + r;
                    for (int i = 0; k0 && i < n; i++)
                        for (int c = 0; c < VECTORS; c++)
                            acc[i][c] += sums[i][c];
                    if (last)
                        finish(b, first + r, n, acc);
                    else
                        memcpy((void*)sums, acc, n * sizeof(acc[0]));
                    r += n;
                }
            }
            k0 += k;
        } while (k0 < w.count);
    }
}

static INLINE void store_row(const vf (&acc)[VECTORS], float* out, int cols) {
    for (int c = 0; c < VECTORS; c++)
        if (cols >= (c + 1) * LANES)
            store(out + c * LANES, acc[c]);
        else
            store_some(acc[c], out + c * LANES, std::clamp(cols - c * LANES, 0, LANES));
}

// Columns [begin, begin + cols) of an expert's weight, widened to float32 one panel at a time.
template <class Format> struct WidenedColumns {
    static constexpr bool IN_PLACE = false;
    const Format* weight = nullptr;
    int e = 0;
    RowOrder order{};
    int begin = 0, cols = 0, count = order.count;

    NothingAhead ahead(int, int, int64_t) const { return {}; }
    // Rows k0 .. k0 + k of `cols` columns from c0 on as a panel [k][COLUMNS]; columns that do not exist are
    // zero. A format widens whole groups, and a group may begin before a block of columns or end behind it.
    template <class M> void pack(int k0, int k, int c0, int cols, float* panel) const {
        const int first = begin + c0, end = first + cols, group = weight->group_size();
        const int from = first / group * group, to = (end + group - 1) / group * group;
        float whole[COLUMNS + 2 * Format::MOST_GROUP];
        for (int i = 0; i < k; i++, panel += COLUMNS) {
            const ptrdiff_t row = order.row(k0 + i);
            if (from == first && to == end) {
                weight->widen_row(e, row, first, end, panel);
            } else {
                weight->widen_row(e, row, from, to, whole);
                memcpy(panel, whole + first - from, cols * sizeof(float));
            }
            for (int c = cols; c < COLUMNS; c++)
                panel[c] = 0.f;
        }
    }
};
