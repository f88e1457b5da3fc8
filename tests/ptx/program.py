"""Decodes the PTX that Triton compiles and launches it on the CPU: see machine.c, which runs the instructions.

Only what our kernels compile to is known: another instruction is an error that names it.
"""

import ctypes
import functools
import itertools
import os
import re
import struct
import subprocess
import tempfile
from pathlib import Path

NUM_OPERANDS = 8
NUM_RESIDENT = 8  # blocks that take turns
SYMBOLS = {"global_smem": 0}
IDS = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z")
GRID = ("%nctaid.x", "%nctaid.y", "%nctaid.z")
SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}  # bytes, by the digits of a type
# Modifiers that change nothing here: which cache, which scope, that all threads go the same way.
WITHOUT_EFFECT = {"cg", "ca", "cs", "cta", "gpu", "uni", "aligned"}
ACCESSES = ("ld", "st", "atom", "ldmatrix", "stmatrix")
OF_ACCESSES = {"global", "shared", "param", "v2", "v4", "sync", "m8n8", "x1", "x2", "x4", "trans", "relaxed", "acq_rel"}
END = "ret"  # after the last statement
RETURNED = 2**31 - 1


class Instruction(ctypes.Structure):
    _fields_ = [
        ("run", ctypes.c_void_p),
        ("offset", ctypes.c_int64),
        ("guard", ctypes.c_int32),
        ("guard_is_negated", ctypes.c_int32),
        ("out", ctypes.c_int32 * NUM_OPERANDS),
        ("in_", ctypes.c_int32 * NUM_OPERANDS),
        ("width", ctypes.c_int32),
        ("size", ctypes.c_int32),
        ("target", ctypes.c_int32),
        ("is_branch", ctypes.c_int32),
        ("pauses", ctypes.c_int32),
        ("acquires", ctypes.c_int32),
        ("releases", ctypes.c_int32),
    ]


class Region(ctypes.Structure):
    _fields_ = [
        ("start", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("writes", ctypes.c_void_p),
        ("readers", ctypes.c_void_p),
        ("is_written", ctypes.c_int32),
    ]


class Launch(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.POINTER(Instruction)),
        ("num_registers", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("shared_size", ctypes.c_int32),
        ("num_blocks", ctypes.c_int32),
        ("regions", ctypes.POINTER(Region)),
        ("num_regions", ctypes.c_int32),
        ("released", ctypes.c_void_p),
        ("num_released", ctypes.c_int32),
        ("places", ctypes.c_void_p),
        ("is_trusted", ctypes.c_int32),
        ("random", ctypes.c_uint64),
        ("error", ctypes.c_char * 256),
    ]


@functools.cache
def machine() -> ctypes.CDLL:
    """machine.c, compiled once a process."""
    flags = ["-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC"]  # no other fused products than fma's
    source = Path(__file__).parent / "machine.c"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "machine.so")
        subprocess.run([os.environ.get("CC", "gcc"), *flags, "-o", library, source, "-lm"], check=True)
        return ctypes.CDLL(str(library))


_seeds = itertools.count()  # another order of the blocks in each launch


def run_of(name: str) -> int:
    """The address of machine.c's function for an instruction.

    Raises:
        NotImplementedError: it has none.
    """
    try:
        return ctypes.cast(getattr(machine(), f"op_{name}"), ctypes.c_void_p).value
    except AttributeError:
        raise NotImplementedError(f"machine.c has no op_{name}") from None


