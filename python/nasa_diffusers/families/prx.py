"""PRX: text that the image attends to beside itself, in 16 blocks.

The text is projected once, token by token, has no positions and is not changed by a block: it is
keys and values only. T5Gemma's padding is masked. Classifier-free guidance is one doubled batch.
"""

import torch

from nasa_diffusers.families.base import token_grid
from nasa_diffusers.families.side import SideStream, matrix_rotation
from nasa_diffusers.families.versions import stock_class
from nasa_diffusers.side import Layout


class PRX(SideStream):
    name = "PRX"
    denoisers = ("PRXTransformer2DModel",)
    masks_text = True
    text_parts = ("text_encoder", "tokenizer")
    text_options = ("tokenizer_max_length", "skip_text_cleaning")
    processors = (stock_class("transformer_prx", "PRXAttnProcessor2_0"),)
    block_lists = (
        ("blocks", Layout(text="encoder_hidden_states", attention="attention", fixed=True)),
    )

    def default_nag(self, denoiser):
        """No published code of the paper has it: the NAG paper's for FLUX.1."""
        return 5.0, 2.5, 0.25

    def grids(self, denoiser, sample, inputs):
        return (token_grid(sample, denoiser.config.patch_size),)

    def prepare(self, denoiser, side, term):
        return denoiser.txt_in(term.text), term.mask

    def arrange(self, denoiser, side, rope):
        # [b, l, 1, d / 2, 2, 2]; nothing turns the text
        rope = rope.transpose(1, 2)
        still = torch.eye(2, dtype=rope.dtype, device=rope.device)
        still = still.expand(len(rope), sum(side.lengths), *rope.shape[2:])
        return torch.cat([rope, still], dim=1)

    def rotate(self, x, rope):
        return matrix_rotation(x, rope[:, : x.shape[1]])

    def text_mask(self, side, options):
        mask = options.get("attention_mask")
        return None if mask is None else mask.bool()

    def project(self, attn, image, text):
        q, k, v = attn.img_qkv_proj(image).unflatten(2, (3, attn.heads, -1)).unbind(2)
        text_k, text_v = attn.txt_kv_proj(text).unflatten(2, (2, attn.heads, -1)).unbind(2)
        k = torch.cat([attn.norm_k(k), attn.norm_added_k(text_k)], dim=1)
        return attn.norm_q(q), k, torch.cat([v, text_v], dim=1), None

    def finish(self, attn, o, image, layout, rest):
        return self.output(attn, o)

    def text_layers(self, block):
        return ("attention.txt_kv_proj",)
