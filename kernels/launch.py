"""How a row of logits is cut into sub-blocks and tiles, by fixed numbers, so that results ignore the batch; and who
reads them: programs of which each takes more of a row, the more rows there are.

Several requests may share a program: one on a GPU, thousands in Triton's interpreter, whose cost is per operation and
not per element.
"""

import functools

import torch
import triton

from vllm_bebop.kernels import device, reference

TILE = 16  # sub-blocks that one program reads at once
# Programs of each pass that an H100 has room for, by their registers.
SAMPLING_AT_ONCE, VERIFYING_AT_ONCE, VERIFYING_MORE_AT_ONCE = 396, 528, 264
RESIDUAL_TILE = 8  # sub-blocks of a program that sums up a residual
RESIDUAL_PROGRAMS = 264  # in all; as many as an H100 runs at once
MAX_REGISTERS = 128  # of 65,536 per processor: two programs of 8 warps
MAX_BATCH = 65_535  # requests in one call on a GPU
INTERPRETER_ELEMENTS = 2**18  # logits that one interpreted program reads; four times as many numbers are Triton's limit


@functools.cache  # every launch asks
def compile_options(num_warps: int, max_registers: int | None = None) -> dict[str, int | bool]:
    """How a kernel is compiled. Told its limit of registers per thread, Nvidia's assembler keeps to it without use of
    local memory where it can; on its own it sets limits that it cannot keep.

    Were products fused into sums, each lane would add its own product before rounding and the others' after it, so that
    lanes could disagree about their sum, and one launch with two. Costs 4 % more instructions.
    """
    limit = {} if max_registers is None or torch.version.hip else {"maxnreg": max_registers}
    return {"num_warps": num_warps, "enable_fp_fusion": False} | limit


# Limits are the lowest, of those that let as many programs share a processor, with which nothing goes to local memory.
PASS = compile_options(8)  # over the logits of one row
PASS_AND_MORE = compile_options(8, MAX_REGISTERS)  # over a draft row too, or with a bitmask, or all that follows it
SEARCH = compile_options(8 if torch.version.hip else 16, 64)  # for a threshold; AMD's warps are twice as wide
RESOLUTION = compile_options(8)
RESIDUAL = BLOCK = compile_options(8, MAX_REGISTERS)


def is_interpreted() -> bool:
    """Whether Triton's kernels run in Python (TRITON_INTERPRET=1 when Triton was imported)."""
    return not isinstance(device.to_scores, triton.JITFunction)


def partition(vocab_size: int) -> tuple[int, int]:
    """Width and number of sub-blocks, as in the reference; a single small one is padded to a power of two."""
    width = min(reference.SUB_BLOCK, triton.next_power_of_2(vocab_size))
    return width, triton.cdiv(vocab_size, width)


def tiles_per_program(num_tiles: int, num_rows: int, at_once: int) -> int:
    """How many tiles of a row one program reads, one after the other; results do not depend on it.

    As few as let all programs run at once, or else all: whenever the programs of a processor give way to the next
    ones, its share of the memory's bandwidth is idle for a while.
    """
    return triton.cdiv(num_tiles, min(num_tiles, max(1, at_once // num_rows)))


def requests_per_program(batch: int, tile_size: int) -> int:
    """1 on a GPU. Interpreted, as many as keep a program's tile near INTERPRETER_ELEMENTS.

    Raises:
        ValueError: more requests than a grid of CUDA can have.
    """
    if not is_interpreted():
        if batch > MAX_BATCH:
            raise ValueError(f"{batch} requests are more than one call can take: split them, {MAX_BATCH} at most")
        return 1
    return max(1, min(triton.next_power_of_2(batch), INTERPRETER_ELEMENTS // tile_size))
