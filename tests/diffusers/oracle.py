"""NASA the plain way: Algorithm 1 of the paper as a diffusers processor, its printed bugs fixed.

Independent of `nasa_diffusers`: two calls of PyTorch's attention and a subtraction, the negative
text handed to the processor, installed with diffusers' own `set_attn_processor`.
"""

import contextlib

import torch
import torch.nn.functional as F


class Algorithm1:
    """`to_out(Z+ - sum of alpha_i * Z-_i)` for one text cross-attention layer."""

    def __init__(self, negatives):
        # (text [r, n, c], bool mask [r, n] or None, alpha broadcastable to [b, 1, l, 1])
        self.negatives = negatives

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, *_, **__
    ):
        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        q = self.normed(attn, attn.norm_q, attn.to_q(hidden_states))
        if attention_mask is not None:
            attention_mask = attention_mask[:, None]
        text, images = encoder_hidden_states, None
        if getattr(attn, "add_k_proj", None) is not None:
            # Wan's: image tokens, then 512 of text
            images, text = text[:, :-512], text[:, -512:]
        o = self.combine(attn, q, text, attention_mask)
        if images is not None:
            k = self.normed(attn, attn.norm_added_k, attn.add_k_proj(images))
            v = self.heads(attn, attn.add_v_proj(images))
            o = o + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[0](o)

    def combine(self, attn, q, text, text_mask):
        """What the layer makes of its prompts, `[b, l, h * d]`."""
        z = self.attend(attn, q, text, text_mask)
        for text, mask, alpha in self.negatives:
            text = rows(text.to(z.dtype), len(q))
            mask = None if mask is None else rows(mask, len(q))[:, None, None, :]
            alpha = torch.as_tensor(alpha(q.shape[2]) if callable(alpha) else alpha).to(z.dtype)
            alpha = rows(alpha, len(q)) if alpha.dim() else alpha
            z = z - alpha * self.attend(attn, q, text, mask)
        # [b, h, l, d] -> [b, l, h * d]
        return z.transpose(1, 2).flatten(2)

    def attend(self, attn, q, text, mask):
        text = self.norm(getattr(attn, "norm_cross", None), text)
        k = self.normed(attn, attn.norm_k, attn.to_k(text))
        v = self.heads(attn, attn.to_v(text))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def normed(self, attn, norm, x):
        """`[b, h, n, d]`; Cosmos norms each head, all others that have norms all heads at once."""
        if norm is not None and norm.weight.numel() < x.shape[-1]:
            return norm(self.heads(attn, x))
        return self.heads(attn, self.norm(norm, x))

    def heads(self, attn, x):
        return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)

    def norm(self, norm, x):
        return x if norm is None else norm(x)


def rows(x, batch):
    """One row for each of the batch; Latte makes rows of its frames."""
    return x.expand(batch, *x.shape[1:]) if len(x) == 1 else x.repeat_interleave(batch // len(x), 0)


def published_nag(z_pos, z_neg, scale, tau, share, p=1):
    """NAG's published steps, on `[b, l, h * d]`; `share` is its alpha, and for FLUX `p` is 2."""
    guided = z_pos * scale - z_neg * (scale - 1)
    norm_pos = z_pos.norm(p=p, dim=-1, keepdim=True)
    ratio = guided.norm(p=p, dim=-1, keepdim=True) / norm_pos
    guided = guided * torch.minimum(ratio, torch.full_like(ratio, tau)) / ratio
    return guided * share + z_pos * (1 - share)


def plain_projected(z_pos, away):
    """Projected NASA on `[..., d]`, step by step; `away` is the sum of alpha Z- of all prompts."""
    unit = z_pos / z_pos.norm(dim=-1, keepdim=True)
    beside = away - (away * unit).sum(-1, keepdim=True) * unit
    o = z_pos - beside
    return o / o.norm(dim=-1, keepdim=True) * z_pos.norm(dim=-1, keepdim=True)


def algorithm_1(denoiser, negatives, layers=lambda name: True):
    """The denoiser with Algorithm 1 in its `attn2` layers; `negatives` in the layers' channels."""
    return installed(denoiser, Algorithm1(negatives), layers)


@contextlib.contextmanager
def installed(denoiser, processor, layers=lambda name: True):
    """The denoiser with one processor in all its `attn2` layers, by diffusers' own means."""
    found = {
        name: module
        for name, module in denoiser.named_modules()
        if name.endswith("attn2") and ".motion_modules." not in name and layers(name)
    }
    stock = {name: module.processor for name, module in found.items()}
    for module in found.values():
        module.set_processor(processor)
    try:
        yield denoiser
    finally:
        for name, module in found.items():
            module.set_processor(stock[name])
