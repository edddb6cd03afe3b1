"""A machine for PTX in NumPy: what Triton compiled for a GPU runs here, on tensors of the CPU, and is watched.

Triton's interpreter runs the text of a kernel; this runs what the compiler made of it: layouts, shuffles, shared
memory, barriers, masks and alignment. All threads of all programs go through an instruction together, as one operation
on arrays. It is made to find what would go wrong on a GPU only. A kernel faults that

- touches memory that belongs to no tensor it was given, or that is not aligned for the access;
- reads shared memory that was not written;
- races: two threads touch one address, one of them writing, without a barrier between, or two programs do at all;
- branches differently within a program (Triton's kernels do not), or uses an instruction that is not known here.

exp2, division and rsqrt are only near on a GPU, so here they are as far off as the PTX manual allows, up or down by the
bits of their input. Not modelled: time, caches, and what ptxas makes of PTX. Source: PTX ISA 8.8, NVIDIA.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from ptx_memory import GRANULE, WARP, Array, Counts, Fault, Memory, Watch, as_stored

_SHARED_BASE = 1 << 12  # so that an address is not by chance right
_RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_KINDS = {"u": "u", "b": "u", "s": "i", "f": "f"}
_ULP = 2.0**-23


def _bytes(kind: str) -> int:
    return int(re.sub(r"\D", "", kind.removeprefix("bf"))) // 8


def _of_bfloat16(bits: Array) -> Array:
    return np.asarray(bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(value: Array) -> Array:
    """Round to the nearest, ties to even; NaN stays one."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _near(exact: Array, seed: Array, ulps: float) -> Array:
    """Return the float32 farthest from `exact` (float64) that a GPU may give, up or down by the bits of the input.

    Halfway between two values float64 itself rounds, and a sum could come to lie a hair outside the bound: so the
    distance is taken once more, where it is exact, and what is too far goes one float32 back.
    """
    bits = np.ascontiguousarray(seed).view(np.uint32)
    sign = np.where((bits * np.uint32(0x9E3779B1)) >> 31, 1.0, -1.0)
    size = np.abs(exact).astype(np.float32)
    size = np.where(size > np.abs(exact), np.nextafter(size, np.float32(0)), size)  # just below a power of two
    step = np.spacing(size).astype(np.float64)
    found = (exact + sign * ulps * step).astype(np.float32)
    found = np.where(np.abs(found - exact) > ulps * step, np.nextafter(found, -sign.astype(np.float32) * np.inf), found)
    return np.where(np.isfinite(size) & (size > 0), found, exact).astype(np.float32)  # an underflow is exactly zero


def _flushed(value: Array) -> Array:
    return np.where(np.abs(value) < 2.0**-126, np.float32(0), value)


@dataclass
class _State:
    registers: dict[str, Array]  # each broadcasts to (programs, threads)
    programs: Array
    threads: int
    shared: Array  # (programs, bytes)
    watch: Watch | None  # of shared memory
    memory: Memory
    checked: bool
    counts: Counts | None
    epoch: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.programs), self.threads

    def everyone(self) -> Array:
        """The threads, numbered over the launch."""
        return self.programs[:, None] * self.threads + np.arange(self.threads)[None, :]

    def split(self, chosen: Array) -> _State:
        """The state of some programs alone."""
        rows = np.flatnonzero(chosen)
        registers = {n: v[rows] if v.shape[0] > 1 else v for n, v in self.registers.items()}
        shared, watch = self.shared[rows], None
        if self.watch is not None:
            watch = Watch(0)
            moved = (rows - np.arange(len(rows)))[:, None] * self.threads  # threads are numbered over the programs here
            for name, value in vars(self.watch).items():
                part = value.reshape(len(self.programs), -1)[rows]
                if name in ("writer", "reader"):
                    part = np.where(part != 0, part - moved, 0)
                setattr(watch, name, part.reshape(-1))
        return _State(
            registers,
            self.programs[rows],
            self.threads,
            shared,
            watch,
            self.memory,
            self.checked,
            self.counts,
            self.epoch,
        )


Step = Callable[[_State], None]
Read = Callable[[_State], Array]


# ---- reading the text


