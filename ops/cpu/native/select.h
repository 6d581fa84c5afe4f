// The router's selection: ids of the K largest keys of each row, best first, equal ones by the lower id.
//
// Keys are compared as integers in the same order. The first pass over a row computes the maxima of at least
// 2K groups of its keys. The K-th largest of these maxima is a lower bound of the selected keys, because at
// least K keys reach it. The second pass keeps little more than K candidates, which are ranked by counting.
// If K is too large, all keys are candidates, and the best K remain whenever the buffer is full.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <functional>
#include <limits>
#include "layer.h"

struct Select {
    const float* keys;
    int64_t* ids;
    int64_t rows, experts, top_k, threads;
};

typedef int64_t vl __attribute__((vector_size(LANES * 4)));

// Float bits as integers in the order of the numbers; -0 equals +0, and NaNs are at the ends, by their sign.
static INLINE vi in_order(vi bits) {
    vi order = bits ^ ((bits >> 31) & 0x7FFFFFFF);
    return order - (order == -1);
}
static INLINE int32_t in_order(float key) {
    const int32_t bits = __builtin_bit_cast(int32_t, key), order = bits ^ ((bits >> 31) & 0x7FFFFFFF);
    return order + (order == -1);
}
static INLINE vi vmax(vi a, vi b) {
    vi larger = a > b;
    return (a & larger) | (b & ~larger);
}

// The first `count` lanes. The others get the bits of the smallest key.
static INLINE vi load_some(const float* p, int count) {
#if defined(__AVX512F__)
    return (vi)_mm512_mask_loadu_epi32(_mm512_set1_epi32(-1), (__mmask16)((1u << count) - 1), p);
#else
    vi v = -1 - vi{};
    for (int lane = 0; lane < count; lane++)
        memcpy((char*)&v + lane * 4, p + lane, 4);
    return v;
#endif
}

// Bit i is a[i] >= b[i].
static INLINE uint32_t lanes_at_least(vi a, vi b) {
#if defined(__AVX512F__)
    return _mm512_cmpge_epi32_mask((__m512i)a, (__m512i)b);
#elif defined(__AVX__)
    return (uint32_t)_mm256_movemask_ps((__m256)(a >= b));
#elif defined(__x86_64__)
    return (uint32_t)_mm_movemask_ps((__m128)(a >= b));
#else
    vi is = a >= b;
    uint32_t bits = 0;
    for (int i = 0; i < LANES; i++)
        bits |= (uint32_t)(is[i] & 1) << i;
    return bits;
#endif
}

// Chooses K of the E keys of one row.
class Selection {
    static constexpr int LEAST = std::numeric_limits<int32_t>::min(),
                         MOST = std::numeric_limits<int32_t>::max();
    static constexpr int GROUP_VECTORS = 8, MOST_RANKED = 8 * LANES, FEWEST_SLOTS = 256;
    const int E, K;

    // The K-th largest of the maxima of V * LANES groups, V * LANES >= K.
    template <int V> int bound(const float* row) const {
        vi best[V];
        for (vi& v : best)
            v = LEAST - vi{};
        int i = 0;
        for (; i + V * LANES <= E; i += V * LANES)
            for (int g = 0; g < V; g++)
                best[g] = vmax(best[g], in_order(load<vi>(row + i + g * LANES)));
        for (int g = 0; i < E; i += LANES, g++)
            best[g] = vmax(best[g], in_order(load_some(row + i, std::min(LANES, E - i))));
        vi above[V] = {};
        for (int g = 0; g < V; g++)
            for (int lane = 0; lane < LANES; lane++) {
                const vi other = best[g][lane] - vi{};
                for (int h = 0; h < V; h++)
                    above[h] -= other > best[h];
            }
        int kth = MOST;
        for (int g = 0; g < V; g++)
            for (int lane = 0; lane < LANES; lane++)
                if (above[g][lane] < K) kth = std::min(kth, (int)best[g][lane]);
        return kth;
    }
    int bound(const float* row) const {
        if (2 * K <= LANES) return bound<1>(row);
        if (2 * K <= 2 * LANES) return bound<2>(row);
        if (2 * K <= 4 * LANES) return bound<4>(row);
        return 2 * K <= GROUP_VECTORS * LANES ? bound<GROUP_VECTORS>(row) : LEAST;
    }

