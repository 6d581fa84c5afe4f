"""Blocks of experts from and to the checkpoints of other libraries.

Safetensors files need the package ``safetensors`` (``pip install 'fusedonemoe[hf]'``); nothing here needs transformers.
"""

from fusedonemoe.integrations.checkpoints.blocks import Block
from fusedonemoe.integrations.checkpoints.layouts import LAYOUTS
from fusedonemoe.integrations.checkpoints.loading import list_blocks, load_experts
from fusedonemoe.integrations.checkpoints.saving import to_state_dict
from fusedonemoe.integrations.checkpoints.weights import ExpertWeights

__all__ = ["LAYOUTS", "Block", "ExpertWeights", "list_blocks", "load_experts", "to_state_dict"]
