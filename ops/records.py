"""Records: the choices that describe a call, each with its fields in this one place."""

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from torch import Tensor

from fusedonemoe.ops import formats
from fusedonemoe.ops.formats import Format, Part, Shape, Tensors
from fusedonemoe.ops.operands import Reader, check_dim, reader_of
from fusedonemoe.ops.rules import RouteRule as RouteRule  # pickles of routers name it here

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "identity", "swiglu_oai")
GATE_UP_LAYOUTS = ("gate_up", "up_gate", "interleaved")
PLAIN = "plain"


# Makes a record of its fields without a Python function, which a NamedTuple's own constructor is: a call makes several.
_make = tuple.__new__


class Activation(NamedTuple):
    """The function between the up and the down projection.

    ``swiglu_oai`` is GPT-OSS's clamped SwiGLU, gated by definition: ``g = min(gate, limit)``, ``u = clamp(up, -limit, limit)``,
    ``h = (u + 1) * g * sigmoid(alpha * g)``.
    """

    name: str  # one of ACTIVATIONS
    layout: str  # of z: gate_up, up_gate (halves), interleaved (gate, up, gate, up, ...), or plain without a gate
    alpha: float  # slope of swiglu_oai
    limit: float  # clamp of swiglu_oai


class Argument(NamedTuple):
    """An argument of an operator; whether autocast casts it, and whether the backward returns a gradient of it."""

    name: str
    type: str
    casts: bool = False
    has_gradient: bool = False


ACTIVATION_ARGUMENTS = (
    *(Argument("activation", "str"), Argument("layout", "str")),
    *(Argument("alpha", "float"), Argument("limit", "float")),
)


class Adapter(NamedTuple):
    """The factors of one projection's low-rank adapter: ``delta_e = scale * B_e A_e``, ``A [E, R, I]`` and ``B [E, O, R]``."""

    A: Tensor
    B: Tensor
    scale: float


class Projection(NamedTuple):
    """A stacked linear map ``[E, O, I]``: ``rows W_e^T + bias_e + scale (rows A_e^T) B_e^T``, W in a weight format."""

    format: Format
    tensors: Tensors
    shape: Shape
    bias: Tensor | None = None
    adapter: Adapter | None = None

    @classmethod
    def of(
        cls,
        candidates: tuple[Format, ...],
        tensors: Tensors,
        bias: Tensor | None = None,
        adapter: Adapter | None = None,
        *,
        name: str = "weight",
    ) -> "Projection":
        """Return the projection of tensors in one of these formats; ``name`` is theirs in an error."""
        tensor = tensors[0]
        if tensor.dim() != 3:
            check_dim(name, tensor, 3)
        if candidates[0] is formats.PLAIN and tensor.is_contiguous():  # the most frequent, told without a call
            return _make(cls, (formats.PLAIN, tensors, tensor.shape, bias, adapter))
        for candidate in candidates:
            shape = candidate.shape(tensors)
            if shape is not None:
                return _make(cls, (candidate, tensors, shape, bias, adapter))
        raise TypeError(
            f"{name} must have a dtype of the format {' or '.join(each.name for each in candidates)}, got {tensor.dtype}"
        )

    @property
    def floats(self) -> Tensor:
        """Return the one tensor of a format that has no other."""
        tensor: Tensor
        (tensor,) = self.tensors
        return tensor


class ExpertsForm(NamedTuple):
    """Experts that are MLPs, ``act(rows up) down``: up ``[E, G, D]``, G being 2F or without a gate F, and down ``[E, D, F]``."""

    up: Projection
    down: Projection
    act: Activation


