"""Training and serving compute the same numbers: vLLM's own heads, and what its drafter saw and said, against ours."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.support import parity_inputs
from tests.support.engines import (
    ROOT,
    SHARED_GPU,
    SMALL_EXPERTS,
    environment_for_every_family,
    unsupported_families,
)
from tests.support.parity_inputs import small_head
from vllm_bebop.bench.conditions import on_cpu
from vllm_bebop.train.heads import MTPHead, head_tensors, load_head
from vllm_bebop.train.rollout import rollout

CHECKPOINT = ROOT / "tiny_model" / "checkpoint"
TOLERANCE = 1e-4  # of logits with a standard deviation of 1.6
PROMPT = "Problem: Multiply 47 by 36.\nSplit 36 into 30 + 6.\nFirst, 47 * 30 ="
NUM_STEPS = 3
UNSUPPORTED = unsupported_families()
if SMALL_EXPERTS in UNSUPPORTED.values():
    UNSUPPORTED["qwen3_next"] = SMALL_EXPERTS
if not on_cpu():
    UNSUPPORTED = dict.fromkeys(parity_inputs.CONFIGS, "tests.support.vllm_steps feeds vLLM's CPU kernels")
FAMILIES = [
    pytest.param(family, marks=pytest.mark.skipif(family in UNSUPPORTED, reason=UNSUPPORTED.get(family, "")))
    for family in parity_inputs.CONFIGS
]


class Call(NamedTuple):
    """One draft step as vLLM ran it: inputs [tokens], [tokens], [tokens, hidden_size]; logits of the row it sampled."""

    token_ids: Tensor
    positions: Tensor
    hidden_states: Tensor
    logits: Tensor  # [vocab_size]


class Served(NamedTuple):
    token_ids: list[int]  # prompt and continuation
    calls: list[Call]  # NUM_STEPS per verification round


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A greedy generation by vLLM with three draft steps, every call of its MTP module recorded."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_V2_MODEL_RUNNER": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }.items():
            environment.setenv(name, value)
        yield _generate()


def _generate() -> Served:
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(CHECKPOINT),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        **SHARED_GPU,
        speculative_config={"method": "mtp", "num_speculative_tokens": NUM_STEPS},
    )
    (module,) = llm.collective_rpc(lambda worker: worker.model_runner.drafter.model)
    forward, compute_logits = module.forward, module.compute_logits
    inputs: list[tuple[Tensor, Tensor, Tensor]] = []
    calls: list[Call] = []

    def recording_forward(input_ids, positions, hidden_states, *args, **kwargs):
        inputs.append((input_ids.clone().long().cpu(), positions.clone().cpu(), hidden_states.clone().cpu()))
        return forward(input_ids, positions, hidden_states, *args, **kwargs)

    def recording_logits(hidden_states, *args, **kwargs):
        logits = compute_logits(hidden_states, *args, **kwargs)
        calls.append(Call(*inputs[-1], logits[0].clone().cpu()))
        return logits

    module.forward, module.compute_logits = recording_forward, recording_logits
    (request,) = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True), use_tqdm=False)
    return Served(request.prompt_token_ids + list(request.outputs[0].token_ids), calls)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@torch.no_grad()
def test_greedy_text_equals_transformers(served: Served, model: PreTrainedModel) -> None:
    """Each served token is Transformers' choice after the tokens before it."""
    token_ids = torch.tensor([served.token_ids])
    choices = model(token_ids).logits.argmax(-1)
    num_generated = 24
    assert torch.equal(choices[0, -num_generated - 1 : -1], token_ids[0, -num_generated:])


