"""Sampling under a grammar with a head that suits it badly.

Half of its drafts break the grammar, and the others are one token that the target is less fond of. The grammar allows
the same tokens at each of the first four steps.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tests.support import laws, target
from tests.support.engines import TINY_MODEL, runner

TEMPERATURE = 1.5
_CHARACTERS, _LENGTH = "-+| ", 100


def allowed_tokens(llm: Any) -> list[int]:
    """The ids that the grammar allows while there is room for them."""
    tokenizer = llm.get_tokenizer()
    texts = {i: tokenizer.decode([i], skip_special_tokens=True) for i in range(len(tokenizer))}
    allowed = [i for i, text in texts.items() if text and set(text) <= set(_CHARACTERS)]
    assert max(len(texts[i]) for i in allowed) * 4 <= _LENGTH
    return allowed


@contextmanager
def unsuited_head(llm: Any, prompt: list[int]) -> Iterator[None]:
    allowed, head = allowed_tokens(llm), runner(llm).drafter.model
    honest, favourite = head.compute_logits, int(target.next_logits(TINY_MODEL, [prompt])[0, allowed].argmax())

    def compute_logits(*args: Any, **kwargs: Any) -> Any:
        logits = honest(*args, **kwargs)
        logits[:, allowed[favourite]] = logits.logsumexp(-1)
        return logits

    head.compute_logits = compute_logits
    yield
    del head.compute_logits


def sample(llm: Any, prompt: Sequence[int], num_samples: int, first_seed: int, **params: Any) -> list[tuple[int, ...]]:
    """As `laws.sample`."""
    from vllm.sampling_params import StructuredOutputsParams

    grammar = StructuredOutputsParams(regex=f"[{_CHARACTERS}]{{{_LENGTH},{_LENGTH + 20}}}")
    return laws.sample(
        llm, prompt, num_samples, first_seed, **{"temperature": TEMPERATURE, "structured_outputs": grammar} | params
    )
