"""Where our hooks stand among what else is put on a module, and whether a call still reaches them.

diffusers' hooks wrap a module's `forward` one around another, in the order in which they come.
Ours stand innermost, right around the module's own computation: whatever else skips, keeps or
changes a module's output does so around what we compute, in whichever order both were put on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

HOOK_NAME = "nasa"


def attach(module: nn.Module, hook: ModelHook) -> None:
    registry = HookRegistry.check_if_exists_or_initialize(module)
    before = module.forward
    registry.register_hook(hook, HOOK_NAME)
    ours, reference = module.forward, registry._fn_refs[-1]
    # the signature stays that of the module: before diffusers 0.37 a hook hides it
    functools.update_wrapper(ours, before)
    if len(registry._fn_refs) == 1:
        return
    innermost = registry._fn_refs[0]
    reference.original_forward = _inner(innermost)
    functools.update_wrapper(ours, reference.original_forward)
    _set_inner(innermost, ours)
    module.forward = before
    for each in (registry._fn_refs, registry._hook_order):
        each.insert(0, each.pop())


def detach(module: Any) -> None:
    """Take the hook off and leave the module as if it had never been there."""
    registry = module._diffusers_hook
    i = registry._hook_order.index(HOOK_NAME)
    reference = registry._fn_refs.pop(i)
    registry._hook_order.pop(i)
    del registry.hooks[HOOK_NAME]
    if i < len(registry._fn_refs):
        _set_inner(registry._fn_refs[i], reference.original_forward)
    elif reference_of(vars(module).get("forward")) is reference:
        module.forward = reference.original_forward
    old = vars(module).get("_old_forward")
    if reference_of(old) is reference:
        # accelerate's hook, which goes back to it
        module._old_forward = reference.original_forward
    forward = vars(module).get("forward")
    if not registry.hooks:
        del module._diffusers_hook
        if getattr(forward, "__self__", None) == module:
            del module.forward


def _inner(reference: Any) -> Callable:
    """What a hook of diffusers calls to go on inwards."""
    if reference.original_forward is not None:
        return reference.original_forward
    return reference.forward


def _set_inner(reference: Any, forward: Callable) -> None:
    if reference.original_forward is not None:
        reference.original_forward = forward
    else:
        reference.forward = forward


def reference_of(forward: Any) -> Any:
    """The reference that a registry made this `forward` for; None if no registry made it."""
    made: Any = getattr(forward, "func", None)
    if getattr(made, "__module__", None) != HookRegistry.__module__:
        return None
    (cell,) = made.__closure__
    return cell.cell_contents


def is_replaced(module: nn.Module) -> bool:
    """Whether the `forward` of a module that has our hook is now somebody else's."""
    if hasattr(module, "_hf_hook"):
        # accelerate's, which calls what it found
        return False
    registry = getattr(module, "_diffusers_hook", None)
    reference = reference_of(vars(module).get("forward"))
    return registry is None or not registry._fn_refs or reference is not registry._fn_refs[-1]


def may_skip(module: nn.Module) -> bool:
    """Whether a module that has our hook may be left out in a call: by a cache, or by a `forward`
    that was replaced, which a `Watch` looks after."""
    registry = getattr(module, "_diffusers_hook", None)
    is_ours = registry is not None and HOOK_NAME in registry.hooks
    return is_ours and (bool(skipping_hooks(module)) or is_replaced(module))


def skipping_hooks(module: nn.Module) -> list[ModelHook]:
    """The hooks of others that decide whether a module computes: diffusers' caches."""
    registry = getattr(module, "_diffusers_hook", None)
    hooks = {} if registry is None else registry.hooks
    return [h for name, h in hooks.items() if name != HOOK_NAME and hasattr(h, "new_forward")]


def check_own_forward(name: str, layer: nn.Module) -> None:
    """Raise if somebody gave the layer a `forward` that ours would take the place of."""
    forward = vars(layer).get("forward")
    is_stock = getattr(forward, "__func__", None) is type(layer).forward
    if forward is None or is_stock or hasattr(layer, "_hf_hook") or reference_of(forward):
        return
    raise ValueError(
        f"enable_nasa: the forward of layer {name!r} was replaced by {_name(forward)}, which NASA "
        "would leave out; take that change back first, or leave the layer out with layers=..."
    )


def _name(forward: Any) -> str:
    if forward is None:
        return "that of its class"
    function = getattr(forward, "func", forward)
    own = getattr(function, "__qualname__", type(function).__name__)
    return f"{getattr(function, '__module__', '?')}.{own}"


def as_called(
    parameters: Sequence[str], args: tuple, inputs: Mapping[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """`inputs` by position where `args` had them so, for hooks that read positions."""
    names = parameters[: len(args)]
    rest = {name: value for name, value in inputs.items() if name not in names}
    return tuple(inputs[name] for name in names), rest


class Watch:
    """Sees to it that a `forward` replaced later is not the end of a layer's guidance.

    A function that wraps the one it found leads to our hook, and all is well; one that does not
    is an error after the first call in which it ran.
    """

    def __init__(self, modules: Mapping[str, Iterable[nn.Module]]):
        # by the name of the layer, all that has a hook of ours on the way to it
        self.modules = {name: tuple(each) for name, each in modules.items()}
        self.trusted: dict[nn.Module, Any] = {}
        self._handle: Any = None

    def begin(self, denoiser: nn.Module, text: Any, reached: set[str]) -> None:
        """Before the call with this `text`, which notes in `reached` the layers it comes to."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        suspects = [
            (name, module)
            for name, modules in self.modules.items()
            for module in modules
            if is_replaced(module)
            and self.trusted.get(module, denoiser) is not vars(module).get("forward")
        ]
        if not suspects:
            return

        def check(_: nn.Module, args: tuple, kwargs: dict[str, Any], __: Any) -> None:
            self._handle.remove()
            self._handle = None
            if not any(x is text for x in (*args, *kwargs.values())):
                # the call it was meant for has failed
                return
            for name, module in suspects:
                forward = vars(module).get("forward")
                if name not in reached:
                    raise RuntimeError(
                        f"nasa_diffusers: layer {name!r} was left out: on the way to it is a "
                        f"{type(module).__name__}, and its forward was replaced by "
                        f"{_name(forward)}; take that change back, or call disable_nasa(pipe)"
                    )
                self.trusted[module] = forward

        self._handle = denoiser.register_forward_hook(check, with_kwargs=True)
