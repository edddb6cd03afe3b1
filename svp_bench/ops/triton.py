"""The Triton backend: fused kernels for CUDA, compiled by Triton at the first call; no compiler needed.

One kernel forward and one backward for the scan of both directions with softplus, skip, gate and mean; another pair for
convolution and SiLU. Nothing is flipped or transposed. The kernels are in triton_kernels.py, and are operators of
torch.library, so that compiled and traced models hold them as one node.

TRITON_INTERPRET=1 in the environment lets Triton interpret the kernels with NumPy on the CPU, slowly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from svp_bench.ops import triton_launch
from svp_bench.ops.autograd import FIELDS, conv_function, scan_function
from svp_bench.ops.triton_launch import DTYPES, operator, power_of_two, rows, spread, written
from svp_bench.ops.triton_norm import add_norm as add_norm  # part of this backend
from svp_bench.ops.triton_norm import add_prompts as add_prompts
from svp_bench.ops.types import Flags, Tensors

_WEIGHTS = (2, 5, 6)  # of these: A, D and the bias
_OLDEST = (8, 0)  # of the compute capabilities: before it, no bfloat16

# Sizes of a program: steps of a tile, channels, warps. Selected so that no register spills (benchmarks/triton_aot.py),
# not by time measurements.
SCAN_FORWARD = {"T": 4, "BE": 32, "num_warps": 1, "maxnreg": 192}  # without maxnreg the compiler may spill
SCAN_BACKWARD = {"T": 4, "BE": 32, "num_warps": 1}
# For gradients of weights, and from sm_100 on, where paired multiplications take paired registers.
SCAN_BACKWARD_WIDE = {"T": 4, "BE": 32, "num_warps": 2}
_PAIRED = 10  # of the compute capability
CONV = {"BL": 8, "BE": 128, "num_warps": 4}
CONV_OF_WEIGHTS = {"num_warps": 8}  # with gradients of weights
_LANES = 4  # threads that share the states of a channel
_STATES = 16  # for T steps of a tile


def unavailable() -> str | None:
    """Return why the kernels cannot run on this machine, or None if they can."""
    try:
        interpreted = triton_launch.interpreted()
    except Exception as error:  # a broken triton raises many kinds
        return f"triton cannot be imported ({type(error).__name__}: {error}); `pip install triton` (Linux)"
    if interpreted:
        return None
    if not torch.cuda.is_available():
        return "it needs a CUDA device, and torch sees none (TRITON_INTERPRET=1 lets it run on the CPU, very slowly)"
    if torch.version.hip is not None:
        return "it is written for GPUs of NVIDIA and was never tried on others"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < _OLDEST:
        return (
            f"it needs a GPU of compute capability {_OLDEST[0]}.{_OLDEST[1]} or later, and this one has {major}.{minor}"
        )
    return None


def unsupported(device: str, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot take such tensors, or None if they can."""
    if dtype not in DTYPES:
        return f"it takes float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if device == "cpu" and not triton_launch.interpreted():
        return "it runs on CUDA devices; on the CPU only with TRITON_INTERPRET=1, very slowly"
    if device not in ("cpu", "cuda"):
        return f"it runs on CUDA devices, not on {device}"
    return None


def _scan_forward(tensors: Tensors, reverse: Flags, softplus: bool, save: bool) -> tuple[Tensor, list[Tensor]]:
    return torch.ops.svp_bench.triton_scan(tensors, reverse, softplus), []


def _scan_backward(
    grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], reverse: Flags, softplus: bool, wanted: Flags
) -> list[Tensor | None]:
    grads = torch.ops.svp_bench.triton_scan_backward(grad, tensors, reverse, softplus, list(wanted))
    return spread(grads, wanted)


def _conv_forward(x: Tensor, parameters: Tensors, reverse: Flags, silu: bool) -> Sequence[Tensor]:
    outs: Sequence[Tensor] = torch.ops.svp_bench.triton_conv(x, parameters, reverse, silu)
    return outs


def _conv_backward(
    grads: Sequence[Tensor], x: Tensor, parameters: Tensors, reverse: Flags, silu: bool, wanted: Flags
) -> list[Tensor | None]:
    return spread(torch.ops.svp_bench.triton_conv_backward(grads, x, parameters, reverse, silu, wanted), wanted)


