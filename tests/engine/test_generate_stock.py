"""`bebop rollout` without speculation, where vLLM's own sampler draws."""

from tests.support.engines import SHARED_GPU, TINY_MODEL
from vllm_bebop.generate import Prompt, RolloutFile, Sampling, generate, start_engine


def test_prompts_may_be_more_than_a_step_takes(tmp_path, monkeypatch):
    """vLLM rewinds the generator of a request whose prompt it cuts, which a CPU's cannot be."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    prompts = [Prompt(str(number), [5 + number] * 40) for number in range(3)]
    out = RolloutFile(tmp_path / "out.jsonl", {})
    llm = start_engine(str(TINY_MODEL), 64, engine=SHARED_GPU | {"max_num_batched_tokens": 64, "max_num_seqs": 4})
    try:
        generate(llm, prompts, Sampling(max_tokens=2), out)
    finally:
        llm.llm_engine.engine_core.shutdown()
    assert len(out.finished) == 3
