"""Refusals of the methods that PEFT calls on layers of adapters, for layers that it could not switch or save."""

import sys
from typing import Any, NoReturn

from torch import nn


def _refuse(call: str) -> NoReturn:
    raise RuntimeError(
        f"PEFT's {call} reaches adapters of experts that are not PEFT's: it would neither switch nor save them. Let PEFT adapt "
        "the experts, with LoraConfig(target_parameters=...), and give that model to fusedonemoe.integrations.peft.from_peft; or "
        "put unload() in the place of these adapters first"
    )


class RefusesPeft(nn.Module):
    """A module that raises where PEFT would switch, delete, merge or describe its adapters, and would miss some of that.

    PEFT looks for its layers by their class, of which this one is a virtual subclass once :func:`show_to_peft` has run.
    """

    def enable_adapters(self, enabled: bool) -> None:
        """Refused: PEFT's ``disable_adapter`` would be half done."""
        _refuse(f"enable_adapters({enabled})")

    def set_adapter(self, *args: Any, **options: Any) -> None:
        """Refused, and with it ``get_peft_model`` and ``add_adapter``, which end in this call."""
        _refuse("set_adapter(...)")

    def set_requires_grad(self, *args: Any, **options: Any) -> None:
        """Refused."""
        _refuse("set_requires_grad(...)")

    def delete_adapter(self, adapter_name: str) -> None:
        """Refused."""
        _refuse(f"delete_adapter({adapter_name!r})")

    def unload_and_optionally_merge_module(self, *args: Any, **options: Any) -> nn.Module:
        """Refused: PEFT's ``merge_and_unload`` and ``unload`` would leave these adapters in the model."""
        _refuse("unload(...)")

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """Refused: PEFT's status of layers would leave these out."""
        _refuse("get_layer_status()")


def show_to_peft(kind: type) -> None:
    """Make a class one of PEFT's layers in the eyes of ``isinstance``, if anything has imported PEFT."""
    layers = sys.modules.get("peft.tuners.lora.layer")
    if layers is not None:
        layers.LoraLayer.register(kind)


def check_no_peft(model: nn.Module) -> None:
    """The model has no adapters of PEFT's."""
    layers = sys.modules.get("peft.tuners.tuners_utils")
    if layers is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, layers.BaseTunerLayer) and not isinstance(module, RefusesPeft):
            raise ValueError(
                f"model must have no adapters of PEFT's, which would switch and save its own alone, got one at {name}: name the "
                "experts' parameters in LoraConfig(target_parameters=...) and call fusedonemoe.integrations.peft.from_peft(model)"
            )
