// Backward of the gated and the plain MLP, after SonicMoE (arXiv 2512.14080): with q = dy Wdown^T and h = act(z),
//
//   dw = <q, h> (+ <dy, bdown>),  dz = act'(z) w q,  dWdown = sum dy^T (w h),  dWup = sum dz^T x,  dx = sum_j dz Wup
//
// Here lanes are columns of a weight or of its gradient: every product is rows times a panel of COLUMNS columns, packed
// from rows as they lie in memory. A gradient element is written once, by the one task that owns its row.
#pragma once
#include "columns.h"

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
    static constexpr int R = ROWS_AT_ONCE, C = VECTORS;
    const MLPBackward& a;
    const int D, F, G, E, N;
    const GateUp at;
    const Act act;
    const Plan plan;
    const int f_blocks, d_blocks;
    const std::vector<size_t> unit_of;
    T* dz;                        // [N, G]
    float *dx_rows, *partial;     // [N, D]; [N, f_blocks] parts of <q, h>
    U *h_panels, *x_panels;       // per expert [blocks of columns][units of its rows][COLUMNS]
    U *dy_turned, *dz_turned;     // per expert [D or G][units of its rows]
    int32_t* position;

    const T* dy_row(int row) const { return (const T*)a.dy + (size_t)plan.token(row) * D; }
    size_t units_of(int e) const { return unit_of[e + 1] - unit_of[e]; }
    U* h_panel(int e, int block) const { return h_panels + (unit_of[e] * f_blocks + units_of(e) * block) * COLUMNS; }
    U* x_panel(int e, int block) const { return x_panels + (unit_of[e] * d_blocks + units_of(e) * block) * COLUMNS; }

    // Gate and up of one row's columns f .. f + n, whatever their layout.
    void load_z(const T* z, int f, int n, vf& gate, vf& up) const {
        if (at.step == 1 && n == LANES) {
            gate = load_wide(z + at.gate + f);
            up = a.gated ? load_wide(z + at.up + f) : vf{};
            return;
        }
        gate = up = vf{};
        for (int i = 0; i < n; i++) {
            gate[i] = widen(z[at.gate + (f + i) * at.step]);
            if (a.gated) up[i] = widen(z[at.up + (f + i) * at.step]);
        }
    }
    void store_dz(T* z, int f, int n, vf gate, vf up) const {
        if (at.step == 1 && n == LANES) {
            store_narrow(gate, z + at.gate + f);
            if (a.gated) store_narrow(up, z + at.up + f);
            return;
        }
        for (int i = 0; i < n; i++) {
            narrow(gate[i], z + at.gate + (f + i) * at.step);
            if (a.gated) narrow(up[i], z + at.up + (f + i) * at.step);
        }
    }

    // q, and from it dz, w h and a part of dw, for one block of columns of one expert.
    void through_activation(int e, int block, U* panel) {
        const int f0 = block * COLUMNS, cols = std::min(COLUMNS, F - f0), m = plan.count(e), first = plan.first(e);
        if (m == 0) return;
        const T* w = (const T*)a.down + (size_t)e * D * F + f0;
        pack_columns<M>([=, this](int d) { return w + (size_t)d * F; }, D, cols, panel);
        U* h_out = a.ddown ? h_panel(e, block) : nullptr;
        for (int r0 = 0; r0 < m; r0 += R) {
            const int n = std::min(R, m - r0);
            const T* rows[R];
            for (int r = 0; r < n; r++) rows[r] = dy_row(first + r0 + r);
            Block q;
            multiply<M>(rows, n, panel, D, q);
            with_activation(act.name, [&]<int NAME>() {
                for (int r = 0; r < n; r++) {
                    const int row = first + r0 + r;
                    const float weight = a.weights[plan.order[row]];
                    vf dot = {};
                    for (int c = 0; c < C; c++) {
                        const int in_block = std::clamp(cols - c * LANES, 0, LANES), f = f0 + c * LANES;
                        vf gate, up;
                        load_z((const T*)a.z + (size_t)row * G, f, in_block, gate, up);
                        const Backward b = act_backward<NAME>(act, gate, up, q[r][c] * splat(weight), a.gated);
                        const vf h = rounded(b.h, (const T*)nullptr);
                        dot += q[r][c] * h;
                        store_dz(dz + (size_t)row * G, f, in_block, b.dgate, b.dup);
                        q[r][c] = h * splat(weight);
                    }
                    float sum = 0;
                    for (int i = 0; i < LANES; i++) sum += dot[i];
                    partial[(size_t)row * f_blocks + block] = sum;
                }
            });
            if (h_out) store_h(h_out + units<M>(r0) * COLUMNS, n, q);
        }
    }
    static void store_h(U* panel, int n, const Block& h) {
        for (int r = 0; r < n; r += M::PER, panel += COLUMNS)
            for (int c = 0; c < C; c++) {
                if constexpr (M::PER == 2) {
                    vu odd = r + 1 < n ? round_to_bf16(h[r + 1][c]) & 0xFFFF0000u : vu{};
                    store(panel + c * LANES, (round_to_bf16(h[r][c]) >> 16) | odd);
                } else
                    store(panel + c * LANES, rounded(h[r][c], (const T*)nullptr));
            }
    }

    void rows_of_dx(int e, int block, U* panel) const {
        const int d0 = block * COLUMNS, cols = std::min(COLUMNS, D - d0), m = plan.count(e), first = plan.first(e);
        if (m == 0) return;
        const T* w = (const T*)a.up + (size_t)e * G * D + d0;
        pack_columns<M>([=, this](int g) { return w + (size_t)g * D; }, G, cols, panel);
        multiply_expert<M>([=, this](int i) { return dz + (size_t)(first + i) * G; }, m, panel, G, dx_rows + (size_t)first * D + d0, D, cols);
    }

    // out[e] = sum of scale(row) * row over an expert's rows.
    template <class Row, class Scale> void column_sums(int e, int width, Row row, Scale scale, T* out) const {
        std::vector<float> sum(width, 0.f);
        for (int i = plan.first(e); i < plan.first(e) + plan.count(e); i++) {
            const T* p = row(i);
            const float s = scale(i);
            for (int d = 0; d < width; d++) sum[d] += s * widen(p[d]);
        }
        for (int d = 0; d < width; d++) narrow(sum[d], out + (size_t)e * width + d);
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
          plan{E, (int)a.top_k, a.order, a.offsets}, f_blocks(blocks_of(F)), d_blocks(blocks_of(D)),
          unit_of(units_before<M>(plan)) {}

    void run() {
        const size_t all = unit_of[E], panel_size = units<M>(std::max(D, G)) * COLUMNS;
        auto bytes = [](size_t count, size_t size) { return Scratch::padded(count * size); };
        Scratch scratch(bytes((size_t)N * G, sizeof(T)) + bytes((size_t)N * D, 4) + bytes((size_t)N * f_blocks, 4) +
                        bytes(all * f_blocks * COLUMNS, sizeof(U)) + bytes(all * d_blocks * COLUMNS, sizeof(U)) + bytes(all * D, sizeof(U)) +
                        bytes(all * G, sizeof(U)) + bytes(N, 4) + a.threads * bytes(panel_size, sizeof(U)));
        dz = scratch.take<T>((size_t)N * G);
        dx_rows = scratch.take<float>((size_t)N * D);
        partial = scratch.take<float>((size_t)N * f_blocks);
        h_panels = scratch.take<U>(all * f_blocks * COLUMNS);
        x_panels = scratch.take<U>(all * d_blocks * COLUMNS);
        dy_turned = scratch.take<U>(all * D);
        dz_turned = scratch.take<U>(all * G);
        position = scratch.take<int32_t>(N);
        U* first_panel = scratch.take<U>(0);
        const size_t panel_stride = Scratch::padded(panel_size * sizeof(U)) / sizeof(U);
        invert(plan, N, position);

        const bool need_dz = a.dx || a.dup || a.dup_bias;
        const int d_tasks = (D + ROWS_PER_TASK - 1) / ROWS_PER_TASK, g_tasks = (G + ROWS_PER_TASK - 1) / ROWS_PER_TASK;
        Tasks activation, turning, dx_tasks, ddown_tasks, dup_tasks, tokens;
        std::atomic<int> thread_count{0};
#pragma omp parallel num_threads(a.threads)
        {
            U* panel = first_panel + thread_count++ * panel_stride;
            if (need_dz || a.ddown || a.dweights)
                activation.run(E, f_blocks, [&](int e, int block) { through_activation(e, block, panel); });
#pragma omp barrier
            if (a.dx) dx_tasks.run(E, d_blocks, [&](int e, int block) { rows_of_dx(e, block, panel); });
            turning.run(E, [&](int64_t i) {
                const int e = (int)i, first = plan.first(e), m = plan.count(e);
                if (a.ddown) turn<M>([&](int r) { return dy_row(first + r); }, m, D, dy_turned + unit_of[e] * D);
                if (a.dup) {
                    turn<M>([&](int r) { return dz + (size_t)(first + r) * G; }, m, G, dz_turned + unit_of[e] * G);
                    for (int b = 0; b < d_blocks; b++)
                        pack_columns<M>([&](int r) { return (const T*)a.x + (size_t)plan.token(first + r) * D + b * COLUMNS; }, m,
                                                 std::min(COLUMNS, D - b * COLUMNS), x_panel(e, b));
                }
                if (a.dup_bias)
                    column_sums(e, G, [&](int row) { return dz + (size_t)row * G; }, [](int) { return 1.f; }, (T*)a.dup_bias);
                if (a.ddown_bias)
                    column_sums(e, D, [&](int row) { return dy_row(row); }, [&](int row) { return a.weights[plan.order[row]]; }, (T*)a.ddown_bias);
            });
#pragma omp barrier
            if (a.ddown)
                ddown_tasks.run(E, d_tasks, [&](int e, int task) {
                    const int begin = task * ROWS_PER_TASK;
                    weight_gradient<M>(begin, std::min(begin + ROWS_PER_TASK, D), F, units_of(e), dy_turned + unit_of[e] * D, h_panel(e, 0),
                                    (T*)a.ddown + (size_t)e * D * F);
                });
            if (a.dup)
                dup_tasks.run(E, g_tasks, [&](int e, int task) {
                    const int begin = task * ROWS_PER_TASK;
                    weight_gradient<M>(begin, std::min(begin + ROWS_PER_TASK, G), D, units_of(e), dz_turned + unit_of[e] * G, x_panel(e, 0),
                                    (T*)a.dup + (size_t)e * G * D);
                });
            tokens.run(a.tokens, [&](int64_t t) {
                if (a.dweights) weight_of_token((int)t);
                if (a.dx) combine<T>(dx_rows, position, a.experts, nullptr, nullptr, (int)t, plan.top_k, D, (T*)a.dx);
            });
        }
    }
};
