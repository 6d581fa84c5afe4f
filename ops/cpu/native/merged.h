// The merged up-projection, h_t = sum_j w_tj (x_t W_e), and its backward: with q = dh W^T,
//
//   dw = <q, x>,  dx = sum_j w q,  dW_e = sum (w x)^T dh
#pragma once
#include "gradient.h"

struct MergedForward {
    const void *x, *proj;
    const int64_t* experts;
    const float* weights;
    void* h;
    int32_t *order, *offsets;
    int64_t tokens, top_k, num_experts, hidden, inner, threads;
};

template <class M> struct MergedForwardPass {
    using T = typename M::T;
    const MergedForward& a;

    void run() const {
        const int D = a.hidden, F = a.inner, E = a.num_experts, N = a.tokens * a.top_k, blocks = blocks_of(F);
        make_plan(a.experts, N, E, a.order, a.offsets);
        const Plan plan{E, (int)a.top_k, a.order, a.offsets};
        const std::vector<int> hit = plan.hit();
        const int64_t count = (int64_t)hit.size() * blocks;
        Scratch scratch(Scratch::padded((size_t)N * F * 4) + Scratch::padded((size_t)N * 4) +
                        Scratch::padded(a.threads * sizeof(ProductScratch<M>)));
        float* rows = scratch.take<float>((size_t)N * F);
        int32_t* position = scratch.take<int32_t>(N);
        auto* product_scratch = scratch.take<ProductScratch<M>>(a.threads);
        invert(plan, N, position);
        auto weights_of = [&](int64_t i) -> WeightRows<T> {
            if (i >= count) return {};
            const int f0 = (int)(i % blocks) * COLUMNS;
            return {(const T*)a.proj + (size_t)hit[i / blocks] * D * F + f0, F, D, std::min(COLUMNS, F - f0)};
        };
        Tasks products, tokens;
        in_threads(a.threads, [&](int thread) {
            ProductScratch<M>& own = product_scratch[thread];
            products.run_with_next(count, [&](int64_t i, int64_t next) {
                const int e = hit[i / blocks], first = plan.first(e), f0 = (int)(i % blocks) * COLUMNS;
                const WeightRows<T> w = weights_of(i);
                product<M>([&](int r) { return (const T*)a.x + (size_t)plan.token(first + r) * D; },
                           plan.count(e), w, weights_of(next), own, [&](int, int r, int n, const Block& acc) {
                    for (int j = 0; j < n; j++)
                        store_row(acc[j], rows + (size_t)(first + r + j) * F + f0, w.cols);
                });
            });
#pragma omp barrier
            tokens.run(a.tokens, [&](int64_t t) {
                combine<T>(rows, position, a.experts, a.weights, nullptr, (int)t, plan.top_k, F, (T*)a.h);
            });
        });
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

template <class M> struct MergedBackwardPass {
    using T = typename M::T;
    using U = typename M::U;
    const MergedBackward& a;

    void run() const {
        const int D = a.hidden, F = a.inner, E = a.num_experts, N = a.tokens * a.top_k,
                  d_blocks = blocks_of(D);
        const int d_strips = strips_of(D), f_strips = strips_of(F);
        const Plan plan = given_plan(E, (int)a.top_k, a.order, a.offsets, a.experts, N);
        const std::vector<size_t> unit_of = units_before<M>(plan);
        const size_t all = unit_of[E], panel_bytes = Scratch::padded(units<M>(F) * COLUMNS * sizeof(U));
        auto bytes = [](size_t count, size_t size) { return Scratch::padded(count * size); };
        Scratch scratch(bytes((size_t)N * D, 4) + bytes((size_t)N * D, sizeof(T)) +
                        bytes(all * d_strips * LANES, sizeof(U)) + bytes(all * f_strips * LANES, sizeof(U)) +
                        bytes(N, 4) + a.threads * panel_bytes);
        float* q = scratch.take<float>((size_t)N * D);
        T* scaled = scratch.take<T>((size_t)N * D);  // w x, sorted; unused for float16
        U* x_strips = scratch.take<U>(all * d_strips * LANES);
        U* dh_strips = scratch.take<U>(all * f_strips * LANES);
        int32_t* position = scratch.take<int32_t>(N);
        char* panels = scratch.take<char>(0);
        invert(plan, N, position);
        auto dh_row = [&](int row) { return (const T*)a.dh + (size_t)plan.token(row) * F; };
        auto x_row = [&](int row) { return (const T*)a.x + (size_t)plan.token(row) * D; };
        const int tasks_per_expert = (D + ROWS_PER_TASK - 1) / ROWS_PER_TASK;
        const bool streamed = is_streamed((T*)a.dproj, (size_t)E * D, F);
        Tasks products, turning, gradients, tokens;
        in_threads(a.threads, [&](int thread) {
            U* panel = (U*)(panels + thread * panel_bytes);
            if (a.dx || a.dweights)
                products.run(E, d_blocks, [&](int e, int block) {
                    const int first = plan.first(e), m = plan.count(e), d0 = block * COLUMNS,
                              cols = std::min(COLUMNS, D - d0);
                    if (m == 0) return;
                    const T* w = (const T*)a.proj + ((size_t)e * D + d0) * F;
                    for (int c = 0; c < COLUMNS; c += LANES)
                        turn<M>([&](int i) { return w + (size_t)(c + i) * F; }, cols - c, F, panel, COLUMNS,
                                c);
                    RowsAhead<T> nothing;
                    for (int r0 = first; r0 < first + m; r0 += ROWS_AT_ONCE) {
                        const int n = std::min(ROWS_AT_ONCE, first + m - r0);
                        const T* rows[ROWS_AT_ONCE];
                        for (int r = 0; r < n; r++)
                            rows[r] = dh_row(r0 + r);
                        Block acc;
                        multiply<M>(rows, n, panel, F, nothing, acc);
                        for (int r = 0; r < n; r++)
                            store_row(acc[r], q + (size_t)(r0 + r) * D + d0, cols);
                    }
                });
            if (a.dproj)
                turning.run(E, [&](int64_t i) {
                    const int e = (int)i, first = plan.first(e), m = plan.count(e);
                    U* strips = x_strips + unit_of[e] * d_strips * LANES;
                    if constexpr (std::is_same_v<T, f16>) {
                        // Scaled as float32, because w x may exceed the largest float16.
                        pack_strips<M>([&](int r) { return x_row(first + r); }, m, 0, D, strips);
                        for (int s = 0; s < d_strips; s++)
                            for (int r = 0; r < m; r++, strips += LANES)
                                store(strips, rounded_or_large<T>(load<vf>(strips) *
                                                                  splat(a.weights[plan.order[first + r]])));
                    } else {
                        for (int r = first; r < first + m; r++) {
                            const float w = a.weights[plan.order[r]];
                            for (int d = 0; d < D; d++)
                                narrow(w * widen(x_row(r)[d]), scaled + (size_t)r * D + d);
                        }
                        pack_strips<M>([&](int r) { return scaled + (size_t)(first + r) * D; }, m, 0, D,
                                       strips);
                    }
                    pack_strips<M>([&](int r) { return dh_row(first + r); }, m, 0, F,
                                   dh_strips + unit_of[e] * f_strips * LANES);
                });
#pragma omp barrier
            if (a.dproj)
                gradients.run(E, tasks_per_expert, [&](int e, int task) {
                    const int begin = task * ROWS_PER_TASK, end = std::min(begin + ROWS_PER_TASK, D);
                    const size_t um = unit_of[e + 1] - unit_of[e];
                    T* out = (T*)a.dproj + (size_t)e * D * F;
                    weight_gradient<M>(begin, end, F, um, x_strips + unit_of[e] * d_strips * LANES,
                                       dh_strips + unit_of[e] * f_strips * LANES, streamed,
                                       [&](int r) { return out + (size_t)r * F; });
                });
            end_of_streams();
            tokens.run(a.tokens, [&](int64_t t) {
                if (a.dx)
                    combine<T>(q, position, a.experts, a.weights, nullptr, (int)t, plan.top_k, D, (T*)a.dx);
                if (a.dweights)
                    for (int64_t at = t * plan.top_k; at < (t + 1) * plan.top_k; at++) {
                        float sum = 0;
                        if (const int row = position[at]; row >= 0)
                            for (int d = 0; d < D; d++)
                                sum += q[(size_t)row * D + d] * widen(x_row(row)[d]);
                        ((float*)a.dweights)[at] = sum;
                    }
            });
        });
    }
};
