"""Adapters of experts as PEFT and vLLM keep them: read into :class:`~fusedonemoe.LoRAExperts`, and written from it.

A model trains here, with ``add_lora``, and its adapters go back with ``save_adapter``; or they come from elsewhere, with
``load_adapter`` from a file and with ``from_peft`` from a ``PeftModel``. The layouts are in :mod:`.adapter_layouts`.
"""

import importlib
import json
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusedonemoe.checks import check_shape
from fusedonemoe.integrations import adapter_layouts as layouts
from fusedonemoe.integrations.adapter_layouts import AdapterConfig, Factors, join_factors, split_factors
from fusedonemoe.integrations.checkpoints.files import read_json
from fusedonemoe.integrations.transformers.experts import form_of
from fusedonemoe.layers import Experts
from fusedonemoe.layers.form import ExpertsForm
from fusedonemoe.layers.lora import LoRAExperts, check_adapter_dtype, check_no_adapters, put_in_place, unchanged_by_failure
from fusedonemoe.layers.lora import add_lora as add_lora_to_experts
from fusedonemoe.ops.values import check_flag, check_one_of

__all__ = [
    "adapter_config",
    "adapter_state_dict",
    "add_lora",
    "from_peft",
    "join_factors",
    "load_adapter",
    "save_adapter",
    "split_factors",
]

