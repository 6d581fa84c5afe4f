"""The GPU lowering: Triton kernels, one file per operator. Needs triton; imported on first use."""
