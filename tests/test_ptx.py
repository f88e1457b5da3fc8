"""The emulated GPU computes what PyTorch does, and notices what a GPU would not forgive."""

import pytest
import torch

from tests.support.kernels import EMULATED, RUNS_HERE, run_on_the_cpu

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402


def test_in_the_emulator() -> None:
    run_on_the_cpu(__file__, "emulated")


test_in_the_emulator.__test__ = not RUNS_HERE


def needs_the_emulator(test):
    test.__test__ = EMULATED
    return test


@triton.jit
def elementwise_kernel(x_ptr, y_ptr, out_ptr, kind: tl.constexpr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + index), tl.load(y_ptr + index)
    if kind == "arithmetic":
        result = (x * y - x) + tl.maximum(x, y) - tl.minimum(x, 3.0) / (y * y + 1)
    elif kind == "exponential":
        result = tl.exp(-tl.abs(x)) + tl.log(y * y + 1)
    elif kind == "comparison":
        result = ((x < y) & (x == x)).to(tl.float32) + 2 * (x >= y).to(tl.float32) + 4 * (x != x).to(tl.float32)
    elif kind == "integer":
        result = (x * y) - (y << 3) ^ (x & 255) | (x >> 2)
    elif kind == "high":
        result = tl.umulhi(x, y)
    elif kind == "sum":
        result = tl.sum(x, axis=0) + 0 * x
    elif kind == "cumulative sum":
        result = tl.cumsum(x, axis=0)
    elif kind == "largest":
        result = tl.max(x, axis=0) - tl.min(y, axis=0) + 0 * x
    elif kind == "cast":
        result = x.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + index, result)