LAYOUTS = ("peft", "vllm")
# Names that wrappers add to those of modules: torch.compile, FSDP and activation checkpointing.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class _RefusedSave:
    """Stands in for a model's ``save_pretrained``: raises while there are adapters, and is the model's own without."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **options: Any) -> Any:
        names = [name for name, module in self.model.named_modules() if isinstance(module, LoRAExperts)]
        if names:
            raise RuntimeError(
                f"save_pretrained would write the adapters of {names[0]} under names that nothing loads: save adapters with "
                "fusedonemoe.integrations.peft.save_adapter(model, directory), or put unload() in the place of each first"
            )
        own: Any = type(self.model)
        return own.save_pretrained(self.model, *args, **options)


def _refuse_save(model: nn.Module) -> None:
    """Guard every ``save_pretrained`` in a model that would write adapters of this library."""
    for module in model.modules():
        saves = callable(getattr(type(module), "save_pretrained", None)) and "save_pretrained" not in vars(module)
        if saves and any(isinstance(part, LoRAExperts) for part in module.modules()):
            module.save_pretrained = _RefusedSave(module)  # type: ignore[assignment]


def add_lora(model: nn.Module, **options: Any) -> dict[str, LoRAExperts]:
    """:func:`fusedonemoe.add_lora` for a transformers model: its modules of experts, and ours, get adapters.

    They are this library's: save them with :func:`save_adapter`. The model's own ``save_pretrained`` raises from then on, and so
    does ``get_peft_model``, which could neither switch nor save them. For adapters that PEFT switches and saves, let PEFT add
    them, and call :func:`from_peft`. Arguments and results are those of :func:`fusedonemoe.add_lora`.

    Raises:
        ValueError: the model holds no experts, or such as the operators cannot compute; or it has adapters of PEFT's.
    """
    _import_peft()
    added = add_lora_to_experts(model, read=form_of, **options)
    _refuse_save(model)
    return added


def _import_peft() -> None:
    """Let PEFT be there before adapters are, if it is installed, so that it can be told of them."""
    with suppress(ImportError):
        importlib.import_module("peft.tuners.lora.layer")


def _read(source: Any, config: Any) -> tuple[Mapping[str, Tensor], AdapterConfig]:
    origin, tensors = "source", source
    if not isinstance(source, Mapping):
        path = Path(source)
        is_directory = path.is_dir()
        origin = str(path / "adapter_model.safetensors") if is_directory else str(path)
        tensors = _read_tensors(Path(origin))
        if config is None and is_directory:
            path = path / "adapter_config.json"
            values = read_json(path, "an adapter's configuration")
            try:
                return tensors, AdapterConfig(values)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{path}: {error}") from error
    if config is None:
        raise ValueError(f"config must be given beside a state dict or a file: ranks do not tell the scale of {origin}")
    return tensors, AdapterConfig(config)


def _read_tensors(path: Path) -> Mapping[str, Tensor]:
    load_file = _safetensors().load_file
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    if not path.is_file():
        raise ValueError(f"{path} must be a safetensors file, got a {'directory' if path.is_dir() else 'special file'}")
    try:
        tensors: Mapping[str, Tensor] = load_file(path)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} must be a safetensors file: {error}") from error
    return tensors


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("adapters are read and written with safetensors: pip install 'fusedonemoe[hf]'") from error
    return safetensors.torch


def load_adapter(
    model: nn.Module,
    source: "str | Path | Mapping[str, Tensor]",
    *,
    config: Any = None,
    strict: bool = True,
    trainable: bool = False,
    dtype: torch.dtype | None = None,
) -> dict[str, LoRAExperts]:
    """Put an adapter that PEFT or vLLM's tools have written on a model's experts.

    Args:
        model: a transformers model, or one with :class:`~fusedonemoe.Experts`, without adapters. It is changed.
        source: a directory with ``adapter_model.safetensors`` and ``adapter_config.json``; such a tensor file alone; or a
            state dict. PEFT's layout of experts and a matrix per expert are told apart by their keys.
        config: PEFT's configuration, a mapping or a ``LoraConfig``, where ``source`` is no directory.
        strict: refuse keys of other modules than experts, and experts that the configuration names and the file lacks.
        trainable: whether the adapters require gradients.
        dtype: of the adapters, see :class:`~fusedonemoe.LoRAExperts`.

    Returns:
        The new modules by name.

    Raises:
        ImportError: safetensors is not installed.
        OSError: a file is not there, or cannot be read.
        TypeError: ``config`` is no configuration, or the adapters are no floating-point tensors.
        ValueError: a file is damaged, or keys, shapes, ranks and the configuration do not fit. The message names the place.
    """
    _import_peft()
    check_no_adapters(model)
    check_adapter_dtype(dtype)
    check_flag("trainable", trainable)
    tensors, checked = _read(source, config)
    with unchanged_by_failure(model):
        added: dict[str, LoRAExperts] = {}
        for name, (form, found) in _adapters_in(model, tensors, checked, strict).items():
            ranks = {target: A.shape[1] for target, (A, _, _) in found.items()}
            alphas = {target: scale * ranks[target] for target, (_, _, scale) in found.items()}
            options: Any = {"targets": tuple(found), "form": form, "dtype": dtype}
            added[name] = LoRAExperts(model.get_submodule(name), r=ranks, alpha=alphas, **options)
            for target, (A, B, _) in found.items():
                for own, read in zip(added[name].factors(target), (A, B), strict=True):
                    own.data.copy_(read)
    put_in_place(model, added, trainable=trainable)
    _refuse_save(model)
    return added


def _adapters_in(
    model: nn.Module, tensors: Mapping[str, Tensor], checked: AdapterConfig, strict: bool
) -> dict[str, tuple[ExpertsForm, dict[str, Factors]]]:
    """The checked adapters of a model's experts, by the names of modules and targets; packed experts are unpacked."""
    modules, others = layouts.sort_keys(tensors)
    bases = dict(model.named_modules())
    forms = {name: form for name, module in bases.items() if (form := form_of(module)) is not None}
    for name in forms:
        if isinstance(experts := bases[name], Experts):
            experts.unpack()
    stacked: dict[str, dict[int, dict[str, Tensor]]] = {}
    separate: dict[str, dict[tuple[str, int], dict[str, Tensor]]] = {}
    for module, factors in modules.items():
        name = re.sub(r"(\.base_layer)+$", "", module)
        match = layouts.PER_EXPERT.fullmatch(module)
        if name in forms:
            stacked.setdefault(name, {})[module.count(".base_layer")] = factors
        elif match and match["experts"] in forms:
            proj = layouts.GATE_UP_DOWN.get(match["proj"], match["proj"])
            separate.setdefault(match["experts"], {})[proj, int(match["expert"])] = factors
        else:
            others.append(module)
    if both := stacked.keys() & separate.keys():
        raise ValueError(f"adapters must be in one layout, got two for {sorted(both)}")
    adapters = {n: layouts.read_stacked(n, forms[n], bases[n], found, checked) for n, found in stacked.items()}
    adapters |= {n: layouts.read_per_expert(n, forms[n], bases[n], found, checked) for n, found in separate.items()}
    if not adapters:
        raise ValueError(f"source must hold adapters of experts of this model, got keys of {sorted(modules)[:3]}")
    if strict and others:
        raise ValueError(f"source must hold adapters of experts alone, got {sorted(others)[:3]} of {len(others)} others")
    if strict and (missing := [n for n, form in forms.items() if n not in adapters and checked.targets(n, form)]):
        raise ValueError(f"the config's target_parameters name {missing}, for which there are no tensors")
    for name, found in adapters.items():
        _check_shapes(name, bases[name], forms[name], found)
    return {name: (forms[name], found) for name, found in adapters.items()}


