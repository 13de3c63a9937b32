"""FSDP: the weights of a network, their gradients and AdamW's moments, split over the processes.

PyTorch's `fully_shard` on the blocks that diffusers keeps in one piece. Files hold whole tensors by
name, so what one number of processes wrote any other number reads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, str_to_bool
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.optim import Optimizer


def is_asked_by_launcher() -> bool:
    """Whether `accelerate launch --use_fsdp` started this process; it sets variables.

    Raises:
        ValueError: It asks for an FSDP option that is not supported here.
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

    Weights are split again after each forward pass, those of the root too. A pass without a
    gradient has no backward pass, and weights that stayed whole would miss the next update.
    They are gathered in fp32, so that autocast casts them as it does without FSDP.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    blocks = set(network._no_split_modules or ())
    # inner ones first
    for module in reversed(list(network.modules())):
        if module is network or type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            # FSDP notes at its first use which weights are trained. Without this, that could be a
            # pass of the frozen teacher, when the adapters are off
            module.unshard()
            module.reshard()


def weights_of(network: nn.Module, is_split: bool, trained_only: bool = False) -> dict[str, Any]:
    """The whole tensors of a network, by name; of split ones only in the first process.

    Every process of a split network has to call it.
    """
    options = _options(is_split, ignore_frozen_params=trained_only)
    weights = get_model_state_dict(network, options=options)
    if not trained_only:
        return weights
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    return {name: weights[name] for name in weights.keys() & trained}


def moments_of(network: nn.Module, optimiser: Optimizer, is_split: bool) -> dict[str, Any]:
    """An optimiser's state likewise, by the names of the weights; empty before its first step."""
    if not optimiser.state:
        # PyTorch would make a step with gradients of 0, which counts
        return {}
    return get_optimizer_state_dict(network, optimiser, options=_options(is_split))


def restore(network: nn.Module, saved: dict[str, Tensor], what: str, is_split: bool) -> None:
    """Give whole tensors to a network, split or not; it keeps those that are not in `saved`.

    Raises:
        ValueError: They are those of another network.
    """
    own = network.state_dict()
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    needed = trained if saved.keys() <= trained else own.keys()
    for name in sorted({*needed, *saved}):
        shapes = [list(x[name].shape) if name in x else None for x in (saved, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"sharding.restore: {name} of the {what} is {shapes[0]} in the checkpoint and "
                f"{shapes[1]} in this network; begin with the checkpoints that the run began with"
            )
    set_model_state_dict(network, dict(saved), options=_options(is_split, strict=False))


def restore_moments(
    network: nn.Module, optimiser: Optimizer, saved: dict[str, Any], is_split: bool
) -> None:
    """Give an optimiser the state that `moments_of` returned, of a network split or not."""
    if saved:
        set_optimizer_state_dict(
            network, optimiser, _named(network, optimiser, saved), options=_options(is_split)
        )


def _named(network: nn.Module, optimiser: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Checkpoints of earlier versions number the weights, in the optimiser's order."""
    if all(isinstance(key, str) for key in saved["state"]):
        return saved
    names = {id(p): name for name, p in network.named_parameters()}
    order = [names[id(p)] for group in optimiser.param_groups for p in group["params"]]
    groups = [{**g, "params": [order[i] for i in g["params"]]} for g in saved["param_groups"]]
    return {"state": {order[i]: x for i, x in saved["state"].items()}, "param_groups": groups}


def _options(is_split: bool, **others: Any) -> StateDictOptions:
    # without a process group PyTorch distributes nothing
    return StateDictOptions(full_state_dict=is_split, cpu_offload=is_split, **others)


def as_one(network: nn.Module, kind: Any, weights: Mapping[str, Tensor]) -> nn.Module:
    """A network of class `kind` that is not split, with the whole tensors of `weights`."""
    made = kind.from_config(network.config)
    made.load_state_dict(weights)
    return made.eval()
