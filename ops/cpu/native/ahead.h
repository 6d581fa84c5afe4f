// Memory that is read soon, prefetched a few cache lines at a time while something else is computed: a burst
// of prefetches would wait for memory, and the products would wait for the burst.
#pragma once
#include "vector.h"

template <int LOCALITY> class LinesAhead {
    static constexpr int MOST_RUNS = 4;
    const char* run[MOST_RUNS] = {};
    ptrdiff_t left[MOST_RUNS] = {};
    int runs = 0, at = 0, lines = 1;

  public:
    void add(const void* first, size_t bytes) {
        if (!bytes) return;
        run[runs] = (const char*)first;
        left[runs++] = (ptrdiff_t)bytes;
    }
    // Spreads the lines over this many steps.
    void over(int64_t steps) {
        int64_t all = 0;
        for (int i = 0; i < runs; i++)
            all += left[i] / 64 + 1;
        steps = std::max<int64_t>(steps, 1);
        lines = (int)((all + steps - 1) / steps);
    }
    INLINE void step() {
        for (int i = 0; i < lines && at < runs; i++) {
            __builtin_prefetch(run[at], 0, LOCALITY);
            run[at] += 64;
            left[at] -= 64;
            if (left[at] <= 0) at++;
        }
    }
};

struct NothingAhead {
    void step() const {}
};
