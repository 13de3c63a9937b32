"""HunyuanDiT: BERT's text and mT5's, side by side, in cross-attention of 40 blocks.

mT5's text is projected token by token. Padding is not masked: each place has a learned token that
is attended to in its stead. mT5's pooled text, that of the prompt, is part of the modulation. Under
classifier-free guidance the pipelines make one doubled batch.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from diffusers.models import attention_processor as stock
from diffusers.models.embeddings import apply_rotary_emb

from nasa_diffusers.encoding import encode_prompt
from nasa_diffusers.families.base import project_keys_values, token_grid
from nasa_diffusers.families.side_cross import SideCross
from nasa_diffusers.families.two_texts import as_one, present, read_two
from nasa_diffusers.weights import own_weights

SECOND = "encoder_hidden_states_t5"
# how many tokens the pipelines encode to, by the number of the encoder
LENGTHS = {0: 77, 1: 256}


class HunyuanDiT(SideCross):
    name = "HunyuanDiT"
    denoisers = ("HunyuanDiT2DModel",)
    block_list = "blocks"
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    processors = (stock.HunyuanAttnProcessor2_0, stock.FusedHunyuanAttnProcessor2_0)

    def default_alpha(self, denoiser):
        """The paper has none: PixArt's, which it is built like."""
        return 0.5

    def default_nag(self, denoiser):
        """The NAG paper has none: its for PixArt-sigma."""
        return 5.0, 2.5, 0.375

    # ---- text --------------------------------------------------------------------------------

    def encode(self, pipe, prompts, **options):
        if "max_sequence_length" in options:
            raise ValueError(
                "enable_nasa: max_sequence_length is fixed by the text encoders of "
                f"{type(pipe).__name__}; leave it out"
            )
        made = [
            encode_prompt(
                pipe, prompts, options | {"text_encoder_index": i, "max_sequence_length": length}
            )
            for i, length in LENGTHS.items()
        ]
        embeds, _, masks, _ = zip(*made, strict=True)
        return as_one(embeds, masks)[0], None

    def token_limits(self, pipe, tokens, **options):
        return {"tokenizer": LENGTHS[0], "tokenizer_2": LENGTHS[1]}

    def read_embeds(self, embeds, mask):
        # what is masked is padding, which is attended to
        one, _ = read_two(self.name, embeds, mask)
        if embeds[0].shape[1] > LENGTHS[0]:
            raise ValueError(
                f"enable_nasa: HunyuanDiT takes {LENGTHS[0]} tokens of BERT, the first text of "
                f"negative_prompt_embeds has {embeds[0].shape[1]}; shorten it"
            )
        return one, None

    def own_tokens(self, embeds):
        return None if embeds.is_meta else present(embeds)

    def channels(self, text, inputs):
        return text.shape[2] + inputs[SECOND].shape[2]

    def begin(self, denoiser, side, inputs):
        rows, n, _ = inputs["encoder_hidden_states"].shape
        side.lengths, texts, terms = [n], [], []
        for term in side.text.terms:
            text, are = self.as_stock(denoiser, term.text, side.text.text.shape[2])
            side.lengths.append(text.shape[1])
            texts.append(text.expand(rows, -1, -1))
            # padding would take weight in one softmax over all prompts
            terms.append(replace(term, mask=are if side.text.method.drops_padding else None))
        side.terms = tuple(terms)
        return {"encoder_hidden_states": torch.cat(texts, dim=1)}

    def as_stock(self, denoiser, both, channels):
        """Two texts as the denoiser joins them, and which of their tokens are no padding."""
        config = denoiser.config
        parts = both[..., :channels], both[..., channels:]
        lengths = config.text_len, config.text_len_t5
        if both.shape[1] > max(lengths):
            raise ValueError(
                f"nasa_diffusers: the negative prompt has {both.shape[1]} tokens, and this model "
                f"takes {lengths[0]} of BERT and {lengths[1]} of mT5; shorten it"
            )
        first, second = (
            F.pad(part, (0, 0, 0, max(length - part.shape[1], 0)))[:, :length]
            for part, length in zip(parts, lengths, strict=True)
        )
        are = torch.cat([present(first), present(second)], dim=1)
        rows, n, _ = second.shape
        second = denoiser.text_embedder(second.reshape(rows * n, -1)).view(rows, n, -1)
        text = torch.cat([first, second], dim=1)
        return torch.where(are[..., None], text, denoiser.text_embedding_padding.to(text)), are

    def kept_with(self, denoiser, inputs):
        names = (SECOND, "text_embedding_mask", "text_embedding_mask_t5")
        others = [inputs.get(name) for name in names]
        return None if any(x is None for x in others) else others

    def before_blocks(self, denoiser):
        # and what stands for padding
        return [denoiser.text_embedder, own_weights(denoiser)]

    # ---- one layer ---------------------------------------------------------------------------

    def grids(self, denoiser, sample, inputs):
        return (token_grid(sample, denoiser.config.patch_size),)

    def queries(self, attn, hidden_states):
        return attn.norm_q(attn.to_q(hidden_states).unflatten(2, (attn.heads, -1)))

    def turn(self, q, options):
        rope = options.get("image_rotary_emb")
        return q if rope is None else apply_rotary_emb(q, rope, sequence_dim=1)

    def projections(self, attn):
        fused = getattr(attn, "to_kv", None)
        return attn.to_k, attn.to_v, attn.norm_k, fused

    def keys_values(self, attn, text):
        k, v = (x.unflatten(2, (attn.heads, -1)) for x in project_keys_values(attn, text))
        return attn.norm_k(k), v
