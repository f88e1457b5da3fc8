"""The fused sampler equals the reference token for token, whatever the batch around a request, and follows q."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.kernel_races import count_mismatches, on_spoiled_scratch
from tests.support.kernels import (
    DEVICE,
    INF,
    NAN,
    RUNS_HERE,
    assert_bitwise_equal,
    assert_no_less_accurate,
    plants_faults,
    repeats_on_a_gpu,
    run_on_the_cpu,
    runs_kernels,
    smallest_margin,
)
from tests.support.sampling import arguments, poisoned, sample
from tests.support.statistics import assert_fault_is_caught, assert_law, g_test
from vllm_bebop.kernels.arguments import check_current
from vllm_bebop.kernels.philox import Stream
from vllm_bebop.kernels.reference import sample_reference

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # log(0) in the interpreter


VOCABULARIES = [1, 63, 100, 513, 8192 + 17, 151_936]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("how", ["interpreted", "emulated"])
def test_on_the_cpu(how: str) -> None:
    run_on_the_cpu(__file__, how)


test_on_the_cpu.__test__ = not RUNS_HERE


def assert_equals_reference(values: dict[str, Tensor], **options) -> None:
    ours = sample(*values.values(), **options)
    eager = sample_reference(**values, **options)
    exact = sample_reference(**values, **options, dtype=torch.float64)
    for request in (ours.token_ids != eager.token_ids).nonzero().flatten().tolist():
        one = {name: value[request : request + 1] for name, value in values.items()}
        assert smallest_margin(lambda one=one: sample_reference(**one, **options)) < 1e-5
    same = ours.token_ids == exact.token_ids
    assert same.float().mean() > 0.9
    assert_no_less_accurate(ours.logsumexp, eager.logsumexp, exact.logsumexp)
    assert_no_less_accurate(ours.log_prob[same], eager.log_prob[same], exact.log_prob[same])
    assert_no_less_accurate(ours.entropy_nats, eager.entropy_nats, exact.entropy_nats)
    assert torch.equal(ours.num_nan, eager.num_nan) and torch.equal(ours.is_empty, eager.is_empty)
    visible = values["logits"].masked_fill(values["logits"].isnan(), -INF)
    assert torch.equal(ours.argmax_ids, visible.argmax(dim=1)) and torch.equal(eager.argmax_ids, ours.argmax_ids)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_sample_equals_reference(vocab_size: int, dtype: torch.dtype) -> None:
    assert_equals_reference(arguments(64 if vocab_size < 10_000 else 4, vocab_size, dtype))


@runs_kernels
@pytest.mark.parametrize("streams", [(Stream.TARGET_BLOCK, Stream.TARGET_TOKEN)])
def test_sample_equals_reference_on_other_streams(streams) -> None:
    assert_equals_reference(arguments(64, 700), streams=streams)


@runs_kernels
@pytest.mark.parametrize("vocab_size", [100, 8192 + 17])
def test_sample_equals_reference_on_ties(vocab_size: int) -> None:
    values = arguments(32, vocab_size)
    values["logits"] = values["logits"].div(4).round()  # every value in the row many times, the largest too
    assert_equals_reference(values)


@runs_kernels
def test_sample_reads_rows_at_any_stride() -> None:
    values = arguments(32, 3000)
    values["logits"] = values["logits"].view(16, 6000)[:, 7:1307]
    values = {name: value[:16] for name, value in values.items()}
    assert not values["logits"].is_contiguous()
    assert_equals_reference(values)
    expanded = values | {"logits": values["logits"][:1].expand(16, -1)}
    assert_equals_reference(expanded)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_edge_cases(dtype: torch.dtype) -> None:
    values = arguments(32, 1100, dtype)
    logits = values["logits"]
    logits[0:4] = -INF  # empty: token 0
    logits[4:8] = NAN
    logits[8:12, ::3] = NAN
    logits[12:16, 700] = INF  # certain
    logits[16:20, :1024] = -INF  # whole sub-blocks are impossible
    logits[20:24] = -INF
    logits[20:24, 1099] = -3.0
    assert_equals_reference(values)
    out = sample(*values.values())
    assert out.token_ids[:8].tolist() == [0] * 8 and out.is_empty[:8].all() and not out.is_empty[8:].any()
    assert out.token_ids[12:16].tolist() == [700] * 4 and out.token_ids[20:24].tolist() == [1099] * 4
    assert out.num_nan[4:12].tolist() == [1100] * 4 + [367] * 4


@runs_kernels
def test_sample_of_nothing() -> None:
    out = sample(*arguments(0, 100).values())
    assert all(getattr(out, field.name).shape == (0,) for field in dataclasses.fields(out))


@runs_kernels
def test_sample_reuses_a_workspace() -> None:
    workspace = poisoned(40, 8192 + 17)
    for batch in (24, 40, 3):
        values = arguments(batch, 8192 + 17, seed=batch)
        reused = sample(*values.values(), workspace=workspace)
        assert reused.token_ids.data_ptr() == workspace.token_ids.data_ptr()
        assert not workspace.tickets.any()
        assert_bitwise_equal(reused, sample(*values.values()))


@repeats_on_a_gpu
def test_sample_in_a_graph_has_no_races() -> None:
    values = arguments(64, 151_936, torch.bfloat16)
    workspace = poisoned(64, 151_936)
    run = on_spoiled_scratch(lambda: sample(*values.values(), workspace=workspace), [workspace])
    assert count_mismatches(run, run(), 20_000) == 0


@runs_kernels
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
@pytest.mark.parametrize("vocab_size", [100, 8192 + 24])
def test_sample_by_slot(vocab_size: int, integers: torch.dtype) -> None:
    """Temperature and seeds come from the slot, the caches go there, and a padding row leaves everything alone."""
    values = arguments(6, vocab_size, torch.bfloat16)
    slots = torch.tensor([7, 2, -1, 0, 5, -1], dtype=integers, device=DEVICE)
    of_slots = arguments(9, vocab_size, seed=1)
    cache = torch.full((10, 3, vocab_size), NAN, dtype=torch.bfloat16, device=DEVICE)  # with a spare row
    cache_logsumexp = torch.full((10, 3), NAN, device=DEVICE)
    cache_argmax, cache_token_ids, cache_positions = torch.full((3, 10, 3), -7, device=DEVICE)
    positions = values["positions"].to(integers)
    out = sample(
        values["logits"],
        of_slots["temperature"],
        of_slots["seeds"],
        positions,
        slots=slots,
        cache=cache,
        cache_logsumexp=cache_logsumexp,
        cache_argmax=cache_argmax,
        cache_token_ids=cache_token_ids,
        cache_positions=cache_positions,
        step=torch.tensor(1, dtype=integers, device=DEVICE),
    )
    real = (slots >= 0).nonzero().flatten()
    index = slots[real].long()
    offset = sample(*list(values.values())[:3], values["positions"] - 2, position_offset=2)
    assert_bitwise_equal(offset, sample(*values.values()))
    direct = sample(values["logits"][real], of_slots["temperature"][index], of_slots["seeds"][index], positions[real])
    assert_bitwise_equal(type(out)(**{f.name: getattr(out, f.name)[real] for f in dataclasses.fields(out)}), direct)
    assert out.token_ids[slots < 0].tolist() == [0, 0] and out.is_empty[slots < 0].all()
    written = torch.zeros(10, 3, dtype=torch.bool, device=DEVICE)
    written[index, 1] = True
    assert torch.equal(cache[index, 1], values["logits"][real]) and cache[~written].isnan().all()
    assert torch.equal(cache_logsumexp[index, 1], direct.logsumexp) and cache_logsumexp[~written].isnan().all()
    kept = (cache_argmax, direct.argmax_ids), (cache_token_ids, direct.token_ids), (cache_positions, positions[real])
    for cached, expected in kept:
        assert torch.equal(cached[index, 1], expected.long()) and (cached[~written] == -7).all()


@runs_kernels
def test_sample_past_the_cache_is_greedy() -> None:
    """Slots without a row in the caches; the same from the fallback."""
    from vllm_bebop.kernels import fallback

    values = arguments(8, 700)
    values["temperature"] = torch.full((8,), 1.3, device=DEVICE)
    slots = torch.tensor([3, 7, 0, 5, -1, 4, 6, 1], device=DEVICE)
    step = torch.tensor(1, device=DEVICE)
    outputs = []
    for run in (sample, fallback.sample):
        cache = torch.full((4, 2, 700), NAN, device=DEVICE)
        kept = {"cache_logsumexp": torch.full((4, 2), NAN, device=DEVICE)}
        drawn = torch.full((2, 4, 2), -7, device=DEVICE)
        kept |= {"cache_token_ids": drawn[0], "cache_positions": drawn[1]}
        out = run(*values.values(), slots=slots, cache=cache, step=step, **kept)
        real, cached = slots >= 0, (slots >= 0) & (slots < 4)
        direct = sample_reference(
            values["logits"], values["temperature"][slots].where(cached, 0.0), values["seeds"][slots],
            values["positions"],
        )  # fmt: skip
        assert torch.equal(out.token_ids[real], direct.token_ids[real]) and out.token_ids[~real].tolist() == [0]
        assert torch.equal(out.token_ids[real & ~cached], values["logits"].argmax(1)[real & ~cached])
        assert torch.equal(cache[slots[cached], 1], values["logits"][cached])
        assert cache[:, 0].isnan().all() and cache[2].isnan().all()
        assert torch.equal(drawn[0, slots[cached], 1], out.token_ids[cached])
        assert torch.equal(drawn[1, slots[cached], 1], values["positions"][cached].long())
        assert (drawn[:, :, 0] == -7).all() and (drawn[:, 2] == -7).all()
        outputs.append(cache.nan_to_num())
        if run is sample:
            assert kept["cache_logsumexp"].isnan().tolist() == [[True, False]] * 2 + [[True, True], [True, False]]
    assert torch.equal(*outputs)


@runs_kernels
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("logits", torch.zeros(4)),
        ("logits", torch.zeros(4, 100, dtype=torch.float64)),
        ("logits", torch.zeros(4, 100, dtype=torch.int64)),
        ("logits", torch.zeros(4, 0)),
        ("logits", torch.zeros(100, 4).t()),
        ("temperature", torch.zeros(3)),
        ("temperature", torch.zeros(4, dtype=torch.float64)),
        ("seeds", torch.zeros(4, dtype=torch.int32)),
        ("positions", torch.zeros(4)),
        ("slots", torch.zeros(3, dtype=torch.int64)),
        ("ids", torch.zeros(4, 99, dtype=torch.int32)),
        ("ids", torch.zeros(4, 100, dtype=torch.int64)),
        ("cache", torch.zeros(4, 2, 100)),
        ("cache_logsumexp", torch.zeros(4, 2)),
        ("workspace", (2, 100)),
        ("workspace", (4, 101)),
    ],
)
def test_sample_names_the_wrong_argument(name: str, wrong) -> None:
    from vllm_bebop.kernels import draft_sampling

    wrong = poisoned(*wrong) if isinstance(wrong, tuple) else wrong.to(DEVICE)
    with pytest.raises(ValueError, match=name):
        draft_sampling.sample(**arguments(4, 100) | {name: wrong})


def test_logits_on_another_gpu_than_the_current_one_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    check_current("logits", torch.device("cuda", 0))
    with pytest.raises(ValueError, match=r"logits is on cuda:1, .* torch.cuda.set_device\(1\)"):
        check_current("logits", torch.device("cuda", 1))


LAW_LOGITS = torch.randn(1100, generator=torch.Generator().manual_seed(2)) * 2  # three sub-blocks


def counts(num_samples: int, first_seed: int) -> np.ndarray:
    seeds = torch.arange(first_seed, first_seed + num_samples, device=DEVICE)
    logits = LAW_LOGITS.to(DEVICE).expand(num_samples, -1)
    temperature = torch.full((num_samples,), 0.7, device=DEVICE)
    out = sample(logits, temperature, seeds, torch.full_like(seeds, 100))
    return out.token_ids.bincount(minlength=1100).cpu().numpy()


LAW = (LAW_LOGITS.double() / 0.7).softmax(0).numpy()


@runs_kernels
def test_sample_law() -> None:
    assert_law(counts, LAW, 6_000)


@plants_faults
def test_planted_fault_is_caught(monkeypatch) -> None:
    """Sub-blocks are picked with equal probability."""
    import triton.language as tl

    from vllm_bebop.kernels import draft_kernel

    add_gumbel = draft_kernel.add_gumbel

    def planted(scores, seed, position, stream, *others):
        is_block = int(stream) == Stream.DRAFT_BLOCK
        return add_gumbel(tl.minimum(scores, 0.0) if is_block else scores, seed, position, stream, *others)

    monkeypatch.setattr(draft_kernel, "add_gumbel", planted)
    assert_fault_is_caught(lambda n, first: {"law": g_test(counts(n, first), LAW)}, 3_000)
