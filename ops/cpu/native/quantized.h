// Forward of the gated and the plain MLP over weights of 8 or 4 bits, which are read as they lie in memory,
// once:
//
//   z = x Wup (+ b), h = act(z), row = h Wdown, y_t = sum_j w row,    W = scale * (q - zero)
//
// Lanes are positions along k, because that is how a row of quantised weights lies. Every sum is one chain of
// fused multiply-adds per lane, over k in ascending order, and one tree over the lanes, whatever the tile's
// shape: a token's bits depend on no other token and on no number of threads. Where an expert has few tokens,
// weights become float32 in registers, for all of them at once; where it has many, four rows of weights at a
// time are widened into the first cache, and all tokens go over them. Activations are float32 between the
// roundings that the plain MLP makes, too: those of z and of h.
#pragma once
#include "quantized_rows.h"

struct QuantizedForward {
    const void* x;
    QuantizedWords up, down;
    const void *up_bias, *down_bias;
    const int64_t* experts;
    const float* weights;
    void *y, *z;  // as in MLPForward
    int32_t *order, *offsets;
    int64_t tokens, top_k, num_experts, hidden, inner, up_rows, gate, up_from, step, gated, first_row,
        saved_rows, threads;
    int64_t activation, bits, group;
    double alpha, limit;
};

