// Entry points for one element type, -DELEMENT=f32, bf16 or f16, and with -DCOMMON those for all types. An
// argument block is the struct of a pass, which operators.cpp fills.
#include "dlpack.h"
#include "fork.h"
#include "formats.h"
#include "merged.h"
#include "neurons_backward.h"
#include "neurons_forward.h"
#include "packing.h"
#include "route.h"

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