class _Instruction(NamedTuple):
    guard: str | None  # a predicate, with "!" before it if negated
    name: str
    operands: list[Any]  # a string; a list for {…}; a tuple (register, offset) for […]
    text: str


def _operands(text: str) -> list[Any]:
    found: list[Any] = []
    for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text):
        part = part.strip()
        if part.startswith("{"):
            found.append([item.strip() for item in part[1:-1].split(",")])
        elif part.startswith("["):
            base, _, offset = part[1:-1].partition("+")
            found.append((base.strip(), int(offset.strip() or "0", 0)))
        else:
            found.append(part)
    return found


def _statements(body: str) -> tuple[list[_Instruction], dict[str, int]]:
    body = re.sub(r"//[^\n]*", "", body)
    body = re.sub(r"^\s*\.(loc|file|pragma)[^\n]*$", "", body, flags=re.MULTILINE)
    instructions: list[_Instruction] = []
    labels: dict[str, int] = {}
    for statement in body.split(";"):
        statement = " ".join(statement.split())
        while label := re.match(r"(\$\w+): ?", statement):
            labels[label.group(1)] = len(instructions)
            statement = statement[label.end() :]
        if not statement or statement.startswith("."):
            continue
        match = re.match(r"(?:@(!?%\w+) )?([\w.:]+)(?: (.*))?$", statement)
        if match is None:
            raise Fault(f"not understood: {statement}")
        guard, name, operands = match.groups()
        instructions.append(_Instruction(guard, name.replace("::cta", ""), _operands(operands or ""), statement))
    return instructions, labels


def _immediate(text: str, kind: str) -> Array | None:
    """A constant as the bits of its kind, or None."""
    if re.fullmatch(r"0[fF][0-9A-Fa-f]{8}", text):
        return np.array([[int(text[2:], 16)]], np.uint32)
    if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
        if kind == "pred":
            return np.array([[int(text.removesuffix("U"), 0) != 0]])
        size = _bytes(kind)
        return np.array([[int(text.removesuffix("U"), 0) & ((1 << 8 * size) - 1)]], _RAW[size])
    if text in ("true", "false"):
        return np.array([[text == "true"]])
    return None


def _view(bits: Array, kind: str) -> Array:
    if kind == "pred":
        return bits
    if kind == "bf16":
        return _of_bfloat16(bits)
    size = _bytes(kind)
    if bits.dtype.itemsize != size:  # a register may be wider than what is taken from it
        bits = bits.astype(_RAW[size])
    return bits.view(np.dtype(f"{_KINDS[kind[0]]}{size}"))


def _bits(value: Array, kind: str) -> Array:
    if kind == "pred":
        return np.asarray(value, bool)
    if kind == "bf16":
        return _to_bfloat16(value)
    size = _bytes(kind)
    typed = np.ascontiguousarray(value, np.dtype(f"{_KINDS[kind[0]]}{size}"))
    return typed.view(_RAW[size])


def _reader(text: str, kind: str) -> Read:
    constant = _immediate(text, kind)
    if constant is not None:
        value = _view(constant, kind)
        return lambda state: value
    if text == "global_smem":
        base = _view(np.array([[_SHARED_BASE]], np.uint32), "u32")
        return lambda state: base

    def held(state: _State) -> Array:
        if text not in state.registers:
            raise Fault(f"{text} is read, and was never set")
        return _view(state.registers[text], kind)

    return held


def _guarded(guard: str | None) -> Callable[[_State], Array | None]:
    if guard is None:
        return lambda state: None
    name = guard.lstrip("!")
    if guard.startswith("!"):
        return lambda state: ~state.registers[name]
    return lambda state: state.registers[name]


def _write(state: _State, name: str, bits: Array, mask: Array | None) -> None:
    if mask is not None:
        old = state.registers.get(name)
        if old is None:
            raise Fault(f"{name} is written for some threads only, and was never set")
        bits = np.where(mask, bits, old)
    state.registers[name] = bits


# ---- arithmetic


def _quotient(a: Array, b: Array) -> Array:
    """Towards zero, as in C."""
    quotient = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64))
    return np.where((a < 0) != (b < 0), -quotient, quotient)


