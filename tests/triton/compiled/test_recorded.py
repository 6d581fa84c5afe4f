"""The prefill kernels on sm90 against the numbers on record: no spill, wgmma in flight, at most a tenth more of anything."""

import pytest
import triton

from tests.triton.compiled import record

AGAIN = "if this is meant: python -m tests.triton.compiled.record --write"


@pytest.mark.skipif(triton.__version__ not in record.recorded(), reason=f"no numbers of triton {triton.__version__} on record")
@pytest.mark.parametrize("layer", record.LAYERS)
def test_prefill_kernels_keep_their_numbers(layer, reports):
    on_record, now = record.recorded()[triton.__version__][layer], record.measure(layer, reports)
    assert set(now) == set(on_record), AGAIN
    worse = []
    for kernel, numbers in now.items():
        before = on_record[kernel]
        kept = (
            numbers["registers"] <= 1.1 * before["registers"]
            and numbers["loop_instructions"] <= 1.1 * before["loop_instructions"]
            and numbers["spill_bytes"] <= before["spill_bytes"]
            and numbers["wgmma_in_flight"] >= before["wgmma_in_flight"]
        )
        if not kept:
            worse.append((kernel, numbers, before))
    assert worse == [], AGAIN


def test_the_pinned_triton_is_on_record():
    assert {"3.6.0", "3.7.1"} <= set(record.recorded())


def test_what_is_on_record_is_good():
    for layers in record.recorded().values():
        for kernels in layers.values():
            assert kernels
            for numbers in kernels.values():
                assert numbers["spill_bytes"] == 0 and numbers["wgmma_in_flight"] >= 1 and numbers["loop_instructions"] > 0
