// Backward of the MLP over quantised weights, which have no gradient: with q = dy Wdown^T and h = act(z),
//
//   dw = <q, h> (+ <dy, bdown>),  dz = act'(z) w q,  dx = sum_j dz Wup
//
// Lanes are columns of a weight, and k runs over its rows: a few rows of a block of columns at a time become
// a panel of float32 in the second cache, and an expert's tokens go over it. No more of a weight than that is
// ever widened at once.
#pragma once
#include "columns.h"
#include "quantized_rows.h"

struct QuantizedBackward {
    const void *dy, *z;
    QuantizedWords up, down;
    const void* down_bias;
    const int64_t* experts;
    const float* weights;
    const int32_t *order, *offsets;
    void *dx, *dweights, *dup_bias, *ddown_bias;  // null where not needed
    int64_t tokens, top_k, num_experts, hidden, inner, up_rows, gate, up_from, step, gated, threads;
    int64_t activation, bits, group;
    double alpha, limit;
};

// finish(r, n, block) for rows r .. r + n of m: block = row(r ..) . the rows k of a block of columns, which
// fill(k0, k, panel) widens. Sums of chunks of k are added in order, for however many rows.
template <class Row, class Fill, class Finish>
static inline void widened_product(Row row, int m, int count, Fill fill, ProductScratch<MacF32>& scratch,
                                   Finish finish) {
    NothingAhead ahead;
    auto& sums = scratch.sums[0];
    for (int first = 0; first < m; first += ROWS_PER_PACKING) {
        const int rows = std::min(ROWS_PER_PACKING, m - first);
        int k0 = 0;
        do {
            const int k = std::min(CHUNK_UNITS, count - k0);
            fill(k0, k, scratch.panel);
            for (int r = 0; r < rows; r += ROWS_AT_ONCE) {
                const int n = std::min(ROWS_AT_ONCE, rows - r);
                const float* p[ROWS_AT_ONCE];
                for (int i = 0; i < n; i++)
                    p[i] = row(first + r + i) + k0;
                Block acc;
                multiply<MacF32>(p, n, scratch.panel, k, ahead, acc);
                for (int i = 0; k0 && i < n; i++)
                    for (int c = 0; c < VECTORS; c++)
                        acc[i][c] += sums[r + i][c];
                if (k0 + k == count)
                    finish(first + r, n, acc);
                else
                    memcpy((void*)sums[r], acc, n * sizeof(acc[0]));
            }
            k0 += k;
        } while (k0 < count);
    }
}

