"""What users run instead of NASA on a whole denoiser: Algorithm 1, and NAG as it is published.

Both are put on stock diffusers models by replacing the `forward` of attention layers while a
`with` lasts. The negative text travels behind the positive one, token by token, through the
model's own text modules. Layers are computed by the same modules as stock ones; only the number of
projections and attention calls differs:

    cross-attention   Algorithm 1 projects K and V of each prompt in every call, and attends twice.
                      NAG projects both as one batch, attends with Q twice, normalises, blends.
    FLUX, SD3         the image stream once, both texts carried along; two joint attentions.
    FLUX under NAG    in the single blocks the whole sequence runs twice, image included, as in the
                      code that its authors publish.

The paper has no algorithm for joint attention; this is the literal reading of its equation 9.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.attention import sdpa

Combine = Callable[[Tensor, Tensor], Tensor]


def nag(
    z_pos: Tensor, z_neg: Tensor, scale: float = 5.0, tau: float = 2.5, alpha: float = 0.25
) -> Tensor:
    """Normalised attention guidance of `[b, l, c]` over all heads, in its code's convention: off
    at scale 1, an extrapolation whose norm is clipped to tau times that of Z+, then a blend."""
    guided = z_pos * scale - z_neg * (scale - 1)
    norm_pos = z_pos.norm(p=1, dim=-1, keepdim=True).expand(*z_pos.shape)
    ratio = guided.norm(p=1, dim=-1, keepdim=True).expand(*z_pos.shape) / norm_pos
    guided = guided * torch.minimum(ratio, ratio.new_ones(1) * tau) / ratio
    return guided * alpha + z_pos * (1 - alpha)


def subtract(z_pos: Tensor, z_neg: Tensor, alpha: float = 0.5) -> Tensor:
    """Equation 9."""
    return z_pos - alpha * z_neg


@contextlib.contextmanager
def algorithm_1(denoiser: Any, negative: Tensor, alpha: float = 0.5) -> Iterator[None]:
    with _method(denoiser, negative, partial(subtract, alpha=alpha), is_nag=False):
        yield


@contextlib.contextmanager
def nag_published(denoiser: Any, negative: Tensor, scale: float = 5.0) -> Iterator[None]:
    with _method(denoiser, negative, partial(nag, scale=scale), is_nag=True):
        yield


@contextlib.contextmanager
def _method(denoiser: Any, negative: Tensor, combine: Combine, is_nag: bool) -> Iterator[None]:
    """`negative` is `[1, n, c]`, as long as the positive text of the calls."""
    n = negative.shape[1]
    name = type(denoiser).__name__
    handles = [
        denoiser.register_forward_pre_hook(partial(_append, negative=negative), with_kwargs=True)
    ]
    replaced: list[Any] = []

    def replace(attn: Any, forward: Callable) -> None:
        attn.forward = forward
        replaced.append(attn)

    if name == "FluxTransformer2DModel":
        for block in denoiser.transformer_blocks:
            replace(block.attn, partial(_flux_double, block.attn, n, combine))
        single = _flux_single_twice if is_nag else _flux_single
        for block in denoiser.single_transformer_blocks:
            replace(block.attn, partial(single, block.attn, n, combine))
        if is_nag:
            handles += _double_single_blocks(denoiser, n)
    elif name == "SD3Transformer2DModel":
        for block in denoiser.transformer_blocks:
            replace(block.attn, partial(_sd3, block.attn, n, combine))
    else:
        from nasa_diffusers.families import family_of

        family = family_of(denoiser)
        layer = _cross_nag if is_nag else _cross
        for _, attn in family.layers(denoiser):
            replace(attn, partial(layer, family, attn, n, combine))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for attn in replaced:
            del attn.forward


def _append(denoiser: nn.Module, args: tuple, kwargs: dict[str, Any], negative: Tensor):
    """The negative text behind the positive one, and positions for it."""
    kwargs = dict(zip(parameters(type(denoiser)), args, strict=False)) | kwargs
    text = kwargs["encoder_hidden_states"]
    kwargs["encoder_hidden_states"] = torch.cat([text, negative.expand(len(text), -1, -1)], 1)
    if kwargs.get("txt_ids") is not None:
        kwargs["txt_ids"] = torch.cat([kwargs["txt_ids"]] * 2)
    return (), kwargs


def parameters(denoiser: Any) -> list[str]:
    return list(inspect.signature(denoiser.forward).parameters)[1:]


# ---- cross-attention -----------------------------------------------------------------------------


def _cross(family, attn, n, combine, hidden_states, encoder_hidden_states=None, *args, **kwargs):
    text, negative = encoder_hidden_states[:, :-n], encoder_hidden_states[:, -n:]
    q = family.queries(attn, hidden_states)
    z_pos = sdpa(q, *family.keys_values(attn, text)).flatten(2)
    z_neg = sdpa(q, *family.keys_values(attn, negative)).flatten(2)
    return family.output(attn, combine(z_pos, z_neg))


def _cross_nag(family, attn, n, combine, hidden_states, encoder_hidden_states=None, *args, **kw):
    # the published code has both prompts as one batch, so they have one length
    texts = torch.cat([encoder_hidden_states[:, :-n], encoder_hidden_states[:, -n:]])
    q = family.queries(attn, hidden_states)
    q = q.tile(len(texts) // len(q), 1, 1, 1)
    z_pos, z_neg = sdpa(q, *family.keys_values(attn, texts)).flatten(2).chunk(2)
    return family.output(attn, combine(z_pos, z_neg))


# ---- joint attention -----------------------------------------------------------------------------


def _joint(q: Tensor, k: Tensor, v: Tensor, n: int, combine: Combine) -> tuple[Tensor, Tensor]:
    """Two joint attentions over `[t+; image]` and `[t-; image]`; texts `[b, 2 n, c]`, image."""
    m = 2 * n

    def attend(first: int) -> tuple[Tensor, Tensor]:
        tokens = [torch.cat([x[:, first : first + n], x[:, m:]], 1) for x in (q, k, v)]
        z = sdpa(*tokens).flatten(2)
        return z[:, :n], z[:, n:]

    (text_pos, z_pos), (text_neg, z_neg) = attend(0), attend(n)
    return torch.cat([text_pos, text_neg], 1), combine(z_pos, z_neg)


def _flux_projections(attn, hidden_states: Tensor) -> list[Tensor]:
    q, k, v = (x(hidden_states).unflatten(-1, (attn.heads, -1)) for x in _qkv(attn))
    return [attn.norm_q(q), attn.norm_k(k), v]


def _qkv(attn) -> tuple[nn.Module, ...]:
    return attn.to_q, attn.to_k, attn.to_v


def _rotate(x: Tensor, rotary: Any) -> Any:
    from diffusers.models.embeddings import apply_rotary_emb

    return apply_rotary_emb(x, rotary, sequence_dim=1)


def _flux_double(
    attn, n, combine, hidden_states, encoder_hidden_states=None, attention_mask=None,
    image_rotary_emb=None,
):  # fmt: skip
    image = _flux_projections(attn, hidden_states)
    added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    q, k, v = (x(encoder_hidden_states).unflatten(-1, (attn.heads, -1)) for x in added)
    text = [attn.norm_added_q(q), attn.norm_added_k(k), v]
    q, k, v = (torch.cat(pair, 1) for pair in zip(text, image, strict=True))
    texts, z = _joint(_rotate(q, image_rotary_emb), _rotate(k, image_rotary_emb), v, n, combine)
    return attn.to_out[1](attn.to_out[0](z)), attn.to_add_out(texts)


def _flux_single(
    attn, n, combine, hidden_states, encoder_hidden_states=None, attention_mask=None,
    image_rotary_emb=None,
):  # fmt: skip
    q, k, v = _flux_projections(attn, hidden_states)
    texts, z = _joint(_rotate(q, image_rotary_emb), _rotate(k, image_rotary_emb), v, n, combine)
    return torch.cat([texts, z], 1)


def _flux_single_twice(
    attn, n, combine, hidden_states, encoder_hidden_states=None, attention_mask=None,
    image_rotary_emb=None,
):  # fmt: skip
    """Both prompts as a batch, each with an image of its own; the guided image goes to both."""
    q, k, v = _flux_projections(attn, hidden_states)
    z = sdpa(_rotate(q, image_rotary_emb), _rotate(k, image_rotary_emb), v).flatten(2)
    z_pos, z_neg = z[:, n:].chunk(2)
    return torch.cat([z[:, :n], combine(z_pos, z_neg).tile(2, 1, 1)], 1)


def _double_single_blocks(denoiser, n: int) -> list[Any]:
    """Hooks: two sequences before the first single block, the positive image after the last."""
    blocks = list(denoiser.single_transformer_blocks)

    def before(block, args, kwargs):
        # positions of one text only
        rotary = tuple(torch.cat([x[:n], x[2 * n :]]) for x in kwargs["image_rotary_emb"])
        kwargs = kwargs | {"image_rotary_emb": rotary}
        if block is blocks[0]:
            kwargs["hidden_states"] = kwargs["hidden_states"].tile(2, 1, 1)
            kwargs["encoder_hidden_states"] = torch.cat(kwargs["encoder_hidden_states"].split(n, 1))
        return args, kwargs

    def after(block, args, output):
        return tuple(x.chunk(2)[0] for x in output)

    return [
        *(block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks),
        blocks[-1].register_forward_hook(after),
    ]


def _sd3(attn, n, combine, hidden_states, encoder_hidden_states=None, *args, **kwargs):
    def project(x: Tensor, modules, norms) -> list[Tensor]:
        made = [module(x).unflatten(-1, (attn.heads, -1)) for module in modules]
        return [
            y if norm is None else norm(y) for y, norm in zip(made, (*norms, None), strict=True)
        ]

    image = project(hidden_states, _qkv(attn), (attn.norm_q, attn.norm_k))
    added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    text = project(encoder_hidden_states, added, (attn.norm_added_q, attn.norm_added_k))
    q, k, v = (torch.cat(pair, 1) for pair in zip(text, image, strict=True))
    texts, z = _joint(q, k, v, n, combine)
    out = attn.to_out[1](attn.to_out[0](z))
    return out, (texts if attn.context_pre_only else attn.to_add_out(texts))
