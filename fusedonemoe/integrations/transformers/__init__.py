"""Hugging Face transformers 5: one line, and a model's mixture-of-experts layers run on this library.

``enable()`` adds ``experts_implementation="fusedonemoe"``; ``apply(model)`` changes a loaded model, and reports.
"""

from fusedonemoe.integrations.transformers.application import LayerReport, Report, apply, disable, enable, unapply

__all__ = ["LayerReport", "Report", "apply", "disable", "enable", "unapply"]
