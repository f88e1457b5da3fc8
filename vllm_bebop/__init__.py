"""vllm-bebop: lossless multi-token-prediction speculative decoding for RL rollouts (arXiv:2606.12370)."""

__version__ = "0.1.0"
