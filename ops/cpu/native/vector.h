// Vectors of float32, element types. The code uses GCC's vector extension, so one source serves
// AVX-512, AVX2, SSE and NEON. Intrinsics are only used where the compiler's code for the extension is slow.
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

// The nearest bfloat16, ties to even; NaNs stay NaNs. AVX-512 treats numbers below 1.2e-38 as zeros.
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
// A pair of bfloat16, the even one in the lower half.
static INLINE vu pair_of_bf16(vf even, vf odd) {
    return __builtin_convertvector(nearest_bf16(even), vu) |
           (__builtin_convertvector(nearest_bf16(odd), vu) << 16);
}

static INLINE float widen(float v) { return v; }
static INLINE float widen(bf16 v) { return __builtin_bit_cast(float, (uint32_t)v.bits << 16); }
static INLINE void narrow(float v, float* p) { *p = v; }
static INLINE void narrow(float v, bf16* p) {
    uint32_t u = __builtin_bit_cast(uint32_t, v);
    u = v == v ? u + 0x7FFF + ((u >> 16) & 1) : u | 0x400000;
    p->bits = (uint16_t)(u >> 16);
}
static INLINE vf load_wide(const float* p) { return load<vf>(p); }
static INLINE vf load_wide(const bf16* p) { return (vf)(__builtin_convertvector(load<vh>(p), vu) << 16); }
static INLINE void store_narrow(vf v, float* p) { store(p, v); }
static INLINE void store_narrow(vf v, bf16* p) { store(p, nearest_bf16(v)); }
// IEEE's half precision, by instructions where the machine has them.
static INLINE float widen(f16 v) {
#if defined(__F16C__)
    return _cvtsh_ss(v.bits);
#else
    // The exponents differ by 112; a product changes them, also those of subnormal numbers.
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
    else if (size < 0x38800000u)
        // Below the smallest normal half; adding 0.5 leaves the rounded multiple of 2^-24.
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
// Stores only the first `count` lanes.
template <class T> static INLINE void store_some(vf v, T* p, int count) {
    for (int i = 0; i < count; i++)
        narrow(v[i], p + i);
}

// A tree: the upper half is added to the lower.
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

// exp to about 2 ulp: 2^n times a polynomial in the rest (Cephes' expf). No result is subnormal.
static INLINE vf vexp(vf x) {
#if defined(__AVX512F__)
    // Of a NaN and a number, these instructions return the second.
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
