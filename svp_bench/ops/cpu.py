"""The CPU backend: fused kernels, compiled by numba on the user's machine; no compiler needed.

One kernel forward and one backward for the scan of both directions with softplus, skip and gate; another pair for
convolution and SiLU. Nothing is flipped or transposed. The backward pass recomputes the states from one saved every 16
steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from svp_bench.ops.autograd import FIELDS, conv_function, scan_function
from svp_bench.ops.norm import norm_functions
from svp_bench.ops.threads import run_kernel
from svp_bench.ops.types import Direction, Flags, Recompute, Tensors

_DENSE: Any = {"memory_format": torch.contiguous_format}
_TASKS = 16  # at least so many tasks, for many cores at batch 1; fixed, so that the order of sums is fixed


def unavailable() -> str | None:
    """Return why the kernels cannot run on this machine, or None if they can."""
    try:
        import numba  # noqa: F401
    except Exception as error:  # a broken numba raises many kinds
        return f"numba cannot be imported ({type(error).__name__}: {error}); `pip install numba`"
    return None


def unsupported(device: str, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot take such tensors, or None if they can."""
    if device != "cpu":
        return f"it runs on CPUs, not on {device}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in float32, not in {str(dtype).removeprefix('torch.')}"
    return None


def _pad(tensor: Tensor, widths: Sequence[int]) -> Tensor:
    tensor = tensor.detach().float()
    return pad(tensor, widths) if any(widths) else tensor  # a call of `pad` costs 4 µs, also for no padding


def _rows(tensor: Tensor, width: int) -> Tensor:
    """Return (B, L, X) as float32 with adjacent channels, padded with zeros to `width`."""
    tensor = _pad(tensor, (0, width - tensor.shape[-1]))
    return tensor if tensor.stride(-1) == 1 or not tensor.numel() else tensor.contiguous()


def _table(tensor: Tensor, rows: int) -> Tensor:
    """Return (E, X) as contiguous float32, padded with zeros to `rows`."""
    return _pad(tensor, (0, 0, 0, rows - tensor.shape[0])).contiguous()


def _vector(tensor: Tensor | None, width: int, like: Tensor) -> Tensor:
    """Return (E,) as float32, padded with zeros to `width`; zeros for None."""
    if tensor is None:
        return like.new_zeros(width, dtype=torch.float32)
    return _pad(tensor, (0, width - tensor.shape[0])).contiguous()


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


class _Block:
    """The int64 block that a kernel reads, and the tensors whose addresses it holds."""

    def __init__(
        self,
        shared: Mapping[str, Any],
        directions: Sequence[Mapping[str, Any]],
        shared_fields: Sequence[str],
        direction_fields: Sequence[str],
    ) -> None:
        self.tensors: list[Tensor] = []
        values = [self._value(shared[name]) if name in shared else 0 for name in shared_fields]
        for fields in directions:
            values += [self._value(fields[name]) if name in fields else 0 for name in direction_fields]
        self.array = np.array(values, dtype=np.int64)

    def _value(self, value: Tensor | int | bool | None) -> int:
        if type(value) is int:
            return value
        if isinstance(value, Tensor):
            # a kernel reads any address without checks
            if value.device.type != "cpu" or value.dtype != torch.float32 or (value.numel() and not value.data_ptr()):
                raise ValueError(
                    f"the cpu backend takes tensors in the CPU's memory, not one on {value.device} "
                    f"({str(value.dtype).removeprefix('torch.')}); put all tensors of a call on one device"
                )
            self.tensors.append(value)
            return value.data_ptr()
        return int(value or 0)

    def run(self, name: str, tasks: int) -> None:
        from svp_bench.ops.compiled import kernel

        run_kernel(kernel(name), self.array.ctypes.data, tasks)


def _scan_forward(tensors: Tensors, reverse: Flags, softplus: bool, save: bool) -> tuple[Tensor, list[Tensor]]:
    u = tensors[1]
    assert u is not None
    if not u.numel():
        return torch.empty_like(u), []
    return _Problem(tensors, reverse, softplus).forward(u.dtype, save)


def _scan_backward(
    grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], reverse: Flags, softplus: bool, wanted: Flags
) -> list[Tensor | None]:
    if grad.numel():
        states = [state.contiguous() for state in saved]
        grads = _Problem(tensors, reverse, softplus).backward(grad, states, wanted)
    else:
        grads = [None if t is None else torch.zeros_like(t) for t in tensors]
    return [
        g.to(t.dtype) if want and g is not None and t is not None else None
        for g, t, want in zip(grads, tensors, wanted, strict=True)
    ]


