"""``save_pretrained`` of a model with adapters of this library, refused where it would write what nothing can load."""

from typing import Any

from torch import nn

from fusedonemoe.layers.lora import LoRAExperts


class RefusedSave:
    """Stands in for a model's ``save_pretrained``: raises while there are adapters, and is the model's own without.

    Args:
        model: whose ``save_pretrained`` it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Save the model, if it has no adapters."""
        names = [name for name, module in self.model.named_modules() if isinstance(module, LoRAExperts)]
        if names:
            raise RuntimeError(
                f"save_pretrained would write the adapters of {names[0]} under names that nothing loads: save adapters with "
                "fusedonemoe.integrations.peft.save_adapter(model, directory), or put unload() in the place of each first"
            )
        own: Any = type(self.model)
        return own.save_pretrained(self.model, *args, **options)


def refuse_save(model: nn.Module) -> None:
    """Guard every ``save_pretrained`` in a model that would write adapters of this library."""
    for module in model.modules():
        saves = callable(getattr(type(module), "save_pretrained", None)) and "save_pretrained" not in vars(module)
        if saves and any(isinstance(part, LoRAExperts) for part in module.modules()):
            module.save_pretrained = RefusedSave(module)  # type: ignore[assignment]
