"""The shipped TV-trained draft: what `bebop eval` predicts for it is what an engine counts."""

import json
import math

import pytest
import torch
from transformers import AutoTokenizer

from tests.support.engines import BEBOP, ROOT, TINY_MODEL, accepted_per_position, engine, token_ids
from vllm_bebop.train.evaluate import Text, evaluate
from vllm_bebop.train.heads import load_head
from vllm_bebop.train.losses import SamplingPolicy
from vllm_bebop.train.run import load_target

DRAFT = ROOT / "tiny_model" / "draft"
NUM_STEPS, NEW_TOKENS = BEBOP["num_speculative_tokens"], 64


def _prompts():
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    for domain in ("code", "prose", "math", "agent"):
        lines = (ROOT / "tiny_model" / "held_out" / f"{domain}.jsonl").read_text().splitlines()[-20:]
        yield from (tokenizer(json.loads(line)["text"])["input_ids"][:32] for line in lines)


@pytest.fixture(scope="module")
def served():
    """Texts of prompt and continuation, rounds, and accepted drafts by position."""
    from vllm import SamplingParams

    prompts = list(_prompts())
    params = SamplingParams(temperature=1.0, max_tokens=NEW_TOKENS, seed=1, ignore_eos=True)
    with engine(BEBOP | {"model": str(DRAFT)}, max_num_seqs=80, max_model_len=128) as llm:
        outputs = token_ids(llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False))
        return list(zip(prompts, outputs, strict=True)), *accepted_per_position(llm)


def _predicted(served, head_directory):
    target = load_target(TINY_MODEL, torch.device("cpu"))
    texts = [Text([*prompt, *output], [False] * len(prompt) + [True] * len(output)) for prompt, output in served[0]]
    head = load_head(head_directory, target)
    return evaluate(target, head, {"all": texts}, NUM_STEPS, SamplingPolicy())["all"]["accepted_at_least"]


def _differences(served, predicted):
    """Counted minus predicted chance to accept at least 1, 2, ... drafts, in standard errors of both."""
    _, rounds, accepted = served
    for count, mean, (low, high) in zip(accepted, *predicted["rejection_sampling"].values(), strict=True):
        share = count / rounds
        yield (share - mean) / math.hypot((high - low) / 3.92, math.sqrt(share * (1 - share) / rounds))


def test_evaluate_predicts_what_the_engine_accepts(served):
    assert all(abs(difference) < 3.5 for difference in _differences(served, _predicted(served, DRAFT)))


def test_the_prediction_for_another_head_is_told_apart(served):
    """The fault: the engine serves another head than the one evaluated."""
    assert max(abs(difference) for difference in _differences(served, _predicted(served, TINY_MODEL))) > 6
