// The merged up-projection, h_t = sum_j w_tj (x_t W_e), and its backward: with q = dh W^T,
//
//   dw = <q, x>,  dx = sum_j w q,  dW_e = sum (w x)^T dh
#pragma once
#include "columns.h"

struct MergedForward {
    const void *x, *proj;
    const int64_t* experts;
    const float* weights;
    void* h;
    int32_t *order, *offsets;
    int64_t tokens, top_k, num_experts, hidden, inner, threads;
};

template <class M> class MergedForwardPass {
    using T = typename M::T;
    using U = typename M::U;
    const MergedForward& a;

  public:
    explicit MergedForwardPass(const MergedForward& a) : a(a) {}

    void run() {
        const int D = a.hidden, F = a.inner, E = a.num_experts, N = a.tokens * a.top_k, blocks = blocks_of(F);
        make_plan(a.experts, N, E, a.order, a.offsets);
        const Plan plan{E, (int)a.top_k, a.order, a.offsets};
        const size_t panel_bytes = Scratch::padded(units<M>(D) * COLUMNS * sizeof(U));
        Scratch scratch(Scratch::padded((size_t)N * F * 4) + Scratch::padded((size_t)N * 4) + a.threads * panel_bytes);
        float* rows = scratch.take<float>((size_t)N * F);
        int32_t* position = scratch.take<int32_t>(N);
        char* panels = scratch.take<char>(0);
        invert(plan, N, position);
        Tasks products, tokens;
        std::atomic<int> threads{0};
#pragma omp parallel num_threads(a.threads)
        {
            U* panel = (U*)(panels + threads++ * panel_bytes);
            products.run(E, blocks, [&](int e, int block) {
                const int first = plan.first(e), m = plan.count(e), f0 = block * COLUMNS, cols = std::min(COLUMNS, F - f0);
                if (m == 0) return;
                const T* w = (const T*)a.proj + (size_t)e * D * F + f0;
                pack_columns<M>([=](int d) { return w + (size_t)d * F; }, D, cols, panel);
                multiply_expert<M>([&](int i) { return (const T*)a.x + (size_t)plan.token(first + i) * D; }, m, panel, D,
                                   rows + (size_t)first * F + f0, F, cols);
            });
#pragma omp barrier
            tokens.run(a.tokens, [&](int64_t t) {
                combine<T>(rows, position, a.experts, a.weights, nullptr, (int)t, plan.top_k, F, (T*)a.h);
            });
        }
    }
};

struct MergedBackward {
    const void *dh, *x, *proj;
    const int64_t* experts;
    const float* weights;
    const int32_t *order, *offsets;
    void *dx, *dweights, *dproj;  // null where not needed
    int64_t tokens, top_k, num_experts, hidden, inner, threads;
};

template <class M> class MergedBackwardPass {
    using T = typename M::T;
    using U = typename M::U;
    const MergedBackward& a;

  public:
    explicit MergedBackwardPass(const MergedBackward& a) : a(a) {}

    void run() {
        const int D = a.hidden, F = a.inner, E = a.num_experts, N = a.tokens * a.top_k, d_blocks = blocks_of(D), f_blocks = blocks_of(F);
        const Plan plan{E, (int)a.top_k, a.order, a.offsets};
        const std::vector<size_t> unit_of = units_before<M>(plan);
        const size_t all = unit_of[E], panel_bytes = Scratch::padded(units<M>(F) * COLUMNS * sizeof(U));
        auto bytes = [](size_t count, size_t size) { return Scratch::padded(count * size); };
        Scratch scratch(bytes((size_t)N * D, 4) + bytes((size_t)N * D, sizeof(T)) + bytes(all * D, sizeof(U)) +
                        bytes(all * f_blocks * COLUMNS, sizeof(U)) + bytes(N, 4) + a.threads * panel_bytes);
        float* q = scratch.take<float>((size_t)N * D);
        T* scaled = scratch.take<T>((size_t)N * D);  // w x, sorted
        U* turned = scratch.take<U>(all * D);
        U* dh_panels = scratch.take<U>(all * f_blocks * COLUMNS);
        int32_t* position = scratch.take<int32_t>(N);
        char* panels = scratch.take<char>(0);
        invert(plan, N, position);
        auto dh_row = [&](int row) { return (const T*)a.dh + (size_t)plan.token(row) * F; };
        auto x_row = [&](int row) { return (const T*)a.x + (size_t)plan.token(row) * D; };
        const int tasks_per_expert = (D + ROWS_PER_TASK - 1) / ROWS_PER_TASK;
        Tasks products, turning, gradients, tokens;
        std::atomic<int> threads{0};
#pragma omp parallel num_threads(a.threads)
        {
            U* panel = (U*)(panels + threads++ * panel_bytes);
            if (a.dx || a.dweights)
                products.run(E, d_blocks, [&](int e, int block) {
                    const int first = plan.first(e), m = plan.count(e), d0 = block * COLUMNS, cols = std::min(COLUMNS, D - d0);
                    if (m == 0) return;
                    pack_rows<M>((const T*)a.proj + ((size_t)e * D + d0) * F, F, F, cols, panel);
                    multiply_expert<M>([&](int i) { return dh_row(first + i); }, m, panel, F, q + (size_t)first * D + d0, D, cols);
                });
            if (a.dproj)
                turning.run(E, [&](int64_t i) {
                    const int e = (int)i, first = plan.first(e), m = plan.count(e);
                    for (int r = first; r < first + m; r++) {
                        const float w = a.weights[plan.order[r]];
                        for (int d = 0; d < D; d++) narrow(w * widen(x_row(r)[d]), scaled + (size_t)r * D + d);
                    }
                    turn<M>([&](int r) { return scaled + (size_t)(first + r) * D; }, m, D, turned + unit_of[e] * D);
                    const size_t um = unit_of[e + 1] - unit_of[e];
                    for (int b = 0; b < f_blocks; b++)
                        pack_columns<M>([&](int r) { return dh_row(first + r) + b * COLUMNS; }, m, std::min(COLUMNS, F - b * COLUMNS),
                                        dh_panels + (unit_of[e] * f_blocks + um * b) * COLUMNS);
                });
#pragma omp barrier
            if (a.dproj)
                gradients.run(E, tasks_per_expert, [&](int e, int task) {
                    const int begin = task * ROWS_PER_TASK;
                    weight_gradient<M>(begin, std::min(begin + ROWS_PER_TASK, D), F, unit_of[e + 1] - unit_of[e], turned + unit_of[e] * D,
                                       dh_panels + unit_of[e] * f_blocks * COLUMNS, (T*)a.dproj + (size_t)e * D * F);
                });
            tokens.run(a.tokens, [&](int64_t t) {
                if (a.dx) combine<T>(q, position, a.experts, a.weights, nullptr, (int)t, plan.top_k, D, (T*)a.dx);
                if (a.dweights)
                    for (int64_t at = t * plan.top_k; at < (t + 1) * plan.top_k; at++) {
                        float sum = 0;
                        if (const int row = position[at]; row >= 0)
                            for (int d = 0; d < D; d++) sum += q[(size_t)row * D + d] * widen(x_row(row)[d]);
                        ((float*)a.dweights)[at] = sum;
                    }
            });
        }
    }
};