template <class T, class Rows> class QuantizedBackwardPass {
    const QuantizedBackward& a;
    const int D, F, G, E, N;
    const GateUp at;
    const Act act;
    const Plan plan;
    const QuantizedWeights<Rows> up, down;
    const int f_blocks, d_blocks;
    const size_t dy_stride, dz_stride;
    float *dy, *dz;  // [T, dy_stride]; [N, dz_stride], gate columns first whatever the layout of the weights
    float *dx_rows, *partial;  // [N, D]; [N, f_blocks] parts of <q, h>
    int32_t* position;

    static size_t stride_of(int columns) { return (((size_t)columns * 4 + 63) / 64 | 1) * 64 / 4; }
    const T* z_row(int row) const { return (const T*)a.z + (size_t)row * G; }
    ptrdiff_t up_row(int k) const { return k < F ? at.gate + k * at.step : at.up + (k - F) * at.step; }

    // Rows k0 .. of columns [begin, begin + COLUMNS), widened; what only fills the panel up is zero.
    template <class RowOf>
    static void fill(const QuantizedWeights<Rows>& w, int e, RowOf row_of, int k0, int k, int begin,
                     float* panel) {
        // A group may end inside a block of columns, and a block begins inside one: widen_row asks for the
        // whole of either.
        const int end = std::min(begin + COLUMNS, w.k), group = Rows::GROUPED ? w.group : 1;
        const int from = begin / group * group, to = (end + group - 1) / group * group;
        float whole[COLUMNS + 2 * 128];
        for (int i = 0; i < k; i++, panel += COLUMNS) {
            if (from == begin && to == end)
                w.widen_row(e, row_of(k0 + i), begin, end, panel);
            else {
                w.widen_row(e, row_of(k0 + i), from, to, whole);
                memcpy(panel, whole + begin - from, (end - begin) * sizeof(float));
            }
            for (int c = end - begin; c < COLUMNS; c++)
                panel[c] = 0.f;
        }
    }

    vf load_z(const T* z, ptrdiff_t from, int f, int n) const {
        if (at.step == 1 && n == LANES) return load_wide(z + from + f);
        T some[LANES] = {};
        for (int i = 0; i < n; i++)
            some[i] = z[from + (f + i) * at.step];
        return load_wide(some);
    }
    template <int NAME> void activate(int row, int block, const vf (&q)[VECTORS]) const {
        const float weight = a.weights[plan.order[row]];
        const int cols = std::min(COLUMNS, F - block * COLUMNS);
        vf dot = {};
        for (int c = 0; c * LANES < cols; c++) {
            const int f = block * COLUMNS + c * LANES, n = std::min(cols - c * LANES, LANES);
            const vf gate = load_z(z_row(row), at.gate, f, n),
                     second = a.gated ? load_z(z_row(row), at.up, f, n) : vf{};
            const Backward b = act_backward<NAME>(act, gate, second, q[c] * splat(weight), a.gated);
            dot += q[c] * rounded(b.h, (const T*)nullptr);
            float* out = dz + row * dz_stride + f;
            store_some(b.dgate, out, n);
            if (a.gated) store_some(b.dup, out + F, n);
        }
        float sum = 0;
        for (int l = 0; l < LANES; l++)
            sum += dot[l];
        partial[(size_t)row * f_blocks + block] = sum;
    }
    void through_activation(int e, int block, ProductScratch<MacF32>& own) const {
        const int first = plan.first(e);
        widened_product([&](int i) { return dy + plan.token(first + i) * dy_stride; }, plan.count(e), D,
                        [&](int k0, int k, float* panel) {
            fill(down, e, [](int r) { return r; }, k0, k, block * COLUMNS, panel);
        }, own, [&](int r, int n, const Block& q) {
            with_activation(act.name, [&]<int NAME>() {
                for (int i = 0; i < n; i++)
                    activate<NAME>(first + r + i, block, q[i]);
            });
        });
    }
    void rows_of_dx(int e, int block, ProductScratch<MacF32>& own) const {
        const int first = plan.first(e), d0 = block * COLUMNS;
        widened_product([&](int i) { return dz + (first + i) * dz_stride; }, plan.count(e), G,
                        [&](int k0, int k, float* panel) {
            fill(up, e, [&](int r) { return up_row(r); }, k0, k, d0, panel);
        }, own, [&](int r, int n, const Block& acc) {
            for (int i = 0; i < n; i++)
                store_row(acc[i], dx_rows + (size_t)(first + r + i) * D + d0, D - d0);
        });
    }
    // out(c) = sum of scale(row) * row[c] over an expert's rows.
    template <class Row, class Scale, class Out>
    static void column_sums(int count, int width, Row row, Scale scale, Out out) {
        std::vector<float> sum(width, 0.f);
        for (int i = 0; i < count; i++) {
            const float *p = row(i), s = scale(i);
            for (int c = 0; c < width; c++)
                sum[c] += s * p[c];
        }
        for (int c = 0; c < width; c++)
            narrow(sum[c], out(c));
    }
    void bias_gradients(int e) const {
        const int first = plan.first(e), count = plan.count(e);
        if (a.dup_bias)
            column_sums(count, G, [&](int i) { return dz + (first + i) * dz_stride; }, [](int) {
                return 1.f;
            }, [&](int g) { return (T*)a.dup_bias + (size_t)e * G + up_row(g); });
        if (a.ddown_bias)
            column_sums(count, D, [&](int i) { return dy + plan.token(first + i) * dy_stride; }, [&](int i) {
                return a.weights[plan.order[first + i]];
            }, [&](int d) { return (T*)a.ddown_bias + (size_t)e * D + d; });
    }
    void weights_of_token(int t) const {
        for (int64_t i = (int64_t)t * plan.top_k; i < (int64_t)(t + 1) * plan.top_k; i++) {
            float sum = 0;
            if (const int row = position[i]; row >= 0) {
                for (int b = 0; b < f_blocks; b++)
                    sum += partial[(size_t)row * f_blocks + b];
                if (a.down_bias) {
                    const T* bias = (const T*)a.down_bias + (size_t)a.experts[i] * D;
                    for (int d = 0; d < D; d++)
                        sum += dy[t * dy_stride + d] * widen(bias[d]);
                }
            }
            ((float*)a.dweights)[i] = sum;
        }
    }

  public:
    explicit QuantizedBackwardPass(const QuantizedBackward& a)
        : a(a), D(a.hidden), F(a.inner), G(a.up_rows), E(a.num_experts), N(a.tokens * a.top_k),
          at{(ptrdiff_t)a.gate, (ptrdiff_t)a.up_from, (ptrdiff_t)a.step},
          act{(int)a.activation, (float)a.alpha, (float)a.limit},
          plan(given_plan(E, (int)a.top_k, a.order, a.offsets, a.experts, N)), up(a.up, G, D, a.group),
          down(a.down, D, F, a.group), f_blocks(blocks_of(F)), d_blocks(blocks_of(D)),
          dy_stride(stride_of(D)), dz_stride(stride_of(G)) {}

    void run() {
        auto bytes = [](size_t count, size_t size) { return Scratch::padded(count * size); };
        Scratch scratch(bytes(a.tokens * dy_stride, 4) + bytes(N * dz_stride, 4) + bytes((size_t)N * D, 4) +
                        bytes((size_t)N * f_blocks, 4) + bytes(N, 4) +
                        bytes(a.threads, sizeof(ProductScratch<MacF32>)));
        dy = scratch.take<float>(a.tokens * dy_stride);
        dz = scratch.take<float>(N * dz_stride);
        dx_rows = scratch.take<float>((size_t)N * D);
        partial = scratch.take<float>((size_t)N * f_blocks);
        position = scratch.take<int32_t>(N);
        auto* products = scratch.take<ProductScratch<MacF32>>(a.threads);
        invert(plan, N, position);
        const std::vector<int> hit = plan.hit();
        const bool through = a.dx || a.dweights || a.dup_bias;
        Tasks widening, q, dx, biases, tokens;
        std::atomic<int> thread_count{0};
#pragma omp parallel num_threads(a.threads)
        {
            ProductScratch<MacF32>& own = products[thread_count++];
            widening.run(a.tokens, [&](int64_t t) {
                for (int d = 0; d < D; d++)
                    dy[t * dy_stride + d] = widen(((const T*)a.dy)[t * D + d]);
            });
#pragma omp barrier
            if (through)
                q.run((int)hit.size(), f_blocks,
                      [&](int i, int block) { through_activation(hit[i], block, own); });
#pragma omp barrier
            if (a.dx)
                dx.run((int)hit.size(), d_blocks, [&](int i, int block) { rows_of_dx(hit[i], block, own); });
            if (a.dup_bias || a.ddown_bias) biases.run(E, [&](int64_t e) { bias_gradients((int)e); });
#pragma omp barrier
            tokens.run(a.tokens, [&](int64_t t) {
                if (a.dweights) weights_of_token((int)t);
                if (a.dx)
                    combine<T>(dx_rows, position, a.experts, nullptr, nullptr, (int)t, plan.top_k, D,
                               (T*)a.dx);
            });
        }
    }
};
