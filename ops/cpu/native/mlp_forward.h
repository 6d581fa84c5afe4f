// Forward of the gated and the plain MLP.
//
//   z = x Wup (+ b), h = act(z), row = h Wdown, y_t = sum_j w row
//
// An expert's rows are cut into tiles of two kinds, and both read the weights as they lie in memory. In a
// tile of one or two whole vectors, lanes are tokens: a weight is broadcast, nothing is rearranged. What is
// left of a vector would waste lanes, so there lanes are columns: LANES rows of weights at a time are
// transposed into a panel, tokens are broadcast. Either way an element is the same chain of multiply-adds, so
// which kind a token fell into does not show in its bits. Weights that were packed into panels before need no
// transposing, and all tiles are of the second kind.
#pragma once
#include "packing.h"

// z gets rows [first_row, saved_rows) of the pre-activations, or more. Without y, that is all that is
// computed, with the plan as it is given; with y, first_row is 0 and the plan is made here.
struct MLPForward {
    const void *x, *up, *down, *up_bias, *down_bias;
    const void *packed_up, *packed_down;  // panels, or null; with them, up and down are null
    const int64_t* experts;
    const float* weights;
    void *y, *z;
    int32_t *order, *offsets;
    int64_t tokens, top_k, num_experts, hidden, inner, up_rows, gate, up_from, step, gated, first_row,
        saved_rows, threads;
    int64_t activation;
    double alpha, limit;
};

