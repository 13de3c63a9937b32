"""What a kept projection depends on besides its input, and how a change of it is noticed.

In every call, and without looking at a value: the modules, the hooks and patches on them, the
objects and the memory of their weights, PyTorch's count of writes, dtypes, adapters with their
scales and merges, and autocast. Where a weight is the same object in other memory, as after a
cast to and fro or a move to another device, a spread of its values is compared.

The spread is also compared when a run of a pipeline begins, because some writes are not counted:
those through `.data` (diffusers' EMAModel), NumPy, or kernels that PyTorch does not know. Such a
write in the middle of a run, in a loop of one's own, or to a few elements of a large weight can go
unnoticed: `handle.clear_cache()`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# elements of each weight that are compared; in a 2048 x 1280 matrix some in every row and column
SPREAD = 4096
AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")
# same size, so that bits are compared whatever they stand for
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Sample = dict[torch.dtype, Tensor]
PLAIN = (nn.Parameter, Tensor)


class Fingerprint:
    """Everything that projections depend on now. It holds the weights, so nobody keeps one for
    longer than a call: that is what a `Record` is for."""

    def __init__(
        self,
        modules: Iterable[nn.Module | None],
        earlier: Fingerprint | None = None,
        scale: float = 1.0,  # a factor on what the modules make
    ):
        self.modules: list[nn.Module] = [] if earlier is None else list(earlier.modules)
        # where each weight is found, and the tensors it consists of
        self.weights: list[tuple[nn.Module, str]] = [] if earlier is None else [*earlier.weights]
        # names of their memory, and of small buffers the counts of writes
        self.storages: list[int] = [] if earlier is None else list(earlier.storages)
        # False: a dropout is active, or a forward was replaced, whose settings are unknown
        self.is_known: bool = earlier is None or earlier.is_known
        self.counts_writes: bool = earlier is None or earlier.counts_writes
        key: list[Any] = [_autocast()] if earlier is None else list(earlier.key)
        key.append(scale)
        for root in modules:
            for module in root.modules() if root is not None else ():
                self.modules.append(module)
                key.append(id(module))
                if module._forward_hooks or module._forward_pre_hooks:
                    key += _hooks(module)
                for held in (module._parameters, module._buffers):
                    for name, weight in held.items():
                        if weight is not None:
                            self.weights.append((module, name))
                            self._add(weight, module, name, key, held is module._buffers)
                attributes = vars(module)
                if "merged_adapters" in attributes:
                    key.append(_adapters(module))
                elif isinstance(module, nn.Dropout) and module.training and module.p > 0:
                    self.is_known = False
                if "forward" in attributes and _is_patched(module):
                    self.is_known = False
        self.key: tuple[Any, ...] = tuple(key)

    def _add(
        self, weight: Tensor, module: nn.Module, name: str, key: list[Any], is_buffer: bool
    ) -> None:
        is_plain = type(weight) in PLAIN and not weight.is_meta
        for tensor in (weight,) if is_plain else _tensors(module, name):
            if tensor.is_meta:
                # of weights that rest on a disk: all that is known is who brings them
                key.append(id(getattr(module, "_hf_hook", None)))
                continue
            if tensor.is_inference():
                self.counts_writes = False
            if is_buffer and tensor.numel() <= SPREAD:
                # another object after each move to a device; its values are compared whole
                key += (tensor.dtype, tensor.shape)
                self.storages.append(version(tensor))
            else:
                key += (version(tensor), tensor.dtype, id(tensor))
            self.storages.append(tensor.untyped_storage()._cdata)

    @property
    def is_complete(self) -> bool:
        return self.is_known and self.counts_writes


def _hooks(module: nn.Module) -> list[int]:
    """What PyTorch numbers the hooks of a module with, but for our own, which change nothing."""
    held = (module._forward_hooks, module._forward_pre_hooks)
    return [i for hooks in held for i, hook in hooks.items() if not hasattr(hook, "only_watches")]


class OwnWeights(nn.Module):
    """The weights that a module holds itself, without those of its parts."""

    def __init__(self, module: nn.Module):
        super().__init__()
        # the same dictionary: what takes the place of a weight is seen
        self._parameters = module._parameters


OWN_WEIGHTS: weakref.WeakKeyDictionary[nn.Module, OwnWeights] = weakref.WeakKeyDictionary()


def own_weights(module: nn.Module) -> OwnWeights:
    """The same object for the same module."""
    found = OWN_WEIGHTS.get(module)
    return OWN_WEIGHTS.setdefault(module, OwnWeights(module)) if found is None else found


class Record:
    """A fingerprint to keep, with a spread of the weights' values but without the weights."""

    def __init__(self, made_by: Fingerprint):
        self.key = made_by.key
        # while these references live, no other module has this id
        self.modules = [weakref.ref(module) for module in made_by.modules]
        self.weights = [(weakref.ref(module), name) for module, name in made_by.weights]
        self.sample = _sample(made_by.weights)
        self._remember_memory(made_by)

    def _remember_memory(self, made_by: Fingerprint) -> None:
        self.storages = made_by.storages
        # and no other memory this name
        self.memory = [
            StorageWeakRef(tensor.untyped_storage())
            for place in made_by.weights
            for tensor in _tensors(*place)
            if not tensor.is_meta
        ]

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.sample.values())

    def matches(self, now: Fingerprint, compare_values: bool = False) -> bool:
        """True if what was made then would be made now."""
        if not (now.is_complete or now.is_known and compare_values) or self.key != now.key:
            return False
        if any(module() is None for module in self.modules):
            return False
        if self.storages == now.storages and not compare_values:
            return True
        if not _equal(self.sample, _sample(now.weights)):
            return False
        self._remember_memory(now)
        return True

    @staticmethod
    def hold(records: Iterable[Record]) -> bool:
        """True if the values that all of the records have seen are still there, in one comparison.
        What a key says is not looked at."""
        weights, samples = [], []
        for record in records:
            samples.append(record.sample)
            for ref, name in record.weights:
                module = ref()
                if module is None:
                    return False
                weights.append((module, name))
        dtypes = {dtype for sample in samples for dtype in sample}
        kept = {d: torch.cat([s[d] for s in samples if d in s]) for d in dtypes}
        return _equal(kept, _sample(weights))


