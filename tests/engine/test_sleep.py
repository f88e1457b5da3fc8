"""The head over level-2 sleep. vLLM's sleep does nothing on a CPU: there the tests discard what a GPU would."""

import pytest

from tests.support.engines import BEBOP, accepted_per_position, engine, runner, token_ids
from vllm_bebop.bench.conditions import on_cpu

PROMPTS = ["import os", "The return value", "x = [1, 2"]


def _served(llm):
    """Texts of seeded requests, and the drafts accepted by position."""
    from vllm import SamplingParams

    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=20, ignore_eos=True) for i in range(len(PROMPTS))]
    _, before = accepted_per_position(llm)
    tokens = token_ids(llm.generate(PROMPTS, params, use_tqdm=False))
    _, after = accepted_per_position(llm)
    llm.reset_prefix_cache()  # as the engine does before it falls asleep
    return tokens, [now - then for now, then in zip(after, before or [0] * len(after), strict=True)]


def _sleep_and_wake(llm, tags):
    """Level 2; the target's weights are sent anew once awake. tags: of each call of `wake_up`."""
    model_runner = runner(llm)
    target = {name: parameter.data.clone() for name, parameter in model_runner.get_model().named_parameters()}
    llm.collective_rpc("sleep", kwargs={"level": 2})
    if on_cpu():
        for model in (model_runner.get_model(), model_runner.drafter.model):
            for parameter in model.parameters():
                parameter.data.fill_(float("nan"))
    for each in tags:
        llm.collective_rpc("wake_up", kwargs={"tags": each})
    for name, parameter in model_runner.get_model().named_parameters():
        parameter.data.copy_(target[name])


@pytest.fixture(scope="module")
def llm():
    with engine(BEBOP, enable_sleep_mode=not on_cpu()) as llm:
        yield llm


@pytest.mark.parametrize("tags", [[None], [["weights"], ["kv_cache"]]], ids=["at once", "weights first"])
def test_head_wakes_up_as_it_fell_asleep(llm, tags):
    before = _served(llm)
    assert before[1][0] > 0
    _sleep_and_wake(llm, tags)
    assert _served(llm) == before


def test_pushed_head_wakes_up_as_pushed(llm):
    """An RL stack's new head, not the one on disk, is what comes back."""
    norm = runner(llm).drafter.model.model.norm.weight
    loaded = norm.data.clone()
    norm.data.add_(0.5)
    _sleep_and_wake(llm, [None])
    assert (norm == loaded + 0.5).all()
    norm.data.copy_(loaded)


def test_only_what_is_the_heads_own_is_kept(llm):
    """The embedding and lm_head are the target's: an old copy must not overwrite what was pushed before waking ends."""
    from vllm_bebop.engine import sleeping_head

    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    names = sleeping_head.copy_head(worker).keys()
    assert "model.fc.weight" in names
    assert not any("embed_tokens" in name or "lm_head" in name for name in names)


def test_without_the_copy_nothing_is_accepted(llm, monkeypatch):
    """The fault that the copy mends. Last: it leaves the head without its weights."""
    from vllm_bebop.engine import sleeping_head

    monkeypatch.setattr(sleeping_head, "restore_head", lambda worker, kept: None)
    _sleep_and_wake(llm, [None])
    _, accepted = _served(llm)
    assert accepted[0] == 0
