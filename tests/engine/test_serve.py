"""`vllm serve` with method bebop, over HTTP: what a user sees. One server for the file; the last test kills it."""

import os
import signal
import time
from collections import Counter

import openai
import psutil
import pytest
import torch

from tests.support import target
from tests.support.engines import BEBOP, TINY_MODEL
from tests.support.statistics import HONEST_P_VALUE, g_test
from vllm_bebop.bench.conditions import on_cpu
from vllm_bebop.bench.server import Server, wait_until_ready

PROMPT = "   +-----------+"
ARGUMENTS = ("--max-model-len", "512", "--max-num-seqs", "128", "--logprobs-mode", "processed_logprobs")
ARGUMENTS += ("--dtype", "float32", *(() if on_cpu() else ("--gpu-memory-utilization", "0.2")))


@pytest.fixture(scope="module")
def server():
    with Server(TINY_MODEL, BEBOP, arguments=ARGUMENTS) as server:
        wait_until_ready([server])
        yield server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", timeout=300)


def _complete(client, **options):
    options = {"prompt": PROMPT, "max_tokens": 24, "temperature": 1.0} | options
    return client.completions.create(model=str(TINY_MODEL), **options)


def test_first_token_follows_the_target(client):
    """400 choices of each of 4 requests: the law of token 1 and of token 2 given the likeliest token 1."""
    choices = []
    for seed in range(4):
        answer = _complete(client, n=400, max_tokens=2, seed=1000 * seed, logprobs=0, extra_body={"ignore_eos": True})
        choices += [tuple(choice.logprobs.tokens) for choice in answer.choices]
    tokenizer = _tokenizer()
    prompt = tokenizer.encode(PROMPT)
    p = target.filtered(target.next_logits(TINY_MODEL, [prompt]))[0]
    _assert_law([first for first, _ in choices], p, tokenizer)
    likeliest = int(p.argmax())
    text = tokenizer.decode([likeliest])
    assert [tokenizer.decode([token]) for token in range(len(p))].count(text) == 1  # else two laws would be mixed
    p2 = target.filtered(target.next_logits(TINY_MODEL, [[*prompt, likeliest]]))[0]
    _assert_law([second for first, second in choices if first == text], p2, tokenizer)


def _assert_law(texts, probabilities, tokenizer):
    """Tokens come back as text, in which several ids may look alike: the law is that of the texts.

    A token that is part of a character has no text of its own, which vLLM writes as nothing.
    """
    law = Counter()
    for token, probability in enumerate(probabilities.tolist()):
        law[tokenizer.decode([token]).rstrip("\ufffd")] += probability
    counts = Counter(text.rstrip("\ufffd") for text in texts)
    assert set(counts) <= set(law)
    assert g_test([counts[text] for text in law], list(law.values())) > HONEST_P_VALUE
    shifted = torch.tensor(list(law.values())).roll(1)  # the planted fault: another law
    assert g_test([counts[text] for text in law], shifted.clamp(min=1e-9)) < 1e-6


def _tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_MODEL)


def test_returned_logprobs_are_the_targets(client):
    answer = _complete(client, temperature=0.8, logprobs=1, extra_body={"return_token_ids": True, "ignore_eos": True})
    choice = answer.choices[0]
    tokens, prompt = choice.token_ids, _tokenizer().encode(PROMPT)
    exact = (target.all_logits(TINY_MODEL, [*prompt, *tokens]) / 0.8).log_softmax(-1)
    for i, (token, returned) in enumerate(zip(tokens, choice.logprobs.token_logprobs, strict=True)):
        assert returned == pytest.approx(float(exact[len(prompt) + i - 1, token]), abs=1e-3)


def test_chat_stream_and_seed(client):
    messages = [{"role": "user", "content": "What is 3 + 4?"}]

    def stream():
        parts = client.chat.completions.create(
            model=str(TINY_MODEL), messages=messages, max_tokens=24, seed=9, temperature=1.0, stream=True
        )
        return "".join(part.choices[0].delta.content or "" for part in parts if part.choices)

    assert stream() == stream() != ""


def test_counters_say_what_was_accepted(server, client):
    before = server.metrics()
    _complete(client, max_tokens=200, extra_body={"ignore_eos": True})
    after = server.metrics()
    rounds = after.num_drafts - before.num_drafts
    accepted = after.num_accepted_tokens - before.num_accepted_tokens
    assert rounds > 0
    assert rounds + accepted in range(199, 204)  # every round outputs one token besides those accepted


def test_refused_request_does_not_hurt_the_server(client):
    with pytest.raises(openai.BadRequestError, match="speculative decoding"):
        _complete(client, extra_body={"min_p": 0.2})
    assert _complete(client, max_tokens=4).choices[0].text


def test_killed_server_leaves_no_process(server):
    """Killed outright, it cannot clean up after itself; its engine must notice and go."""
    children = psutil.Process(server._process.pid).children(recursive=True)
    assert children
    os.kill(server._process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while alive := [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, f"still alive: {alive}"
        time.sleep(0.5)
