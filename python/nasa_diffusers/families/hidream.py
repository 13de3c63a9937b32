"""HiDream-I1: T5's and Llama's text beside the image in 16 blocks of two streams, then behind it in
one sequence in 32 blocks.

The text is T5's, then Llama's last layer, then the layer of Llama that each block has for itself,
which is put there before it and thrown away after it. All of them are channels of a prompt here.
Text stands at position 0, and its padding is attended to. An image that is not square is filled up
to the largest size; keys of what fills it up are 0. Classifier-free guidance is one doubled batch.
"""

import torch

from nasa_diffusers import side as stream
from nasa_diffusers.encoding import encode_prompt, side_by_side, token_counts
from nasa_diffusers.families.base import ImageTokens, token_grid
from nasa_diffusers.families.side import SideStream, matrix_rotation
from nasa_diffusers.families.versions import stock_class
from nasa_diffusers.side import Layout

MAX_TOKENS = 128
NAMES = ("hidden_states", "hidden_states_masks", "encoder_hidden_states", "image_rotary_emb")


class HiDreamTokens(ImageTokens):
    def grids(self, sample, inputs):
        if sample.dim() != 4:
            raise ValueError(
                "nasa_diffusers: alpha is a map over the image, and the call brings its patches; "
                "call the transformer with latents [b, c, height, width], or give one alpha"
            )
        return (token_grid(sample, self.denoiser.config.patch_size),)

    def padding(self, sample, inputs):
        _, height, width = token_grid(sample, self.denoiser.config.patch_size)
        return 0 if height == width else self.denoiser.max_seq - height * width