template <class M> class ForwardPass {
    using T = typename M::T;
    using U = typename M::U;
    // Rows of weights in a tile of one vector of tokens, and of two. Both divide what a panel has.
    static constexpr int ONE = std::min(PANEL, ACCUMULATORS * 2 / 3), TWO = std::min(PANEL, ACCUMULATORS / 3);
    static_assert(PANEL % ONE == 0 && PANEL % TWO == 0);

    // Rows of one expert that are computed together: `lanes` of them abreast, or with lanes = 0 at most
    // MOST_ROWS as rows.
    struct Tile {
        int start, rows, lanes;
        size_t x, h;  // where its x and its h begin
    };
    struct Expert {
        int id;
        std::vector<Tile> tiles;
    };

    const MLPForward& a;
    const int D, F, G, E;
    const GateUp at;
    const Act act;
    const PanelsOfWeights<M> weights;
    const int xu, hu;                 // units of a row of x, of h
    const size_t x_stride, h_stride;  // from row to row, where lanes are columns
    const int up_columns;             // columns of h that a panel of the up-projection gives
    U *x, *h;
    float* rows;                  // [N, D]
    std::vector<Expert> experts;  // those with rows
    std::vector<std::pair<int, int>> all_tiles;
    size_t x_size = 0, h_size = 0;

    // The distance of rows, in units: a whole number of cache lines, and an odd one, so that rows do not
    // share cache sets.
    static size_t stride_of(int columns) {
        const size_t padded = ((size_t)columns + PANEL - 1) / PANEL * PANEL / M::PER, line = 64 / sizeof(U);
        return ((padded + line - 1) / line | 1) * line;
    }

    void add_tile(Expert& expert, int start, int rows, int lanes) {
        all_tiles.push_back({(int)experts.size(), (int)expert.tiles.size()});
        expert.tiles.push_back({start, rows, lanes, x_size, h_size});
        x_size += lanes ? lanes * (size_t)xu : rows * x_stride;
        h_size += lanes ? lanes * (size_t)hu : rows * h_stride;
    }
    void cut_into_tiles() {
        for (int e = 0; e < E; e++) {
            int start = std::max<int>(a.offsets[e], a.first_row), left = a.offsets[e + 1] - start;
            if (left <= 0) continue;
            Expert expert{e, {}};
            if (a.packed_up)
                for (int tiles = (left + MOST_ROWS - 1) / MOST_ROWS; tiles > 0; tiles--) {
                    const int rows = left / tiles;  // as equal as can be
                    add_tile(expert, start, rows, 0);
                    start += rows;
                    left -= rows;
                }
            for (; left > LANES + MOST_ROWS; start += 2 * LANES, left -= 2 * LANES)
                add_tile(expert, start, std::min(left, 2 * LANES), 2 * LANES);
            if (left > MOST_ROWS) {
                add_tile(expert, start, std::min(left, LANES), LANES);
                start += LANES;
                left -= LANES;
            }
            for (; left > 0; start += MOST_ROWS, left -= MOST_ROWS)
                add_tile(expert, start, std::min(left, MOST_ROWS), 0);
            experts.push_back(std::move(expert));
        }
        x_size += MOST_ROWS * x_stride;  // a tile may read, never use, rows behind the last
        h_size += MOST_ROWS * h_stride;
    }

    const T* x_row(int row) const { return (const T*)a.x + (size_t)(a.order[row] / a.top_k) * D; }
    void gather(const Tile& t) const {
        if (!t.lanes) {
            for (int r = 0; r < t.rows; r++)
                for (int u = 0; u < xu; u += LANES)
                    store(x + t.x + r * x_stride + u, units_at<M>(x_row(t.start + r), u, D - u * M::PER));
            return;
        }
        for (int c = 0; c < t.lanes; c += LANES)
            turn<M>([&](int i) { return x_row(t.start + c + i); }, t.rows - c, D, x + t.x, t.lanes, c);
    }

    // Elements [0, n) of v into z, from column `base` of the memory's order.
    void store_z(T* z, ptrdiff_t base, int n, vf v) const {
        if (at.step == 1 && n == LANES)
            store_narrow(v, z + base);
        else
            for (int i = 0; i < n; i++)
                narrow(v[i], z + base + i * at.step);
    }
    void add_bias(int e, ptrdiff_t base, int n, vf* to, int stride) const {
        const T* b = (const T*)a.up_bias + (size_t)e * G + base;
        for (int i = 0; i < n; i++)
            to[i * stride] += splat(widen(b[i * at.step]));
    }

    // Lanes are tokens: columns f .. f + n of h; R accumulator rows are gate and up halves, or plain rows.
    template <int R, int C> void finish_up_lanes(int e, const Tile& t, int f, int n, vf (&acc)[R][C]) const {
        constexpr int H = R / 2;
        const ptrdiff_t first = at.gate + f * at.step, second = a.gated ? at.up + f * at.step : first + H;
        const int n0 = std::min(n, a.gated ? H : R), n1 = a.gated ? n0 : 0;
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
                vf v[LANES] = {};  // columns of the first half, then of the second
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
                        const bool in_second = r >= H && a.gated;
                        const int column = in_second ? r - H : r;
                        if (column < n)
                            narrow(acc[r][c][i],
                                   z + (size_t)i * G + (in_second ? second : first) + column * at.step);
                    }
        }
        with_activation(act.name, [&]<int NAME>() {
            for (int r = 0; r < (a.gated ? H : R); r++)
                for (int c = 0; c < C; c++)
                    acc[r][c] = act_forward<NAME>(act, acc[r][c], acc[a.gated ? H + r : r][c], a.gated);
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
    // One token's v: H columns of the first half, and from LANES / 2 on of the second; n of them exist.
    template <int H> void store_z_halves(T* z, ptrdiff_t first, ptrdiff_t second, int n, vf v) const {
        if (at.step == 1 && n >= (a.gated ? H : 2 * H)) {
            T narrowed[LANES];
            store_narrow(v, narrowed);
            memcpy((void*)(z + first), narrowed, H * sizeof(T));
            memcpy((void*)(z + second), narrowed + LANES / 2, H * sizeof(T));
            return;
        }
        for (int i = 0; i < std::min(n, H); i++)
            narrow(v[i], z + first + i * at.step);
        for (int i = 0; i < (a.gated ? n : n - H); i++)
            narrow(v[LANES / 2 + i], z + second + i * at.step);
    }
    template <int R, int C> void up_lanes(int e, const Tile& t, int f, int n, Ahead& ahead) const {
        constexpr int H = R / 2;
        const T *w = (const T*)a.up + (size_t)e * G * D, *row[R];
        for (int r = 0; r < R; r++) {
            const bool in_second = a.gated && r >= H;
            row[r] = w + ((in_second ? at.up : at.gate) +
                          (f + std::min(in_second ? r - H : r, n - 1)) * at.step) *
                             D;
        }
        vf acc[R][C];
        lanes_tile<M, R, C>([&](int r) { return row[r]; }, x + t.x, D, ahead, acc);
        finish_up_lanes<R, C>(e, t, f, n, acc);
    }
    template <int R, int C> void down_lanes(int e, const Tile& t, int d, int n, Ahead& ahead) const {
        const T *w = (const T*)a.down + ((size_t)e * D + d) * F, *row[R];
        for (int r = 0; r < R; r++)
            row[r] = w + (size_t)std::min(r, n - 1) * F;
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
        const int n0 = std::clamp(F - f, 0, LANES), n1 = a.gated ? n0 : std::clamp(F - f - LANES, 0, LANES);
        const ptrdiff_t first = at.gate + f * at.step, second = a.gated ? at.up + f * at.step : first + LANES;
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
                store_h(out, f, n0, act_forward<NAME>(act, z0, z1, a.gated));
                if (!a.gated) store_h(out, f + LANES, n1, act_forward<NAME>(act, z1, z1, false));
            }
        });
    }
    // h's rows are padded to whole panels, with zeros.
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
    template <bool UP> MadePanel<M> packed(int e, int column) const {
        const int step = UP ? up_columns : PANEL, panels = ((UP ? F : D) + step - 1) / step;
        const auto* all = (const typename M::Stored*)(UP ? a.packed_up : a.packed_down);
        return {all + ((size_t)e * panels + column / step) * (UP ? xu : hu) * PANEL, UP ? D : F};
    }

    // Columns [begin, end) of h (UP) or of the rows, for one tile.
    template <bool UP> void sweep(int e, const Tile& t, int begin, int end, U* panel, Ahead& ahead) const {
        if (t.lanes) {
            const int step = step_of<UP>(t);
            for (int c = begin; c < end; c += step) {
                const int n = std::min(step, end - c);
                if (t.lanes == LANES)
                    UP ? up_lanes<ONE, 1>(e, t, c, n, ahead) : down_lanes<ONE, 1>(e, t, c, n, ahead);
                else
                    UP ? up_lanes<TWO, 2>(e, t, c, n, ahead) : down_lanes<TWO, 2>(e, t, c, n, ahead);
            }
            return;
        }
        for (int c = begin; c < end; c += step_of<UP>(t)) {
            vf acc[MOST_ROWS][2];
            auto times = [&](const auto& source) {
                multiply_panel<M>(UP ? x + t.x : h + t.h, UP ? x_stride : h_stride, t.rows, source, panel,
                                  UP ? xu : hu, ahead, acc);
            };
            if (a.packed_up)
                times(packed<UP>(e, c));
            else
                times(UP ? weights.up_rows(e, c) : weights.down_rows(e, c));
            if constexpr (UP)
                finish_up_rows(e, t, c, acc);
            else
                finish_down_rows(t, c, acc);
        }
    }
    template <bool UP> int step_of(const Tile& t) const {
        if (!t.lanes) return UP ? up_columns : PANEL;
        const int weights = t.lanes == LANES ? ONE : TWO;
        return UP && a.gated ? weights / 2 : weights;
    }

    // Some columns of one expert, for all its tiles.
    struct Task {
        const Expert* expert;
        int begin, end;
    };
    // About 256 KiB of weights a task, which stay in L2 while all tiles go over them; less where there are
    // few tasks.
    template <bool UP> std::vector<Task> make_tasks() const {
        const int columns = UP ? F : D, panel = UP ? up_columns : PANEL, k = UP ? xu : hu;
        const int64_t most = (256 << 10) / ((int64_t)std::max(k, 1) * PANEL * sizeof(U));
        const int64_t fair = (int64_t)experts.size() * columns / panel / (8 * a.threads);
        const int block = panel * (int)std::max<int64_t>(1, std::min(most, fair));
        std::vector<Task> tasks;
        for (const Expert& expert : experts)
            for (int begin = 0; begin < columns; begin += block)
                tasks.push_back({&expert, begin, std::min(begin + block, columns)});
        return tasks;
    }
    Ahead weights_of(const Task& task, bool up) const {
        const int e = task.expert->id;
        const size_t n = task.end - task.begin;
        if (a.packed_up) return Ahead();  // panels look ahead themselves
        if (!up)
            return Ahead((const T*)a.down + ((size_t)e * D + task.begin) * F, n * F, (const T*)nullptr, 0);
        const T* w = (const T*)a.up + (size_t)e * G * D;
        if (!a.gated || at.step == 2) return Ahead(w + task.begin * at.step * D, n * at.step * D, w, 0);
        return Ahead(w + (at.gate + task.begin) * D, n * D, w + (at.up + task.begin) * D, n * D);
    }
    template <bool UP> void run_task(const Task& task, U* panel, Ahead ahead) const {
        const int blocks = ((UP ? xu : hu) + LANES - 1) / LANES;
        int64_t steps = 0;
        for (const Tile& t : task.expert->tiles)
            steps += (task.end - task.begin + step_of<UP>(t) - 1) / step_of<UP>(t) * blocks;
        ahead.over(steps);
        for (const Tile& t : task.expert->tiles)
            sweep<UP>(task.expert->id, t, task.begin, task.end, panel, ahead);
    }

  public:
    explicit ForwardPass(const MLPForward& a)
        : a(a), D(a.hidden), F(a.inner), G(a.up_rows), E(a.num_experts),
          at{(ptrdiff_t)a.gate, (ptrdiff_t)a.up_from, (ptrdiff_t)a.step},
          act{(int)a.activation, (float)a.alpha, (float)a.limit},
          weights{(const T*)a.up, (const T*)a.down, D, F, G, at, a.gated != 0}, xu((int)units<M>(D)),
          hu((int)units<M>(F)), x_stride(stride_of(D)), h_stride(stride_of(F)),
          up_columns(a.gated ? LANES : PANEL) {}

    void run() {
        const int N = a.tokens * a.top_k;
        if (a.y) make_plan(a.experts, N, E, a.order, a.offsets);
        const Plan plan = a.y ? Plan{E, (int)a.top_k, a.order, a.offsets}
                              : given_plan(E, (int)a.top_k, a.order, a.offsets, a.experts, N);
        cut_into_tiles();
        auto bytes = [](size_t count, size_t size) { return Scratch::padded(count * size); };
        Scratch scratch(bytes(x_size, sizeof(U)) + bytes(h_size, sizeof(U)) + bytes((size_t)N * D, 4) +
                        bytes(N, 4));
        x = scratch.take<U>(x_size);
        h = scratch.take<U>(h_size);
        rows = scratch.take<float>((size_t)N * D);
        int32_t* position = scratch.take<int32_t>(N);
        invert(plan, N, position);
        const std::vector<Task> up_tasks = make_tasks<true>(),
                                down_tasks = a.y ? make_tasks<false>() : std::vector<Task>();
        const int64_t up_count = up_tasks.size(), down_count = down_tasks.size();
        auto ahead_of = [&](int64_t task) {
            if (task < up_count) return weights_of(up_tasks[task], true);
            return task - up_count < down_count ? weights_of(down_tasks[task - up_count], false) : Ahead();
        };
        Tasks gathering, up, down, combining;
#pragma omp parallel num_threads(a.threads)
        {
            alignas(64) U panel[LANES * PANEL];
            gathering.run(all_tiles.size(),
                          [&](int64_t i) { gather(experts[all_tiles[i].first].tiles[all_tiles[i].second]); });
#pragma omp barrier
            up.run_with_next(up_count, [&](int64_t task, int64_t next) {
                run_task<true>(up_tasks[task], panel, ahead_of(next));
            });
            if (a.y) {
#pragma omp barrier
                down.run_with_next(down_count, [&](int64_t task, int64_t next) {
                    run_task<false>(down_tasks[task], panel, ahead_of(up_count + next));
                });
#pragma omp barrier
                combining.run(a.tokens, [&](int64_t t) {
                    combine<T>(rows, position, a.experts, a.weights, (const T*)a.down_bias, (int)t, a.top_k,
                               D, (T*)a.y);
                });
            }
        }
    }
};
