"""What a request gets does not depend on how the work is cut: not on its neighbours, nor on what a program reads."""

import dataclasses

import pytest
import torch
import triton

from tests.support.kernels import (
    DEVICE,
    INF,
    INTERPRETED,
    NAN,
    RUNS_HERE,
    assert_bitwise_equal,
    run_on_the_cpu,
    runs_kernels,
)
from tests.support.requests import select_output
from tests.support.sampling import arguments, sample
from tests.support.verification import case, choose_filters, in_every_form, select, verify, with_draft_statistics
from vllm_bebop.kernels import reference
from vllm_bebop.kernels.filters import Filters


@pytest.mark.timeout(1200)  # compiles many kernels
@pytest.mark.parametrize("how", ["interpreted", "emulated"])
def test_on_the_cpu(how: str) -> None:
    run_on_the_cpu(__file__, how)


test_on_the_cpu.__test__ = not RUNS_HERE


@runs_kernels
def test_sample_does_not_depend_on_the_batch(monkeypatch) -> None:
    from vllm_bebop.kernels import launch

    values = arguments(12, 8192 + 600, torch.bfloat16)
    out = sample(*values.values())
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    permuted = sample(*(value[order] for value in values.values()))
    expected = {field.name: getattr(out, field.name)[order] for field in dataclasses.fields(out)}
    assert_bitwise_equal(permuted, type(out)(**expected))
    part = sample(*(value[5:8] for value in values.values()))
    assert_bitwise_equal(part, type(out)(**{name: getattr(out, name)[5:8] for name in expected}))
    monkeypatch.setattr(launch, "INTERPRETER_ELEMENTS", 1)  # one request per program
    assert_bitwise_equal(sample(*values.values()), out)


FOUR_TILES = 3 * 8192 + 600


def with_care(rows: torch.Tensor) -> torch.Tensor:
    """In some rows numbers that the plain pass cannot take, each in another tile."""
    for row, (token, logit) in enumerate([(5, NAN), (9_000, INF), (17_000, 3e30), (24_600, NAN)]):
        rows[row, token] = logit
    return rows


@runs_kernels
def test_sample_does_not_depend_on_how_many_tiles_a_program_reads(monkeypatch) -> None:
    from vllm_bebop.kernels import draft_sampling, launch

    values = arguments(6, FOUR_TILES, torch.bfloat16)
    with_care(values["logits"])
    caches = []
    for at_once, tiles in ((launch.SAMPLING_AT_ONCE, 1), (12, 2), (1, 4)):
        monkeypatch.setattr(draft_sampling, "SAMPLING_AT_ONCE", at_once)
        assert launch.tiles_per_program(4, 6, at_once) == tiles
        caches.append(torch.full((6, 1, FOUR_TILES), NAN, dtype=torch.bfloat16, device=DEVICE))
        out = sample(*values.values(), cache=caches[-1], step=torch.tensor(0, device=DEVICE))
        if tiles == 1:
            expected = out
        assert_bitwise_equal(out, expected)
        torch.testing.assert_close(caches[-1][:, 0], values["logits"], rtol=0, atol=0, equal_nan=True)


@runs_kernels
@in_every_form
def test_verify_does_not_depend_on_the_batch(monkeypatch, form: dict) -> None:
    from vllm_bebop.kernels import launch

    values = with_draft_statistics(case(8, 2, 700, torch.bfloat16))
    out = verify(**values, **form)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1)).tolist()
    assert_bitwise_equal(verify(**select(values, order), **form), select_output(out, order))
    part = list(range(3, 6))
    assert_bitwise_equal(verify(**select(values, part), **form), select_output(out, part))
    monkeypatch.setattr(launch, "INTERPRETER_ELEMENTS", 1)  # one request per program, so that programs exit early
    assert_bitwise_equal(verify(**values, **form), out)


@runs_kernels
@in_every_form
@pytest.mark.parametrize("what", ["draft rows too", "draft statistics kept", "a grammar"])
def test_verify_does_not_depend_on_how_many_tiles_a_program_reads(monkeypatch, form: dict, what: str) -> None:
    from vllm_bebop.kernels import launch, verification

    values = case(8 if what == "a grammar" else 4, 1, FOUR_TILES, torch.bfloat16)
    with_care(values["target_logits"])
    if what != "draft rows too":
        values = with_draft_statistics(values)
    if what == "a grammar":
        values = choose_filters(values, ["bitmask"])
    expected = verify(**values, **form)
    num_rows = 2 * len(values["seeds"])
    for at_once, tiles in ((2 * num_rows, 2), (1, 4)):
        monkeypatch.setattr(verification, "VERIFYING_AT_ONCE", at_once)
        assert launch.tiles_per_program(4, num_rows, at_once) == tiles
        assert_bitwise_equal(verify(**values, **form), expected)


@runs_kernels
@pytest.mark.parametrize(("batch", "vocab_size", "least"), [(140, 100, 40), (12, 8192 + 17, 4)])
def test_verify_does_not_depend_on_how_many_programs_draw_from_residuals(
    monkeypatch, batch: int, vocab_size: int, least: int
) -> None:
    """All who were rejected wait for them: more than a program looks at together, and rows of several tiles."""
    from vllm_bebop.kernels import launch, verification

    monkeypatch.setattr(reference, "NUM_THINNING_ROUNDS", 0)
    if vocab_size > 100:  # one request per program, which for so many would take the interpreter a minute
        monkeypatch.setattr(launch, "INTERPRETER_ELEMENTS", 1)
    values = with_draft_statistics(case(batch, 2, vocab_size))
    expected = verify(**values)
    assert (expected.num_accepted < values["num_draft_tokens"]).sum() > least
    for programs in (1, 7):
        monkeypatch.setattr(verification, "RESIDUAL_PROGRAMS", programs)
        assert_bitwise_equal(verify(**values), expected)


@runs_kernels
@pytest.mark.parametrize("block", [False, True])
def test_verify_does_not_depend_on_filters_of_others(block: bool) -> None:
    """A neighbour's top-k and top-p change neither a token nor the last bit of a statistic."""
    vocab_size = 8192 + 17 if INTERPRETED else 151_936  # which takes the interpreter a minute
    values = with_draft_statistics(case(9, 2, vocab_size, torch.bfloat16))
    asks = torch.arange(9, device=DEVICE) % 3 == 0
    filters = Filters(top_k=asks.int() * 50, top_p=torch.where(asks, 0.8, 1.0))
    others = (~asks).nonzero().flatten()
    filtered, plain = verify(**values, filters=filters, block=block), verify(**values, block=block)
    assert_bitwise_equal(select_output(filtered, others), select_output(plain, others))
    assert (filtered.target_entropy_nats[asks, 0] < plain.target_entropy_nats[asks, 0]).any()


@runs_kernels
@in_every_form
@pytest.mark.skipif(triton.__version__.startswith("3.6."), reason="lays out the pass otherwise if there is a bitmask")
def test_verify_does_not_depend_on_whether_there_is_a_grammar(form: dict) -> None:
    """A bitmask that allows everything changes neither a token nor the last bit of a statistic."""
    values = with_draft_statistics(case(6, 2, 151_936, torch.bfloat16))
    num_rows, vocab_size = values["target_logits"].shape
    everything = torch.full((num_rows, -(-vocab_size // 32)), -1, dtype=torch.int32, device=DEVICE)
    assert_bitwise_equal(verify(**values, bitmask=everything, **form), verify(**values, **form))
