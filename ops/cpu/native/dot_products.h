// The products of the MLP's forward over quantised weights, which are read in place, once.
//
// Lanes are positions along k. A sum is one chain of fused multiply-adds for each lane, over k in ascending
// order, and one tree over the lanes, whatever the tile's shape: a token's bits depend on no other token. For
// few tokens weights are widened to float32 in registers, for many into the first cache, four rows at a time.
// x and h are float32, rounded where the MLP over plain weights rounds them.
#pragma once
#include "mlp.h"
#include "quad.h"

template <class Element, class Format> class DotProducts : MLP {
  public:
    using T = Element;
    using Ahead = LinesAhead<3>;
    // So much is prefetched while the task before is computed, and stays in the second cache.
    static constexpr int64_t BYTES_PER_TASK = 64 << 10;

  private:
    using Quad = typename Format::Quad;
    static constexpr int TILE = ACCUMULATORS / QUAD, CHUNK = 8 * TILE, FEW = 4;
    const MLPForward& a;
    const std::vector<ExpertRows>& experts;
    const Format up, down;
    const size_t x_stride, h_stride, made_size;
    float *x, *h, *rows, *made;  // [T, x_stride], [N, h_stride], [N, D], [threads, made_size]

    // sums[i][half][column ..]: the products of QUAD rows of weights and each of n tokens.
    void dots(const Quad& quad, const float* const* token, int n, float* made, float (*sums)[2][LANES],
              int half, int column, Ahead& ahead) const {
        auto go = [&]<int R>(const auto& source, int first, auto& ahead) {
            vf acc[R][QUAD];
            const float* p[R];
            for (int r = 0; r < R; r++)
                p[r] = token[first + r];
            multiply_quad<R>(source, p, ahead, acc);
            for (int r = 0; r < R; r++)
                store(sums[first + r][half] + column, lane_sums(acc[r]));
        };
        if (n <= FEW) {
            with_rows<1, 2, 3, 4>(n, [&]<int R>() {
                constexpr int FIRST = R <= TILE ? R : R / 2;
                go.template operator()<FIRST>(quad, 0, ahead);
                if constexpr (FIRST < R) go.template operator()<R - FIRST>(quad, FIRST, ahead);
            });
            return;
        }
        const MadeQuad source = make_quad(quad, ahead, made);
        NothingAhead nothing;
        for (int i = 0; i < n; i += TILE)
            with_rows<1, 2, 3, 4, 5, 6>(std::min(TILE, n - i), [&]<int R>() {
                go.template operator()<std::min(R, TILE)>(source, i, nothing);
            });
    }

    vf with_bias(vf v, int e, ptrdiff_t base, int n) const {
        if (a.up_bias) {
            const T* bias = (const T*)a.up_bias + (size_t)e * G + base;
            for (int i = 0; i < n; i++)
                v[i] += widen(bias[i * at.step]);
        }
        return rounded(v, (const T*)nullptr);
    }
    // LANES columns of h from column f on, for n sorted rows.
    void finish_up(int e, int row, int f, int n, float (*sums)[2][LANES]) const {
        const int columns = std::min(LANES, F - f);
        const ptrdiff_t base[2] = {at.gate + f * at.step, at.up + f * at.step};
        vf factor[2] = {};
        for (int half = 0; half < halves; half++)
            factor[half] = up.factors(e, [&](int i) { return base[half] + i * at.step; }, columns);
        with_activation(act.name, [&]<int NAME>() {
            for (int i = 0; i < n; i++) {
                vf z[2] = {};
                for (int half = 0; half < halves; half++) {
                    z[half] = with_bias(load<vf>(sums[i][half]) * factor[half], e, base[half], columns);
                    if (row + i < a.saved_rows)
                        store_z((T*)a.z + (size_t)(row + i) * G, base[half], columns, z[half]);
                }
                vf v = rounded(act_forward<NAME>(act, z[0], z[1], gated), (const T*)nullptr);
                for (int l = columns; l < LANES; l++)
                    v[l] = 0.f;
                float* out = h + (row + i) * h_stride;
                for (int l = 0; l < LANES; l++)
                    out[Format::place(f + l)] = v[l];
            }
        });
    }
    void finish_down(int e, int row, int d, int n, float (*sums)[2][LANES]) const {
        const int columns = std::min(LANES, D - d);
        const vf factor = down.factors(e, [&](int i) { return d + i; }, columns);
        for (int i = 0; i < n; i++) {
            const vf v = load<vf>(sums[i][0]) * factor;
            float* out = rows + (size_t)(row + i) * D + d;
            if (columns == LANES)
                store(out, v);
            else
                store_some(v, out, columns);
        }
    }

  public:
    struct Own {
        float* made;
        Own(const DotProducts& products, int thread) : made(products.made + thread * products.made_size) {}
    };

    DotProducts(const MLPForward& a, const std::vector<ExpertRows>& experts)
        : MLP(a.sizes), a(a), experts(experts), up(a.up, G, D, (int)a.sizes.group),
          down(a.down, D, F, (int)a.sizes.group), x_stride(Format::stride_of(D)),
          h_stride(Format::stride_of(F)),
          made_size(Scratch::padded(QUAD * std::max(x_stride, h_stride) * 4) / 4) {}

    size_t bytes() const {
        return Scratch::padded(a.sizes.tokens * x_stride * 4) + Scratch::padded(N * h_stride * 4) +
               a.threads * made_size * 4;
    }
    void place(Scratch& scratch, float* rows) {
        this->rows = rows;
        x = scratch.take<float>(a.sizes.tokens * x_stride);
        h = scratch.take<float>(N * h_stride);
        made = scratch.take<float>(a.threads * made_size);
    }

    int64_t num_gathers() const { return a.sizes.tokens; }
    void gather(int64_t t) const { Format::place_row((const T*)a.x + t * D, D, x + t * x_stride); }

    template <bool UP> int columns_of_step() const { return LANES; }
    template <bool UP> int64_t bytes_of_step() const {
        return LANES * (UP ? halves * up.row_bytes() : down.row_bytes());
    }
    template <bool UP> Ahead ahead(const ForwardTask& task) const {
        return weights_of<UP, Ahead>(task, experts[task.expert].id, up, down);
    }
    template <bool UP> void run(const ForwardTask& task, Own& own, Ahead ahead) const {
        const ExpertRows& expert = experts[task.expert];
        const int columns = UP ? F : D, e = expert.id, end = expert.first + expert.count;
        const Format& weight = UP ? up : down;
        ahead.over((int64_t)(task.end - task.begin) * (UP ? halves : 1) * weight.row_bytes() /
                   (QUAD * LANES));
        alignas(64) float sums[CHUNK][2][LANES];
        const float* token[CHUNK];
        for (int c = task.begin; c < task.end; c += LANES)
            for (int row = expert.first; row < end; row += CHUNK) {
                const int n = std::min(CHUNK, end - row);
                for (int i = 0; i < n; i++)
                    token[i] = UP ? x + a.order[row + i] / K * x_stride : h + (row + i) * h_stride;
                for (int half = 0; half < (UP ? halves : 1); half++)
                    for (int q = 0; q < LANES && c + q < columns; q += QUAD) {
                        auto row_of = [&](int i) -> ptrdiff_t {
                            const int column = std::min(c + q + i, columns - 1);
                            return UP ? (half ? at.up : at.gate) + column * at.step : column;
                        };
                        dots(weight.quad(e, row_of), token, n, own.made, sums, half, q, ahead);
                    }
                if constexpr (UP)
                    finish_up(e, row, c, n, sums);
                else
                    finish_down(e, row, c, n, sums);
            }
    }
};
