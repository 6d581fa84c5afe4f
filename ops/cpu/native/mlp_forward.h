// Forward of the gated and the plain MLP, for every weight format:
//
//   z = x Wup (+ b), h = act(z), row = h Wdown, y_t = sum_j w_tj (row_tj + b)
//
// Products is PanelProducts for plain weights and panels, DotProducts for quantised weights. Its parts:
//
//   gather(i)                a part of x, copied into the order in which it is multiplied
//   run<UP>(task, ...)       some columns of h (UP) or of the rows, for all rows of one expert
//   ahead<UP>(task)          the weights of a task, to be prefetched during the task before it
//   columns_of_step<UP>()    the columns of a task are a multiple of these
//   bytes_of_step<UP>()      the weights of so many columns
#pragma once
#include "mlp.h"

template <class Products> class ForwardPass : MLP {
    using T = typename Products::T;
    const MLPForward& a;

    Plan make_or_check_plan() const {
        if (!a.y) return given_plan(E, K, a.order, a.offsets, a.experts, N);
        make_plan(a.experts, N, E, a.order, a.offsets);
        return {E, K, a.order, a.offsets};
    }
    std::vector<ExpertRows> experts_with_rows(const Plan& plan) const {
        std::vector<ExpertRows> experts;
        for (int e = 0; e < E; e++) {
            const int first = std::max(plan.first(e), (int)a.first_row), count = plan.first(e + 1) - first;
            if (count > 0) experts.push_back({e, first, count});
        }
        return experts;
    }
    // A task has about BYTES_PER_TASK of weights, which stay in the second cache while all rows of the expert
    // are multiplied by them; fewer where there would be less than eight tasks for each thread.
    template <bool UP> std::vector<ForwardTask> make_tasks(const Products& products, int num_experts) const {
        const int columns = UP ? F : D, step = products.template columns_of_step<UP>();
        const int64_t step_bytes = products.template bytes_of_step<UP>();
        const int64_t most = Products::BYTES_PER_TASK / std::max<int64_t>(step_bytes, 1);
        const int64_t fair = (int64_t)num_experts * columns / step / (8 * a.threads);
        const int block = step * (int)std::max<int64_t>(1, std::min(most, fair));
        std::vector<ForwardTask> tasks;
        for (int i = 0; i < num_experts; i++)
            for (int begin = 0; begin < columns; begin += block)
                tasks.push_back({i, begin, std::min(begin + block, columns)});
        return tasks;
    }

  public:
    explicit ForwardPass(const MLPForward& a) : MLP(a.sizes), a(a) {}

    void run() {
        const Plan plan = make_or_check_plan();
        const std::vector<ExpertRows> experts = experts_with_rows(plan);
        Products products(a, experts);
        const size_t row_bytes = Scratch::padded((size_t)N * D * sizeof(float));
        Scratch scratch(row_bytes + Scratch::padded(N * sizeof(int32_t)) + products.bytes());
        float* rows = scratch.take<float>((size_t)N * D);
        int32_t* position = scratch.take<int32_t>(N);
        products.place(scratch, rows);
        invert(plan, N, position);

        std::vector<ForwardTask> up_tasks = make_tasks<true>(products, (int)experts.size()), down_tasks;
        if (a.y) down_tasks = make_tasks<false>(products, (int)experts.size());
        const int64_t up_count = up_tasks.size(), down_count = down_tasks.size();
        auto ahead_of = [&](int64_t task) {
            if (task < up_count) return products.template ahead<true>(up_tasks[task]);
            task -= up_count;
            return task < down_count ? products.template ahead<false>(down_tasks[task])
                                     : typename Products::Ahead();
        };
        Tasks gathering, up, down, combining;
        in_threads(a.threads, [&](int thread) {
            typename Products::Own own(products, thread);
            gathering.run(products.num_gathers(), [&](int64_t i) { products.gather(i); });
#pragma omp barrier
            up.run_with_next(up_count, [&](int64_t i, int64_t next) {
                products.template run<true>(up_tasks[i], own, ahead_of(next));
            });
            if (a.y) {
#pragma omp barrier
                down.run_with_next(down_count, [&](int64_t i, int64_t next) {
                    products.template run<false>(down_tasks[i], own, ahead_of(up_count + next));
                });
#pragma omp barrier
                combining.run(a.sizes.tokens, [&](int64_t t) {
                    combine<T>(rows, position, a.experts, a.weights, (const T*)a.down_bias, (int)t, K, D,
                               (T*)a.y);
                });
            }
        });
    }
};
