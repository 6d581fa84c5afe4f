// The router: one pass over a row turns logits into weights and ids; another computes the gradient.
//
// A row becomes float32 in a buffer that is padded with minus infinity, whose exponential is zero, so no loop
// has a remainder. Sums are lane by lane and then over the lanes, in an order that depends only on E and K.
#pragma once
#include "select.h"

// The rule as operators take it: the fields of Python's RouteRule, in its order.
#define ROUTE_RULE                                                                                           \
    "int top_k, str scoring, bool score_first, bool norm_topk_prob, float scale, int n_group, int "          \
    "topk_group, str group_score, float norm_eps"
struct RouteRule {
    static constexpr int FIELDS = 9;
    int64_t top_k;  // 0 for every expert
    bool sigmoid, score_first, normalised;
    double scale;
    int64_t groups, open_groups;
    bool group_by_max;
    double eps;

    template <class Arguments> explicit RouteRule(Arguments& given) {
        top_k = given.template take<int64_t>();
        sigmoid = given.take_name("scoring", {"softmax", "sigmoid"}) == 1;
        score_first = given.template take<bool>();
        normalised = given.template take<bool>();
        scale = given.template take<double>();
        groups = given.template take<int64_t>();
        open_groups = given.template take<int64_t>();
        group_by_max = given.take_name("group_score", {"top2_sum", "max"}) == 1;
        eps = given.template take<double>();
    }
    // True if the weights are shares of a softmax over all experts, including those that were not picked.
    bool over_all() const { return !sigmoid && score_first && !normalised; }
};
struct Route {
    const void* logits;
    const float* bias;  // added for the selection; may be null
    float* weights;
    int64_t* ids;
    int64_t rows, experts, top_k, select;  // without selection K = E, and the ids are 0 .. E - 1
    RouteRule rule;
    int64_t threads;
};
struct RouteBackward {
    const float* dweights;
    const void* logits;
    const int64_t* ids;
    void* dlogits;
    int64_t rows, experts, top_k;
    RouteRule rule;
    int64_t threads;
};

static inline int padded_to_lanes(int n) { return (n + LANES - 1) / LANES * LANES; }
// exp that reaches zero, so that a masked expert has no share.
static INLINE vf share(vf x) { return choose(x < splat(-87.33f), splat(0.f), vexp(x)); }

// Widens n numbers to float32, and pads them with minus infinity to a whole vector.
template <class T> static inline void widen_row(const T* row, int n, float* wide) {
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        store(wide + i, load_wide(row + i));
    if (i == n) return;
    vf rest = splat(-INFINITY);
    for (int lane = 0; lane < n - i; lane++)
        rest[lane] = widen(row[i + lane]);
    store(wide + i, rest);
}
#if defined(__AVX512F__)
template <> inline void widen_row(const float* row, int n, float* wide) {
    for (int i = 0; i < n; i += LANES) {
        const __mmask16 some = n - i < LANES ? (__mmask16)((1u << (n - i)) - 1) : (__mmask16)-1;
        store(wide + i, (vf)_mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), some, row + i));
    }
}
#endif
// out = exp(v - max v); returns their sum. v is padded as widen_row does it.
static inline float exponentials(const float* v, int n, float* out) {
    vf most = load<vf>(v);
    for (int i = LANES; i < n; i += LANES) {
        const vf next = load<vf>(v + i);
        most = choose(next > most, next, most);
    }
    const float max = max_of_lanes(most);
    vf sum = {};
    for (int i = 0; i < n; i += LANES) {
        const vf e = share(load<vf>(v + i) - splat(max));
        store(out + i, e);
        sum += e;
    }
    return sum_of_lanes(sum);
}
// out = f(v), a vector at a time.
template <class F> static inline void map(const float* v, int n, float* out, F f) {
    for (int i = 0; i < n; i += LANES)
        store(out + i, f(load<vf>(v + i)));
}
static inline void probabilities(const float* v, int n, float* out) {
    map(v, n, out, [](vf x) { return choose(x < splat(-87.33f), splat(0.f), vsigmoid(x)); });
}
static inline void divided(const float* v, int n, float divisor, float* out) {
    map(v, n, out, [&](vf x) { return x / splat(divisor); });
}
static inline float sum_of(const float* v, int n) {
    vf sum = {};
    for (int i = 0; i < n; i += LANES)
        sum += load<vf>(v + i);
    return sum_of_lanes(sum);
}

