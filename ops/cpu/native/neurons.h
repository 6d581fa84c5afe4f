// Single-neuron experts, y_t = sum_j act(x_t . down_e) w_tj up_e, and value memory, y_t = sum_j w_tj table_e:
// what both directions do with a chunk of tokens.
//
// Each routed row reads whole rows of tables that may be larger than any cache. A thread takes a chunk of
// tokens and groups its routed rows by blocks of experts, in the order of tokens inside a block. The table
// rows of a block fit into a third cache, so each comes from memory once in a chunk. A token's data stay in
// registers for all its rows of a block. Per-row scalars are stored at index t * K + j. The blocks depend
// only on the tables, so the order of summation of an output depends on no other token.
//
// An order by expert, with a table row in registers, was measured and is slower by a fifth to a quarter,
// except in float32 where a chunk needs each table row several times.
#pragma once
#include "activation.h"
#include "gradient.h"

#define INLINED __attribute__((always_inline))

// Always inlined: gcc takes a function that only prefetches for one without effect, and drops its calls.
template <class T> static INLINE void prefetch_row(const T* row, int64_t width) {
    for (size_t b = 0; b < width * sizeof(T); b += 64)
        __builtin_prefetch((const char*)row + b);
}

// The blocks of experts. Sizes from 512 KiB to 32 MiB were measured: small blocks read and write the data of
// a token too often, and large ones leave a third cache.
struct ExpertBlocks {
    static constexpr size_t BYTES = size_t(4) << 20;
    static constexpr int64_t MOST = 4096;
    int shift = 0;
    int64_t count;

    ExpertBlocks(int64_t num_experts, size_t row_bytes) {
        while ((size_t(2) << shift) * row_bytes <= BYTES || (num_experts - 1) >> shift >= MOST)
            shift++;
        count = ((num_experts - 1) >> shift) + 1;
    }
};

// A routed row: its expert, and its index t * K + j in a chunk of tokens.
struct RoutedRow {
    uint32_t expert, place;
};

// Groups the routed rows of some tokens by block, and returns their number. Calls missing(index) for each row
// without an expert. `next` has room for one number for each block.
template <class Missing>
static inline int64_t group_rows(const int64_t* ids, int64_t count, int64_t num_experts,
                                 const ExpertBlocks& blocks, RoutedRow* rows, uint32_t* next,
                                 Missing missing) {
    auto known = [&](int64_t id) { return (uint64_t)id < (uint64_t)num_experts; };
    std::fill(next, next + blocks.count, 0);
    for (int64_t n = 0; n < count; n++)
        if (known(ids[n]))
            next[ids[n] >> blocks.shift]++;
        else
            missing(n);
    uint32_t sum = 0;
    for (int64_t b = 0; b < blocks.count; b++) {
        const uint32_t here = next[b];
        next[b] = sum;
        sum += here;
    }
    for (int64_t n = 0; n < count; n++)
        if (known(ids[n])) rows[next[ids[n] >> blocks.shift]++] = {(uint32_t)ids[n], (uint32_t)n};
    return sum;
}

// One step of a dot product: WIDTH elements of each side.
template <class T> struct DotStep {
    static constexpr int WIDTH = LANES;
    using Some = vf;
    static INLINE Some some(const T* p) { return load_wide(p); }
    static INLINE vf step(vf acc, Some a, Some b) { return acc + a * b; }
};
#if defined(__AVX512BF16__)
template <> struct DotStep<bf16> {
    static constexpr int WIDTH = 2 * LANES;
    using Some = __m512bh;
    static INLINE Some some(const bf16* p) { return load<__m512bh>(p); }
    static INLINE vf step(vf acc, Some a, Some b) { return (vf)_mm512_dpbf16_ps((__m512)acc, a, b); }
};
#endif
constexpr int CHAINS = 4;  // of a dot product, added in the same order for every row