scan = scan_function(_scan_forward, _scan_backward)
conv = conv_function(_conv_forward, _conv_backward)


# Operators. Their inputs are lists, for one direction or two.


def _like(tensors: Tensors, wanted: Flags) -> list[Tensor]:
    """Return an empty contiguous tensor for each wanted gradient."""
    found = []
    for tensor, want in zip(tensors, wanted, strict=True):
        if want:
            assert tensor is not None
            found.append(tensor.new_empty(tensor.shape))
    return found


def _scan_op(tensors: Tensors, reverse: Flags, softplus: bool) -> Tensor:
    """Run the scan; `tensors` are z, then the seven fields of each direction."""
    problem = _Problem(tensors, reverse, softplus)
    out = problem.u.new_empty(problem.u.shape, dtype=written(problem.u.dtype))
    if out.numel():
        problem.forward(out)
    return out.to(problem.u.dtype)


def _scan_backward_op(grad: Tensor, tensors: Tensors, reverse: Flags, softplus: bool, wanted: Flags) -> list[Tensor]:
    """Return the wanted gradients, in the order of the tensors."""
    problem = _Problem(tensors, reverse, softplus)
    if not problem.u.numel():
        return [t.zero_() for t in _like(tensors, wanted)]
    return problem.backward(grad, tensors, wanted)


def _conv_op(x: Tensor, parameters: Tensors, reverse: Flags, silu: bool) -> list[Tensor]:
    """Run the convolutions; `parameters` are the weights of all directions, then the biases."""
    outs = [x.new_empty(x.shape, dtype=written(x.dtype)) for _ in reverse]
    if x.numel():
        _launch_conv(outs, x, parameters, reverse, silu)
    return [out.to(x.dtype) for out in outs]


def _conv_backward_op(
    grads: Sequence[Tensor], x: Tensor, parameters: Tensors, reverse: Flags, silu: bool, wanted: Flags
) -> list[Tensor]:
    """Return the wanted gradients of x and of the parameters, in their order."""
    if not x.numel():
        return [t.zero_() for t in _like([x, *parameters], wanted)]
    return _launch_conv_backward(grads, x, parameters, reverse, silu, wanted)


operator(
    "triton_scan(Tensor?[] tensors, bool[] reverse, bool softplus) -> Tensor",
    _scan_op,
    lambda tensors, reverse, softplus: tensors[1].new_empty(tensors[1].shape),
)
operator(
    "triton_scan_backward(Tensor grad, Tensor?[] tensors, bool[] reverse, bool softplus, bool[] wanted) -> Tensor[]",
    _scan_backward_op,
    lambda grad, tensors, reverse, softplus, wanted: _like(tensors, wanted),
)
operator(
    "triton_conv(Tensor x, Tensor?[] parameters, bool[] reverse, bool silu) -> Tensor[]",
    _conv_op,
    lambda x, parameters, reverse, silu: [x.new_empty(x.shape) for _ in reverse],
)
operator(
    "triton_conv_backward(Tensor[] grads, Tensor x, Tensor?[] parameters, bool[] reverse, bool silu, bool[] wanted)"
    " -> Tensor[]",
    _conv_backward_op,
    lambda grads, x, parameters, reverse, silu, wanted: _like([x, *parameters], wanted),
)


