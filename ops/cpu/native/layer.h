// Shared by all kernels: scratch memory, the plan of the rows by expert, tasks, and the sum over experts.
#pragma once
#include <atomic>
#include <mutex>
#include <new>
#include <stdexcept>
#include <vector>
#include <pthread.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif
#include "tile.h"

// Keeps large buffers between calls, as a fresh one costs a page fault for every 4 KiB. At most as many bytes
// are idle as were in use at once. Hidden: gcc would share one pool among all libraries of a process.
class __attribute__((visibility("hidden"))) Memory {
  public:
    struct Block {
        char* data;
        size_t size;
    };

  private:
    static constexpr size_t HUGE_PAGE = size_t(2) << 20;
    std::mutex mutex;
    std::vector<Block> idle;
    size_t in_use = 0, most_in_use = 0, idle_bytes = 0, peak = 0, peak_from = 0;

    // The forking thread takes the mutex first: a thread that does not exist in the child could hold it.
    Memory() {
        pthread_atfork([] { instance->mutex.lock(); }, [] { instance->mutex.unlock(); },
                       [] { instance->mutex.unlock(); });
    }

    static void release(Block b) {
#if defined(__linux__)
        munmap(b.data, b.size);
#else
        ::operator delete(b.data, std::align_val_t(64));
#endif
    }

    // Made when the library is loaded: C++ makes a function's static behind a lock, and a forked child could
    // find that lock taken. Never destroyed: tensors may outlive this library's static objects.
    static Memory* const instance;

  public:
    static Memory& pool() { return *instance; }
    Block take(size_t size) {
        size = (size + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
        {
            std::lock_guard<std::mutex> guard(mutex);
            size_t best = idle.size();
            for (size_t i = 0; i < idle.size(); i++)
                if (idle[i].size >= size && idle[i].size <= 2 * size &&
                    (best == idle.size() || idle[i].size < idle[best].size))
                    best = i;
            const bool found = best < idle.size();
            Block b{nullptr, size};
            if (found) {
                b = idle[best];
                idle.erase(idle.begin() + best);
                idle_bytes -= b.size;
            }
            in_use += b.size;
            most_in_use = std::max(most_in_use, in_use);
            peak = std::max(peak, in_use);
            if (found) return b;
        }
        Block b{nullptr, size};
#if defined(__linux__)
        void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) {
            std::lock_guard<std::mutex> guard(mutex);
            in_use -= size;
            throw std::bad_alloc();
        }
        madvise(p, size, MADV_HUGEPAGE);
        b.data = (char*)p;
#else
        b.data = (char*)::operator new(size, std::align_val_t(64));
#endif
        return b;
    }
    void give(char* data, size_t size) {
        std::vector<Block> surplus;
        {
            std::lock_guard<std::mutex> guard(mutex);
            idle.push_back({data, size});
            in_use -= size;
            idle_bytes += size;
            while (in_use + idle_bytes > most_in_use) {  // the oldest goes first
                surplus.push_back(idle.front());
                idle_bytes -= idle.front().size;
                idle.erase(idle.begin());
            }
        }
        for (Block b : surplus)
            release(b);
    }
    // The most bytes in use at once since the last call, less those in use at that call.
    size_t peak_since_last() {
        std::lock_guard<std::mutex> guard(mutex);
        const size_t rise = peak > peak_from ? peak - peak_from : 0;
        peak_from = peak = in_use;
        return rise;
    }
    void trim() {
        std::vector<Block> all;
        {
            std::lock_guard<std::mutex> guard(mutex);
            all.swap(idle);
            idle_bytes = 0;
            most_in_use = in_use;
        }
        for (Block b : all)
            release(b);
    }
};
inline Memory* const Memory::instance = new Memory;

class Scratch {
    char* data;
    size_t size, used = 0;

  public:
    explicit Scratch(size_t bytes) {
        auto block = Memory::pool().take(bytes);
        data = block.data;
        size = block.size;
    }
    ~Scratch() { Memory::pool().give(data, size); }
    Scratch(const Scratch&) = delete;
    static constexpr size_t padded(size_t bytes) { return (bytes + 255) / 256 * 256; }
    template <class V> V* take(size_t count) {
        V* p = (V*)(data + used);
        used += padded(count * sizeof(V));
        return p;
    }
};

// The rows of the up-projection: row f of the gate half is gate + f * step, of the up half up + f * step.
struct GateUp {
    ptrdiff_t gate, up, step;
};

// The rows of a weight in the order in which a product takes them: `split` rows from `first` on, then the
// others from `second` on.
struct RowOrder {
    ptrdiff_t first, second, step;
    int split, count;

    ptrdiff_t row(int k) const { return k < split ? first + k * step : second + (k - split) * step; }
};

struct Plan {
    int num_experts, top_k;
    const int32_t *order, *offsets;