_scan = scan_function(_scan_forward, _scan_backward)


def scan(
    directions: Sequence[Direction],
    reverse: Flags,
    z: Tensor | None,
    softplus: bool,
    recompute: Recompute | None = None,  # unused: it saves a tenth of a step's memory and costs 2 % of its time
) -> Tensor:
    """Return the mean over K directions of their selective scans, gated by SiLU(z); see `ops.autograd`."""
    return _scan(directions, reverse, z, softplus)


class _Problem:
    """The tensors of one scan in the layout of the kernels."""

    def __init__(self, tensors: Tensors, reverse: Flags, softplus: bool) -> None:
        from svp_bench.ops import cpu_kernels as kernels

        z, *flat = tensors
        first, A_first = flat[0], flat[2]
        assert first is not None
        assert A_first is not None
        self.batch, self.length, self.channels = first.shape
        self.states = A_first.shape[-1]
        self.wide = _up(self.channels, kernels.UNIT)
        self.padded = _up(self.states, 8)
        self.tiles, self.units = self.wide // kernels.TILE, self.wide // kernels.UNIT
        self.groups = min(self.units, max(1, -(-_TASKS // self.batch)))
        self.chunks = _up(self.length, kernels.CHUNK) // kernels.CHUNK
        self.z = None if z is None else _rows(z, self.wide)
        self.layout = (kernels.SHARED, kernels.DIRECTION)
        self.shared: dict[str, Any] = {
            "batch": self.batch,
            "length": self.length,
            "channels": self.wide,
            "states": self.states,
            "directions": len(reverse),
            "softplus": softplus,
            "chunks": self.chunks,
            "groups": self.groups,
            "z": self.z,
            "z_batch": 0 if self.z is None else 4 * self.z.stride(0),
            "z_row": 0 if self.z is None else 4 * self.z.stride(1),
        }
        self.directions: list[dict[str, Any]] = []
        for i, back in enumerate(reverse):
            u, delta, A, B, C, D, bias = flat[i * FIELDS : (i + 1) * FIELDS]
            assert A is not None
            fields: dict[str, Any] = {"reverse": back, "A": _table(A, self.wide), "A_row": 4 * self.states}
            for name, tensor, width in (
                ("u", u, self.wide),
                ("delta", delta, self.wide),
                ("B", B, self.padded),
                ("C", C, self.padded),
            ):
                assert tensor is not None
                rows = _rows(tensor, width)
                fields |= {name: rows, f"{name}_batch": 4 * rows.stride(0), f"{name}_row": 4 * rows.stride(1)}
            fields["D"] = _vector(D, self.wide, first)
            fields["bias"] = _vector(bias, self.wide, first)
            self.directions.append(fields)

    def forward(self, dtype: torch.dtype, save: bool) -> tuple[Tensor, list[Tensor]]:
        out = self.directions[0]["u"].new_empty(self.batch, self.length, self.wide)
        saved: list[Tensor] = []
        if save:
            shape = (self.batch, self.tiles, self.chunks, self.padded, self.wide // self.tiles)
            saved = [out.new_empty(shape) for _ in self.directions]
        tasks = self.batch * self.units
        own = [{**fields, "saved": saved[i] if save else None} for i, fields in enumerate(self.directions)]
        _Block({**self.shared, "tasks": tasks, "out": out}, own, *self.layout).run("scan_forward", tasks)
        return out[..., : self.channels].to(dtype), saved

    def backward(self, grad: Tensor, saved: Sequence[Tensor], wanted: Flags) -> list[Tensor | None]:
        dout = _rows(grad, self.wide)
        groups = self.groups
        need_A = any(wanted[1 + i] for i in range(len(wanted) - 1) if i % FIELDS in (2, 5))
        rows = (self.batch, self.length, self.wide)
        dz = dout.new_empty(rows) if wanted[0] else None
        own = []
        for fields, states in zip(self.directions, saved, strict=True):
            results = {name: dout.new_empty(rows) for name in ("du", "ddelta")}
            results |= {name: dout.new_empty(groups, self.batch, self.length, self.padded) for name in ("dB", "dC")}
            if need_A:
                results["dA"] = dout.new_empty(self.batch, self.tiles, self.padded, self.wide // self.tiles)
                results["dD"] = dout.new_empty(self.batch, self.wide)
            own.append({**fields, "saved": states, **results})
        tasks = self.batch * groups
        shared = {**self.shared, "tasks": tasks, "need_A": need_A, "dz": dz, "dout": dout}
        shared |= {"dout_batch": 4 * dout.stride(0), "dout_row": 4 * dout.stride(1)}
        _Block(shared, own, *self.layout).run("scan_backward", tasks)
        grads: list[Tensor | None] = [None if dz is None else dz[..., : self.channels]]
        for i, d in enumerate(own):
            want = wanted[1 + i * FIELDS : 1 + (i + 1) * FIELDS]
            for name in ("du", "ddelta"):
                d[name] = d[name][..., : self.channels]
            dA = None
            if want[2]:
                dA = d["dA"].sum(dim=0).transpose(1, 2).reshape(self.wide, self.padded)
                dA = dA[: self.channels, : self.states]
            grads += [
                d["du"],
                d["ddelta"],
                dA,
                _over_groups(d["dB"])[..., : self.states] if want[3] else None,
                _over_groups(d["dC"])[..., : self.states] if want[4] else None,
                d["dD"].sum(dim=0)[: self.channels] if want[5] else None,
                d["ddelta"].sum(dim=(0, 1)) if want[6] else None,
            ]
        return grads


def _over_groups(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(dim=0)


def _conv_forward(x: Tensor, parameters: Tensors, reverse: Flags, silu: bool) -> list[Tensor]:
    batch, length, channels = x.shape
    block, wide, rows = _conv_block(x, reverse, silu, parameters)
    outs = [x.new_empty(batch, length, wide, dtype=torch.float32) for _ in reverse]
    own = [{**row, "out": out} for row, out in zip(rows, outs, strict=True)]
    _run_conv("conv_forward", block, own, batch * wide, x.numel())
    return [out[..., :channels].to(x.dtype) for out in outs]


def _conv_backward(
    grads: Sequence[Tensor], x: Tensor, parameters: Tensors, reverse: Flags, silu: bool, wanted: Flags
) -> list[Tensor | None]:
    batch, length, channels = x.shape
    count, (need_x, *need) = len(reverse), wanted
    block, wide, rows = _conv_block(x, reverse, silu, parameters)
    empty = partial(x.new_empty if x.numel() else x.new_zeros, dtype=torch.float32)
    dx = empty((batch, length, wide)) if need_x else None
    own = []
    for i, (row, grad) in enumerate(zip(rows, grads, strict=True)):
        dout = _rows(grad, wide)
        fields = {**row, "dout": dout, "dout_batch": 4 * dout.stride(0), "dout_row": 4 * dout.stride(1)}
        fields["dweight"] = empty((batch, block["width"], wide)) if need[i] else None
        fields["dbias"] = empty((batch, wide)) if need[count + i] else None
        own.append(fields)
    _run_conv("conv_backward", {**block, "dx": dx}, own, batch * wide, x.numel())
    found: list[Tensor | None] = [None if dx is None else dx[..., :channels].to(x.dtype)]
    for i, parameter in enumerate(parameters):
        field = own[i % count]["dweight" if i < count else "dbias"]
        if field is None or parameter is None:
            found.append(None)
            continue
        total = field.sum(dim=0)
        found.append((total.mT[:channels] if i < count else total[:channels]).to(parameter.dtype))
    return found


conv = conv_function(_conv_forward, _conv_backward)


def _conv_block(
    x: Tensor, reverse: Flags, silu: bool, parameters: Tensors
) -> tuple[dict[str, Any], int, list[dict[str, Any]]]:
    """Return the shared fields, the padded channels, and the fields of each direction."""
    from svp_bench.ops import cpu_kernels as kernels

    wide = _up(x.shape[-1], kernels.UNIT)
    rows = _rows(x, wide)
    count = len(reverse)
    first = parameters[0]
    assert first is not None
    shared: dict[str, Any] = {"length": x.shape[1], "channels": wide, "directions": count, "silu": silu}
    shared |= {"width": first.shape[-1], "x": rows, "x_batch": 4 * rows.stride(0), "x_row": 4 * rows.stride(1)}
    own = []
    for i, back in enumerate(reverse):
        weight = parameters[i]
        assert weight is not None
        own.append({"reverse": back, "weight": _table(weight, wide), "bias": _vector(parameters[count + i], wide, x)})
    return shared, wide, own


def _run_conv(name: str, shared: dict[str, Any], own: Sequence[dict[str, Any]], lanes: int, numel: int) -> None:
    from svp_bench.ops import cpu_kernels as kernels

    tasks = lanes // kernels.UNIT
    if numel:
        _Block({**shared, "tasks": tasks}, own, kernels.CONV_SHARED, kernels.CONV_DIRECTION).run(name, tasks)


def _supported(*tensors: Tensor | None) -> bool:
    """Whether the row kernels support these: float32 rows of whole vectors."""
    return all(t is None or (t.dtype == torch.float32 and t.shape[-1] % 16 == 0 and t.numel() > 0) for t in tensors)


def _norm_forward(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    terms: Sequence[Tensor],
    excluded: int | None,
) -> tuple[list[Tensor], list[Tensor]]:
    own = _term_fields(terms)
    out = torch.empty_like(hidden, **_DENSE)
    if weight is None:
        _run_rows("prompt_forward", hidden, {"x": hidden.contiguous(), "out": out}, own, excluded)
        return [out], []
    normed, scales = torch.empty_like(out), hidden.new_empty(hidden[..., 0].numel())
    fields = {"hidden": hidden.contiguous(), "residual": None if residual is None else residual.contiguous()}
    fields |= {"total": out, "normed": normed, "scales": scales, "weight": weight.contiguous()}
    _run_rows("norm_forward", hidden, {**fields, "eps": hidden.new_full((1,), eps)}, own, excluded)
    return [out, normed], [out, weight, scales]


def _norm_backward(
    grads: Tensors,
    saved: Sequence[Tensor],
    terms: Sequence[Tensor],
    eps: float,
    excluded: int | None,
    dtype: torch.dtype,
    wanted: Flags,
) -> list[Tensor | None]:
    from svp_bench.ops.cpu_kernels import ROWS

    like = next(grad for grad in grads if grad is not None)
    rows = [torch.zeros_like(like) if grad is None else grad.contiguous() for grad in grads]
    tasks = -(-like[..., 0].numel() // ROWS)
    own = _term_fields(terms)
    for term in own:
        pre = term["pre"]
        term |= {"dpre": torch.empty_like(pre), "dscale": pre.new_empty(tasks, pre.shape[-1])}
    dhidden, dweight = grads[0], None
    if saved:
        total, weight, scales = (t.contiguous() for t in saved)  # a saved-tensor hook may change strides
        dhidden = torch.empty_like(total)
        dweight = total.new_empty(tasks, len(weight)) if wanted[2] else None
        fields = {"total": total, "weight": weight, "scales": scales, "dtotal": rows[0], "dnormed": rows[1]}
        _run_rows("norm_backward", total, {**fields, "dhidden": dhidden, "dweight": dweight}, own, excluded)
    else:
        _run_rows("prompt_backward", like, {"dout": rows[0]}, own, excluded)
    found = [dhidden if wanted[0] else None, dhidden if wanted[1] else None]
    found += [None if dweight is None else dweight.sum(dim=0)]
    for i, term in enumerate(own):
        found += [term["dscale"].sum(dim=0) if wanted[3 + 2 * i] else None, term["dpre"] if wanted[4 + 2 * i] else None]
    return found


def _term_fields(terms: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    return [{"scale": s.contiguous(), "pre": p.contiguous()} for s, p in zip(terms[::2], terms[1::2], strict=True)]


def _run_rows(
    name: str, like: Tensor, fields: Mapping[str, Any], own: Sequence[Mapping[str, Any]], excluded: int | None
) -> None:
    """Run a kernel over the rows of a tensor (B, L, D)."""
    from svp_bench.ops import cpu_kernels as kernels

    tasks = -(-like[..., 0].numel() // kernels.ROWS)
    shared = {**fields, "tasks": tasks, "rows": like[..., 0].numel(), "width": like.shape[-1], "length": like.shape[1]}
    shared |= {"terms": len(own), "excluded": -1 if excluded is None else excluded}
    layout = kernels.NORM if name.startswith("norm") else kernels.PROMPT
    _Block(shared, own, layout, kernels.PROMPT_TERM).run(name, tasks)


add_norm, add_prompts = norm_functions(_supported, _norm_forward, _norm_backward)
