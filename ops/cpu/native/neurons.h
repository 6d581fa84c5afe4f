// Experts of one neuron, and of none: y_t = sum_j act(x_t . down_e) w_tj up_e, and y_t = sum_j w_tj table_e.
//
// Every routed row reads whole rows of tables that may be larger than any cache. A thread takes a chunk of tokens and groups its
// routed rows by blocks of experts whose table rows fit into a third cache together, in the order of tokens inside a block. In
// this order it forms all dot products, then all sums: a table row comes from memory once a chunk, and from that cache for
// whoever else needs it; what belongs to a token stays in the first cache or in registers for all its rows of a block. The blocks
// depend on the tables alone, so an output's order of summation (blocks, then j) depends on no other token and on no number of
// threads.
//
// Gradients of tables are sums over an expert's rows in the order of tokens, in registers, each row written by the one task
// that owns its expert. The groups by blocks are those of the token pass; a task sorts its block by expert.
#pragma once
#include "gradient.h"

struct NeuronsForward {
    const void *x, *down, *up;  // without x and down, the values: y = sum w up
    const int64_t* experts;
    const float* weights;
    void* y;
    float* s;  // null where not kept
    int64_t tokens, top_k, num_experts, hidden, threads, activation;
};

struct NeuronsBackward {
    const void* dy;
    const float* s;
    const void *x, *down, *up;  // without s, x and down, the values
    const int64_t* experts;
    const float* weights;
    void* dx;
    float* dweights;
    void *ddown, *dup;  // null where not needed
    int64_t tokens, top_k, num_experts, hidden, threads, activation;
};

// The groups of experts. Measured from 4 KiB to 32 MiB: with small blocks what belongs to a token is read and written too often,
// and large ones do not stay in a third cache.
struct ExpertBlocks {
    static constexpr size_t BYTES = size_t(4) << 20;
    static constexpr int64_t MOST = 4096;
    int shift = 0;
    int64_t count;

    ExpertBlocks(int64_t num_experts, size_t row_bytes) {
        while ((size_t(2) << shift) * row_bytes <= BYTES || (num_experts - 1) >> shift >= MOST) shift++;
        count = ((num_experts - 1) >> shift) + 1;
    }
};

// A routed row: its expert, and its place t * K + j in a chunk of tokens.
struct RoutedRow {
    uint32_t expert, place;
};

// The routed rows of some tokens in groups: begin[b] .. begin[b + 1] are those of block b. `missing` hears of every other.
template <class Missing>
static inline void group_rows(const int64_t* ids, int64_t count, int64_t num_experts, const ExpertBlocks& blocks, RoutedRow* rows, uint32_t* begin,
                              Missing missing) {
    auto known = [&](int64_t id) { return (uint64_t)id < (uint64_t)num_experts; };
    std::fill(begin, begin + blocks.count + 1, 0);
    for (int64_t n = 0; n < count; n++)
        if (known(ids[n])) begin[ids[n] >> blocks.shift]++;
        else missing(n);
    uint32_t sum = 0;
    for (int64_t b = 0; b <= blocks.count; b++) {
        const uint32_t here = begin[b];
        begin[b] = sum;
        sum += here;
    }
    for (int64_t n = 0; n < count; n++)
        if (known(ids[n])) rows[begin[ids[n] >> blocks.shift]++] = {(uint32_t)ids[n], (uint32_t)n};
    for (int64_t b = blocks.count; b > 0; b--) begin[b] = begin[b - 1];  // each has become its own end
    begin[0] = 0;
}