// Float buffers of each thread.
class RowBuffers {
    const size_t size;
    std::vector<float> data;

  public:
    RowBuffers(int64_t threads, size_t size) : size(size), data(threads * size) {}
    float* of(int thread) { return data.data() + thread * size; }
};

template <class T> class RoutePass {
    const Route& a;
    const int E, K, padded_E, padded_K;

    // The best key of a group, or the sum of the best two. NaNs are ordered as in the selection.
    float value_of_group(const float* keys, int size) const {
        float first = keys[0], second = -INFINITY;
        bool has_second = false;
        for (int i = 1; i < size; i++) {
            if (in_order(keys[i]) > in_order(first)) {
                second = first;
                first = keys[i];
            } else if (!has_second || in_order(keys[i]) > in_order(second)) {
                second = keys[i];
            }
            has_second = true;
        }
        // Halves are added, because the sum of two large keys could be infinite.
        return a.rule.group_by_max || !has_second ? first : 0.5f * first + 0.5f * second;
    }
    void close_groups(float* keys, float* values, int64_t* buffer, const Selection& of_groups,
                      int64_t* open) const {
        const int groups = a.rule.groups, size = E / groups;
        for (int g = 0; g < groups; g++)
            values[g] = value_of_group(keys + g * size, size);
        of_groups.select(values, buffer, open);
        std::fill(values, values + groups, 0.f);
        for (int g = 0; g < a.rule.open_groups; g++)
            values[open[g]] = 1.f;
        for (int i = 0; i < E; i++) {
            // Minus infinity in an open group still beats a closed group.
            if (values[i / size] == 0.f)
                keys[i] = -INFINITY;
            else if (keys[i] == -INFINITY)
                keys[i] = std::numeric_limits<float>::lowest();
        }
    }

  public:
    explicit RoutePass(const Route& a)
        : a(a), E(a.experts), K(a.top_k), padded_E(padded_to_lanes(E)), padded_K(padded_to_lanes(K)) {}

    void run() {
        const RouteRule& rule = a.rule;
        const Selection of_experts(E, K), of_groups(rule.groups, rule.open_groups);
        const bool grouped = rule.groups > 1, scored = rule.score_first && (a.bias || grouped),
                   own_keys = a.bias || grouped;
        const bool only_compared = !rule.over_all() && !own_keys;  // except the picked logits
        const size_t room = std::max(of_experts.room(), of_groups.room());
        std::vector<int64_t> buffers(a.threads * (room + rule.groups));
        RowBuffers rows(a.threads, 3 * padded_E + padded_K + padded_to_lanes(rule.groups));
        for_rows(a.rows, a.threads, [&](int64_t t, int thread) {
            float *wide = rows.of(thread), *shares = wide + padded_E, *keys = shares + padded_E,
                  *picked = keys + padded_E;
            int64_t *buffer = buffers.data() + thread * (room + rule.groups), *ids = a.ids + t * K;
            const T* logits = (const T*)a.logits + t * E;
            const float* row = wide;
            if constexpr (std::is_same_v<T, float>)
                if (only_compared) row = logits;
            if (row == wide) widen_row(logits, E, wide);
            float total = 0.f;
            if (rule.over_all() || (scored && !rule.sigmoid)) total = exponentials(wide, E, shares);
            if (!a.select) {
                for (int e = 0; e < E; e++)
                    ids[e] = e;
            } else if (own_keys) {
                if (!scored)
                    memcpy(keys, wide, E * sizeof(float));
                else if (rule.sigmoid)
                    probabilities(wide, E, keys);
                else
                    divided(shares, E, total, keys);
                if (a.bias)
                    for (int e = 0; e < E; e++)
                        keys[e] += a.bias[e];
                if (grouped) close_groups(keys, picked + padded_K, buffer, of_groups, buffer + room);
                of_experts.select(keys, buffer, ids);
            } else {
                of_experts.select(row, buffer, ids);
            }
            for (int j = K; j < padded_K; j++)
                picked[j] = -INFINITY;
            if (rule.over_all()) {
                for (int j = 0; j < K; j++)
                    picked[j] = shares[ids[j]];
                divided(picked, K, total, picked);
            } else {
                for (int j = 0; j < K; j++)
                    picked[j] = row[ids[j]];
                if (rule.sigmoid) {
                    probabilities(picked, K, picked);
                    if (rule.normalised) divided(picked, K, sum_of(picked, K) + (float)rule.eps, picked);
                } else {
                    divided(picked, K, exponentials(picked, K, picked), picked);
                }
            }
            if (rule.scale != 1.) map(picked, K, picked, [&](vf w) { return w * splat((float)rule.scale); });
            memcpy(a.weights + t * K, picked, K * sizeof(float));
        });
    }
};

