// Vectors of float32, element types, activations. Everything is written in GCC's vector extension, so that
// one source serves AVX-512, AVX2, SSE and NEON; only the bfloat16 dot product is an intrinsic.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16, ACCUMULATORS = 24;  // of 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8, ACCUMULATORS = 12;  // of 16 registers
#elif defined(__aarch64__)
constexpr int LANES = 4, ACCUMULATORS = 24;
#else
constexpr int LANES = 4, ACCUMULATORS = 12;
#endif
#define INLINE inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));

static INLINE vf splat(float s) { return s - vf{}; }
static INLINE vf choose(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
template <class V> static INLINE V load(const void* p) {
    V v;
    memcpy(&v, p, sizeof(V));
    return v;
}
template <class V> static INLINE void store(void* p, V v) { memcpy(p, &v, sizeof(V)); }

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

// The nearest bfloat16, ties to even. A NaN stays one; the AVX-512 instruction takes numbers below 1.2e-38
// for zeros.
static INLINE vh nearest_bf16(vf v) {
#if defined(__AVX512BF16__)
    return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
    vu u = (vu)v, nearest = u + 0x7FFF + ((u >> 16) & 1);
    vi is_nan = v != v;
    return __builtin_convertvector(((nearest & (vu)~is_nan) | ((u | 0x400000) & (vu)is_nan)) >> 16, vh);
#endif
}
static INLINE vf rounded(vf v, const float*) { return v; }
static INLINE vf rounded(vf v, const bf16*) {
    return (vf)(__builtin_convertvector(nearest_bf16(v), vu) << 16);
}
// Two bfloat16 side by side, the even one in the lower half.
static INLINE vu pair_of_bf16(vf even, vf odd) {
    return __builtin_convertvector(nearest_bf16(even), vu) |
           (__builtin_convertvector(nearest_bf16(odd), vu) << 16);
}

static INLINE float widen(float v) { return v; }
static INLINE float widen(bf16 v) {
    uint32_t u = (uint32_t)v.bits << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static INLINE void narrow(float v, float* p) { *p = v; }
static INLINE void narrow(float v, bf16* p) {
    uint32_t u;
    memcpy(&u, &v, 4);
    u = v == v ? u + 0x7FFF + ((u >> 16) & 1) : u | 0x400000;
    p->bits = (uint16_t)(u >> 16);
}
static INLINE vf load_wide(const float* p) { return load<vf>(p); }
static INLINE vf load_wide(const bf16* p) { return (vf)(__builtin_convertvector(load<vh>(p), vu) << 16); }
static INLINE void store_narrow(vf v, float* p) { store(p, v); }
static INLINE void store_narrow(vf v, bf16* p) { store(p, nearest_bf16(v)); }
// IEEE's half precision, by the instructions that most machines have for it, or by hand.
static INLINE float widen(f16 v) {
#if defined(__F16C__)
    return _cvtsh_ss(v.bits);
#else
    // The exponents differ by 112. A product moves them, of numbers below the smallest normal one too;
    // infinities and NaNs stay.
    const uint32_t sign = (uint32_t)(v.bits & 0x8000) << 16, rest = (uint32_t)(v.bits & 0x7FFF) << 13;
    const uint32_t bits = rest >= 0x0F800000u
                              ? rest | 0x7F800000u
                              : __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, rest) * 0x1p112f);
    return __builtin_bit_cast(float, sign | bits);
#endif
}
static INLINE void narrow(float v, f16* p) {
#if defined(__F16C__)
    p->bits = _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT);
#else
    const uint32_t u = __builtin_bit_cast(uint32_t, v), sign = u >> 16 & 0x8000, size = u & 0x7FFFFFFF;
    if (size > 0x7F800000u)
        p->bits = sign | 0x7E00 | (size >> 13 & 0x3FF);
    else if (size >= 0x477FF000u)
        p->bits = sign | 0x7C00;  // 65520 and above round to infinity
    else if (size < 0x38800000u)  // below the smallest normal half: a sum with 0.5 leaves the rounded
                                  // multiple of 2^-24
        p->bits = sign | (uint16_t)(__builtin_bit_cast(uint32_t, __builtin_bit_cast(float, size) + 0.5f) -
                                    0x3F000000u);
    else
        p->bits = sign | (uint16_t)((size - 0x38000000u + 0xFFF + (size >> 13 & 1)) >> 13);
#endif
}
static INLINE vf load_wide(const f16* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps((__m256i)load<vh>(p));
#elif defined(__AVX__) && defined(__F16C__)
    return (vf)_mm256_cvtph_ps((__m128i)load<vh>(p));
#else
    vf v;
    for (int i = 0; i < LANES; i++)
        v[i] = widen(p[i]);
    return v;
#endif
}
static INLINE void store_narrow(vf v, f16* p) {
#if defined(__AVX512F__)
    store(p, (vh)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < LANES; i++)
        narrow(v[i], p + i);
#endif
}
static INLINE vf rounded(vf v, const f16*) {
    f16 narrowed[LANES];
    store_narrow(v, narrowed);
    return load_wide(narrowed);
}
// The first `count` lanes only.
template <class T> static INLINE void store_some(vf v, T* p, int count) {
    for (int i = 0; i < count; i++)
        narrow(v[i], p + i);
}

