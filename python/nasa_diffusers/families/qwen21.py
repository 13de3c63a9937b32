"""Qwen-Image 2.1: text, and the images that are edited, before the image in one sequence.

Text attends to what is before it, at time 0, and never to the image that is made. So its keys and
values are the same in each step, and in each image: those of a negative prompt are made by the
blocks on its text alone, once for as long as the pipeline keeps its own prompt's (`use_kv_cache`),
or else in each call. The image that is made attends to them beside the prompt; it alone is guided.
The images that are edited are a part of the prompt; a negative prompt is encoded without them.

Classifier-free guidance (`true_cfg_scale`) is two calls; the one with the pipeline's own negative
prompt is left alone.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nasa_diffusers import side as stream
from nasa_diffusers.families.base import ImageTokens, config
from nasa_diffusers.families.joint import Joint, token_flops
from nasa_diffusers.families.side import complex_rotation
from nasa_diffusers.families.versions import stock_class
from nasa_diffusers.joint import JointCall, refuse_skipped_scores
from nasa_diffusers.layer import Hook
from nasa_diffusers.side import Side
from nasa_diffusers.streams import Streams

MODULE = "transformer_qwenimage21"
KVCache = stock_class(MODULE, "QwenImage21KVCache")


class Qwen21Tokens(ImageTokens):
    """The last shape of a call is that of the image that is made."""

    def grids(self, sample, inputs):
        return (tuple(inputs["img_shapes"][0][-1]),)


class FirstBlockHook(Hook):
    """Has the keys and values of the negative prompts made before the first block runs."""

    def __init__(self, family: QwenImage21, denoiser: Any):
        super().__init__()
        self.family, self.denoiser = family, denoiser

    def new_forward(self, block: nn.Module, *args, **kwargs) -> Any:
        side = stream.CALL.side
        if side is not None:
            self.family.begin(self.denoiser, side, kwargs["modulation"])
        return self.stock(*args, **kwargs)


class TargetHook(Hook):
    """The attention of a block: the image that is made sees the negative prompts, too."""

    def __init__(self, name: str, index: int, guided: bool, token_flops: int):
        super().__init__()
        self.name, self.index, self.guided, self.token_flops = name, index, guided, token_flops
        self.last_call: JointCall | None = None

    def new_forward(self, attn: Any, *args, **kwargs) -> Any:
        side = stream.CALL.side
        if side is None:
            return self.stock(*args, **kwargs)
        refuse_skipped_scores(self.name, attn)
        if not torch.compiler.is_compiling():
            side.text.reached.add(self.name)
        if not (self.guided and side.is_guided):
            return self.stock(*args, **kwargs)
        return self.attend(attn, side, *args, **kwargs)

    def attend(
        self,
        attn: Any,
        side: Side,
        hidden_states: Tensor,  # [b, n + l, c], or [b, l, c] where the prompt's keys are kept
        attention_mask: Any = None,
        rotary_emb: Tensor | None = None,
        layer_cache: Any = None,
        kv_cache_mode: str | None = None,
        segments: list[tuple[int, int, bool]] | None = None,
        key_valid: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        q, k, v = project(attn, hidden_states, rotary_emb)
        if segments is None:
            k_pos, v_pos = layer_cache.get()
            n, before = k_pos.shape[1], None
            valid = None if attention_mask is None else attention_mask[:, 0, 0]
        else:
            n, valid = segments[-1][1], key_valid
            before = self.stock(
                hidden_states[:, :n],
                rotary_emb=None if rotary_emb is None else rotary_emb[:n],
                layer_cache=layer_cache,
                kv_cache_mode=kv_cache_mode,
                segments=segments,
                key_valid=None if key_valid is None else key_valid[:, :n],
                **options,
            )
            k_pos, v_pos, q, k, v = k[:, :n], v[:, :n], q[:, n:], k[:, n:], v[:, n:]
        rows, text = len(q), side.text
        negatives = [(x[self.index] for x in each) for each in side.inputs["keys_values"]]
        k_negs, v_negs = zip(
            *([x.expand(rows, -1, -1, -1) for x in each] for each in negatives), strict=True
        )
        lengths = [n, *(x.shape[1] for x in k_negs)]
        streams = Streams(
            q, torch.cat([k, k_pos, *k_negs], dim=1), torch.cat([v, v_pos, *v_negs], dim=1),
            lengths, side.terms, False, text.backend, None if valid is None else valid[:, :n],
        )  # fmt: skip
        if not torch.compiler.is_compiling():
            self.last_call = JointCall(
                streams.k.shape, lengths, hidden_states.shape[2], self.token_flops,
                with_text=False, attends_twice=text.method.attends_image_twice(streams),
            )  # fmt: skip
        o = text.method.joint(streams).flatten(2).type_as(q)
        o = attn.to_out[1](attn.to_out[0](o))
        return o if before is None else torch.cat([before, o], dim=1)


def project(attn: Any, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`[b, n, c]` to Q, K and V, each `[b, n, h, d]`, in their places."""
    head_dim = attn.inner_dim // attn.heads
    q, k, v = (y(x).unflatten(2, (-1, head_dim)) for y in (attn.to_q, attn.to_k, attn.to_v))
    q, k = attn.norm_q(q).to(v.dtype), attn.norm_k(k).to(v.dtype)
    if rope is not None:
        q, k = complex_rotation(q, rope), complex_rotation(k, rope)
    return q, k, v