template <class T> class RouteBackwardPass {
    const RouteBackward& a;
    const int E, K, padded_E, padded_K;

    // Ids of no expert, which route never returns, are skipped.
    bool is_expert(int64_t id) const { return id >= 0 && id < E; }

    // Turns gradients of scores into those of the picked logits. Both are padded with zeros.
    void of_picked(float* scores, float* gradients) const {
        float inner = 0.f;
        if (!a.rule.sigmoid || a.rule.normalised) {
            vf sum = {};
            for (int j = 0; j < K; j += LANES)
                sum += load<vf>(gradients + j) * load<vf>(scores + j);
            inner = sum_of_lanes(sum);
        }
        const float total = a.rule.sigmoid && a.rule.normalised ? sum_of(scores, K) + (float)a.rule.eps : 1.f;
        for (int j = 0; j < K; j += LANES) {
            const vf score = load<vf>(scores + j);
            vf gradient = (load<vf>(gradients + j) - splat(inner / total)) / splat(total);
            if (a.rule.sigmoid) gradient *= splat(1.f) - score;
            store(gradients + j, score * gradient);
        }
    }

  public:
    explicit RouteBackwardPass(const RouteBackward& a)
        : a(a), E(a.experts), K(a.top_k), padded_E(padded_to_lanes(E)), padded_K(padded_to_lanes(K)) {}

    void run() {
        RowBuffers rows(a.threads, 2 * padded_E + 2 * padded_K);
        for_rows(a.rows, a.threads, [&](int64_t t, int thread) {
            float *wide = rows.of(thread), *dwide = wide + padded_E, *scores = dwide + padded_E,
                  *gradients = scores + padded_K;
            const int64_t* ids = a.ids + t * K;
            widen_row((const T*)a.logits + t * E, E, wide);
            for (int j = 0; j < K; j++)
                gradients[j] = a.dweights[t * K + j] * (float)a.rule.scale;
            for (int j = K; j < padded_K; j++)
                gradients[j] = 0.f;
            if (a.rule.over_all()) {
                divided(wide, E, exponentials(wide, E, wide), wide);
                float inner = 0.f;
                for (int j = 0; j < K; j++)
                    if (is_expert(ids[j])) inner += gradients[j] *= wide[ids[j]];
                map(wide, E, dwide, [&](vf share) { return share * splat(-inner); });
                for (int j = 0; j < K; j++)
                    if (is_expert(ids[j])) dwide[ids[j]] += gradients[j];
            } else {
                for (int j = 0; j < K; j++)
                    scores[j] = is_expert(ids[j]) ? wide[ids[j]] : -INFINITY;
                for (int j = K; j < padded_K; j++)
                    scores[j] = -INFINITY;
                if (a.rule.sigmoid)
                    probabilities(scores, K, scores);
                else
                    divided(scores, K, exponentials(scores, K, scores), scores);
                of_picked(scores, gradients);
                std::fill(dwide, dwide + padded_E, 0.f);
                for (int j = 0; j < K; j++)
                    if (is_expert(ids[j])) dwide[ids[j]] = gradients[j];
            }
            T* dlogits = (T*)a.dlogits + t * E;
            int i = 0;
            for (; i + LANES <= E; i += LANES)
                store_narrow(load<vf>(dwide + i), dlogits + i);
            for (; i < E; i++)
                narrow(dwide[i], dlogits + i);
        });
    }
};