// In a tree, the upper half added to the lower.
static INLINE float sum_of_lanes(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float lanes[LANES];
    store(lanes, v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            lanes[i] += lanes[i + half];
    return lanes[0];
#endif
}
static INLINE float max_of_lanes(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float max = v[0];
    for (int i = 1; i < LANES; i++)
        max = v[i] > max ? v[i] : max;
    return max;
#endif
}

// exp to about 2 ulp: 2^n times a polynomial in the rest (Cephes' expf). Nothing below the smallest normal
// number.
static INLINE vf vexp(vf x) {
#if defined(__AVX512F__)
    // Of a NaN and a number, these return the second.
    x = (vf)_mm512_max_ps((__m512)splat(-87.33f), _mm512_min_ps((__m512)splat(89.f), (__m512)x));
    vf n = (vf)_mm512_roundscale_ps((__m512)(x * splat(1.44269504088896341f)),
                                    _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf r = x - n * splat(0.693359375f) - n * splat(-2.12194440e-4f);
#else
    vf clamped = choose(x > splat(88.37f), splat(88.37f), x);
    vf n = (clamped * splat(1.44269504088896341f) + splat(12582912.f)) - splat(12582912.f);
    n = choose(x < splat(-87.33f), splat(0.f), n);
    vf r = clamped - n * splat(0.693359375f) - n * splat(-2.12194440e-4f);
#endif
    vf p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.f);
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    vf scale = (vf)((__builtin_convertvector(n, vi) + 127) << 23);
    return choose(x < splat(-87.33f), splat(0.f), p * scale);
#endif
}
static INLINE vf vsigmoid(vf x) { return splat(1.f) / (splat(1.f) + vexp(-x)); }
static INLINE vf verf(vf x) {
    vf r = {};
    for (int i = 0; i < LANES; i++)
        r[i] = erff(x[i]);
    return r;
}
static INLINE vf vmin(vf a, float b) { return choose(a > splat(b), splat(b), a); }
static INLINE vf vmax(vf a, float b) { return choose(a < splat(b), splat(b), a); }

enum Activation { SILU, GELU, GELU_TANH, RELU, RELU2, SIGMOID, IDENTITY, SWIGLU_OAI };

struct Act {
    int name;
    float alpha, limit;
};

// act(v) and its derivative, for the activations of one argument.
struct ValueSlope {
    vf value, slope;
};
template <int NAME> static INLINE ValueSlope act_one(vf v) {
    const vf zero = splat(0.f), one = splat(1.f);
    switch (NAME) {
        case SILU: {
            vf s = vsigmoid(v);
            return {v * s, s * (one + v * (one - s))};
        }
        case GELU: {
            vf phi = splat(0.5f) * (one + verf(v * splat(0.70710678118654752f)));
            return {v * phi, phi + v * splat(0.39894228040143268f) * vexp(splat(-0.5f) * v * v)};
        }
        case GELU_TANH: {
            vf s = vsigmoid(splat(1.5957691216057308f) * (v + splat(0.044715f) * v * v * v));
            return {v * s,
                    s + v * s * (one - s) * splat(1.5957691216057308f) * (one + splat(0.134145f) * v * v)};
        }
        case RELU: return {choose(v > zero, v, zero), choose(v > zero, one, zero)};
        case RELU2: {
            vf r = choose(v > zero, v, zero);
            return {r * r, r + r};
        }
        case SIGMOID: {
            vf s = vsigmoid(v);
            return {s, s * (one - s)};
        }
        default: return {v, one};
    }
}

// h = act(gate) * up, or act(gate) for a plain expert.
template <int NAME> static INLINE vf act_forward(const Act& a, vf gate, vf up, bool gated) {
    if (NAME == SWIGLU_OAI) {
        vf g = vmin(gate, a.limit);
        return (vmax(vmin(up, a.limit), -a.limit) + splat(1.f)) * (g * vsigmoid(splat(a.alpha) * g));
    }
    vf value = act_one<NAME>(gate).value;
    return gated ? value * up : value;
}

struct Backward {
    vf h, dgate, dup;
};
template <int NAME> static INLINE Backward act_backward(const Act& a, vf gate, vf up, vf dh, bool gated) {
    const vf one = splat(1.f), zero = splat(0.f);
    if (NAME == SWIGLU_OAI) {
        vf g = vmin(gate, a.limit), u = vmax(vmin(up, a.limit), -a.limit) + one;
        vf s = vsigmoid(splat(a.alpha) * g), act = g * s;
        vf dgate = dh * u * s * (one + splat(a.alpha) * g * (one - s));
        vi inside = (up <= splat(a.limit)) & (up >= splat(-a.limit));
        return {u * act, choose(gate <= splat(a.limit), dgate, zero), choose(inside, dh * act, zero)};
    }
    ValueSlope at_gate = act_one<NAME>(gate);
    if (!gated) return {at_gate.value, dh * at_gate.slope, zero};
    return {at_gate.value * up, dh * up * at_gate.slope, dh * at_gate.value};
}

// Calls body.template operator()<NAME>() with the activation as a constant, so that the choice stands outside
// of loops.
template <class Body> static INLINE void with_activation(int name, Body body) {
    switch (name) {
        case SILU: return body.template operator()<SILU>();
        case GELU: return body.template operator()<GELU>();
        case GELU_TANH: return body.template operator()<GELU_TANH>();
        case RELU: return body.template operator()<RELU>();
        case RELU2: return body.template operator()<RELU2>();
        case SIGMOID: return body.template operator()<SIGMOID>();
        case SWIGLU_OAI: return body.template operator()<SWIGLU_OAI>();
        default: return body.template operator()<IDENTITY>();
    }
}