class QwenImage21(Joint):
    name = "Qwen-Image 2.1"
    denoisers = ("QwenImage21Transformer2DModel",)
    rules = ("nasa-cross", "nasa-text", "nasa")
    is_beside = True
    doubles_batch = False
    masks_text = True
    text_parts = ("text_encoder", "processor")
    processors = (stock_class(MODULE, "QwenImage21AttnProcessor"),)

    def __init__(self):
        # by what a pipeline keeps of its own prompt: the negative prompts' texts, and theirs
        self.kept: WeakKeyDictionary[Any, tuple] = WeakKeyDictionary()

    def default_nag(self, denoiser):
        """No published code has it: the NAG paper's for FLUX.1."""
        return 5.0, 2.5, 0.25

    def check(self, denoiser):
        if not config(denoiser, "causal_condition"):
            raise ValueError(
                f"enable_nasa: the text of this {type(denoiser).__name__} sees the image "
                "(causal_condition=False), so a negative prompt would have to pass the blocks in "
                "each step; the published weights are causal"
            )

    def encode(self, pipe, prompts, **options):
        embeds, mask, *_ = pipe.encode_prompt(prompts, device=pipe._execution_device)
        return embeds, mask

    def image_tokens(self, denoiser):
        return Qwen21Tokens(self, denoiser)

    # ---- hooks -------------------------------------------------------------------------------

    def layer_hook(self, denoiser, name, cache, guided):
        index = int(name.split(".")[1])
        block = denoiser.transformer_blocks[index]
        return TargetHook(name, index, guided, token_flops(block, ("attn", "img_mlp")))

    def block_hooks(self, denoiser, guided):
        return [(denoiser.transformer_blocks[0], FirstBlockHook(self, denoiser))]

    def hooked_modules(self, denoiser):
        first = denoiser.transformer_blocks[0]
        return {name: (first, attn) for name, attn in self.layers(denoiser)}

    def keeps_text(self, denoiser):
        return False

    def check_call(self, denoiser, inputs):
        stream.refuse_checkpointing(denoiser)

    # ---- a call ------------------------------------------------------------------------------

    def carry(self, denoiser, guided_text, inputs, is_guided=True):
        stream.CALL.side = Side(guided_text, is_guided, {"kv_cache": inputs.get("kv_cache")})
        return {}

    @torch.compiler.disable
    def begin(self, denoiser: Any, side: Side, modulation: Tensor) -> None:
        """Keys and values of each negative prompt, by block, `[r, m, h, d]`."""
        owner, texts = side.inputs["kv_cache"], [term.text for term in side.text.terms]
        made = None
        if owner is not None and not torch.is_grad_enabled():
            before, found = self.kept.get(owner, ((), None))
            if len(before) == len(texts) and all(map(lambda x, y: x is y, before, texts)):
                made = found
        if made is None:
            # the blocks run on other tokens: their attention is their own
            stream.CALL.side = None
            made = [self.made_of(denoiser, term, modulation) for term in side.text.terms]
            stream.CALL.side = side
            if owner is not None and not torch.is_grad_enabled():
                self.kept[owner] = texts, made
        side.inputs["keys_values"] = made
        side.terms = side.text.terms

    def made_of(self, denoiser: Any, term: Any, modulation: Tensor) -> tuple:
        x, m = denoiser.txt_in(term.text), term.text.shape[1]
        nowhere = torch.zeros(m, dtype=torch.bool, device=x.device)
        rope = denoiser.pos_embed([], nowhere, device=x.device)
        cache: Any = KVCache(len(denoiser.transformer_blocks))  # type: ignore[call-arg]
        for block, layer in zip(denoiser.transformer_blocks, cache.layer_caches, strict=True):
            x = block(
                hidden_states=x,
                # the row of time 0, once for the text and once for no image
                modulation=modulation[-1:].expand(2, -1),
                rotary_emb=rope,
                target_token_mask=nowhere,
                layer_cache=layer,
                kv_cache_mode="extract",
                cache_write_slice=slice(0, m),
                segments=[(0, m, True)],
                key_valid=term.mask,
            )
        return [layer.k for layer in cache.layer_caches], [layer.v for layer in cache.layer_caches]
