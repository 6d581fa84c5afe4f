// Panels: PANEL neighbouring columns of a product for every unit of k, made from rows of weights in memory.
// Lanes are columns, so a panel serves all tokens, at most MOST_ROWS at a time.
#pragma once
#include "layer.h"

constexpr int PANEL = 2 * LANES, MOST_ROWS = ACCUMULATORS / 2;

// Transposes LANES vectors: first pairs and pairs of pairs inside 128-bit parts, then the parts.
template <int FROM_SECOND_EVERY, int OFFSET> static constexpr int zipped(int j) {
    // Inside each part of four, alternate elements OFFSET .. of the first and of the second vector.
    const int part = j / 4, p = j % 4;
    return FROM_SECOND_EVERY == 1 ? part * 4 + OFFSET + p / 2 + (p % 2) * LANES
                                  : part * 4 + OFFSET + p % 2 + (p / 2) * LANES;
}
template <int OFFSET> static constexpr int every_other_part(int j) {
    return (2 * (j / 4) + OFFSET) * 4 + j % 4;
}
template <int STEP, int OFFSET, size_t... J> static INLINE vf zip(vf a, vf b, std::index_sequence<J...>) {
    return __builtin_shufflevector(a, b, zipped<STEP, OFFSET>(J)...);
}
template <int OFFSET, size_t... J> static INLINE vf parts(vf a, vf b, std::index_sequence<J...>) {
    return __builtin_shufflevector(a, b, every_other_part<OFFSET>(J)...);
}
// v[i * STRIDE], i < LANES / 4, is a column group of each four rows; it becomes part i of each.
template <int COUNT, int STRIDE> static INLINE void transpose_parts(vf* v) {
    constexpr auto all = std::make_index_sequence<LANES>{};
    if constexpr (COUNT > 1) {
        vf even[COUNT / 2], odd[COUNT / 2];
        for (int i = 0; i < COUNT / 2; i++) {
            even[i] = parts<0>(v[2 * i * STRIDE], v[(2 * i + 1) * STRIDE], all);
            odd[i] = parts<1>(v[2 * i * STRIDE], v[(2 * i + 1) * STRIDE], all);
        }
        transpose_parts<COUNT / 2, 1>(even);
        transpose_parts<COUNT / 2, 1>(odd);
        for (int i = 0; i < COUNT / 2; i++) {
            v[2 * i * STRIDE] = even[i];
            v[(2 * i + 1) * STRIDE] = odd[i];
        }
    }
}
static INLINE void transpose(vf (&v)[LANES]) {
    constexpr auto all = std::make_index_sequence<LANES>{};
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4) {
        const vf lo0 = zip<1, 0>(v[i], v[i + 1], all), hi0 = zip<1, 2>(v[i], v[i + 1], all);
        const vf lo1 = zip<1, 0>(v[i + 2], v[i + 3], all), hi1 = zip<1, 2>(v[i + 2], v[i + 3], all);
        v[i] = zip<2, 0>(lo0, lo1, all);
        v[i + 1] = zip<2, 2>(lo0, lo1, all);
        v[i + 2] = zip<2, 0>(hi0, hi1, all);
        v[i + 3] = zip<2, 2>(hi0, hi1, all);
    }
    // v[4 g + p] holds, for rows 4 g .. 4 g + 3, column 4 l + p in part l.
    vf out[LANES];
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++) {
        transpose_parts<LANES / 4, 4>(v + p);
        for (int l = 0; l < LANES / 4; l++)
            out[4 * l + p] = v[4 * l + p];
    }
    memcpy((void*)v, out, sizeof(out));
}

// Writes `count` rows of length k, then zeros, to LANES columns from `column` on of a panel [units of
// k][width].
template <class M, class Row>
static inline void turn(Row row, int count, int k, typename M::U* panel, int width, int column) {
    const int whole = (int)units<M>(k);
    for (int unit = 0; unit < whole; unit += LANES) {
        vf v[LANES];
        for (int i = 0; i < LANES; i++)
            v[i] = i < count ? units_at<M>(row(i), unit, k - unit * M::PER) : vf{};
        transpose(v);
        for (int i = 0; i < std::min(LANES, whole - unit); i++)
            store(panel + (size_t)(unit + i) * width + column, v[i]);
    }
}

// The rows of weights that become a panel.
template <class M> struct PanelRows {
    const typename M::T* row[PANEL];
    int k;

    // Units [unit, unit + LANES) of a half of the rows, transposed; zeros behind the end of a row.
    INLINE void load_transposed(int half, int unit, vf (&v)[LANES]) const {
        const int left = k - unit * M::PER;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            v[i] = units_at<M>(row[half * LANES + i], unit, left);
        transpose(v);
    }
    // The same of both halves, to out[LANES][PANEL].
    INLINE void transpose_to(int unit, typename M::U* out) const {
        for (int half = 0; half < 2; half++) {
            vf v[LANES];
            load_transposed(half, unit, v);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                store(out + i * PANEL + half * LANES, v[i]);
        }
    }
    INLINE const typename M::U* block(int unit, typename M::U* buffer) const {
        transpose_to(unit, buffer);
        return buffer;
    }
    static INLINE void look_ahead(const typename M::U*) {}
};

