"""vLLM calls `register` in every process it starts (entry point `vllm.general_plugins`).

It wraps the one function where a speculative config is read and returns; nothing else of vLLM changes until a config
asks for bebop. Idempotent and cheap: torch and vLLM are loaded by then anyway.
"""

import os


def register() -> None:
    """Teach vLLM the method "bebop"; see engine/intake.py for the one function that is patched."""
    from vllm_bebop.engine import intake

    intake.install()
    if os.environ.get("VLLM_BEBOP_MEND_CPU") == "1":
        from vllm_bebop.engine import cpu_mend

        cpu_mend.install()
