"""The fused kernels compile, on any machine, for the GPUs we name: no spills, wide loads, device-wide atomics.

Only the compiler runs here. Constants: a large vocabulary in bf16, and one request per program, as on a GPU.
"""

import heapq
import importlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from vllm_bebop.kernels import launch  # noqa: E402

ROOT = Path(__file__).parent.parent
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),  # in a process of its own: kernels ask PyTorch whether it is AMD's
}
MAX_INSTRUCTIONS = 15  # per logit of a loop over tiles: at 3 TB/s in bf16, an H100 has time for 20
MAX_AROUND_IT = 320  # of a thread, where its program begins and ends
BF16 = ["logits", "cache", "kept", "target", "draft"]
INT64 = ["seeds", "positions", "token_ids", "argmax_ids", "cache_argmax", "draft_argmax", "tokens", "num_drafts"]
INT64 += ["num_accepted", "num_nan", "num_empty", "step", "rounds", "cache_token_ids", "cache_positions"]
INT64 += ["input_positions", "drawn_ids", "drawn_positions", "num_scheduled"]
INT32 = [
    "slots",
    "top_k",
    "ids",
    "input_ids",
    "cut_input_ids",
    "row_offsets",
    "cache_ids",
    "draft_ids",
    "bitmask",
    "first_rows",
    "tickets",
    "row_tickets",
    "request_tickets",
    "verdicts",
    "first_rejected",
    "num_tokens",
    "unresolved",
]
BOOL = ["is_empty", "one_hot", "has_grammar"]
TYPES = {
    name: type for names, type in ((BF16, "*bf16"), (INT64, "*i64"), (INT32, "*i32"), (BOOL, "*i1")) for name in names
}
TYPES["totals"] = "*fp64"
SIZES = {"SUB_BLOCK": 512, "TILE": 16, "PADDED_BLOCKS": 512, "REQUESTS": 1}


def compile_kernel(kernel, target: str, options: dict, absent: tuple[str, ...] = (), **constants):
    """Pointers and strides as a run would specialise them: all divisible by 16."""
    sizes = {name: size for name, size in SIZES.items() if name in kernel.arg_names}
    constants = sizes | constants | {f"{name}_ptr": None for name in absent}
    signature, attributes = {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = TYPES.get(name.removesuffix("_ptr"), "*fp32")
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if name.endswith("_stride") or name == "vocab_size":
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options=options)


def report_on(cubin: bytes, folder: Path, tool: str, *options: str) -> str:
    """What one of Nvidia's tools that Triton carries says of a compiled kernel."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    if not path.exists():
        pytest.skip(f"this Triton carries no {tool}")
    (folder / "kernel.cubin").write_bytes(cubin)
    return subprocess.run([path, *options, folder / "kernel.cubin"], capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers per thread, bytes of stack and of spilled (local) memory."""
    report = report_on(cubin, folder, "cuobjdump", "-res-usage")
    return {name: int(re.search(rf"{name}:(\d+)", report).group(1)) for name in ("REG", "STACK", "LOCAL")}


def instructions_to_the_ticket(sass: str, num_exponents: int) -> int:
    """Of a thread, on the shortest way from the start to the first ticket that takes in so many exponents."""
    instructions = [[]]  # of each basic block: the name of each instruction, and where it may branch to
    labels = {}
    for line in sass.splitlines():
        if label := re.match(r"\.(L_x_\d+):", line):
            labels[label.group(1)] = len(instructions)
            instructions.append([])
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", line):
            target = re.search(r"BRA[^(]*`\(\.(L_x_\d+)\)", line)
            # BRA.DIV is for lanes that have parted: never here.
            always = target is not None and "@" not in line and found.group(1) != "BRA.DIV"
            instructions[-1].append((found.group(1), target and target.group(1)))
            if target:
                instructions.append([(None, None)] if always else [])
    shortest = {}
    ways = [(0, 0, 0)]  # instructions so far, exponents so far, block
    while ways:
        length, exponents, block = heapq.heappop(ways)
        if (block, exponents) in shortest or block >= len(instructions):
            continue
        shortest[block, exponents] = length
        ends_here = False
        for name, target in instructions[block]:
            if name is None:
                ends_here = True
                break
            length += 1
            exponents = min(num_exponents, exponents + name.startswith("MUFU.EX2"))
            if name.startswith("ATOM") and exponents == num_exponents:
                return length
            if target:
                heapq.heappush(ways, (length, exponents, labels[target]))
        if not ends_here:
            heapq.heappush(ways, (length, exponents, block + 1))
    raise AssertionError("no way to a ticket")


FILTERS = ("top_k", "top_p", "min_p")


def candidates(target: str):
    from vllm_bebop.kernels.candidate_kernel import candidates_kernel

    return compile_kernel(candidates_kernel, target, launch.compile_options(4))


def gathering(target: str):
    from vllm_bebop.kernels.gathering_kernel import gather_kernel

    return compile_kernel(gather_kernel, target, launch.compile_options(1), STEPS=4)


