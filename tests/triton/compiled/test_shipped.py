"""Every configuration that the library can launch, compiled for every target."""

import itertools

import pytest

from fusedonemoe.ops.triton import rules
from tests.triton.compiled.gates import problems
from tests.triton.compiled.layers import DTYPES, LAYERS, ROWS, fine_launches, launches, tokens_for
from tests.triton.compiled.machine_code import examine
from tests.triton.fake_gpu import TARGETS

# fp16 differs from bf16 in the names of its instructions, sm80 from sm90 in its tiles; the last two have to compile and to fit.
CASES = [
    *itertools.product(["sm90"], ["bf16"], LAYERS, ROWS),
    *itertools.product(["sm80"], ["bf16"], ["qwen3", "gpt_oss"], ROWS),
    *itertools.product(["sm90"], ["fp16"], ["qwen3"], ["few", "many"]),
    *itertools.product(["sm80"], ["fp16"], ["qwen3"], ["many"]),
    *itertools.product(["sm90"], ["fp32"], ["qwen3", "gpt_oss"], ROWS),
    *itertools.product(["sm80"], ["fp32"], ["qwen3"], ROWS),
    *itertools.product(["sm100", "gfx942"], ["bf16"], ["qwen3"], ROWS),
    *itertools.product(["sm100", "gfx942"], ["bf16"], ["gpt_oss"], ["many"]),
]


@pytest.mark.parametrize(("arch", "dtype", "layer", "rows"), CASES)
def test_machine_code(arch, dtype, layer, rows, reports):
    found = []
    for launch in launches(arch, layer, dtype, rows):
        found += problems(launch, examine(launch, arch, reports), arch, aligned=layer != "odd")
    assert found == []


ADAPTED_CASES = [
    *itertools.product(["sm90"], ["bf16"], ["qwen3", "gpt_oss"], ROWS),
    ("sm90", "bf16", "odd", "mid"),
    *itertools.product(["sm80"], ["bf16"], ["qwen3"], ["few", "many"]),
    *itertools.product(["sm90"], ["fp32"], ["qwen3"], ["many"]),
    *itertools.product(["sm100", "gfx942"], ["bf16"], ["qwen3"], ["many"]),
]


@pytest.mark.parametrize(("arch", "dtype", "layer", "rows"), ADAPTED_CASES)
def test_machine_code_of_adapted_experts(arch, dtype, layer, rows, reports):
    found = []
    for launch in launches(arch, layer, dtype, rows, ["lora"]):
        found += problems(launch, examine(launch, arch, reports), arch, aligned=layer != "odd")
    assert found == []


BOTH = ("int8", "int4")
QUANTIZED_CASES = [
    *itertools.product(["sm90"], ["bf16"], ["qwen3"], ROWS, [BOTH]),
    *itertools.product(["sm90"], ["bf16"], ["gpt_oss"], ["many"], [BOTH]),
    *itertools.product(["sm80"], ["bf16"], ["qwen3"], ["few", "many"], [BOTH]),
    *itertools.product(["sm90"], ["fp32"], ["qwen3"], ["many"], [BOTH]),
    ("sm90", "bf16", "odd", "mid", ("int8",)),  # groups of 4 bits have no odd widths
    *itertools.product(["sm100", "gfx942"], ["bf16"], ["qwen3"], ["many"], [("int4",)]),
]


@pytest.mark.parametrize(("arch", "dtype", "layer", "rows", "operators"), QUANTIZED_CASES)
def test_machine_code_of_quantised_experts(arch, dtype, layer, rows, operators, reports):
    found = []
    for launch in launches(arch, layer, dtype, rows, operators):
        found += problems(launch, examine(launch, arch, reports), arch, aligned=layer != "odd")
    assert found == []


FINE_CASES = [
    *itertools.product(["sm90", "sm80"], ["bf16", "fp32"], ["flashmoe"]),
    ("sm90", "bf16", "peer"),
    *itertools.product(["sm100", "gfx942"], ["bf16"], ["flashmoe"]),
]


@pytest.mark.parametrize(("arch", "dtype", "layer"), FINE_CASES)
def test_machine_code_of_fine_grained_experts(arch, dtype, layer, reports):
    found = []
    for launch in fine_launches(arch, layer, dtype):
        found += problems(launch, examine(launch, arch, reports), arch)
    assert found == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", TARGETS)
def test_the_layers_reach_every_line_of_the_rules(arch, dtype):
    def tiles(rows_per_expert, D, F, gated):
        return rules.tiles_for(arch, DTYPES[dtype], rows_per_expert, D, F, gated)

    reached = set()
    for layer, rows in itertools.product(LAYERS.values(), ROWS):
        rows_per_expert = tokens_for(layer, rows) * layer.K / layer.E
        reached |= set(tiles(rows_per_expert, layer.D, layer.F, layer.layout != "plain"))
    densities = [2.0**exponent * part for exponent in range(-4, 16) for part in (1, 1.4)]
    widths = [16, 64, 100, 512, 768, 1024, 1536, 2048, 2880, 4096, 7168, 14336]
    possible = {tile for case in itertools.product(densities, widths, widths, [False, True]) for tile in tiles(*case)}
    assert possible <= reached
