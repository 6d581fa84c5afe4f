// Single-neuron experts and value memory, backward. In the first pass a task is a chunk of tokens: it writes
// the gradients of tokens and weights, and the coefficients of the tables' gradients. In the second pass a
// task owns some experts and sums the rows of each in the order of tokens, in registers.
#pragma once
#include "neurons.h"

struct NeuronsBackward {
    const void* dy;
    const float* s;
    const void *x, *down, *up;  // for value memory, s, x and down are null
    const int64_t* experts;
    const float* weights;
    void* dx;
    float* dweights;
    void *ddown, *dup;     // null where not needed
    const int64_t* slots;  // the row of ddown and dup for each routed row; null for its expert's
    int64_t tokens, top_k, num_experts, hidden, threads, activation, num_slots;
};

// out = sum_r coefficient[r] * row(r)
template <class T, class Row>
static INLINE void write_sum(Row row, const float* coefficient, int64_t count, int64_t width, T* out,
                             bool streamed) {
    over_columns(width, [&]<int W>(int64_t d, int part) INLINED {
        TwoVectors acc[W];
#pragma GCC unroll 8
        for (int w = 0; w < W; w++)
            acc[w] = {vf{}, vf{}};
        accumulate<T>(row, [&](int64_t r) INLINED { return coefficient[r]; }, count, d, part, acc);
#pragma GCC unroll 8
        for (int w = 0; w < W; w++) {
            if (part)
                store_some_of_two(acc[w], out + d, part);
            else if (streamed)
                stream_two(acc[w], out + d + w * TWO);
            else
                store_two(acc[w], out + d + w * TWO);
        }
    });
}

// Stable counting sorts over the digits of the id, lowest first: an expert's rows stay in the order of
// places.
class SortByExpert {
    // Bits of a digit. A sort writes rows at so many places in turn, whose lines stay in a first cache.
    static constexpr int MOST_BITS = 10;
    int64_t num_experts;
    int passes = 1, bits = 0;

  public:
    explicit SortByExpert(int64_t num_experts) : num_experts(num_experts) {
        int all = 0;
        while ((num_experts - 1) >> all)
            all++;
        if (all) passes = (all + MOST_BITS - 1) / MOST_BITS;
        bits = (all + passes - 1) / passes;
    }
    size_t counters() const { return (size_t)passes << bits; }

    // Fills `rows` and returns their number. `other` has the same size.
    int64_t operator()(const int64_t* ids, int64_t count, RoutedRow* rows, RoutedRow* other,
                       uint32_t* counters) const {
        const uint32_t digits = 1u << bits, mask = digits - 1;
        auto known = [&](int64_t id) { return (uint64_t)id < (uint64_t)num_experts; };
        std::fill(counters, counters + this->counters(), 0);
        for (int64_t n = 0; n < count; n++)
            if (known(ids[n]))
                for (int p = 0; p < passes; p++)
                    counters[p * digits + (ids[n] >> p * bits & mask)]++;
        uint32_t sum = 0;
        for (int p = 0; p < passes; p++) {
            sum = 0;
            for (uint32_t i = 0; i < digits; i++) {
                const uint32_t here = counters[p * digits + i];
                counters[p * digits + i] = sum;
                sum += here;
            }
        }
        RoutedRow *to = passes % 2 ? rows : other, *from = passes % 2 ? other : rows;
        for (int64_t n = 0; n < count; n++)
            if (known(ids[n])) to[counters[ids[n] & mask]++] = {(uint32_t)ids[n], (uint32_t)n};
        for (int p = 1; p < passes; p++) {
            std::swap(to, from);
            uint32_t* next = counters + p * digits;
            for (uint32_t i = 0; i < sum; i++)
                to[next[from[i].expert >> p * bits & mask]++] = from[i];
        }
        return sum;
    }
};

// Tasks of neighbouring experts: task b has begin[b] .. begin[b + 1] of a chunk's sorted rows.
struct ExpertTasks {
    static constexpr int64_t PER_THREAD = 64;
    int shift = 0;
    int64_t count;

    ExpertTasks(int64_t num_experts, int64_t threads) {
        while ((num_experts - 1) >> shift >= PER_THREAD * threads)
            shift++;
        count = ((num_experts - 1) >> shift) + 1;
    }
    void bounds(const RoutedRow* rows, int64_t rows_count, uint32_t* begin) const {
        int64_t b = 0;
        for (int64_t i = 0; i < rows_count; i++)
            while (b <= rows[i].expert >> shift)
                begin[b++] = (uint32_t)i;
        while (b <= count)
            begin[b++] = (uint32_t)rows_count;
    }
};

