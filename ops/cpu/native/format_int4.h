// Weights of four bits [E, rows, k], two in a byte, the even one in the lower half. Each `group` of a row has
// a float32 scale and may have a zero point of one byte [E, rows, k / group]; without one it is 8:
//
//   W[r][i] = scale[r][i / group] * (q[r][i] - zero[r][i / group])
//
// A step takes LANES bytes: first their even values, then their odd ones, as do the activations.
#pragma once
#include "columns.h"
#include "dot_products.h"

struct Int4 {
    template <class M> using Forward = DotProducts<typename M::T, Int4>;
    template <class M> using BackwardMac = MacF32;
    using Columns = WidenedColumns<Int4>;
    static constexpr bool HAS_BACKWARD = true, HAS_GRADIENT = false;
    static constexpr int STEP = 2 * LANES, MOST_GROUP = 128;

    const uint8_t* values;
    const float* scales;
    const uint8_t* zeros;
    const int rows, k, group;

    Int4(const Weight& weight, int rows, int k, int group)
        : values((const uint8_t*)weight.values), scales((const float*)weight.scales),
          zeros((const uint8_t*)weight.zeros), rows(rows), k(k), group(group) {}

    // The order of the activations in memory, rows of float32 that begin `stride_of` apart.
    static constexpr int place(int i) { return i / STEP * STEP + i % 2 * LANES + i % STEP / 2; }
    static size_t stride_of(int k) { return ((size_t)k * 4 / 64 | 1) * 64 / 4; }
    template <class T> static void place_row(const T* from, int k, float* to) {
        for (int i = 0; i < k; i++)
            to[place(i)] = widen(from[i]);
    }

    // Four rows of W. Its elements are rounded once, as products of the difference and the scale. With
    // vectors of 16 they are looked up in a table of the 16 values of a group.
    struct Quad {
        static constexpr int VECTORS = 2;
        const uint8_t* row[QUAD];
        const float* scale[QUAD];
        const uint8_t* zero[QUAD];
        int k, group;

        int spans() const { return k / group; }
        int steps() const { return group / STEP; }
        static constexpr int left() { return 0; }
        int vectors() const { return k / LANES; }
        struct Span {
            const Quad& quad;
            int byte;
#if defined(__AVX512F__)
            vf table[QUAD];
            INLINE void start(int c, float scale, float zero) {
                constexpr vf ascending = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
                table[c] = (ascending - splat(zero)) * splat(scale);
            }
            INLINE void load(int c, int step, vf (&w)[2]) const {
                const __m512i q = (__m512i)widen_unsigned(quad.row[c] + byte + step * LANES);
                w[0] = (vf)_mm512_permutexvar_ps(q, (__m512)table[c]);
                w[1] = (vf)_mm512_permutexvar_ps(_mm512_srli_epi32(q, 4), (__m512)table[c]);
            }
#else
            float scale[QUAD], zero[QUAD];
            INLINE void start(int c, float s, float z) {
                scale[c] = s;
                zero[c] = z;
            }
            INLINE void load(int c, int step, vf (&w)[2]) const {
                const vi q = widen_unsigned(quad.row[c] + byte + step * LANES);
                w[0] = (__builtin_convertvector(q & 15, vf) - splat(zero[c])) * splat(scale[c]);
                w[1] = (__builtin_convertvector(q >> 4, vf) - splat(zero[c])) * splat(scale[c]);
            }
#endif
        };
        INLINE Span enter(int span) const {
            Span s{*this, span * group / 2, {}};
            for (int c = 0; c < QUAD; c++)
                s.start(c, scale[c][span], zero[c] ? zero[c][span] : 8.f);
            return s;
        }
        INLINE vf load_last(int) const { return vf{}; }
    };
    size_t row_bytes() const { return k / 2; }
    const uint8_t* row(int e, ptrdiff_t r) const { return values + ((size_t)e * rows + r) * row_bytes(); }
    size_t first_group(int e, ptrdiff_t r) const { return ((size_t)e * rows + r) * (k / group); }
    template <class RowOf> Quad quad(int e, RowOf row_of) const {
        Quad quad;
        quad.k = k;
        for (int i = 0; i < QUAD; i++) {
            const ptrdiff_t r = row_of(i);
            const size_t first = first_group(e, r);
            quad.row[i] = row(e, r);
            quad.scale[i] = scales + first;
            quad.zero[i] = zeros ? zeros + first : nullptr;
        }
        quad.group = group;
        return quad;
    }
    // The factors of the sums of n rows: none, because W contains the scales.
    template <class RowOf> vf factors(int, RowOf, int) const { return splat(1.f); }
    // Adds n neighbouring rows.
    template <class Ahead> void look_ahead(int e, ptrdiff_t r, int n, Ahead& ahead) const {
        ahead.add(row(e, r), n * row_bytes());
        ahead.add(scales + first_group(e, r), (size_t)n * (k / group) * sizeof(float));
    }

    // Elements [begin, end) of a row of W as float32: whole groups.
    void widen_row(int e, ptrdiff_t r, int begin, int end, float* __restrict to) const {
        const uint8_t* q = row(e, r) + begin / 2;
        for (int i = begin; i < end;) {
            const size_t g = first_group(e, r) + i / group;
            const float scale = scales[g], zero = zeros ? zeros[g] : 8.f;
            const int stop = std::min(end, (i / group + 1) * group), bytes = (stop - i) / 2;
            for (int b = 0; b < bytes; b++) {
                to[2 * b] = ((float)(q[b] & 15) - zero) * scale;
                to[2 * b + 1] = ((float)(q[b] >> 4) - zero) * scale;
            }
            q += bytes;
            to += 2 * bytes;
            i = stop;
        }
    }
    Columns columns(int e, const RowOrder& order, int begin, int cols) const {
        return {this, e, order, begin, cols};
    }
    int group_size() const { return group; }
};
