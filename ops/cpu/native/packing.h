// The weights of the MLP as panels: which rows make one, and the permutation that makes all of them, or
// undoes it.
#pragma once
#include "panel.h"

// Which rows of the weights make a panel.
template <class M> struct PanelsOfWeights {
    using T = typename M::T;
    const T *up, *down;
    int D, F, G;
    GateUp at;
    bool gated;

    // The rows behind columns f .. of h: gate and up rows, or plain ones. The last stands in for missing
    // ones.
    PanelRows<M> up_rows(int e, int f) const {
        PanelRows<M> p{{}, D};
        const T* w = up + (size_t)e * G * D;
        for (int i = 0; i < LANES; i++) {
            const int first = std::min(f + i, F - 1), second = gated ? first : std::min(f + LANES + i, F - 1);
            p.row[i] = w + (at.gate + first * at.step) * D;
            p.row[LANES + i] = w + ((gated ? at.up : at.gate) + second * at.step) * D;
        }
        return p;
    }
    PanelRows<M> down_rows(int e, int d) const {
        PanelRows<M> p{{}, F};
        for (int i = 0; i < PANEL; i++)
            p.row[i] = down + ((size_t)e * D + std::min(d + i, D - 1)) * F;
        return p;
    }
};

// One weight [E, rows, k] and the same elements as panels [E, panels, units of k, PANEL, PER], zeros where
// there are none.
struct Pack {
    void *home, *panels;
    int64_t num_experts, columns, rows, k, first, second, step, gated, back, threads;
};

// Elements are moved as bits: minus zeros and the payloads of NaNs come back as they were.
template <class M> class PackingPass {
    using Bits = std::conditional_t<sizeof(typename M::T) == 4, uint32_t, uint16_t>;
    static constexpr int BLOCK = 64 / sizeof(Bits);  // elements of k moved at once: a line of each row
    const Pack& a;
    const int width, panels,
        padded;  // columns of a panel, panels of an expert, elements of k with their padding

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
#pragma omp parallel num_threads(a.threads)
        tasks.run(a.num_experts, panels, [&](int e, int p) {
            if (a.back)
                move<true>(e, p);
            else
                move<false>(e, p);
        });
    }
};