@torch.no_grad()
def test_served_head_is_fed_the_post_norm_hidden_state(served: Served, model: PreTrainedModel) -> None:
    first = served.calls[0]
    prompt = torch.tensor([served.token_ids[: len(first.positions)]])
    torch.testing.assert_close(first.hidden_states, model.model(prompt).last_hidden_state[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(first.token_ids, torch.tensor(served.token_ids[1 : len(first.positions) + 1]))


@torch.no_grad()
def test_rollout_logits_equal_the_served_ones(served: Served, model: PreTrainedModel) -> None:
    """At every round and step, from the token ids and hidden states that vLLM fed its own module.

    A round's first call rewrites the slots since the last accepted token, its anchor is the slot before its second
    call's; slots beyond the anchor hold rejected drafts, which nothing may see.
    """
    head = load_head(CHECKPOINT, model)
    length, hidden_size = len(served.token_ids) + NUM_STEPS, model.config.hidden_size
    token_ids, hidden_states = torch.zeros(length + 1, dtype=torch.long), torch.zeros(length, hidden_size)
    rounds = list(zip(*[iter(served.calls)] * NUM_STEPS, strict=True))
    assert len(rounds) > 1
    for calls in rounds:
        first, second = calls[:2]
        token_ids[first.positions + 1] = first.token_ids
        hidden_states[first.positions] = first.hidden_states
        rows = int(second.positions[0])  # anchors 0 .. rows - 1, of which the last is the served one
        for step, call in enumerate(calls[1:], start=1):
            assert int(call.positions[0]) == rows - 1 + step
            token_ids[rows + step] = call.token_ids[0]
        end = rows + NUM_STEPS
        logits = rollout(head, hidden_states[None, :end], token_ids[None, :end], NUM_STEPS)[:, 0, -1]
        torch.testing.assert_close(logits, torch.stack([call.logits for call in calls]), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def logits_of_vllm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Each family's [anchors, NUM_STEPS, vocab_size], from vLLM's own MTP module and attention."""
    path = tmp_path_factory.mktemp("parity") / "logits.safetensors"
    families = [family for family in parity_inputs.CONFIGS if family not in UNSUPPORTED]
    command = [sys.executable, "-m", "tests.support.vllm_steps", str(path), *families]
    run = subprocess.run(command, cwd=ROOT, env=environment_for_every_family(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return load_file(path)


@torch.no_grad()
def logits_of_ours(head: MTPHead, family: str) -> Tensor:
    fed = parity_inputs.inputs(family)
    logits = rollout(head, fed["hidden_states"][None], fed["token_ids"][None], parity_inputs.NUM_STEPS)
    return logits[:, 0, list(parity_inputs.ANCHORS)].transpose(0, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_head_and_rollout_equal_the_module_of_vllm(family: str, logits_of_vllm: dict[str, Tensor]) -> None:
    head = small_head(family)
    torch.testing.assert_close(logits_of_ours(head, family), logits_of_vllm[family], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_head_and_rollout_show_each_planted_fault(family: str, logits_of_vllm: dict[str, Tensor]) -> None:
    """Wired otherwise, or at a wrong position, the same head leaves vLLM's at the step where the fault begins."""
    wiring = small_head(family).family
    other = {"post_norm": "pre_norm", "pre_norm": "post_norm"}
    faults = {
        "concat": ({"concat": wiring.concat[::-1]}, 0),
        "recycled": ({"hidden_recycled": other[wiring.hidden_recycled]}, 1),
        "first embedding": ({"zero_embedding_at_0": not wiring.zero_embedding_at_0}, 0),
    }
    wrong: dict[str, tuple[MTPHead, int]] = {}
    for fault, (change, first_step) in faults.items():
        wrong[fault] = small_head(family), first_step
        wrong[fault][0].family = dataclasses.replace(wiring, **change)
    wrong["position"] = small_head(family), 1
    rotary, anchor = wrong["position"][0].rotary, parity_inputs.ANCHORS[-1]
    rotary.register_forward_pre_hook(lambda _, inputs: (inputs[0], inputs[1].clamp(max=anchor)))
    if any("e_score_correction_bias" in name for name in head_tensors(small_head(family))):
        wrong["router bias"] = small_head(family), 0
        wrong["router bias"][0].layer.mlp.gate.e_score_correction_bias.zero_()
    for fault, (head, first_step) in wrong.items():
        distance = (logits_of_ours(head, family) - logits_of_vllm[family]).abs().amax(dim=(0, 2))
        assert (distance[:first_step] < TOLERANCE).all(), fault
        assert (distance[first_step:] > 100 * TOLERANCE).all(), (fault, distance)
