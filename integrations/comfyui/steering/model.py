"""A MODEL under guidance: the patches of a clone, and what a call of the network does.

Everything a call needs is in its options; the MODEL that came in stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.patcher_extension
import torch
from torch import Tensor

from .call import CURRENT, Guide
from .cross_families import UNet
from .families import family_of
from .family import NET, Family
from .terms import Term, together

TERMS, FAMILY, GUIDE = "nasa_terms", "nasa_family", "nasa_guide"
_APPLY = comfy.patcher_extension.WrappersMP.APPLY_MODEL
_NETWORK = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL


def steer(model: Any, term: Term) -> Any:
    """A clone of `model` that this term guides, beside those of nodes before."""
    family = family_of(model.get_model_object(NET))
    if term.layers is not None and max(term.layers) >= family.layers():
        raise ValueError(
            f"NASA negative prompt: layers must be below {family.layers()}, the number of "
            f"attentions to text of this model, got {max(term.layers)}"
        )
    clone = model.clone()
    options = clone.model_options["transformer_options"]
    terms = (*options.get(TERMS, ()), term)
    together(terms, family.is_joint)
    # the family too: during a call a compiled network may stand in the place of its own
    options[TERMS], options[FAMILY] = terms, family
    if not clone.get_wrappers(_APPLY, GUIDE):
        clone.add_wrapper_with_key(_APPLY, GUIDE, apply_model)
    family.patch(clone)
    if isinstance(family, UNet):
        present = options.get("patches_replace", {}).get("attn2", {})
        for key in {*family.blocks(), *present}:
            if not isinstance(present.get(key), Attn2):
                clone.set_model_attn2_replace(Attn2(present.get(key)), *key)
    else:
        previous = options.get("optimized_attention_override")
        if not isinstance(previous, Override):
            options["optimized_attention_override"] = Override(previous)
    return clone


class Slot:
    """A place in the options that one node holds: ours, which calls who held it before."""

    def __init__(self, previous: Callable | None):
        self.previous = previous

    def __deepcopy__(self, memo: dict) -> Slot:
        return self


class Attn2(Slot):
    """`attn2` of a UNet: after the projections, `[b, l, h*d]`."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        guide = extra_options.get(GUIDE)
        heads = extra_options["n_heads"]
        if guide is None:
            if self.previous is not None:
                return self.previous(q, k, v, extra_options)
            from comfy.ldm.modules.attention import optimized_attention

            precision = extra_options.get("attn_precision")
            return optimized_attention(q, k, v, heads, attn_precision=precision)
        if k.shape[1] != sum(guide.lengths):
            raise ValueError(
                f"NASA negative prompt: {guide.text_patch} changed the text from "
                f"{sum(guide.lengths)} tokens to {k.shape[1]} before the attention, so that it is "
                "not known which are whose; remove that node"
            )
        by_head = [x.unflatten(-1, (heads, -1)) for x in (q, k, v)]
        if self.previous is None:
            return guide.cross(*by_head, None).flatten(2)
        if guide.method != "NASA":
            raise ValueError(
                f"NASA negative prompt: {name_of(self.previous)} adds to the attention to the "
                f"text, beside which {guide.method} has no meaning; use NASA"
            )
        plain = self.previous(q, guide.positive(k), guide.positive(v), extra_options)
        return plain + guide.cross_beside(*by_head).flatten(2)


class Override(Slot):
    """Every attention of a network that hands its options on."""

    def __call__(self, func, q, k, v, heads, mask=None, **kwargs):
        guide = (kwargs.get("transformer_options") or {}).get(GUIDE)
        is_by_head = kwargs.get("skip_reshape", False)
        axis = 2 if is_by_head else 1
        if guide is None or not guide.family.owns(guide, q.shape[axis], k.shape[axis], mask):
            if self.previous is not None:
                return self.previous(func, q, k, v, heads, mask=mask, **kwargs)
            return func(q, k, v, heads, mask=mask, **kwargs)
        if is_by_head:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        else:
            # some networks have v by head already
            q, k, v = (x if x.ndim == 4 else x.unflatten(-1, (heads, -1)) for x in (q, k, v))
        if guide.family.is_joint:
            o = guide.joint(q, k, v)
        else:
            o = guide.cross(q, k, v, None if mask is None else _per_key(mask, q))
        return o.transpose(1, 2) if kwargs.get("skip_output_reshape", False) else o.flatten(2)


