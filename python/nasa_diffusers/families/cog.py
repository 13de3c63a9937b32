"""CogVideoX, CogView3+ and CogView4: blocks of two streams that share their projections.

Text is projected token by token and has no positions; those of the image turn its own queries and
keys alone. CogVideoX and CogView3+ pad T5's text and do not mask it, as FLUX.1 does; CogView4 puts
up to 15 tokens of padding before GLM's. Under classifier-free guidance they make one doubled batch,
and CogView4 two calls. ConsisID is CogVideoX with layers between its blocks in which the video sees
a face; they see its own tokens only.
"""

from diffusers.models import attention_processor as stock

from nasa_diffusers.encoding import side_by_side, token_counts
from nasa_diffusers.families.base import config, token_grid
from nasa_diffusers.families.two_streams import TwoStreams
from nasa_diffusers.side import Layout

try:
    from diffusers.models.transformers.transformer_cogview4 import CogView4AttnProcessor
except ImportError:  # pragma: no cover
    COGVIEW4: tuple[type, ...] = ()
else:
    COGVIEW4 = (CogView4AttnProcessor,)


class SharedProjections(TwoStreams):
    """The answers for layers that treat text and image alike."""

    text_parts = ("text_encoder", "tokenizer")
    text_options = ("max_sequence_length",)
    block_lists = (
        (
            "transformer_blocks",
            Layout(text="encoder_hidden_states", text_first=False, attention="attn1"),
        ),
    )

    def finish(self, attn, o, image, layout, rest):
        o = self.output(attn, o)
        return o[:, :image], o[:, image:]

    def text_layers(self, block):
        return "attn1", "ff"


class WithPaddedT5(SharedProjections):
    """The answers where T5 sees its padding, and so does the denoiser."""

    processors = (stock.CogVideoXAttnProcessor2_0, stock.FusedCogVideoXAttnProcessor2_0)
    max_tokens: int

    def encode_unpadded(self, pipe, prompts, length_is_named, **options):
        if length_is_named:
            return self.encode(pipe, prompts, **options)
        # a prompt without any is one encoded to its own length
        limit, rows = options.get("max_sequence_length", self.max_tokens), []
        for prompt, count in zip(prompts, token_counts(pipe, "tokenizer", prompts), strict=True):
            length = {"max_sequence_length": min(count, limit)}
            rows.append(self.encode(pipe, [prompt], **options | length)[0][0])
        return side_by_side(rows)

    def uses_fused_projection(self, attn):
        return isinstance(attn.processor, stock.FusedCogVideoXAttnProcessor2_0)


class CogVideoX(WithPaddedT5):
    name = "CogVideoX"
    denoisers = ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel")
    max_tokens = 226

    def prepare(self, denoiser, side, term):
        embed = denoiser.patch_embed
        x = embed.text_proj(term.text)
        if embed.use_learned_positional_embeddings:
            if x.shape[1] > embed.max_text_seq_length:
                raise ValueError(
                    f"nasa_diffusers: the negative prompt has {x.shape[1]} tokens, and this model "
                    f"has positions for {embed.max_text_seq_length}; set max_sequence_length"
                )
            x = x + embed.pos_embedding[:, : x.shape[1]].to(x.dtype)
        return x, term.mask

    def grids(self, denoiser, sample, inputs):
        patch, frames = denoiser.config.patch_size, config(denoiser, "patch_size_t") or 1
        # [b, frames, c, height, width]
        return ((sample.shape[1] // frames, *token_grid(sample, patch)[1:]),)


class CogView3Plus(WithPaddedT5):
    name = "CogView3+"
    denoisers = ("CogView3PlusTransformer2DModel",)
    max_tokens = 224

    def prepare(self, denoiser, side, term):
        return denoiser.patch_embed.text_proj(term.text), term.mask

    def grids(self, denoiser, sample, inputs):
        return (token_grid(sample, denoiser.config.patch_size),)


class CogView4(SharedProjections):
    name = "CogView4"
    denoisers = ("CogView4Transformer2DModel",)
    doubles_batch = False
    processors = COGVIEW4
    halves = -2

    def encode_unpadded(self, pipe, prompts, length_is_named, **options):
        rows = []
        for prompt, count in zip(prompts, token_counts(pipe, "tokenizer", prompts), strict=True):
            embeds, _ = self.encode(pipe, [prompt], **options)
            rows.append(embeds[0, -min(count, embeds.shape[1]) :])
        return side_by_side(rows)

    def check_call(self, denoiser, inputs):
        super().check_call(denoiser, inputs)
        if inputs.get("attention_mask") is not None:
            raise ValueError(
                "nasa_diffusers: the call brings an attention_mask, which the pipelines of "
                "CogView4 never give; leave it out"
            )

    def prepare(self, denoiser, side, term):
        return denoiser.patch_embed.text_proj(term.text), term.mask

    def grids(self, denoiser, sample, inputs):
        return (token_grid(sample, denoiser.config.patch_size),)