static INLINE float sum_of_lanes(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float lanes[LANES];
    store(lanes, v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
#endif
}

// The elements that one step of a dot product takes, and the step.
template <class T> struct DotStep {
    static constexpr int WIDTH = LANES;
    static INLINE vf step(vf acc, const T* a, const T* b) { return acc + load_wide(a) * load_wide(b); }
};
#if defined(__AVX512BF16__)
template <> struct DotStep<bf16> {
    static constexpr int WIDTH = 2 * LANES;
    static INLINE vf step(vf acc, const bf16* a, const bf16* b) {
        return (vf)_mm512_dpbf16_ps((__m512)acc, load<__m512bh>(a), load<__m512bh>(b));
    }
};
#endif

// <a, b> in four chains, whose order is the same for every row.
template <class T> static INLINE float dot_product(const T* a, const T* b, int64_t width) {
    using Step = DotStep<T>;
    constexpr int W = Step::WIDTH, CHAINS = 4;
    vf acc[CHAINS] = {};
    int64_t d = 0;
    for (; d + CHAINS * W <= width; d += CHAINS * W)
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; c++) acc[c] = Step::step(acc[c], a + d + c * W, b + d + c * W);
    for (; d + W <= width; d += W) acc[0] = Step::step(acc[0], a + d, b + d);
    if (d < width) {
        T some[2][W] = {};
        memcpy((void*)some[0], a + d, (width - d) * sizeof(T));
        memcpy((void*)some[1], b + d, (width - d) * sizeof(T));
        acc[1] = Step::step(acc[1], some[0], some[1]);
    }
    return sum_of_lanes((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// Two vectors of columns at once, 2 * LANES elements, of which a bfloat16 row gives the even and the odd ones: whole lines are
// read, and widening takes one operation. Sums in float32 stand in the same order until they are rounded.
struct TwoVectors {
    vf first, second;
};
template <class T> static INLINE TwoVectors load_two(const T* p) { return {load_wide(p), load_wide(p + LANES)}; }
static INLINE TwoVectors load_two(const bf16* p) {
    const vu pairs = load<vu>(p);
    return {(vf)(pairs << 16), (vf)(pairs & 0xFFFF0000u)};
}
template <class T> static INLINE void store_two(TwoVectors v, T* p) { store_narrow(v.first, p), store_narrow(v.second, p + LANES); }
static INLINE void store_two(TwoVectors v, bf16* p) { store(p, pair_of_bf16(v.first, v.second)); }
template <class T> static INLINE void stream_two(TwoVectors v, T* p) {
    const vf both[2] = {v.first, v.second};
    stream(both, p);
}
#if defined(__AVX512F__)
static INLINE void stream_two(TwoVectors v, bf16* p) { _mm512_stream_si512((__m512i*)p, (__m512i)pair_of_bf16(v.first, v.second)); }
#endif
constexpr int TWO = 2 * LANES;
static constexpr int64_t padded_width(int64_t width) { return (width + TWO - 1) / TWO * TWO; }

// The first `count` elements; the rest are zeros.
template <class T> static INLINE TwoVectors load_some_of_two(const T* p, int count) {
    T some[TWO] = {};
    memcpy((void*)some, p, count * sizeof(T));
    return load_two(some);
}
template <class T> static INLINE void store_some_of_two(TwoVectors v, T* p, int count) {
    T some[TWO];
    store_two(v, some);
    memcpy((void*)p, some, count * sizeof(T));
}

// out[d ..] (+)= sum_r coefficient(r) * row(r)[d ..] over W times TWO columns, or over `part` of them where that is not 0.
template <class T, int W, bool ONTO, class Row, class Coefficient, class Out>
static INLINE void sum_columns(Row row, Coefficient coefficient, int64_t count, int64_t d, int part, Out* out, bool streamed) {
    TwoVectors acc[W];
#pragma GCC unroll 8
    for (int w = 0; w < W; w++) {
        if constexpr (ONTO) acc[w] = {load<vf>(out + d + w * TWO), load<vf>(out + d + w * TWO + LANES)};
        else acc[w] = {vf{}, vf{}};
    }
    for (int64_t r = 0; r < count; r++) {
        const T* from = row(r, d) + d;
        const vf c = splat(coefficient(r));
#pragma GCC unroll 8
        for (int w = 0; w < W; w++) {
            const TwoVectors v = part ? load_some_of_two(from, part) : load_two(from + w * TWO);
            acc[w].first += c * v.first, acc[w].second += c * v.second;
        }
    }
#pragma GCC unroll 8
    for (int w = 0; w < W; w++) {
        if constexpr (ONTO) store(out + d + w * TWO, acc[w].first), store(out + d + w * TWO + LANES, acc[w].second);
        else if (part) store_some_of_two(acc[w], out + d, part);
        else if (streamed) stream_two(acc[w], out + d + w * TWO);
        else store_two(acc[w], out + d + w * TWO);
    }
}

// out (+)= sum_r coefficient(r) * row(r), each element one chain in the order of r. What is added onto has a padded width.
template <class T, bool ONTO, class Row, class Coefficient, class Out>
static INLINE void sum_rows(Row row, Coefficient coefficient, int64_t count, int64_t width, Out* out, bool streamed = false) {
    constexpr int MOST = ACCUMULATORS >= 16 ? 8 : 4;
    int64_t d = 0;
    for (; d + MOST * TWO <= width; d += MOST * TWO) sum_columns<T, MOST, ONTO>(row, coefficient, count, d, 0, out, streamed);
    for (; d + TWO <= width; d += TWO) sum_columns<T, 1, ONTO>(row, coefficient, count, d, 0, out, streamed);
    if (d < width) sum_columns<T, 1, ONTO>(row, coefficient, count, d, (int)(width - d), out, false);
}

// What both directions do with a chunk of tokens.
template <class T> class TokenChunk {
    const RoutedRow* rows;
    int64_t count;
    uint32_t top_k;
    int64_t width;
    int64_t ahead;  // rows of a table that are asked for before their turn

    void prefetch(const T* table, int64_t i) const {
        if (i >= count) return;
        const char* row = (const char*)(table + (size_t)rows[i].expert * width);
        for (size_t b = 0; b < width * sizeof(T); b += 64) __builtin_prefetch(row + b);
    }

  public:
    static constexpr int64_t BYTES_AHEAD = 8 << 10;  // what memory has under way at once

    TokenChunk(const RoutedRow* rows, int64_t count, int64_t top_k, int64_t width)
        : rows(rows), count(count), top_k((uint32_t)top_k), width(width),
          ahead(std::clamp<int64_t>(BYTES_AHEAD / (width * (int64_t)sizeof(T)), 1, 64)) {}

    // out[i] = <token of row i, its expert's row of the table>
    void dots(const T* tokens, const T* table, float* out) const {
        for (int64_t i = 0; i < std::min(ahead, count); i++) prefetch(table, i);
        for (int64_t i = 0; i < count; i++) {
            prefetch(table, i + ahead);
            out[i] = dot_product(tokens + (size_t)(rows[i].place / top_k) * width, table + (size_t)rows[i].expert * width, width);
        }
    }
    // out[token of row i] += coefficient[i] * its expert's row of the table; rows of out have a padded width
    void add(const float* coefficient, const T* table, float* out) const {
        for (int64_t i = 0; i < std::min(ahead, count); i++) prefetch(table, i);
        for (int64_t i = 0; i < count;) {
            const uint32_t token = rows[i].place / top_k;
            int64_t end = i + 1;
            for (; end < count && rows[end].place - token * top_k < top_k; end++) {}
            auto row = [&](int64_t r, int64_t d) {
                if (d == 0) prefetch(table, i + r + ahead);
                return table + (size_t)rows[i + r].expert * width;
            };
            sum_rows<T, true>(row, [&](int64_t r) { return coefficient[i + r]; }, end - i, width, out + (size_t)token * padded_width(width));
            i = end;
        }
    }
};

// Tokens in chunks: about as many as threads, but no more rows in one than scratch memory should hold.
struct Chunks {
    static constexpr int64_t MOST_ROWS = 1 << 20;
    static constexpr int64_t MOST_SUM_BYTES = 16 << 20;
    int64_t tokens, count;

    Chunks(int64_t all_tokens, int64_t top_k, int64_t width, int64_t threads)
        : tokens(std::min({(all_tokens + threads - 1) / threads, MOST_ROWS / top_k, MOST_SUM_BYTES / (4 * width)})) {
        tokens = std::max<int64_t>(tokens, 1);
        count = (all_tokens + tokens - 1) / tokens;
    }
};

// Sums of some tokens in float32: in the output itself where it can be, else in a buffer that is rounded at the end.
template <class T> static bool is_buffered(int64_t width) { return !std::is_same_v<T, float> || width % TWO; }
template <class T> static size_t buffered(int64_t tokens, int64_t width) { return is_buffered<T>(width) ? tokens * padded_width(width) : 0; }
template <class T, class Body> static inline void in_float32(T* out, int64_t tokens, int64_t width, float* buffer, Body body) {
    float* sums = is_buffered<T>(width) ? buffer : (float*)out;
    std::fill(sums, sums + tokens * padded_width(width), 0.f);
    body(sums);
    if (!is_buffered<T>(width)) return;
    for (int64_t t = 0; t < tokens; t++, out += width)
        for (int64_t d = 0; d < width; d += TWO, sums += TWO) {
            const TwoVectors v = {load<vf>(sums), load<vf>(sums + LANES)};
            if (d + TWO <= width) store_two(v, out + d);
            else store_some_of_two(v, out + d, (int)(width - d));
        }
}

template <class M> class NeuronsForwardPass {
    using T = typename M::T;
    const NeuronsForward& a;

    // coefficient = act(s) w, in place of s.
    template <int NAME> void activate(const RoutedRow* rows, int64_t count, const float* weights, float* s_out, float* s) const {
        for (int64_t i = 0; i < count; i += LANES) {
            const int n = (int)std::min<int64_t>(LANES, count - i);
            float dots[LANES] = {}, w[LANES] = {};
            for (int l = 0; l < n; l++) {
                dots[l] = s[i + l], w[l] = weights[rows[i + l].place];
                if (s_out) s_out[rows[i + l].place] = dots[l];
            }
            store(w, act_one<NAME>(load<vf>(dots)).value * load<vf>(w));
            memcpy(s + i, w, n * sizeof(float));
        }
    }

  public:
    explicit NeuronsForwardPass(const NeuronsForward& a) : a(a) {}

    void run() {
        const int64_t D = a.hidden, K = a.top_k;
        const ExpertBlocks blocks(a.num_experts, D * sizeof(T));
        const Chunks chunks(a.tokens, K, D, a.threads);
        const size_t most = chunks.tokens * K, sums = buffered<T>(chunks.tokens, D);
        const size_t own = Scratch::padded(most * sizeof(RoutedRow)) + Scratch::padded(most * 4) + Scratch::padded(sums * 4) +
                           Scratch::padded((blocks.count + 1) * 4);
        Scratch scratch(own * a.threads);
        struct Own {
            RoutedRow* rows;
            float *s, *sums;
            uint32_t* begin;
        };
        std::vector<Own> owned(a.threads);
        for (Own& o : owned) {
            o.rows = scratch.take<RoutedRow>(most);
            o.s = scratch.take<float>(most);
            o.sums = scratch.take<float>(sums);
            o.begin = scratch.take<uint32_t>(blocks.count + 1);
        }
        Tasks tasks;
        auto work = [&](const Own& o) {
            tasks.run(chunks.count, [&](int64_t chunk) {
                const int64_t first = chunk * chunks.tokens, tokens = std::min(chunks.tokens, a.tokens - first);
                const float* weights = a.weights + first * K;
                float* s_out = a.s ? a.s + first * K : nullptr;
                group_rows(a.experts + first * K, tokens * K, a.num_experts, blocks, o.rows, o.begin, [&](int64_t n) {
                    if (s_out) s_out[n] = 0;
                });
                const int64_t count = o.begin[blocks.count];
                const TokenChunk<T> rows(o.rows, count, K, D);
                if (a.down) {
                    rows.dots((const T*)a.x + first * D, (const T*)a.down, o.s);
                    with_activation((int)a.activation, [&]<int NAME>() { activate<NAME>(o.rows, count, weights, s_out, o.s); });
                } else {
                    for (int64_t i = 0; i < count; i++) o.s[i] = weights[o.rows[i].place];
                }
                in_float32((T*)a.y + first * D, tokens, D, o.sums, [&](float* y) { rows.add(o.s, (const T*)a.up, y); });
            });
        };
        std::atomic<int> threads{0};
        if (a.threads == 1) return work(owned[0]);
#pragma omp parallel num_threads(a.threads)
        work(owned[threads++]);
    }
};

template <class M> class NeuronsBackwardPass {
    using T = typename M::T;
    const NeuronsBackward& a;
    const int64_t D, K;
    const ExpertBlocks blocks;
    const Chunks chunks;
    const bool tables, needs_q;
    // Of the whole routing, chunk by chunk, each in groups.
    RoutedRow* rows = nullptr;
    uint32_t* begins = nullptr;  // [chunks, blocks + 1]
    float *ds = nullptr, *c = nullptr;

    // From q: dw = q act(s), ds = q w act'(s) and c = w act(s), rows in groups.
    template <int NAME>
    void activate(const RoutedRow* group, int64_t count, const float* s, const float* weights, float* dweights, float* ds, float* c) const {
        for (int64_t i = 0; i < count; i += LANES) {
            const int n = (int)std::min<int64_t>(LANES, count - i);
            float dots[LANES] = {}, w[LANES] = {}, q[LANES] = {};
            for (int l = 0; l < n; l++) {
                w[l] = weights[group[i + l].place];
                if (s) dots[l] = s[group[i + l].place];
                if (needs_q) q[l] = ds[i + l];
            }
            const vf vw = load<vf>(w), vq = load<vf>(q);
            const ValueSlope act = s ? act_one<NAME>(load<vf>(dots)) : ValueSlope{splat(1.f), vf{}};
            float out[3][LANES];
            store(out[0], vq * act.value), store(out[1], vq * vw * act.slope), store(out[2], vw * act.value);
            if (dweights)
                for (int l = 0; l < n; l++) dweights[group[i + l].place] = out[0][l];
            memcpy(ds + i, out[1], n * sizeof(float));
            memcpy(c + i, out[2], n * sizeof(float));
        }
    }
    void do_chunk(int64_t chunk, float* sums) const {
        const int64_t first = chunk * chunks.tokens, tokens = std::min(chunks.tokens, a.tokens - first), at = first * K;
        uint32_t* begin = begins + chunk * (blocks.count + 1);
        float* dweights = a.dweights ? a.dweights + at : nullptr;
        group_rows(a.experts + at, tokens * K, a.num_experts, blocks, rows + at, begin, [&](int64_t n) {
            if (dweights) dweights[n] = 0;
        });
        const int64_t count = begin[blocks.count];
        const TokenChunk<T> own(rows + at, count, K, D);
        if (needs_q) own.dots((const T*)a.dy + first * D, (const T*)a.up, ds + at);
        with_activation((int)a.activation, [&]<int NAME>() {
            activate<NAME>(rows + at, count, a.s ? a.s + at : nullptr, a.weights + at, dweights, ds + at, c + at);
        });
        if (a.dx) in_float32((T*)a.dx + first * D, tokens, D, sums, [&](float* dx) { own.add(ds + at, (const T*)a.down, dx); });
    }

    // The rows of a task sorted by expert.
    struct Sorted {
        uint32_t* end;     // of each expert's rows
        int64_t* token;
        float *ds, *c;
    };
    // out[e] = sum of coefficient * row of its token, over the rows of experts `first` .. `last`.
    void write(const T* tokens, const float* coefficient, const Sorted& s, int64_t first, int64_t last, bool streamed, T* out) const {
        uint32_t i = 0;
        const uint32_t all = s.end[last - first - 1];
        for (int64_t e = first; e < last; e++) {
            const uint32_t end = s.end[e - first];
            for (uint32_t r = i; r < end; r++) {
                if (r + 4 >= all) break;
                const char* row = (const char*)(tokens + s.token[r + 4] * D);
                for (size_t b = 0; b < D * sizeof(T); b += 64) __builtin_prefetch(row + b);
            }
            auto row = [&](int64_t r, int64_t) { return tokens + s.token[i + r] * D; };
            sum_rows<T, false>(row, [&](int64_t r) { return coefficient[i + r]; }, end - i, D, out + e * D, streamed);
            i = end;
        }
    }
    void do_experts(int64_t block, int64_t first, int64_t last, const Sorted& s, bool stream_down, bool stream_up) const {
        std::fill(s.end, s.end + (last - first), 0);
        auto each = [&](auto body) {
            for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
                const uint32_t* begin = begins + chunk * (blocks.count + 1) + block;
                const int64_t at = chunk * chunks.tokens;
                for (uint32_t i = begin[0]; i < begin[1]; i++) {
                    const RoutedRow& row = rows[at * K + i];
                    if (row.expert >= first && row.expert < last) body(row.expert - first, at * K + i, at + row.place / (uint32_t)K);
                }
            }
        };
        each([&](int64_t e, int64_t, int64_t) { s.end[e]++; });
        uint32_t sum = 0;
        for (int64_t e = 0; e < last - first; e++) {
            const uint32_t here = s.end[e];
            s.end[e] = sum;
            sum += here;
        }
        each([&](int64_t e, int64_t i, int64_t token) {
            const uint32_t to = s.end[e]++;
            s.token[to] = token, s.ds[to] = ds[i], s.c[to] = c[i];
        });
        if (a.ddown) write((const T*)a.x, s.ds, s, first, last, stream_down, (T*)a.ddown);
        if (a.dup) write((const T*)a.dy, s.c, s, first, last, stream_up, (T*)a.dup);
    }

  public:
    explicit NeuronsBackwardPass(const NeuronsBackward& a)
        : a(a), D(a.hidden), K(a.top_k), blocks(a.num_experts, D * sizeof(T)), chunks(a.tokens, K, D, a.threads), tables(a.ddown || a.dup),
          needs_q(a.dx || a.dweights || a.ddown) {}

    void run() {
        const int64_t N = a.tokens * K;
        const size_t sums = a.dx ? buffered<T>(chunks.tokens, D) : 0;
        Scratch scratch(Scratch::padded(N * sizeof(RoutedRow)) + 2 * Scratch::padded(N * 4) +
                        Scratch::padded(chunks.count * (blocks.count + 1) * 4) + a.threads * Scratch::padded(sums * 4));
        rows = scratch.take<RoutedRow>(N);
        ds = scratch.take<float>(N), c = scratch.take<float>(N);
        begins = scratch.take<uint32_t>(chunks.count * (blocks.count + 1));
        std::vector<float*> owned(a.threads);
        for (float*& o : owned) o = scratch.take<float>(sums);
        {
            Tasks tasks;
            std::atomic<int> threads{0};
            auto work = [&] {
                float* own = owned[threads++];
                tasks.run(chunks.count, [&](int64_t chunk) { do_chunk(chunk, own); });
            };
            if (a.threads == 1) work();
            else {
#pragma omp parallel num_threads(a.threads)
                work();
            }
        }
        if (tables) gradients_of_tables();
    }

  private:
    void gradients_of_tables() {
        std::vector<int64_t> in_block(blocks.count, 0);
        for (int64_t chunk = 0; chunk < chunks.count; chunk++)
            for (int64_t b = 0; b < blocks.count; b++) in_block[b] += begins[chunk * (blocks.count + 1) + b + 1] - begins[chunk * (blocks.count + 1) + b];
        const int64_t most = *std::max_element(in_block.begin(), in_block.end()), experts = int64_t(1) << blocks.shift;
        // Where there are fewer blocks than tasks to share, each is done in parts.
        const int64_t parts = std::min<int64_t>(experts, (4 * a.threads + blocks.count - 1) / blocks.count);
        const size_t own = Scratch::padded(experts * 4) + Scratch::padded(most * 8) + 2 * Scratch::padded(most * 4);
        Scratch scratch(own * a.threads);
        std::vector<Sorted> owned(a.threads);
        for (Sorted& s : owned) {
            s.end = scratch.take<uint32_t>(experts);
            s.token = scratch.take<int64_t>(most);
            s.ds = scratch.take<float>(most), s.c = scratch.take<float>(most);
        }
        const bool stream_down = is_streamed((const T*)a.ddown, a.num_experts, (int)D);
        const bool stream_up = is_streamed((const T*)a.dup, a.num_experts, (int)D);
        Tasks tasks;
        std::atomic<int> threads{0};
        auto work = [&] {
            const Sorted& s = owned[threads++];
            tasks.run(blocks.count * parts, [&](int64_t task) {
                const int64_t block = task / parts, from = block << blocks.shift, part = task % parts;
                const int64_t first = from + experts * part / parts, last = std::min(from + experts * (part + 1) / parts, a.num_experts);
                if (first < last) do_experts(block, first, last, s, stream_down, stream_up);
            });
            end_of_streams();
        };
        if (a.threads == 1) return work();
#pragma omp parallel num_threads(a.threads)
        work();
    }
};