def _multiply_add(a: Array, b: Array, c: Array) -> Array:
    """The product is exact in float64; the sum is rounded twice, which in rare cases is half a unit more."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


_COMPARE: dict[str, Callable[..., Any]] = {n: getattr(operator, n) for n in ("eq", "lt", "le", "gt", "ge")}
_COMPARE["ne"] = lambda a, b: (a < b) | (a > b)  # false for NaN, as all of these
_PLAIN: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": np.fmin,
    "max": np.fmax,
    "neg": np.negative,
    "abs": np.abs,
    "not": np.invert,
    "mov": lambda a: a,
}


_PAIRS: dict[str, Callable[..., Any]] = {
    "fma": _multiply_add,
    "mul": np.multiply,
    "add": np.add,
    "sub": np.subtract,
}


def _shifted(name: str, a: Array, b: Array) -> Array:
    """By the full amount: what leaves the register is gone (or the sign stays)."""
    width = 8 * a.dtype.itemsize
    amount = np.minimum(b, width - 1).astype(a.dtype)
    out = a << amount if name == "shl" else a >> amount
    gone = b >= width
    if name == "shr" and a.dtype.kind == "i":
        return np.asarray(out)
    return np.where(gone, np.zeros((), a.dtype), out)


def _field(a: Array, start: Array, count: Array, signed: bool) -> Array:
    start, count = start & 0xFF, count & 0xFF
    bits = (a.astype(np.uint64) >> start.astype(np.uint64)) & ((np.uint64(1) << count.astype(np.uint64)) - np.uint64(1))
    if not signed:
        return bits.astype(np.uint32)
    top = (bits >> (count.astype(np.uint64) - np.uint64(1))) & np.uint64(1)
    extended = bits.astype(np.int64) - (top.astype(np.int64) << count.astype(np.int64))
    return np.asarray(extended, np.int32)


def _permuted(a: Array, b: Array, selector: Array) -> Array:
    """Four bytes picked from the eight of b and a; or, by a selector's top bit, four copies of that byte's sign."""
    pool = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    total = np.zeros((1, 1), np.uint32)
    for i in range(4):
        pick = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (pool >> (np.uint64(8) * (pick & np.uint32(7)).astype(np.uint64))) & np.uint64(0xFF)
        byte = np.where(pick & np.uint32(8), np.where(byte & np.uint64(0x80), 0xFF, 0), byte).astype(np.uint32)
        total = total | (byte << np.uint32(8 * i))
    return total


def _arithmetic(parts: list[str]) -> tuple[list[str], str, Callable[..., Any]] | None:
    """The kinds of an instruction's inputs, that of its result, and what it computes; None if it is no arithmetic."""
    name, kind, how = parts[0], parts[-1], set(parts[1:-1])
    if kind in ("bf16", "f16") and "f32" in how and name in _PAIRS:  # the last input is float32 already
        return [*[kind] * (1 if name in ("add", "sub") else 2), *["f32"] * (name != "mul")], "f32", _PAIRS[name]
    if kind == "f32x2" and name in _PAIRS and how <= {"rn"}:
        call = _PAIRS[name]

        def both(*given: Array) -> Array:
            halves = [
                call(*(np.ascontiguousarray((g >> np.uint64(s)).astype(np.uint32)).view(np.float32) for g in given))
                for s in (0, 32)
            ]
            low, high = (half.view(np.uint32).astype(np.uint64) for half in map(np.ascontiguousarray, halves))
            return low | (high << np.uint64(32))

        return ["b64"] * (3 if name == "fma" else 2), "b64", both
    if name in _PLAIN and how <= {"rn", "ftz"}:
        call = _PLAIN[name]
        flush = "ftz" in how
        return (
            [kind] * (1 if name in ("neg", "abs", "not", "mov") else 2),
            kind,
            (lambda *a: _flushed(call(*map(_flushed, a)))) if flush else call,
        )
    if name == "mul" and kind == "f32" and how <= {"rn"}:
        return [kind] * 2, kind, np.multiply
    if name == "mul" and how == {"lo"}:
        return [kind] * 2, kind, np.multiply
    if name in ("mul", "mad") and how == {"wide"}:
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        to = np.dtype(f"{_KINDS[kind[0]]}{_bytes(wide)}")

        def product(a: Array, b: Array, c: Array | int = 0) -> Array:
            return np.asarray(a.astype(to) * b.astype(to) + c)

        return [kind, kind, *([wide] if name == "mad" else [])], wide, product
    if name == "mad" and how == {"lo"}:
        return [kind] * 3, kind, lambda a, b, c: a * b + c
    if name == "fma" and kind == "f32" and how == {"rn"}:
        return [kind] * 3, kind, _multiply_add
    if name == "div" and how == {"full"}:
        return [kind] * 2, kind, lambda a, b: _near(np.divide(a, b, dtype=np.float64), a + np.zeros_like(b), 2.0)
    if name == "div" and kind[0] in "su":
        return [kind] * 2, kind, _quotient
    if name == "rem" and kind[0] in "su":
        return [kind] * 2, kind, lambda a, b: a - _quotient(a, b).astype(a.dtype) * b
    if name == "ex2":
        flush = "ftz" in how
        return [kind], kind, lambda a: _exp2(a, flush)
    if name == "rsqrt":
        return [kind], kind, lambda a: _near(1.0 / np.sqrt(a.astype(np.float64)), a, 1.0)
    if name in ("shl", "shr"):
        return [kind, "u32"], kind, lambda a, b: _shifted(name, a, b)
    if name == "bfe" and kind in ("u32", "s32"):
        return [kind, "u32", "u32"], kind, lambda a, s, n: _field(a, s, n, kind[0] == "s")
    if name == "prmt" and len(parts) == 2:
        return ["b32"] * 3, "b32", _permuted
    if name == "setp" and len(parts) == 3 and parts[1] in _COMPARE:
        return [kind] * 2, "pred", _COMPARE[parts[1]]
    if name == "selp":
        return [kind, kind, "pred"], kind, lambda a, b, p: np.where(p, a, b)
    if name == "cvt":
        return _conversion(parts)
    return None


