"""What differs between ranks: seeds drawn by data-parallel replicas, and pipeline ranks that sample nothing."""

from types import SimpleNamespace

import numpy as np
import pytest
from vllm import SamplingParams

from vllm_bebop.config import BebopConfig, BebopConfigError
from vllm_bebop.engine import runner_v1, runner_v2
from vllm_bebop.engine.seeding import seed_source


def _runner(data_parallel_index, seed=0):
    return SimpleNamespace(
        model_config=SimpleNamespace(seed=seed),
        parallel_config=SimpleNamespace(data_parallel_index=data_parallel_index),
    )


def test_seed_source_differs_between_replicas_only():
    draws = [tuple(seed_source(_runner(*args)).integers(2**63, size=4)) for args in ((0, 7), (0, 7), (1, 7), (0, 8))]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3


class _SamplingStates:
    """Of vLLM's, what `_add_request` reads. Draws the same seed on every replica, as 0.31 does."""

    vocab_size = 8
    bebop = SimpleNamespace(cache=None)
    bebop_returns_mask = False

    def __init__(self):
        values = {"temperature": 1.0, "top_k": 8, "top_p": 1.0, "min_p": 0.0}
        for name, value in values.items():
            setattr(self, name, SimpleNamespace(np=np.full(2, value)))
        self.seeds = SimpleNamespace(np=np.zeros(2, dtype=np.int64))

    def add_request(self, req_idx, sampling_params):
        self.seeds.np[req_idx] = 5 if sampling_params.seed is None else sampling_params.seed

    def max_num_logprobs(self, slots):
        return -1


@pytest.mark.parametrize(("seed", "num_distinct"), [(None, 2), (11, 1)])
def test_add_request_draws_another_seed_on_every_replica(seed, num_distinct):
    seeds = set()
    for index in range(2):
        states = type("Replaced", (_SamplingStates,), {})()
        states.bebop_seeds = seed_source(_runner(index))
        runner_v2._add_request(states, {"req_idx": 1, "sampling_params": SamplingParams(seed=seed)})
        seeds.add(int(states.seeds.np[1]))
    assert len(seeds) == num_distinct and seeds != {5}
    assert seed is None or seeds == {seed}


@pytest.mark.parametrize(("returns_mask", "top_k"), [(False, 3), (True, 8), (True, 3)])
def test_add_request_leaves_filters_to_vllm_where_it_returns_what_they_keep(returns_mask, top_k):
    states = type("Replaced", (_SamplingStates,), {"bebop_returns_mask": returns_mask})()
    states.bebop_seeds = seed_source(_runner(0))
    states.top_k.np[1] = top_k
    is_left = runner_v2._add_request(states, {"req_idx": 1, "sampling_params": SamplingParams(seed=1)})
    assert is_left == (returns_mask and top_k == 3)


class _IdleReplicaDrafts:
    """A speculator of vLLM before 0.32, whose steps without requests draft for the first slots."""

    def _copy_request_inputs(self, num_reqs, idx_mapping, temperature, seeds):
        raise AssertionError


def test_replicas_that_draft_while_idle_are_refused():
    runner = SimpleNamespace(
        speculator=_IdleReplicaDrafts(), parallel_config=SimpleNamespace(data_parallel_size=2), drafter=None
    )
    with pytest.raises(BebopConfigError, match="data-parallel replica idles: use vLLM 0.32"):
        runner_v2.upgrade_drafting(runner, BebopConfig())


@pytest.mark.parametrize("upgrade", [runner_v1.upgrade_drafting, runner_v1.upgrade_sampling])
def test_pipeline_rank_without_a_head_is_left_alone(upgrade):
    """vLLM builds drafter and rejection sampler on the last rank only."""
    runner = SimpleNamespace(sampler=object())
    upgrade(runner, BebopConfig())
    assert type(runner.sampler) is object
