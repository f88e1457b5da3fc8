"""Serves a small random model of each family with bebop: `python -m tests.support.families_probe DIRECTORY FAMILY...`.

A process of its own, because Qwen3.5 needs help to be imported without a GPU (tests/cpu_support). Prints one JSON line
per family: greedy tokens without speculation and with bebop, seeded tokens served twice, and what was accepted.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.support.engines import BEBOP, accepted_per_position, engine, token_ids
from tests.support.parity_inputs import small_target, weights

_ENGINE = {"deepseek_v3": {"attention_backend": "CPU_MLA"}}  # the same kernel on every CPU


def write_checkpoint(family: str, directory: Path) -> None:
    """A random target of this family, text only, with a random head under its native names."""
    small_target(family).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | weights(family), directory / "model.safetensors", {"format": "pt"})
    if family == "mimo":  # its layers are Qwen2's, and are written here as Qwen2's
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"architectures": ["MiMoForCausalLM"]}))


def serve(family: str, directory: Path) -> dict[str, Any]:
    from vllm import SamplingParams

    write_checkpoint(family, directory)
    prompts = [{"prompt_token_ids": [i + 1, 2, 3, 4]} for i in range(6)]
    greedy, seeded = (
        SamplingParams(temperature=t, seed=5, max_tokens=24, ignore_eos=True, detokenize=False) for t in (0.0, 1.0)
    )
    result: dict[str, Any] = {"family": family}
    options = {"model": str(directory), "skip_tokenizer_init": True, "max_model_len": 64, "max_num_seqs": 8}
    options |= _ENGINE.get(family, {})
    with engine(**options) as llm:
        result["stock_greedy"] = token_ids(llm.generate(prompts, greedy, use_tqdm=False))
    with engine(BEBOP, **options) as llm:
        result["greedy"] = token_ids(llm.generate(prompts, greedy, use_tqdm=False))
        result["seeded"], result["again"] = (token_ids(llm.generate(prompts, seeded, use_tqdm=False)) for _ in range(2))
        result["rounds"], result["accepted"] = accepted_per_position(llm)
    return result


if __name__ == "__main__":
    for family in sys.argv[2:]:
        (place := Path(sys.argv[1]) / family).mkdir()
        try:
            print("RESULT", json.dumps(serve(family, place)), flush=True)
        except Exception:  # one family's failure must not hide the others' results
            traceback.print_exc()
