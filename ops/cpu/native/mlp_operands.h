// A call of experts that are MLPs, as the operators take it, for every weight format.
#pragma once
#include "mlp.h"
#include "operands.h"
#include "packing.h"

extern "C" int fusedonemoe_elements_per_unit_f32(), fusedonemoe_elements_per_unit_bf16(),
    fusedonemoe_elements_per_unit_f16();

namespace {

// The forms of weights that have the same tensors, so the same operator.
enum class Weights { FLOAT, QUANTIZED, PACKED };

inline int64_t activation_of(const std::string& name) {
    static const std::vector<const char*> NAMES(ACTIVATION_NAMES, ACTIVATION_NAMES + NUM_ACTIVATIONS);
    return place_of("activation", name, NAMES);
}

inline GateUp rows_of(const std::string& layout, int64_t inner) {
    if (layout == "gate_up") return {0, inner, 1};
    if (layout == "up_gate") return {inner, 0, 1};
    if (layout == "interleaved") return {0, 1, 2};
    place_of("layout", layout, {"gate_up", "up_gate", "interleaved", "plain"});
    return {0, 0, 1};
}

// The tensors of one projection [E, rows, width].
struct Side {
    Tensor values;
    std::optional<Tensor> scale, zero, bias;

    void take(Arguments& given, Weights kind) {
        values = given.take<Tensor>();
        if (kind != Weights::QUANTIZED) return;
        scale = given.take<Tensor>();
        zero = given.take<std::optional<Tensor>>();
    }
    Weight weight() const { return {address(values), address(scale), address(zero)}; }
};

static int (*const ELEMENTS_PER_UNIT[])() = {
    fusedonemoe_elements_per_unit_f32, fusedonemoe_elements_per_unit_bf16, fusedonemoe_elements_per_unit_f16};

// The panels of a weight [E, rows, width] with `columns` columns, as this machine's kernels read them.
inline void check_panels(const char* name, const Tensor& panels, int64_t columns, int64_t width, bool gated,
                         int64_t rows) {
    check_dim(name, panels, 5);
    if (gated && rows % 2) refuse("a weight with gate and up must have as many rows of each, got ", rows);
    const int64_t units = ELEMENTS_PER_UNIT[element_of(name, panels)](), across = gated ? PANEL / 2 : PANEL,
                  shape[] = {panels.size(0), (columns + across - 1) / across, (width + units - 1) / units,
                             PANEL, units};
    const auto sizes = panels.sizes();
    if (!std::equal(sizes.begin(), sizes.end(), shape, shape + 5))
        refuse(name, " must be panels of shape ", std::vector<int64_t>(shape, shape + 5), " for a weight of ",
               rows, " rows of ", width, " on this machine, got ", sizes);
    if (!panels.is_contiguous()) refuse(name, " must be contiguous panels, got strides ", panels.strides());
}

struct MLPCall {
    Weights kind;
    Tensor x;
    Routing routing;
    Side up, down;
    std::string name, layout;
    int64_t activation, D, E, F, G, format = PLAIN, group = 0;
    double alpha, limit;
    DtypeIndex element;

    MLPCall(Arguments& given, Weights kind) : kind(kind) {
        x = given.take<Tensor>();
        routing.take(given);
        up.take(given, kind);
        down.take(given, kind);
        up.bias = given.take<std::optional<Tensor>>();
        down.bias = given.take<std::optional<Tensor>>();
        if (kind == Weights::PACKED) F = given.take<int64_t>();
        name = given.take<std::string>();
        layout = given.take<std::string>();
        alpha = given.take<double>();
        limit = given.take<double>();
    }
    bool gated() const { return layout != "plain"; }

    void read() {
        check_dim("x", x, 2);
        element = element_of("x", x);
        D = x.size(1);
        activation = activation_of(name);
        switch (kind) {
            case Weights::FLOAT: read_floats(); break;
            case Weights::QUANTIZED: read_quantized(); break;
            case Weights::PACKED: read_panels(); break;
        }
        routing.read_for(x.size(0));
        x = checked("x", x, {routing.T, D}, {element});
        up.bias = checked("up_bias", up.bias, {E, G}, {element});
        down.bias = checked("down_bias", down.bias, {E, D}, {element});
    }
    int64_t threads() const { return threads_of_products(routing.rows(), G, D); }
    MLPSizes sizes() const {
        const GateUp at = rows_of(layout, F);
        return {routing.T, routing.K, E,          D,      F,     G,     at.gate, at.up,
                at.step,   gated(),   activation, format, group, alpha, limit};
    }

