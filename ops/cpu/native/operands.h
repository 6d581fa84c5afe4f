// What the dispatcher hands to an operator, checked and read: tensors of one shape and dtype, contiguous.
// A tensor that autograd kept may come back in other strides, and an operator can be called by its name.
#pragma once
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <vector>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include "layer.h"

// Tests make these small.
extern "C" {
// Outputs from this size on come from the pool: torch gives each fresh pages, and the system zeroes them.
int64_t fusedonemoe_pooled_from = 1 << 20;
// Products of a weight and an element, and keys of a router, below which a second thread does not pay.
double fusedonemoe_products_per_thread = 1 << 18, fusedonemoe_keys_per_thread = 1 << 15;
}

// A function of torch's own that is not in its stable interface: null where this torch has none.
namespace torch::autograd {
struct ForwardADLevel {
    __attribute__((weak)) static std::shared_ptr<ForwardADLevel> try_get_by_idx(uint64_t level);
};
}  // namespace torch::autograd

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
typedef std::initializer_list<int64_t> Shape;

// Rows are counted, sorted and numbered in 32 bits.
constexpr int64_t MOST_ROUTED_ROWS = (int64_t(1) << 31) - 1;

struct Dtype {
    int32_t code;
    const char* name;
    int bytes;
};
// The dtypes of operands; the kernels' elements are the first three.
static const Dtype DTYPES[] = {
    {aoti_torch_dtype_float32(), "float32", 4}, {aoti_torch_dtype_bfloat16(), "bfloat16", 2},
    {aoti_torch_dtype_float16(), "float16", 2}, {aoti_torch_dtype_float64(), "float64", 8},
    {aoti_torch_dtype_int64(), "int64", 8},     {aoti_torch_dtype_int32(), "int32", 4},
    {aoti_torch_dtype_int16(), "int16", 2},     {aoti_torch_dtype_int8(), "int8", 1},
    {aoti_torch_dtype_uint8(), "uint8", 1},     {aoti_torch_dtype_uint16(), "uint16", 2},
    {aoti_torch_dtype_uint32(), "uint32", 4},   {aoti_torch_dtype_uint64(), "uint64", 8},
    {aoti_torch_dtype_bool(), "bool", 1},
};
enum DtypeIndex { F32, BF16, F16, F64, I64, I32, I16, I8, U8, U16, U32, U64, BOOL, NUM_DTYPES };
typedef std::initializer_list<DtypeIndex> Dtypes;
static const Dtypes FLOATS = {F32, BF16, F16, F64}, INTEGERS = {I64, I32, I16, I8, U8, U16, U32, U64};

inline DtypeIndex dtype_of(const Tensor& tensor) {
    int32_t code;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
    int index = 0;
    while (index < NUM_DTYPES && DTYPES[index].code != code)
        index++;
    return (DtypeIndex)index;
}
inline std::string name_of(DtypeIndex dtype) {
    return dtype < NUM_DTYPES ? std::string("torch.") + DTYPES[dtype].name : "another dtype";
}

// The text of a part of a message: of text, of a number, or of sizes.
template <class Part> inline std::string text_of(const Part& part) {
    if constexpr (std::is_arithmetic_v<Part>) {
        return std::to_string(part);
    } else if constexpr (std::is_convertible_v<Part, std::string>) {
        return part;
    } else {
        std::string text;
        for (int64_t size : part)
            text += (text.empty() ? "" : ", ") + std::to_string(size);
        return "(" + text + (part.size() == 1 ? ",)" : ")");
    }
}

template <class... Parts> [[noreturn]] inline void refuse(const Parts&... parts) {
    throw std::invalid_argument((text_of(parts) + ...));
}
// Python makes a MemoryError of it.
struct NoMemory : std::bad_alloc {
    const std::string text;
    explicit NoMemory(std::string text) : text(std::move(text)) {}
    const char* what() const noexcept override { return text.c_str(); }
};

// Tensors may have tangents in a level of forward mode, and torch would take a missing rule for zeros.
inline void refuse_forward_mode() {
    using torch::autograd::ForwardADLevel;
    if (&ForwardADLevel::try_get_by_idx && ForwardADLevel::try_get_by_idx(0))
        throw std::runtime_error(
            "forward-mode derivatives and torch.func need impl='dense'; the other implementations have "
            "first derivatives in reverse mode only");
}

