"""The fused losses err no more than eager code of the same dtype, forward and backward; and compile for our GPUs.

Runs on the GPU where there is one, elsewhere on the CPU in processes of their own, see
tests/support/kernels.py. The tests at the end only compile, as those of `test_kernels_compile`.
"""

import re
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from tests.support.kernels import DEVICE, EMULATED, INTERPRETED, RUNS_HERE, run_on_the_cpu, runs_kernels
from vllm_bebop.kernels import linear_statistics
from vllm_bebop.kernels.launch import compile_options
from vllm_bebop.kernels.loss_reference import statistics_reference, tv_loss_reference

triton = pytest.importorskip("triton")
from triton.compiler import ASTSource  # noqa: E402

from tests.test_kernels_compile import TARGETS, resources  # noqa: E402
from vllm_bebop.kernels import tv_loss as module  # noqa: E402
from vllm_bebop.kernels.tv_loss import tv_loss  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # log(0) in the interpreter

INF, NAN = float("inf"), float("nan")
VOCABULARIES = [1, 63, 100, 1000, 4096 + 17]  # the last one has more than one tile
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("how", ["interpreted", "emulated"])
def test_on_the_cpu(how: str) -> None:
    run_on_the_cpu(__file__, how)


test_on_the_cpu.__test__ = not RUNS_HERE


@pytest.fixture(autouse=True)
def poisoned():
    """Fills new tensors with NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def random_logits(num_rows: int, vocab_size: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = 3 * torch.randn(num_rows, vocab_size, generator=generator)
    draft = target + torch.randn(num_rows, vocab_size, generator=generator)
    return draft.to(dtype).to(DEVICE), target.to(dtype).to(DEVICE)


def loss_and_gradient(function, draft: Tensor, target: Tensor, upstream: Tensor, **options) -> tuple[Tensor, Tensor]:
    draft = draft.detach().requires_grad_()
    loss = function(draft, target, **options)
    (gradient,) = torch.autograd.grad(loss, draft, upstream.to(loss.dtype))
    return loss.detach(), gradient


def assert_errs_no_more_than_eager(draft: Tensor, target: Tensor, temperature: float = 1.0) -> None:
    """Against fp64: the kernel's error is at most that of eager code, plus roundings of the result and of 1 / T."""
    upstream = torch.linspace(-1, 2, len(draft), device=draft.device)
    exact = loss_and_gradient(
        tv_loss_reference, draft.double(), target.double(), upstream, temperature=temperature, dtype=torch.float64
    )
    eager = loss_and_gradient(tv_loss_reference, draft, target, upstream, temperature=temperature)
    fused = loss_and_gradient(tv_loss, draft, target, upstream, temperature=temperature)
    assert fused[0].dtype == torch.float32 and fused[1].dtype == draft.dtype
    assert fused[0].shape == draft.shape[:1] and fused[1].shape == draft.shape
    for ours, theirs, truth, eps in zip(
        fused, eager, exact, (torch.finfo(torch.float32).eps, torch.finfo(draft.dtype).eps), strict=True
    ):
        error, allowed = (ours.double() - truth).abs(), (theirs.double() - truth).abs()
        assert (error <= allowed.max() + 4 * eps * truth.abs() + 1e-6).all(), (error.max(), allowed.max())


# --- Total variation of stored logits -------------------------------------------------------------------------------


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_tv_loss_errs_no_more_than_eager_code(vocab_size: int, dtype: torch.dtype) -> None:
    for temperature in (1.0, 0.6):
        assert_errs_no_more_than_eager(*random_logits(5, vocab_size, dtype), temperature)