class ExpertsCall(NamedTuple):
    """A call of experts that are MLPs: ``x [T, D]``, ids and routing weights ``[T, K]`` of any integer and floating dtype."""

    x: Tensor
    experts: Tensor
    weights: Tensor
    form: ExpertsForm

    def read(self, *, views: bool = False) -> tuple[Reader, "ExpertsCall"]:
        """Check an operator that was called by its name; return the call's reader, and the call as kernels read it.

        With ``views``, weights of floats keep their strides.
        """
        x_TD, experts_TK, weights_TK, (up, down, act) = self
        reader = reader_of(x_TD)
        T, D = x_TD.shape
        E, G, _ = up.shape
        F = down.shape[2]
        expected = F if act.layout == PLAIN else 2 * F
        if expected != G:
            raise ValueError(f"up_proj must have {expected} rows with down_proj of width {F}, got {G}")
        experts_TK, weights_TK = reader.routing(experts_TK, weights_TK, T)
        kinds = [projection.format.kind(projection.tensors) for projection in (up, down)]
        if kinds[0] != kinds[1]:
            raise ValueError("down must have the kind of up, {}, got {}".format(*(" of ".join(map(str, kind)) for kind in kinds)))

        def read(name: str, projection: Projection, shape: Shape) -> Projection:
            bias = reader.read_optional(f"{name}_bias", projection.bias, shape[:2])
            tensors = projection.format.read(reader, name, projection.tensors, shape, views=views)
            return projection._replace(tensors=tensors, shape=shape, bias=bias)

        form = ExpertsForm(read("up", up, (E, G, D)), read("down", down, (E, D, F)), act)
        return reader, ExpertsCall(reader.read("x", x_TD, (T, D)), experts_TK, weights_TK, form)


class SavedRows(NamedTuple):
    """The sorted rows as a forward keeps them: ``z [S, G]``, the first pre-activations, and the plan's order and offsets."""

    z: Tensor
    order: Tensor
    offsets: Tensor


class ExpertsNeeds(NamedTuple):
    """The gradients that are wanted; one that is not wanted costs nothing."""

    x: bool = False
    weights: bool = False
    up: bool = False
    down: bool = False
    up_bias: bool = False
    down_bias: bool = False
    up_A: bool = False
    up_B: bool = False
    down_A: bool = False
    down_B: bool = False

    @property
    def dz(self) -> bool:
        """Return whether any of them is made from the gradient of the pre-activations."""
        return self.x or self.up or self.up_bias or self.up_A or self.up_B


class ExpertsGradients(NamedTuple):
    """The gradients of a call; None for one that is not wanted."""

    x: Tensor | None = None
    weights: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    up_A: Tensor | None = None
    up_B: Tensor | None = None
    down_A: Tensor | None = None
    down_B: Tensor | None = None