// The place of a name among those that the argument may have.
inline int place_of(const char* argument, const std::string& name, const std::vector<const char*>& names) {
    for (size_t i = 0; i < names.size(); i++)
        if (name == names[i]) return (int)i;
    std::string all;
    for (const char* each : names)
        all += (all.empty() ? "'" : ", '") + std::string(each) + "'";
    refuse(argument, " must be one of (", all, "), got '", name, "'");
}

// Takes the arguments of an operator in order.
class Arguments {
    const StableIValue* next;

  public:
    explicit Arguments(const StableIValue* stack) : next(stack) {}
    template <class T> T take() { return torch::stable::detail::to<T>(*next++); }
    int take_name(const char* argument, const std::vector<const char*>& names) {
        return place_of(argument, take<std::string>(), names);
    }
    std::vector<bool> take_flags() {
        const auto list = take<StableListHandle>();
        size_t size = 0;
        torch_list_size(list, &size);
        std::vector<bool> flags(size);
        for (size_t i = 0; i < size; i++) {
            StableIValue flag = 0;
            torch_list_get_item(list, i, &flag);
            flags[i] = torch::stable::detail::to<bool>(flag);
        }
        torch_delete_list(list);
        return flags;
    }
};

inline void put(StableIValue* stack, std::initializer_list<Tensor> results) {
    for (const Tensor& result : results)
        *stack++ = torch::stable::detail::from(result);
}

// An uninitialised tensor on the CPU.
inline Tensor new_tensor(Shape shape, DtypeIndex dtype) {
    constexpr int MOST_DIMS = 5;
    int64_t strides[MOST_DIMS], size = 1;
    const int dims = (int)shape.size();
    for (int i = dims - 1; i >= 0; i--) {
        strides[i] = std::max(size, int64_t(1));
        size *= shape.begin()[i];
    }
    const int64_t bytes = size * DTYPES[dtype].bytes;
    const int32_t code = DTYPES[dtype].code, cpu = aoti_torch_device_type_cpu();
    AtenTensorHandle handle;
    if (bytes < fusedonemoe_pooled_from) {
        TORCH_ERROR_CODE_CHECK(
            aoti_torch_empty_strided(dims, shape.begin(), strides, code, cpu, -1, &handle));
        return Tensor(handle);
    }
    Memory::Block block;
    try {
        block = Memory::pool().take((size_t)bytes);
    } catch (const std::bad_alloc&) {
        throw NoMemory("no memory for a tensor of " + std::to_string(bytes) + " bytes");
    }
    auto give_back = [](void* data, void* capacity) { Memory::pool().give((char*)data, (size_t)capacity); };
    const auto failed = torch_from_blob(block.data, dims, shape.begin(), strides, 0, code, cpu, -1, &handle,
                                        aoti_torch_layout_strided(), nullptr, 0, give_back,
                                        (void*)block.size);
    if (failed) {
        Memory::pool().give(block.data, block.size);
        throw NoMemory("no memory for a tensor");
    }
    return Tensor(handle);
}

inline const void* address(const Tensor& tensor) {
    const void* data = tensor.const_data_ptr();
    if (!data && tensor.numel()) refuse("a tensor has no memory");
    return data;
}
inline const void* address(const std::optional<Tensor>& tensor) {
    return tensor ? address(*tensor) : nullptr;
}
inline void* written(const Tensor& tensor) { return tensor.mutable_data_ptr(); }
inline void* written(const std::optional<Tensor>& tensor) { return tensor ? written(*tensor) : nullptr; }

inline void check_dim(const char* name, const Tensor& tensor, int64_t dims) {
    if (tensor.dim() != dims) refuse(name, " must have ", dims, " dimensions, got shape ", tensor.sizes());
}

