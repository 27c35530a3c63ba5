"""Tests the environments that launchers set: valid ones give a world, and ones that would train separately fail."""

import os
import subprocess
import sys

import pytest
import torch

from halfbyte.trainer.errors import LaunchError
from halfbyte.trainer.runtime.world import World, max_over_processes, read_world

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_PORT": "29500",
}


def test_a_plain_start_is_a_world_of_one():
    world = read_world({})
    assert (world.size, world.rank, world.nodes, world.is_leader) == (1, 0, 1, True)


def test_torchrun_on_two_machines():
    world = read_world(TORCHRUN | {"ACCELERATE_USE_CPU": "true"})
    assert world == World(4, 3, 2, 1, torch.device("cpu"))
    assert (world.nodes, world.is_leader, world.backend) == (2, False, "gloo")


@pytest.mark.parametrize(
    "variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"]
)
def test_sharding_strategies_are_refused_by_name(variable):
    with pytest.raises(LaunchError, match=variable):
        read_world(TORCHRUN | {variable: "true"})
    read_world(TORCHRUN | {variable: "false", "ACCELERATE_USE_CPU": "1"})


def test_accelerates_single_process_for_several_is_refused():
    # `accelerate launch --cpu --num_processes 2` sets an address but no rank.
    environment = {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_USE_CPU": "True",
        "MASTER_ADDR": "127.0.0.1",
    }
    with pytest.raises(LaunchError, match="--multi_gpu"):
        read_world(environment | {"MASTER_PORT": "29500"})
    read_world(environment)


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_processes_without_ranks_are_refused(variable):
    with pytest.raises(LaunchError, match=variable):
        read_world({variable: "2"})
    read_world({variable: "1"})
    read_world(TORCHRUN | {variable: "2", "ACCELERATE_USE_CPU": "1"})


@pytest.mark.parametrize(
    ("changed", "fragment"),
    [
        ({"RANK": "4"}, "RANK=4"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE='many'"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "fp8"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo"),
    ],
)
def test_inconsistent_numbers_and_unsupported_settings_are_refused(changed, fragment):
    with pytest.raises(LaunchError, match=fragment):
        read_world(TORCHRUN | {"ACCELERATE_USE_CPU": "1"} | changed)


def test_the_largest_value_in_a_world_of_one():
    assert max_over_processes(read_world({}), 15) == 15


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, None),
    ],
)
def test_the_allocator_is_configured_before_torch_is_imported_unless_the_user_did(given, expected):
    program = (
        "import os, sys, halfbyte.trainer.cli.app; assert 'torch' not in sys.modules; "
        "print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    )
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(expected)
