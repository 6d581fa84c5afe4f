// Rows times a panel of COLUMNS columns: the product of the backward passes and of the merged projection.
#pragma once
#include "layer.h"

constexpr int ROWS_AT_ONCE = 6, VECTORS = ACCUMULATORS / ROWS_AT_ONCE, COLUMNS = VECTORS * LANES;
static constexpr int blocks_of(int columns) { return (columns + COLUMNS - 1) / COLUMNS; }

// One unit of k: COLUMNS columns of one row, or of a pair of rows side by side.
static INLINE void pack_unit(const float* row, const float*, float* panel) { memcpy(panel, row, COLUMNS * sizeof(float)); }
static INLINE void pack_unit(const bf16* even, const bf16* odd, uint32_t* panel) {
    for (int c = 0; c < VECTORS; c++) {
        vu pair = __builtin_convertvector(load<vh>(even + c * LANES), vu);
        if (odd) pair |= __builtin_convertvector(load<vh>(odd + c * LANES), vu) << 16;
        store(panel + c * LANES, pair);
    }
}
template <class T> static INLINE void pack_unit(const T* row, const T*, float* panel) {
    for (int c = 0; c < VECTORS; c++) store(panel + c * LANES, load_wide(row + c * LANES));
}

// Columns [0, cols) of k rows as a panel [units of k][COLUMNS]; columns past `cols` are zero. Rows lie far apart, where the
// hardware does not foresee the next, so they are asked for some rows ahead, and behind the last those of the panel that is
// probably this thread's next.
template <class M, class Row> static inline void pack_columns(Row row, int k, int cols, typename M::U* panel) {
    using T = typename M::T;
    constexpr int AHEAD = 32, LINE = 64 / sizeof(T);
    auto prefetch = [&](int r) {
        if (r >= 2 * k) return;
        const T* p = r < k ? row(r) : row(r - k) + 2 * COLUMNS;
        for (int c = 0; c < COLUMNS; c += LINE) __builtin_prefetch(p + c, 0, 3);
    };
    for (int i = 0; i < k; i += M::PER, panel += COLUMNS) {
        for (int r = 0; r < M::PER; r++) prefetch(i + AHEAD + r);
        T some[2][COLUMNS] = {};
        const T *even = row(i), *odd = M::PER == 2 && i + 1 < k ? row(i + 1) : nullptr;
        if (cols < COLUMNS) {
            memcpy((void*)some[0], even, cols * sizeof(T));
            if (odd) memcpy((void*)some[1], odd, cols * sizeof(T));
            even = some[0];
            odd = odd ? some[1] : nullptr;
        }
        pack_unit(even, odd, panel);
    }
}

// Rows [0, cols) of length k, `stride` apart, as the columns of a panel [units of k][COLUMNS].
template <class M> static inline void pack_rows(const typename M::T* rows, ptrdiff_t stride, int k, int cols, typename M::U* panel) {
    for (size_t u = 0; u < units<M>(k); u++, panel += COLUMNS)
        for (int c = 0; c < COLUMNS; c++)
            panel[c] = c < cols ? M::unit(rows + c * stride + u * M::PER, std::min(M::PER, k - (int)u * M::PER)) : 0;
}

typedef vf Block[ROWS_AT_ONCE][VECTORS];

template <class M, int ROWS>
static INLINE void multiply_rows(const typename M::T* const* rows, int n, const typename M::U* panel, int k, Block& acc) {
    const typename M::T* p[ROWS];
    for (int r = 0; r < ROWS; r++) p[r] = rows[std::min(r, n - 1)];
    vf part[ROWS][VECTORS];
    NothingAhead nothing;
    lanes_tile<M, ROWS, VECTORS>([&](int r) { return p[r]; }, panel, k, nothing, part);
    memcpy((void*)acc, part, sizeof(part));
}

// acc[r] = rows[r] . panel for n rows, 1 <= n <= ROWS_AT_ONCE.
template <class M> static inline void multiply(const typename M::T* const* rows, int n, const typename M::U* panel, int k, Block& acc) {
    if (n <= 2) multiply_rows<M, 2>(rows, n, panel, k, acc);
    else if (n <= 4) multiply_rows<M, 4>(rows, n, panel, k, acc);
    else multiply_rows<M, ROWS_AT_ONCE>(rows, n, panel, k, acc);
}

