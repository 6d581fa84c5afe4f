// Backward of the gated and the plain MLP, after SonicMoE (arXiv 2512.14080): with q = dy Wdown^T and h = act(z),
//
//   dw = <q, h> (+ <dy, bdown>),  dz = act'(z) w q,  dWdown = sum dy^T (w h),  dWup = sum dz^T x,  dx = sum_j dz Wup
//
// Here lanes are columns of a weight or of its gradient. dz is kept twice: as rows, gate columns first whatever the layout of
// the weights, for dx, and in strips for dWup.
#pragma once
#include "gradient.h"

struct MLPBackward {
    const void *dy, *z, *x, *up, *down, *down_bias;
    const int64_t* experts;
    const float* weights;
    const int32_t *order, *offsets;
    void *dx, *dweights, *dup, *ddown, *dup_bias, *ddown_bias;  // null where not needed
    int64_t tokens, top_k, num_experts, hidden, inner, up_rows, gate, up_from, step, gated, threads;
    int64_t activation;
    double alpha, limit;
};

template <class M> class BackwardPass {
    using T = typename M::T;
    using U = typename M::U;
    static constexpr int C = VECTORS;
    const MLPBackward& a;
    const int D, F, G, E, N;
    const GateUp at;
    const Act act;
    const Plan plan;
    const int f_blocks, d_blocks, f_strips, d_strips, halves;
    const ptrdiff_t dz_stride;
    const std::vector<size_t> unit_of;
    T* dz;                        // [N, G]
    float *dx_rows, *partial;     // [N, D]; [N, f_blocks] parts of <q, h>
    U *h, *dy_strips, *x, *dz_strips;  // in strips, per expert
    int32_t* position;

    const T* dy_row(int row) const { return (const T*)a.dy + (size_t)plan.token(row) * D; }
    const T* x_row(int row) const { return (const T*)a.x + (size_t)plan.token(row) * D; }
    size_t units_of(int e) const { return unit_of[e + 1] - unit_of[e]; }
    U* strips(U* all, int e, int count) const { return all + unit_of[e] * count * LANES; }

    // `n` elements from column f on of z's gate or up, whatever their layout.
    vf load_z(const T* z, ptrdiff_t from, int f, int n) const {
        if (at.step == 1 && n == LANES) return load_wide(z + from + f);
        T some[LANES] = {};
        for (int i = 0; i < n; i++) some[i] = z[from + (f + i) * at.step];
        return load_wide(some);
    }
    static void store_dz(T* to, int n, vf v) {
        if (n == LANES) store_narrow(v, to);
        else store_some(v, to, n);
    }
    // Rows r .. r + n of an expert's strip.
    static void store_strip(U* strip, int r, int n, const vf* rows, int stride) {
        U* to = strip + r / M::PER * LANES;
        for (int i = 0; i < n; i += M::PER, to += LANES) {
            if constexpr (M::PER == 2) {
                const vu odd = i + 1 < n ? round_to_bf16(rows[(i + 1) * stride]) & 0xFFFF0000u : vu{};
                store(to, (round_to_bf16(rows[i * stride]) >> 16) | odd);
            } else
                store(to, rounded(rows[i * stride], (const T*)nullptr));
        }
    }

    // From rows r .. r + n of q, columns f0 .. f0 + cols: dz, w h and a part of dw.
    template <int NAME> void finish_q(int e, int block, int cols, int r, int n, const Block& q) const {
        const size_t um = units_of(e);
        const int f0 = block * COLUMNS;
        vf h_rows[ROWS_AT_ONCE][C], gates[ROWS_AT_ONCE][C], ups[ROWS_AT_ONCE][C];
        for (int i = 0; i < n; i++) {
            const int row = plan.first(e) + r + i;
            const float weight = a.weights[plan.order[row]];
            const T* z = (const T*)a.z + (size_t)row * G;
            T* to = dz + row * dz_stride + f0;
            vf dot = {};
            for (int c = 0; c * LANES < cols; c++) {
                const int in_block = std::min(cols - c * LANES, LANES), f = f0 + c * LANES;
                const vf gate = load_z(z, at.gate, f, in_block), up = a.gated ? load_z(z, at.up, f, in_block) : vf{};
                const Backward b = act_backward<NAME>(act, gate, up, q[i][c] * splat(weight), a.gated);
                const vf h_rounded = rounded(b.h, (const T*)nullptr);
                dot += q[i][c] * h_rounded;
                h_rows[i][c] = h_rounded * splat(weight);
                gates[i][c] = b.dgate, ups[i][c] = b.dup;
                store_dz(to + c * LANES, in_block, b.dgate);
                if (a.gated) store_dz(to + F + c * LANES, in_block, b.dup);
            }
            float sum = 0;
            for (int l = 0; l < LANES; l++) sum += dot[l];
            partial[(size_t)row * f_blocks + block] = sum;
        }
        for (int c = 0; c * LANES < cols; c++) {
            const int strip = f0 / LANES + c;
            if (a.ddown) store_strip(strips(h, e, f_strips) + strip * um * LANES, r, n, &h_rows[0][c], C);
            if (!a.dup) continue;
            U* to = strips(dz_strips, e, halves * f_strips) + strip * um * LANES;
            store_strip(to, r, n, &gates[0][c], C);
            if (a.gated) store_strip(to + f_strips * um * LANES, r, n, &ups[0][c], C);
        }
    }

    // What is multiplied by an expert's rows of dy, and of dz.
    WeightRows<T> down(int e, int block) const {
        return {(const T*)a.down + (size_t)e * D * F + block * COLUMNS, F, D, std::min(COLUMNS, F - block * COLUMNS)};
    }
    WeightRows<T> up(int e, int block) const {
        const T* w = (const T*)a.up + (size_t)e * G * D + block * COLUMNS;
        const int cols = std::min(COLUMNS, D - block * COLUMNS);
        return {w + at.gate * D, at.step * D, G, cols, w + at.up * D, a.gated ? F : G};
    }
    void through_activation(int e, int block, const WeightRows<T>& next, ProductScratch<M>& scratch) const {
        const int first = plan.first(e);
        const WeightRows<T> w = down(e, block);
        product<M>([&](int i) { return dy_row(first + i); }, plan.count(e), w, next, scratch, [&](int r, int n, const Block& q) {
            with_activation(act.name, [&]<int NAME>() { finish_q<NAME>(e, block, w.cols, r, n, q); });
        });
    }
    void rows_of_dx(int e, int block, const WeightRows<T>& next, ProductScratch<M>& scratch) const {
        const int first = plan.first(e);
        const WeightRows<T> w = up(e, block);
        product<M>([&](int i) { return dz + (first + i) * dz_stride; }, plan.count(e), w, next, scratch, [&](int r, int n, const Block& acc) {
            for (int i = 0; i < n; i++) store_row(acc[i], dx_rows + (size_t)(first + r + i) * D + block * COLUMNS, w.cols);
        });
    }
    // Rows of dWdown, or of one half of dWup.
    void rows_of_ddown(int e, int task, bool streamed) const {
        const int begin = task * ROWS_PER_TASK, end = std::min(begin + ROWS_PER_TASK, D);
        T* out = (T*)a.ddown + (size_t)e * D * F;
        if (units_of(e) == 0) memset((void*)(out + (size_t)begin * F), 0, (size_t)(end - begin) * F * sizeof(T));
        else
            weight_gradient<M>(begin, end, F, units_of(e), strips(dy_strips, e, d_strips), strips(h, e, f_strips), streamed,
                               [&](int r) { return out + (size_t)r * F; });
    }
    void rows_of_dup(int e, int half, int task, bool streamed) const {
        const int begin = task * ROWS_PER_TASK, end = std::min(begin + ROWS_PER_TASK, F);
        T* out = (T*)a.dup + (size_t)e * G * D;
        const size_t um = units_of(e);
        if (um == 0) memset((void*)(out + ((size_t)half * F + begin) * D), 0, (size_t)(end - begin) * D * sizeof(T));
        else
            weight_gradient<M>(begin, end, D, um, strips(dz_strips, e, halves * f_strips) + half * f_strips * um * LANES, strips(x, e, d_strips), streamed,
                               [&](int r) { return out + ((half ? at.up : at.gate) + r * at.step) * D; });
    }

    // out(d) = sum of scale(row) * row[d] over an expert's rows.
    template <class Row, class Scale, class Out> void column_sums(int e, int width, Row row, Scale scale, Out out) const {
        std::vector<float> sum(width, 0.f);
        for (int i = plan.first(e); i < plan.first(e) + plan.count(e); i++) {
            const T* p = row(i);
            const float s = scale(i);
            for (int d = 0; d < width; d++) sum[d] += s * widen(p[d]);
        }
        for (int d = 0; d < width; d++) narrow(sum[d], out(d));
    }

    void weight_of_token(int t) const {
        for (int64_t at_flat = (int64_t)t * plan.top_k; at_flat < (int64_t)(t + 1) * plan.top_k; at_flat++) {
            float sum = 0;
            if (const int row = position[at_flat]; row >= 0) {
                for (int b = 0; b < f_blocks; b++) sum += partial[(size_t)row * f_blocks + b];
                if (a.down_bias) {
                    const T* bias = (const T*)a.down_bias + (size_t)a.experts[at_flat] * D;
                    for (int d = 0; d < D; d++) sum += widen(dy_row(row)[d]) * widen(bias[d]);
                }
            }
            ((float*)a.dweights)[at_flat] = sum;
        }
    }

  public:
    explicit BackwardPass(const MLPBackward& a)
        : a(a), D(a.hidden), F(a.inner), G(a.up_rows), E(a.num_experts), N(a.tokens * a.top_k),
          at{(ptrdiff_t)a.gate, (ptrdiff_t)a.up_from, (ptrdiff_t)a.step}, act{(int)a.activation, (float)a.alpha, (float)a.limit},
          plan{E, (int)a.top_k, a.order, a.offsets}, f_blocks(blocks_of(F)), d_blocks(blocks_of(D)), f_strips(strips_of(F)),
          d_strips(strips_of(D)), halves(a.gated ? 2 : 1), dz_stride((G * sizeof(T) + 127) / 64 * 64 / sizeof(T)),
          unit_of(units_before<M>(plan)) {}

    void run() {
        const size_t all = unit_of[E] * LANES;
        auto bytes = [](size_t count, size_t size) { return Scratch::padded(count * size); };
        Scratch scratch(bytes((size_t)N * dz_stride, sizeof(T)) + bytes((size_t)N * D, 4) + bytes((size_t)N * f_blocks, 4) +
                        bytes(all * (1 + halves) * f_strips, sizeof(U)) + bytes(all * 2 * d_strips, sizeof(U)) + 4 * bytes(1, 1) + bytes(N, 4) +
                        bytes(a.threads, sizeof(ProductScratch<M>)));
        dz = scratch.take<T>((size_t)N * dz_stride);
        dx_rows = scratch.take<float>((size_t)N * D);
        partial = scratch.take<float>((size_t)N * f_blocks);
        h = scratch.take<U>(all * f_strips);
        dz_strips = scratch.take<U>(all * halves * f_strips);
        x = scratch.take<U>(all * d_strips);
        dy_strips = scratch.take<U>(all * d_strips);
        position = scratch.take<int32_t>(N);
        auto* product_scratch = scratch.take<ProductScratch<M>>(a.threads);
        invert(plan, N, position);
        std::vector<int> hit;
        for (int e = 0; e < E; e++)
            if (plan.count(e)) hit.push_back(e);

        const bool need_dz = a.dx || a.dup || a.dup_bias, need_q = need_dz || a.ddown || a.dweights;
        const bool stream_down = is_streamed((T*)a.ddown, (size_t)E * D, F), stream_up = is_streamed((T*)a.dup, (size_t)E * G, D);
        const int64_t q_tasks = need_q ? (int64_t)hit.size() * f_blocks : 0, dx_tasks = a.dx ? (int64_t)hit.size() * d_blocks : 0;
        const int d_tasks = (D + ROWS_PER_TASK - 1) / ROWS_PER_TASK, f_tasks = (F + ROWS_PER_TASK - 1) / ROWS_PER_TASK;
        const int packings = (D + COLUMNS - 1) / COLUMNS;
        auto down_of = [&](int64_t i) { return i < q_tasks ? down(hit[i / f_blocks], i % f_blocks) : WeightRows<T>{}; };
        auto up_of = [&](int64_t i) { return i < dx_tasks ? up(hit[i / d_blocks], i % d_blocks) : WeightRows<T>{}; };
        Tasks activation, strip_tasks, dx, bias_tasks, ddown_tasks, dup_tasks, tokens;
        std::atomic<int> thread_count{0};
#pragma omp parallel num_threads(a.threads)
        {
            ProductScratch<M>& own = product_scratch[thread_count++];
            activation.run_with_next(q_tasks, [&](int64_t i, int64_t next) {
                through_activation(hit[i / f_blocks], i % f_blocks, next < q_tasks ? down_of(next) : up_of(next - q_tasks), own);
            });
            strip_tasks.run((int)hit.size(), packings, [&](int i, int part) {
                const int e = hit[i], first = plan.first(e), begin = part * COLUMNS, end = std::min(begin + COLUMNS, D);
                if (a.ddown) pack_strips<M>([&](int r) { return dy_row(first + r); }, plan.count(e), begin, end, strips(dy_strips, e, d_strips));
                if (a.dup) pack_strips<M>([&](int r) { return x_row(first + r); }, plan.count(e), begin, end, strips(x, e, d_strips));
            });
#pragma omp barrier
            dx.run_with_next(dx_tasks, [&](int64_t i, int64_t next) { rows_of_dx(hit[i / d_blocks], i % d_blocks, up_of(next), own); });
            if (a.dup_bias || a.ddown_bias)
                bias_tasks.run(E, [&](int64_t i) {
                    const int e = (int)i;
                    auto up_bias = [&](int g) { return (T*)a.dup_bias + (size_t)e * G + (g < F ? at.gate + g * at.step : at.up + (g - F) * at.step); };
                    auto down_bias = [&](int d) { return (T*)a.ddown_bias + (size_t)e * D + d; };
                    if (a.dup_bias) column_sums(e, G, [&](int row) { return dz + row * dz_stride; }, [](int) { return 1.f; }, up_bias);
                    if (a.ddown_bias)
                        column_sums(e, D, [&](int row) { return dy_row(row); }, [&](int row) { return a.weights[plan.order[row]]; }, down_bias);
                });
            if (a.ddown) ddown_tasks.run(E, d_tasks, [&](int e, int task) { rows_of_ddown(e, task, stream_down); });
            if (a.dup)
                dup_tasks.run(E, halves * f_tasks, [&](int e, int task) { rows_of_dup(e, task / f_tasks, task % f_tasks, stream_up); });
            end_of_streams();
#pragma omp barrier
            tokens.run(a.tokens, [&](int64_t t) {
                if (a.dweights) weight_of_token((int)t);
                if (a.dx) combine<T>(dx_rows, position, a.experts, nullptr, nullptr, (int)t, plan.top_k, D, (T*)a.dx);
            });
        }
    }
};
