"""The draft cache of model runner V2: its size is logged, its limit is kept, and its slots are handed out first."""

import logging

import pytest
import torch

from vllm_bebop.config import BebopConfigError, translate
from vllm_bebop.engine.draft_cache import LowestFirst, allocate

SIZE = (64, 3, 1000, torch.bfloat16, torch.device("cpu"))
REQUEST_GIB = 3 * 1000 * 2 / 2**30
ASKED = {"method": "bebop", "num_speculative_tokens": 3}


def test_allocate_logs_the_size_of_a_cache_for_every_request(caplog):
    with caplog.at_level(logging.INFO, "vllm.bebop"):
        cache = allocate(*SIZE, limit_gib=None)
    assert cache.logits.shape == (64, 3, 1000) and cache.logits.dtype == torch.bfloat16
    assert cache.logsumexp.shape == cache.argmax.shape == (64, 3)
    assert "64 requests x 3 steps x 1000 logits x 2 bytes = 0.00 GiB" in caplog.text
    assert "one-hot" not in caplog.text


def test_allocate_of_candidates_keeps_ids_too(caplog):
    with caplog.at_level(logging.INFO, "vllm.bebop"):
        cache = allocate(64, 3, 151_936, torch.bfloat16, torch.device("cpu"), None, candidates_only=True)
    assert cache.logits.shape == cache.ids.shape == (64, 3, 600)
    assert "64 requests x 3 steps x 600 logits x 6 bytes" in caplog.text


def test_allocate_keeps_the_limit_and_says_who_goes_without(caplog):
    with caplog.at_level(logging.INFO, "vllm.bebop"):
        cache = allocate(*SIZE, limit_gib=10.5 * REQUEST_GIB)
    assert cache.logits.shape == (10, 3, 1000)
    assert "lets 10 of 64 concurrent requests speculate probabilistically" in caplog.text


def test_allocate_ignores_a_limit_that_is_not_reached(caplog):
    with caplog.at_level(logging.INFO, "vllm.bebop"):
        assert allocate(*SIZE, limit_gib=65 * REQUEST_GIB).logits.shape[0] == 64
    assert "draft_cache_gib" not in caplog.text


def test_allocate_refuses_a_limit_below_one_request():
    with pytest.raises(BebopConfigError, match="'draft_cache_gib'.*holds no request.*target_only"):
        allocate(*SIZE, limit_gib=0.9 * REQUEST_GIB)


def test_lowest_first_hands_out_the_lowest_free_slot():
    free = LowestFirst(range(4))
    assert [free.pop(), free.pop(), free.pop()] == [0, 1, 2]
    free.append(1)
    assert [free.pop(), free.pop()] == [1, 3] and len(free) == 0


def test_translate_passes_the_limit_on():
    translation = translate(ASKED | {"draft_cache_gib": 2}, {})
    assert translation.config.draft_cache_gib == 2.0
    assert "draft_cache_gib" not in translation.speculative_config
    by_environment = translate(
        {"method": "mtp", "num_speculative_tokens": 3}, {"VLLM_BEBOP": "1", "VLLM_BEBOP_DRAFT_CACHE_GIB": "2"}
    )
    assert by_environment == translation


@pytest.mark.parametrize(
    ("change", "environ", "message"),
    [
        ({"draft_cache_gib": 0}, {}, "'draft_cache_gib': 0 must be a finite number above 0"),
        ({"draft_cache_gib": "2"}, {}, "'draft_cache_gib': '2' must be"),
        ({"draft_cache_gib": True}, {}, "'draft_cache_gib': True must be"),
        ({"draft_cache_gib": float("nan")}, {}, "'draft_cache_gib': nan must be"),
        ({"draft_cache_gib": 1, "acceptance": "target_only"}, {}, "'draft_cache_gib' has no meaning with"),
        (
            {"method": "mtp"},
            {"VLLM_BEBOP": "1", "VLLM_BEBOP_DRAFT_CACHE_GIB": "two"},
            "VLLM_BEBOP_DRAFT_CACHE_GIB='two' must be a number",
        ),
    ],
)
def test_translate_refuses_a_wrong_limit(change, environ, message):
    with pytest.raises(BebopConfigError, match=message):
        translate(ASKED | change, environ)


def test_start_forgets_the_drafts_of_the_request_before():
    cache = allocate(2, 3, 10, torch.float32, torch.device("cpu"), limit_gib=None)
    cache.drawn.positions.fill_(20)
    cache.start(1, True)
    cache.start(2, True)  # past the cache: nothing to forget
    assert cache.drawn.positions.tolist() == [[20, 20, 20], [-1, -1, -1]]
    assert cache.drawn.has_grammar.tolist() == [False, True]
