// Entry points. An argument block is an array of 8-byte words that Python fills in the order of the struct.
#include "dlpack.h"
#include "merged.h"
#include "mlp_backward.h"
#include "mlp_forward.h"
#include "select.h"

template <class Pass, class Args> static int run(const void* args) {
    try {
        Pass(*(const Args*)args).run();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

extern "C" {
int fusedonemoe_mlp_forward_f32(const void* args) { return run<ForwardPass<MacF32>, MLPForward>(args); }
int fusedonemoe_mlp_forward_bf16(const void* args) { return run<ForwardPass<MacBF16>, MLPForward>(args); }
int fusedonemoe_pack_f32(const void* args) { return run<PackingPass<MacF32>, PackWeights>(args); }
int fusedonemoe_pack_bf16(const void* args) { return run<PackingPass<MacBF16>, PackWeights>(args); }
int fusedonemoe_mlp_backward_f32(const void* args) { return run<BackwardPass<MacF32>, MLPBackward>(args); }
int fusedonemoe_mlp_backward_bf16(const void* args) { return run<BackwardPass<MacBF16>, MLPBackward>(args); }
int fusedonemoe_merged_forward_f32(const void* args) { return run<MergedForwardPass<MacF32>, MergedForward>(args); }
int fusedonemoe_merged_forward_bf16(const void* args) { return run<MergedForwardPass<MacBF16>, MergedForward>(args); }
int fusedonemoe_merged_backward_f32(const void* args) { return run<MergedBackwardPass<MacF32>, MergedBackward>(args); }
int fusedonemoe_merged_backward_bf16(const void* args) { return run<MergedBackwardPass<MacBF16>, MergedBackward>(args); }
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
int fusedonemoe_elements_per_unit_f32() { return MacF32::PER; }
int fusedonemoe_elements_per_unit_bf16() { return MacBF16::PER; }
}