// LANES columns of one unit, widened if they are stored narrower than they are multiplied.
template <class Stored> static INLINE vf columns_of_unit(const Stored* p) {
    if constexpr (sizeof(Stored) == sizeof(float))
        return load<vf>(p);
    else
        return load_wide(p);
}

// All units of a panel that was packed before. Panels are read as one stream; prefetching ahead saves a tenth
// of the time where they come from memory.
template <class M> struct MadePanel {
    using Stored = typename M::Stored;
    static constexpr int BYTES_AHEAD = 8 << 10;
    const Stored* panel;
    int k;  // in elements

    // In a row of odd length the second half of the last pair is padding, which a write to the whole tensor
    // may have changed. It is masked: the zero of the token's row times infinity would be NaN.
    INLINE const Stored* block(int unit, typename M::U* buffer) const {
        const Stored* stored = panel + (size_t)unit * PANEL;
        if constexpr (M::PER == 2) {
            const int left = (int)units<M>(k) - unit;
            if (k % 2 && left <= LANES) {
                memcpy(buffer, stored, (size_t)left * PANEL * sizeof(Stored));
                for (int c = 0; c < PANEL; c++)
                    buffer[(left - 1) * PANEL + c] &= 0xFFFF;
                return buffer;
            }
        }
        return stored;
    }
    static INLINE void look_ahead(const Stored* columns) {
        for (size_t byte = 0; byte < PANEL * sizeof(Stored); byte += 64)
            __builtin_prefetch((const char*)columns + BYTES_AHEAD + byte, 0, 2);
    }
};

template <class M, int R, class Source, class Ahead>
static inline void multiply_rows_by_panel(const typename M::U* rows, size_t stride, const Source& source,
                                          typename M::U* buffer, int k, Ahead& ahead, vf (*acc)[2]) {
    vf sum[R][2] = {};
    for (int unit = 0; unit < k; unit += LANES) {
        const auto* block = source.block(unit, buffer);
        ahead.step();
        const typename M::U* a = rows + unit;
        const int count = std::min(LANES, k - unit);
        for (int i = 0; i < count; i++) {
            Source::look_ahead(block + i * PANEL);
            const vf b0 = columns_of_unit(block + i * PANEL), b1 = columns_of_unit(block + i * PANEL + LANES);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                const auto unit_of_row = a[r * stride + i];
                sum[r][0] = M::step(sum[r][0], unit_of_row, b0);
                sum[r][1] = M::step(sum[r][1], unit_of_row, b1);
            }
        }
    }
    copy_tile(sum, acc);
}

// The same for so few rows that storing a panel would cost more than it saves.
template <class M, int R, class Ahead>
static inline void multiply_few_rows(const typename M::U* rows, size_t stride, const PanelRows<M>& source,
                                     int k, Ahead& ahead, vf (*acc)[2]) {
    vf sum[R][2] = {};
    for (int unit = 0; unit < k; unit += LANES) {
        const int count = std::min(LANES, k - unit);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            vf v[LANES];
            source.load_transposed(half, unit, v);
            if (half == 0) ahead.step();
            if (count == LANES) {
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++)
#pragma GCC unroll 4
                    for (int r = 0; r < R; r++)
                        sum[r][half] = M::step(sum[r][half], rows[r * stride + unit + i], v[i]);
            } else
                for (int i = 0; i < count; i++)
                    for (int r = 0; r < R; r++)
                        sum[r][half] = M::step(sum[r][half], rows[r * stride + unit + i], v[i]);
        }
    }
    copy_tile(sum, acc);
}

// acc[r][.] = row r . columns of the source, for n rows of k units, 1 <= n <= MOST_ROWS; rows begin `stride`
// units apart. `buffer` has room for LANES units of a panel that is made on the way.
template <class M, class Source, class Ahead>
__attribute__((noinline)) static void multiply_panel(const typename M::U* rows, size_t stride, int n,
                                                     const Source& source, typename M::U* buffer, int k,
                                                     Ahead& ahead, vf (*acc)[2]) {
    with_rows<1, 2, 3, 4, 5, 6, 8, 10, 11, 12>(n, [&]<int COUNT>() {
        constexpr int R = std::min(COUNT, MOST_ROWS);
        if constexpr (std::is_same_v<Source, PanelRows<M>> && R <= 2)
            multiply_few_rows<M, R>(rows, stride, source, k, ahead, acc);
        else
            multiply_rows_by_panel<M, R>(rows, stride, source, buffer, k, ahead, acc);
    });
}