def _per_key(mask: Tensor, q: Tensor) -> Tensor:
    """[b, 1, 1, n], [b, 1, n] or [1, n] as [b, n]."""
    mask = mask.reshape(mask.shape[0], -1)
    return mask if mask.dtype == torch.bool else mask.float()


def apply_model(
    executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds
) -> Tensor:
    """The wrapper around a call: the negative's tokens go in behind the positive's."""
    options = transformer_options or {}
    sigma = float(t.max())
    base = executor.class_obj
    terms = [
        term
        for term in options.get(TERMS, ())
        if not term.is_off() and term.holds_at(sigma, base.model_sampling)
    ]
    guided = guided_rows(options.get("cond_or_uncond", [0]), x)
    family = options[FAMILY]
    if not terms or guided is False:
        # of a step outside of all windows a cache may have the answer of the next
        family.has_run = family.has_run or not terms
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **conds)
    if c_crossattn is None:
        raise ValueError("NASA negative prompt: this model was called without a text to guide")
    family.refuse(conds)
    encoded = [encode(base, family, term, x, c_crossattn, conds) for term in terms]
    if family.is_joint and (
        conds.get("attention_mask") is not None or any(mask is not None for _, mask in encoded)
    ):
        raise ValueError(
            "NASA negative prompt: the text has a mask of its tokens, which is not obeyed where "
            "text and image share an attention; use a text encoder without one"
        )
    tokens = [c_crossattn, *(tokens for tokens, _ in encoded)]
    masks = [conds.get("attention_mask"), *(mask for _, mask in encoded)]
    lengths = [part.shape[1] for part in tokens]
    if not family.is_joint:
        # no other attention must be taken for one to the text; a softmax does not notice that all
        # its keys are there several times
        others, times, (*before, last) = family.other_keys(x, conds), 1, lengths
        while sum(before) + times * last in others:
            times += 1
        tokens[-1], lengths[-1] = tokens[-1].repeat(1, times, 1), times * last
        masks[-1] = None if masks[-1] is None else masks[-1].repeat(1, times)
    if any(mask is not None for mask in masks):
        conds["attention_mask"] = _one_mask(masks, tokens)
    guide = Guide(family, terms, lengths, None if guided is True else guided, x, conds)
    # a block does not tell which patches were before the attention
    if patches := options.get("patches", {}).get("attn2_patch"):
        guide.text_patch = name_of(patches[-1])
    token = CURRENT.set(guide)
    try:
        o = executor(
            x, t, c_concat, torch.cat(tokens, dim=1), control, {**options, GUIDE: guide}, **conds
        )
    finally:
        CURRENT.reset(token)
    check(guide, options)
    return o


