"""Inputs and error bounds shared by the tests, the benchmarks and the documentation.

Inputs are drawn in float32 on the CPU by a generator of their own and then rounded to the dtype asked for, so one
seed means the same numbers on every device and, up to rounding, in every dtype. No global random state is touched.

Shape legend: T tokens, D hidden size, F intermediate size, E experts, K experts per token.
"""

from fusedonemoe.testing.errors import ErrorNorms, assert_within_budget, error_norms, exact_float64
from fusedonemoe.testing.inputs import (
    ROUTINGS,
    MergedInputs,
    MLPInputs,
    make_experts,
    make_logits,
    make_merged_inputs,
    make_mlp_inputs,
)

__all__ = [
    "ROUTINGS",
    "ErrorNorms",
    "MLPInputs",
    "MergedInputs",
    "assert_within_budget",
    "error_norms",
    "exact_float64",
    "make_experts",
    "make_logits",
    "make_merged_inputs",
    "make_mlp_inputs",
]
