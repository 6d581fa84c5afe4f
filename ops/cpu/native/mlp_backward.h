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
    static constexpr size_t SMALL_WEIGHTS = size_t(1) << 19;  // of one expert, for which there is room in a second cache
    const MLPBackward& a;
    const int D, F, G, E, N;
    const GateUp at;
    const Act act;
    const Plan plan;
    const int f_blocks, d_blocks, f_strips, d_strips, halves;
    const ptrdiff_t dz_stride;
    const bool stream_down, stream_up;
    const int d_tasks, f_tasks, gradient_tasks;
    std::vector<int> hit;  // the experts with rows
    int most_rows = 0;
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
    size_t strip_bytes(size_t um, int strips) const { return Scratch::padded(um * strips * LANES * sizeof(U)); }
    size_t expert_bytes(int rows) const {
        const size_t um = units<M>(rows);
        return dz_bytes(rows) + strip_bytes(um, f_strips) + 2 * strip_bytes(um, d_strips) + strip_bytes(um, halves * f_strips);
    }
    Expert expert(int e, char* memory) const {
        Expert x{e, plan.first(e), plan.count(e), units<M>(plan.count(e)), (T*)memory, nullptr, nullptr, nullptr, nullptr};
        x.h = (U*)(memory + dz_bytes(x.count));
        x.dy = (U*)((char*)x.h + strip_bytes(x.um, f_strips));
        x.x = (U*)((char*)x.dy + strip_bytes(x.um, d_strips));
        x.dz_strips = (U*)((char*)x.x + strip_bytes(x.um, d_strips));
        return x;
    }
    const T* dy_row(int row) const { return (const T*)a.dy + (size_t)plan.token(row) * D; }
    const T* x_row(int row) const { return (const T*)a.x + (size_t)plan.token(row) * D; }
    const T* z_row(int row) const { return (const T*)a.z + (size_t)row * G; }

    // `n` elements from column f on of z's gate or up, whatever their layout.
    vf load_z(const T* z, ptrdiff_t from, int f, int n) const {
        if (at.step == 1 && n == LANES) return load_wide(z + from + f);
        T some[LANES] = {};
        for (int i = 0; i < n; i++) some[i] = z[from + (f + i) * at.step];
        return load_wide(some);
    }
    // A block of columns of some rows, from z and q; what only fills a block up is zero.
    struct Activated {
        Block h, dgate, dup;  // h times the token's weight
    };
    template <int NAME> void activate(const Expert& x, int block, int cols, int r, int n, const Block& q, Activated& out) const {
        for (int i = 0; i < n; i++) {
            const int row = x.first + r + i;
            const float weight = a.weights[plan.order[row]];
            vf dot = {};
            for (int c = 0; c * LANES < cols; c++) {
                const int f = block * COLUMNS + c * LANES, in_block = std::min(cols - c * LANES, LANES);
                const vf gate = load_z(z_row(row), at.gate, f, in_block), up = a.gated ? load_z(z_row(row), at.up, f, in_block) : vf{};
                const Backward b = act_backward<NAME>(act, gate, up, q[i][c] * splat(weight), a.gated);
                const vf h = rounded(b.h, (const T*)nullptr);
                dot += q[i][c] * h;
                out.h[i][c] = h * splat(weight), out.dgate[i][c] = b.dgate, out.dup[i][c] = b.dup;
            }
            float sum = 0;
            for (int l = 0; l < LANES; l++) sum += dot[l];
            partial[(size_t)row * f_blocks + block] = sum;
        }
    }
    static void store_columns(const vf (&v)[VECTORS], int cols, T* to) {
        for (int c = 0; c < VECTORS; c += 2)
            if (cols >= (c + 2) * LANES) store_pair((const vf(&)[2])v[c], to + c * LANES);
            else
                for (int i = c; i < c + 2; i++) store_some(v[i], to + i * LANES, std::clamp(cols - i * LANES, 0, LANES));
    }
    static void store_strips(const Block& v, int cols, int r, int n, U* strip, size_t um) {
        strip += r / M::PER * LANES;
        for (int c = 0; c * LANES < cols; c++, strip += um * LANES)
            for (int i = 0; i < n; i += M::PER) store_unit<T>(v[i][c], i + 1 < n ? v[i + 1][c] : vf{}, strip + i / M::PER * LANES);
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
    // What is multiplied by an expert's rows of dy, and of dz.
    WeightRows<T> down(int e, int block) const {
        return {(const T*)a.down + (size_t)e * D * F + block * COLUMNS, F, D, std::min(COLUMNS, F - block * COLUMNS)};
    }
    WeightRows<T> up(int e, int block) const {
        const T* w = (const T*)a.up + (size_t)e * G * D + block * COLUMNS;
        const int cols = std::min(COLUMNS, D - block * COLUMNS);
        return {w + at.gate * D, at.step * D, G, cols, w + at.up * D, a.gated ? F : G};
    }
    // All of an expert in one go. What is read from memory is read in its own order, which is several times as fast as blocks of
    // columns are: z at once, and small weights, beside the products before theirs, in as many parts as those have blocks.
    void do_expert(const Expert& x, int next, int q_blocks, int dx_blocks, ProductScratch<M>& own) const {
        const char* z = (const char*)z_row(x.first);
        for (size_t i = 0; i < (size_t)x.count * G * sizeof(T); i += 64) (void)*(const volatile char*)(z + i);
        const bool small = (size_t)G * D * sizeof(T) <= SMALL_WEIGHTS;
        auto part = [&](const T* w, size_t count, int i, int parts) { return run_of(w + count * i / parts, count / parts); };
        auto up_ahead = [&](int i) {
            return small ? part((const T*)a.up + (size_t)x.id * G * D, (size_t)G * D, i, q_blocks) : up(x.id, 0);
        };
        auto down_ahead = [&](int i) {
            if (next < 0 || !q_blocks) return WeightRows<T>{};
            return small ? part((const T*)a.down + (size_t)next * D * F, (size_t)D * F, i, dx_blocks) : down(next, 0);
        };
        for (int b = 0; b < q_blocks; b++)
            through_activation(x, b, !small && b + 1 < q_blocks ? down(x.id, b + 1) : dx_blocks ? up_ahead(b) : down_ahead(0), own);
        for (int b = 0; b < dx_blocks; b++) rows_of_dx(x, b, !small && b + 1 < dx_blocks ? up(x.id, b + 1) : down_ahead(b), own);
        pack(x, 0, D);
        bias_gradients(x);
        for (int task = 0; task < gradient_tasks; task++) gradient_rows(x, task);
    }
    void through_activation(const Expert& x, int block, const WeightRows<T>& next, ProductScratch<M>& scratch) const {
        const WeightRows<T> w = down(x.id, block);
        product<M>([&](int i) { return dy_row(x.first + i); }, x.count, w, next, scratch, [&](int r, int n, const Block& q) {
            Activated v;
            with_activation(act.name, [&]<int NAME>() { activate<NAME>(x, block, w.cols, r, n, q, v); });
            store_activated(x, block, w.cols, r, n, v);
        });
    }
    void rows_of_dx(const Expert& x, int block, const WeightRows<T>& next, ProductScratch<M>& scratch) const {
        const WeightRows<T> w = up(x.id, block);
        product<M>([&](int i) { return x.dz + i * dz_stride; }, x.count, w, next, scratch, [&](int r, int n, const Block& acc) {
            for (int i = 0; i < n; i++) store_row(acc[i], dx_rows + (size_t)(x.first + r + i) * D + block * COLUMNS, w.cols);
        });
    }
    void pack(const Expert& x, int begin, int end) const {
        if (a.ddown) pack_strips<M>([&](int r) { return dy_row(x.first + r); }, x.count, begin, end, x.dy);
        if (a.dup) pack_strips<M>([&](int r) { return x_row(x.first + r); }, x.count, begin, end, x.x);
    }
    void rows_of_ddown(const Expert& x, int task) const {
        const int begin = task * ROWS_PER_TASK, end = std::min(begin + ROWS_PER_TASK, D);
        T* out = (T*)a.ddown + (size_t)x.id * D * F;
        if (x.count == 0) memset((void*)(out + (size_t)begin * F), 0, (size_t)(end - begin) * F * sizeof(T));
        else weight_gradient<M>(begin, end, F, x.um, x.dy, x.h, stream_down, [&](int r) { return out + (size_t)r * F; });
    }
    // Of one half of dWup.
    void rows_of_dup(const Expert& x, int half, int task) const {
        const int begin = task * ROWS_PER_TASK, end = std::min(begin + ROWS_PER_TASK, F);
        T* out = (T*)a.dup + (size_t)x.id * G * D;
        if (x.count == 0) memset((void*)(out + ((size_t)half * F + begin) * D), 0, (size_t)(end - begin) * D * sizeof(T));
        else
            weight_gradient<M>(begin, end, D, x.um, x.dz_strips + half * f_strips * x.um * LANES, x.x, stream_up,
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
    template <class Row, class Scale, class Out> static void column_sums(int count, int width, Row row, Scale scale, Out out) {
        std::vector<float> sum(width, 0.f);
        for (int i = 0; i < count; i++) {
            const T* p = row(i);
            const float s = scale(i);
            for (int d = 0; d < width; d++) sum[d] += s * widen(p[d]);
        }
        for (int d = 0; d < width; d++) narrow(sum[d], out(d));
    }

    void bias_gradients(const Expert& x) const {
        T *up_bias = (T*)a.dup_bias + (size_t)x.id * G, *down_bias = (T*)a.ddown_bias + (size_t)x.id * D;
        auto dz_row = [&](int i) { return x.dz + i * dz_stride; };
        auto weight = [&](int i) { return a.weights[plan.order[x.first + i]]; };
        auto up_at = [&](int g) { return up_bias + (g < F ? at.gate + g * at.step : at.up + (g - F) * at.step); };
        if (a.dup_bias) column_sums(x.count, G, dz_row, [](int) { return 1.f; }, up_at);
        if (a.ddown_bias) column_sums(x.count, D, [&](int i) { return dy_row(x.first + i); }, weight, [&](int d) { return down_bias + d; });
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
          stream_down(is_streamed((T*)a.ddown, (size_t)E * D, F)), stream_up(is_streamed((T*)a.dup, (size_t)E * G, D)),
          d_tasks((D + ROWS_PER_TASK - 1) / ROWS_PER_TASK), f_tasks((F + ROWS_PER_TASK - 1) / ROWS_PER_TASK),
          gradient_tasks((a.ddown ? d_tasks : 0) + (a.dup ? halves * f_tasks : 0)) {
        for (int e = 0; e < E; e++) {
            if (plan.count(e)) hit.push_back(e);
            most_rows = std::max(most_rows, plan.count(e));
        }
    }

    void run() {
        // One thread does all of an expert, whose intermediate values then stay in its cache, where that leaves no thread idle.
        const bool apart = (int64_t)hit.size() >= 8 * a.threads && (int64_t)most_rows * 8 * a.threads <= N;
        std::vector<size_t> memory_of(E + 1, 0);
        for (int e = 0; e < E; e++) memory_of[e + 1] = memory_of[e] + (apart ? 0 : expert_bytes(plan.count(e)));
        const size_t own_bytes = apart ? expert_bytes(most_rows) : 0;
        auto bytes = [](size_t count, size_t size) { return Scratch::padded(count * size); };
        Scratch scratch(bytes((size_t)N * D, 4) + bytes((size_t)N * f_blocks, 4) + bytes(N, 4) + bytes(a.threads, sizeof(ProductScratch<M>)) +
                        memory_of[E] + a.threads * own_bytes);
        dx_rows = scratch.take<float>((size_t)N * D);
        partial = scratch.take<float>((size_t)N * f_blocks);
        position = scratch.take<int32_t>(N);
        auto* product_scratch = scratch.take<ProductScratch<M>>(a.threads);
        char* memory = scratch.take<char>(0);
        invert(plan, N, position);
        const int64_t hits = hit.size();
        const int q_blocks = a.dx || a.dup || a.dup_bias || a.ddown || a.dweights ? f_blocks : 0, dx_blocks = a.dx ? d_blocks : 0;
        Tasks experts, q, packing, dx, bias_tasks, gradients, tokens;
        std::atomic<int> thread_count{0};
#pragma omp parallel num_threads(a.threads)
        {
            const int thread = thread_count++;
            ProductScratch<M>& own = product_scratch[thread];
            if (apart) {
                experts.run_with_next(hits, [&](int64_t i, int64_t next) {
                    do_expert(expert(hit[i], memory + thread * own_bytes), next < hits ? hit[next] : -1, q_blocks, dx_blocks, own);
                });
                gradients.run(E, gradient_tasks, [&](int e, int task) {
                    if (plan.count(e) == 0) gradient_rows(expert(e, memory), task);
                });
                if (a.dup_bias || a.ddown_bias)
                    bias_tasks.run(E, [&](int64_t e) {
                        if (plan.count(e) == 0) bias_gradients(expert(e, memory));
                    });
            } else {
                auto down_of = [&](int64_t i) { return down(hit[i / q_blocks], i % q_blocks); };
                auto up_of = [&](int64_t i) { return i < hits * dx_blocks ? up(hit[i / dx_blocks], i % dx_blocks) : WeightRows<T>{}; };
                auto shared = [&](int e) { return expert(e, memory + memory_of[e]); };
                q.run_with_next(hits * q_blocks, [&](int64_t i, int64_t next) {
                    const WeightRows<T> following = next < hits * q_blocks ? down_of(next) : up_of(next - hits * q_blocks);
                    through_activation(shared(hit[i / q_blocks]), i % q_blocks, following, own);
                });
                packing.run(hits, d_blocks, [&](int i, int b) { pack(shared(hit[i]), b * COLUMNS, std::min((b + 1) * COLUMNS, D)); });
#pragma omp barrier
                dx.run_with_next(hits * dx_blocks, [&](int64_t i, int64_t next) { rows_of_dx(shared(hit[i / dx_blocks]), i % dx_blocks, up_of(next), own); });
                if (a.dup_bias || a.ddown_bias) bias_tasks.run(E, [&](int64_t e) { bias_gradients(shared(e)); });
                gradients.run(E, gradient_tasks, [&](int e, int task) { gradient_rows(shared(e), task); });
            }
            end_of_streams();
#pragma omp barrier
            tokens.run(a.tokens, [&](int64_t t) {
                if (a.dweights) weight_of_token((int)t);
                if (a.dx) combine<T>(dx_rows, position, a.experts, nullptr, nullptr, (int)t, plan.top_k, D, (T*)a.dx);
            });
        }
    }
};