class ExpertsArguments:
    """The argument list of the operators of experts: the only place that knows the order.

    ``x, experts, weights``, the parts of up, the parts of down, ``up_bias, down_bias``; of adapters ``up_A, up_B, down_A, down_B,
    up_scale, down_scale``; the intermediate size where the weights do not tell it; the activation's fields.
    """

    def __init__(self, formats: tuple[Format, ...], *, adapted: bool = False) -> None:
        self.formats: tuple[Format, ...] = formats  # of the weights, all with the same parts
        self.adapted: bool = adapted  # an adapter that is absent has rank 0
        self.parts: tuple[Part, ...] = formats[0].parts

        def side(name: str) -> list[Argument]:
            types = ("Tensor", "Tensor?")
            return [Argument(p.name.format(name), types[p.is_optional], p.casts, p.has_gradient) for p in self.parts]

        biases = [Argument(name, "Tensor?", True, True) for name in ("up_bias", "down_bias")]
        factors = [Argument(name, "Tensor", True, True) for name in ("up_A", "up_B", "down_A", "down_B")]
        routing = [Argument("experts", "Tensor"), Argument("weights", "Tensor", has_gradient=True)]
        tensors = [Argument("x", "Tensor", True, True), *routing, *side("up"), *side("down"), *biases, *factors[: 4 * adapted]]
        scale = "{}_adapter_scale" if any(p.name == "{}_scale" for p in self.parts) else "{}_scale"
        constants = [Argument(scale.format(name), "float") for name in ("up", "down")] if adapted else []
        if not formats[0].has_sizes:
            constants.append(Argument("intermediate_size", "SymInt"))
        self.arguments: tuple[Argument, ...] = (*tensors, *constants, *ACTIVATION_ARGUMENTS)
        # Of the first part of each weight, for errors.
        self.names: tuple[str, ...] = tuple(self.parts[0].name.format(name) for name in ("up", "down"))
        weights_gradients = ("up", "down") if any(p.has_gradient for p in self.parts) else ()
        adapter_gradients = tuple(factor.name for factor in factors) if adapted else ()
        # The fields of ExpertsGradients that the backward returns, in order.
        self.gradients: tuple[str, ...] = ("x", "weights", *weights_gradients, "up_bias", "down_bias", *adapter_gradients)
        # From flags of these, with False behind them for the others, to those of ExpertsNeeds.
        places = {name: place for place, name in enumerate(self.gradients)}
        self._needs_of = itemgetter(*(places.get(name, len(places)) for name in ExpertsNeeds._fields))

    @property
    def schema(self) -> str:
        """Return the arguments as a schema lists them."""
        return ", ".join(f"{argument.type} {argument.name}" for argument in self.arguments)

    def call(self, arguments: tuple[Any, ...]) -> ExpertsCall:
        """Return the call of these arguments; those behind the activation's fields are ignored."""
        x, experts, weights, *rest = arguments
        parts = len(self.parts)
        up, down, (up_bias, down_bias, *rest) = tuple(rest[:parts]), tuple(rest[parts : 2 * parts]), rest[2 * parts :]
        adapters: list[Adapter | None] = [None, None]
        if self.adapted:
            up_A, up_B, down_A, down_B, up_scale, down_scale, *rest = rest
            factors = ((up_A, up_B, up_scale), (down_A, down_B, down_scale))
            adapters = [None if A.shape[1] == 0 else Adapter(A, B, scale) for A, B, scale in factors]
        if self.formats[0].has_sizes:
            up_name, down_name = self.names
            up_map = Projection.of(self.formats, up, up_bias, adapters[0], name=up_name)
            down_map = Projection.of(self.formats, down, down_bias, adapters[1], name=down_name)
            act = _make(Activation, rest[:4])
        else:
            (packed,) = self.formats
            F, *rest = rest
            act, E, D = _make(Activation, rest[:4]), up[0].shape[0], x.shape[1]
            G = F if act.layout == PLAIN else 2 * F
            up_map, down_map = Projection(packed, up, (E, G, D), up_bias), Projection(packed, down, (E, D, F), down_bias)
        return _make(ExpertsCall, (x, experts, weights, _make(ExpertsForm, (up_map, down_map, act))))

    def flatten(self, call: ExpertsCall) -> tuple[Any, ...]:
        """Return the arguments of a call, the inverse of :meth:`call`."""
        x, experts, weights, (up, down, act) = call
        adapters: tuple[Any, ...] = ()
        if self.adapted:
            ups, downs = (_factors(projection, x) for projection in (up, down))
            adapters = (*ups[:2], *downs[:2], ups.scale, downs.scale)
        sizes = () if up.format.has_sizes else (down.shape[2],)
        return (x, experts, weights, *up.tensors, *down.tensors, up.bias, down.bias, *adapters, *sizes, *act)

    def needs(self, flags: Sequence[bool]) -> ExpertsNeeds:
        """Return the gradients that are wanted, of flags in the order of :attr:`gradients`."""
        if len(flags) != len(self.gradients):
            raise ValueError(f"needs must have {len(self.gradients)} flags, got {len(flags)}")
        return _make(ExpertsNeeds, self._needs_of((*flags, False)))

    def results(self, gradients: ExpertsGradients, owner: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients as a backward returns them: an empty tensor, each its own, for one that was not wanted."""
        results = []
        for name in self.gradients:  # a comprehension takes Python frames
            value = getattr(gradients, name)
            results.append(owner.new_empty(0) if value is None else value)
        return tuple(results)


def _factors(projection: Projection, like: Tensor) -> Adapter:
    """Return the adapter, or one of rank 0 where there is none."""
    if projection.adapter is not None:
        return projection.adapter
    E, O, I = projection.shape  # noqa: E741
    return Adapter(like.new_empty(E, 0, I), like.new_empty(E, O, 0), 1.0)


MLP_ARGUMENTS = ExpertsArguments(formats.FLOATS)
LORA_ARGUMENTS = ExpertsArguments(formats.FLOATS, adapted=True)
QUANTIZED_ARGUMENTS = ExpertsArguments(formats.QUANTIZED)
PACKED_ARGUMENTS = ExpertsArguments((formats.PANELS,))