class _Problem:
    """Arguments of the scan kernels."""

    def __init__(self, tensors: Tensors, reverse: Flags, softplus: bool) -> None:
        z, *flat = tensors
        u, A = flat[0], flat[2]
        assert u is not None
        assert A is not None
        self.u = u
        self.batch, self.length, self.channels = u.shape
        self.states = A.shape[-1]
        self.count = len(reverse)
        padded = power_of_two(self.states)
        lanes = min(padded, _LANES)
        self.z = None if z is None else rows(z)
        self.shared: dict[str, Any] = {
            "z": self.z,
            "z_image": 0 if self.z is None else self.z.stride(0),
            "z_row": 0 if self.z is None else self.z.stride(1),
            "length": self.length,
            "channels": self.channels,
            "states": self.states,
            "one": 1,
            "SOFTPLUS": softplus,
            "K": self.count,
            "N1": padded // lanes,
            "N2": lanes,
        }
        names = ("u", "delta", "A", "B", "C", "D", "bias")
        for k in range(2):
            fields = flat[FIELDS * k : FIELDS * (k + 1)] if k < self.count else [None] * FIELDS
            for name, tensor in zip(names, fields, strict=True):
                own = None if tensor is None else rows(tensor)
                self.shared[f"{name}{k}"] = own
                if name in ("u", "delta", "B", "C"):
                    self.shared[f"{name}{k}_image"] = 0 if own is None else own.stride(0)
                if name in ("u", "delta", "A", "B", "C"):
                    self.shared[f"{name}{k}_row"] = 0 if own is None else own.stride(-2)
            self.shared[f"REVERSE{k}"] = k < self.count and reverse[k]

    def _sizes(self, sizes: dict[str, int]) -> tuple[dict[str, int], int]:
        """Return the sizes of a program and the programs per image, smaller for few channels or steps."""
        block = min(sizes["BE"], power_of_two(self.channels))
        padded = self.shared["N1"] * self.shared["N2"]
        steps = max(1, sizes["T"] * _STATES // max(padded, _STATES))  # a thread holds its states of all steps of a tile
        own = {**sizes, "BE": block, "T": min(steps, power_of_two(self.length))}
        # A fused multiply-add would round a sum over threads differently in each thread, and the thread that is read is
        # unspecified.
        own["enable_fp_fusion"] = own == sizes and padded > _LANES
        return own, -(-self.channels // block)

    def forward(self, out: Tensor) -> None:
        sizes, blocks = self._sizes(SCAN_FORWARD)
        partial = None
        if self.count == 2:
            # if several threads hold an entry, one could read a value that another has overwritten
            alone = out.dtype == torch.float32 and sizes["T"] * sizes["BE"] >= 32 * sizes["num_warps"]
            partial = out if alone else torch.empty_like(out, dtype=torch.float32)
        triton_launch.launch(
            "scan_forward", self.batch * blocks, {**self.shared, **sizes, "out": out, "partial": partial}
        )

    def backward(self, grad: Tensor, tensors: Tensors, wanted: Flags) -> list[Tensor]:
        weights = any(wanted[1 + FIELDS * k + place] for k in range(self.count) for place in _WEIGHTS)
        wide = weights or triton_launch.capability(self.u) >= _PAIRED
        sizes, blocks = self._sizes(SCAN_BACKWARD_WIDE if wide else SCAN_BACKWARD)
        grad = rows(grad)
        tiles = -(-self.length // sizes["T"])
        shared = self.shared

        def empty(*shape: int) -> Tensor:
            return grad.new_empty(shape, dtype=torch.float32)

        own: dict[str, Any] = {"dz": torch.empty_like(self.u, **_dense(self.z)) if wanted[0] else None}
        forms = {
            "dA": (self.batch, self.channels, self.states),
            "dB": (self.batch, blocks, self.length, self.states),
            "dC": (self.batch, blocks, self.length, self.states),
            "dD": (self.batch, self.channels),
            "dbias": (self.batch, self.channels),
        }
        names = ("du", "ddelta", "dA", "dB", "dC", "dD", "dbias")
        for k in range(2):
            want = wanted[1 + FIELDS * k : 1 + FIELDS * (k + 1)] if k < self.count else [False] * FIELDS
            for name, asked in zip(names, want, strict=True):
                shape = forms.get(name)
                if not asked:
                    own[f"{name}{k}"] = None
                elif shape is None:
                    own[f"{name}{k}"] = torch.empty_like(self.u, **_dense(shared[f"{name[1:]}{k}"]))
                else:
                    own[f"{name}{k}"] = empty(*shape)
            own[f"ASKED{k}"] = any(want) or (k < self.count and wanted[0])
        two = self.count == 2 and wanted[0]
        own["partial"] = empty(*self.u.shape) if two else None
        own["before"] = None
        if any(own[f"{name}{k}"] is not None for name in ("ddelta", "dA", "dbias") for k in range(2)):
            # transient: the states before each tile, of one direction after the other
            own["before"] = empty(self.batch, blocks, tiles, shared["N1"] * shared["N2"] * sizes["BE"])
        own |= {"grad": grad, "grad_image": grad.stride(0), "grad_row": grad.stride(1)}
        triton_launch.launch("scan_backward", self.batch * blocks, {**shared, **sizes, **own})
        order = ["dz", *(f"{name}{k}" for k in range(self.count) for name in names)]
        found = []
        for name, tensor, asked in zip(order, tensors, wanted, strict=True):
            if asked:
                assert tensor is not None
                value: Tensor = own[name]
                if name[:-1] in forms:  # partial sums of blocks of channels, or of images
                    value = value.sum(dim=1 if name[:-1] in ("dB", "dC") else 0)
                found.append(value.to(tensor.dtype))
        return found


def _dense(like: Tensor | None) -> dict[str, Any]:
    assert like is not None
    return {"dtype": written(like.dtype), "memory_format": torch.contiguous_format}


def _conv_arguments(x: Tensor, parameters: Tensors, reverse: Flags, silu: bool) -> tuple[dict[str, Any], int, int]:
    """Return the arguments of the convolution kernels, the programs, and those per block of channels."""
    count = len(reverse)
    batch, length, channels = x.shape
    sizes = {**CONV, "BE": min(CONV["BE"], power_of_two(channels)), "BL": min(CONV["BL"], power_of_two(length))}
    x = rows(x)
    shared: dict[str, Any] = {**sizes, "x": x, "x_image": x.stride(0), "x_row": x.stride(1)}
    shared |= {"length": length, "channels": channels, "SILU": silu}
    for k in range(2):
        weight, bias = (parameters[k], parameters[count + k]) if k < count else (None, None)
        weight = None if weight is None else rows(weight)
        shared[f"weight{k}"] = weight
        shared[f"weight{k}_row"] = 0 if weight is None else weight.stride(0)
        shared[f"bias{k}"] = None if bias is None else rows(bias)
        shared[f"SIGN{k}"] = -1 if k < count and reverse[k] else 1
    shared["W"] = shared["weight0"].shape[-1]
    shares = batch * -(-length // sizes["BL"])
    return shared, shares * -(-channels // sizes["BE"]), shares


def _launch_conv(outs: Sequence[Tensor], x: Tensor, parameters: Tensors, reverse: Flags, silu: bool) -> None:
    shared, programs, _ = _conv_arguments(x, parameters, reverse, silu)
    own = {"out0": outs[0], "out1": outs[1] if len(outs) == 2 else None, "K": len(outs)}
    triton_launch.launch("conv_forward", programs, {**shared, **own})


def _launch_conv_backward(
    grads: Sequence[Tensor], x: Tensor, parameters: Tensors, reverse: Flags, silu: bool, wanted: Flags
) -> list[Tensor]:
    shared, programs, shares = _conv_arguments(x, parameters, reverse, silu)
    count, channels, width = len(reverse), x.shape[-1], shared["W"]
    dx = x.new_empty(x.shape, dtype=written(x.dtype)) if wanted[0] else None
    own: dict[str, Any] = {"dx": dx}
    for k in range(2):
        want_weight, want_bias = (wanted[1 + k], wanted[1 + count + k]) if k < count else (False, False)
        grad = rows(grads[k]) if k < count else None
        own[f"grad{k}"] = grad
        own[f"grad{k}_image"] = 0 if grad is None else grad.stride(0)
        own[f"grad{k}_row"] = 0 if grad is None else grad.stride(1)
        own[f"dweight{k}"] = x.new_empty(shares, width, channels, dtype=torch.float32) if want_weight else None
        own[f"dbias{k}"] = x.new_empty(shares, channels, dtype=torch.float32) if want_bias else None
        own[f"ASKED{k}"] = want_weight or want_bias or (k < count and wanted[0])
    # sums over threads, see `_sizes`
    options = {**CONV_OF_WEIGHTS, "enable_fp_fusion": False} if any(wanted[1:]) else {}
    triton_launch.launch("conv_backward", programs, {**shared, **own, **options})
    found = [] if dx is None else [dx.to(x.dtype)]
    for i, parameter in enumerate(parameters):
        if wanted[1 + i]:
            assert parameter is not None
            partial: Tensor = own[f"{'dweight' if i < count else 'dbias'}{i % count}"]
            total = partial.sum(dim=0)
            found.append((total.mT if i < count else total).to(parameter.dtype).contiguous())
    return found
