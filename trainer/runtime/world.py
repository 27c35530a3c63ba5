"""Reads the processes and devices of a run from the environment that accelerate launch or torchrun sets.

Only this file and `library_variables` use the environment. Without explicit ranks, Lightning would treat every process
as a separate run at rank 0. The trainer therefore passes the ranks to Lightning, and rejects an environment
that would not train the way the launcher was asked to.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

# Before torch.
from halfbyte.trainer.runtime import library_variables  # noqa: F401

# isort: split
import torch
import torch.distributed
from torch.distributed.distributed_c10d import PrefixStore

from halfbyte.trainer.errors import HalfbyteError, LaunchError
from halfbyte.trainer.runtime.watch import RankWatch, open_store, wait

T = TypeVar("T")

_USE = "use `accelerate launch --multi_gpu --num_processes N -m halfbyte.trainer RECIPE` or `torchrun`"


@dataclass(frozen=True)
class World:
    """The processes that train together, and the rank and device of this process."""

    size: int
    rank: int
    local_size: int
    local_rank: int
    device: torch.device

    @property
    def nodes(self) -> int:
        """The number of machines. Every machine runs the same number of processes."""
        return self.size // self.local_size

    @property
    def is_leader(self) -> bool:
        """True for rank 0, the only process that writes files and prints."""
        return self.rank == 0

    @property
    def backend(self) -> str:
        """The torch.distributed backend for the device."""
        return "nccl" if self.device.type == "cuda" else "gloo"


def read_world(environment: Mapping[str, str] | None = None) -> World:
    """Returns the world of this process.

    Raises:
        LaunchError: The environment is inconsistent, or it asks for something that the trainer does not
            support.
    """
    env = os.environ if environment is None else environment
    _refuse_unsupported(env)
    _refuse_unranked(env)
    size = _number(env, "WORLD_SIZE", 1)
    rank = _number(env, "RANK", 0)
    local_size = _number(env, "LOCAL_WORLD_SIZE", 1)
    local_rank = _number(env, "LOCAL_RANK", 0)
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size and size % local_size == 0):
        raise LaunchError(
            f"the launcher's variables are inconsistent: RANK={rank} of WORLD_SIZE={size}, LOCAL_RANK={local_rank} of"
            f" LOCAL_WORLD_SIZE={local_size}; expected ranks from 0 to the size minus 1, and the same number of"
            " processes on every machine"
        )
    return World(size, rank, local_size, local_rank, _device(env, local_size, local_rank))


def join(world: World) -> None:
    """Sets up the device and, for more than one process, torch.distributed.

    Lightning uses an initialized group.
    """
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        # cuDNN's attention backward misreads the incoming gradient if its strides differ from the output's,
        # as in the blocks of FLUX and SD3 (torch 2.11, cuDNN 9.19): gradients are wrong by a factor of 8 to
        # 180 or NaN, or the kernel faults.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if world.size == 1 or torch.distributed.is_initialized():
        return
    end_with_launcher()
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    # The other processes wait while rank 0 encodes or exports, which takes hours for a large data set. The watch
    # notices a process that is gone or hangs much earlier.
    timeout = timedelta(hours=12)
    store = open_store(world.rank, world.size, timeout)
    torch.distributed.init_process_group(
        backend,
        store=PrefixStore("halfbyte", store),
        rank=world.rank,
        world_size=world.size,
        timeout=timeout,
    )
    global _watch
    _watch = RankWatch(store, world.rank, world.size, patience=_patience())


_watch: RankWatch | None = None  # of this process, while it has joined


def _patience() -> float:
    """Returns the seconds without a sign of life after which another process counts as lost."""
    return float(_number(os.environ, "HALFBYTE_RANK_TIMEOUT", 60))


def end_with_launcher() -> None:
    """Makes the kernel send this process SIGTERM when its launcher ends, however that ended.

    Otherwise a killed launcher leaves its processes training, and a restarted job would meet them.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


@contextmanager
def exchange(world: World) -> Iterator[None]:
    """Wraps work that exchanges data with the other processes.

    Raises:
        ProcessLost: the exchange failed because another process ended or stopped responding.
    """
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or _watch is None or not _is_broken_exchange(error):
            raise
        raise _watch.lost() from error


