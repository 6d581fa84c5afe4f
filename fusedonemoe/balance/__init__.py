"""Even use of experts: losses, the selection bias that needs no loss, and reports of the use."""

from fusedonemoe.balance.bias import LossFreeBalance, update_selection_bias
from fusedonemoe.balance.counting import Usage, UsageMeter, usage
from fusedonemoe.balance.losses import load_balancing_loss, router_z_loss

__all__ = [
    "LossFreeBalance",
    "Usage",
    "UsageMeter",
    "load_balancing_loss",
    "router_z_loss",
    "update_selection_bias",
    "usage",
]
