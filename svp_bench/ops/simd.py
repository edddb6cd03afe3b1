"""A vector of eight floats for numba, so that kernels say which operations run side by side instead of hoping for it.

LLVM lowers the vectors to what the processor has: one AVX register, two NEON ones, half an AVX-512 one.
Addresses are integers in bytes.
"""

# mypy: ignore-errors
# numba's extension points are untyped: intrinsics are functions of a typing context that return code generators.

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, register_model

LANES = 8

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


def _binary(name: str) -> Callable:
    @intrinsic
    def operation(context, a, b):
        def build(context, builder, signature, arguments):
            return getattr(builder, name)(*arguments)

        return vector(vector, vector), build

    return operation


add = _binary("fadd")
sub = _binary("fsub")
mul = _binary("fmul")
div = _binary("fdiv")


@intrinsic
def fma(context, a, b, c):
    """a * b + c, rounded once."""

    def build(context, builder, signature, arguments):
        return _fma(builder, *arguments)

    return vector(vector, vector, vector), build


@intrinsic
def splat(context, value):
    """Eight times the same float32."""

    def build(context, builder, signature, arguments):
        one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), arguments[0], _I32(0))
        return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), _splat_int(0))

    return vector(types.float32), build


def _pointer(builder, address, kind):
    return builder.inttoptr(address, kind.as_pointer())


@intrinsic
def load(context, address):
    """Eight neighbouring floats."""

    def build(context, builder, signature, arguments):
        return builder.load(_pointer(builder, arguments[0], _VECTOR), align=4)

    return vector(types.int64), build


@intrinsic
def store(context, address, value):
    """Write eight neighbouring floats."""

    def build(context, builder, signature, arguments):
        builder.store(arguments[1], _pointer(builder, arguments[0], _VECTOR), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, vector), build


@intrinsic
def broadcast(context, address):
    """Eight times the float at an address."""

    def build(context, builder, signature, arguments):
        value = builder.load(_pointer(builder, arguments[0], _F32), align=4)
        one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, _I32(0))
        return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), _splat_int(0))

    return vector(types.int64), build


@intrinsic
def load_float(context, address):
    """One float."""

    def build(context, builder, signature, arguments):
        return builder.load(_pointer(builder, arguments[0], _F32), align=4)

    return types.float32(types.int64), build


@intrinsic
def store_float(context, address, value):
    """Write one float."""

    def build(context, builder, signature, arguments):
        builder.store(arguments[1], _pointer(builder, arguments[0], _F32), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), build


@intrinsic
def load_int(context, address):
    """One int64."""

    def build(context, builder, signature, arguments):
        return builder.load(_pointer(builder, arguments[0], ir.IntType(64)), align=8)

    return types.int64(types.int64), build


@intrinsic
def take(context, address):
    """Add one to the int64 at an address, atomically; return what it was."""

    def build(context, builder, signature, arguments):
        pointer = _pointer(builder, arguments[0], ir.IntType(64))
        return builder.atomic_rmw("add", pointer, ir.IntType(64)(1), "monotonic")

    return types.int64(types.int64), build


# 2^f on [-1/2, 1/2]: minimax of degree 5 with p(0) = 1, relative error 9e-8
_EXP2 = (1.0, 0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957, 0.001326472731307149)
# log1p(y) / y on [0, 1]: minimax of degree 8 with p(0) = 1, relative error 3e-8
_LOG1P = (
    *(1.0, -0.49999648332595825, 0.3332132399082184, -0.24857163429260254, 0.191536545753479),
    *(-0.13753803074359894, 0.07920453697443008, -0.030065791681408882, 0.005364824552088976),
)


def _horner(builder, x, coefficients):
    value = _splat(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = _fma(builder, value, x, _splat(coefficient))
    return value


def _exp2(builder, x):
    low, high = _splat(-126.0), _splat(126.0)
    x = builder.select(builder.fcmp_ordered(">", x, low), x, low)
    x = builder.select(builder.fcmp_ordered("<", x, high), x, high)
    magic = _splat(12582912.0)  # 1.5 · 2²³: adding it rounds to an integer, which then stands in the low bits
    shifted = builder.fadd(x, magic)
    fraction = builder.fsub(x, builder.fsub(shifted, magic))
    value = builder.bitcast(_horner(builder, fraction, _EXP2), _INTS)
    exponent = builder.shl(builder.bitcast(shifted, _INTS), _splat_int(23))
    return builder.bitcast(builder.add(value, exponent), _VECTOR)


@intrinsic
def exp2(context, x):
    """2 to the power of x, relative error below 1e-6; x is cut to ±126 (a NaN becomes the lower bound)."""

    def build(context, builder, signature, arguments):
        return _exp2(builder, arguments[0])

    return vector(vector), build


def _sigmoid(builder, x):
    power = _exp2(builder, builder.fmul(x, _splat(-1.4426950408889634)))
    return builder.fdiv(_splat(1.0), builder.fadd(_splat(1.0), power))


@intrinsic
def sigmoid(context, x):
    """1 / (1 + exp(-x))."""

    def build(context, builder, signature, arguments):
        return _sigmoid(builder, arguments[0])

    return vector(vector), build


@intrinsic
def softplus(context, x):
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|))."""

    def build(context, builder, signature, arguments):
        (x,) = arguments
        zero = _splat(0.0)
        positive = builder.fcmp_ordered(">", x, zero)
        size = builder.select(positive, x, builder.fsub(zero, x))
        y = _exp2(builder, builder.fmul(size, _splat(-1.4426950408889634)))
        tail = builder.fmul(y, _horner(builder, y, _LOG1P))
        tail = builder.select(builder.fcmp_ordered("<", size, _splat(87.0)), tail, zero)  # exp underflows to 0
        return builder.fadd(builder.select(positive, x, zero), tail)

    return vector(vector), build


@intrinsic
def sums(context, v0, v1, v2, v3, v4, v5, v6, v7):
    """Lane i holds the sum over the lanes of the i-th vector, always added up in the same order."""

    def build(context, builder, signature, arguments):
        rows = list(arguments)
        # each level adds halves of two vectors and keeps both results side by side: 8 → 4 → 2 → 1 vectors
        for width in (4, 2, 1):
            left, right = [], []
            for start in range(0, LANES, 2 * width):
                left += [start + i for i in range(width)]
                right += [start + width + i for i in range(width)]
            merged = []
            half = len(rows) // 2
            for a, b in zip(rows[:half], rows[half:], strict=True):
                # the sums of `a` go where the first part of each block is, those of `b` where the second is
                order_a, order_b = [], []
                for start in range(0, LANES, 2 * width):
                    order_a += [start + i for i in range(width)] + [LANES + start + i for i in range(width)]
                    order_b += [start + width + i for i in range(width)] + [
                        LANES + start + width + i for i in range(width)
                    ]
                one = builder.shuffle_vector(a, b, ir.Constant(_INTS, order_a))
                two = builder.shuffle_vector(a, b, ir.Constant(_INTS, order_b))
                merged.append(builder.fadd(one, two))
            rows = merged
        return rows[0]

    return vector(*[vector] * LANES), build