def _is_broken_exchange(error: RuntimeError) -> bool:
    """Returns True for the errors of gloo, NCCL and the store after a connection has broken."""
    return isinstance(error, torch.distributed.DistError) or any(
        part in str(error)
        for part in ("gloo", "Connection closed", "Connection reset", "Broken pipe", "NCCL")
    )


def reports_lost_process() -> bool:
    """Returns True in the one process that reports the loss of another: the lowest rank that is left."""
    return _watch is None or _watch.is_first_left(_watch.missing())


def barrier(world: World) -> None:
    """Waits until every process has reached this call. Raises ProcessLost if one never will."""
    max_over_processes(world, 0)


def broadcast_from_leader(world: World, find: Callable[[], T]) -> T:
    """Calls `find` on rank 0 and returns its result in every process. Every process must make this call.

    Raises:
        HalfbyteError: `find` raised it on rank 0; it is raised in every process.
        ProcessLost: another process is gone.
    """
    if world.size == 1:
        return find()
    message: list[Any] = [None]
    if world.is_leader:
        try:
            message = [find()]
        except HalfbyteError as error:
            message = [error]
    # Wait here while rank 0 searches: signals do not interrupt the broadcast itself.
    barrier(world)
    with exchange(world):
        torch.distributed.broadcast_object_list(message, device=torch.device("cpu"))
    if isinstance(message[0], HalfbyteError):
        raise message[0]
    found: T = message[0]
    return found


def leave(world: World) -> None:
    """Shuts down torch.distributed, so that no process waits for a process that has ended."""
    global _watch
    if _watch is not None:
        _watch.close()
        _watch = None
    if world.size > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def max_over_processes(world: World, value: int) -> int:
    """Returns the largest value of any process. Every process must make this call."""
    if world.size == 1:
        return value
    largest = torch.tensor([value])
    with exchange(world):
        work = torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, async_op=True)
        assert work is not None
        wait(work.is_completed)
        work.wait()
    return int(largest.item())


def _refuse_unsupported(env: Mapping[str, str]) -> None:
    for variable, name in (
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ):
        if _true(env.get(variable)):
            raise LaunchError(
                f"the launcher asks for {name} ({variable}), which is not supported: each process holds the complete"
                f" frozen 4-bit base, and only the adapters' gradients are exchanged; {_USE}"
            )
    precision = env.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "bf16"):
        raise LaunchError(
            f"the launcher asks for mixed precision {precision!r}, but the recipe's quant.compute_dtype sets the"
            " precision; launch with --mixed_precision no"
        )
    if env.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
        raise LaunchError(
            "the launcher asks for a dynamo backend, which is not supported; launch with --dynamo_backend no"
        )


def _refuse_unranked(env: Mapping[str, str]) -> None:
    """Rejects environments for several processes without ranks, in which each process would train separately."""
    if "RANK" in env:
        return
    if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_PORT" in env:
        # accelerate's single-process launcher sets an address and no rank if --num_processes is greater than
        # one.
        raise LaunchError(
            "accelerate was asked for several processes but started only one (as it does with --cpu, or without"
            f" --multi_gpu on a machine that has no GPU); {_USE}"
        )
    for variable in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        if _number(env, variable, 1) > 1:
            raise LaunchError(
                f"{variable}={env[variable]}, but RANK is not set: each process would train separately, on the same"
                f" images and into the same folder; {_USE} (on SLURM: one task per machine that starts torchrun)"
            )


def _device(env: Mapping[str, str], local_size: int, local_rank: int) -> torch.device:
    if _true(env.get("ACCELERATE_USE_CPU")) or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_size > torch.cuda.device_count():
        raise LaunchError(
            f"{local_size} processes on this machine, but {torch.cuda.device_count()} visible GPUs; start one process"
            " per GPU, or change CUDA_VISIBLE_DEVICES"
        )
    return torch.device("cuda", local_rank)


def _true(value: str | None) -> bool:
    return value is not None and value.strip().lower() in ("1", "true", "yes", "y", "on", "t")


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    value = env.get(name)
    if value is None or not value.strip():
        return default
    if not value.strip().isdecimal():
        raise LaunchError(f"{name}={value!r} in the environment: expected a whole number")
    return int(value)