class HiDream(SideStream):
    name = "HiDream-I1"
    denoisers = ("HiDreamImageTransformer2DModel",)
    text_argument = "encoder_hidden_states_t5"
    text_parts = (
        "text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4",
        "tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4",
    )  # fmt: skip
    text_options = ("max_sequence_length", "lora_scale")
    processors = (stock_class("transformer_hidream_image", "HiDreamAttnProcessor"),)
    block_lists = (
        (
            "double_stream_blocks",
            Layout(text="encoder_hidden_states", text_first=False, attention="attn1"),
        ),
        ("single_stream_blocks", Layout(text_first=False, attention="attn1")),
    )

    def default_nag(self, denoiser):
        """No published code of the paper has it: the NAG paper's for FLUX.1."""
        return 5.0, 2.5, 0.25

    # ---- text --------------------------------------------------------------------------------

    def encode(self, pipe, prompts, **options):
        t5, _, llama, *_ = encode_prompt(pipe, prompts, options)
        return self.read_embeds((t5, llama), None)

    def encode_unpadded(self, pipe, prompts, length_is_named, **options):
        if length_is_named:
            return self.encode(pipe, prompts, **options)
        # a prompt without any padding is one encoded to its own length
        limit, rows = options.get("max_sequence_length", MAX_TOKENS), []
        counts = (token_counts(pipe, name, prompts) for name in self.token_limits(pipe, 0))
        for prompt, count in zip(prompts, map(max, zip(*counts, strict=True)), strict=True):
            length = {"max_sequence_length": min(count, limit)}
            rows.append(self.encode(pipe, [prompt], **options | length)[0][0])
        return side_by_side(rows)

    def token_limits(self, pipe, tokens, **options):
        limit = options.get("max_sequence_length", tokens)
        return {"tokenizer_3": limit, "tokenizer_4": limit}

    def read_embeds(self, embeds, mask):
        """`(t5, llama)`, `[m, n, c]` and `[layers, m, n, c]`, as `encode_prompt` makes them."""
        if not isinstance(embeds, (tuple, list)) or len(embeds) != 2:
            raise ValueError(
                "enable_nasa: HiDream reads two texts; give negative_prompt_embeds=(t5, llama3), "
                "as encode_prompt makes them"
            )
        t5, llama = embeds
        if llama.dim() != 4 or llama.shape[1:3] != t5.shape[:2]:
            raise ValueError(
                "enable_nasa: HiDream's Llama text must be [layers, m, n, c] with as many prompts "
                f"and tokens as T5's {list(t5.shape)}, got {list(llama.shape)}"
            )
        return torch.cat([t5, llama.permute(1, 2, 0, 3).flatten(2)], dim=2), mask

    def channels(self, text, inputs):
        return text.shape[2] + sum(x.shape[-1] for x in inputs["encoder_hidden_states_llama3"])

    def layer_of(self, denoiser, text, index):
        """Of a prompt what goes into the block of this number; -1: of the last, for all blocks."""
        project, layers = denoiser.caption_projection, denoiser.config.llama_layers
        t5 = project[-1].linear.in_features
        width = project[0].linear.in_features
        begin = t5 + layers[index] * width
        return project[index % len(layers)](text[..., begin : begin + width])

    def prepare(self, denoiser, side, term):
        t5 = denoiser.caption_projection[-1]
        parts = [
            t5(term.text[..., : t5.linear.in_features]),
            self.layer_of(denoiser, term.text, -1),
            self.layer_of(denoiser, term.text, 0),
        ]
        mask = term.mask
        return torch.cat(parts, dim=1), None if mask is None else mask.repeat(1, 3)

    def arriving(self, denoiser, side, index, negatives):
        parts = []
        for x, term in zip(negatives.split(side.lengths[1:], dim=1), side.text.terms, strict=True):
            own = self.layer_of(denoiser, term.text, index).to(x.dtype)
            parts += [x[:, : -own.shape[1]], own.expand(len(x), -1, -1)]
        return torch.cat(parts, dim=1)

    # ---- blocks ------------------------------------------------------------------------------

    def blocks(self, denoiser):
        for name, block in super().blocks(denoiser):
            yield f"{name}.block", block.block

    def image_tokens(self, denoiser):
        return HiDreamTokens(self, denoiser)

    def begin(self, denoiser, side, inputs):
        side.inputs["masks"] = inputs.get("hidden_states_masks")
        return super().begin(denoiser, side, inputs)

    def positive_tokens(self, side, inputs):
        return inputs["encoder_hidden_states"].shape[1]

    def changes(self, layout, inputs, x):
        masks, changes = inputs.get("hidden_states_masks"), super().changes(layout, inputs, x)
        if masks is not None:
            more = x.shape[1] - masks.shape[1]
            changes["hidden_states_masks"] = torch.cat([masks, masks.new_ones(len(x), more)], 1)
        return changes

    def arrange(self, denoiser, side, rope):
        # the last one is of the text, which nothing turns
        return torch.cat([rope, rope[:, -1:].expand(-1, side.m, *rope.shape[2:])], dim=1)

    # ---- one layer ---------------------------------------------------------------------------

    def called(self, args, kwargs):
        given = dict(zip(NAMES, args, strict=False))
        given |= {name.removeprefix("norm_"): x for name, x in kwargs.items()}
        return (), given

    def rotate(self, x, rope):
        width = 2 * rope.shape[-3]
        turned = matrix_rotation(x[..., :width], rope)
        return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], dim=-1)

    def project(self, attn, image, text):
        q, k, v = (project(image) for project in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.q_rms_norm(q).to(image.dtype), attn.k_rms_norm(k).to(image.dtype)
        side = stream.CALL.side
        masks = None if side is None else side.inputs["masks"]
        if masks is not None:
            size = masks.shape[1]
            k = torch.cat([k[:, :size] * masks[..., None], k[:, size:]], dim=1)
        if text is not None:
            own = [
                attn.q_rms_norm_t(attn.to_q_t(text)).to(text.dtype),
                attn.k_rms_norm_t(attn.to_k_t(text)).to(text.dtype),
                attn.to_v_t(text),
            ]
            q, k, v = (torch.cat(pair, dim=1) for pair in zip((q, k, v), own, strict=True))
        return *(x.unflatten(2, (attn.heads, -1)) for x in (q, k, v)), None

    def finish(self, attn, o, image, layout, rest):
        if layout.text is None:
            return attn.to_out(o)
        return attn.to_out(o[:, :image]), attn.to_out_t(o[:, image:])

    def text_layers(self, block):
        if hasattr(block, "ff_t"):
            names = ("to_q_t", "to_k_t", "to_v_t", "to_out_t")
            return (*(f"attn1.{name}" for name in names), "ff_t")
        if not hasattr(block.ff_i, "experts"):
            return "attn1", "ff_i"
        # a token passes so many of them
        experts = (f"ff_i.experts.{i}" for i in range(block.ff_i.num_activated_experts))
        return ("attn1", "ff_i.shared_experts", *experts)