template <class M> class NeuronsBackwardPass {
    using T = typename M::T;
    const NeuronsBackward& a;
    const int64_t D, K, owners;  // owners: rows of the tables' gradients, slots or experts
    const ExpertBlocks blocks;
    const SortByExpert sort;
    const ExpertTasks experts;
    const Chunks chunks;
    const bool tables, needs_q;
    // The whole routing, chunk by chunk, each sorted by expert.
    RoutedRow* rows = nullptr;
    uint32_t* begins = nullptr;         // [chunks, tasks + 1]
    float *ds = nullptr, *c = nullptr;  // [tokens * K]
    // Scratch memory of a thread, for its chunk.
    struct Own {
        RoutedRow* rows;
        uint32_t* counters;
        float* sums;
    };

    // q = <dy, up_e> is in ds. Writes dw = q act(s), ds = q w act'(s) and c = w act(s).
    template <int NAME> void activate(int64_t from, int64_t count) const {
        auto some = [&](const float* w, const float* s, float* dw, float* ds, float* c) INLINED {
            const vf weight = load<vf>(w), q = needs_q ? load<vf>(ds) : vf{};
            const ValueSlope act = s ? act_one<NAME>(load<vf>(s)) : ValueSlope{splat(1.f), vf{}};
            if (dw) store(dw, q * act.value);
            store(ds, q * weight * act.slope);
            store(c, weight * act.value);
        };
        const int64_t end = from + count;
        int64_t n = from;
        for (; n + LANES <= end; n += LANES)
            some(a.weights + n, a.s ? a.s + n : nullptr, a.dweights ? a.dweights + n : nullptr, ds + n,
                 c + n);
        if (n == end) return;
        float lanes[5][LANES] = {};
        const size_t bytes = (end - n) * sizeof(float);
        memcpy(lanes[0], a.weights + n, bytes);
        if (a.s) memcpy(lanes[1], a.s + n, bytes);
        if (needs_q) memcpy(lanes[3], ds + n, bytes);
        some(lanes[0], a.s ? lanes[1] : nullptr, lanes[2], lanes[3], lanes[4]);
        if (a.dweights) memcpy(a.dweights + n, lanes[2], bytes);
        memcpy(ds + n, lanes[3], bytes);
        memcpy(c + n, lanes[4], bytes);
    }
    void do_chunk(int64_t chunk, const Own& own) const {
        const int64_t first = chunk * chunks.tokens, tokens = std::min(chunks.tokens, a.tokens - first),
                      at = first * K;
        const int64_t* ids = a.experts + at;
        if (needs_q) {
            const int64_t count = group_rows(ids, tokens * K, a.num_experts, blocks, own.rows, own.counters,
                                             [&](int64_t n) { ds[at + n] = 0; });
            const TokenChunk<T> grouped(own.rows, count, K, D);
            grouped.dots((const T*)a.dy + first * D, (const T*)a.up, ds + at);
            with_activation((int)a.activation, [&]<int NAME>() { activate<NAME>(at, tokens * K); });
            if (a.dx)
                in_float32((T*)a.dx + first * D, tokens, D, own.sums,
                           [&](float* dx) { grouped.add(ds + at, (const T*)a.down, dx); });
        } else {
            with_activation((int)a.activation, [&]<int NAME>() { activate<NAME>(at, tokens * K); });
        }
        if (tables) {
            const int64_t count = sort(a.slots ? a.slots + at : ids, tokens * K, rows + at, own.rows,
                                       own.counters);
            experts.bounds(rows + at, count, begins + chunk * (experts.count + 1));
        }
    }

    // The rows of a task, sorted by expert.
    struct Sorted {
        uint32_t* end;  // of each expert's rows
        int64_t* token;
        float *ds, *c;
    };
    // out[e] = sum of coefficient * row of its token, over the rows of each expert in [first, last).
    void write(const T* tokens, const float* coefficient, const Sorted& s, int64_t first, int64_t last,
               bool streamed, T* out) const {
        constexpr uint32_t AHEAD = 4;
        uint32_t i = 0;
        const uint32_t all = s.end[last - first - 1];
        for (int64_t e = first; e < last; e++) {
            const uint32_t end = s.end[e - first];
            for (uint32_t r = i + AHEAD; r < std::min(end + AHEAD, all); r++)
                prefetch_row(tokens + s.token[r] * D, D);
            write_sum<T>([&](int64_t r, int64_t) { return tokens + s.token[i + r] * D; }, coefficient + i,
                         end - i, D, out + e * D, streamed);
            i = end;
        }
    }
    // Merges the task's rows of all chunks.
    void do_experts(int64_t task, const Sorted& s, std::vector<uint32_t>& at, bool stream_down,
                    bool stream_up) const {
        const int64_t first = task << experts.shift, last = std::min((task + 1) << experts.shift, owners);
        for (int64_t chunk = 0; chunk < chunks.count; chunk++)
            at[chunk] = begins[chunk * (experts.count + 1) + task];
        uint32_t to = 0;
        for (int64_t e = first; e < last; e++) {
            for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
                const int64_t row = chunk * chunks.tokens * K;
                const uint32_t end = begins[chunk * (experts.count + 1) + task + 1];
                for (uint32_t& i = at[chunk]; i < end && rows[row + i].expert == e; i++, to++) {
                    const int64_t place = row + rows[row + i].place;
                    s.token[to] = place / K;
                    s.ds[to] = ds[place];
                    s.c[to] = c[place];
                }
            }
            s.end[e - first] = to;
        }
        if (a.ddown) write((const T*)a.x, s.ds, s, first, last, stream_down, (T*)a.ddown);
        if (a.dup) write((const T*)a.dy, s.c, s, first, last, stream_up, (T*)a.dup);
    }

  public:
    explicit NeuronsBackwardPass(const NeuronsBackward& a)
        : a(a), D(a.hidden), K(a.top_k), owners(a.slots ? a.num_slots : a.num_experts),
          blocks(a.num_experts, D * sizeof(T)), sort(owners), experts(owners, a.threads),
          chunks(a.tokens, K, D, a.threads), tables(a.ddown || a.dup),
          needs_q(a.dx || a.dweights || a.ddown) {}

    void run() {
        const int64_t N = a.tokens * K;
        const size_t most = chunks.tokens * K, sums = a.dx ? buffered<T>(chunks.tokens, D) : 0;
        const size_t counters = std::max((size_t)blocks.count, sort.counters());
        const size_t own_bytes = Scratch::padded(most * sizeof(RoutedRow)) + Scratch::padded(counters * 4) +
                                 Scratch::padded(sums * 4);
        Scratch scratch(Scratch::padded(N * sizeof(RoutedRow)) + 2 * Scratch::padded(N * 4) +
                        Scratch::padded(chunks.count * (experts.count + 1) * 4) + a.threads * own_bytes);
        rows = scratch.take<RoutedRow>(N);
        ds = scratch.take<float>(N);
        c = scratch.take<float>(N);
        begins = scratch.take<uint32_t>(chunks.count * (experts.count + 1));
        std::vector<Own> owned(a.threads);
        for (Own& o : owned) {
            o.rows = scratch.take<RoutedRow>(most);
            o.counters = scratch.take<uint32_t>(counters);
            o.sums = scratch.take<float>(sums);
        }
        Tasks tasks;
        in_threads(a.threads, [&](int thread) {
            tasks.run(chunks.count, [&](int64_t chunk) { do_chunk(chunk, owned[thread]); });
        });
        if (tables) gradients_of_tables();
    }

  private:
    void gradients_of_tables() {
        std::vector<int64_t> of_task(experts.count, 0);
        for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
            const uint32_t* begin = begins + chunk * (experts.count + 1);
            for (int64_t task = 0; task < experts.count; task++)
                of_task[task] += begin[task + 1] - begin[task];
        }
        const int64_t most = *std::max_element(of_task.begin(), of_task.end());
        const int64_t some = int64_t(1) << experts.shift;
        const size_t own = Scratch::padded(some * 4) + Scratch::padded(most * 8) +
                           2 * Scratch::padded(most * 4);
        Scratch scratch(own * a.threads);
        std::vector<Sorted> owned(a.threads);
        for (Sorted& s : owned) {
            s.end = scratch.take<uint32_t>(some);
            s.token = scratch.take<int64_t>(most);
            s.ds = scratch.take<float>(most);
            s.c = scratch.take<float>(most);
        }
        const bool stream_down = is_streamed((const T*)a.ddown, owners, (int)D);
        const bool stream_up = is_streamed((const T*)a.dup, owners, (int)D);
        Tasks tasks;
        std::vector<std::vector<uint32_t>> places(a.threads, std::vector<uint32_t>(chunks.count));
        in_threads(a.threads, [&](int thread) {
            tasks.run(experts.count, [&](int64_t task) {
                do_experts(task, owned[thread], places[thread], stream_down, stream_up);
            });
            end_of_streams();
        });
    }
};
