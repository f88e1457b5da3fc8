"""What bebop keeps of model runner V1's requests: seeds of either sign, drafts of those that wait, real positions."""

from types import SimpleNamespace

import pytest
import torch

from vllm_bebop.engine.v1_requests import Q, V1Requests

NUM_STEPS, VOCAB_SIZE = 3, 50


def requests_of(**with_grammar: bool) -> V1Requests:
    """Requests by id, all in the batch, some with a grammar."""
    states = {
        id_: SimpleNamespace(
            sampling_params=SimpleNamespace(structured_outputs=object() if has_grammar else None),
            mrope_position_delta=None if id_ == "a" else -7,
        )
        for id_, has_grammar in with_grammar.items()
    }
    runner = SimpleNamespace(
        requests=states,
        input_batch=SimpleNamespace(req_ids=list(states), generators={}),
        device=torch.device("cpu"),
        model_config=SimpleNamespace(seed=0),
        parallel_config=SimpleNamespace(data_parallel_index=0),
    )
    return V1Requests(runner)


def q(batch: int) -> Q:
    logits = torch.randn(batch, NUM_STEPS, VOCAB_SIZE)
    return Q(logits, logits.amin(-1), logits.logsumexp(-1), logits.argmax(-1))


@pytest.mark.parametrize("seed", [0, 5, -5, 2**63 - 1, -(2**63)])
def test_seed_is_the_requests_own(seed: int) -> None:
    requests = requests_of(a=False)
    requests._runner.input_batch.generators[0] = torch.Generator().manual_seed(seed)
    assert requests.seeds(1).tolist() == [seed]
    assert requests._runner.input_batch.generators == {}
    assert requests.seeds(1).tolist() == [seed]


def test_waiting_request_keeps_its_draft_but_not_that_of_its_step() -> None:
    requests = requests_of(a=False, b=False, c=False)
    first, second = q(3), q(1)
    positions, tokens = torch.tensor([10, 20, 30]), torch.arange(9).view(3, 3)
    requests.remember(["a", "b", "c"], positions, tokens, first)
    del requests._runner.requests["c"]  # finished
    requests.remember(["a"], positions[:1] + 5, tokens[:1], second)
    requests._runner.input_batch.req_ids = ["b", "a"]
    waited, current = requests.take(2)
    assert waited.first_position == 20 and current.first_position == 15
    assert torch.equal(waited.q.logits, first.logits[1]) and torch.equal(current.q.logits, second.logits[0])
    assert waited.q.logits.untyped_storage().nbytes() == first.logits[1].nbytes
    assert requests._drafts == {}


def test_drafts_were_dropped_if_drawn_for_this_position_under_a_grammar() -> None:
    requests = requests_of(a=True, b=False, c=True, d=True, e=True)
    ids, tokens = ["a", "b", "c", "d"], torch.zeros(4, 3, dtype=torch.int64)
    requests.remember(ids, torch.tensor([10, 20, 30, 40]), tokens, q(4))
    requests.remember(["d"], torch.tensor([40]), tokens[:1], None)  # one-hot
    drafts = requests.take(5)
    dropped = requests.were_dropped(drafts, torch.tensor([10, 20, 31, 40, 50]))
    assert dropped.tolist() == [True, False, False, False, False]
    assert requests.were_dropped([None] * 5, torch.zeros(5)) is None


def test_mrope_deltas_are_those_of_the_batch() -> None:
    assert requests_of(a=False, b=False).mrope_deltas(2).tolist() == [0, -7]
    assert requests_of().mrope_deltas(2).tolist() == [0, 0]
