"""The tables of test_ops.py and triton_table.py on a GPU, and what only a GPU can show.

test_gpu.py runs this file in a process of its own, whose default device is the GPU: there lies each tensor that a test
makes. SVP_BENCH_TABLE_DEVICE=cpu runs it on a CPU (with TRITON_INTERPRET=1, some of it very slowly).
"""

from __future__ import annotations

import os

import pytest
import torch
from test_ops import (  # noqa: F401 (what takes the fixture `backend` below)
    BACKENDS,
    assert_scan,
    draw,
    test_a_frozen_scan_keeps_nothing,
    test_an_expanded_cotangent,
    test_autocast_does_not_reach_into_the_scan,
    test_both_directions_at_once_are_two_scans,
    test_convolution,
    test_convolution_agrees_with_pytorch,
    test_convolution_in_both_directions,
    test_directions_without_skip_and_bias,
    test_empty_batch,
    test_extreme_step_sizes,
    test_gates_far_out,
    test_lengths,
    test_only_one_of_the_two_convolutions_is_trained,
    test_only_the_gradient_that_was_asked_for,
    test_optional_inputs,
    test_reruns_are_equal_to_the_last_bit,
    test_saved_tensors_are_of_the_size_of_the_inputs,
    test_sizes,
    test_strided_inputs,
    test_the_backbones_length,
    test_what_can_be_made_again_is_not_kept,
)
from torch import Tensor
from triton_table import (  # noqa: F401
    test_add_norm,
    test_add_prompts,
    test_each_gradient_of_rows_alone,
    test_float16,
    test_made_again_checkpointed_compiled_and_under_autocast,
    test_rows_checkpointed_and_compiled,
    test_rows_that_kernels_do_not_take,
    test_two_convolutions,
)

from svp_bench.core.errors import UnavailableError
from svp_bench.ops import Direction, PromptTerms, add_norm, bidirectional_conv, bidirectional_scan, choose

DEVICE = os.environ.get("SVP_BENCH_TABLE_DEVICE", "cuda")
REPETITIONS = int(os.environ.get("SVP_BENCH_REPETITIONS", "200"))
torch.set_default_device(DEVICE)
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def runs(name: str) -> bool:
    try:
        choose(name, DEVICE, torch.float32)
    except UnavailableError:
        return False
    return True


@pytest.fixture(params=[name for name in BACKENDS if runs(name)])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("length", "state", "dim"),
    [(1, 24, 31), (7, 5, 200), (8, 16, 96), (9, 1, 33), (64, 16, 768), (197, 16, 384), (301, 24, 7), (730, 8, 65)],
)
def test_long_and_odd(length: int, state: int, dim: int, dtype: torch.dtype, backend: str) -> None:
    assert_scan(draw(length, state, dim, 2, dtype=dtype, wide=torch.float32), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repetitions_are_equal_to_the_last_bit(dtype: torch.dtype) -> None:
    """All kernels of a layer of Vim-S, forward and backward with every gradient, at the batch of a training step."""
    batch, length, width, states = (16, 197, 384, 16) if DEVICE == "cuda" else (1, 9, 8, 2)
    channels = 2 * width
    ours = "triton" if runs("triton") else "auto"

    def rows(size: int) -> Tensor:
        return torch.randn(batch, length, size).to(dtype)

    def direction() -> list[Tensor]:
        A = -torch.arange(1.0, states + 1).repeat(channels, 1)
        skip, bias = torch.randn(channels), torch.randn(channels) - 3
        return [rows(channels), A, rows(states), rows(states), skip, bias]

    parts = [rows(channels), rows(channels), *direction(), *direction()]
    parts += [torch.randn(channels, 4), torch.randn(channels), torch.randn(channels, 4), torch.randn(channels)]
    stream, weight = torch.randn(batch, length, width), torch.randn(width)
    parts += [rows(width), stream, weight, torch.randn(width), rows(width), torch.randn(width), rows(width)]
    leaves = [part.requires_grad_() for part in parts]

    def once() -> list[Tensor]:
        x, z, *rest = leaves
        ahead, back, convolved, around = rest[:6], rest[6:12], rest[12:16], rest[16:]
        u, u_b = bidirectional_conv(x, (convolved[0], convolved[1]), (convolved[2], convolved[3]), backend=ours)
        y = bidirectional_scan(Direction(u, *ahead), Direction(u_b, *back), z, backend=ours)  # type: ignore[call-arg]
        prompts = PromptTerms([(around[3], around[4]), (around[5], around[6])], length // 2)
        outs = [y, *add_norm(around[0], around[1], around[2], 1e-5, prompts, backend=ours)]
        return [*outs, *torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])]

    first = once()
    assert all(result.isfinite().all() for result in first)
    for repetition in range(1, REPETITIONS):
        for place, (found, wanted) in enumerate(zip(once(), first, strict=True)):
            assert torch.equal(found, wanted), f"result {place} of repetition {repetition}"