  private:
    void check_widths() const {
        rows_of(layout, F);
        if (const int64_t expected = gated() ? 2 * F : F; G != expected)
            refuse("up_proj must have ", expected, " rows with down_proj of width ", F, ", got ", G);
    }
    void read_floats() {
        check_dim("gate_up_proj", up.values, 3);
        check_dim("down_proj", down.values, 3);
        E = up.values.size(0);
        G = up.values.size(1);
        F = down.values.size(2);
        check_widths();
        up.values = checked("up_proj", up.values, {E, G, D}, {element});
        down.values = checked("down_proj", down.values, {E, D, F}, {element});
    }
    void read_panels() {
        G = gated() ? 2 * F : F;
        rows_of(layout, F);
        for (const auto& [name, side] : {std::pair("packed_up", &up), {"packed_down", &down}})
            if (dtype_of(side->values) != element)
                refuse(name, " must have the dtype of x (", name_of(element), "), got ",
                       name_of(dtype_of(side->values)));
        check_panels("packed_up", up.values, F, D, gated(), G);
        check_panels("packed_down", down.values, D, F, false, D);
        E = up.values.size(0);
        if (down.values.size(0) != E)
            refuse("packed_down must have as many experts as packed_up (", E, "), got ", down.values.size(0));
        format = PANELS;
    }
    // The inputs of an output, and how many of them share a scale.
    static std::pair<int64_t, int64_t> widths(const char* name, const Side& side) {
        check_dim(name, side.values, 3);
        const DtypeIndex dtype = dtype_of(side.values);
        if (dtype != I8 && dtype != U8)
            refuse(name, " must have a dtype of the format int8 or int4, got ", name_of(dtype));
        check_dim((std::string(name) + "_scale").c_str(), *side.scale, dtype == I8 ? 2 : 3);
        const int64_t width = side.values.size(2) * (dtype == U8 ? 2 : 1);
        return {width, dtype == I8 ? width : width / std::max<int64_t>(side.scale->size(2), 1)};
    }
    static void read_scaled(const std::string& name, Side& side, int64_t E, int64_t rows, int64_t width,
                            int64_t group) {
        const std::string scale = name + "_scale", zero = name + "_zero";
        if (dtype_of(side.values) == I8) {
            side.values = checked(name.c_str(), side.values, {E, rows, width}, {I8});
            side.scale = checked(scale.c_str(), side.scale, {E, rows}, {F32});
            side.zero = std::nullopt;
            return;
        }
        if ((group != 32 && group != 64 && group != 128) || width % group)
            refuse(scale, " must have a scale for (32, 64, 128) inputs, got shape ", side.scale->sizes());
        side.values = checked(name.c_str(), side.values, {E, rows, width / 2}, {U8});
        side.scale = checked(scale.c_str(), side.scale, {E, rows, width / group}, {F32});
        side.zero = checked(zero.c_str(), side.zero, {E, rows, width / group}, {U8});
    }
    void read_quantized() {
        const auto [up_width, up_group] = widths("up", up);
        const auto [down_width, down_group] = widths("down", down);
        E = up.values.size(0);
        G = up.values.size(1);
        F = down_width;
        check_widths();
        const bool bytes = dtype_of(up.values) == I8, down_bytes = dtype_of(down.values) == I8;
        auto kind_of = [](bool bytes, int64_t group) {
            return bytes ? std::string("int8") : "int4 of " + std::to_string(group);
        };
        if (bytes != down_bytes || (!bytes && up_group != down_group))
            refuse("down must have the kind of up, ", kind_of(bytes, up_group), ", got ",
                   kind_of(down_bytes, down_group));
        read_scaled("up", up, E, G, D, up_group);
        read_scaled("down", down, E, D, F, down_group);
        format = bytes ? INT8 : INT4;
        group = bytes ? 0 : up_group;
    }
};

// Packs a weight into panels, or unpacks it.
inline void move_panels(const Kernels& pack, const Tensor& panels, const Tensor& weight,
                        const std::string& layout, bool back) {
    refuse_forward_mode();
    check_dim("weight", weight, 3);
    const DtypeIndex element = element_of("weight", weight);
    const int64_t E = weight.size(0), rows = weight.size(1), width = weight.size(2);
    const bool gated = layout != "plain";
    const int64_t columns = gated ? rows / 2 : rows;
    const GateUp at = rows_of(layout, columns);
    check_panels("panels", panels, columns, width, gated, rows);
    if (panels.size(0) != E || dtype_of(panels) != element)
        refuse("panels must be of the weight's experts and dtype, ", E, " and ", name_of(element), ", got ",
               panels.size(0), " and ", name_of(dtype_of(panels)));
    if (!weight.is_contiguous()) refuse("weight must be contiguous, got strides ", weight.strides());
    const Pack arguments(written(weight), written(panels), E, columns, rows, width, at.gate, at.up, at.step,
                         gated, back, threads_of_products(E, rows, width));
    pack.run(element, &arguments);
}

}  // namespace