def _check_shapes(name: str, base: nn.Module, form: ExpertsForm, adapters: Mapping[str, Factors]) -> None:
    for target, (A, B, _) in adapters.items():
        E, rows, columns = getattr(base, form.name(target)).shape
        out, inner = (columns, rows) if form.transposed else (rows, columns)
        for letter, factor, shape in (("A", A, (E, A.shape[1], inner)), ("B", B, (E, out, A.shape[1]))):
            check_shape(f"{letter} of {name}.{form.name(target)}", factor, shape)


def _check_wrapped(name: str, wrapper: Any, form: ExpertsForm, adapter: str | None) -> None:
    """PEFT's nested wrappers of one module hold the adapter, unmerged, and are of its projections."""
    layer = wrapper
    while hasattr(layer, "parameter_name"):
        active = layer.active_adapters
        chosen = active[0] if adapter is None and len(active) == 1 else adapter
        if chosen not in layer.lora_A:
            raise ValueError(f"adapter must be one of {sorted(layer.lora_A)}, got {chosen!r} with {active} active")
        if layer.merged:
            raise ValueError(f"{name} must not be merged: call unmerge_adapter() first")
        if layer.parameter_name not in (form.up, form.down):
            raise ValueError(f"{name} must have adapters of its projections alone, got one of {layer.parameter_name}")
        layer = layer.base_layer


def from_peft(model: nn.Module, adapter: str | None = None) -> dict[str, LoRAExperts]:
    """Take over the adapters of experts in a ``PeftModel``: its wrappers become :class:`~fusedonemoe.LoRAExperts`.

    The parameters stay PEFT's, and so do their names: what PEFT and transformers do to adapters (switch, merge, delete, save,
    load into one that is there) works on these as on all. All adapters of the experts are taken over, no others of the model.
    To add one to the experts, add it before.

    Args:
        model: a ``PeftModel``, or what it wraps. It is changed.
        adapter: the adapter that the experts use; by default the active one.

    Returns:
        The new modules by name.

    Raises:
        ImportError: peft is not installed.
        ValueError: there is no such adapter, it is merged, or there are no adapters of experts.
    """
    try:
        from peft.tuners.lora.layer import ParamWrapper
    except ImportError as error:
        raise ImportError("a PeftModel comes with peft: pip install peft") from error
    from fusedonemoe.integrations.peft_experts import PeftExperts

    wrappers: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper) and not any(name.startswith(f"{outer}.") for outer in wrappers):
            wrappers[name] = module
    forms = {name: form for name, wrapper in wrappers.items() if (form := form_of(wrapper.get_base_layer())) is not None}
    if not forms:
        raise ValueError(f"model must hold adapters of experts, got {type(model).__name__} without any")
    for name, form in forms.items():
        _check_wrapped(name, wrappers[name], form, adapter)
    added: dict[str, LoRAExperts] = {}
    for name, form in forms.items():
        added[name] = PeftExperts(wrappers[name], form, adapter).train(wrappers[name].training)
        model.set_submodule(name, added[name])
    return added


