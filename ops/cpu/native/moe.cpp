// Entry points for one element type, -DELEMENT=f32, bf16 or f16, and with -DCOMMON those for all types. An
// argument block is the struct of a pass, which operators.cpp fills.
#include <pthread.h>
#include <system_error>
#include <thread>
#include "formats.h"
#include "merged.h"
#include "neurons_backward.h"
#include "neurons_forward.h"
#include "packing.h"
#include "route.h"

// The thread that called fork() goes on in the child. gcc's OpenMP runtime assumes that this thread still has
// the parent's workers, and waits for them for ever. A new thread has no workers, so the runtime starts some.
class __attribute__((visibility("hidden"))) Fork {
    inline static pthread_t survivor;
    inline static bool happened = false;

    static void in_child() {
        survivor = pthread_self();
        happened = true;
    }

  public:
    // Call it once, when the library is loaded.
    static void watch() { pthread_atfork(nullptr, nullptr, in_child); }
    // True in a child, on the thread that called fork().
    static bool is_survivor() { return happened && pthread_equal(pthread_self(), survivor); }
};

// Runs pass(), which must not throw and has `threads` threads, on a thread that may start OpenMP's workers.
template <class Pass> static inline int with_workers(int64_t& threads, Pass pass) {
    if (threads == 1 || !Fork::is_survivor()) return pass();
    int result = 0;
    try {
        std::thread([&] { result = pass(); }).join();
    } catch (const std::system_error&) {  // the system has no new thread
        threads = 1;
        result = pass();
    }
    return result;
}

template <class Pass, class Args> __attribute__((noinline)) static int run_pass(const Args& args) {
    try {
        Pass{args}.run();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    } catch (const std::invalid_argument&) {
        return 2;
    }
}

template <class Pass, class Args> static int run(const void* given) {
    Args args = *(const Args*)given;
    return with_workers(args.threads, [&] { return run_pass<Pass>(args); });
}

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define ENTRY(name) JOIN(fusedonemoe_##name##_, ELEMENT)

namespace element {
typedef MacF32 f32;
typedef MacBF16 bf16;
typedef MacF16 f16;
typedef ELEMENT Mac;
}  // namespace element
using element::Mac;

extern "C" {
int ENTRY(mlp_forward)(const void* args) { return run<MLPForwardPass<Mac>, MLPForward>(args); }
int ENTRY(mlp_backward)(const void* args) { return run<MLPBackwardPass<Mac>, MLPBackward>(args); }
int ENTRY(merged_forward)(const void* args) { return run<MergedForwardPass<Mac>, MergedForward>(args); }
int ENTRY(merged_backward)(const void* args) { return run<MergedBackwardPass<Mac>, MergedBackward>(args); }
int ENTRY(neurons_forward)(const void* args) { return run<NeuronsForwardPass<Mac>, NeuronsForward>(args); }
int ENTRY(neurons_backward)(const void* args) { return run<NeuronsBackwardPass<Mac>, NeuronsBackward>(args); }
int ENTRY(route)(const void* args) { return run<RoutePass<Mac::T>, Route>(args); }
int ENTRY(route_backward)(const void* args) { return run<RouteBackwardPass<Mac::T>, RouteBackward>(args); }
int ENTRY(pack)(const void* args) { return run<PackingPass<Mac>, Pack>(args); }
int ENTRY(elements_per_unit)() { return Mac::PER; }
}

#if defined(COMMON)
static const bool is_watching = (Fork::watch(), true);

// The stable C layout of DLPack's DLManagedTensor (dmlc/dlpack, version 0).
struct ManagedTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t type_code, type_bits;
    uint16_t type_lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
    void* context;
    void (*deleter)(ManagedTensor*);
};

// A buffer of the pool as a tensor for Python; the memory returns to the pool when that tensor dies.
struct PooledTensor {
    ManagedTensor managed;
    int64_t bytes;
    size_t capacity;
};

static inline void give_back(ManagedTensor* managed) {
    auto* tensor = (PooledTensor*)managed->context;
    Memory::pool().give((char*)managed->data, tensor->capacity);
    delete tensor;
}

static inline ManagedTensor* pooled_bytes(int64_t bytes) {
    constexpr int32_t CPU = 1, UNSIGNED = 1, DIMENSIONS = 1;
    auto block = Memory::pool().take((size_t)bytes);
    auto* t = new PooledTensor{};
    t->bytes = bytes;
    t->capacity = block.size;
    t->managed = {block.data, CPU, 0, DIMENSIONS, UNSIGNED, 8, 1, &t->bytes, nullptr, 0, t, give_back};
    return &t->managed;
}

extern "C" {
int fusedonemoe_select_f32(const void* args) { return run<SelectPass, Select>(args); }
void* fusedonemoe_pooled_bytes(int64_t bytes) {
    try {
        return pooled_bytes(bytes);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}
int64_t fusedonemoe_pool_peak() { return (int64_t)Memory::pool().peak_since_last(); }
void fusedonemoe_trim() { Memory::pool().trim(); }
int fusedonemoe_lanes() { return LANES; }
int fusedonemoe_panel_columns() { return PANEL; }
}
#endif
