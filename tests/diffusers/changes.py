"""What else moves or casts the weights of a model, while they stay on the CPU."""

import accelerate
import diffusers
import pytest
import torch
from packaging.version import Version

CPU = torch.device("cpu")


def offload_sequentially(model):
    """What enable_sequential_cpu_offload does to each model: weights rest on the meta device."""
    accelerate.cpu_offload(model, CPU)


def offload_leaves(model):
    skip_without_group_offload()
    model.enable_group_offload(CPU, offload_type="leaf_level")


def offload_blocks(model):
    skip_without_group_offload()
    model.enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=1)


def skip_without_group_offload():
    if Version(diffusers.__version__) < Version("0.36") and not torch.accelerator.is_available():
        pytest.skip("group offloading of diffusers 0.35 needs an accelerator")


def cast_to_fp8(model):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
