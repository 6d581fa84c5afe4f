// Single-neuron experts and value memory, forward. A task is a chunk of tokens and writes their outputs.
#pragma once
#include "neurons.h"

struct NeuronsForward {
    const void *x, *down, *up;  // for value memory, x and down are null: y = sum w up
    const int64_t* experts;
    const float* weights;
    void* y;
    float* s;  // null where not kept
    int64_t tokens, top_k, num_experts, hidden, threads, activation;
};

template <class M> struct NeuronsForwardPass {
    using T = typename M::T;
    const NeuronsForward& a;

    // c = act(s) w
    template <int NAME> static void activate(const float* s, const float* weights, int64_t count, float* c) {
        int64_t n = 0;
        for (; n + LANES <= count; n += LANES)
            store(c + n, act_one<NAME>(load<vf>(s + n)).value * load<vf>(weights + n));
        float some[2][LANES] = {};
        memcpy(some[0], s + n, (count - n) * sizeof(float));
        memcpy(some[1], weights + n, (count - n) * sizeof(float));
        store(some[0], act_one<NAME>(load<vf>(some[0])).value * load<vf>(some[1]));
        memcpy(c + n, some[0], (count - n) * sizeof(float));
    }

    void run() const {
        const int64_t D = a.hidden, K = a.top_k;
        const ExpertBlocks blocks(a.num_experts, D * sizeof(T));
        const Chunks chunks(a.tokens, K, D, a.threads);
        const size_t most = chunks.tokens * K, sums = buffered<T>(chunks.tokens, D);
        const size_t own = Scratch::padded(most * sizeof(RoutedRow)) + Scratch::padded(most * 4) +
                           Scratch::padded(sums * 4) + Scratch::padded(blocks.count * 4);
        Scratch scratch(own * a.threads);
        struct Own {
            RoutedRow* rows;
            float *c, *sums;
            uint32_t* next;
        };
        std::vector<Own> owned(a.threads);
        for (Own& o : owned) {
            o.rows = scratch.take<RoutedRow>(most);
            o.c = scratch.take<float>(most);
            o.sums = scratch.take<float>(sums);
            o.next = scratch.take<uint32_t>(blocks.count);
        }
        Tasks tasks;
        in_threads(a.threads, [&](int thread) {
            const Own& o = owned[thread];
            tasks.run(chunks.count, [&](int64_t chunk) {
                const int64_t first = chunk * chunks.tokens,
                              tokens = std::min(chunks.tokens, a.tokens - first);
                const float *weights = a.weights + first * K, *coefficient = weights;
                float* s = a.s ? a.s + first * K : o.c;
                const int64_t count = group_rows(a.experts + first * K, tokens * K, a.num_experts, blocks,
                                                 o.rows, o.next, [&](int64_t n) { s[n] = 0; });
                const TokenChunk<T> rows(o.rows, count, K, D);
                if (a.down) {
                    rows.dots((const T*)a.x + first * D, (const T*)a.down, s);
                    with_activation((int)a.activation,
                                    [&]<int NAME>() { activate<NAME>(s, weights, tokens * K, o.c); });
                    coefficient = o.c;
                }
                in_float32((T*)a.y + first * D, tokens, D, o.sums,
                           [&](float* y) { rows.add(coefficient, (const T*)a.up, y); });
            });
        });
    }
};
