// Plain weights [E, rows, k] of the element type of x, multiplied in place. They have gradients.
#pragma once
#include "columns.h"
#include "panel_products.h"

template <class M> struct PlainRows {
    using Mac = M;
    using T = typename M::T;
    template <class> using Forward = PanelProducts<PlainRows>;
    template <class> using BackwardMac = M;
    using Columns = WeightRows<T>;
    static constexpr bool HAS_BACKWARD = true, HAS_GRADIENT = true, ARE_PANELS = false;

    const T* values;
    const int rows, k;

    PlainRows(const Weight& weight, int rows, int k, int)
        : values((const T*)weight.values), rows(rows), k(k) {}
    const T* row(int e, ptrdiff_t r) const { return values + ((size_t)e * rows + r) * k; }

    // The rows that become the panel at a column of `columns`: gate rows and their up rows, or PANEL plain
    // rows. The last row is repeated where there are no more.
    PanelRows<M> panel(int e, int column, int columns, const GateUp& at, bool gated) const {
        PanelRows<M> p{{}, k};
        for (int i = 0; i < LANES; i++) {
            const int first = std::min(column + i, columns - 1);
            const int second = gated ? first : std::min(column + LANES + i, columns - 1);
            p.row[i] = row(e, at.gate + first * at.step);
            p.row[LANES + i] = row(e, (gated ? at.up : at.gate) + second * at.step);
        }
        return p;
    }
    Columns columns(int e, const RowOrder& order, int begin, int cols) const {
        const T *first = row(e, order.first) + begin, *second = row(e, order.second) + begin;
        return {first, order.step * k, order.count, cols, second, order.split};
    }
    // Adds n neighbouring rows.
    template <class Ahead> void look_ahead(int e, ptrdiff_t r, size_t n, Ahead& ahead) const {
        ahead.add(row(e, r), n * k * sizeof(T));
    }
};
