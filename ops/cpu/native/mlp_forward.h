// Forward of the gated and the plain MLP.
//
//   z = x Wup (+ b), h = act(z), row = h Wdown, y_t = sum_j w row
//
// Lanes are tokens in both products. Weights are read as they lie in memory, once per tile of tokens and from L2 but for
// the first; h comes out of the first product in the very order in which the second reads it.
#pragma once
#include "layer.h"

// z gets rows [first_row, saved_rows) of the pre-activations, or more. Without y, that is all that is computed, with the plan
// as it is given; with y, first_row is 0 and the plan is made here.
struct MLPForward {
    const void *x, *up, *down, *up_bias, *down_bias;
    const int64_t* experts;
    const float* weights;
    void *y, *z;
    int32_t *order, *offsets;
    int64_t tokens, top_k, num_experts, hidden, inner, up_rows, gate, up_from, step, gated, first_row, saved_rows, threads;
    int64_t activation;
    double alpha, limit;
};

template <class M> class ForwardPass {
    using T = typename M::T;
    using U = typename M::U;
    static constexpr int ONE = ACCUMULATORS, TWO = ACCUMULATORS / 2;  // rows of weights in a tile of one or two vectors
    const MLPForward& a;
    const int D, F, G, E;
    const GateUp at;
    const Act act;
    std::vector<Tile> tiles;
    std::vector<int> first_tile;
    size_t lanes = 0;

    void cut_into_tiles() {
        for (int e = 0; e < E; e++) {
            first_tile.push_back((int)tiles.size());
            for (int start = a.offsets[e]; start < a.offsets[e + 1];) {
                const int left = a.offsets[e + 1] - start, wide = left > LANES ? 2 * LANES : LANES;
                if (start + std::min(left, wide) > a.first_row) {
                    tiles.push_back({e, start, std::min(left, wide), wide, lanes});
                    lanes += wide;
                }
                start += wide;
            }
        }
        first_tile.push_back((int)tiles.size());
    }

    void pack(const Tile& t, U* panel) const {
        const T* rows[2 * LANES];
        for (int i = 0; i < t.rows; i++) rows[i] = (const T*)a.x + (size_t)(a.order[t.start + i] / a.top_k) * D;
        for (size_t u = 0; u < units<M>(D); u++) {
            for (int i = 0; i < t.rows; i++) panel[u * t.lanes + i] = M::unit(rows[i] + u * M::PER, std::min(M::PER, D - (int)u * M::PER));
            for (int i = t.rows; i < t.lanes; i++) panel[u * t.lanes + i] = 0;
        }
    }

    template <int R, int C> void store_z(const Tile& t, int f0, int n, const vf (&acc)[R][C]) const {
        float lanes_of[R][C * LANES];
        memcpy(lanes_of, acc, sizeof(lanes_of));
        const int rows = std::min<int64_t>(t.rows, a.saved_rows - t.start), in_first = a.gated ? n : std::min(n, R);
        for (int i = 0; i < rows; i++) {
            T* z = (T*)a.z + (size_t)(t.start + i) * G + f0 * at.step;
            for (int r = 0; r < in_first; r++) narrow(lanes_of[r][i], z + at.gate + r * at.step);
            if (a.gated)
                for (int r = 0; r < n; r++) narrow(lanes_of[R / 2 + r][i], z + at.up + r * at.step);
        }
    }

    // Rows f0 .. f0 + n of h into the panel that the down-projection reads.
    template <int R, int C> void store_h(U* panel, int f0, int n, const vf (&h)[R][C]) const {
        if constexpr (M::PER == 2)
            for (int r = 0; r < n; r += 2)
                for (int c = 0; c < C; c++) {
                    vu odd = r + 1 < n ? round_to_bf16(h[r + 1][c]) & 0xFFFF0000u : vu{};
                    store(panel + ((size_t)(f0 + r) / 2 * C + c) * LANES, (round_to_bf16(h[r][c]) >> 16) | odd);
                }
        else
            for (int r = 0; r < n; r++)
                for (int c = 0; c < C; c++) store(panel + ((size_t)(f0 + r) * C + c) * LANES, rounded(h[r][c], (const T*)nullptr));
    }

    // Columns f0 .. f0 + n of h for one tile of tokens. R accumulator rows: gate and up halves, or 2 R / 2 plain rows.
    template <int R, int C> void up_tile(const Tile& t, const U* x, U* h, int f0, int n, ptrdiff_t ahead) const {
        constexpr int H = R / 2;
        const T* w = (const T*)a.up + (size_t)t.expert * G * D;
        const ptrdiff_t second = a.gated ? at.up + f0 * at.step : f0 + H;
        const ptrdiff_t first = at.gate + f0 * at.step;
        vf acc[R][C];
        two_runs<M, R, C>(w + first * D, w + second * D, at.step * D, ahead * at.step * D, std::min(n, H), a.gated ? n : n - H, x, D, acc);
        if (a.up_bias) {
            const T* b = (const T*)a.up_bias + (size_t)t.expert * G;
            for (int r = 0; r < R; r++) {
                const int in_run = r < H ? r : r - H;
                if ((r < H || a.gated ? in_run : r) >= n) continue;
                const vf bias = splat(widen(b[(r < H ? first : second) + in_run * at.step]));
                for (int c = 0; c < C; c++) acc[r][c] += bias;
            }
        }
        for (auto& row : acc)
            for (vf& v : row) v = rounded(v, (const T*)nullptr);
        if (t.start < a.saved_rows) store_z(t, f0, n, acc);
        with_activation(act.name, [&]<int NAME>() {
            for (int r = 0; r < (a.gated ? H : R); r++)
                for (int c = 0; c < C; c++) acc[r][c] = act_forward<NAME>(act, acc[r][c], acc[a.gated ? H + r : r][c], a.gated);
        });
        store_h(h, f0, n, acc);
    }

    template <int R, int C> void down_tile(const Tile& t, const U* h, float* rows, int d0, int n, ptrdiff_t ahead) const {
        constexpr int H = R / 2;
        const T* w = (const T*)a.down + ((size_t)t.expert * D + d0) * F;
        vf acc[R][C];
        two_runs<M, R, C>(w, w + (size_t)H * F, F, ahead * F, std::min(n, H), n - H, h, F, acc);
        float out[R][C * LANES];
        memcpy(out, acc, sizeof(out));
        for (int i = 0; i < t.rows; i++)
            for (int r = 0; r < n; r++) rows[(size_t)(t.start + i) * D + d0 + r] = out[r][i];
    }

    // Rows of weights in one task: about 256 KiB, so that they stay in L2 for the expert's further tiles.
    static int rows_per_task(int rows, size_t row_bytes) {
        const int block = std::max<int>(1, (256 << 10) / std::max<size_t>(row_bytes, 1) / ONE) * ONE;
        return std::min(block, (std::max(rows, 1) + ONE - 1) / ONE * ONE);
    }

    // Runs body(tile, begin, rows, ahead) over the weights' rows in steps of a tile; `ahead` is where the next rows to come
    // from memory stand. Only an expert's first tile of tokens needs them from there.
    template <class Body> void sweep(int64_t task, int rows, int block, int narrow_step, int wide_step, Body body) const {
        const int blocks = (rows + block - 1) / block;
        const int e = (int)(task / blocks), begin = (int)(task % blocks) * block, end = std::min(begin + block, rows);
        for (int i = first_tile[e]; i < first_tile[e + 1]; i++) {
            const Tile& t = tiles[i];
            const int step = t.lanes == LANES ? narrow_step : wide_step;
            for (int r = begin; r < end; r += step) {
                const bool more = r + step < end;
                const ptrdiff_t ahead = i > first_tile[e] ? 0 : more ? step : (ptrdiff_t)a.threads * (end - begin) - (r - begin);
                body(t, r, std::min(step, end - r), ahead);
            }
        }
    }

  public:
    explicit ForwardPass(const MLPForward& a)
        : a(a), D(a.hidden), F(a.inner), G(a.up_rows), E(a.num_experts), at{(ptrdiff_t)a.gate, (ptrdiff_t)a.up_from, (ptrdiff_t)a.step},
          act{(int)a.activation, (float)a.alpha, (float)a.limit} {}

    void run() {
        const int N = a.tokens * a.top_k;
        if (a.y) make_plan(a.experts, N, E, a.order, a.offsets);
        const Plan plan{E, (int)a.top_k, a.order, a.offsets};
        cut_into_tiles();
        const size_t xu = units<M>(D), hu = units<M>(F);
        Scratch scratch(Scratch::padded(lanes * xu * sizeof(U)) + Scratch::padded(lanes * hu * sizeof(U)) +
                        Scratch::padded((size_t)N * D * sizeof(float)) + Scratch::padded((size_t)N * sizeof(int32_t)));
        U* x = scratch.take<U>(lanes * xu);
        U* h = scratch.take<U>(lanes * hu);
        float* rows = scratch.take<float>((size_t)N * D);
        int32_t* position = scratch.take<int32_t>(N);
        invert(plan, N, position);
        const int up_block = rows_per_task(F, (a.gated ? 2 : 1) * (size_t)D * sizeof(T)), down_block = rows_per_task(D, (size_t)F * sizeof(T));
        Tasks packing, up, down, combining;
#pragma omp parallel num_threads(a.threads)
        {
            packing.run(tiles.size(), [&](int64_t i) { pack(tiles[i], x + tiles[i].panel * xu); });
#pragma omp barrier
            const int plain = a.gated ? 1 : 2;
            up.run((int64_t)E * ((F + up_block - 1) / up_block), [&](int64_t task) {
                sweep(task, F, up_block, plain * ONE / 2, plain * TWO / 2, [&](const Tile& t, int f0, int n, ptrdiff_t ahead) {
                    const U* panel = x + t.panel * xu;
                    if (t.lanes == LANES) up_tile<ONE, 1>(t, panel, h + t.panel * hu, f0, n, ahead);
                    else up_tile<TWO, 2>(t, panel, h + t.panel * hu, f0, n, ahead);
                });
            });
            if (a.y) {
#pragma omp barrier
                down.run((int64_t)E * ((D + down_block - 1) / down_block), [&](int64_t task) {
                    sweep(task, D, down_block, ONE, TWO, [&](const Tile& t, int d0, int n, ptrdiff_t ahead) {
                        const U* panel = h + t.panel * hu;
                        if (t.lanes == LANES) down_tile<ONE, 1>(t, panel, rows, d0, n, ahead);
                        else down_tile<TWO, 2>(t, panel, rows, d0, n, ahead);
                    });
                });
#pragma omp barrier
                combining.run(a.tokens, [&](int64_t t) {
                    combine<T>(rows, position, a.experts, a.weights, (const T*)a.down_bias, (int)t, a.top_k, D, (T*)a.y);
                });
            }
        }
    }
};
