// The operators of the CPU kernels, registered with torch through its stable ABI. Each takes its arguments in
// the order of its schema, in ops/library, checks them, makes the results and runs a kernel.
#include "merged.h"
#include "mlp_operands.h"
#include "neurons_backward.h"
#include "neurons_forward.h"
#include "packing.h"
#include "route.h"

extern "C" int fusedonemoe_select_f32(const void*);

namespace {

using torch::stable::detail::from;

KERNELS(mlp_forward)
KERNELS(mlp_backward)
KERNELS(merged_forward)
KERNELS(merged_backward)
KERNELS(neurons_forward)
KERNELS(neurons_backward)
KERNELS(route)
KERNELS(route_backward)
KERNELS(pack)

// Experts that are MLPs

void run_forward(const MLPCall& c, void* y, void* z, int32_t* order, int32_t* offsets, int64_t first,
                 int64_t saved) {
    const MLPForward arguments(address(c.x), c.up.weight(), c.down.weight(), address(c.up.bias),
                               address(c.down.bias), c.routing.ids(), c.routing.shares(), y, z, order,
                               offsets, first, saved, c.threads(), c.sizes());
    mlp_forward.run(c.element, &arguments);
}

template <Weights KIND> void experts_mlp(StableIValue* stack, uint64_t, uint64_t) {
    Arguments given(stack);
    MLPCall c(given, KIND);
    const auto percent = given.take<int64_t>();
    if (percent < 0 || percent > 100) refuse("save_percent must be from 0 to 100, got ", percent);
    c.read();
    const int64_t N = c.routing.rows(), saved = N * percent / 100;
    const Tensor y = new_tensor({c.routing.T, c.D}, c.element), z = new_tensor({saved, c.G}, c.element),
                 order = new_tensor({N}, I32), offsets = new_tensor({c.E + 1}, I32);
    if (N)
        run_forward(c, written(y), written(z), (int32_t*)written(order), (int32_t*)written(offsets), 0,
                    saved);
    else
        memset(written(offsets), 0, (c.E + 1) * sizeof(int32_t));
    put(stack, {y, z, order, offsets});
}

template <Weights KIND> void experts_mlp_inference(StableIValue* stack, uint64_t, uint64_t) {
    Arguments given(stack);
    MLPCall c(given, KIND);
    c.read();
    const int64_t N = c.routing.rows();
    const Tensor y = new_tensor({c.routing.T, c.D}, c.element);
    if (N) {
        std::vector<int32_t> plan(N + c.E + 1);
        run_forward(c, written(y), nullptr, plan.data(), plan.data() + N, 0, 0);
    }
    put(stack, {y});
}

template <Weights KIND> void experts_mlp_backward(StableIValue* stack, uint64_t, uint64_t) {
    Arguments given(stack);
    Tensor dy = given.take<Tensor>(), z = given.take<Tensor>(), order = given.take<Tensor>(),
           offsets = given.take<Tensor>();
    MLPCall c(given, KIND);
    const std::vector<bool> needs = given.take_flags();
    constexpr bool HAS_GRADIENT = KIND == Weights::FLOAT;
    check_needs(needs, HAS_GRADIENT ? 6 : 4);
    c.read();
    const auto [T, K] = std::pair(c.routing.T, c.routing.K);
    const int64_t N = T * K;
    check_dim("z", z, 2);
    const int64_t saved = z.size(0);
    if (saved > N) refuse("z must have at most ", N, " rows, got ", saved);
    z = checked("z", z, {saved, c.G}, {c.element});
    order = checked("order", order, {N}, {I32});
    offsets = checked("offsets", offsets, {c.E + 1}, {I32});
    dy = checked("dy", dy, {T, c.D}, {c.element});
    auto* plan = (int32_t*)address(order);
    auto* starts = (int32_t*)address(offsets);
    if (saved != N) {
        const Tensor full = new_tensor({N, c.G}, c.element);
        if (saved) memcpy(written(full), address(z), saved * c.G * DTYPES[c.element].bytes);
        run_forward(c, nullptr, written(full), plan, starts, saved, N);
        z = full;
    }
    const bool needs_up = HAS_GRADIENT && needs[2], needs_down = HAS_GRADIENT && needs[3];
    const size_t biases = HAS_GRADIENT ? 4 : 2;
    const auto dx = wanted(needs[0], {T, c.D}, c.element), dweights = wanted(needs[1], {T, K}, F32),
               dup = wanted(needs_up, {c.E, c.G, c.D}, c.element),
               ddown = wanted(needs_down, {c.E, c.D, c.F}, c.element),
               dup_bias = wanted(needs[biases] && c.up.bias, {c.E, c.G}, c.element),
               ddown_bias = wanted(needs[biases + 1] && c.down.bias, {c.E, c.D}, c.element);
    const MLPBackward arguments(address(dy), address(z), address(c.x), c.up.weight(), c.down.weight(),
                                address(c.down.bias), c.routing.ids(), c.routing.shares(), plan, starts,
                                written(dx), written(dweights), written(dup), written(ddown),
                                written(dup_bias), written(ddown_bias), c.threads(), c.sizes());
    mlp_backward.run(c.element, &arguments);
    auto gradient = [&](const std::optional<Tensor>& value) { return result(value, c.element); };
    const Tensor of_weights = result_in(dweights, c.routing.weights_dtype, c.element);
    if constexpr (HAS_GRADIENT)
        put(stack, {gradient(dx), of_weights, gradient(dup), gradient(ddown), gradient(dup_bias),
                    gradient(ddown_bias)});
    else
        put(stack, {gradient(dx), of_weights, gradient(dup_bias), gradient(ddown_bias)});
}

// Panels

void pack_weights(StableIValue* stack, uint64_t, uint64_t) {
    Arguments given(stack);
    const Tensor panels = given.take<Tensor>(), weight = given.take<Tensor>();
    const auto layout = given.take<std::string>();
    move_panels(pack, panels, weight, layout, false);
}

void unpack_weights(StableIValue* stack, uint64_t, uint64_t) {
    Arguments given(stack);
    const Tensor panels = given.take<Tensor>();
    const int64_t rows = given.take<int64_t>(), width = given.take<int64_t>();
    const auto layout = given.take<std::string>();
    const bool gated = layout != "plain";
    // Before sizes that do not fit ask for memory.
    check_panels("panels", panels, gated ? rows / 2 : rows, width, gated, rows);
    const Tensor weight = new_tensor({panels.size(0), rows, width}, element_of("panels", panels));
    move_panels(pack, panels, weight, layout, true);
    put(stack, {weight});
}

// The router

void check_rule(const RouteRule& rule, int64_t E) {
    refuse_forward_mode();
    if (rule.groups < 1 || E % rule.groups || rule.open_groups < 1 || rule.open_groups > rule.groups)
        refuse("n_group must divide ", E, " experts and be at least topk_group, got ", rule.groups, ", ",
               rule.open_groups);
    const int64_t selectable = E / rule.groups * rule.open_groups;
    if (rule.top_k < 0 || rule.top_k > selectable)
        refuse("top_k must be from 0 to ", selectable, ", got ", rule.top_k);
}
// A row of the router takes as long as so many keys more.
int64_t threads_of_keys(double T, double E) {
    return threads_for(T * (E + 128), fusedonemoe_keys_per_thread);
}

void route_forward(StableIValue* stack, uint64_t, uint64_t) {
    Arguments given(stack);
    Tensor logits = given.take<Tensor>();
    auto bias = given.take<std::optional<Tensor>>();
    const RouteRule rule(given);
    check_dim("logits", logits, 2);
    const DtypeIndex element = element_of("logits", logits);
    const int64_t T = logits.size(0), E = logits.size(1), K = rule.top_k ? rule.top_k : E;
    check_rule(rule, E);
    if (T && K > MOST_ROUTED_ROWS / T)
        refuse("logits must be of fewer than 2**31 choices, T * K, got ", T * K, " of shape ", logits.sizes(),
               " and top_k ", rule.top_k);
    logits = checked("logits", logits, {T, E}, {element});
    if (bias) bias = in_dtype(checked("selection_bias", *bias, {E}, FLOATS), F32);
    const Tensor weights = new_tensor({T, K}, F32), experts = new_tensor({T, K}, I64);
    const Route arguments(address(logits), (const float*)address(bias), (float*)written(weights),
                          (int64_t*)written(experts), T, E, K, rule.top_k > 0, rule, threads_of_keys(T, E));
    route.run(element, &arguments);
    put(stack, {weights, experts});
}

// A whole block: the router's linear map in float32, the router, the experts.
void moe_inference(StableIValue* stack, uint64_t, uint64_t) {
    constexpr int OF_EXPERTS = 8;
    Arguments given(stack);
    const Tensor x = given.take<Tensor>(), gate = given.take<Tensor>();
    const auto bias = given.take<std::optional<Tensor>>();
    check_dim("x", x, 2);
    check_dim("gate", gate, 2);
    element_of("x", x);
    const int64_t E = gate.size(0), D = x.size(1);
    auto in_float32 = [](const Tensor& tensor) { return in_dtype(tensor, F32); };
    const auto gate_bias = checked("gate_bias", bias, {E}, FLOATS);
    StableIValue logits[] = {from(in_float32(x)), from(in_float32(checked("gate", gate, {E, D}, FLOATS))),
                             from(gate_bias ? std::optional(in_float32(*gate_bias)) : std::nullopt)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", logits, TORCH_ABI_VERSION));
    const StableIValue *rest = stack + 3, *of_experts = rest + 1 + RouteRule::FIELDS;
    StableIValue routing[2 + RouteRule::FIELDS] = {logits[0]};
    std::copy(rest, of_experts, routing + 1);
    route_forward(routing, 0, 0);
    StableIValue call[3 + OF_EXPERTS] = {from(x), routing[1], routing[0]};
    std::copy(of_experts, of_experts + OF_EXPERTS, call + 3);
    experts_mlp_inference<Weights::FLOAT>(call, 0, 0);
    stack[0] = call[0];
}

void route_gradient(StableIValue* stack, uint64_t, uint64_t) {
    Arguments given(stack);
    Tensor dweights = given.take<Tensor>(), logits = given.take<Tensor>(), experts = given.take<Tensor>();
    const RouteRule rule(given);
    check_dim("logits", logits, 2);
    const DtypeIndex element = element_of("logits", logits);
    const int64_t T = logits.size(0), E = logits.size(1), K = rule.top_k ? rule.top_k : E;
    check_rule(rule, E);
    logits = checked("logits", logits, {T, E}, {element});
    experts = in_dtype(checked("experts", experts, {T, K}, INTEGERS), I64);
    dweights = in_dtype(checked("dweights", dweights, {T, K}, FLOATS), F32);
    const Tensor dlogits = new_tensor({T, E}, element);
    const RouteBackward arguments((const float*)address(dweights), address(logits),
                                  (const int64_t*)address(experts), written(dlogits), T, E, K, rule,
                                  threads_of_keys(T, E));
    route_backward.run(element, &arguments);
    put(stack, {dlogits});
}

void select_float32(StableIValue* stack, uint64_t, uint64_t) {
    Arguments given(stack);
    Tensor keys = given.take<Tensor>();
    const auto k = given.take<int64_t>();
    refuse_forward_mode();
    check_dim("keys", keys, 2);
    const int64_t T = keys.size(0), E = keys.size(1);
    if (k < 0 || k > E) refuse("k must be from 0 to ", E, ", got ", k);
    keys = checked("keys", keys, {T, E}, {F32});
    const Tensor ids = new_tensor({T, k}, I64);
    const Select arguments((const float*)address(keys), (int64_t*)written(ids), T, E, k,
                           threads_of_keys(T, E));
    if (fusedonemoe_select_f32(&arguments)) throw NoMemory("no memory for the buffers of a selection");
    put(stack, {ids});
}

// The merged projection

struct MergedCall {
    Tensor x, proj;
    Routing routing;
    DtypeIndex element;
    int64_t D, E, F;

    explicit MergedCall(Arguments& given) {
        x = given.take<Tensor>();
        routing.take(given);
        proj = given.take<Tensor>();
    }
    void read() {
        check_dim("x", x, 2);
        element = element_of("x", x);
        check_dim("proj", proj, 3);
        D = x.size(1);
        E = proj.size(0);
        F = proj.size(2);
        routing.read_for(x.size(0));
        x = checked("x", x, {routing.T, D}, {element});
        proj = checked("proj", proj, {E, D, F}, {element});
    }
    int64_t threads() const { return threads_of_products(routing.rows(), D, F); }
};

void experts_merged(StableIValue* stack, uint64_t, uint64_t) {
    Arguments given(stack);
    MergedCall c(given);
    c.read();
    const auto& [_1, _2, _3, T, K] = c.routing;
    const Tensor h = new_tensor({T, c.F}, c.element), order = new_tensor({T * K}, I32),
                 offsets = new_tensor({c.E + 1}, I32);
    const MergedForward arguments(address(c.x), address(c.proj), c.routing.ids(), c.routing.shares(),
                                  written(h), (int32_t*)written(order), (int32_t*)written(offsets), T, K, c.E,
                                  c.D, c.F, c.threads());
    merged_forward.run(c.element, &arguments);
    put(stack, {h, order, offsets});
}

void experts_merged_backward(StableIValue* stack, uint64_t, uint64_t) {
    Arguments given(stack);
    Tensor dh = given.take<Tensor>(), order = given.take<Tensor>(), offsets = given.take<Tensor>();
    MergedCall c(given);
    const std::vector<bool> needs = given.take_flags();
    check_needs(needs, 3);
    c.read();
    const auto& [_1, _2, _3, T, K] = c.routing;
    dh = checked("dh", dh, {T, c.F}, {c.element});
    order = checked("order", order, {T * K}, {I32});
    offsets = checked("offsets", offsets, {c.E + 1}, {I32});
    const auto dx = wanted(needs[0], {T, c.D}, c.element), dweights = wanted(needs[1], {T, K}, F32),
               dproj = wanted(needs[2], {c.E, c.D, c.F}, c.element);
    const MergedBackward arguments(address(dh), address(c.x), address(c.proj), c.routing.ids(),
                                   c.routing.shares(), (const int32_t*)address(order),
                                   (const int32_t*)address(offsets), written(dx), written(dweights),
                                   written(dproj), T, K, c.E, c.D, c.F, c.threads());
    merged_backward.run(c.element, &arguments);
    put(stack, {result(dx, c.element), result_in(dweights, c.routing.weights_dtype, c.element),
                result(dproj, c.element)});
}

// Single neurons, and value memory, which has neither x nor a down-projection

struct NeuronsCall {
    std::optional<Tensor> x, down;
    Tensor up;
    Routing routing;
    std::string name = "identity";  // of the activation
    int64_t activation;
    DtypeIndex element;
    int64_t E, D;

    NeuronsCall(Arguments& given, bool has_x) {
        if (has_x) x = given.take<Tensor>();
        routing.take(given);
        if (has_x) down = given.take<Tensor>();
        up = given.take<Tensor>();
        if (has_x) name = given.take<std::string>();
    }
    void read() {
        const char* table = x ? "up" : "table";
        check_dim(table, up, 2);
        element = element_of(table, up);
        activation = activation_of(name);
        E = up.size(0);
        D = up.size(1);
        routing.read_for();
        x = checked("x", x, {routing.T, D}, {element});
        down = checked("down", down, {E, D}, {element});
        up = checked(table, up, {E, D}, {element});
    }
    int64_t threads() const { return threads_of_products(routing.rows(), D); }
};

template <bool HAS_X> void experts_neurons(StableIValue* stack, uint64_t, uint64_t) {
    Arguments given(stack);
    NeuronsCall c(given, HAS_X);
    c.read();
    const auto& [_1, _2, _3, T, K] = c.routing;
    const Tensor y = new_tensor({T, c.D}, c.element);
    const auto s = wanted(HAS_X, {T, K}, F32);
    const NeuronsForward arguments(address(c.x), address(c.down), address(c.up), c.routing.ids(),
                                   c.routing.shares(), written(y), (float*)written(s), T, K, c.E, c.D,
                                   c.threads(), c.activation);
    if (T) neurons_forward.run(c.element, &arguments);
    if constexpr (HAS_X)
        put(stack, {y, *s});
    else
        put(stack, {y});
}

template <bool HAS_X> void experts_neurons_backward(StableIValue* stack, uint64_t, uint64_t) {
    Arguments given(stack);
    Tensor dy = given.take<Tensor>();
    std::optional<Tensor> s;
    if (HAS_X) s = given.take<Tensor>();
    NeuronsCall c(given, HAS_X);
    const std::vector<bool> needs = given.take_flags();
    auto slots = given.take<std::optional<Tensor>>();
    const auto num_slots = given.take<int64_t>();
    check_needs(needs, HAS_X ? 4 : 2);
    if (num_slots < 0) refuse("num_slots must be at least 0, got ", num_slots);
    c.read();
    const auto& [_1, _2, _3, T, K] = c.routing;
    dy = checked("dy", dy, {T, c.D}, {c.element});
    s = checked("s", s, {T, K}, {F32});
    if (slots) slots = in_dtype(checked("slots", *slots, {T, K}, INTEGERS), I64);
    const int64_t rows = slots ? num_slots : c.E;
    const auto dx = wanted(HAS_X && needs[0], {T, c.D}, c.element),
               dweights = wanted(needs[HAS_X ? 1 : 0], {T, K}, F32),
               ddown = wanted(HAS_X && needs[2], {rows, c.D}, c.element),
               dup = wanted(needs[HAS_X ? 3 : 1], {rows, c.D}, c.element);
    // Without a slot there is no row to write.
    auto table = [&](const std::optional<Tensor>& gradient) { return rows ? written(gradient) : nullptr; };
    const NeuronsBackward arguments(address(dy), (const float*)address(s), address(c.x), address(c.down),
                                    address(c.up), c.routing.ids(), c.routing.shares(), written(dx),
                                    (float*)written(dweights), table(ddown), table(dup),
                                    (const int64_t*)address(slots), T, K, c.E, c.D, c.threads(), c.activation,
                                    std::max<int64_t>(num_slots, 1));
    if (T)
        neurons_backward.run(c.element, &arguments);
    else
        for (const auto& gradient : {ddown, dup})
            if (gradient) memset(written(*gradient), 0, rows * c.D * DTYPES[c.element].bytes);
    const Tensor of_weights = result_in(dweights, c.routing.weights_dtype, c.element);
    if constexpr (HAS_X)
        put(stack, {result(dx, c.element), of_weights, result(ddown, c.element), result(dup, c.element)});
    else
        put(stack, {of_weights, result(dup, c.element)});
}

// The operators of which the CPU kernel is here, by their schemas, which are those that Python defines.
struct Operator {
    const char* schema;
    void (*kernel)(StableIValue*, uint64_t, uint64_t);
};
#define EXPERTS_ARGUMENTS                                                                                    \
    "Tensor up_proj, Tensor down_proj, Tensor? up_bias, Tensor? down_bias, str activation, str layout, "     \
    "float alpha, float limit"
#define SAVED_ARGUMENTS "Tensor dy, Tensor z, Tensor order, Tensor offsets"
#define MLP_ARGUMENTS "Tensor x, Tensor experts, Tensor weights, " EXPERTS_ARGUMENTS
#define QUANTIZED_ARGUMENTS                                                                                  \
    "Tensor x, Tensor experts, Tensor weights, Tensor up, Tensor up_scale, Tensor? up_zero, Tensor down, "   \
    "Tensor down_scale, Tensor? down_zero, Tensor? up_bias, Tensor? down_bias, str activation, str layout, " \
    "float alpha, float limit"
#define MERGED_ARGUMENTS "Tensor x, Tensor experts, Tensor weights, Tensor proj"
#define NEURONS_ARGUMENTS "Tensor x, Tensor experts, Tensor weights, Tensor down, Tensor up, str activation"
#define VALUES_ARGUMENTS "Tensor experts, Tensor weights, Tensor table"
#define NEEDS_AND_SLOTS "bool[] needs, Tensor? slots=None, int num_slots=0"
const Operator OPERATORS[] = {
    {"experts_mlp_cpu(" MLP_ARGUMENTS ", int save_percent) -> (Tensor, Tensor, Tensor, Tensor)",
     experts_mlp<Weights::FLOAT>},
    {"experts_mlp_cpu_backward(" SAVED_ARGUMENTS ", " MLP_ARGUMENTS
     ", bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
     experts_mlp_backward<Weights::FLOAT>},
    {"experts_mlp_inference_cpu(" MLP_ARGUMENTS ") -> Tensor", experts_mlp_inference<Weights::FLOAT>},
    {"experts_mlp_quantized_cpu(" QUANTIZED_ARGUMENTS
     ", int save_percent) -> (Tensor, Tensor, Tensor, Tensor)",
     experts_mlp<Weights::QUANTIZED>},
    {"experts_mlp_quantized_cpu_backward(" SAVED_ARGUMENTS ", " QUANTIZED_ARGUMENTS
     ", bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
     experts_mlp_backward<Weights::QUANTIZED>},
    {"experts_mlp_quantized_inference_cpu(" QUANTIZED_ARGUMENTS ") -> Tensor",
     experts_mlp_inference<Weights::QUANTIZED>},
    {"experts_mlp_packed_cpu(Tensor x, Tensor experts, Tensor weights, Tensor packed_up, Tensor packed_down, "
     "Tensor? up_bias, Tensor? down_bias, SymInt intermediate_size, str activation, str layout, float alpha, "
     "float limit) -> Tensor",
     experts_mlp_inference<Weights::PACKED>},
    {"pack_weights_(Tensor(a!) panels, Tensor weight, str layout) -> ()", pack_weights},
    {"unpack_weights(Tensor panels, SymInt rows, SymInt width, str layout) -> Tensor", unpack_weights},
    {"route_cpu(Tensor logits, Tensor? selection_bias, " ROUTE_RULE ") -> (Tensor, Tensor)", route_forward},
    {"moe_inference_cpu(Tensor x, Tensor gate, Tensor? gate_bias, Tensor? selection_bias, " ROUTE_RULE
     ", " EXPERTS_ARGUMENTS ") -> Tensor",
     moe_inference},
    {"route_cpu_backward(Tensor dweights, Tensor logits, Tensor experts, " ROUTE_RULE ") -> Tensor",
     route_gradient},
    {"select_float32(Tensor keys, SymInt k) -> Tensor", select_float32},
    {"experts_merged_cpu(" MERGED_ARGUMENTS ") -> (Tensor, Tensor, Tensor)", experts_merged},
    {"experts_merged_cpu_backward(Tensor dh, Tensor order, Tensor offsets, " MERGED_ARGUMENTS
     ", bool[] needs) -> (Tensor, Tensor, Tensor)",
     experts_merged_backward},
    {"experts_neurons_cpu(" NEURONS_ARGUMENTS ") -> (Tensor, Tensor)", experts_neurons<true>},
    {"experts_neurons_cpu_backward(Tensor dy, Tensor s, " NEURONS_ARGUMENTS ", " NEEDS_AND_SLOTS
     ") -> (Tensor, Tensor, Tensor, Tensor)",
     experts_neurons_backward<true>},
    {"experts_values_cpu(" VALUES_ARGUMENTS ") -> Tensor", experts_neurons<false>},
    {"experts_values_cpu_backward(Tensor dy, " VALUES_ARGUMENTS ", " NEEDS_AND_SLOTS ") -> (Tensor, Tensor)",
     experts_neurons_backward<false>},
};

using torch::stable::detail::StableLibrary;

void register_kernels() {
    static StableLibrary library(StableLibrary::Kind::IMPL, "fusedonemoe", "CPU", __FILE__, __LINE__);
    for (const auto& [schema, kernel] : OPERATORS)
        library.impl(std::string(schema, strchr(schema, '(')).c_str(), kernel);
}

void define_schemas() {
    static StableLibrary library(StableLibrary::Kind::FRAGMENT, "fusedonemoe", "", __FILE__, __LINE__);
    for (const auto& [schema, _] : OPERATORS)
        library.def(schema);
}

int succeeded(void (*register_some)()) {
    try {
        register_some();
        return 0;
    } catch (const std::exception&) {
        return 1;
    }
}
}  // namespace

extern "C" {
// Registers the kernels where Python has defined the operators. Returns 0, or 1 where torch refuses them.
int fusedonemoe_register() { return succeeded(register_kernels); }
// Defines the operators too, for a process without Python.
int fusedonemoe_load() { return succeeded(define_schemas) || succeeded(register_kernels); }
}