def _exp2(a: Array, flush: bool) -> Array:
    exact = np.exp2((_flushed(a) if flush else a).astype(np.float64))
    out = _near(exact, a, 2.0)
    return np.asarray(_flushed(out) if flush else out)


def _conversion(parts: list[str]) -> tuple[list[str], str, Callable[..., Any]] | None:
    into, kind = parts[-2], parts[-1]
    if into == "bf16x2" and kind == "f32" and parts[1] == "rn":
        return (
            [kind, kind],
            "b32",
            lambda a, b: (_to_bfloat16(a).astype(np.uint32) << 16) | _to_bfloat16(b).astype(np.uint32),
        )
    if into == "f16x2" and kind == "f32" and parts[1] == "rn":
        half = [lambda v: np.ascontiguousarray(v, np.float16).view(np.uint16).astype(np.uint32)]
        return [kind, kind], "b32", lambda a, b: (half[0](a) << 16) | half[0](b)
    if into == "bf16":
        return [kind], "bf16", lambda a: a
    if kind in ("bf16", "f16", "f32") and into[0] in "sub":  # floats to integers: not needed so far
        return None
    if set(parts[1:-2]) - {"rn"}:
        return None
    to = np.dtype(f"{_KINDS[into[0]]}{_bytes(into)}")
    return [kind], into, lambda a: a.astype(to)


# ---- instructions


