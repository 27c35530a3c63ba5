"""Devices and processes, read from the environment that accelerate launch or torchrun leaves.

The only file that reads the environment. Lightning would train alone in every process, each as rank 0, when it
is left to guess; so the world is stated, and anything that would not train as asked is refused.
"""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

# Read by OpenMP when torch loads it. Threads that spin while they wait make a busy machine ten times slower (measured
# on two shared cores), and gain little on an idle one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Read by torch's allocator at its first use. Pictures of six sizes leave gaps between blocks, which filled a card of
# 8 GB that held 7.1; blocks that grow leave none (Linux alone has them). The older name counts where a user set it.
if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.distributed

from halfbyte.trainer.errors import HalfbyteError, LaunchError

T = TypeVar("T")

_USE = "use `accelerate launch --multi_gpu --num_processes N -m halfbyte.trainer RECIPE` or `torchrun`"


@dataclass(frozen=True)
class World:
    """The processes that train together, and this one's place among them."""

    size: int
    rank: int
    local_size: int
    local_rank: int
    device: torch.device

    @property
    def nodes(self) -> int:
        """Machines, all with the same number of processes."""
        return self.size // self.local_size

    @property
    def is_leader(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    @property
    def backend(self) -> str:
        """torch.distributed's backend for the device."""
        return "nccl" if self.device.type == "cuda" else "gloo"


def read_world(environment: Mapping[str, str] | None = None) -> World:
    """The world this process was started into. Raises LaunchError for one that would not train as asked."""
    env = os.environ if environment is None else environment
    _refuse_unsupported(env)
    _refuse_lonely(env)
    size = _number(env, "WORLD_SIZE", 1)
    rank = _number(env, "RANK", 0)
    local_size = _number(env, "LOCAL_WORLD_SIZE", 1)
    local_rank = _number(env, "LOCAL_RANK", 0)
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size and size % local_size == 0):
        raise LaunchError(
            f"the launcher's numbers do not fit: RANK={rank} of WORLD_SIZE={size}, LOCAL_RANK={local_rank} of"
            f" LOCAL_WORLD_SIZE={local_size}; every machine must run the same number of processes"
        )
    return World(size, rank, local_size, local_rank, _device(env, local_size, local_rank))


def join(world: World) -> None:
    """Readies the device, and torch.distributed for a world of more than one; Lightning joins what it finds."""
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        # cuDNN's attention misreads the incoming gradient where its strides are not the output's, as in FLUX's and
        # SD3's blocks (torch 2.11, cuDNN 9.19): gradients come out wrong by a factor of 8 to 180, or NaN, or it faults.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if world.size == 1 or torch.distributed.is_initialized():
        return
    # One process encodes or exports while the others wait: hours, with a large data set.
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(
        backend, rank=world.rank, world_size=world.size, timeout=timedelta(hours=12)
    )


def barrier(world: World) -> None:
    """Waits for every process."""
    if world.size > 1:
        torch.distributed.barrier()


def broadcast_from_leader(world: World, find: Callable[[], T]) -> T:
    """What the leading process finds, in every process; every process must ask.

    Raises what it raises of HalfbyteError, in every process too.
    """
    if world.size == 1:
        return find()
    told: list[Any] = [None]
    if world.is_leader:
        try:
            told = [find()]
        except HalfbyteError as error:
            told = [error]
    torch.distributed.broadcast_object_list(told, device=torch.device("cpu"))
    if isinstance(told[0], HalfbyteError):
        raise told[0]
    found: T = told[0]
    return found


def leave(world: World) -> None:
    """Ends torch.distributed, so that no process is left waiting for one that is gone."""
    if world.size > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def any_process(world: World, flag: bool) -> bool:
    """Whether the flag is set in any process; every process must ask."""
    if world.size == 1:
        return flag
    value = torch.tensor([int(flag)])
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return bool(value.item())


def _refuse_unsupported(env: Mapping[str, str]) -> None:
    for variable, name in (
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ):
        if _true(env.get(variable)):
            raise LaunchError(
                f"the launcher asks for {name} ({variable}), which is not supported: the frozen 4-bit base is held"
                f" whole by each process and only the adapters are exchanged; {_USE}"
            )
    precision = env.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "bf16"):
        raise LaunchError(
            f"the launcher asks for mixed precision {precision!r}; the recipe's quant.compute_dtype decides it."
            " Launch with --mixed_precision no"
        )
    if env.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
        raise LaunchError(
            "the launcher asks for a dynamo backend, which is not read here; launch with --dynamo_backend no"
        )


def _refuse_lonely(env: Mapping[str, str]) -> None:
    """Refuses environments where several processes were asked for and this one would train alone."""
    if "RANK" in env:
        return
    if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_PORT" in env:
        # accelerate's single-process launcher leaves an address and no rank when --num_processes is above one.
        raise LaunchError(
            "accelerate was asked for several processes but started one (it does so with --cpu, and without"
            f" --multi_gpu on a machine with no GPU); {_USE}"
        )
    for variable in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        if _number(env, variable, 1) > 1:
            raise LaunchError(
                f"{variable}={env[variable]}, but no RANK: each process would train alone, on the same pictures and"
                f" into the same folder; {_USE} (on SLURM: one task a machine, which starts torchrun)"
            )


def _device(env: Mapping[str, str], local_size: int, local_rank: int) -> torch.device:
    if _true(env.get("ACCELERATE_USE_CPU")) or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_size > torch.cuda.device_count():
        raise LaunchError(
            f"{local_size} processes on this machine, {torch.cuda.device_count()} visible GPUs; start as many"
            " processes as there are GPUs, or change CUDA_VISIBLE_DEVICES"
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
