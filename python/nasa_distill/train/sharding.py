"""FSDP: the weights of a network, their gradients and AdamW's moments, split over the processes.

PyTorch's `fully_shard` on the blocks that diffusers keeps in one piece. Files hold whole tensors,
so what one number of processes wrote any other number reads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, str_to_bool
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor


def is_asked_by_launcher() -> bool:
    """Whether this is `accelerate launch --use_fsdp`, which speaks through the environment.

    Raises:
        ValueError: It asks for something of FSDP that is not done here.
    """
    if not str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")):
        return False
    plugin = FullyShardedDataParallelPlugin()
    others = {
        "--fsdp_version 2": getattr(plugin, "fsdp_version", 1) == 2,
        "--fsdp_reshard_after_forward true": plugin.reshard_after_forward is True,
        "--fsdp_offload_params false": not isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "--fsdp_activation_checkpointing false (--set gradient_checkpointing=true does it)": (
            not plugin.activation_checkpointing
        ),
        "--fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP": (
            plugin.auto_wrap_policy is not size_based_auto_wrap_policy
            and not plugin.transformer_cls_names_to_wrap
        ),
    }
    for must, is_so in others.items():
        if not is_so:
            raise ValueError(
                f"sharding: accelerate's launcher must be given {must}; or start the processes "
                "without its FSDP, and give --fsdp to this command"
            )
    return True


def shard(network: Any, accelerator: Accelerator) -> None:
    """Split `network` over the processes, in place; afterwards its parameters are `DTensor`s.

    Everything is split again right after a forward pass, the root too: what stays whole for a
    backward pass that never comes, as after one without a gradient, would miss the next update.
    Weights travel in their own precision, so that autocast finds what it finds elsewhere.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    blocks = set(network._no_split_modules or ())
    # inner ones first
    for module in reversed(list(network.modules())):
        if module is network or type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            # FSDP notes at its first use which weights are trained, and that use may be of the
            # frozen teacher, while the adapters are off
            module.unshard()
            module.reshard()


def whole(state: Any, keep: bool) -> Any:
    """`state` with split tensors put together on the CPU; None unless `keep`.

    Every process has to call it, with the same tensors in the same order.
    """
    if isinstance(state, Mapping):
        made: Any = {name: whole(value, keep) for name, value in state.items()}
    elif isinstance(state, list):
        made = [whole(value, keep) for value in state]
    elif isinstance(state, DTensor):
        made = state.full_tensor().cpu()
    else:
        made = state
    return made if keep else None


def split_like(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, where `like` is split."""
    if not isinstance(like, DTensor):
        return value
    value = value.to(like.device)
    # no process sends anything: each has the whole
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def restore(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Copy whole tensors into `own`, split or not.

    Raises:
        ValueError: They are those of another network.
    """
    for name in sorted({*own, *saved}):
        shapes = [list(x[name].shape) if name in x else None for x in (saved, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"sharding.restore: {name} of the {what} is {shapes[0]} in the checkpoint and "
                f"{shapes[1]} in this network; begin with the checkpoints that the run began with"
            )
    for name, tensor in own.items():
        tensor.copy_(split_like(saved[name], tensor))


def restore_optimiser(optimiser: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """`load_state_dict` of whole tensors, for parameters that are split or not."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    state = {
        index: {
            name: split_like(value, parameters[index]) if value.dim() else value
            for name, value in values.items()
        }
        for index, values in saved["state"].items()
    }
    optimiser.load_state_dict({**saved, "state": state})


def as_one(network: nn.Module, kind: Any, weights: Mapping[str, Tensor]) -> nn.Module:
    """A network of class `kind` that is not split, with the whole tensors of `weights`."""
    made = kind.from_config(network.config)
    made.load_state_dict(weights)
    return made.eval()
