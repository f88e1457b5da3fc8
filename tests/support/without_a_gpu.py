"""The environment in which a process runs Triton's kernels on the CPU: Triton reads it while it is imported."""

ENVIRONMENTS = {
    "interpreted": {"TRITON_INTERPRET": "1"},  # in Python
    "emulated": {"EMULATE_GPU": "90"},  # compiled for this compute capability, and run by tests/ptx
}
