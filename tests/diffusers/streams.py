"""FLUX.1 and SD3 with two text streams, the plain way: an oracle independent of `nasa_diffusers`.

Every block is written out from its modules: modulation, projections, norms, rope, attention,
feed-forward. The attention is written out from the definition of each rule, with whole softmaxes
over concatenated keys. Nothing of diffusers runs above a linear layer or a norm.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from oracle import plain_projected, published_nag


class Nag(NamedTuple):
    """In place of a rule: both attentions over all of their text, blended; alpha is the share."""

    scale: float
    tau: float
    p: int = 1


def attend(q, k, v, mask=None):
    """`[b, n, h, d]`, all of it; `mask` `[b, keys]` or `[b, queries, keys]`, True = attend, or
    numbers that are added."""
    scores = torch.einsum("blhd,bnhd->bhln", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        mask = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None]
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, float("-inf"))
        else:
            scores = scores + mask
    return torch.einsum("bhln,bnhd->blhd", scores.softmax(-1), v)


def image_attention(rule, alpha, image, pos, neg, mask, pos_mask=None):
    """Image queries over their own keys and both prompts, each a tuple (q, k, v); alpha is a
    number or, for a map, `[1, l, 1, 1]`."""
    (q, k, v), (_, k_pos, v_pos), (_, k_neg, v_neg) = image, pos, neg
    present = q.new_ones(q.shape[0], k.shape[1], dtype=torch.bool)
    if mask is None:
        mask = q.new_ones(q.shape[0], k_neg.shape[1], dtype=torch.bool)
    if pos_mask is None:
        pos_mask = q.new_ones(q.shape[0], k_pos.shape[1], dtype=torch.bool)
    if pos_mask.dtype != torch.bool:
        # added: of a negative prompt as much as of a token that is no padding
        mask = torch.where(mask.bool(), 1.0, float("-inf"))
    with_pos, with_neg = torch.cat([present, pos_mask], 1), torch.cat([present, mask], 1)
    z_pos = attend(q, torch.cat([k, k_pos], 1), torch.cat([v, v_pos], 1), with_pos)
    if rule in ("nasa", "projected") or isinstance(rule, Nag):
        taken = attend(q, torch.cat([k, k_neg], 1), torch.cat([v, v_neg], 1), with_neg)
    elif rule == "nasa-text":
        taken = attend(
            q, torch.cat([k, k_neg], 1), torch.cat([torch.zeros_like(v), v_neg], 1), with_neg
        )
    elif rule == "nasa-cross":
        taken = attend(q, k_neg, v_neg, mask)
    elif rule == "vsf":
        everything = torch.cat([with_pos, mask], 1)
        keys, nothing = torch.cat([k, k_pos, k_neg], 1), torch.zeros_like
        z_pos = attend(q, keys, torch.cat([v, v_pos, nothing(v_neg)], 1), everything)
        taken = attend(q, keys, torch.cat([nothing(v), nothing(v_pos), v_neg], 1), everything)
    if isinstance(rule, Nag):
        share = alpha.squeeze(-1) if isinstance(alpha, torch.Tensor) else alpha
        merged = published_nag(
            z_pos.flatten(2), taken.flatten(2), rule.scale, rule.tau, share, rule.p
        )
        return merged.unflatten(2, z_pos.shape[2:])
    return z_pos - alpha * taken


def joint_attention(rule, negatives, image, pos, negs, pos_mask=None):
    """All rows of a block: image, positive text, and a list of negative texts."""
    q, k, v = image
    with_pos = pos_mask
    if pos_mask is not None:
        with_pos = torch.cat([pos_mask.new_ones(pos_mask.shape[0], k.shape[1]), pos_mask], 1)
    z_pos = attend(q, torch.cat([k, pos[1]], 1), torch.cat([v, pos[2]], 1), with_pos)
    o = z_pos
    for (_, alpha, mask), neg in zip(negatives, negs, strict=True):
        # each takes what it would take alone
        o = o + image_attention(rule, alpha, image, pos, neg, mask, pos_mask) - z_pos
    if rule == "projected" and negatives:
        o = plain_projected(z_pos, z_pos - o)
    if with_pos is not None and with_pos.dtype != torch.bool:
        # as the model does it: from token to token, the product of both
        with_pos = with_pos[:, None, :] * pos_mask[:, :, None]
    texts = [attend(pos[0], torch.cat([k, pos[1]], 1), torch.cat([v, pos[2]], 1), with_pos)]
    for (_, _, mask), neg in zip(negatives, negs, strict=True):
        if mask is not None:
            mask = torch.cat([mask.new_ones(mask.shape[0], k.shape[1]), mask], 1).bool()
        texts.append(attend(neg[0], torch.cat([k, neg[1]], 1), torch.cat([v, neg[2]], 1), mask))
    return [x.flatten(2) for x in (o, *texts)]


def heads(attn, x, linears, norms):
    q, k, v = (linear(x).unflatten(-1, (attn.heads, -1)) for linear in linears)
    return [norm(y) if norm is not None else y for norm, y in zip(norms, (q, k), strict=True)] + [v]


def image_heads(attn, x):
    return heads(attn, x, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))


def text_heads(attn, x):
    linears = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
    return heads(attn, x, linears, (attn.norm_added_q, attn.norm_added_k))


def layer_norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulation(linear, temb, parts):
    return linear(F.silu(temb))[:, None].chunk(parts, -1)


def feed_forward(x, ff, shift, scale, gate):
    return x + gate * ff(layer_norm(x) * (1 + scale) + shift)


def rotate(x, ids, axes, theta=10000):
    """Rotary positions of `[b, n, h, d]`: pairs of neighbouring channels, an axis at a time."""
    angles = []
    for axis, dim in enumerate(axes):
        frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(ids[:, axis, None].double() * frequencies)
    # [n, 1, d / 2]
    turn = torch.polar(torch.ones(()).double(), torch.cat(angles, -1))[:, None]
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turn
    return torch.view_as_real(turned).flatten(-2).to(x)


def flux(model, rule, negatives, *, hidden_states, encoder_hidden_states, pooled_projections,
         timestep, img_ids, txt_ids, guidance=None, residuals=(), **_):  # fmt: skip
    """A call of FluxTransformer2DModel; `negatives` are (embeds, alpha, mask)."""
    axes = model.config.axes_dims_rope
    times = (timestep * 1000,) if guidance is None else (timestep * 1000, guidance * 1000)
    temb = model.time_text_embed(*times, pooled_projections)
    image = model.x_embedder(hidden_states)
    rows = image.shape[0]
    texts = [model.context_embedder(encoder_hidden_states)]
    texts += [model.context_embedder(e).expand(rows, -1, -1) for e, _, _ in negatives]

    def placed(qkv, ids):
        return rotate(qkv[0], ids, axes), rotate(qkv[1], ids, axes), qkv[2]

    def zeros(text):
        return torch.zeros(text.shape[1], 3)

    for i, block in enumerate(model.transformer_blocks):
        attn = block.attn
        shift, scale, gate, *mlp = modulation(block.norm1.linear, temb, 6)
        parts = placed(image_heads(attn, layer_norm(image) * (1 + scale) + shift), img_ids)
        t_shift, t_scale, t_gate, *t_mlp = modulation(block.norm1_context.linear, temb, 6)
        text_parts = [
            placed(text_heads(attn, layer_norm(t) * (1 + t_scale) + t_shift), zeros(t))
            for t in texts
        ]
        o, *text_o = joint_attention(rule, negatives, parts, text_parts[0], text_parts[1:])
        image = feed_forward(image + gate * attn.to_out[0](o), block.ff, *mlp)
        texts = [
            feed_forward(t + t_gate * attn.to_add_out(to), block.ff_context, *t_mlp)
            for t, to in zip(texts, text_o, strict=True)
        ]
        if residuals:
            image = image + residuals[i]
    for block in model.single_transformer_blocks:
        attn = block.attn
        shift, scale, gate = modulation(block.norm.linear, temb, 3)
        streams = [image, *texts]
        normed = [layer_norm(x) * (1 + scale) + shift for x in streams]
        parts = [
            placed(image_heads(attn, x), img_ids if i == 0 else zeros(x))
            for i, x in enumerate(normed)
        ]
        outputs = joint_attention(rule, negatives, parts[0], parts[1], parts[2:])
        mlps = [F.gelu(block.proj_mlp(x), approximate="tanh") for x in normed]
        image, *texts = (
            x + gate * block.proj_out(torch.cat([o, mlp], 2))
            for x, o, mlp in zip(streams, outputs, mlps, strict=True)
        )
    scale, shift = modulation(model.norm_out.linear, temb, 2)
    return (model.proj_out(layer_norm(image) * (1 + scale) + shift),)


def sd3(model, rule, negatives, *, hidden_states, encoder_hidden_states, pooled_projections,
        timestep, residuals=(), **_):  # fmt: skip
    """A call of SD3Transformer2DModel; `negatives` are (embeds, alpha, mask)."""
    height, width = hidden_states.shape[-2:]
    patch = model.config.patch_size
    image = model.pos_embed(hidden_states)
    temb = model.time_text_embed(timestep, pooled_projections)
    rows = image.shape[0]
    texts = [model.context_embedder(encoder_hidden_states)]
    texts += [model.context_embedder(e).expand(rows, -1, -1) for e, _, _ in negatives]
    for i, block in enumerate(model.transformer_blocks):
        attn = block.attn
        mods = modulation(block.norm1.linear, temb, 9 if block.use_dual_attention else 6)
        shift, scale, gate, *mlp = mods[:6]
        parts = image_heads(attn, layer_norm(image) * (1 + scale) + shift)
        if block.context_pre_only:
            t_scale, t_shift = modulation(block.norm1_context.linear, temb, 2)
        else:
            t_shift, t_scale, t_gate, *t_mlp = modulation(block.norm1_context.linear, temb, 6)
        text_parts = [text_heads(attn, layer_norm(t) * (1 + t_scale) + t_shift) for t in texts]
        o, *text_o = joint_attention(rule, negatives, parts, text_parts[0], text_parts[1:])
        before = image
        image = image + gate * attn.to_out[0](o)
        if block.use_dual_attention:
            shift2, scale2, gate2 = mods[6:]
            own = image_heads(block.attn2, layer_norm(before) * (1 + scale2) + shift2)
            image = image + gate2 * block.attn2.to_out[0](attend(*own).flatten(2))
        image = feed_forward(image, block.ff, *mlp)
        if not block.context_pre_only:
            texts = [
                feed_forward(t + t_gate * attn.to_add_out(to), block.ff_context, *t_mlp)
                for t, to in zip(texts, text_o, strict=True)
            ]
            if residuals:
                image = image + residuals[i]
    scale, shift = modulation(model.norm_out.linear, temb, 2)
    image = model.proj_out(layer_norm(image) * (1 + scale) + shift)
    image = image.unflatten(1, (height // patch, width // patch))
    image = image.unflatten(-1, (patch, patch, -1))
    # [b, c, height, width]
    return (image.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3),)