    // A key and its id as one unique number: the key above, the reversed id below.
    static int64_t packed(int key, int id) { return (int64_t)key << 32 | (uint32_t)~id; }
    static int64_t id_of(int64_t packed) { return (uint32_t)~packed; }

    // Sorts by counting larger candidates, which has no branches to mispredict.
    void rank(const int64_t* candidates, int n, int64_t* ids) const {
        int64_t sorted[MOST_RANKED];
        for (int i = 0; i < n; i += LANES / 2) {
            const vl own = load<vl>(candidates + i);
            vl above = {};
            for (int j = 0; j < n; j++)
                above -= (candidates[j] - vl{}) > own;
            for (int lane = 0; lane < std::min(LANES / 2, n - i); lane++)
                sorted[above[lane]] = id_of(candidates[i + lane]);
        }
        memcpy(ids, sorted, K * sizeof(int64_t));
    }

    // Ranks one vector of keys; counts the larger keys for all of them at once.
    void rank_all(const float* row, int64_t* ids) const {
        const vi keys = in_order(E == LANES ? load<vi>(row) : load_some(row, E));
        vi lane, above = {};
        for (int i = 0; i < LANES; i++)
            lane[i] = i;
        for (int i = 0; i < E; i++) {
            const vi other = in_order(row[i]) - vi{};
            above -= (other > keys) | ((other == keys) & (lane > i));
        }
        int64_t sorted[LANES];
        for (int i = 0; i < E; i++)
            sorted[above[i]] = i;
        memcpy(ids, sorted, K * sizeof(int64_t));
    }

  public:
    Selection(int E, int K) : E(E), K(K) {}

    // The number of candidates at which the buffer is full.
    int slots() const { return std::min(E, std::max(4 * K, FEWEST_SLOTS)); }
    // The size of the buffer, with room for one vector more.
    size_t room() const { return slots() + LANES; }

    void select(const float* row, int64_t* buffer, int64_t* ids) const {
        if (E <= LANES) return rank_all(row, ids);
        int least = bound(row), n = 0;
        for (int i = 0; i < E; i += LANES) {
            const int count = std::min(LANES, E - i);
            const vi keys = in_order(count == LANES ? load<vi>(row + i) : load_some(row + i, count));
            uint32_t hits = lanes_at_least(keys, least - vi{}) & ((1u << count) - 1);
            if (!hits) continue;
            int32_t key[LANES];
            store(key, keys);
            for (; hits; hits &= hits - 1) {
                const int lane = __builtin_ctz(hits);
                buffer[n++] = packed(key[lane], i + lane);
            }
            if (n <= slots()) continue;
            std::nth_element(buffer, buffer + K - 1, buffer + n, std::greater<>());
            n = K;
            const int kth = (int)(buffer[K - 1] >> 32);
            if (kth == MOST) break;
            least = kth + 1;  // an equal key that follows has a higher id
        }
        if (n <= MOST_RANKED) return rank(buffer, n, ids);
        if (n > K) std::nth_element(buffer, buffer + K, buffer + n, std::greater<>());
        std::sort(buffer, buffer + K, std::greater<>());
        for (int j = 0; j < K; j++)
            ids[j] = id_of(buffer[j]);
    }
};

// Calls body(row, thread) for every row. The threads take a few rows at a time.
template <class Body> static inline void for_rows(int64_t rows, int64_t num_threads, Body body) {
    constexpr int64_t FEW = 8;
    Tasks tasks;
    in_threads(num_threads, [&](int thread) {
        tasks.run((rows + FEW - 1) / FEW, [&](int64_t task) {
            for (int64_t t = task * FEW; t < std::min(rows, (task + 1) * FEW); t++)
                body(t, thread);
        });
    });
}

struct SelectPass {
    const Select& a;

    void run() const {
        const Selection selection(a.experts, a.top_k);
        std::vector<int64_t> buffers(a.threads * selection.room());
        for_rows(a.rows, a.threads, [&](int64_t t, int thread) {
            selection.select(a.keys + t * a.experts, buffers.data() + thread * selection.room(),
                             a.ids + t * a.top_k);
        });
    }
};