def guided_rows(cond_or_uncond: list[int], x: Tensor) -> Tensor | bool:
    """True where every row carries the positive prompt, False where none does, else [b]."""
    if any(index > 1 for index in cond_or_uncond):
        raise ValueError(
            "NASA negative prompt: this guider asks for more than a positive and a negative "
            "prediction, and which is the prompt's is not known; use CFG or the basic guider"
        )
    if 1 not in cond_or_uncond:
        return True
    if 0 not in cond_or_uncond:
        return False
    rows = torch.tensor([index == 0 for index in cond_or_uncond], device=x.device)
    return rows.repeat_interleave(x.shape[0] // len(cond_or_uncond))


def encode(
    base: Any, family: Family, term: Term, x: Tensor, positive: Tensor, call: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Tokens [b, n, c] and mask [b, n] of a term, by the model's own preparation of a text."""
    # several latents come packed as [b, 1, l], with their shapes
    of_call = {key: call[key] for key in ("latent_shapes",) if key in call}
    conds = base.extra_conds(
        **{
            "width": x.shape[3] * 8 if x.ndim > 3 else None, "height": x.shape[2] * 8,
            "prompt_type": "negative", **of_call, **term.settings, "cross_attn": term.text,
            "noise": x, "device": x.device,
        }
    )  # fmt: skip
    family.refuse(conds)
    found = [conds.get(name) for name in ("c_crossattn", "attention_mask")]
    tokens, mask = (
        None if cond is None else cond.process_cond(batch_size=x.shape[0], area=None).cond
        for cond in found
    )
    if tokens is None or tokens.shape[-1] != positive.shape[-1]:
        raise ValueError(
            f"NASA negative prompt: the negative has {0 if tokens is None else tokens.shape[-1]} "
            f"channels and this model's text {positive.shape[-1]}; encode it with the text "
            "encoder of this model"
        )
    mask = None if mask is None else mask.to(x.device).expand(x.shape[0], -1)
    return tokens.to(positive).expand(x.shape[0], -1, -1), mask


def _one_mask(masks: list[Tensor | None], tokens: list[Tensor]) -> Tensor:
    """Of all prompts `[b, n]`: whether a token is there, in integers, or what is added to its
    scores, where one of the masks has that. The networks tell them apart by their type."""
    is_added = any(mask is not None and mask.is_floating_point() for mask in masks)
    parts = []
    for mask, text in zip(masks, tokens, strict=True):
        mask = text.new_ones(text.shape[:2], dtype=torch.int64) if mask is None else mask
        if is_added and not mask.is_floating_point():
            mask = (mask.to(text.dtype) - 1) * torch.finfo(text.dtype).max
        parts.append(mask.to(text.dtype if is_added else torch.int64))
    return torch.cat(parts, dim=1)


def check(guide: Guide, options: dict) -> None:
    """Raise unless every attention to text was guided, or another node answered for the network."""
    if guide.count == guide.layers:
        guide.family.has_run = True
        return
    holder = slot_holder(options, guide.family)
    # a cache has an answer of a step before
    is_after = guide.family.has_run and _may_be_cached(options)
    if guide.count == 0 and holder is None and is_after:
        return
    if holder is not None:
        why = f"{holder} holds their place; move that node before this one, which goes last"
    elif guide.count < guide.layers:
        why = (
            "the others did not run; a node that leaves out blocks (a cache of blocks, skip-layer "
            "guidance) does not go with this one: remove one of them"
        )
    else:
        why = (
            "more than the network has; a node that runs blocks again or adds some does not go "
            "with this one: remove one of them"
        )
    raise RuntimeError(
        f"NASA negative prompt: {guide.count} of {guide.layers} attentions to text were guided, "
        f"{why}"
    )


def slot_holder(options: dict, family: Family) -> str | None:
    """Who replaced our patches of the attention."""
    if isinstance(family, UNet):
        present = options.get("patches_replace", {}).get("attn2", {})
        others = [patch for patch in present.values() if not isinstance(patch, Attn2)]
        return name_of(others[0]) if others else None
    override = options.get("optimized_attention_override")
    if isinstance(override, Override):
        return None
    return "nobody" if override is None else name_of(override)


def _may_be_cached(options: dict) -> bool:
    """Whether another node wraps the network, and may have answered without running it."""
    wrappers = options.get("wrappers", {})
    others = {key for kind in (_APPLY, _NETWORK) for key in wrappers.get(kind, {})} - {GUIDE}
    return bool(others)


def name_of(patch: Any) -> str:
    kind = patch if hasattr(patch, "__qualname__") else type(patch)
    return f"{kind.__module__}.{kind.__qualname__}"