    int first(int e) const { return offsets[e]; }
    int count(int e) const { return offsets[e + 1] - offsets[e]; }
    int routed() const { return offsets[num_experts]; }
    int token(int row) const { return order[row] / top_k; }
    // The experts that have rows.
    std::vector<int> hit() const {
        std::vector<int> ids;
        for (int e = 0; e < num_experts; e++)
            if (count(e)) ids.push_back(e);
        return ids;
    }
    // True if make_plan makes this plan of these ids.
    bool is_of(const int64_t* ids, int num_rows) const {
        if (offsets[0] != 0 || routed() > num_rows) return false;
        for (int e = 0; e < num_experts; e++)
            if (count(e) < 0) return false;
        auto holds = [&](int begin, int end, auto belongs) {
            for (int i = begin, last = -1; i < end; last = order[i++])
                if (order[i] <= last || order[i] >= num_rows || !belongs(ids[order[i]])) return false;
            return true;
        };
        for (int e = 0; e < num_experts; e++)
            if (!holds(first(e), offsets[e + 1], [&](int64_t id) { return id == e; })) return false;
        return holds(routed(), num_rows, [&](int64_t id) { return id < 0 || id >= num_experts; });
    }
};

// A plan that the caller made, checked: every address that a pass computes depends on it.
static inline Plan given_plan(int num_experts, int top_k, const int32_t* order, const int32_t* offsets,
                              const int64_t* ids, int num_rows) {
    const Plan plan{num_experts, top_k, order, offsets};
    if (!plan.is_of(ids, num_rows)) throw std::invalid_argument("plan");
    return plan;
}

// Makes a plan: a stable counting sort of the rows by expert. Ids outside [0, E) go to the end.
static inline void make_plan(const int64_t* ids, int num_rows, int num_experts, int32_t* order,
                             int32_t* offsets) {
    std::vector<int32_t> next(num_experts + 1, 0);
    auto bin = [&](int64_t id) { return id >= 0 && id < num_experts ? (int)id : num_experts; };
    for (int n = 0; n < num_rows; n++)
        next[bin(ids[n])]++;
    int32_t sum = 0;
    for (int e = 0; e <= num_experts; e++) {
        int32_t count = next[e];
        next[e] = offsets[e] = sum;
        sum += count;
    }
    for (int n = 0; n < num_rows; n++)
        order[next[bin(ids[n])]++] = n;
}

// The sorted position of each routed row t * K + j; -1 for a row without an expert.
static inline void invert(const Plan& plan, int num_rows, int32_t* position) {
    for (int i = 0; i < num_rows; i++)
        position[plan.order[i]] = i < plan.routed() ? i : -1;
}

// Threads take tasks in order from a counter. No result depends on which thread takes which task.
class Tasks {
    std::atomic<int64_t> next{0};

  public:
    template <class Body> void run(int64_t count, Body body) {
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;)
            body(task);
    }
    // The same, with this thread's next task as a second argument, `count` or more when there is none.
    template <class Body> void run_with_next(int64_t count, Body body) {
        int64_t task = next.fetch_add(1, std::memory_order_relaxed);
        while (task < count) {
            const int64_t following = next.fetch_add(1, std::memory_order_relaxed);
            body(task, following);
            task = following;
        }
    }
    // One task for each expert and block.
    template <class Body> void run(int experts, int blocks, Body body) {
        run((int64_t)experts * blocks,
            [&](int64_t task) { body((int)(task / blocks), (int)(task % blocks)); });
    }
};

// Calls work(thread) on so many threads. A parallel region takes as long as a row of the router.
template <class Work> static inline void in_threads(int64_t threads, Work work) {
    if (threads == 1) return work(0);
    std::atomic<int> next{0};
#pragma omp parallel num_threads(threads)
    work(next++);
}

// y_t = sum_j w_tj (rows[position(t, j)] + its expert's bias, or no bias), in the order of j, rounded once.
template <class T>
static inline void combine(const float* rows, const int32_t* position, const int64_t* ids,
                           const float* weights, const T* bias, int t, int top_k, int width, T* y) {
    constexpr int BLOCK = 256;
    float acc[BLOCK];
    for (int begin = 0; begin < width; begin += BLOCK) {
        const int n = std::min(BLOCK, width - begin);
        for (int d = 0; d < n; d++)
            acc[d] = 0.f;
        for (int j = 0; j < top_k; j++) {
            const int64_t at = (int64_t)t * top_k + j;
            if (position[at] < 0) continue;
            const float* row = rows + (size_t)position[at] * width + begin;
            const float w = weights ? weights[at] : 1.f;
            if (bias) {
                const T* b = bias + (size_t)ids[at] * width + begin;
                for (int d = 0; d < n; d++)
                    acc[d] += w * (row[d] + widen(b[d]));
            } else {
                for (int d = 0; d < n; d++)
                    acc[d] += w * row[d];
            }
        }
        for (int d = 0; d < n; d++)
            narrow(acc[d], y + (size_t)t * width + begin + d);
    }
}
