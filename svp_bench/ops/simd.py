"""A vector type of floats for numba, with explicit operations: sixteen floats with AVX-512, else eight.

LLVM lowers a vector to the registers of the processor: one AVX-512, one AVX or two NEON ones. Functions whose name
ends in 4 interleave four vectors, so that dependent operations of one vector do not stall the processor.
Addresses are integers in bytes.
"""

# mypy: ignore-errors
# numba's extension points are untyped: intrinsics are functions of a typing context that return code generators.

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import chain

from llvmlite import ir
from numba.core import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, register_model

LANES = 16 if "+avx512f" in cpu_target.target_context.codegen().magic_tuple()[2] else 8

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
_VECTOR = ir.VectorType(_F32, LANES)
_INTS = ir.VectorType(_I32, LANES)


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"f32x{LANES}")


vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind) -> None:
        super().__init__(manager, kind, _VECTOR)


def _splat(value: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [value] * LANES)


def _splat_int(value: int) -> ir.Constant:
    return ir.Constant(_INTS, [value] * LANES)


def _fma(builder, a, b, c):
    name = f"llvm.fma.v{LANES}f32"
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), name)
    return builder.call(function, [a, b, c])


def _operation(result, *kinds) -> Callable:
    """Declare an intrinsic of these types from its code generator, a function of (builder, *values)."""

    def declare(generate: Callable) -> Callable:
        def definition(context, *types):
            def build(context, builder, signature, values):
                value = generate(builder, *values)
                return context.get_dummy_value() if value is None else value

            return result(*kinds), build

        names = ["context", *[*inspect.signature(generate).parameters][1:]]
        definition.__signature__ = inspect.Signature([inspect.Parameter(name, 1) for name in names])
        definition.__name__, definition.__doc__ = generate.__name__, generate.__doc__
        return intrinsic(definition)

    return declare


def _binary(name: str) -> Callable:
    def operation(builder, a, b):
        return getattr(builder, name)(a, b)

    return _operation(vector, vector, vector)(operation)


add = _binary("fadd")
sub = _binary("fsub")
mul = _binary("fmul")
div = _binary("fdiv")
fma = _operation(vector, vector, vector, vector)(_fma)  # a * b + c, rounded once


def _pointer(builder, address, kind):
    return builder.inttoptr(address, kind.as_pointer())


def _repeat(builder, value):
    """Return a vector of copies of the same float32."""
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), _splat_int(0))


splat = _operation(vector, types.float32)(_repeat)


@_operation(vector, types.int64)
def load(builder, address):
    """Return adjacent floats."""
    return builder.load(_pointer(builder, address, _VECTOR), align=4)


@_operation(types.void, types.int64, vector)
def store(builder, address, value):
    """Write adjacent floats."""
    builder.store(value, _pointer(builder, address, _VECTOR), align=4)


@_operation(vector, types.int64)
def broadcast(builder, address):
    """Return a vector of copies of the float at an address."""
    return _repeat(builder, builder.load(_pointer(builder, address, _F32), align=4))


@_operation(vector, types.int64, types.int64)
def gather(builder, address, step):
    """Return floats that are `step` bytes apart."""
    value = ir.Constant(_VECTOR, ir.Undefined)
    for i in range(LANES):
        place = builder.add(address, builder.mul(step, ir.IntType(64)(i)))
        one = builder.load(_pointer(builder, place, _F32), align=4)
        value = builder.insert_element(value, one, _I32(i))
    return value


@_operation(types.float32, types.int64)
def load_float(builder, address):
    """Return one float."""
    return builder.load(_pointer(builder, address, _F32), align=4)


@_operation(types.void, types.int64, types.float32)
def store_float(builder, address, value):
    """Write one float."""
    builder.store(value, _pointer(builder, address, _F32), align=4)


@_operation(types.int64, types.int64)
def load_int(builder, address):
    """Return one int64."""
    return builder.load(_pointer(builder, address, ir.IntType(64)), align=8)


@_operation(types.int64, types.int64)
def take(builder, address):
    """Add one to the int64 at an address, atomically; return the value before."""
    return builder.atomic_rmw("add", _pointer(builder, address, ir.IntType(64)), ir.IntType(64)(1), "monotonic")


