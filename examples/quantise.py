"""Experts with weights of 8 and 4 bits: their size, and the change of the outputs."""

import torch

from fusedonemoe import MoE, quantize_

FORMATS = {
    "int8": {"dtype": "int8"},
    "int4, groups of 128": {"dtype": "int4"},
    "int4, groups of 32": {"dtype": "int4", "group_size": 32},
    "int4, groups of 32, zero points": {"dtype": "int4", "group_size": 32, "symmetric": False},
}


def main():
    print(f"{'format':33s}size of float32's   change of the outputs")
    for name, options in FORMATS.items():
        torch.manual_seed(0)
        model = MoE(hidden_size=256, intermediate_size=128, num_experts=16, top_k=4)
        x = torch.randn(64, 256)
        with torch.no_grad():
            expected = model(x)
            (layer,) = quantize_(model, inputs=x, **options).layers
            change = (model(x) - expected).norm() / expected.norm()
        assert abs(change - layer.output_error) < 0.2 * change  # what the report says of 16 tokens holds for all
        print(f"{name:33s}{layer.bytes_after / layer.bytes_before:12.1%}{change:20.1%}")


if __name__ == "__main__":
    main()
