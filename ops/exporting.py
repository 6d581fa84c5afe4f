"""The question of an export, which Dynamo of some torch answers wrongly."""

import torch


def is_exporting() -> bool:
    """Return whether ``torch.export`` traces the call. In Dynamo of torch 2.11, torch's own function is True in every graph."""
    return torch.compiler.is_exporting()


is_exporting.__dict__["_dynamo_marked_constant"] = True  # see ops/cpu/native.py