@runs_kernels
@pytest.mark.parametrize("vocab_size", [63, 1000])
def test_tv_loss_reads_minus_infinity_as_probability_zero(vocab_size: int) -> None:
    draft, target = random_logits(5, vocab_size, torch.bfloat16)
    target[0, : vocab_size // 2] = -INF
    target[1, 1:] = -INF
    draft[2, ::3] = -INF
    target[3, ::2] = -INF
    draft[3, 1::2] = -INF  # nothing in common
    assert_errs_no_more_than_eager(draft, target)
    assert tv_loss(draft, target)[3] == 1


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_tv_loss_gradient_is_exactly_zero_where_draft_equals_target(dtype: torch.dtype) -> None:
    for vocab_size in VOCABULARIES:
        _, target = random_logits(4, vocab_size, dtype)
        target[1] = 0.5  # all equal
        target[2, : vocab_size // 2] = -INF
        loss, gradient = loss_and_gradient(tv_loss, target, target, torch.ones(4, device=DEVICE))
        assert (loss.abs() < 1e-6).all() and (loss >= 0).all()
        assert not gradient.any()


@runs_kernels
def test_tv_loss_counts_ties_as_below() -> None:
    """Eq. 11 has q <= p. Every exponential here is 0 or 1, so that ties are exact."""
    vocab_size = 9
    draft, target = torch.zeros(2, 1, vocab_size, device=DEVICE)
    draft[0, 0], target[0, 1] = -INF, -INF
    _, gradient = loss_and_gradient(tv_loss, draft, target, torch.ones(1, device=DEVICE))
    q = 1 / (vocab_size - 1)
    below = 1 - q  # all but token 1, where q > p = 0
    expected = torch.full((vocab_size,), -q * (1 - below))
    expected[0], expected[1] = 0, q * below
    torch.testing.assert_close(gradient[0].cpu(), expected)
    assert gradient.abs().max() > 0.1


@runs_kernels
def test_tv_loss_gradient_is_bounded_by_q() -> None:
    for scale in (0.1, 1, 10):
        draft, target = (scale * x for x in random_logits(8, 300, torch.float32))
        _, gradient = loss_and_gradient(tv_loss, draft, target, torch.ones(8, device=DEVICE))
        assert (gradient.abs() <= draft.softmax(-1) * (1 + 1e-4) + 1e-30).all()


@runs_kernels
def test_tv_loss_shows_nan_only_where_it_is() -> None:
    draft, target = random_logits(4, 100, torch.float32)
    draft[1, 7], target[2, 8], draft[3, 9] = NAN, NAN, INF
    loss, gradient = loss_and_gradient(tv_loss, draft, target, torch.ones(4, device=DEVICE))
    assert loss[0].isfinite() and loss[1:].isnan().all()
    assert gradient[0].isfinite().all() and gradient[[1, 3]].isnan().any(-1).all()


@runs_kernels
def test_tv_loss_row_does_not_depend_on_the_others() -> None:
    draft, target = random_logits(6, 100, torch.bfloat16)
    order = torch.tensor([3, 0, 5], device=DEVICE)
    wide = torch.cat([draft, draft], dim=1)  # rows with another stride
    assert (tv_loss(draft, target)[order] == tv_loss(draft[order], target[order])).all()
    assert (tv_loss(wide[:, :100], target) == tv_loss(draft, target)).all()
    assert tv_loss(draft[:0], target[:0]).shape == (0,)


@runs_kernels
def test_tv_loss_reaches_rows_beyond_two_billion_logits() -> None:
    draft, target = random_logits(3, 8, torch.bfloat16)
    stride = 2**30
    untouched = np.zeros(2 * stride + 8, dtype=np.int16)  # 4 GB of addresses; only the pages in use become memory
    far = torch.from_numpy(untouched).view(torch.bfloat16).to(DEVICE).as_strided((3, 8), (stride, 1))
    far.copy_(draft)
    upstream = torch.ones(3, device=DEVICE)
    for x, y in zip(
        loss_and_gradient(tv_loss, far, target, upstream),
        loss_and_gradient(tv_loss, draft, target, upstream),
        strict=True,
    ):
        assert (x == y).all()


@runs_kernels
def test_tv_loss_refuses_what_it_cannot_read() -> None:
    draft, target = random_logits(4, 8, torch.float32)
    for arguments, message in (
        ((draft[0], target[0]), "draft_logits has shape"),
        ((draft, target[:3]), "target_logits has shape"),
        ((draft.double(), target), "draft_logits has dtype torch.float64"),
        ((draft, target.T.contiguous().T), "target_logits is not contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            tv_loss(*arguments)
    with pytest.raises(ValueError, match="temperature is 0"):
        tv_loss(draft, target, temperature=0)


# --- Fused with the projection --------------------------------------------------------------------------------------

NUM_STEPS, NUM_ROWS, HIDDEN, VOCAB = 3, 7, 16, 150
FILTERS = {"none": None, "top 20": lambda x: x.masked_fill(x < x.topk(20).values[:, -1:], -INF)}


def linear_case(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(NUM_ROWS) + torch.arange(NUM_STEPS)[:, None]
    teacher = torch.randn(NUM_ROWS + NUM_STEPS, HIDDEN, generator=generator)
    draft = teacher[index] + 0.3 * torch.randn(NUM_STEPS, NUM_ROWS, HIDDEN, generator=generator)
    lm_head = torch.randn(VOCAB, HIDDEN, generator=generator)
    floats = {"draft_hidden": draft, "teacher_hidden": teacher, "lm_head": lm_head}
    case = {name: x.to(dtype).to(DEVICE) for name, x in floats.items()}
    case["draft_hidden"].requires_grad_()
    return case | {"teacher_index": index.to(DEVICE), "token_ids": torch.zeros_like(index).to(DEVICE)}


def linear_overlap(case: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    """Overlap and its gradient in draft_hidden, for an upstream gradient that differs between rows."""
    result = linear_statistics.linear_statistics(("overlap",), **case, temperature=0.8, **options)["overlap"]
    upstream = torch.linspace(-1, 2, result.numel(), device=DEVICE).view_as(result)
    return result.detach(), torch.autograd.grad(result, case["draft_hidden"], upstream)[0]


@pytest.fixture
def fused(monkeypatch):
    """The Triton path in the interpreter too, several chunks of rows, and a count of the chunks that took it."""
    chunks = []
    original = linear_statistics._Comparison._compare_fused
    monkeypatch.setattr(linear_statistics, "can_fuse", lambda _: True)
    monkeypatch.setattr(linear_statistics, "TRITON_CHUNK", 3 * VOCAB)
    monkeypatch.setattr(
        linear_statistics._Comparison, "_compare_fused", lambda *a: chunks.append(len(a)) or original(*a)
    )
    return chunks


@runs_kernels
@pytest.mark.parametrize("filter_name", FILTERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_overlap_errs_no_more_than_eager_code(fused, dtype: torch.dtype, filter_name: str) -> None:
    """Eager code rounds the logits to `dtype` too; that may move q past p, where the gradient jumps."""
    case, scores_filter = linear_case(dtype), FILTERS[filter_name]
    ours = linear_overlap(case, filter_scores=scores_filter)
    assert len(fused) == 3
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype

    def eager(compute: torch.dtype) -> tuple[Tensor, Tensor]:
        # The set of tokens that the filter keeps is that of the rounded logits in both.
        target = case["teacher_hidden"] @ case["lm_head"].T
        is_kept = torch.ones_like(target, dtype=torch.bool)
        if scores_filter is not None:
            is_kept = scores_filter(target.float() / 0.8) > -INF
        rounded = dtype if compute == torch.float32 else torch.float64
        weight = case["lm_head"].to(rounded).T
        target = (case["teacher_hidden"].to(rounded) @ weight).masked_fill(~is_kept, -INF)[case["teacher_index"]]
        draft = case["draft_hidden"].to(rounded) @ weight
        result = statistics_reference(draft, target, temperature=0.8, dtype=compute)["overlap"]
        upstream = torch.linspace(-1, 2, result.numel(), device=DEVICE).view_as(result)
        return result.detach(), torch.autograd.grad(result, case["draft_hidden"], upstream.to(compute))[0]

    theirs, exact = eager(torch.float32), eager(torch.float64)
    eps = torch.finfo(dtype).eps
    for x, y, truth in zip(ours, theirs, exact, strict=True):
        error, allowed = ((z.double() - truth.double()).norm() / truth.double().norm() for z in (x, y))
        assert error <= 1.1 * allowed + 4 * eps, (error, allowed)


@runs_kernels
def test_fused_overlap_equals_plain_torch(fused, monkeypatch) -> None:
    case = linear_case(torch.float32)
    ours = linear_overlap(case)
    monkeypatch.setattr(linear_statistics, "can_fuse", lambda _: False)
    for x, y in zip(ours, linear_overlap(case), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@runs_kernels
def test_fused_overlap_gradient_is_zero_where_draft_equals_target(fused) -> None:
    case = linear_case(torch.float32)
    # Small integers: the products are exact, whatever the order of the sums.
    case["lm_head"], case["teacher_hidden"] = (case[name].round() for name in ("lm_head", "teacher_hidden"))
    case["draft_hidden"] = case["teacher_hidden"][case["teacher_index"]].requires_grad_()
    overlap, gradient = linear_overlap(case)
    assert (overlap - 1).abs().max() < 1e-5 and not gradient.any()


@runs_kernels
def test_fused_overlap_is_finite_where_nothing_overlaps(fused) -> None:
    case = linear_case(torch.float32)
    case["draft_hidden"] = (-1000 * case["teacher_hidden"][case["teacher_index"]]).requires_grad_()
    case["teacher_hidden"] = 1000 * case["teacher_hidden"]
    overlap, gradient = linear_overlap(case)
    assert (overlap == 0).all() and gradient.isfinite().all()


# --- A vocabulary split over ranks ----------------------------------------------------------------------------------


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    linear_statistics.can_fuse = lambda _: True
    linear_statistics.TRITON_CHUNK = 3 * VOCAB
    results = {}
    own = slice(0, 85) if rank == 0 else slice(85, VOCAB)
    for name, scores_filter in FILTERS.items():
        case = linear_case(torch.float32)
        case["lm_head"] = case["lm_head"][own]
        results[name] = linear_overlap(case, filter_scores=scores_filter, vocab_group=dist.group.WORLD)
    draft, target = (x[:, own].contiguous() for x in random_logits(5, VOCAB, torch.float32))
    upstream = torch.linspace(-1, 2, 5)
    results["tv_loss"] = loss_and_gradient(tv_loss, draft, target, upstream, vocab_group=dist.group.WORLD)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_losses_of_two_ranks_equal_one_process(fused, tmp_path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name, scores_filter in FILTERS.items():
        expected = linear_overlap(linear_case(torch.float32), filter_scores=scores_filter)
        for results in ranks:
            for x, y in zip(results[name], expected, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    loss, gradient = loss_and_gradient(tv_loss, *random_logits(5, VOCAB, torch.float32), torch.linspace(-1, 2, 5))
    for results in ranks:
        torch.testing.assert_close(results["tv_loss"][0], loss)
    torch.testing.assert_close(torch.cat([results["tv_loss"][1] for results in ranks], dim=1), gradient)


# Two processes share no GPU here: on the CPU, and so in the interpreter.
test_losses_of_two_ranks_equal_one_process.__test__ = INTERPRETED


# --- Compiled for the GPUs that we name -----------------------------------------------------------------------------

MAX_REGISTERS = 128  # of 65,536 per processor: two programs of 8 warps at least
TYPES = {"logits": "*bf16", "draft": "*bf16", "target": "*bf16", "gradient": "*bf16", "target_index": "*i64"}
KERNELS = {
    "logsumexp": ("_logsumexp_kernel", {}, ()),
    "fused with the projection": ("_overlap_kernel", {"COMPUTES_SUMS": True}, ("upstream",)),
    "overlap": ("_overlap_kernel", {"COMPUTES_SUMS": True}, ("upstream", "gradient", "target_index")),
    "gradient": ("_overlap_kernel", {"COMPUTES_SUMS": False}, ("target_index",)),
}
# Every kernel for one target, and the two that contain everything for the others.
CASES = [
    (name, target)
    for target in TARGETS
    for name in KERNELS
    if target == "sm_90" or name in ("logsumexp", "fused with the projection")
]


def compile_kernel(name: str, target: str):
    """As a run in bf16 with a vocabulary divisible by 16 would specialise it."""
    kernel_name, constants, absent = KERNELS[name]
    kernel = getattr(module, kernel_name)
    constants = constants | {"BLOCK": module.BLOCK} | {f"{pointer}_ptr": None for pointer in absent}
    signature, attributes = {}, {}
    for i, parameter in enumerate(kernel.params):
        if parameter.name in constants:
            signature[parameter.name] = "constexpr"
            continue
        is_pointer = parameter.name.endswith("_ptr")
        if is_pointer:
            signature[parameter.name] = TYPES.get(parameter.name.removesuffix("_ptr"), "*fp32")
        else:
            signature[parameter.name] = "fp32" if parameter.name == "inverse_temperature" else "i32"
        if is_pointer or parameter.name.endswith("_stride") or parameter.name == "vocab_size":
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options=compile_options(module.NUM_WARPS))


@pytest.mark.skipif(INTERPRETED or EMULATED, reason="a test of the suite's own process")
@pytest.mark.parametrize(("name", "target"), CASES)
def test_loss_kernel_compiles_without_spills(record_property, tmp_path, name: str, target: str) -> None:
    compiled = compile_kernel(name, target)
    if "cubin" not in compiled.asm:
        assert ".vgpr_spill_count: 0" in compiled.asm["amdgcn"]
        return
    used = resources(compiled.asm["cubin"], tmp_path)
    record_property("registers", used["REG"])
    print(f"{name}, {target}: {used['REG']} registers", file=sys.stderr)
    assert used["STACK"] == used["LOCAL"] == 0
    assert used["REG"] <= MAX_REGISTERS
    ptx = compiled.asm["ptx"]
    assert re.search(r"ld\.global(\.\w+)*\.v4\.b32", ptx), "no 128-bit loads"
    if name in ("gradient", "fused with the projection"):
        assert re.search(r"st\.global(\.\w+)*\.v4\.b32", ptx), "no 128-bit stores"