class Program:
    """The only kernel of a PTX text.

    Raises:
        NotImplementedError: the text has an instruction that machine.c does not know.
    """

    def __init__(self, ptx: str) -> None:
        self.registers: dict[str, int] = {}
        self.constants: dict[int, int] = {}  # register: value
        header, body = ptx[ptx.index(".entry") :].split("{", 1)
        self.parameters = re.findall(r"\.param \.(\w+).*?(\w+_param_\d+)", header)
        self.num_threads = int(re.search(r"\.reqntid (\d+)", header).group(1))
        body = re.sub(r"//.*", "", body[: body.index("\n}")])
        body = re.sub(r"^\s*\.(loc|file|reg|pragma)\b.*$", "", body, flags=re.MULTILINE)
        self.labels: dict[str, int] = {}
        self.statements: list[str] = []
        for statement in body.split(";"):
            *labels, statement = re.split(r"(?<=\w):(?=\s)", statement)
            self.labels.update({label.strip(): len(self.statements) for label in labels})
            if statement.strip():
                self.statements.append(" ".join(statement.split()))
        self.statements.append(END)
        self.ids = [self.register(name) for name in IDS]
        decoded = [self.decode(statement) for statement in self.statements]
        self.code = (Instruction * len(decoded))(*decoded)
        given = {*IDS, *GRID, *(name for _, name in self.parameters)}
        for name in self.registers.keys() - given:
            if not re.fullmatch(r"%(p|r|rs|rd)\d+|constant -?\d+", name):
                raise NotImplementedError(f"unknown register {name}")

    def register(self, name: str) -> int:
        return self.registers.setdefault(name, len(self.registers))

    def constant(self, value: int) -> int:
        index = self.register(f"constant {value}")
        self.constants[index] = value
        return index

    def operands(self, text: str) -> list[int]:
        """The registers of names and constants, one or more in braces; -1 for a result that nobody wants."""
        return [self.operand(part.strip()) for part in text.strip("{} ").split(",")]

    def operand(self, text: str) -> int:
        if text == "_":
            return -1
        if text.startswith("%"):
            return self.register(text)
        if text in SYMBOLS:
            return self.constant(SYMBOLS[text])
        if text[:2] in ("0f", "0d"):
            return self.constant(int(text[2:], 16))
        return self.constant(int(text.rstrip("U"), 0) & (2**64 - 1))

    def decode(self, statement: str) -> Instruction:
        guard, opcode, rest = re.fullmatch(r"(?:@(!?%\w+) )?([\w.:]+)(?: (.*))?", statement).groups()
        name, *parts = [part for part in re.split(r"\.|::", opcode) if part not in WITHOUT_EFFECT]
        texts = re.findall(r"\s*(\{[^}]*\}|\[[^\]]*\]|[^,]+)", rest or "")
        result = Instruction(guard=-1, width=1, out=(-1,) * NUM_OPERANDS, in_=(0,) * NUM_OPERANDS)
        if guard:
            result.guard, result.guard_is_negated = self.register(guard.strip("!")), guard.startswith("!")
        if name in ("bra", "ret"):
            result.is_branch, result.target = 1, self.labels[texts[0]] if name == "bra" else RETURNED
        elif name in ACCESSES:
            self._decode_access(result, name, parts, texts)
        elif name == "mov" and "{" in rest:
            is_packed = texts[1].startswith("{")
            outputs, inputs = self.operands(texts[0]), self.operands(texts[1])
            result.width = max(len(outputs), len(inputs))
            result.size = SIZES[parts[-1][1:]] // result.width
            self._fill(result, "pack" if is_packed else "unpack", outputs, inputs)
        elif name == "bar":
            self._fill(result, "bar_sync")
        else:
            if name == "shfl":
                parts = parts[1:2]  # without .sync and .b32
            elif name == "redux" or (name in ("add", "sub", "mul") and parts[0] == "rn"):
                parts = parts[1:]  # without .sync; .rn says not to fuse, which nothing does here
            elif name in ("mov", "selp") and parts != ["pred"]:
                parts = []
            elif name in ("min", "max") and len(texts) == 4:
                name = f"{name}3"
            outputs = [self.operand(text) for text in texts[0].split("|")]
            self._fill(result, "_".join([name, *parts]), outputs, [self.operand(text) for text in texts[1:]])
        return result

    def _decode_access(self, result: Instruction, name: str, parts: list[str], texts: list[str]) -> None:
        type_name = parts[-1]
        if unknown := {*parts[:-1]} - OF_ACCESSES - {"add", "min", "max", "exch", "or", "and"}:
            raise NotImplementedError(f"{name} with .{unknown.pop()}")
        is_store = name in ("st", "stmatrix")
        address, values = texts[:2] if is_store else texts[1::-1]
        values = self.operands(values)
        base, offset = re.fullmatch(r"\[ ?([\w%.]+) ?(?:\+ ?(-?\d+) ?)?\]", address).groups()
        if "param" in parts:  # a constant of a launch; .s32 into a wider register extends the sign
            self._fill(result, "cvt_s64_s32" if type_name == "s32" else "mov", values, [self.register(base)])
            return
        if type_name in ("s8", "s16"):
            raise NotImplementedError(f"{name}.{type_name} extends the sign")
        result.offset, result.width, result.size = int(offset or 0), len(values), SIZES[type_name[1:]]
        inputs = [self.operand(base), *(values if is_store else [self.operand(text) for text in texts[2:]])]
        space = "shared" if "shared" in parts else "global"
        if name == "atom":
            result.pauses = 1
            result.acquires = result.releases = "acq_rel" in parts
            function = "_".join([name, *parts[-2:]])
        else:
            function = f"{name}_{space}"
            if name.endswith("matrix"):
                function = f"{name}_trans" if "trans" in parts else name
        self._fill(result, function, [] if is_store else values, inputs)

    def _fill(self, result: Instruction, function: str, outputs: list[int] = (), inputs: list[int] = ()) -> None:
        result.run = run_of(function)
        for slots, values in ((result.out, outputs), (result.in_, inputs)):
            for k, value in enumerate(values):
                slots[k] = value

    def launch(self, grid: tuple[int, int, int], shared_size: int, arguments: list, is_trusted: bool) -> None:
        """Runs the kernel. arguments: a number, a tensor on the CPU, or None, for each parameter.

        is_trusted: accesses to global memory are not checked, since it follows addresses that its arguments contain.

        Raises:
            RuntimeError: an access outside of the tensors, a race, a barrier that not all threads reach.
        """
        values, regions = dict(self.constants), {}
        values.update({self.register(name): size for name, size in zip(GRID, grid, strict=True)})
        for (type_name, name), argument in zip(self.parameters, arguments, strict=True):
            if argument is None:
                value = 0
            elif hasattr(argument, "untyped_storage"):
                storage = argument.untyped_storage()
                regions[storage.data_ptr()] = storage.nbytes()
                value = argument.data_ptr()
            elif type_name == "f32":
                (value,) = struct.unpack("<I", struct.pack("<f", argument))
            else:
                value = int(argument) & (2 ** (8 * SIZES[type_name[1:]]) - 1)
            values[self.register(name)] = value
        regions = {start: size for start, size in regions.items() if size}
        launch = Launch(
            code=self.code,
            num_registers=len(self.registers),
            num_threads=self.num_threads,
            shared_size=shared_size,
            num_blocks=grid[0] * grid[1] * grid[2],
            regions=(Region * len(regions))(*(Region(start, size) for start, size in regions.items())),
            num_regions=len(regions),
            random=next(_seeds),
            is_trusted=is_trusted,
        )
        failed = machine().run_launch(
            ctypes.byref(launch),
            (ctypes.c_int * 3)(*grid),
            NUM_RESIDENT,
            len(values),
            (ctypes.c_int * len(values))(*values),
            (ctypes.c_uint64 * len(values))(*values.values()),
            (ctypes.c_int * len(self.ids))(*self.ids),
        )
        if failed >= 0:
            raise RuntimeError(f"{launch.error.decode()}: {self.statements[failed]}")