def elementwise(kind: str, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(len(x), dtype=dtype)
    elementwise_kernel[(1,)](x, y, out, kind, len(x))
    return out


@needs_the_emulator
@pytest.mark.parametrize("size", [32, 1024])
@pytest.mark.parametrize("kind", ["arithmetic", "exponential", "comparison", "sum", "cumulative sum", "largest"])
def test_floats_are_those_of_pytorch(kind: str, size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(size, generator=generator) * 5 for _ in range(2))
    if kind == "comparison":
        x[::5], x[1::5] = float("nan"), y[1::5]
    expected = {
        "arithmetic": lambda: (x * y - x) + x.maximum(y) - x.clamp(max=3) / (y * y + 1),
        "exponential": lambda: (-x.abs()).exp() + (y * y + 1).log(),
        "comparison": lambda: (x < y) * 1.0 + 2 * (x >= y) + 4 * x.isnan(),
        "sum": lambda: x.sum().expand(size),
        "cumulative sum": lambda: x.cumsum(0),
        "largest": lambda: (x.max() - y.min()).expand(size),
    }[kind]()
    torch.testing.assert_close(elementwise(kind, x, y, torch.float32), expected, rtol=2e-6, atol=1e-4)


@needs_the_emulator
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integers_wrap_as_those_of_pytorch(dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randint(limits.min, limits.max, (256,), generator=generator).to(dtype) for _ in range(2))
    expected = (x * y) - (y << 3) ^ (x & 255) | (x >> 2)
    assert torch.equal(elementwise("integer", x, y, dtype), expected)


@needs_the_emulator
def test_high_words_of_products_are_exact() -> None:
    x, y = torch.randint(0, 2**32, (2, 256), generator=torch.Generator().manual_seed(1))
    high = elementwise("high", x.to(torch.uint32), y.to(torch.uint32), torch.uint32)
    assert high.tolist() == [a * b >> 32 for a, b in zip(x.tolist(), y.tolist(), strict=True)]


@needs_the_emulator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_are_those_of_pytorch(dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    for part in bits.view(dtype).split(1024):
        torch.testing.assert_close(elementwise("cast", part, part, torch.float32), part.float(), equal_nan=True)
    values = torch.randn(1024, generator=torch.Generator().manual_seed(1))
    assert torch.equal(elementwise("cast", values, values, dtype), values.to(dtype))


@triton.jit
def last_program_kernel(
    values_ptr, ticket_ptr, out_ptr, SEM: tl.constexpr, BARRIER: tl.constexpr, LATE: tl.constexpr, SIZE: tl.constexpr
):
    """Each program stores; the last one to take a ticket adds up what all have stored."""
    index = tl.arange(0, SIZE)
    if not LATE:
        tl.store(values_ptr + tl.program_id(0) * SIZE + index, index + 1)
    if BARRIER:
        tl.debug_barrier()
    ticket = tl.atomic_add(ticket_ptr, 1, sem=SEM)
    if LATE:
        tl.store(values_ptr + tl.program_id(0) * SIZE + index, index + 1)
    if ticket == tl.num_programs(0) - 1:
        total = tl.zeros([SIZE], tl.int32)
        for program in range(tl.num_programs(0)):
            total += tl.load(values_ptr + program * SIZE + index)
        tl.store(out_ptr + index, total)


def add_up(sem: str = "acq_rel", barrier: bool = True, late: bool = False, num_stored: int = 8 * 256) -> torch.Tensor:
    values = torch.zeros(num_stored, dtype=torch.int32)
    ticket, out = torch.zeros(1, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
    last_program_kernel[(8,)](values, ticket, out, sem, barrier, late, 256, num_warps=4)
    return out


@needs_the_emulator
def test_last_program_sees_what_all_have_stored() -> None:
    assert torch.equal(add_up(), 8 * torch.arange(1, 257, dtype=torch.int32))


FAULTS: list[dict] = [{"sem": "relaxed"}, {"late": True}]
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):  # from then on, such an atomic has a barrier of its own
    FAULTS.append({"barrier": False})


@needs_the_emulator
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_race_between_programs_is_noticed(fault: dict) -> None:
    with pytest.raises(RuntimeError, match="race: thread .* reads at"):
        add_up(**fault)


@needs_the_emulator
def test_access_outside_of_the_tensors_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="writes 4 bytes at .*, outside of every argument"):
        add_up(num_stored=8 * 256 - 1)


@triton.jit(do_not_specialize=["start"])
def aligned_kernel(x_ptr, start, SIZE: tl.constexpr):
    index = tl.max_contiguous(tl.multiple_of(start + tl.arange(0, SIZE), 4), 4)
    tl.store(x_ptr + index, index.to(tl.float32))


@needs_the_emulator
def test_access_that_is_not_aligned_is_noticed() -> None:
    x = torch.zeros(1028)
    aligned_kernel[(1,)](x, 4, 1024)
    assert torch.equal(x[4:], torch.arange(4.0, 1028))
    with pytest.raises(RuntimeError, match="is not aligned"):
        aligned_kernel[(1,)](x, 1, 1024)


@triton.jit
def reversed_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out_ptr + SIZE - 1 - index, tl.load(x_ptr + index))
    other = tl.load(out_ptr + index)
    tl.store(out_ptr + SIZE + index, other)


@needs_the_emulator
def test_race_between_warps_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="race: thread .* reads at"):
        reversed_kernel[(1,)](torch.arange(128.0), torch.zeros(256), 128, num_warps=4)


@triton.jit
def reversed_in_place_kernel(x_ptr, BARRIER: tl.constexpr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    x = tl.load(x_ptr + index)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + SIZE - 1 - index, x)


@needs_the_emulator
def test_overwriting_what_another_warp_may_not_have_read_is_noticed() -> None:
    x = torch.arange(128.0)
    reversed_in_place_kernel[(1,)](x, True, 128, num_warps=4)
    assert torch.equal(x, torch.arange(128.0).flip(0))
    with pytest.raises(RuntimeError, match="race: thread .* overwrites at"):
        reversed_in_place_kernel[(1,)](x, False, 128, num_warps=4)
