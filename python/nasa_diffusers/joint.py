"""The hooks on a denoiser whose blocks carry text and image together: FLUX.1, SD3.

Such a block attends from all tokens to all tokens, [image; text], and changes both. NASA gives the
denoiser the tokens of every prompt side by side as its text, which all of it but the attention
treats token by token; the attention then keeps the prompts apart:

    image queries             Z+ over [image; positive], less what `rule` takes from the negative,
                              or under NAG both Z+ and Z- over [image; negative], blended
    positive text queries     [image; positive], as without NASA
    negative text queries     [image; negative]

So there is one image stream, the positive text is what it is in the stock model given that
image, and the negative prompt is carried through the blocks as the model carries its prompt.
Between the blocks the text is a tensor like any other: what keeps a block's or an attention's
output, to use it again or to extrapolate it, does so with all prompts.

Names: b batch, l image tokens, n text tokens, h heads, d head_dim, c channels.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from nasa_diffusers import ip_adapter
from nasa_diffusers.chain import as_called, may_skip, skipping_hooks
from nasa_diffusers.guided_text import GuidedText
from nasa_diffusers.layer import Hook
from nasa_diffusers.prompts import nothing, subtract
from nasa_diffusers.streams import Streams, keep_apart

# in `joint_attention_kwargs`, which a denoiser hands to its blocks, and a block to its attention
KEYWORD = "nasa"
Rope = Any  # a tuple of cosine and sine, each [l + n, d]


@dataclass(eq=False)
class Texts:
    """The prompts in the text of a call: their lengths, and what is done with them."""

    text: GuidedText
    lengths: list[int]  # n_pos, then n_neg of each negative prompt
    is_guided: bool = True  # False: the negative prompts are carried, and change nothing
    may_end: bool = True  # the negative prompts end after the last guided layer
    in_block: bool = False  # a block's hook has put the image first
    are_attended: bool = False  # the attention has seen that they are several


class JointMaths(Protocol):
    """What a family says of the attention of its blocks; Q, K and V are `[b, tokens, h, d]`."""

    def check_attention(self, name: str, attn: Any, attention_mask: Tensor | None) -> None: ...
    def image_heads(self, attn: Any, image: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...
    def text_heads(self, attn: Any, text: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...


class BlockHook(Hook):
    """Runs a block of two streams, image and text, with all prompts as its text."""

    def __init__(self, name: str, block: nn.Module, is_last: bool):
        super().__init__()
        self.name, self.layer = name, f"{name}.attn"
        # no layer after this one is guided: the negative prompts end here
        self.is_last = is_last
        # of the class: another hook may hide the signature of the module's own forward
        self.parameters = list(inspect.signature(type(block).forward).parameters)[1:]

    def new_forward(self, block: nn.Module, *args, **kwargs) -> tuple[Any, Tensor]:
        inputs = dict(zip(self.parameters, args, strict=False)) | kwargs
        options = dict(inputs.get("joint_attention_kwargs") or {})
        texts = options.pop(KEYWORD, None)
        if texts is None:
            return self.stock(*args, **kwargs)
        self._check_gradients(texts.text)
        image, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
        inputs["joint_attention_kwargs"] = options
        if text.shape[1] != sum(texts.lengths):
            # the negative prompts have ended
            if not torch.compiler.is_compiling():
                texts.text.reached.add(self.layer)
            return self.run(block, args, inputs, image, text, texts.lengths[:1], texts.lengths)
        texts = replace(texts, in_block=True, are_attended=False)
        options[KEYWORD] = texts
        text, image = self.run(block, args, inputs, image, text, texts.lengths, texts.lengths)
        if not texts.are_attended and not may_skip(block.attn):  # type: ignore[arg-type]
            raise RuntimeError(
                f"nasa_diffusers: the attention of block {self.name!r} is not the one that "
                "enable_nasa prepared. Call disable_nasa(pipe), make that change, then call "
                "enable_nasa again"
            )
        if self.is_last and texts.may_end and text is not None:
            text = text[:, : texts.lengths[0]]
        return text, image

    def _check_gradients(self, text: GuidedText) -> None:
        if not torch.is_grad_enabled() and any(term.alpha.learns for term in text.terms):
            raise RuntimeError(
                f"nasa_diffusers: block {self.name!r} runs without gradients in a call whose alpha "
                "learns, as reentrant checkpointing does; alpha would get no gradient. Call "
                "enable_gradient_checkpointing() without a function, or use_reentrant=False"
            )

    def run(
        self,
        block: nn.Module,
        args: tuple,
        inputs: dict[str, Any],
        image: Tensor,
        text: Tensor,
        lengths: list[int],
        given: list[int],
    ) -> tuple[Tensor | None, Tensor]:
        """The stock block: text and image, each changed. Of the prompts `given` to the denoiser
        the text has the first `lengths`."""
        changes = {"hidden_states": image, "encoder_hidden_states": text}
        args, kwargs = as_called(self.parameters, args, inputs | changes)
        return self.stock(*args, **kwargs)


class RopeBlockHook(BlockHook):
    """A block whose tokens have positions; the model gives those of [all prompts; image]."""

    def run(self, block, args, inputs, image, text, lengths, given):
        rope = inputs["image_rotary_emb"]
        if rope is not None:
            n, order = sum(lengths), image_first if len(lengths) > 1 else text_first
            inputs["image_rotary_emb"] = tuple(order(x, n, sum(given)) for x in rope)
        return super().run(block, args, inputs, image, text, lengths, given)


class SingleBlockHook(RopeBlockHook):
    """A block that treats text and image alike, as one sequence: here with the image first."""

    def run(self, block, args, inputs, image, text, lengths, given):
        if len(lengths) == 1:
            return super().run(block, args, inputs, image, text, lengths, given)
        image, text = super().run(block, args, inputs, text, image, lengths, given)
        return text, image


def image_first(rope: Tensor, n: int, given: int) -> Tensor:
    """Rows of [text; image], `given` of them text, as [image; the first n of the text]."""
    return torch.cat([rope[given:], rope[:n]])


def text_first(rope: Tensor, n: int, given: int) -> Tensor:
    """Rows of [text; image], `given` of them text, without the text after the first n."""
    return torch.cat([rope[:n], rope[given:]])


def side_by_side(guided_text: GuidedText, rows: int) -> Tensor:
    """The tokens of all prompts, the positive one first: `[b, sum of n, c]`."""
    return torch.cat([text.expand(rows, -1, -1) for text in guided_text.texts], dim=1)


def positions(ids: Tensor, lengths: list[int]) -> Tensor:
    """The `txt_ids` of the positive prompt, `[n, 3]`, as those of all prompts side by side.

    A negative token stands where the positive token of the same number stands. FLUX.1 pipelines
    put all text at position 0, so what follows the last positive token stands there as well.
    """
    ids = ids[0] if ids.dim() == 3 else ids
    rows = [ids]
    for n in lengths[1:]:
        rows += [ids[:n], ids[-1:].expand(max(n - lengths[0], 0), -1)]
    return torch.cat(rows)


class JointAttentionHook(Hook):
    """Keeps the prompts of a block apart in its attention."""

    def __init__(self, name: str, family: JointMaths, guided: bool, token_flops: int):
        super().__init__()
        self.name, self.family, self.guided = name, family, guided
        self.token_flops = token_flops
        self.last_call: JointCall | None = None

    def new_forward(self, attn: Any, *args, **kwargs) -> Any:
        texts = kwargs.pop(KEYWORD, None)
        if texts is None:
            return self.stock(*args, **kwargs)
        self._check_place(attn, texts)
        texts.are_attended = True
        if not torch.compiler.is_compiling():
            texts.text.reached.add(self.name)
        return self.attend(attn, texts, *args, **kwargs)

    def _check_place(self, attn: Any, texts: Texts) -> None:
        if not texts.in_block:
            raise RuntimeError(
                f"nasa_diffusers: the block around layer {self.name!r} is not the one that "
                "enable_nasa prepared: its forward was replaced. Call disable_nasa(pipe), make "
                "that change, then call enable_nasa again"
            )
        refuse_skipped_scores(self.name, attn)

    def attend(
        self,
        attn: Any,
        texts: Texts,
        hidden_states: Tensor,  # [b, l, c], in a single block [b, l + n, c]
        encoder_hidden_states: Tensor | None = None,  # [b, n, c], None in a single block
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rope | None = None,
        **kwargs,  # of other processors; a stock one passes over them
    ) -> Any:
        self.family.check_attention(self.name, attn, attention_mask)
        # [b, l, h, d], then [b, l + n, h, d]
        q, k, v = self.family.image_heads(attn, hidden_states)
        added = self.of_images(attn, texts, q, kwargs)
        if encoder_hidden_states is not None:
            of_text = self.family.text_heads(attn, encoder_hidden_states)
            q, k, v = (torch.cat(pair, dim=1) for pair in zip((q, k, v), of_text, strict=True))
        if image_rotary_emb is not None:
            q, k = (self.rotate(x, image_rotary_emb) for x in (q, k))
        # SD3 drops the text of its last block
        drops_text = bool(attn.context_pre_only)
        text, is_guided = texts.text, self.guided and texts.is_guided
        streams = Streams(q, k, v, texts.lengths, text.terms, not drops_text, text.backend)
        if not torch.compiler.is_compiling():
            self.last_call = JointCall(
                q.shape, texts.lengths, hidden_states.shape[2], self.token_flops,
                with_text=not drops_text,
                attends_twice=is_guided and text.method.attends_image_twice(streams),
            )  # fmt: skip
        o = (text.method.joint(streams) if is_guided else keep_apart(streams)).flatten(2)
        if encoder_hidden_states is None:
            return o
        image = o[:, : hidden_states.shape[1]]
        image = attn.to_out[1](attn.to_out[0](image))
        # where it is dropped it has no rows, but caches may do arithmetic on it
        text_o = o[:, hidden_states.shape[1] :]
        text_o = text_o if drops_text else attn.to_add_out(text_o)
        return (image, text_o) if added is None else (image, text_o, added)

    def of_images(self, attn: Any, texts: Texts, q: Tensor, kwargs: dict) -> Tensor | None:
        """What an IP-Adapter's images add to the image, `[b, l, c]`: FLUX.1 attends to them from
        queries without positions, and the block adds the result as it is."""
        if not isinstance(attn.processor, ip_adapter.JOINT_PROCESSORS):
            return None
        images = kwargs.get("ip_hidden_states")
        if images is None:
            raise ValueError(
                f"nasa_diffusers: layer {self.name!r} has an IP-Adapter and the call brings no "
                "image for it; pass ip_adapter_image, or take it off: pipe.unload_ip_adapter()"
            )
        backend, o = texts.text.backend, None
        for image, alpha in ip_adapter.image_terms(attn, q, images, None, texts.text):
            z = subtract(q, nothing(image), image, alpha, backend)
            o = z if o is None else o + z
        return None if o is None else o.flatten(2)

    @staticmethod
    def rotate(x: Tensor, rope: Rope) -> Any:
        # its annotation says that it returns two tensors; it returns one
        return apply_rotary_emb(x, rope, sequence_dim=1)


def refuse_skipped_scores(name: str, attn: Any) -> None:
    for hook in skipping_hooks(attn):
        if getattr(hook, "skip_attention_scores", False):
            raise RuntimeError(
                f"nasa_diffusers: {type(hook).__name__} replaces the scores of layer {name!r} "
                "inside PyTorch's attention, which NASA computes itself; take it off, or call "
                "disable_nasa(pipe)"
            )


class PlainAttentionHook(Hook):
    """The second attention of a block, over the image alone: it is not told of the texts."""

    def new_forward(self, attn: nn.Module, *args, **kwargs) -> Any:
        kwargs.pop(KEYWORD, None)
        return self.stock(*args, **kwargs)


@dataclass(frozen=True)
class JointCall:
    """The sizes of a layer's last call, for the report. FLOPs count a multiply-add as 2."""

    q: torch.Size  # [b, l + n, h, d]
    lengths: list[int]  # n_pos, then n_neg of each negative prompt
    channels: int
    token_flops: int  # of the linear layers that a text token passes in the block
    with_text: bool  # text tokens are queries, too
    attends_twice: bool  # the image to itself, in one call for Z+ and in one for Z-

    @property
    def texts(self) -> list[tuple[int, int, int]]:
        return [(self.q[0], n, self.channels) for n in self.lengths]

    @property
    def attention_flops(self) -> int:
        """All that the negative tokens add to the block: they are queries and keys, and pass its
        linear layers, in every call."""
        b, rows, h, d = self.q
        queries = rows - sum(self.lengths)
        total = 4 * b * h * d * queries**2 if self.attends_twice else 0
        for n in self.lengths[1:]:
            scores = queries + (queries + n if self.with_text else 0)
            total += b * n * (4 * h * d * scores + self.token_flops)
        return total

    @property
    def projection_flops(self) -> int:
        """Nothing is kept from call to call: the negative stream changes with the image."""
        return 0
