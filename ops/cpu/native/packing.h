// Packs weights into panels, which is a permutation, and unpacks them.
#pragma once
#include "panel.h"

// A weight [E, rows, k], and the same as panels [E, panels, units of k, PANEL, PER], padded with zeros.
struct Pack {
    void *home, *panels;
    int64_t num_experts, columns, rows, k, first, second, step, gated, back, threads;
};

// Elements are moved as bits, so minus zeros and the payloads of NaNs survive.
template <class M> class PackingPass {
    using Bits = std::conditional_t<sizeof(typename M::T) == 4, uint32_t, uint16_t>;
    static constexpr int BLOCK = 64 / sizeof(Bits);  // elements of k moved at once: a line of each row
    const Pack& a;
    const int width, panels;  // columns of a panel, panels of an expert
    const int padded;         // elements of k with their padding

    // The row of the weight in column c of panel p; -1 for padding.
    int64_t row_of(int p, int c) const {
        const int64_t column = (int64_t)p * width + (a.gated ? c % LANES : c);
        if (column >= a.columns) return -1;
        return (a.gated && c >= LANES ? a.second : a.first) + column * a.step;
    }
    template <bool BACK> void move(int e, int p) const {
        Bits* panel = (Bits*)a.panels + ((size_t)e * panels + p) * padded * PANEL;
        for (int begin = 0; begin < padded; begin += BLOCK)
            for (int c = 0; c < PANEL; c++) {
                const int64_t row = row_of(p, c);
                Bits* home = row < 0 ? nullptr : (Bits*)a.home + ((size_t)e * a.rows + row) * a.k;
                for (int i = begin; i < std::min(begin + BLOCK, padded); i++) {
                    Bits& there = panel[((size_t)(i / M::PER) * PANEL + c) * M::PER + i % M::PER];
                    const bool exists = home && i < a.k;
                    if constexpr (BACK) {
                        if (exists) home[i] = there;
                    } else
                        there = exists ? home[i] : Bits{0};
                }
            }
    }

  public:
    explicit PackingPass(const Pack& a)
        : a(a), width(a.gated ? LANES : PANEL), panels((int)((a.columns + width - 1) / width)),
          padded((int)units<M>(a.k) * M::PER) {}

    void run() {
        Tasks tasks;
        in_threads(a.threads, [&](int) {
            tasks.run(a.num_experts, panels, [&](int e, int p) {
                if (a.back)
                    move<true>(e, p);
                else
                    move<false>(e, p);
            });
        });
    }
};
