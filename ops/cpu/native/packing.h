// The weights of the MLP as panels: which rows make one, and all of them made at once, for who keeps them.
#pragma once
#include "panel.h"

// Which rows of the weights make a panel.
template <class M> struct PanelsOfWeights {
    using T = typename M::T;
    const T *up, *down;
    int D, F, G;
    GateUp at;
    bool gated;

    // The rows behind columns f .. of h: gate and up rows, or plain ones. The last stands in for missing ones.
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
        for (int i = 0; i < PANEL; i++) p.row[i] = down + ((size_t)e * D + std::min(d + i, D - 1)) * F;
        return p;
    }
};

// The weights as panels, in their order: [E, panels, units of k, PANEL], once and for all.
struct PackWeights {
    const void *up, *down;
    void *packed_up, *packed_down;
    int64_t num_experts, hidden, inner, up_rows, gate, up_from, step, gated, threads;
};

template <class M> class PackingPass {
    const PackWeights& a;

  public:
    explicit PackingPass(const PackWeights& a) : a(a) {}

    void run() {
        using T = typename M::T;
        using U = typename M::U;
        const int D = a.hidden, F = a.inner, up_columns = a.gated ? LANES : PANEL;
        const PanelsOfWeights<M> weights{(const T*)a.up, (const T*)a.down, D, F, (int)a.up_rows,
                                         {(ptrdiff_t)a.gate, (ptrdiff_t)a.up_from, (ptrdiff_t)a.step}, a.gated != 0};
        const int up_panels = (F + up_columns - 1) / up_columns, down_panels = (D + PANEL - 1) / PANEL;
        Tasks up, down;
#pragma omp parallel num_threads(a.threads)
        {
            up.run(a.num_experts, up_panels, [&](int e, int p) {
                weights.up_rows(e, p * up_columns).make((U*)a.packed_up + ((size_t)e * up_panels + p) * units<M>(D) * PANEL);
            });
            down.run(a.num_experts, down_panels, [&](int e, int p) {
                weights.down_rows(e, p * PANEL).make((U*)a.packed_down + ((size_t)e * down_panels + p) * units<M>(F) * PANEL);
            });
        }
    }
};
