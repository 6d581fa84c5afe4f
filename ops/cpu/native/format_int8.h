// Weights of int8 [E, rows, k] with one float32 scale for each row [E, rows]:
//
//   W[r][i] = scale[r] * q[r][i]
#pragma once
#include "columns.h"
#include "dot_products.h"

struct Int8 {
    template <class M> using Forward = DotProducts<typename M::T, Int8>;
    template <class M> using BackwardMac = MacF32;
    using Columns = WidenedColumns<Int8>;
    static constexpr bool HAS_BACKWARD = true, HAS_GRADIENT = false;
    static constexpr int MOST_GROUP = 1;

    const uint8_t* values;
    const float* scales;
    const int rows, k;

    Int8(const Weight& weight, int rows, int k, int)
        : values((const uint8_t*)weight.values), scales((const float*)weight.scales), rows(rows), k(k) {}

    // The order of the activations in memory, rows of float32 that begin `stride_of` apart.
    static constexpr int place(int i) { return i; }
    static size_t stride_of(int k) {
        return ((((size_t)k + LANES - 1) / LANES * LANES * 4 + 63) / 64 | 1) * 64 / 4;
    }
    template <class T> static void place_row(const T* from, int k, float* to) {
        int i = 0;
        for (; i + LANES <= k; i += LANES)
            store(to + i, load_wide(from + i));
        if (i == k) return;
        T rest[LANES] = {};
        memcpy((void*)rest, from + i, (k - i) * sizeof(T));
        store(to + i, load_wide(rest));
    }

    // Four rows of q; the sums of their products are multiplied by the scales.
    struct Quad {
        static constexpr int VECTORS = 1;
        const uint8_t* row[QUAD];
        int k;

        int spans() const { return 1; }
        int steps() const { return k / LANES; }
        int left() const { return k % LANES; }
        int vectors() const { return (k + LANES - 1) / LANES; }
        struct Span {
            const Quad& quad;
            INLINE void load(int c, int step, vf (&w)[1]) const {
                w[0] = __builtin_convertvector(widen_signed(quad.row[c] + step * LANES), vf);
            }
        };
        INLINE Span enter(int) const { return {*this}; }
        INLINE vf load_last(int c) const {
            uint8_t rest[LANES] = {};
            memcpy(rest, row[c] + k - left(), left());
            return __builtin_convertvector(widen_signed(rest), vf);
        }
    };
    size_t row_bytes() const { return k; }
    const uint8_t* row(int e, ptrdiff_t r) const { return values + ((size_t)e * rows + r) * k; }
    float scale(int e, ptrdiff_t r) const { return scales[(size_t)e * rows + r]; }
    template <class RowOf> Quad quad(int e, RowOf row_of) const {
        Quad quad;
        quad.k = k;
        for (int i = 0; i < QUAD; i++)
            quad.row[i] = row(e, row_of(i));
        return quad;
    }
    // The factors of the sums of n rows.
    template <class RowOf> vf factors(int e, RowOf row_of, int n) const {
        vf v = {};
        for (int i = 0; i < n; i++)
            v[i] = scale(e, row_of(i));
        return v;
    }
    // Adds n neighbouring rows.
    template <class Ahead> void look_ahead(int e, ptrdiff_t r, int n, Ahead& ahead) const {
        ahead.add(row(e, r), n * row_bytes());
    }

    // Elements [begin, end) of a row of W as float32.
    void widen_row(int e, ptrdiff_t r, int begin, int end, float* to) const {
        const uint8_t* q = row(e, r);
        const float scale = this->scale(e, r);
        for (int i = begin; i < end; i++)
            *to++ = (float)(int8_t)q[i] * scale;
    }
    Columns columns(int e, const RowOrder& order, int begin, int cols) const {
        return {this, e, order, begin, cols};
    }
    int group_size() const { return 1; }
};