def _compile(instruction: _Instruction) -> Step:
    parts = instruction.name.split(".")
    name = parts[0]
    packs = name == "mov" and any(isinstance(operand, list) for operand in instruction.operands)
    if instruction.guard and (name == "setp" or packs):
        raise Fault(f"a guard that this machine does not heed: {instruction.text}")
    if name in ("ld", "st"):
        return _memory_step(instruction, parts)
    if name in ("ldmatrix", "stmatrix"):
        return _matrix_step(instruction, parts)
    if name == "shfl":
        return _shuffle_step(instruction, parts)
    if name == "bar":
        return _barrier_step(instruction, parts)
    if name == "mov" and (isinstance(instruction.operands[0], list) or isinstance(instruction.operands[1], list)):
        return _pack_step(instruction)
    if name == "mov" and isinstance(instruction.operands[1], str) and instruction.operands[1] in _SPECIAL:
        if instruction.guard:
            raise Fault(f"a guard that this machine does not heed: {instruction.text}")
        special, target = _SPECIAL[instruction.operands[1]], instruction.operands[0]
        return lambda state: _write(state, target, special(state), None)
    if name == "setp" and parts[-1] in ("bf16x2", "f16x2"):
        return _halves_step(instruction, parts)
    known = _arithmetic(parts)
    if known is None:
        raise Fault(f"an instruction that this machine does not know: {instruction.text}")
    kinds, into, call = known
    target, *given = instruction.operands
    if len(given) != len(kinds):
        raise Fault(f"{len(kinds)} inputs expected: {instruction.text}")
    readers = [_reader(text, kind) for text, kind in zip(given, kinds, strict=True)]
    guard = _guarded(instruction.guard)

    def step(state: _State) -> None:
        _write(state, target, _bits(call(*(read(state) for read in readers)), into), guard(state))

    return step


_SPECIAL: dict[Any, Read] = {
    "%tid.x": lambda state: np.arange(state.threads, dtype=np.uint32)[None, :],
    "%ctaid.x": lambda state: state.programs.astype(np.uint32)[:, None],
    "%ctaid.y": lambda state: np.zeros((1, 1), np.uint32),
    "%ctaid.z": lambda state: np.zeros((1, 1), np.uint32),
    "%ntid.x": lambda state: np.array([[state.threads]], np.uint32),
    "%laneid": lambda state: (np.arange(state.threads, dtype=np.uint32) % WARP)[None, :],
}


def _pack_step(instruction: _Instruction) -> Step:
    """mov between a register and its parts, the low one first."""
    target, given = instruction.operands
    size = _bytes(instruction.name.split(".")[-1])
    if isinstance(given, list):
        part = size // len(given)
        constant = [_immediate(text, f"b{8 * part}") is not None for text in given]
        readers = [(t, _reader(t, f"b{8 * part}") if c else None) for t, c in zip(given, constant, strict=True)]
        unset = np.full((1, 1), (1 << 8 * part) - 1, _RAW[part])  # NaN: the compiler leaves halves unset that it drops

        def packed(state: _State) -> None:
            total = np.zeros((1, 1), _RAW[size])
            for i, (text, read) in enumerate(readers):
                bits = read(state) if read else state.registers.get(text, unset)
                total = total | (bits.astype(_RAW[size]) << _RAW[size](8 * part * i))
            _write(state, target, total, None)

        return packed
    part = size // len(target)
    whole = _reader(given, f"b{8 * size}")

    def unpacked(state: _State) -> None:
        value = whole(state)
        for i, name in enumerate(target):
            if name != "_":
                _write(state, name, (value >> _RAW[size](8 * part * i)).astype(_RAW[part]), None)

    return unpacked


def _halves_step(instruction: _Instruction, parts: list[str]) -> Step:
    """setp of both halves of a register: the low one's result first."""
    targets, *given = instruction.operands
    readers = [_reader(text, "b32") for text in given]
    kind = parts[-1].removesuffix("x2")

    def step(state: _State) -> None:
        whole = [read(state) for read in readers]
        for i, target in enumerate(targets.split("|")):
            halves = [_view((w >> np.uint32(16 * i)).astype(np.uint16), kind) for w in whole]
            _write(state, target.strip(), _COMPARE[parts[1]](*halves), None)

    return step


def _barrier_step(instruction: _Instruction, parts: list[str]) -> Step:
    of_warp = parts[1:] == ["warp", "sync"] and instruction.operands == ["-1"]
    if not (of_warp or (parts[1:] == ["sync"] and instruction.operands == ["0"])) or instruction.guard:
        raise Fault(f"a barrier that this machine does not know: {instruction.text}")

    def step(state: _State) -> None:
        if of_warp and state.threads != WARP:
            raise Fault("a barrier of a warp in a program of several: this machine has no account of such")
        state.epoch += 1

    return step