// The tensor, contiguous, after a check of its dtype and its shape.
inline Tensor checked(const char* name, const Tensor& tensor, Shape shape, Dtypes dtypes) {
    const DtypeIndex dtype = dtype_of(tensor);
    if (std::find(dtypes.begin(), dtypes.end(), dtype) == dtypes.end()) {
        std::string names;
        for (const DtypeIndex each : dtypes)
            names += (names.empty() ? "" : " or ") + name_of(each);
        refuse(name, " must have dtype ", names, ", got ", name_of(dtype));
    }
    const auto sizes = tensor.sizes();
    if (!std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()))
        refuse(name, " must have shape ", shape, ", got ", sizes);
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
inline std::optional<Tensor> checked(const char* name, const std::optional<Tensor>& tensor, Shape shape,
                                     Dtypes dtypes) {
    return tensor ? std::optional(checked(name, *tensor, shape, dtypes)) : std::nullopt;
}
inline Tensor in_dtype(const Tensor& tensor, DtypeIndex dtype) {
    constexpr ScalarType TYPES[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half,
                                    ScalarType::Double, ScalarType::Long};
    return dtype_of(tensor) == dtype ? tensor : torch::stable::to(tensor, TYPES[dtype]);
}

// The dtype of a tensor of this name, which must be one of the kernels'.
inline DtypeIndex element_of(const char* name, const Tensor& tensor) {
    const DtypeIndex dtype = dtype_of(tensor);
    if (dtype > F16)
        refuse(name, " must have a dtype of the CPU kernels, float32, bfloat16 or float16, got ",
               name_of(dtype));
    return dtype;
}

// Ids and weights [T, K], as int64 and float32.
struct Routing {
    Tensor experts, weights;
    DtypeIndex weights_dtype;  // as they came
    int64_t T, K;

    void take(Arguments& given) {
        experts = given.take<Tensor>();
        weights = given.take<Tensor>();
    }
    void read_for(std::optional<int64_t> tokens = std::nullopt) {
        refuse_forward_mode();
        check_dim("experts", experts, 2);
        T = tokens.value_or(experts.size(0));
        K = experts.size(1);
        if (T && K > MOST_ROUTED_ROWS / T)
            refuse("experts must have fewer than 2**31 entries, T * K, got ", T * K, " of shape ",
                   experts.sizes());
        if (K < 1) refuse("experts must have shape [T, K] with K >= 1, got ", experts.sizes());
        experts = in_dtype(checked("experts", experts, {T, K}, INTEGERS), I64);
        weights_dtype = dtype_of(weights);
        weights = in_dtype(checked("weights", weights, {T, K}, FLOATS), F32);
    }
    int64_t rows() const { return T * K; }
    const int64_t* ids() const { return (const int64_t*)address(experts); }
    const float* shares() const { return (const float*)address(weights); }
};

// The number of threads for so much work. No result depends on it.
inline int64_t threads_for(double work, double work_per_thread) {
    if (work < 2 * work_per_thread) return 1;
    return std::min<int64_t>(torch::stable::get_num_threads(), int64_t(work / work_per_thread));
}
inline int64_t threads_of_products(double rows, double width, double height = 1) {
    return threads_for(rows * width * height, fusedonemoe_products_per_thread);
}

// A kernel for each element.
typedef int (*Kernel)(const void*);
struct Kernels {
    const char* name;
    Kernel of[3];

    void run(DtypeIndex element, const void* arguments) const {
        const int failed = of[element](arguments);
        if (failed == 2) refuse("order and offsets must be the plan of experts, got another for ", name);
        if (failed) throw NoMemory(std::string("no memory for the scratch buffers of ") + name);
    }
};
#define KERNELS(name)                                                                                        \
    extern "C" int fusedonemoe_##name##_f32(const void*), fusedonemoe_##name##_bf16(const void*),            \
        fusedonemoe_##name##_f16(const void*);                                                               \
    static const Kernels name{                                                                               \
        #name, {fusedonemoe_##name##_f32, fusedonemoe_##name##_bf16, fusedonemoe_##name##_f16}};

// The gradients that a backward returns: an empty tensor, each its own, for one that nobody needs.
inline std::optional<Tensor> wanted(bool needed, Shape shape, DtypeIndex dtype) {
    return needed ? std::optional(new_tensor(shape, dtype)) : std::nullopt;
}
inline Tensor result(const std::optional<Tensor>& gradient, DtypeIndex dtype) {
    return gradient ? *gradient : new_tensor({0}, dtype);
}
inline Tensor result_in(const std::optional<Tensor>& gradient, DtypeIndex dtype, DtypeIndex otherwise) {
    return gradient ? in_dtype(*gradient, dtype) : new_tensor({0}, otherwise);
}
inline void check_needs(const std::vector<bool>& needs, size_t count) {
    if (needs.size() != count) refuse("needs must have ", count, " flags, got ", needs.size());
}

}  // namespace
