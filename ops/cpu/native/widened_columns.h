// Columns of a weight that a format widens to float32, for the product of columns.h: the rows of a panel at a
// time, so no more than a panel of a weight is float32 at once.
#pragma once
#include "ahead.h"
#include "columns.h"

// Columns [begin, begin + cols) of an expert's weight.
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