template <class T> static INLINE void store_row(const vf (&acc)[VECTORS], T* out, int cols) {
    for (int c = 0; c < VECTORS; c++)
        if (cols >= (c + 1) * LANES) store_narrow(acc[c], out + c * LANES);
        else store_some(acc[c], out + c * LANES, std::clamp(cols - c * LANES, 0, LANES));
}

// rows_out[first + i][column0 ...] = row(i) . panel for an expert's m rows.
template <class M, class Row>
static inline void multiply_expert(Row row, int m, const typename M::U* panel, int k, float* out, size_t stride, int cols) {
    for (int r0 = 0; r0 < m; r0 += ROWS_AT_ONCE) {
        const int n = std::min(ROWS_AT_ONCE, m - r0);
        const typename M::T* rows[ROWS_AT_ONCE];
        for (int r = 0; r < n; r++) rows[r] = row(r0 + r);
        Block acc;
        multiply<M>(rows, n, panel, k, acc);
        for (int r = 0; r < n; r++) store_row(acc[r], out + (size_t)(r0 + r) * stride, cols);
    }
}

// Units of rows before each expert's, [E + 1]: where an expert's part of a turned or packed operand begins.
template <class M> static inline std::vector<size_t> units_before(const Plan& plan) {
    std::vector<size_t> before(plan.num_experts + 1, 0);
    for (int e = 0; e < plan.num_experts; e++) before[e + 1] = before[e] + units<M>(plan.count(e));
    return before;
}

// An expert's m rows turned: [width][units of m], so that a column of theirs is a row of a product.
template <class M, class Row> static inline void turn(Row row, int m, int width, typename M::U* out) {
    using T = typename M::T;
    const size_t um = units<M>(m);
    for (size_t u = 0; u < um; u++) {
        const T* even = row((int)u * M::PER);
        if constexpr (M::PER == 2) {
            const T* odd = (int)u * 2 + 1 < m ? row((int)u * 2 + 1) : nullptr;
            for (int d = 0; d < width; d++) out[(size_t)d * um + u] = even[d].bits | (odd ? (uint32_t)odd[d].bits << 16 : 0);
        } else
            for (int d = 0; d < width; d++) out[(size_t)d * um + u] = widen(even[d]);
    }
}

// Rows begin .. end of one expert's weight gradient [.., width] = turned [.., um] times panels [blocks][um][COLUMNS].
template <class M>
static inline void weight_gradient(int begin, int end, int width, size_t um, const typename M::U* turned, const typename M::U* panels,
                                   typename M::T* out) {
    using T = typename M::T;
    if (um == 0) {
        memset((void*)(out + (size_t)begin * width), 0, (size_t)(end - begin) * width * sizeof(T));
        return;
    }
    for (int block = 0; block < blocks_of(width); block++) {
        const int c0 = block * COLUMNS, cols = std::min(COLUMNS, width - c0);
        const typename M::U* panel = panels + um * block * COLUMNS;
        for (int r0 = begin; r0 < end; r0 += ROWS_AT_ONCE) {
            const int n = std::min(ROWS_AT_ONCE, end - r0);
            const typename M::U* rows[ROWS_AT_ONCE];
            for (int r = 0; r < ROWS_AT_ONCE; r++) rows[r] = turned + (size_t)(r0 + std::min(r, n - 1)) * um;
            vf acc[ROWS_AT_ONCE][VECTORS];
            for (auto& row : acc)
                for (vf& v : row) v = vf{};
            for (size_t u = 0; u < um; u++) {
                vf b[VECTORS];
                for (int c = 0; c < VECTORS; c++) b[c] = load<vf>(panel + u * COLUMNS + c * LANES);
                for (int r = 0; r < ROWS_AT_ONCE; r++)
                    for (int c = 0; c < VECTORS; c++) acc[r][c] = M::step(acc[r][c], rows[r][u], b[c]);
            }
            for (int r = 0; r < n; r++) store_row(acc[r], out + (size_t)(r0 + r) * width + c0, cols);
        }
    }
}
constexpr int ROWS_PER_TASK = 8 * ROWS_AT_ONCE;  // rows of a weight gradient in one task