def _adapted(model: nn.Module) -> dict[str, LoRAExperts]:
    """The modules with adapters, by the names that they have without what wraps the model."""
    bare = _unwrapped(model)
    found = {name: m for name, m in bare.named_modules() if isinstance(m, LoRAExperts) and m.targets}
    if not found or "" in found:
        raise ValueError(f"model must hold modules of LoRAExperts inside, got {type(model).__name__}")
    names = (".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in found)
    return dict(zip(names, found.values(), strict=True))


def _unwrapped(model: Any) -> nn.Module:
    peft_model, tuners = (sys.modules.get(f"peft.{name}") for name in ("peft_model", "tuners.tuners_utils"))
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif peft_model is not None and isinstance(model, peft_model.PeftModel):
            model = model.base_model
        elif tuners is not None and isinstance(model, tuners.BaseTuner):
            model = model.model
        else:
            return model


def adapter_state_dict(model: nn.Module, *, layout: str = "peft") -> dict[str, Tensor]:
    """The adapters of a model's :class:`~fusedonemoe.LoRAExperts` as other libraries keep them.

    The tensors are contiguous and have memory of their own, under the keys of ``adapter_model.safetensors``.

    Args:
        model: with adapters.
        layout: ``"peft"``, two matrices of all experts per parameter, or ``"vllm"``, a matrix per expert and projection.

    Raises:
        ValueError: an unknown layout, or a model without adapters.
    """
    check_one_of("layout", layout, LAYOUTS)
    write = layouts.write_stacked if layout == "peft" else layouts.write_per_expert
    return {layouts.PREFIX + key: tensor for name, module in _adapted(model).items() for key, tensor in write(name, module)}


def adapter_config(model: nn.Module, *, layout: str = "peft", base_model: str | None = None) -> dict[str, Any]:
    """The configuration that belongs to :func:`adapter_state_dict`, as ``adapter_config.json`` holds it.

    It is a mapping that ``peft.LoraConfig(**...)`` takes; ``base_model`` is the name or path of the base model, for those who
    load by it.
    """
    check_one_of("layout", layout, LAYOUTS)
    adapted = _adapted(model)

    def pattern(name: str, module: LoRAExperts, target: str) -> str:
        if layout == "peft":
            return f"{name}.{module.form.name(target)}"
        return rf"{name}\.\d+\.{'(gate|up)_proj' if target == 'gate_up' else 'down_proj'}"

    use_rslora = all(module.use_rslora for module in adapted.values())
    adapters = {
        pattern(name, module, target): (
            module.r[target],
            module.alpha[target] if module.use_rslora == use_rslora else module.scale[target] * module.r[target],
        )
        for name, module in adapted.items()
        for target in module.targets
    }
    r, alpha = next(iter(adapters.values()))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "rank_pattern": {name: rank for name, (rank, _) in adapters.items() if rank != r},
        "alpha_pattern": {name: value for name, (_, value) in adapters.items() if value != alpha},
        "target_modules": [] if layout == "peft" else ["gate_proj", "up_proj", "down_proj"],
        "target_parameters": list(adapters) if layout == "peft" else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
    }


def save_adapter(model: nn.Module, directory: str | Path, *, layout: str = "peft", base_model: str | None = None) -> None:
    """Write a model's adapters so that ``PeftModel.from_pretrained`` or vLLM loads them.

    The directory, which is made if need be, gets ``adapter_model.safetensors`` and ``adapter_config.json``. Other arguments and
    errors are those of :func:`adapter_state_dict` and :func:`adapter_config`; and an ImportError if safetensors is missing.
    """
    tensors = adapter_state_dict(model, layout=layout)
    config = adapter_config(model, layout=layout, base_model=base_model)
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    _safetensors().save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
