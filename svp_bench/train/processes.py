"""Share the name of a run between its processes, and detect that one of them was killed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import timedelta
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from svp_bench.core.errors import UsageError

_RUN_ID = "SVP_BENCH_RUN_ID"  # set by the first process for those that Lightning launches
_PATIENCE = timedelta(minutes=10)  # for the first process, which reads the existing runs


def agreed_name(exit_stack: ExitStack, decide: Callable[[], str], resume: bool) -> str:
    """Return the name of a run, which the first process decides, in all processes.

    Processes that Lightning launches inherit it through the environment; those of torchrun read it from its store.

    Args:
        exit_stack: Removes the name from the environment when it closes.
        decide: Returns the name; called by the first process.
        resume: Whether the name may be that of an earlier run.

    Raises:
        UsageError: If the first process has failed, or another launcher started these with `resume`.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _agreed_by_store(exit_stack, decide)
    if "LOCAL_RANK" in os.environ:
        inherited = os.environ.get(_RUN_ID)
        if inherited is None and resume:
            raise UsageError(
                "--resume: LOCAL_RANK is set, but neither Lightning nor torchrun has launched this process, and the "
                "others would not know which run it resumes; use torchrun"
            )
        return inherited or decide()
    name = decide()
    os.environ[_RUN_ID] = name
    exit_stack.callback(os.environ.pop, _RUN_ID, None)
    return name


def _agreed_by_store(exit_stack: ExitStack, decide: Callable[[], str]) -> str:
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # public all the same
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
    exit_stack.callback(lambda: store)  # the first process may host the store, which the others still need
    shared = PrefixStore("svp-bench", store)
    if rank > 0:
        name = str(shared.get("run").decode())
        shared.set(f"read-{rank}", "")
        if not name:
            raise UsageError("the first process of this run has stopped; see its message")
        return name
    try:
        name = decide()
    except BaseException:
        _send(shared, "", size)
        raise
    _send(shared, name, size)
    return name


def _send(store: Any, name: str, size: int) -> None:
    """Send the name to the other processes, and wait until they have read it: the first may host the store."""
    store.set("run", name)
    with suppress(RuntimeError):  # a process that is missing is reported when training starts
        store.wait([f"read-{rank}" for rank in range(1, size)], timedelta(minutes=1))


def is_first_process() -> bool:
    """Return whether this is the first of a run's processes, by the environment: they may not be connected yet."""
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    rank: int = getattr(rank_zero_only, "rank", 0)  # Lightning sets it there
    return rank == 0 and node == "0"


_LOST = re.compile(r"gloo|NCCL|Connection (closed|reset) by peer|Broken pipe")


def is_of_a_lost_process(error: Exception) -> bool:
    """Return whether an error shows that another process of the run was killed."""
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None