def tally(target: str):
    from vllm_bebop.kernels.tally_kernel import tally_kernel

    return compile_kernel(tally_kernel, target, launch.compile_options(4), STEPS=4)


def sampling(target: str, options: dict, *, filtered: bool):
    from vllm_bebop.kernels.draft_kernel import sample_kernel

    absent = () if filtered else (*FILTERS, "rounds")
    return compile_kernel(sample_kernel, target, options, absent, FILTERED=filtered, BLOCK_STREAM=0, TOKEN_STREAM=1)


PLAIN = ("bitmask", "draft_ids", *FILTERS)


def verification(target: str, options: dict, *parts: str, absent: tuple[str, ...] = PLAIN, **sizes: int):
    from vllm_bebop.kernels.verification_kernel import verify_kernel

    constants = {name: name in parts for name in ("STATISTICS", "DECISION", "RESOLUTION", "BLOCK")}
    others = {"FILTERED": "top_k" not in absent, "PADDED_STEPS": 4} | sizes
    return compile_kernel(verify_kernel, target, options, absent, **constants, **others)


def residual(target: str, absent: tuple[str, ...] = PLAIN, **sizes: int):
    from vllm_bebop.kernels.residual_kernel import residual_kernel

    absent = tuple(name for name in absent if f"{name}_ptr" in residual_kernel.arg_names)
    constants = {"FILTERED": absent == (), "TILE": launch.RESIDUAL_TILE, "PADDED_STEPS": 4} | sizes
    return compile_kernel(residual_kernel, target, launch.RESIDUAL, absent, **constants)


ONE_HOT = (
    *("draft", "draft_logsumexp", "draft_argmax", "draft_threshold", "draft_statistics", "slots", "one_hot"),
    *PLAIN,
)
FILTERED, CANDIDATES = ("bitmask", "draft_ids"), ("bitmask", *FILTERS)
DECIDED, AT_ONCE = ("STATISTICS", "DECISION"), ("STATISTICS", "DECISION", "RESOLUTION")
ONE_DRAFT = {"max_drafts": 1, "tokens_stride": 1, "PADDED_STEPS": 2}  # compiled, an integer 1 becomes a constant
KERNELS = {
    "sample": lambda target: sampling(target, launch.PASS, filtered=False),
    "sample with filters": lambda target: sampling(target, launch.SEARCH, filtered=True),
    "candidates": candidates,
    "gathering": gathering,
    "tally": tally,
    "statistics": lambda target: verification(target, launch.PASS, *DECIDED),
    "statistics of draft rows too": lambda target: verification(
        target,
        launch.PASS_AND_MORE,
        *DECIDED,
        absent=("draft_logsumexp", "draft_threshold", *PLAIN),
    ),
    "statistics of one-hot drafts": lambda target: verification(target, launch.PASS, *DECIDED, absent=ONE_HOT),
    "statistics of candidates": lambda target: verification(target, launch.PASS, *DECIDED, absent=CANDIDATES),
    "statistics with a bitmask": lambda target: verification(
        target, launch.PASS_AND_MORE, *DECIDED, absent=("draft_ids", *FILTERS)
    ),
    "decision with filters": lambda target: verification(target, launch.SEARCH, "DECISION", absent=FILTERED),
    "decision with everything": lambda target: verification(target, launch.SEARCH, "DECISION", absent=()),
    "resolution": lambda target: verification(target, launch.RESOLUTION, "RESOLUTION"),
    "residual": residual,
    "resolution of candidates": lambda target: verification(target, launch.RESOLUTION, "RESOLUTION", absent=CANDIDATES),
    "resolution with everything": lambda target: verification(target, launch.RESOLUTION, "RESOLUTION", absent=()),
    "residual of one draft": lambda target: residual(target, absent=("totals", *PLAIN), **ONE_DRAFT),
    "residual with everything": lambda target: residual(target, absent=()),
    "block": lambda target: verification(target, launch.BLOCK, "BLOCK", "RESOLUTION"),
    "block with everything": lambda target: verification(target, launch.BLOCK, "BLOCK", "RESOLUTION", absent=()),
    "single launch": lambda target: verification(target, launch.PASS_AND_MORE, *AT_ONCE),
    "single launch of one draft": lambda target: verification(target, launch.PASS_AND_MORE, *AT_ONCE, **ONE_DRAFT),
    "block of one draft": lambda target: verification(target, launch.BLOCK, "BLOCK", "RESOLUTION", **ONE_DRAFT),
}
# Those that pass over rows; the others read single sub-blocks.
READS_ROWS = [
    name for name in KERNELS if name.startswith(("statistics", "residual", "block", "single")) or name == "sample"
]