def version(tensor: Tensor) -> int:
    """PyTorch's count of writes to a tensor; -1 where it does not count."""
    return -1 if tensor.is_inference() else tensor._version


def _tensors(module: nn.Module, name: str) -> list[Tensor]:
    """The tensors that a weight consists of: one, those of a quantised one, or none."""
    weight: Tensor | None = module._parameters.get(name)
    if weight is None:
        weight = module._buffers.get(name)
    if weight is None:
        return []
    return list(_parts(_offloaded(module, name, weight) if weight.is_meta else weight))


def _parts(tensor: Any) -> Iterator[Tensor]:
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def _offloaded(module: nn.Module, name: str, weight: Tensor) -> Tensor:
    """What accelerate puts in the place of a weight that rests on meta, where that is in memory."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        prefixed: Any = getattr(each, "weights_map", None)
        dataset = getattr(prefixed, "dataset", None)
        # a loader of files has those that are in memory apart
        held = dataset if isinstance(dataset, dict) else getattr(dataset, "state_dict", None)
        found = None if held is None else held.get(f"{prefixed.prefix}{name}")
        if isinstance(found, Tensor):
            return found
    return weight


def _sample(weights: Iterable[tuple[nn.Module, str]]) -> Sample:
    """The bits of some elements of each weight, side by side."""
    parts: dict[torch.dtype, list[Tensor]] = {}
    for place in weights:
        for tensor in _tensors(*place):
            if tensor.is_meta or tensor.numel() == 0 or tensor.element_size() not in BITS:
                continue
            bits = tensor.detach().view(BITS[tensor.element_size()])
            # an odd step meets every column of a matrix with an even number of them
            step = tensor.numel() // SPREAD | 1
            spread = bits.flatten()[::step]
            group = parts.setdefault(spread.dtype, [])
            group.append(spread.to(group[0].device) if group else spread)
    return {dtype: torch.cat(group) for dtype, group in parts.items()}


def _equal(kept: Sample, now: Sample) -> bool:
    return kept.keys() == now.keys() and all(
        x.shape == now[dtype].shape and torch.equal(x.to(now[dtype].device), now[dtype])
        for dtype, x in kept.items()
    )


def _is_patched(module: nn.Module) -> bool:
    """True where code of somebody else runs in place of the module's: its settings are unknown."""
    forwards = [vars(module).get("forward"), vars(module).get("_old_forward")]
    registry = vars(module).get("_diffusers_hook")
    for ref in [] if registry is None else registry._fn_refs[:1]:
        forwards.append(ref.original_forward or ref.forward)
    return not all(forward is None or _is_own(module, forward) for forward in forwards)


def _is_own(module: nn.Module, forward: Any) -> bool:
    # hooks of diffusers and of accelerate
    if isinstance(forward, functools.partial):
        return forward.args[:1] == (module,)
    return getattr(forward, "__func__", None) is type(module).forward


def _autocast() -> tuple:
    """Autocast to another dtype makes other keys of the same weights."""
    return tuple(
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        for device in AUTOCAST_DEVICES
    )


def _adapters(layer) -> tuple:
    """The state of a PEFT layer that its weights do not show."""
    return (
        tuple(layer.active_adapters),
        layer.disable_adapters,
        tuple(layer.merged_adapters),
        tuple(getattr(layer, "scaling", {}).items()),
    )