def _shuffle_step(instruction: _Instruction, parts: list[str]) -> Step:
    target, given, by, clamp, members = instruction.operands
    if parts[1] != "sync" or parts[2] not in ("bfly", "idx") or (clamp, members) != ("31", "-1") or instruction.guard:
        raise Fault(f"a shuffle that this machine does not know: {instruction.text}")
    value, amount = _reader(given, "b32"), _reader(by, "u32")

    def step(state: _State) -> None:
        lane = np.arange(state.threads)[None, :]
        other = amount(state).astype(np.int64) % WARP
        source = lane ^ other if parts[2] == "bfly" else lane // WARP * WARP + other
        held = np.broadcast_to(value(state), state.shape)
        _write(state, target, np.take_along_axis(held, np.broadcast_to(source, state.shape), 1), None)

    return step


def _memory_step(instruction: _Instruction, parts: list[str]) -> Step:
    space, kind = parts[1], parts[-1]
    count = int(parts[-2][1]) if re.fullmatch(r"v[248]", parts[-2]) else 1
    if set(parts[1:]) - {space, kind, f"v{count}"}:
        raise Fault(f"an access that this machine does not know: {instruction.text}")
    storing = parts[0] == "st"
    place, other = instruction.operands if storing else instruction.operands[::-1]
    names: list[str] = other if isinstance(other, list) else [other]
    base, offset = place
    size = _bytes(kind)
    if len(names) != count:
        raise Fault(f"{count} registers expected: {instruction.text}")
    if space == "param":
        if instruction.guard or offset:
            raise Fault(f"an access that this machine does not know: {instruction.text}")
        return lambda state: _write(state, names[0], state.registers[base], None)
    guard, text = _guarded(instruction.guard), instruction.text
    values = [_reader(name, f"b{8 * size}") for name in names] if storing else []
    raw = _RAW[size]

    def active(state: _State, address: Array) -> tuple[Array, Array]:
        """Numbers of the threads that take part, and their addresses."""
        mask = guard(state)
        flat = np.broadcast_to(address, state.shape).reshape(-1)
        if mask is None:
            return np.arange(len(flat)), flat
        chosen = np.flatnonzero(np.broadcast_to(mask, state.shape))
        return chosen, flat[chosen]

    def take(state: _State, chosen: Array, found: list[Array]) -> None:
        """Put what was loaded into the registers of those who loaded."""
        for name, value in zip(names, found, strict=True):
            old = state.registers.get(name)
            width = old.dtype if old is not None else np.dtype(_RAW[2] if size == 1 else raw)
            if len(chosen) < state.shape[0] * state.threads:
                if old is None:
                    raise Fault(f"{name} is loaded by some threads only, and was never set: {text}")
                full = np.array(np.broadcast_to(old, state.shape)).reshape(-1)
            else:
                full = np.empty(state.shape[0] * state.threads, width)
            full[chosen] = value.astype(width)
            state.registers[name] = full.reshape(state.shape)

    def in_global(state: _State) -> None:
        address = _view(state.registers[base], "u64") + np.uint64(offset % 2**64)
        chosen, where = active(state, address)
        everyone = state.everyone().reshape(-1)[chosen] if state.checked else chosen
        given = [np.broadcast_to(read(state), state.shape).reshape(-1)[chosen] for read in values]
        found = [np.empty(len(chosen), raw) for _ in names] if not storing else []
        if state.counts is not None:
            state.counts.of_global(parts[0], chosen, where, size * count)
        for buffer, inside in state.memory.spans(where, size * count, text):
            start = (where[inside] - np.uint64(buffer.base)).astype(np.int64)
            if state.checked:
                spots = (start[:, None] + np.arange(0, size * count, GRANULE)[None, :]) // GRANULE
                if not buffer.allowed[spots].all():
                    raise Fault(f"memory between a tensor's rows: {buffer.name}, {text}")
                threads = np.broadcast_to(everyone[inside][:, None], spots.shape).reshape(-1)
                watch = buffer.watch.writes if storing else buffer.watch.reads
                watch(spots.reshape(-1), threads, state.epoch, state.threads, buffer.name)
            data = buffer.data[: len(buffer.data) // size * size].view(raw)
            for i in range(count):
                if storing:
                    data[start // size + i] = given[i][inside]
                    as_stored(data[start // size + i], given[i][inside], text)
                else:
                    found[i][inside] = data[start // size + i]
        if not storing:
            take(state, chosen, found)

    def in_shared(state: _State) -> None:
        address = _reader(base, "u32")(state).astype(np.int64) + offset - _SHARED_BASE
        chosen, where = active(state, address)
        program = chosen // state.threads
        if (where % (size * count)).any():
            raise Fault(f"misaligned access of {size * count} bytes: {text}")
        if len(where) and (where.min() < 0 or where.max() + size * count > state.shared.shape[1]):
            raise Fault(f"outside shared memory: {text}")
        if state.counts is not None and len(where):
            state.counts.of_shared(chosen, where, size * count)
        _watch_shared(state, storing, program, chosen, where, size * count, text)
        data = state.shared.view(raw)
        given = [np.broadcast_to(read(state), state.shape).reshape(-1)[chosen] for read in values]
        found = []
        for i in range(count):
            if storing:
                data[program, where // size + i] = given[i]
                as_stored(data[program, where // size + i], given[i], text)
            else:
                found.append(data[program, where // size + i])
        if not storing:
            take(state, chosen, found)

    if space == "global":
        return in_global
    if space == "shared":
        return in_shared
    raise Fault(f"memory that this machine does not have: {text}")


def _watch_shared(
    state: _State, storing: bool, program: Array, thread: Array, where: Array, size: int, text: str
) -> None:
    """Note an access of each `thread` (numbered over the programs here) to `size` bytes of its shared memory."""
    if state.watch is None or not len(where):
        return
    spots = (program * state.shared.shape[1] + where)[:, None] + np.arange(size)[None, :]
    threads = np.broadcast_to(thread[:, None], spots.shape).reshape(-1)
    spots = spots.reshape(-1)
    if storing:
        state.watch.writes(spots, threads, state.epoch, state.threads, "shared memory")
        return
    if (state.watch.writer[spots] == 0).any():
        raise Fault(f"shared memory that was not written is read: {text}")
    state.watch.reads(spots, threads, state.epoch, state.threads, "shared memory")


def _matrix_step(instruction: _Instruction, parts: list[str]) -> Step:
    """ldmatrix, stmatrix: matrices of 8 rows of 16 bytes; lanes 8i … 8i + 7 hold the addresses of matrix i's rows, and
    lane l of all 32 the entries 2 (l mod 4) and the next of row l / 4 (with .trans: of the transpose)."""
    storing, count, across = parts[0] == "stmatrix", int(parts[4][1]), "trans" in parts
    if [p for p in parts[1:] if p != "trans"] != ["sync", "aligned", "m8n8", f"x{count}", "shared", "b16"]:
        raise Fault(f"an access that this machine does not know: {instruction.text}")
    if instruction.guard:
        raise Fault(f"a guarded {parts[0]}: {instruction.text}")
    place, names = instruction.operands if storing else instruction.operands[::-1]
    base, offset = place
    lane = np.arange(WARP)
    row, column = lane // 4, lane % 4 * 2

    def step(state: _State) -> None:
        programs, threads = state.shape
        address = np.broadcast_to(_reader(base, "u32")(state).astype(np.int64) + offset - _SHARED_BASE, state.shape)
        address = address.reshape(programs, -1, WARP)
        if (address[:, :, : 8 * count] % 16).any():
            raise Fault(f"misaligned row: {instruction.text}")
        if address[:, :, : 8 * count].min() < 0 or address[:, :, : 8 * count].max() + 16 > state.shared.shape[1]:
            raise Fault(f"outside shared memory: {instruction.text}")
        data = state.shared.view(np.uint16)
        program = np.arange(programs)[:, None, None]
        everyone = np.arange(programs * threads)
        thread = everyone.reshape(programs, -1, WARP)
        for i, name in enumerate(names):
            spots = []
            for half in range(2):
                r, c = (column + half, row) if across else (row, column + half)
                spots.append(address[:, :, 8 * i + r] + 2 * c)
                where = spots[-1].reshape(-1)
                _watch_shared(state, storing, everyone // threads, everyone, where, 2, instruction.text)
            if state.counts is not None:
                rows = address[:, :, 8 * i : 8 * i + 8]
                state.counts.of_shared(thread[:, :, :8].reshape(-1), rows.reshape(-1), 16)
            if storing:
                value = np.broadcast_to(state.registers[name], state.shape).reshape(address.shape)
                for half, where in enumerate(spots):
                    part = (value >> np.uint32(16 * half)).astype(np.uint16)
                    data[program, where // 2] = part
                    as_stored(data[program, where // 2], part, instruction.text)
            else:
                low, high = (data[program, where // 2].astype(np.uint32) for where in spots)
                _write(state, name, (low | (high << np.uint32(16))).reshape(state.shape), None)

    return step


# ---- programs


class Program:
    """A compiled kernel that can be run.

    Args:
        text: PTX with one entry.
        shared_bytes: of dynamic shared memory, as its metadata say.

    Raises:
        Fault: it holds an instruction that is not known here.
    """

    def __init__(self, text: str, shared_bytes: int) -> None:
        entry = re.search(r"\.entry (\w+)\(([^)]*)\)([^{]*)\{(.*?)^\}", text, re.DOTALL | re.MULTILINE)
        if entry is None:
            raise Fault("no entry in this text")
        self.name, parameters, directives, body = entry.groups()
        self.parameters = re.findall(r"\.param \.([usbf]\d+) [^,]*?(\w+)(?:,|\s*$)", parameters)
        threads = re.search(r"\.reqntid (\d+)", directives)
        if threads is None:
            raise Fault("no .reqntid in this text")
        self.threads = int(threads.group(1))
        self.shared_bytes = shared_bytes
        self.instructions, self.labels = _statements(body)
        self.steps = [None if i.name.startswith(("bra", "ret")) else _compile(i) for i in self.instructions]

    def run(
        self,
        programs: int,
        arguments: Sequence[int | float],
        memory: Memory,
        checked: bool = True,
        counts: Counts | None = None,
    ) -> None:
        """Run `programs` programs with the arguments in the order of the parameters.

        Raises:
            Fault: see above.
        """
        registers: dict[str, Array] = {}
        if len(arguments) != len(self.parameters):
            raise Fault(f"{len(self.parameters)} arguments expected, {len(arguments)} given")
        for (kind, name), value in zip(self.parameters, arguments, strict=True):
            size = _bytes(kind)
            if isinstance(value, float):
                registers[name] = np.array([[value]], np.float32).view(np.uint32)
            else:
                registers[name] = np.array([[value & ((1 << 8 * size) - 1)]], _RAW[size])
        space = -(-max(self.shared_bytes, 16) // 16) * 16
        state = _State(
            registers,
            np.arange(programs),
            self.threads,
            np.full((programs, space), 0xFF, np.uint8),  # NaN, if anyone looks
            Watch(programs * space) if checked else None,
            memory,
            checked,
            counts,
        )
        with np.errstate(all="ignore"):
            waiting = [(state, 0)]
            while waiting:
                waiting += self._go(*waiting.pop())

    def _go(self, state: _State, place: int) -> list[tuple[_State, int]]:
        """Run until the end, or until programs part; what is left to do."""
        warps = self.threads // WARP * len(state.programs)
        while True:
            instruction, step = self.instructions[place], self.steps[place]
            if state.counts is not None:
                state.counts.instructions[instruction.name] += warps
            place += 1
            if step is not None:
                step(state)
                continue
            ends = instruction.name == "ret"
            target = len(self.steps) if ends else self.labels[instruction.operands[0]]
            taken = _guarded(instruction.guard)(state)
            if taken is None or taken.all():
                if ends:
                    return []
                place = target
            elif taken.any():
                jumps = np.broadcast_to(taken, state.shape)
                if (jumps.any(1) != jumps.all(1)).any():
                    raise Fault(f"threads of one program part: {instruction.text}")
                stay = (state.split(~jumps[:, 0]), place)
                return [stay] if ends else [(state.split(jumps[:, 0]), target), stay]