# Every kernel for one target; for the others the two that contain everything, and those close to their limit.
WHOLE = ("sample", "single launch")
LIMITED = ("sample with filters", "decision with filters", "residual with everything", "block with everything")
NVIDIA = [target for target in TARGETS if target.startswith("sm_")]
CASES = [(name, target) for target in NVIDIA for name in KERNELS if target == "sm_90" or name in WHOLE + LIMITED]

is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(is_interpreted, reason="TRITON_INTERPRET is set, so that nothing is compiled")
@pytest.mark.parametrize(("name", "target"), CASES)
def test_kernel_compiles_without_spills(record_property, tmp_path, name: str, target: str) -> None:
    compiled = KERNELS[name](target)
    used = resources(compiled.asm["cubin"], tmp_path)
    record_property("registers", used["REG"])
    print(f"{name}, {target}: {used['REG']} registers", file=sys.stderr)
    assert used["STACK"] == used["LOCAL"] == 0
    assert used["REG"] <= (compiled.metadata.maxnreg or launch.MAX_REGISTERS)
    ptx = compiled.asm["ptx"]
    if name in READS_ROWS:
        assert re.search(r"ld\.global(\.\w+)*\.v4\.b32", ptx), "no 128-bit loads"
        # The ticket that tells the last program must order memory for the whole device.
        assert "atom.global.gpu.acq_rel.add.u32" in ptx
    assert "ld.volatile" not in ptx, "what other programs write: the threads of one would branch on different values"
    # One for each exponent, and for each sub-block whose statistics a thread finishes. Any other is a product fused
    # into a sum: the lanes of a program may disagree about it.
    others = ptx.count("fma.rn.f32") + ptx.count("fma.rn.f32x2") - ptx.count("ex2.approx.ftz.f32")
    of_a_row = SIZES["PADDED_BLOCKS"] // (32 * compiled.metadata.num_warps)
    assert others in (0, of_a_row, 2 * of_a_row)
    assert not re.search(r"ld\.global\.nc", ptx), "a load through the read-only cache could miss other programs' stores"


@pytest.mark.skipif(is_interpreted, reason="TRITON_INTERPRET is set, so that nothing is compiled")
@pytest.mark.parametrize("name", ["sample", "statistics", "single launch"])
def test_a_pass_over_logits_has_few_instructions(tmp_path, name: str) -> None:
    """Memory is not what a GPU waits for, if there are more of them than it can do while a logit arrives."""
    per_thread = SIZES["SUB_BLOCK"] * SIZES["TILE"] // (32 * launch.PASS["num_warps"])
    sass = report_on(KERNELS[name]("sm_90").asm["cubin"], tmp_path, "nvdisasm", "-c")
    of_one_tile, of_two = (instructions_to_the_ticket(sass, tiles * per_thread) for tiles in (1, 2))
    per_logit = (of_two - of_one_tile) / per_thread  # of the loop, without a program's beginning and end
    print(f"{name}: {per_logit:.1f} instructions per logit, {of_one_tile} in all for one tile", file=sys.stderr)
    assert 8 < per_logit <= MAX_INSTRUCTIONS
    assert 2 * of_one_tile - of_two <= MAX_AROUND_IT


COMPILED_ON_AMD = """
import torch
torch.version.hip = "compiled for, not run on"
from tests import test_kernels_compile as compiles
for name in compiles.WHOLE:
    print(compiles.KERNELS[name]("gfx942").asm["amdgcn"])
"""


@pytest.mark.skipif(is_interpreted, reason="TRITON_INTERPRET is set, so that nothing is compiled")
def test_kernels_for_amd_do_not_spill_and_wait_for_their_stores_before_a_ticket(tmp_path) -> None:
    """On AMD, a barrier orders no stores to global memory, and the ticket's release only those of its own wave."""
    environ = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}  # whose keys do not know for whom a kernel is compiled
    command = [sys.executable, "-c", COMPILED_ON_AMD]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"\.vgpr_spill_count:\s*(\d+)", done.stdout) == ["0"] * len(WHOLE)
    steps = re.findall(r"ASMSTART\n\s*s_waitcnt vmcnt\(0\)|global_store|s_barrier|global_atomic_add", done.stdout)
    steps = [step for step, _ in itertools.groupby(steps)]  # from Triton 3.9 on, that barrier comes twice
    tickets = [i for i, step in enumerate(steps) if step == "global_atomic_add"]
    assert len(tickets) == 3  # one to draw; one of a row, one of a request
    for ticket in tickets:
        assert [step.split()[0] for step in steps[ticket - 2 : ticket]] == ["ASMSTART", "s_barrier"]


def test_no_global_of_a_kernel_is_nan() -> None:
    """Triton 3.8 compares a compiled kernel's globals with their present values, and NaN is not equal to itself."""
    for path in (ROOT / "kernels").glob("*.py"):
        module = importlib.import_module(f"vllm_bebop.kernels.{path.stem}")
        numbers = {name: getattr(value, "value", value) for name, value in vars(module).items()}
        assert [name for name, value in numbers.items() if isinstance(value, float) and value != value] == []
