// Weights that were packed into panels [E, panels, units of k, PANEL, PER] before, for the forward only.
#pragma once
#include "panel_products.h"

template <class M> struct PackedPanels {
    using Mac = M;
    template <class> using Forward = PanelProducts<PackedPanels>;
    static constexpr bool HAS_BACKWARD = false, ARE_PANELS = true;

    const typename M::Stored* values;
    const int k;

    PackedPanels(const Weight& weight, int, int k, int)
        : values((const typename M::Stored*)weight.values), k(k) {}

    // The panel at a column of `columns`.
    MadePanel<M> panel(int e, int column, int columns, const GateUp&, bool gated) const {
        const int width = gated ? LANES : PANEL, panels = (columns + width - 1) / width;
        return {values + ((size_t)e * panels + column / width) * units<M>(k) * PANEL, k};
    }
    // Nothing: panels look ahead while they are multiplied.
    template <class Ahead> void look_ahead(int, ptrdiff_t, size_t, Ahead&) const {}
};
