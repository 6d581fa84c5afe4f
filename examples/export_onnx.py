"""A block as ONNX: one file for any number of tokens, run by onnxruntime without PyTorch and without this library."""

import tempfile
from pathlib import Path

import onnx
import onnxruntime
import torch

from fusedonemoe import MoE


def main():
    torch.manual_seed(0)
    moe = MoE(hidden_size=32, intermediate_size=16, num_experts=8, top_k=2).eval()
    shapes = ({0: torch.export.Dim("tokens")},)
    program = torch.onnx.export(moe, (torch.randn(6, 32),), dynamic_shapes=shapes, dynamo=True, verbose=False)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "moe.onnx")
        program.save(path)
        domains = {operator_set.domain or "ai.onnx" for operator_set in onnx.load(path).opset_import}
        session = onnxruntime.InferenceSession(path)
    print("operators:", ", ".join(sorted(domains)))
    (given,) = session.get_inputs()
    print("input:", given.shape, given.type)
    for tokens in (1, 6, 50):
        x = torch.randn(tokens, 32)
        (y,) = session.run(None, {given.name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), moe(x).detach(), rtol=1e-4, atol=1e-5)
        print(f"{tokens:2d} tokens: as in PyTorch")


if __name__ == "__main__":
    main()
