// Backward of the gated and the plain MLP, for every weight format, after SonicMoE (arXiv 2512.14080):
//
//   q = dy Wdown^T, h = act(z)
//   dw = <q, h> (+ <dy, bdown>)
//   dz = act'(z) w q
//   dx = sum_j dz Wup
//   dWdown = sum dy^T (w h)
//   dWup = sum dz^T x
//
// Lanes are columns of a weight or of its gradient. dz is stored as rows, gate columns first, for dx, and in
// strips for dWup. Quantised weights have no gradient; a panel of them at a time is widened, and dy and dz
// are float32.
#pragma once
#include "gradient.h"
#include "mlp.h"

// Format reads the weights; Element is their type and that of dy and dz: T, or float32 where they are
// widened.
template <class Mac, class Format> class BackwardPass : MLP {
    using T = typename Mac::T;
    using M = typename Format::template BackwardMac<Mac>;
    using U = typename M::U;
    using Element = typename M::T;
    using Columns = typename Format::Columns;
    static constexpr bool HAS_GRADIENT = Format::HAS_GRADIENT, WIDENS_DY = !std::is_same_v<Element, T>;
    // Weights of one expert for which there is room in a second cache.
    static constexpr size_t SMALL_WEIGHTS = size_t(1) << 19;

    const MLPBackward& a;
    const Format up, down;
    const Plan plan;
    const std::vector<int> hit;
    const int f_blocks, d_blocks, f_strips, d_strips;
    const ptrdiff_t dz_stride;
    const bool stream_down, stream_up;
    const int d_tasks, f_tasks, gradient_tasks;
    int most_rows = 0;
    int group_columns;         // columns of a weight in one task
    Element* wide_dy;          // [T, D], where dy is widened
    float *dx_rows, *partial;  // [N, D]; [N, f_blocks] parts of <q, h>
    int32_t* position;

    // An expert's rows and their intermediate values; strips as in gradient.h.
    struct Expert {
        int id, first, count;
        size_t um;
        Element* dz;  // [count, dz_stride]
        U *h, *dy, *x, *dz_strips;
    };
    size_t dz_bytes(int rows) const { return Scratch::padded(rows * dz_stride * sizeof(Element)); }
    size_t strip_bytes(size_t um, int strips) const {
        return HAS_GRADIENT ? Scratch::padded(um * strips * LANES * sizeof(U)) : 0;
    }
    size_t expert_bytes(int rows) const {
        const size_t um = units<M>(rows);
        return dz_bytes(rows) + strip_bytes(um, f_strips) + 2 * strip_bytes(um, d_strips) +
               strip_bytes(um, halves * f_strips);
    }
    Expert expert(int e, char* memory) const {
        Expert x{};
        x.id = e;
        x.first = plan.first(e);
        x.count = plan.count(e);
        x.um = units<M>(x.count);
        auto take = [&](size_t bytes) {
            char* taken = memory;
            memory += bytes;
            return taken;
        };
        x.dz = (Element*)take(dz_bytes(x.count));
        x.h = (U*)take(strip_bytes(x.um, f_strips));
        x.dy = (U*)take(strip_bytes(x.um, d_strips));
        x.x = (U*)take(strip_bytes(x.um, d_strips));
        x.dz_strips = (U*)take(strip_bytes(x.um, halves * f_strips));
        return x;
    }
    int groups_of(int columns) const { return (columns + group_columns - 1) / group_columns; }
    const T* dy_of_token(int t) const { return (const T*)a.dy + (size_t)t * D; }
    const Element* dy_row(int row) const {
        if constexpr (WIDENS_DY)
            return wide_dy + (size_t)plan.token(row) * D;
        else
            return dy_of_token(plan.token(row));
    }
    const T* x_row(int row) const { return (const T*)a.x + (size_t)plan.token(row) * D; }
    const T* z_row(int row) const { return (const T*)a.z + (size_t)row * G; }

    // The columns of a group of blocks: of Wdown for q, of Wup for dx.
    Columns down_columns(int e, int group) const {
        const int f0 = group * group_columns;
        return down.columns(e, down_order(), f0, std::min(group_columns, F - f0));
    }
    Columns up_columns(int e, int group) const {
        const int d0 = group * group_columns;
        return up.columns(e, up_order(), d0, std::min(group_columns, D - d0));
    }

    // A block of columns of some rows, from z and q. Columns that do not exist are zero.
    struct ActivatedBlock {
        Block h, dgate, dup;  // h times the token's weight
    };
    template <int NAME>
    void activate(const Expert& x, int block, int cols, int r, int n, const Block& q,
                  ActivatedBlock& out) const {
        for (int i = 0; i < n; i++) {
            const int row = x.first + r + i;
            const float weight = a.weights[plan.order[row]];
            vf dot = {};
            for (int c = 0; c * LANES < cols; c++) {
                const int f = block * COLUMNS + c * LANES, in_block = std::min(cols - c * LANES, LANES);
                const vf gate = load_z(z_row(row), at.gate + f * at.step, in_block);
                const vf up = gated ? load_z(z_row(row), at.up + f * at.step, in_block) : vf{};
                const Activated b = act_backward<NAME>(act, gate, up, q[i][c] * splat(weight), gated);
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
    static void store_columns(const vf (&v)[VECTORS], int cols, Element* to) {
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
    void store_activated(const Expert& x, int block, int cols, int r, int n, const ActivatedBlock& v) const {
        const int f0 = block * COLUMNS;
        for (int i = 0; i < n; i++) {
            Element* row = x.dz + (r + i) * dz_stride + f0;
            store_columns(v.dgate[i], cols, row);
            if (gated) store_columns(v.dup[i], cols, row + F);
        }
        if constexpr (HAS_GRADIENT) {
            const size_t from = f0 / LANES * x.um * LANES;
            if (a.ddown) store_strips(v.h, cols, r, n, x.h + from, x.um);
            if (!a.dup) return;
            store_strips(v.dgate, cols, r, n, x.dz_strips + from, x.um);
            if (gated) store_strips(v.dup, cols, r, n, x.dz_strips + f_strips * x.um * LANES + from, x.um);
        }
    }
    // q of a group of columns, and what follows from it and z. `next` is read ahead.
    void through_activation(const Expert& x, int group, const Columns& next, ProductScratch<M>& own) const {
        product<M>([&](int i) { return dy_row(x.first + i); }, x.count, down_columns(x.id, group), next, own,
                   [&](int b, int r, int n, const Block& q) {
            const int block = group * (group_columns / COLUMNS) + b;
            const int cols = std::min(COLUMNS, F - block * COLUMNS);
            ActivatedBlock v;
            with_activation(act.name, [&]<int NAME>() { activate<NAME>(x, block, cols, r, n, q, v); });
            store_activated(x, block, cols, r, n, v);
        });
    }
    void rows_of_dx(const Expert& x, int group, const Columns& next, ProductScratch<M>& own) const {
        product<M>([&](int i) { return x.dz + i * dz_stride; }, x.count, up_columns(x.id, group), next, own,
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
        weight_gradient<M>(begin, end, F, x.um, x.dy, x.h, stream_down,
                           [&](int r) { return out + (size_t)r * F; });
    }
    void rows_of_dup(const Expert& x, int half, int task) const {
        const int begin = task * ROWS_PER_TASK, end = std::min(begin + ROWS_PER_TASK, F);
        T* out = (T*)a.dup + (size_t)x.id * G * D;
        const U* dz = x.dz_strips + half * f_strips * x.um * LANES;
        weight_gradient<M>(begin, end, D, x.um, dz, x.x, stream_up,
                           [&](int r) { return out + ((half ? at.up : at.gate) + r * at.step) * D; });
    }
    void gradient_rows(const Expert& x, int task) const {
        if (a.ddown) {
            if (task < d_tasks) return rows_of_ddown(x, task);
            task -= d_tasks;
        }
        rows_of_dup(x, task / f_tasks, task % f_tasks);
    }

    // out(c) = sum of scale(row) * row[c] over `count` rows.
    template <class Row, class Scale, class Out>
    static void column_sums(int count, int width, Row row, Scale scale, Out out) {
        std::vector<float> sum(width, 0.f);
        for (int i = 0; i < count; i++) {
            const Element* p = row(i);
            const float s = scale(i);
            for (int c = 0; c < width; c++)
                sum[c] += s * widen(p[c]);
        }
        for (int c = 0; c < width; c++)
            narrow(sum[c], out(c));
    }
    void bias_gradients(const Expert& x) const {
        T *dup_bias = (T*)a.dup_bias + (size_t)x.id * G, *ddown_bias = (T*)a.ddown_bias + (size_t)x.id * D;
        auto dz_row = [&](int i) { return x.dz + i * dz_stride; };
        auto weight = [&](int i) { return a.weights[plan.order[x.first + i]]; };
        if (a.dup_bias)
            column_sums(x.count, G, dz_row, [](int) { return 1.f; },
                        [&](int g) { return dup_bias + up_order().row(g); });
        if (a.ddown_bias)
            column_sums(x.count, D, [&](int i) { return dy_row(x.first + i); }, weight,
                        [&](int d) { return ddown_bias + d; });
    }

    void weights_of_token(int t) const {
        const T* dy = dy_of_token(t);
        for (int64_t j = (int64_t)t * K; j < (int64_t)(t + 1) * K; j++) {
            float sum = 0;
            if (const int row = position[j]; row >= 0) {
                for (int b = 0; b < f_blocks; b++)
                    sum += partial[(size_t)row * f_blocks + b];
                if (a.down_bias) {
                    const T* bias = (const T*)a.down_bias + (size_t)a.experts[j] * D;
                    for (int d = 0; d < D; d++)
                        sum += widen(dy[d]) * widen(bias[d]);
                }
            }
            ((float*)a.dweights)[j] = sum;
        }
    }

    static void read_through(const T* p, size_t count) {
        for (size_t i = 0; i < count; i += 64 / sizeof(T))
            (void)*(const volatile uint16_t*)(p + i);
    }
    // All of an expert by one thread. Memory is read in its own order, which is faster than in blocks of
    // columns. Small weights for few rows are read at once, others ahead in parts, during the products before
    // theirs.
    void do_expert(const Expert& x, int next, int q_groups, int dx_groups, ProductScratch<M>& own) const {
        const size_t up_size = (size_t)G * D, down_size = (size_t)D * F;
        const T *w_up = up.row(x.id, 0), *w_down = down.row(0, 0);
        const bool small = up_size * sizeof(T) <= SMALL_WEIGHTS, few = small && x.count <= 8;
        auto ahead_of_dx = [&](int i) {
            if (few) return Columns{};
            return small ? run_of(w_up + up_size * i / q_groups, up_size / q_groups) : up_columns(x.id, 0);
        };
        auto ahead_of_next = [&](int i, int parts) {
            if (next < 0 || !q_groups || few) return Columns{};
            return small ? run_of(w_down + next * down_size + down_size * i / parts, down_size / parts)
                         : down_columns(next, 0);
        };
        read_through(z_row(x.first), (size_t)x.count * G);
        if (few && q_groups) read_through(w_down + x.id * down_size, down_size);
        for (int g = 0; g < q_groups; g++) {
            if (!small && g + 1 < q_groups)
                through_activation(x, g, down_columns(x.id, g + 1), own);
            else
                through_activation(x, g, dx_groups ? ahead_of_dx(g) : ahead_of_next(g, q_groups), own);
        }
        if (few && dx_groups) read_through(w_up, up_size);
        for (int g = 0; g < dx_groups; g++) {
            if (!small && g + 1 < dx_groups)
                rows_of_dx(x, g, up_columns(x.id, g + 1), own);
            else
                rows_of_dx(x, g, ahead_of_next(g, dx_groups), own);
        }
        pack(x, 0, D);
        bias_gradients(x);
        for (int task = 0; task < gradient_tasks; task++)
            gradient_rows(x, task);
    }

  public:
    explicit BackwardPass(const MLPBackward& a)
        : MLP(a.sizes), a(a), up(a.up, G, D, (int)a.sizes.group), down(a.down, D, F, (int)a.sizes.group),
          plan(given_plan(E, K, a.order, a.offsets, a.experts, N)), hit(plan.hit()), f_blocks(blocks_of(F)),
          d_blocks(blocks_of(D)), f_strips(strips_of(F)), d_strips(strips_of(D)),
          dz_stride((G * sizeof(Element) + 127) / 64 * 64 / sizeof(Element)),
          stream_down(is_streamed((T*)a.ddown, (size_t)E * D, F)),
          stream_up(is_streamed((T*)a.dup, (size_t)E * G, D)),
          d_tasks((D + ROWS_PER_TASK - 1) / ROWS_PER_TASK), f_tasks((F + ROWS_PER_TASK - 1) / ROWS_PER_TASK),
          gradient_tasks((a.ddown ? d_tasks : 0) + (a.dup ? halves * f_tasks : 0)) {
        for (int e : hit)
            most_rows = std::max(most_rows, plan.count(e));
        // Measured: bfloat16 gains from wide groups only where nothing is packed, widened weights never.
        const bool wide = Columns::IN_PLACE && (sizeof(T) == 4 || most_rows <= ROWS_AT_ONCE);
        group_columns = (wide ? BLOCKS_IN_TURNS : 1) * COLUMNS;
        while (group_columns > COLUMNS &&
               (int64_t)hit.size() * std::min(groups_of(F), groups_of(D)) < 4 * a.threads)
            group_columns /= 2;
    }

    void run() {
        // One thread does all of an expert, in its own cache, where that leaves no thread idle.
        const bool apart = HAS_GRADIENT && (int64_t)hit.size() >= 8 * a.threads &&
                           (int64_t)most_rows * 8 * a.threads <= N;
        std::vector<size_t> memory_of(E + 1, 0);
        for (int e = 0; e < E; e++)
            memory_of[e + 1] = memory_of[e] + (apart ? 0 : expert_bytes(plan.count(e)));
        const size_t own_bytes = apart ? expert_bytes(most_rows) : 0;
        auto bytes = [](size_t count, size_t size) { return Scratch::padded(count * size); };
        const size_t dy_size = WIDENS_DY ? a.sizes.tokens * D : 0;
        Scratch scratch(bytes(dy_size, sizeof(Element)) + bytes((size_t)N * D, 4) +
                        bytes((size_t)N * f_blocks, 4) + bytes(N, 4) +
                        bytes(a.threads, sizeof(ProductScratch<M>)) + memory_of[E] + a.threads * own_bytes);
        wide_dy = scratch.take<Element>(dy_size);
        dx_rows = scratch.take<float>((size_t)N * D);
        partial = scratch.take<float>((size_t)N * f_blocks);
        position = scratch.take<int32_t>(N);
        auto* product_scratch = scratch.take<ProductScratch<M>>(a.threads);
        char* memory = scratch.take<char>(0);
        invert(plan, N, position);
        const int64_t hits = hit.size();
        const bool needs_q = a.dx || a.dup || a.dup_bias || a.ddown || a.dweights;
        const int q_groups = needs_q ? groups_of(F) : 0, dx_groups = a.dx ? groups_of(D) : 0;
        Tasks widening, experts, q, packing, dx, bias_tasks, gradients, tokens;
        in_threads(a.threads, [&](int thread) {
            ProductScratch<M>& own = product_scratch[thread];
            if constexpr (WIDENS_DY) {
                widening.run(a.sizes.tokens, [&](int64_t t) {
                    for (int d = 0; d < D; d++)
                        wide_dy[t * D + d] = widen(dy_of_token((int)t)[d]);
                });
#pragma omp barrier
            }
            if (apart) {
                if constexpr (HAS_GRADIENT) {
                    experts.run_with_next(hits, [&](int64_t i, int64_t next) {
                        const Expert x = expert(hit[i], memory + thread * own_bytes);
                        do_expert(x, next < hits ? hit[next] : -1, q_groups, dx_groups, own);
                    });
                    gradients.run(E, gradient_tasks, [&](int e, int task) {
                        if (plan.count(e) == 0) gradient_rows(expert(e, memory), task);
                    });
                    if (a.dup_bias || a.ddown_bias)
                        bias_tasks.run(E, [&](int64_t e) {
                            if (plan.count(e) == 0) bias_gradients(expert(e, memory));
                        });
                }
            } else {
                const int64_t q_count = hits * q_groups, dx_count = hits * dx_groups;
                auto down_of = [&](int64_t i) { return down_columns(hit[i / q_groups], i % q_groups); };
                auto up_of = [&](int64_t i) {
                    return i < dx_count ? up_columns(hit[i / dx_groups], i % dx_groups) : Columns{};
                };
                auto shared = [&](int e) { return expert(e, memory + memory_of[e]); };
                q.run_with_next(q_count, [&](int64_t i, int64_t next) {
                    const Columns following = next < q_count ? down_of(next) : up_of(next - q_count);
                    through_activation(shared(hit[i / q_groups]), i % q_groups, following, own);
                });
                if constexpr (HAS_GRADIENT)
                    packing.run(hits, d_blocks, [&](int i, int b) {
                        pack(shared(hit[i]), b * COLUMNS, std::min((b + 1) * COLUMNS, D));
                    });
#pragma omp barrier
                dx.run_with_next(dx_count, [&](int64_t i, int64_t next) {
                    rows_of_dx(shared(hit[i / dx_groups]), i % dx_groups, up_of(next), own);
                });
                if (a.dup_bias || a.ddown_bias)
                    bias_tasks.run(E, [&](int64_t e) { bias_gradients(shared(e)); });
                if constexpr (HAS_GRADIENT)
                    gradients.run(E, gradient_tasks,
                                  [&](int e, int task) { gradient_rows(shared(e), task); });
            }
            end_of_streams();
#pragma omp barrier
            tokens.run(a.sizes.tokens, [&](int64_t t) {
                if (a.dweights) weights_of_token((int)t);
                if (a.dx) combine<T>(dx_rows, position, a.experts, nullptr, nullptr, (int)t, K, D, (T*)a.dx);
            });
        });
    }
};
