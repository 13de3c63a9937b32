"""JoyImage Edit: Qwen3-VL's text beside the image in 20 blocks of two streams.

Text is projected token by token. It has no positions, or, as a model may say, those after the
largest of the image. The denoiser puts the image that is made before the one that is edited; it
alone is guided. A prompt is encoded with the image that is edited, a negative one without.
Classifier-free guidance is two calls; that with the pipeline's own negative prompt is left alone.
"""

import torch
from diffusers.models.embeddings import apply_rotary_emb

from nasa_diffusers.alpha import Targets
from nasa_diffusers.families.base import ImageTokens, video_grid
from nasa_diffusers.families.side import SideStream
from nasa_diffusers.families.versions import stock_class
from nasa_diffusers.side import Layout


class JoyTokens(ImageTokens):
    """Latents are `[b, c, frames, height, width]`, or `[b, images, c, frames, height, width]`."""

    def __init__(self, family, denoiser):
        super().__init__(family, denoiser)
        self._targets: dict[tuple, Targets] = {}

    def grids(self, sample, inputs):
        return (video_grid(sample, self.denoiser.config.patch_size),)

    def _sizes(self, sample):
        """Tokens of the image that is made, and of those behind it."""
        frames, height, width = video_grid(sample, self.denoiser.config.patch_size)
        own, images = frames * height * width, sample.shape[1] if sample.dim() == 6 else 1
        return own, (images - 1) * own

    def padding(self, sample, inputs):
        return self._sizes(sample)[1]

    def targets(self, inputs):
        sample = inputs["hidden_states"]
        own, others = self._sizes(sample)
        if not others or sample.is_meta:
            return None
        key = own, others, sample.device
        if key not in self._targets:
            # another thread may do the same: both make the same
            are = torch.arange(own + others, device=sample.device) < own
            self._targets = {key: Targets(are)}
        return self._targets[key]


class JoyImageEdit(SideStream):
    name = "JoyImage Edit"
    denoisers = ("JoyImageEditTransformer3DModel",)
    doubles_batch = False
    masks_text = True
    text_parts = ("text_encoder", "tokenizer")
    text_options = ("max_sequence_length",)
    processors = (stock_class("transformer_joyimage", "JoyImageAttnProcessor"),)
    block_lists = (("double_blocks", Layout(text="encoder_hidden_states", text_first=False)),)
    reads = ("hidden_states",)

    def default_nag(self, denoiser):
        """No published code of the paper has it: the NAG paper's for FLUX.1."""
        return 5.0, 2.5, 0.25

    def image_tokens(self, denoiser):
        return JoyTokens(self, denoiser)

    def prepare(self, denoiser, side, term):
        return denoiser.condition_embedder.text_embedder(term.text), term.mask

    def arrange(self, denoiser, side, rope):
        image, text = rope
        if text is None:
            # nothing turns the text: cosine 1 and sine 0
            count = sum(side.lengths)
            turns = zip(image, (1.0, 0.0), strict=True)
            own = [x.new_full((count, x.shape[1]), value) for x, value in turns]
        else:
            sample, patches = side.inputs["hidden_states"], denoiser.config.patch_size
            frames, height, width = video_grid(sample, patches)
            frames *= sample.shape[1] if sample.dim() == 6 else 1
            longest = max(side.lengths)
            _, text = denoiser.get_rotary_pos_embed([frames, height, width], longest)
            own = [torch.cat([x[:n] for n in side.lengths]) for x in text]
        device = side.text.text.device
        return tuple(torch.cat(pair).to(device) for pair in zip(image, own, strict=True))

    def rotate(self, x, rope):
        return apply_rotary_emb(x, rope, sequence_dim=1)

    def project(self, attn, image, text):
        q, k, v = attn.img_attn_qkv(image).unflatten(2, (3, attn.heads, -1)).unbind(2)
        text_q, text_k, text_v = attn.txt_attn_qkv(text).unflatten(2, (3, attn.heads, -1)).unbind(2)
        q = torch.cat([attn.img_attn_q_norm(q), attn.txt_attn_q_norm(text_q)], dim=1)
        k = torch.cat([attn.img_attn_k_norm(k), attn.txt_attn_k_norm(text_k)], dim=1)
        return q, k, torch.cat([v, text_v], dim=1), None

    def finish(self, attn, o, image, layout, rest):
        return attn.img_attn_proj(o[:, :image]), attn.txt_attn_proj(o[:, image:])

    def text_layers(self, block):
        return "attn.txt_attn_qkv", "attn.txt_attn_proj", "txt_mlp"
