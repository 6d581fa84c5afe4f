// Backward of the gated and the plain MLP, after SonicMoE (arXiv 2512.14080): with q = dy Wdown^T and h =
// act(z),
//
//   dw = <q, h> (+ <dy, bdown>),  dz = act'(z) w q,  dWdown = sum dy^T (w h),  dWup = sum dz^T x,  dx = sum_j
//   dz Wup
//
// Here lanes are columns of a weight or of its gradient. dz is kept twice: as rows, gate columns first
// whatever the layout of the weights, for dx, and in strips for dWup.
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
    static constexpr size_t SMALL_WEIGHTS =
        size_t(1) << 19;  // of one expert, for which there is room in a second cache
    const MLPBackward& a;
    const int D, F, G, E, N;
    const GateUp at;
    const Act act;
    const Plan plan;
    const int f_blocks, d_blocks, f_strips, d_strips, halves;
    const ptrdiff_t dz_stride;
    const bool stream_down, stream_up;
    const int d_tasks, f_tasks, gradient_tasks;
    const std::vector<int> hit;
    int most_rows = 0;
    int group_columns;         // of one task
    float *dx_rows, *partial;  // [N, D]; [N, f_blocks] parts of <q, h>
    int32_t* position;

    // An expert's rows and what becomes of them on the way to its gradients; strips as in gradient.h.
    struct Expert {
        int id, first, count;
        size_t um;
        T* dz;  // [count, dz_stride]
        U *h, *dy, *x, *dz_strips;
    };
    size_t dz_bytes(int rows) const { return Scratch::padded(rows * dz_stride * sizeof(T)); }
    size_t strip_bytes(size_t um, int strips) const {
        return Scratch::padded(um * strips * LANES * sizeof(U));
    }
    size_t expert_bytes(int rows) const {
        const size_t um = units<M>(rows);
        return dz_bytes(rows) + strip_bytes(um, f_strips) + 2 * strip_bytes(um, d_strips) +
               strip_bytes(um, halves * f_strips);
    }
    Expert expert(int e, char* memory) const {
        Expert x{e,       plan.first(e), plan.count(e), units<M>(plan.count(e)), (T*)memory, nullptr,
                 nullptr, nullptr,       nullptr};
        x.h = (U*)(memory + dz_bytes(x.count));
        x.dy = (U*)((char*)x.h + strip_bytes(x.um, f_strips));
        x.x = (U*)((char*)x.dy + strip_bytes(x.um, d_strips));
        x.dz_strips = (U*)((char*)x.x + strip_bytes(x.um, d_strips));
        return x;
    }
    int groups_of(int columns) const { return (columns + group_columns - 1) / group_columns; }
    const T* dy_row(int row) const { return (const T*)a.dy + (size_t)plan.token(row) * D; }
    const T* x_row(int row) const { return (const T*)a.x + (size_t)plan.token(row) * D; }
    const T* z_row(int row) const { return (const T*)a.z + (size_t)row * G; }

    // `n` elements from column f on of z's gate or up, whatever their layout.
    vf load_z(const T* z, ptrdiff_t from, int f, int n) const {
        if (at.step == 1 && n == LANES) return load_wide(z + from + f);
        T some[LANES] = {};
        for (int i = 0; i < n; i++)
            some[i] = z[from + (f + i) * at.step];
        return load_wide(some);
    }
    // A block of columns of some rows, from z and q; what only fills a block up is zero.
    struct Activated {
        Block h, dgate, dup;  // h times the token's weight
    };
    template <int NAME>
    void activate(const Expert& x, int block, int cols, int r, int n, const Block& q, Activated& out) const {
        for (int i = 0; i < n; i++) {
            const int row = x.first + r + i;
            const float weight = a.weights[plan.order[row]];
            vf dot = {};
            for (int c = 0; c * LANES < cols; c++) {
                const int f = block * COLUMNS + c * LANES, in_block = std::min(cols - c * LANES, LANES);
                const vf gate = load_z(z_row(row), at.gate, f, in_block),
                         up = a.gated ? load_z(z_row(row), at.up, f, in_block) : vf{};
                const Backward b = act_backward<NAME>(act, gate, up, q[i][c] * splat(weight), a.gated);
                const vf h = rounded(b.h, (const T*)nullptr);
                dot += q[i][c] * h;
                out.h[i][c] = h * splat(weight);
                out.dgate[i][c] = b.dgate;
                out.dup[i][c] = b.dup;
            }
            float sum = 0;
            for (int l = 0; l < LANES; l++)
                sum += dot[l];
            partial[(size_t)row * f_blocks + block] = sum;
        }
    }
    static void store_columns(const vf (&v)[VECTORS], int cols, T* to) {
        for (int c = 0; c < VECTORS; c += 2)
            if (cols >= (c + 2) * LANES)
                store_pair((const vf(&)[2])v[c], to + c * LANES);
            else
                for (int i = c; i < c + 2; i++)
                    store_some(v[i], to + i * LANES, std::clamp(cols - i * LANES, 0, LANES));
    }
    static void store_strips(const Block& v, int cols, int r, int n, U* strip, size_t um) {
        strip += r / M::PER * LANES;
        for (int c = 0; c * LANES < cols; c++, strip += um * LANES)
            for (int i = 0; i < n; i += M::PER)
                store_unit<T>(v[i][c], i + 1 < n ? v[i + 1][c] : vf{}, strip + i / M::PER * LANES);
    }
    void store_activated(const Expert& x, int block, int cols, int r, int n, const Activated& v) const {
        const int f0 = block * COLUMNS;
        const size_t from = f0 / LANES * x.um * LANES;
        for (int i = 0; i < n; i++) {
            T* row = x.dz + (r + i) * dz_stride + f0;
            store_columns(v.dgate[i], cols, row);
            if (a.gated) store_columns(v.dup[i], cols, row + F);
        }
        if (a.ddown) store_strips(v.h, cols, r, n, x.h + from, x.um);
        if (!a.dup) return;
        store_strips(v.dgate, cols, r, n, x.dz_strips + from, x.um);
        if (a.gated) store_strips(v.dup, cols, r, n, x.dz_strips + f_strips * x.um * LANES + from, x.um);
    }
    // What is multiplied by an expert's rows of dy, and of dz: some blocks of columns.
    WeightRows<T> down(int e, int group) const {
        const int f0 = group * group_columns;
        return {(const T*)a.down + (size_t)e * D * F + f0, F, D, std::min(group_columns, F - f0)};
    }
    WeightRows<T> up(int e, int group) const {
        const int d0 = group * group_columns;
        const T* w = (const T*)a.up + (size_t)e * G * D + d0;
        return {w + at.gate * D, at.step * D,    G, std::min(group_columns, D - d0),
                w + at.up * D,   a.gated ? F : G};
    }
    static void read_through(const T* p, size_t count) {
        for (size_t i = 0; i < count; i += 64 / sizeof(T))
            (void)*(const volatile uint16_t*)(p + i);
    }
    // All of an expert in one go. What comes from memory is read in its own order, which is faster than
    // blocks of columns are: z at once, and small weights, too, for few rows; else beside the products before
    // theirs, in parts.
    void do_expert(const Expert& x, int next, int q_groups, int dx_groups, ProductScratch<M>& own) const {
        const size_t up_size = (size_t)G * D, down_size = (size_t)D * F;
        const T *w_up = (const T*)a.up + x.id * up_size, *w_down = (const T*)a.down;
        const bool small = up_size * sizeof(T) <= SMALL_WEIGHTS, few = small && x.count <= 8;
        auto ahead_of_dx = [&](int i) {
            if (few) return WeightRows<T>{};
            return small ? run_of(w_up + up_size * i / q_groups, up_size / q_groups) : up(x.id, 0);
        };
        auto ahead_of_next = [&](int i, int parts) {
            if (next < 0 || !q_groups || few) return WeightRows<T>{};
            return small ? run_of(w_down + next * down_size + down_size * i / parts, down_size / parts)
                         : down(next, 0);
        };
        read_through(z_row(x.first), (size_t)x.count * G);
        if (few && q_groups) read_through(w_down + x.id * down_size, down_size);
        for (int g = 0; g < q_groups; g++) {
            if (!small && g + 1 < q_groups)
                through_activation(x, g, down(x.id, g + 1), own);
            else
                through_activation(x, g, dx_groups ? ahead_of_dx(g) : ahead_of_next(g, q_groups), own);
        }
        if (few && dx_groups) read_through(w_up, up_size);
        for (int g = 0; g < dx_groups; g++)
            rows_of_dx(x, g, !small && g + 1 < dx_groups ? up(x.id, g + 1) : ahead_of_next(g, dx_groups),
                       own);
        pack(x, 0, D);
        bias_gradients(x);
        for (int task = 0; task < gradient_tasks; task++)
            gradient_rows(x, task);
    }
    void through_activation(const Expert& x, int group, const WeightRows<T>& next,
                            ProductScratch<M>& scratch) const {
        product<M>([&](int i) { return dy_row(x.first + i); }, x.count, down(x.id, group), next, scratch,
                   [&](int b, int r, int n, const Block& q) {
            const int block = group * (group_columns / COLUMNS) + b,
                      cols = std::min(COLUMNS, F - block * COLUMNS);
            Activated v;
            with_activation(act.name, [&]<int NAME>() { activate<NAME>(x, block, cols, r, n, q, v); });
            store_activated(x, block, cols, r, n, v);
        });
    }
    void rows_of_dx(const Expert& x, int group, const WeightRows<T>& next, ProductScratch<M>& scratch) const {
        product<M>([&](int i) { return x.dz + i * dz_stride; }, x.count, up(x.id, group), next, scratch,
                   [&](int b, int r, int n, const Block& acc) {
            const int d0 = group * group_columns + b * COLUMNS;
            for (int i = 0; i < n; i++)
                store_row(acc[i], dx_rows + (size_t)(x.first + r + i) * D + d0, D - d0);
        });
    }
    void pack(const Expert& x, int begin, int end) const {
        if (a.ddown) pack_strips<M>([&](int r) { return dy_row(x.first + r); }, x.count, begin, end, x.dy);
        if (a.dup) pack_strips<M>([&](int r) { return x_row(x.first + r); }, x.count, begin, end, x.x);
    }
    void rows_of_ddown(const Expert& x, int task) const {
        const int begin = task * ROWS_PER_TASK, end = std::min(begin + ROWS_PER_TASK, D);
        T* out = (T*)a.ddown + (size_t)x.id * D * F;
        if (x.count == 0)
            memset((void*)(out + (size_t)begin * F), 0, (size_t)(end - begin) * F * sizeof(T));
        else
            weight_gradient<M>(begin, end, F, x.um, x.dy, x.h, stream_down,
                               [&](int r) { return out + (size_t)r * F; });
    }
    // Of one half of dWup.
    void rows_of_dup(const Expert& x, int half, int task) const {
        const int begin = task * ROWS_PER_TASK, end = std::min(begin + ROWS_PER_TASK, F);
        T* out = (T*)a.dup + (size_t)x.id * G * D;
        if (x.count == 0)
            memset((void*)(out + ((size_t)half * F + begin) * D), 0, (size_t)(end - begin) * D * sizeof(T));
        else
            weight_gradient<M>(begin, end, D, x.um, x.dz_strips + half * f_strips * x.um * LANES, x.x,
                               stream_up,
                               [&](int r) { return out + ((half ? at.up : at.gate) + r * at.step) * D; });
    }

    void gradient_rows(const Expert& x, int task) const {
        if (a.ddown) {
            if (task < d_tasks) return rows_of_ddown(x, task);
            task -= d_tasks;
        }
        rows_of_dup(x, task / f_tasks, task % f_tasks);
    }

    // out(d) = sum of scale(row) * row[d] over an expert's rows.
    template <class Row, class Scale, class Out>
    static void column_sums(int count, int width, Row row, Scale scale, Out out) {
        std::vector<float> sum(width, 0.f);
        for (int i = 0; i < count; i++) {
            const T* p = row(i);
            const float s = scale(i);
            for (int d = 0; d < width; d++)
                sum[d] += s * widen(p[d]);
        }
        for (int d = 0; d < width; d++)
            narrow(sum[d], out(d));
    }

    void bias_gradients(const Expert& x) const {
        T *up_bias = (T*)a.dup_bias + (size_t)x.id * G, *down_bias = (T*)a.ddown_bias + (size_t)x.id * D;
        auto dz_row = [&](int i) { return x.dz + i * dz_stride; };
        auto weight = [&](int i) { return a.weights[plan.order[x.first + i]]; };
        auto up_at = [&](int g) {
            return up_bias + (g < F ? at.gate + g * at.step : at.up + (g - F) * at.step);
        };
        if (a.dup_bias) column_sums(x.count, G, dz_row, [](int) { return 1.f; }, up_at);
        if (a.ddown_bias)
            column_sums(x.count, D, [&](int i) { return dy_row(x.first + i); }, weight,
                        [&](int d) { return down_bias + d; });
    }

    void weight_of_token(int t) const {
        for (int64_t at_flat = (int64_t)t * plan.top_k; at_flat < (int64_t)(t + 1) * plan.top_k; at_flat++) {
            float sum = 0;
            if (const int row = position[at_flat]; row >= 0) {
                for (int b = 0; b < f_blocks; b++)
                    sum += partial[(size_t)row * f_blocks + b];
                if (a.down_bias) {
                    const T* bias = (const T*)a.down_bias + (size_t)a.experts[at_flat] * D;
                    for (int d = 0; d < D; d++)
                        sum += widen(dy_row(row)[d]) * widen(bias[d]);
                }
            }
            ((float*)a.dweights)[at_flat] = sum;
        }
    }

  public:
    explicit BackwardPass(const MLPBackward& a)
        : a(a), D(a.hidden), F(a.inner), G(a.up_rows), E(a.num_experts), N(a.tokens * a.top_k),
          at{(ptrdiff_t)a.gate, (ptrdiff_t)a.up_from, (ptrdiff_t)a.step},
          act{(int)a.activation, (float)a.alpha, (float)a.limit},
          plan(given_plan(E, (int)a.top_k, a.order, a.offsets, a.experts, N)), f_blocks(blocks_of(F)),
          d_blocks(blocks_of(D)), f_strips(strips_of(F)), d_strips(strips_of(D)), halves(a.gated ? 2 : 1),
          dz_stride((G * sizeof(T) + 127) / 64 * 64 / sizeof(T)),
          stream_down(is_streamed((T*)a.ddown, (size_t)E * D, F)),
          stream_up(is_streamed((T*)a.dup, (size_t)E * G, D)),
          d_tasks((D + ROWS_PER_TASK - 1) / ROWS_PER_TASK), f_tasks((F + ROWS_PER_TASK - 1) / ROWS_PER_TASK),
          gradient_tasks((a.ddown ? d_tasks : 0) + (a.dup ? halves * f_tasks : 0)), hit(plan.hit()) {
        for (int e : hit)
            most_rows = std::max(most_rows, plan.count(e));
    }

    void run() {
        // Measured: bfloat16 gains from wide groups only where nothing is packed.
        group_columns = (sizeof(T) == 4 || most_rows <= ROWS_AT_ONCE ? BLOCKS_IN_TURNS : 1) * COLUMNS;
        while (group_columns > COLUMNS &&
               (int64_t)hit.size() * std::min(groups_of(F), groups_of(D)) < 4 * a.threads)
            group_columns /= 2;
        // One thread does all of an expert, whose intermediate values then stay in its cache, where that
        // leaves no thread idle.
        const bool apart = (int64_t)hit.size() >= 8 * a.threads && (int64_t)most_rows * 8 * a.threads <= N;
        std::vector<size_t> memory_of(E + 1, 0);
        for (int e = 0; e < E; e++)
            memory_of[e + 1] = memory_of[e] + (apart ? 0 : expert_bytes(plan.count(e)));
        const size_t own_bytes = apart ? expert_bytes(most_rows) : 0;
        auto bytes = [](size_t count, size_t size) { return Scratch::padded(count * size); };
        Scratch scratch(bytes((size_t)N * D, 4) + bytes((size_t)N * f_blocks, 4) + bytes(N, 4) +
                        bytes(a.threads, sizeof(ProductScratch<M>)) + memory_of[E] + a.threads * own_bytes);
        dx_rows = scratch.take<float>((size_t)N * D);
        partial = scratch.take<float>((size_t)N * f_blocks);
        position = scratch.take<int32_t>(N);
        auto* product_scratch = scratch.take<ProductScratch<M>>(a.threads);
        char* memory = scratch.take<char>(0);
        invert(plan, N, position);
        const int64_t hits = hit.size();
        const int q_groups = a.dx || a.dup || a.dup_bias || a.ddown || a.dweights ? groups_of(F) : 0,
                  dx_groups = a.dx ? groups_of(D) : 0;
        Tasks experts, q, packing, dx, bias_tasks, gradients, tokens;
        std::atomic<int> thread_count{0};
#pragma omp parallel num_threads(a.threads)
        {
            const int thread = thread_count++;
            ProductScratch<M>& own = product_scratch[thread];
            if (apart) {
                experts.run_with_next(hits, [&](int64_t i, int64_t next) {
                    do_expert(expert(hit[i], memory + thread * own_bytes), next < hits ? hit[next] : -1,
                              q_groups, dx_groups, own);
                });
                gradients.run(E, gradient_tasks, [&](int e, int task) {
                    if (plan.count(e) == 0) gradient_rows(expert(e, memory), task);
                });
                if (a.dup_bias || a.ddown_bias)
                    bias_tasks.run(E, [&](int64_t e) {
                        if (plan.count(e) == 0) bias_gradients(expert(e, memory));
                    });
            } else {
                auto down_of = [&](int64_t i) { return down(hit[i / q_groups], i % q_groups); };
                auto up_of = [&](int64_t i) {
                    return i < hits * dx_groups ? up(hit[i / dx_groups], i % dx_groups) : WeightRows<T>{};
                };
                auto shared = [&](int e) { return expert(e, memory + memory_of[e]); };
                q.run_with_next(hits * q_groups, [&](int64_t i, int64_t next) {
                    const WeightRows<T> following = next < hits * q_groups ? down_of(next)
                                                                           : up_of(next - hits * q_groups);
                    through_activation(shared(hit[i / q_groups]), i % q_groups, following, own);
                });
                packing.run(hits, d_blocks, [&](int i, int b) {
                    pack(shared(hit[i]), b * COLUMNS, std::min((b + 1) * COLUMNS, D));
                });
#pragma omp barrier
                dx.run_with_next(hits * dx_groups, [&](int64_t i, int64_t next) {
                    rows_of_dx(shared(hit[i / dx_groups]), i % dx_groups, up_of(next), own);
                });
                if (a.dup_bias || a.ddown_bias)
                    bias_tasks.run(E, [&](int64_t e) { bias_gradients(shared(e)); });
                gradients.run(E, gradient_tasks, [&](int e, int task) { gradient_rows(shared(e), task); });
            }
            end_of_streams();
#pragma omp barrier
            tokens.run(a.tokens, [&](int64_t t) {
                if (a.dweights) weight_of_token((int)t);
                if (a.dx)
                    combine<T>(dx_rows, position, a.experts, nullptr, nullptr, (int)t, plan.top_k, D,
                               (T*)a.dx);
            });
        }
    }
};