# 2^f on [-1/2, 1/2]: minimax of degree 5 with p(0) = 1, relative error 9e-8
_EXP2 = (1.0, 0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957, 0.001326472731307149)
# log1p(y) / y on [0, 1]: minimax of degree 8 with p(0) = 1, relative error 3e-8
_LOG1P = (
    *(1.0, -0.49999648332595825, 0.3332132399082184, -0.24857163429260254, 0.191536545753479),
    *(-0.13753803074359894, 0.07920453697443008, -0.030065791681408882, 0.005364824552088976),
)


def _each(operation: Callable, *rows):
    """Apply one operation to each vector of a list."""
    return [operation(*arguments) for arguments in zip(*rows, strict=True)]


def _horner(builder, xs, coefficients):
    values = [_splat(coefficients[-1])] * len(xs)
    for coefficient in reversed(coefficients[:-1]):
        values = [_fma(builder, value, x, _splat(coefficient)) for value, x in zip(values, xs, strict=True)]
    return values


def _or_nan(builder, xs, values):
    """Return the values, NaN where x is NaN: integer arithmetic on its bits may give a number."""
    odd = [builder.fcmp_unordered("uno", x, x) for x in xs]
    return [builder.select(o, x, value) for o, x, value in zip(odd, xs, values, strict=True)]


def _exp2(builder, xs, bounded=False):
    if not bounded:
        return _or_nan(builder, xs, _exp2(builder, _limit(builder, _limit(builder, xs, -126.0), 126.0), bounded=True))
    magic = _splat(12582912.0)  # 1.5 · 2²³: adding it rounds to an integer in the low bits
    shifted = [builder.fadd(x, magic) for x in xs]
    rounded = [builder.fsub(x, magic) for x in shifted]
    fractions = _each(builder.fsub, xs, rounded)
    exponents = [builder.shl(builder.bitcast(x, _INTS), _splat_int(23)) for x in shifted]
    values = [builder.bitcast(x, _INTS) for x in _horner(builder, fractions, _EXP2)]
    return [builder.bitcast(x, _VECTOR) for x in _each(builder.add, values, exponents)]


def _limit(builder, xs, limit):
    """Return max(x, limit) for a negative limit, else min(x, limit); the limit for NaN."""
    sign = ">" if limit < 0 else "<"
    return [builder.select(builder.fcmp_ordered(sign, x, _splat(limit)), x, _splat(limit)) for x in xs]


def _sigmoid(builder, xs):
    """σ(x), for NaN some number: callers multiply by x."""
    exponents = [builder.fmul(x, _splat(-1.4426950408889634)) for x in xs]
    powers = _exp2(builder, _limit(builder, _limit(builder, exponents, -126.0), 126.0), bounded=True)
    return [builder.fdiv(_splat(1.0), builder.fadd(_splat(1.0), power)) for power in powers]


