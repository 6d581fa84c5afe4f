// The products of the MLP's forward over plain weights and over panels.
//
// The rows of an expert are cut into tiles of two kinds. In a tile of one or two whole vectors, lanes are
// tokens: a weight is broadcast, and nothing is rearranged. In others, and with packed panels, lanes are
// columns: LANES rows of weights at a time are transposed into a panel, and tokens are broadcast. An element
// is the same chain of multiply-adds in both, so its bits do not depend on the kind of tile.
#pragma once
#include <span>
#include "mlp.h"
#include "panel.h"

template <class Format> class PanelProducts : MLP {
    using M = typename Format::Mac;
    using U = typename M::U;

  public:
    using T = typename M::T;
    using Ahead = LinesAhead<2>;
    static constexpr int64_t BYTES_PER_TASK = 256 << 10;

  private:
    // Rows of weights in a tile of one vector of tokens, and of two. Both divide PANEL.
    static constexpr int ONE = std::min(PANEL, ACCUMULATORS * 2 / 3), TWO = std::min(PANEL, ACCUMULATORS / 3);
    static_assert(PANEL % ONE == 0 && PANEL % TWO == 0);

    // Rows of one expert that are computed together. Where lanes are tokens, `lanes` is one vector or two;
    // where lanes are columns it is 0, and there are at most MOST_ROWS rows.
    struct Tile {
        int start, rows, lanes;
        size_t x, h;  // where its x and its h begin
    };
    const MLPForward& a;
    const std::vector<ExpertRows>& experts;
    const Format up, down;
    const int xu, hu;                 // units of a row of x and of h
    const size_t x_stride, h_stride;  // units from row to row, where lanes are columns
    U *x, *h;
    float* rows;  // [N, D]
    std::vector<Tile> tiles;
    std::vector<size_t> first_tile;  // of each expert, and their number
    size_t x_size = 0, h_size = 0;

    // An odd number of whole cache lines, in units, so that rows do not share cache sets.
    static size_t stride_of(int columns) {
        const size_t padded = ((size_t)columns + PANEL - 1) / PANEL * PANEL / M::PER, line = 64 / sizeof(U);
        return ((padded + line - 1) / line | 1) * line;
    }

    void add_tile(int start, int rows, int lanes) {
        tiles.push_back({start, rows, lanes, x_size, h_size});
        x_size += lanes ? lanes * (size_t)xu : rows * x_stride;
        h_size += lanes ? lanes * (size_t)hu : rows * h_stride;
    }
    void cut_into_tiles(int start, int left) {
        if (Format::ARE_PANELS) {
            for (int count = (left + MOST_ROWS - 1) / MOST_ROWS; count > 0; count--) {
                const int rows = left / count;  // as equal as can be
                add_tile(start, rows, 0);
                start += rows;
                left -= rows;
            }
            return;
        }
        for (; left > LANES + MOST_ROWS; start += 2 * LANES, left -= 2 * LANES)
            add_tile(start, std::min(left, 2 * LANES), 2 * LANES);
        if (left > MOST_ROWS) {
            add_tile(start, std::min(left, LANES), LANES);
            start += LANES;
            left -= LANES;
        }
        for (; left > 0; start += MOST_ROWS, left -= MOST_ROWS)
            add_tile(start, std::min(left, MOST_ROWS), 0);
    }
    std::span<const Tile> tiles_of(int expert) const {
        return {tiles.data() + first_tile[expert], first_tile[expert + 1] - first_tile[expert]};
    }
    const T* x_row(int row) const { return (const T*)a.x + (size_t)(a.order[row] / K) * D; }

    void add_bias(int e, ptrdiff_t base, int n, vf* to, int stride) const {
        const T* b = (const T*)a.up_bias + (size_t)e * G + base;
        for (int i = 0; i < n; i++)
            to[i * stride] += splat(widen(b[i * at.step]));
    }

    // Lanes are tokens: columns f .. f + n of h. The R accumulators are gate rows, then their up rows, or
    // plain rows.
    template <int R, int C> void finish_up_lanes(int e, const Tile& t, int f, int n, vf (&acc)[R][C]) const {
        constexpr int H = R / 2;
        const ptrdiff_t first = at.gate + f * at.step, second = gated ? at.up + f * at.step : first + H;
        const int n0 = std::min(n, gated ? H : R), n1 = gated ? n0 : 0;
        for (int c = 0; c < C; c++) {
            if (a.up_bias) {
                add_bias(e, first, n0, &acc[0][c], C);
                if (n1) add_bias(e, second, n1, &acc[H][c], C);
            }
            for (auto& row : acc)
                row[c] = rounded(row[c], (const T*)nullptr);
            const int saved = (int)std::min<int64_t>(
                {LANES, t.rows - c * LANES, a.saved_rows - t.start - c * LANES});
            T* z = (T*)a.z + (size_t)(t.start + c * LANES) * G;
            if (saved <= 0) continue;
            if constexpr (H <= LANES / 2) {
                vf v[LANES] = {};  // columns of the first half, from LANES / 2 on of the second
                for (int r = 0; r < H; r++) {
                    v[r] = acc[r][c];
                    v[LANES / 2 + r] = acc[H + r][c];
                }
                transpose(v);
                for (int i = 0; i < saved; i++)
                    store_z_halves<H>(z + (size_t)i * G, first, second, n, v[i]);
            } else
                for (int i = 0; i < saved; i++)
                    for (int r = 0; r < R; r++) {
                        const bool in_second = r >= H && gated;
                        const int column = in_second ? r - H : r;
                        if (column < n)
                            narrow(acc[r][c][i],
                                   z + (size_t)i * G + (in_second ? second : first) + column * at.step);
                    }
        }
        with_activation(act.name, [&]<int NAME>() {
            for (int r = 0; r < (gated ? H : R); r++)
                for (int c = 0; c < C; c++)
                    acc[r][c] = act_forward<NAME>(act, acc[r][c], acc[gated ? H + r : r][c], gated);
        });
        U* out = h + t.h;
        for (int r = 0; r < n; r += M::PER)
            for (int c = 0; c < C; c++) {
                if constexpr (M::PER == 2)
                    store(out + ((size_t)(f + r) / 2 * C + c) * LANES,
                          pair_of_bf16(acc[r][c], r + 1 < n ? acc[r + 1][c] : vf{}));
                else
                    store(out + ((size_t)(f + r) * C + c) * LANES, rounded(acc[r][c], (const T*)nullptr));
            }
    }
    // z of one token: v holds H columns of the first half, and from lane LANES / 2 on of the second; n exist.
    template <int H> void store_z_halves(T* z, ptrdiff_t first, ptrdiff_t second, int n, vf v) const {
        if (at.step == 1 && n >= (gated ? H : 2 * H)) {
            T narrowed[LANES];
            store_narrow(v, narrowed);
            memcpy((void*)(z + first), narrowed, H * sizeof(T));
            memcpy((void*)(z + second), narrowed + LANES / 2, H * sizeof(T));
            return;
        }
        for (int i = 0; i < std::min(n, H); i++)
            narrow(v[i], z + first + i * at.step);
        for (int i = 0; i < (gated ? n : n - H); i++)
            narrow(v[LANES / 2 + i], z + second + i * at.step);
    }
    template <int R, int C> void up_lanes(int e, const Tile& t, int f, int n, Ahead& ahead) const {
        constexpr int H = R / 2;
        const T* row[R];
        for (int r = 0; r < R; r++) {
            const bool in_second = gated && r >= H;
            const int column = f + std::min(in_second ? r - H : r, n - 1);
            row[r] = up.row(e, (in_second ? at.up : at.gate) + column * at.step);
        }
        vf acc[R][C];
        lanes_tile<M, R, C>([&](int r) { return row[r]; }, x + t.x, D, ahead, acc);
        finish_up_lanes<R, C>(e, t, f, n, acc);
    }
    template <int R, int C> void down_lanes(int e, const Tile& t, int d, int n, Ahead& ahead) const {
        const T* row[R];
        for (int r = 0; r < R; r++)
            row[r] = down.row(e, d + std::min(r, n - 1));
        vf acc[R][C];
        lanes_tile<M, R, C>([&](int r) { return row[r]; }, h + t.h, F, ahead, acc);
        for (int c = 0; c < C; c++) {
            vf v[LANES] = {};
            for (int r = 0; r < std::min(R, LANES); r++)
                v[r] = acc[r][c];
            transpose(v);
            for (int i = 0; i < std::min(LANES, t.rows - c * LANES); i++) {
                float* out = rows + (size_t)(t.start + c * LANES + i) * D + d;
                if (n == R)
                    memcpy(out, &v[i], std::min(R, LANES) * sizeof(float));
                else
                    store_some(v[i], out, std::min(n, LANES));
            }
        }
        for (int r = LANES; r < std::min(n, R); r++)
            for (int i = 0; i < t.rows; i++)
                rows[(size_t)(t.start + i) * D + d + r] = acc[r][i / LANES][i % LANES];
    }

    // Lanes are columns: columns f .. of h for a tile's rows.
    void finish_up_rows(int e, const Tile& t, int f, vf (*acc)[2]) const {
        const int n0 = std::clamp(F - f, 0, LANES), n1 = gated ? n0 : std::clamp(F - f - LANES, 0, LANES);
        const ptrdiff_t first = at.gate + f * at.step, second = gated ? at.up + f * at.step : first + LANES;
        vf b0 = {}, b1 = {};
        if (a.up_bias) {
            const T* b = (const T*)a.up_bias + (size_t)e * G;
            for (int i = 0; i < n0; i++)
                b0[i] = widen(b[first + i * at.step]);
            for (int i = 0; i < n1; i++)
                b1[i] = widen(b[second + i * at.step]);
        }
        with_activation(act.name, [&]<int NAME>() {
            for (int r = 0; r < t.rows; r++) {
                const vf z0 = rounded(acc[r][0] + b0, (const T*)nullptr),
                         z1 = rounded(acc[r][1] + b1, (const T*)nullptr);
                if (t.start + r < a.saved_rows) {
                    T* z = (T*)a.z + (size_t)(t.start + r) * G;
                    store_z(z, first, n0, z0);
                    store_z(z, second, n1, z1);
                }
                U* out = h + t.h + r * h_stride;
                store_h(out, f, n0, act_forward<NAME>(act, z0, z1, gated));
                if (!gated) store_h(out, f + LANES, n1, act_forward<NAME>(act, z1, z1, false));
            }
        });
    }
    // Rows of h are padded with zeros to whole panels.
    static void store_h(U* row, int f, int n, vf v) {
        for (int i = n; i < LANES; i++)
            v[i] = 0.f;
        if constexpr (M::PER == 2)
            store_narrow(v, (T*)row + f);
        else
            store(row + f, rounded(v, (const T*)nullptr));
    }
    void finish_down_rows(const Tile& t, int d, vf (*acc)[2]) const {
        for (int r = 0; r < t.rows; r++) {
            float* out = rows + (size_t)(t.start + r) * D + d;
            for (int c = 0; c < 2; c++)
                if (d + (c + 1) * LANES <= D)
                    store(out + c * LANES, acc[r][c]);
                else
                    store_some(acc[r][c], out + c * LANES, std::clamp(D - d - c * LANES, 0, LANES));
        }
    }
    template <bool UP> int columns_of_tile(const Tile& t) const {
        if (!t.lanes) return columns_of_step<UP>();
        const int weights = t.lanes == LANES ? ONE : TWO;
        return UP && gated ? weights / 2 : weights;
    }
    // Columns [begin, end) of h (UP) or of the rows, for one tile.
    template <bool UP> void sweep(int e, const Tile& t, int begin, int end, U* buffer, Ahead& ahead) const {
        const int step = columns_of_tile<UP>(t);
        if constexpr (!Format::ARE_PANELS) {
            for (int c = begin; t.lanes && c < end; c += step) {
                const int n = std::min(step, end - c);
                if (t.lanes == LANES)
                    UP ? up_lanes<ONE, 1>(e, t, c, n, ahead) : down_lanes<ONE, 1>(e, t, c, n, ahead);
                else
                    UP ? up_lanes<TWO, 2>(e, t, c, n, ahead) : down_lanes<TWO, 2>(e, t, c, n, ahead);
            }
            if (t.lanes) return;
        }
        for (int c = begin; c < end; c += step) {
            vf acc[MOST_ROWS][2];
            const auto source = UP ? up.panel(e, c, F, at, gated)
                                   : down.panel(e, c, D, GateUp{0, 0, 1}, false);
            multiply_panel<M>(UP ? x + t.x : h + t.h, UP ? x_stride : h_stride, t.rows, source, buffer,
                              UP ? xu : hu, ahead, acc);
            if constexpr (UP)
                finish_up_rows(e, t, c, acc);
            else
                finish_down_rows(t, c, acc);
        }
    }

  public:
    struct Own {
        alignas(64) U panel[LANES * PANEL];
        Own(const PanelProducts&, int) {}
    };

    PanelProducts(const MLPForward& a, const std::vector<ExpertRows>& experts)
        : MLP(a.sizes), a(a), experts(experts), up(a.up, G, D, 0), down(a.down, D, F, 0),
          xu((int)units<M>(D)), hu((int)units<M>(F)), x_stride(stride_of(D)), h_stride(stride_of(F)) {
        for (const ExpertRows& expert : experts) {
            first_tile.push_back(tiles.size());
            cut_into_tiles(expert.first, expert.count);
        }
        first_tile.push_back(tiles.size());
        x_size += MOST_ROWS * x_stride;  // a tile may read rows behind its last, and does not use them
        h_size += MOST_ROWS * h_stride;
    }

    size_t bytes() const { return Scratch::padded(x_size * sizeof(U)) + Scratch::padded(h_size * sizeof(U)); }
    void place(Scratch& scratch, float* rows) {
        this->rows = rows;
        x = scratch.take<U>(x_size);
        h = scratch.take<U>(h_size);
    }

    int64_t num_gathers() const { return tiles.size(); }
    void gather(int64_t tile) const {
        const Tile& t = tiles[tile];
        if (!t.lanes) {
            for (int r = 0; r < t.rows; r++)
                for (int u = 0; u < xu; u += LANES)
                    store(x + t.x + r * x_stride + u, units_at<M>(x_row(t.start + r), u, D - u * M::PER));
            return;
        }
        for (int c = 0; c < t.lanes; c += LANES)
            turn<M>([&](int i) { return x_row(t.start + c + i); }, t.rows - c, D, x + t.x, t.lanes, c);
    }

    template <bool UP> int columns_of_step() const { return UP && gated ? LANES : PANEL; }
    template <bool UP> int64_t bytes_of_step() const { return (int64_t)(UP ? xu : hu) * PANEL * sizeof(U); }
    template <bool UP> Ahead ahead(const ForwardTask& task) const {
        return weights_of<UP, Ahead>(task, experts[task.expert].id, up, down);
    }
    template <bool UP> void run(const ForwardTask& task, Own& own, Ahead ahead) const {
        const int blocks = ((UP ? xu : hu) + LANES - 1) / LANES, columns = task.end - task.begin;
        int64_t steps = 0;
        for (const Tile& t : tiles_of(task.expert))
            steps += (columns + columns_of_tile<UP>(t) - 1) / columns_of_tile<UP>(t) * blocks;
        ahead.over(steps);
        for (const Tile& t : tiles_of(task.expert))
            sweep<UP>(experts[task.expert].id, t, task.begin, task.end, own.panel, ahead);
    }
};
