"""Z-Image: Qwen3 text behind the image, in one sequence through 30 blocks.

Image and text are each padded to a multiple of 32 tokens with a learned token that is attended to.
The text passes two blocks of its own before, which know nothing of time. Its positions are counted
from 1, and those of the image begin after the text: a negative prompt counts from 1 as well, and
the image stays where the prompt has put it. Classifier-free guidance is one call with a list of
texts, [prompts, negative prompts]; the pipeline's own negative prompts are left alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nasa_diffusers.encoding import encode_prompt, side_by_side
from nasa_diffusers.families.base import ImageTokens
from nasa_diffusers.families.side import SideStream, complex_rotation, linears
from nasa_diffusers.side import Layout

try:
    from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor
except ImportError:  # before diffusers 0.36
    PROCESSORS: tuple[type, ...] = ()
else:
    PROCESSORS = (ZSingleStreamAttnProcessor,)

MULTIPLE = 32


def padded(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE


def grid(inputs) -> tuple[int, int, int]:
    """Frames, height and width of the image's tokens."""
    patch, frames = inputs.get("patch_size") or 2, inputs.get("f_patch_size") or 1
    sizes = zip(inputs["x"][0].shape[-3:], (frames, patch, patch), strict=True)
    f, h, w = (size // patch for size, patch in sizes)
    return f, h, w


class ZImageTokens(ImageTokens):
    def grids(self, sample, inputs):
        return (grid(inputs),)

    def padding(self, sample, inputs):
        f, h, w = grid(inputs)
        return padded(f * h * w) - f * h * w


class ZImage(SideStream):
    name = "Z-Image"
    denoisers = ("ZImageTransformer2DModel",)
    text_argument = "cap_feats"
    text_parts = ("text_encoder", "tokenizer")
    text_options = ("max_sequence_length",)
    processors = PROCESSORS
    block_lists = (
        (
            "layers",
            Layout(image="x", text_first=False, rope="freqs_cis", attention="attention"),
        ),
    )
    reads = ("x", "patch_size", "f_patch_size")

    def default_nag(self, denoiser):
        """Where users of a ComfyUI node for it have settled."""
        return 2.0, 2.5, 0.25

    def encode(self, pipe, prompts, **options):
        embeds, *_ = encode_prompt(pipe, prompts, options)
        return side_by_side(embeds)

    def read_embeds(self, embeds, mask):
        are_texts = isinstance(embeds, list) and all(isinstance(x, Tensor) for x in embeds)
        return side_by_side(embeds) if are_texts and embeds else (embeds, mask)

    def image_tokens(self, denoiser):
        return ZImageTokens(self, denoiser)

    def as_text(self, text):
        is_list = isinstance(text, list) and len(text) > 0
        if not is_list or not all(isinstance(x, Tensor) and x.dim() == 2 for x in text):
            what = "texts with images between them, of Z-Image Omni" if is_list else type(text)
            raise ValueError(
                f"nasa_diffusers: cap_feats must be a list of texts [n, c], got {what}, whose "
                "images are not told apart; call disable_nasa(pipe)"
            )
        return text[0][None]

    def as_sample(self, sample):
        return sample[0].expand(len(sample), *sample[0].shape)

    def check_call(self, denoiser, inputs):
        super().check_call(denoiser, inputs)
        sizes = {tuple(x.shape) for x in inputs["x"]}
        if len(sizes) > 1:
            raise ValueError(
                f"nasa_diffusers: the images of a call must be of one size, got {sorted(sizes)}; "
                "call the transformer once for each size"
            )

    def positive_tokens(self, side, inputs):
        f, h, w = grid(side.inputs)
        return inputs["x"].shape[1] - padded(f * h * w)

    def prepare(self, denoiser, side, term):
        rows, n, _ = term.text.shape
        x = denoiser.cap_embedder(term.text)
        x = F.pad(x, (0, 0, 0, padded(n) - n))
        at, mask = torch.arange(x.shape[1], device=x.device), None
        # [r or 1, 1]
        own: Tensor = torch.full((1, 1), n, device=x.device)
        if term.mask is not None:
            own = term.mask.sum(1, keepdim=True)
            mask = at < (own + MULTIPLE - 1) // MULTIPLE * MULTIPLE
        x = torch.where((at >= own)[..., None], denoiser.cap_pad_token.to(x.dtype), x)
        turns = self.turns(denoiser, x.shape[1], x.device)[None].expand(rows, -1, -1)
        for block in denoiser.context_refiner:
            x = block(x, mask, turns)
        return x, mask

    def turns(self, denoiser, n: int, device: torch.device) -> Tensor:
        """The positions of a text, `[n, d / 2]`."""
        ids = torch.zeros(n, 3, dtype=torch.int32, device=device)
        ids[:, 0] = torch.arange(1, n + 1, device=device)
        return denoiser.rope_embedder(ids)

    def arrange(self, denoiser, side, rope):
        negatives = side.lengths[1:]
        text = self.turns(denoiser, max(negatives), rope.device)
        own = [text[:n].expand(rope.shape[0], -1, -1) for n in negatives]
        return torch.cat([rope, *own], dim=1)

    def rotate(self, x, rope):
        return complex_rotation(x, rope)

    def text_mask(self, side, options):
        mask = options.get("attention_mask")
        return None if mask is None else mask[:, -side.lengths[0] :]

    def text_layers(self, block):
        return linears(block, "adaLN_modulation")