def _softplus(builder, xs):
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)), and its slope, the sigmoid."""
    zero, one = _splat(0.0), _splat(1.0)
    sizes = [builder.and_(builder.bitcast(x, _INTS), _splat_int(0x7FFFFFFF)) for x in xs]
    sizes = [builder.bitcast(x, _VECTOR) for x in sizes]
    exponents = [builder.fmul(size, _splat(-1.4426950408889634)) for size in sizes]
    ys = _exp2(builder, _limit(builder, exponents, -126.0), bounded=True)
    small = [builder.fcmp_ordered("<", size, _splat(87.0)) for size in sizes]  # beyond, exp underflows to 0
    ys = [builder.select(s, y, zero) for s, y in zip(small, ys, strict=True)]
    tails = _each(builder.fmul, ys, _horner(builder, ys, _LOG1P))
    heads = [builder.select(builder.fcmp_ordered("<", x, zero), zero, x) for x in xs]  # NaN stays NaN
    tops = [builder.select(builder.fcmp_ordered(">", x, zero), one, y) for x, y in zip(xs, ys, strict=True)]
    slopes = [builder.fdiv(top, builder.fadd(one, y)) for top, y in zip(tops, ys, strict=True)]
    return _each(builder.fadd, heads, tails), _or_nan(builder, xs, slopes)


def _silu(builder, xs):
    """x σ(x) and its slope σ(x) (1 + x (1 - σ(x)))."""
    gates = _sigmoid(builder, xs)
    values = _each(builder.fmul, xs, gates)
    rests = [_fma(builder, x, builder.fsub(_splat(1.0), g), _splat(1.0)) for x, g in zip(xs, gates, strict=True)]
    return values, _each(builder.fmul, gates, rests)


def _four(function: Callable) -> Callable:
    """Return an intrinsic of four vectors; the function returns lists of four, joined to one tuple."""

    @intrinsic
    def operation(context, a, b, c, d):
        def build(context, builder, signature, arguments):
            values = function(builder, list(arguments))
            return context.make_tuple(builder, types.UniTuple(vector, count), values)

        return types.UniTuple(vector, count)(vector, vector, vector, vector), build

    probe = ir.IRBuilder(ir.Function(ir.Module(), ir.FunctionType(ir.VoidType(), []), "probe").append_basic_block())
    count = len(function(probe, [_splat(0.0)] * 4))
    return operation


exp2_4 = _four(_exp2)
# without the bounds: every |x| must be at most 126
exp2_bounded_4 = _four(lambda builder, xs: _exp2(builder, xs, bounded=True))
softplus_4 = _four(lambda builder, xs: _softplus(builder, xs)[0])
softplus_slope_4 = _four(lambda builder, xs: [*chain(*_softplus(builder, xs))])
silu_4 = _four(lambda builder, xs: _silu(builder, xs)[0])
silu_slope_4 = _four(lambda builder, xs: [*chain(*_silu(builder, xs))])


@_operation(vector, vector)
def silu(builder, x):
    """Return x σ(x)."""
    return _silu(builder, [x])[0][0]


@_operation(vector, vector)
def silu_slope(builder, x):
    """Return the derivative of x σ(x)."""
    return _silu(builder, [x])[1][0]


@_operation(vector, vector, vector)
def larger(builder, a, b):
    """Return max(a, |b|) of each lane, for a >= 0; NaN if either is NaN."""
    # as integers, the bits of floats without sign have their order, with NaN above all
    a, b = builder.bitcast(a, _INTS), builder.and_(builder.bitcast(b, _INTS), _splat_int(0x7FFFFFFF))
    return builder.bitcast(builder.select(builder.icmp_signed(">", a, b), a, b), _VECTOR)


@_operation(types.boolean, vector, types.float32)
def within(builder, x, limit):
    """Return whether every lane is at most a limit (False with NaN)."""
    bits = builder.bitcast(builder.fcmp_unordered(">", x, _repeat(builder, limit)), ir.IntType(LANES))
    return builder.icmp_unsigned("==", bits, ir.IntType(LANES)(0))


@_operation(types.void, types.int64)
def prefetch(builder, address):
    """Prefetch the cache line at an address, valid or not."""
    byte = ir.IntType(8).as_pointer()
    function = builder.module.globals.get("llvm.prefetch.p0")
    if function is None:
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        function = ir.Function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [_pointer(builder, address, ir.IntType(8)), _I32(0), _I32(3), _I32(1)])


@_operation(types.void, types.int64, *[vector] * 8)
def store_sums(builder, address, v0, v1, v2, v3, v4, v5, v6, v7):
    """Write eight floats, each the sum over the lanes of one vector, added in a fixed order."""
    rows = [v0, v1, v2, v3, v4, v5, v6, v7]
    # fold each vector to eight lanes, then merge pairs: blocks of 8, 4, 2 lanes of each vector, 1 at last
    if LANES == 16:
        first = ir.Constant(ir.VectorType(_I32, 8), list(range(8)))
        second = ir.Constant(ir.VectorType(_I32, 8), list(range(8, 16)))
        rows = [builder.fadd(builder.shuffle_vector(v, v, first), builder.shuffle_vector(v, v, second)) for v in rows]
    for width in (4, 2, 1):
        one, two = [], []
        for start in range(0, 8, 2 * width):
            for source in (0, 8):
                one += [source + start + i for i in range(width)]
                two += [source + start + width + i for i in range(width)]
        merged = []
        half = len(rows) // 2
        for a, b in zip(rows[:half], rows[half:], strict=True):
            left = builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, 8), one))
            right = builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, 8), two))
            merged.append(builder.fadd(left, right))
        rows = merged
    builder.store(rows[0], _pointer(builder, address, ir.VectorType(_F32, 8)), align=4)