template <class T, class Rows> class QuantizedForwardPass {
    static constexpr int TILE = ACCUMULATORS / QUAD, CHUNK = 8 * TILE, FEW = 4;
    const QuantizedForward& a;
    const int D, F, G, E;
    const GateUp at;
    const Act act;
    const QuantizedWeights<Rows> up, down;
    const size_t x_stride, h_stride;  // of rows of float32, in the order in which Rows unpacks
    const int halves;
    float *x, *h, *rows;  // [T, x_stride], [N, h_stride], [N, D]

    struct Task {
        int expert, begin, end;  // columns of h, or of the rows
    };
    int first(int e) const { return std::max<int>(a.offsets[e], a.first_row); }

    // About 64 KiB of weights a task: that much is asked for while the one before is computed, and stays in
    // the second cache. Less where there are few tasks.
    std::vector<Task> make_tasks(int columns, int rows_per_column, size_t row_bytes) const {
        std::vector<Task> tasks;
        int64_t hit = 0;
        for (int e = 0; e < E; e++)
            hit += a.offsets[e + 1] > first(e);
        const int64_t most = (64 << 10) / (int64_t)std::max<size_t>(row_bytes * rows_per_column * LANES, 1);
        const int64_t fair = hit * columns / LANES / (8 * a.threads);
        const int block = LANES * (int)std::max<int64_t>(1, std::min(most, fair));
        for (int e = 0; e < E; e++)
            if (a.offsets[e + 1] > first(e))
                for (int begin = 0; begin < columns; begin += block)
                    tasks.push_back({e, begin, std::min(begin + block, columns)});
        return tasks;
    }

    // sums[i][...]: QUAD dot products of each of n tokens.
    void dots(const Rows& quad, const float* const* token, int n, float* made, float (*sums)[2][LANES],
              int half, int column, LinesAhead& ahead) const {
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
            if (n == 1)
                go.template operator()<1>(quad, 0, ahead);
            else if (n == 2)
                go.template operator()<2>(quad, 0, ahead);
            else if (n == 3)
                go.template operator()<3>(quad, 0, ahead);
            else if constexpr (TILE >= 4)
                go.template operator()<4>(quad, 0, ahead);
            else {
                go.template operator()<2>(quad, 0, ahead);
                go.template operator()<2>(quad, 2, ahead);
            }
            return;
        }
        const MadeQuad source = make_quad(quad, ahead, made);
        NothingAhead nothing;
        for (int i = 0; i < n; i += TILE)
            switch (std::min(TILE, n - i)) {
                case 1: go.template operator()<1>(source, i, nothing); break;
                case 2: go.template operator()<2>(source, i, nothing); break;
                case 3: go.template operator()<std::min(3, TILE)>(source, i, nothing); break;
                case 4: go.template operator()<std::min(4, TILE)>(source, i, nothing); break;
                case 5: go.template operator()<std::min(5, TILE)>(source, i, nothing); break;
                default: go.template operator()<TILE>(source, i, nothing);
            }
    }

    void store_z(T* z, ptrdiff_t base, int n, vf v) const {
        if (at.step == 1 && n == LANES) return store_narrow(v, z + base);
        for (int i = 0; i < n; i++)
            narrow(v[i], z + base + i * at.step);
    }
    vf with_bias(vf v, int e, ptrdiff_t base, int n) const {
        if (a.up_bias)
            for (int i = 0; i < n; i++)
                v[i] += widen(((const T*)a.up_bias)[(size_t)e * G + base + i * at.step]);
        return rounded(v, (const T*)nullptr);
    }
    // LANES columns of h from column f on, for n sorted rows.
    void finish_up(int e, int row, int f, int n, float (*sums)[2][LANES]) const {
        const int columns = std::min(LANES, F - f);
        const ptrdiff_t base[2] = {at.gate + f * at.step, at.up + f * at.step};
        vf scale[2] = {};
        for (int half = 0; half < halves; half++)
            scale[half] = up.scales_of_rows(e, [&](int i) { return base[half] + i * at.step; }, columns);
        with_activation(act.name, [&]<int NAME>() {
            for (int i = 0; i < n; i++) {
                vf z[2] = {};
                for (int half = 0; half < halves; half++) {
                    z[half] = with_bias(load<vf>(sums[i][half]) * scale[half], e, base[half], columns);
                    if (row + i < a.saved_rows)
                        store_z((T*)a.z + (size_t)(row + i) * G, base[half], columns, z[half]);
                }
                vf v = rounded(act_forward<NAME>(act, z[0], z[1], a.gated), (const T*)nullptr);
                for (int l = columns; l < LANES; l++)
                    v[l] = 0.f;
                float* out = h + (row + i) * h_stride;
                for (int l = 0; l < LANES; l++)
                    out[Rows::place(f + l)] = v[l];
            }
        });
    }
    void finish_down(int e, int row, int d, int n, float (*sums)[2][LANES]) const {
        const int columns = std::min(LANES, D - d);
        const vf scale = down.scales_of_rows(e, [&](int i) { return d + i; }, columns);
        for (int i = 0; i < n; i++) {
            const vf v = load<vf>(sums[i][0]) * scale;
            float* out = rows + (size_t)(row + i) * D + d;
            if (columns == LANES)
                store(out, v);
            else
                store_some(v, out, columns);
        }
    }

    LinesAhead weights_of(const Task& t, bool of_up) const {
        LinesAhead ahead;
        const int n = t.end - t.begin;
        if (!of_up)
            down.look_ahead(t.expert, t.begin, n, ahead);
        else if (at.step == 2)
            up.look_ahead(t.expert, t.begin * 2, 2 * n, ahead);
        else {
            up.look_ahead(t.expert, at.gate + t.begin, n, ahead);
            if (a.gated) up.look_ahead(t.expert, at.up + t.begin, n, ahead);
        }
        return ahead;
    }
    template <bool UP> void run_task(const Task& t, float* made, LinesAhead ahead) const {
        const int e = t.expert, end = a.offsets[e + 1];
        ahead.over((int64_t)(t.end - t.begin) * (UP ? halves * up.row_bytes : down.row_bytes) /
                   (QUAD * LANES));
        alignas(64) float sums[CHUNK][2][LANES];
        const float* token[CHUNK];
        for (int c = t.begin; c < t.end; c += LANES)
            for (int row = first(e); row < end; row += CHUNK) {
                const int n = std::min(CHUNK, end - row);
                for (int i = 0; i < n; i++)
                    token[i] = UP ? x + a.order[row + i] / a.top_k * x_stride : h + (row + i) * h_stride;
                for (int half = 0; half < (UP ? halves : 1); half++)
                    for (int q = 0; q < LANES; q += QUAD) {
                        if (c + q >= (UP ? F : D)) break;
                        auto row_of = [&](int i) {
                            const int column = std::min(c + q + i, (UP ? F : D) - 1);
                            return UP ? (half ? at.up : at.gate) + column * at.step : column;
                        };
                        dots((UP ? up : down).quad(e, row_of), token, n, made, sums, half, q, ahead);
                    }
                if constexpr (UP)
                    finish_up(e, row, c, n, sums);
                else
                    finish_down(e, row, c, n, sums);
            }
    }

  public:
    explicit QuantizedForwardPass(const QuantizedForward& a)
        : a(a), D(a.hidden), F(a.inner), G(a.up_rows), E(a.num_experts),
          at{(ptrdiff_t)a.gate, (ptrdiff_t)a.up_from, (ptrdiff_t)a.step},
          act{(int)a.activation, (float)a.alpha, (float)a.limit}, up(a.up, G, D, a.group),
          down(a.down, D, F, a.group), x_stride(Rows::stride_of(D)), h_stride(Rows::stride_of(F)),
          halves(a.gated ? 2 : 1) {}

    void run() {
        const int N = a.tokens * a.top_k;
        if (a.y) make_plan(a.experts, N, E, a.order, a.offsets);
        const Plan plan = a.y ? Plan{E, (int)a.top_k, a.order, a.offsets}
                              : given_plan(E, (int)a.top_k, a.order, a.offsets, a.experts, N);
        auto bytes = [](size_t count, size_t size) { return Scratch::padded(count * size); };
        const size_t made_size = QUAD * std::max(x_stride, h_stride);
        Scratch scratch(bytes(a.tokens * x_stride, 4) + bytes(N * h_stride, 4) + bytes((size_t)N * D, 4) +
                        bytes(N, 4) + a.threads * bytes(made_size, 4));
        x = scratch.take<float>(a.tokens * x_stride);
        h = scratch.take<float>(N * h_stride);
        rows = scratch.take<float>((size_t)N * D);
        int32_t* position = scratch.take<int32_t>(N);
        float* made = scratch.take<float>(0);
        invert(plan, N, position);
        const std::vector<Task> up_tasks = make_tasks(F, halves, up.row_bytes),
                                down_tasks = make_tasks(D, 1, down.row_bytes);
        const int64_t up_count = up_tasks.size(), down_count = down_tasks.size();
        auto ahead_of = [&](int64_t task) {
            if (task < up_count) return weights_of(up_tasks[task], true);
            return a.y && task - up_count < down_count ? weights_of(down_tasks[task - up_count], false)
                                                       : LinesAhead();
        };
        Tasks gathering, up_work, down_work, combining;
        std::atomic<int> thread_count{0};
#pragma omp parallel num_threads(a.threads)
        {
            float* own = made + thread_count++ * bytes(made_size, 4) / 4;
            gathering.run(a.tokens,
                          [&](int64_t t) { Rows::unpack_like((const T*)a.x + t * D, D, x + t * x_stride); });
#pragma omp barrier
            up_work.run_with_next(
                up_count, [&](int64_t i, int64_t next) { run_task<true>(up_tasks[i], own, ahead_of(next)); });
            if (a.y) {
#pragma omp barrier
                down_work.run_with_next(down_count, [&](int64_t i, int64_t next) {
                    run_task<false>(down_tasks[i], own, ahead_of(up_count + next));
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
