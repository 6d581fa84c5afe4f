// The arguments of the MLP's passes: one block for each direction, for every weight format.
#pragma once
#include "activation.h"
#include "layer.h"

// The tensors of one weight [E, rows, k]. Each format says what they hold; null where it has none.
struct Weight {
    const void *values, *scales, *zeros;
};

enum FormatName { PLAIN, PANELS, INT8, INT4 };

struct MLPSizes {
    int64_t tokens, top_k, num_experts, hidden, inner, up_rows;
    int64_t gate, up, step, gated;  // as in GateUp
    int64_t activation, format, group;
    double alpha, limit;
};

// With y, the forward makes the plan and computes y. Without y, the plan is given, and the forward computes
// only z, from first_row on. It stores the pre-activations of all rows below saved_rows in z.
struct MLPForward {
    const void* x;
    Weight up, down;
    const void *up_bias, *down_bias;
    const int64_t* experts;
    const float* weights;
    void *y, *z;
    int32_t *order, *offsets;
    int64_t first_row, saved_rows, threads;
    MLPSizes sizes;
};

struct MLPBackward {
    const void *dy, *z, *x;
    Weight up, down;
    const void* down_bias;
    const int64_t* experts;
    const float* weights;
    const int32_t *order, *offsets;
    void *dx, *dweights, *dup, *ddown, *dup_bias, *ddown_bias;  // null where not needed
    int64_t threads;
    MLPSizes sizes;
};

// Sorted rows [first, first + count) of an expert.
struct ExpertRows {
    int id, first, count;
};

// Columns [begin, end) of h or of the output rows, for all rows of the `expert`-th expert that has rows.
struct ForwardTask {
    int expert, begin, end;
};

// The sizes of an MLP (hidden size D, inner size F, G rows of the up-projection, E experts, K of a token, N
// routed rows), and its pre-activations z [N, G], whose columns are ordered like those rows.
class MLP {
  protected:
    const int D, F, G, E, K, N;
    const bool gated;
    const int halves;
    const GateUp at;
    const Act act;

    explicit MLP(const MLPSizes& s)
        : D((int)s.hidden), F((int)s.inner), G((int)s.up_rows), E((int)s.num_experts), K((int)s.top_k),
          N((int)(s.tokens * s.top_k)), gated(s.gated != 0), halves(gated ? 2 : 1),
          at{(ptrdiff_t)s.gate, (ptrdiff_t)s.up, (ptrdiff_t)s.step},
          act{(int)s.activation, (float)s.alpha, (float)s.limit} {}

    RowOrder up_order() const { return {at.gate, at.up, at.step, F, G}; }
    RowOrder down_order() const { return {0, 0, 1, D, D}; }

    // The weights of a task, to be prefetched.
    template <bool UP, class Ahead, class Format>
    Ahead weights_of(const ForwardTask& task, int e, const Format& up, const Format& down) const {
        Ahead ahead;
        const int n = task.end - task.begin;
        if (!UP) {
            down.look_ahead(e, task.begin, n, ahead);
        } else if (at.step == 2) {
            up.look_ahead(e, task.begin * 2, 2 * n, ahead);
        } else {
            up.look_ahead(e, at.gate + task.begin, n, ahead);
            if (gated) up.look_ahead(e, at.up + task.begin, n, ahead);
        }
        return ahead;
    }

    // n elements of the gate or of the up half of a row of z; the first is at column `base` of memory.
    template <class T> void store_z(T* z, ptrdiff_t base, int n, vf v) const {
        if (at.step == 1 && n == LANES) return store_narrow(v, z + base);
        for (int i = 0; i < n; i++)
            narrow(v[i], z + base + i * at.step);
    }
    // The same elements as float32; lanes from n on are zero.
    template <class T> vf load_z(const T* z, ptrdiff_t base, int n) const {
        if (at.step == 1 && n == LANES) return load_wide(z + base);
        T some[LANES] = {};
        for (int i = 0; i < n; i++)
            some[i] = z[base + i * at.step];
        return load_wide(some);
    }
};
