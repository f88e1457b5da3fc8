"""Sampling and loss kernels; imported as `vllm_bebop.kernels`. Needs only torch (and Triton for the fused forms)."""
