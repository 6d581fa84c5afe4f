// The activations. A new one is a name in the list and one function: a specialisation of act_one, or of
// act_gated if it has constants or is no product of act(gate) and up.
#pragma once
#include "vector.h"

// In the order of ACTIVATIONS in Python.
enum Activation { SILU, GELU, GELU_TANH, RELU, RELU2, SIGMOID, IDENTITY, SWIGLU_OAI, NUM_ACTIVATIONS };
constexpr const char* ACTIVATION_NAMES[] = {"silu",  "gelu",    "gelu_tanh", "relu",
                                            "relu2", "sigmoid", "identity",  "swiglu_oai"};

struct Act {
    int name;
    float alpha, limit;
};

// act(v) and its derivative; the identity where there is no specialisation.
struct ValueSlope {
    vf value, slope;
};
template <int NAME> static INLINE ValueSlope act_one(vf v) { return {v, splat(1.f)}; }
template <> INLINE ValueSlope act_one<SILU>(vf v) {
    vf s = vsigmoid(v), one = splat(1.f);
    return {v * s, s * (one + v * (one - s))};
}
template <> INLINE ValueSlope act_one<GELU>(vf v) {
    vf phi = splat(0.5f) * (splat(1.f) + verf(v * splat(0.70710678118654752f)));
    return {v * phi, phi + v * splat(0.39894228040143268f) * vexp(splat(-0.5f) * v * v)};
}
template <> INLINE ValueSlope act_one<GELU_TANH>(vf v) {
    const vf twice = splat(1.5957691216057308f), one = splat(1.f);
    vf s = vsigmoid(twice * (v + splat(0.044715f) * v * v * v));
    return {v * s, s + v * s * (one - s) * twice * (one + splat(0.134145f) * v * v)};
}
template <> INLINE ValueSlope act_one<RELU>(vf v) {
    const vf zero = splat(0.f);
    return {choose(v > zero, v, zero), choose(v > zero, splat(1.f), zero)};
}
template <> INLINE ValueSlope act_one<RELU2>(vf v) {
    vf r = choose(v > splat(0.f), v, splat(0.f));
    return {r * r, r + r};
}
template <> INLINE ValueSlope act_one<SIGMOID>(vf v) {
    vf s = vsigmoid(v);
    return {s, s * (splat(1.f) - s)};
}

// h = act(gate, up), and the gradients of gate and up from that of h. By default act(gate) * up.
struct Activated {
    vf h, dgate, dup;
};
template <int NAME> static INLINE Activated act_gated(const Act&, vf gate, vf up, vf dh) {
    ValueSlope at_gate = act_one<NAME>(gate);
    return {at_gate.value * up, dh * up * at_gate.slope, dh * at_gate.value};
}
// h = (clamp(up) + 1) g sigmoid(alpha g) with g = min(gate, limit)
template <> INLINE Activated act_gated<SWIGLU_OAI>(const Act& a, vf gate, vf up, vf dh) {
    const vf one = splat(1.f), zero = splat(0.f);
    vf g = vmin(gate, a.limit), u = vmax(vmin(up, a.limit), -a.limit) + one;
    vf s = vsigmoid(splat(a.alpha) * g), act = g * s;
    vf dgate = dh * u * s * (one + splat(a.alpha) * g * (one - s));
    vi inside = (up <= splat(a.limit)) & (up >= splat(-a.limit));
    return {u * act, choose(gate <= splat(a.limit), dgate, zero), choose(inside, dh * act, zero)};
}

// The same for a gated or a plain expert; a plain one has h = act(gate).
template <int NAME> static INLINE vf act_forward(const Act& a, vf gate, vf up, bool gated) {
    return gated ? act_gated<NAME>(a, gate, up, vf{}).h : act_one<NAME>(gate).value;
}
template <int NAME> static INLINE Activated act_backward(const Act& a, vf gate, vf up, vf dh, bool gated) {
    if (gated) return act_gated<NAME>(a, gate, up, dh);
    ValueSlope at_gate = act_one<NAME>(gate);
    return {at_gate.value, dh * at_gate.slope, vf{}};
}

// Calls body.template operator()<NAME>() with the activation as a constant, so that no loop chooses it.
template <class Body> static INLINE void with_activation(int name, Body body) {
    [&]<int... NAMES>(std::integer_sequence<int, NAMES...>) {
        ((NAMES == name ? body.template operator()<NAMES>() : void()), ...);
    }(std::make_integer_sequence<int, NUM_ACTIVATIONS>{});
}