template <class T> static INLINE float dot_product(const T* a, const T* b, int64_t width) {
    using Step = DotStep<T>;
    constexpr int W = Step::WIDTH;
    vf acc[CHAINS] = {};
    int64_t d = 0;
    for (; d + CHAINS * W <= width; d += CHAINS * W)
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; c++)
            acc[c] = Step::step(acc[c], Step::some(a + d + c * W), Step::some(b + d + c * W));
    for (; d + W <= width; d += W)
        acc[0] = Step::step(acc[0], Step::some(a + d), Step::some(b + d));
    if (d < width) {
        T some[2][W] = {};
        memcpy((void*)some[0], a + d, (width - d) * sizeof(T));
        memcpy((void*)some[1], b + d, (width - d) * sizeof(T));
        acc[1] = Step::step(acc[1], Step::some(some[0]), Step::some(some[1]));
    }
    return sum_of_lanes((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// The same dot products, to the bit, of `count` rows with b, whose STEPS steps stay in registers.
template <class T, int STEPS, class Row, class Out>
static INLINE void dot_products(Row a, const T* b, int64_t count, Out out) {
    using Step = DotStep<T>;
    constexpr int W = Step::WIDTH;
    typename Step::Some held[STEPS];
#pragma GCC unroll 16
    for (int k = 0; k < STEPS; k++)
        held[k] = Step::some(b + k * W);
    for (int64_t i = 0; i < count; i++) {
        const T* row = a(i);
        vf acc[CHAINS] = {};
#pragma GCC unroll 16
        for (int k = 0; k < STEPS; k++)
            acc[k % CHAINS] = Step::step(acc[k % CHAINS], Step::some(row + k * W), held[k]);
        out(i) = sum_of_lanes((acc[0] + acc[1]) + (acc[2] + acc[3]));
    }
}

// Two vectors of columns: 2 * LANES elements. Of a bfloat16 row they are the even and the odd elements, which
// one operation widens; float32 sums keep this order until they are rounded.
struct TwoVectors {
    vf first, second;
};
template <class T> static INLINE TwoVectors load_two(const T* p) {
    return {load_wide(p), load_wide(p + LANES)};
}
static INLINE TwoVectors load_two(const bf16* p) {
    const vu pairs = load<vu>(p);
    return {(vf)(pairs << 16), (vf)(pairs & 0xFFFF0000u)};
}
template <class T> static INLINE void store_two(TwoVectors v, T* p) {
    store_narrow(v.first, p);
    store_narrow(v.second, p + LANES);
}
static INLINE void store_two(TwoVectors v, bf16* p) { store(p, pair_of_bf16(v.first, v.second)); }
template <class T> static INLINE void stream_two(TwoVectors v, T* p) {
    const vf both[2] = {v.first, v.second};
    stream(both, p);
}
#if defined(__AVX512F__)
static INLINE void stream_two(TwoVectors v, bf16* p) {
    _mm512_stream_si512((__m512i*)p, (__m512i)pair_of_bf16(v.first, v.second));
}
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

// acc += sum_r coefficient(r) * row(r)[d ..] over W times TWO columns, or over `part` columns if that is not
// 0. Each element is one chain in the order of r.
template <class T, int W, class Row, class Coefficient>
static INLINE void accumulate(Row row, Coefficient coefficient, int64_t count, int64_t d, int part,
                              TwoVectors (&acc)[W]) {
    for (int64_t r = 0; r < count; r++) {
        const T* from = row(r, d) + d;
        const vf c = splat(coefficient(r));
#pragma GCC unroll 8
        for (int w = 0; w < W; w++) {
            const TwoVectors v = part ? load_some_of_two(from, part) : load_two(from + w * TWO);
            acc[w].first += c * v.first;
            acc[w].second += c * v.second;
        }
    }
}

// Calls columns<W>(d, part) for all columns: for W times TWO of them from d on, or for the last `part`.
template <class Columns> static INLINE void over_columns(int64_t width, Columns columns) {
    constexpr int MOST = ACCUMULATORS >= 16 ? 8 : 4;
    int64_t d = 0;
    for (; d + MOST * TWO <= width; d += MOST * TWO)
        columns.template operator()<MOST>(d, 0);
    for (; d + TWO <= width; d += TWO)
        columns.template operator()<1>(d, 0);
    if (d < width) columns.template operator()<1>(d, (int)(width - d));
}

// The grouped routed rows of a chunk of tokens.
template <class T> class TokenChunk {
    const RoutedRow* rows;
    int64_t count;
    uint32_t top_k;
    int64_t width;
    int64_t ahead;  // rows of a table that are prefetched

    INLINE void ask(const T* table, int64_t i) const {
        if (i < count) prefetch_row(table + (size_t)rows[i].expert * width, width);
    }
    // Calls each(token, first, rows) for each run of rows of the same token.
    template <class Each> INLINE void tokens(const T* table, Each each) const {
        for (int64_t i = 0; i < std::min(ahead, count); i++)
            ask(table, i);
        for (int64_t i = 0; i < count;) {
            const uint32_t token = rows[i].place / top_k;
            int64_t end = i + 1;
            for (; end < count && rows[end].place - token * top_k < top_k; end++) {
            }
            each((size_t)token, i, end - i);
            i = end;
        }
    }

  public:
    static constexpr int64_t BYTES_AHEAD = 8 << 10;  // bytes that memory delivers at once

    TokenChunk(const RoutedRow* rows, int64_t count, int64_t top_k, int64_t width)
        : rows(rows), count(count), top_k((uint32_t)top_k), width(width),
          ahead(std::clamp<int64_t>(BYTES_AHEAD / (width * (int64_t)sizeof(T)), 1, 64)) {}

    // out[place] = <its token's row, its expert's row of the table>
    void dots(const T* of_tokens, const T* table, float* out) const {
        constexpr int GROUP = CHAINS * DotStep<T>::WIDTH, MOST = ACCUMULATORS >= 16 ? 4 : 2;
        const int64_t groups = width % GROUP || width > MOST * GROUP ? 0 : width / GROUP;
        tokens(table, [&](size_t token, int64_t first, int64_t some) INLINED {
            const T* own = of_tokens + token * width;
            auto row = [&](int64_t i) INLINED {
                ask(table, first + i + ahead);
                return table + (size_t)rows[first + i].expert * width;
            };
            auto to = [&](int64_t i) INLINED -> float& { return out[rows[first + i].place]; };
            if (groups)
                return with_rows<1, 2, 3, 4>((int)groups, [&]<int GROUPS>() INLINED {
                    dot_products<T, GROUPS * CHAINS>(row, own, some, to);
                });
            for (int64_t i = 0; i < some; i++)
                to(i) = dot_product(own, row(i), width);
        });
    }
    // out[token] += coefficient[place] * its expert's row of the table, for every place. Rows of out are
    // padded.
    void add(const float* coefficient, const T* table, float* out) const {
        tokens(table, [&](size_t token, int64_t first, int64_t some) INLINED {
            auto row = [&](int64_t i, int64_t d) INLINED {
                if (d == 0) ask(table, first + i + ahead);
                return table + (size_t)rows[first + i].expert * width;
            };
            auto c = [&](int64_t i) INLINED { return coefficient[rows[first + i].place]; };
            float* sum = out + token * padded_width(width);
            over_columns(width, [&]<int W>(int64_t d, int part) INLINED {
                TwoVectors acc[W];
#pragma GCC unroll 8
                for (int w = 0; w < W; w++)
                    acc[w] = {load<vf>(sum + d + w * TWO), load<vf>(sum + d + w * TWO + LANES)};
                accumulate<T>(row, c, some, d, part, acc);
#pragma GCC unroll 8
                for (int w = 0; w < W; w++) {
                    store(sum + d + w * TWO, acc[w].first);
                    store(sum + d + w * TWO + LANES, acc[w].second);
                }
            });
        });
    }
};

// Chunks of tokens: about as many as threads, and small enough for scratch memory.
struct Chunks {
    static constexpr int64_t MOST_ROWS = 1 << 20;
    static constexpr int64_t MOST_SUM_BYTES = 16 << 20;
    int64_t tokens, count;

    Chunks(int64_t all_tokens, int64_t top_k, int64_t width, int64_t threads)
        : tokens(std::min(
              {(all_tokens + threads - 1) / threads, MOST_ROWS / top_k, MOST_SUM_BYTES / (4 * width)})) {
        tokens = std::max<int64_t>(tokens, 1);
        count = (all_tokens + tokens - 1) / tokens;
    }
};

// Sums of some tokens in float32: in the output itself where possible, else in a buffer, rounded at the end.
template <class T> static bool is_buffered(int64_t width) { return !std::is_same_v<T, float> || width % TWO; }
template <class T> static size_t buffered(int64_t tokens, int64_t width) {
    return is_buffered<T>(width) ? tokens * padded_width(width) : 0;
}
template <class T, class Body>
static inline void in_float32(T* out, int64_t tokens, int64_t width, float* buffer, Body body) {
    float* sums = is_buffered<T>(width) ? buffer : (float*)out;
    std::fill(sums, sums + tokens * padded_width(width), 0.f);
    body(sums);
    if (!is_buffered<T>(width)) return;
    for (int64_t t = 0; t < tokens; t++, out += width)
        for (int64_t d = 0; d < width; d += TWO, sums += TWO) {
            const TwoVectors v = {load<vf>(sums), load<vf>(sums + LANES)};
            if (d + TWO <= width)
                store_two(v, out + d);
            else
                store_some_of_two(v, out + d, (int)(width - d));
        }
}
