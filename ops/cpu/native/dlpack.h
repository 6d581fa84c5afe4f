// A buffer of the pool as a DLPack tensor. Python makes a tensor of it, and its memory returns to the pool
// when that tensor dies.
#pragma once
#include "layer.h"

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
