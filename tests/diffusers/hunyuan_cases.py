"""More small denoisers, as in `side_cases.py`: those whose text has no positions."""

import contextlib
from math import prod
from types import SimpleNamespace

import diffusers
import parts
import torch
import torch.nn.functional as F
from joint_cases import random
from side_cases import SIZE, Case, CogVideoX, CogView4


class CogView3Plus(CogView4):
    cls = "CogView3PlusTransformer2DModel"
    config = {
        "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 32,
        "time_embed_dim": 16, "condition_dim": 4, "pos_embed_max_size": 16, "sample_size": 8,
        **SIZE,
    }  # fmt: skip


class ConsisID(CogVideoX):
    """Without a face; with one, layers between the blocks."""

    cls = "ConsisIDTransformer3DModel"


class Hunyuan(Case):
    """Blocks of two streams, then some with one set of projections."""

    text_first = False
    one_block = {"num_layers": 1, "num_single_layers": 1}
    turn = staticmethod(parts.turn_real)
    rope = "freqs_cis"

    @property
    def beside(self):
        """Tokens of an image that stand before the text; HunyuanVideo 1.5 masks those of none, and
        puts them behind it."""
        images = self.inputs.get("image_embeds")
        return 0 if images is None or not images.any() else images.shape[1]

    @property
    def blocks(self):
        return [
            (self.model.transformer_blocks, parts.TwoStreams, "encoder_hidden_states"),
            (self.model.single_transformer_blocks, parts.Unprojected, "encoder_hidden_states"),
        ]

    def with_text(self, inputs, embeds, mask, rows):
        mask = torch.ones(embeds.shape[:2]) if mask is None else mask
        return inputs | {
            "encoder_hidden_states": embeds.expand(rows, -1, -1),
            "encoder_attention_mask": mask.expand(rows, -1).long(),
        }

    def look(self):
        """Where the tokens that are made lie, in a call that was seen."""
        self.image_tokens = self.given()["hidden_states"].shape[1]
        own = self.inputs["hidden_states"][0, 0]
        if getattr(self.model.config, "image_condition_type", None) == "token_replace":
            own = own[1:]
        patch = self.model.config.patch_size
        pixels = prod(patch) if isinstance(patch, (tuple, list)) else patch**2
        self.targets = own.numel() // pixels
        self.leading = self.image_tokens - self.targets

    def given(self):
        return parts.block_inputs(self.model, self.model.transformer_blocks[0], **self.inputs)

    def part(self, given):
        mask, text = given["attention_mask"], given["encoder_hidden_states"]
        if mask is not None:
            mask = mask[:, 0, 0, -text.shape[1] :].bool()
        return SimpleNamespace(
            image=given["hidden_states"], text=text, mask=mask, image_rope=given[self.rope],
            text_rope=None,
        )  # fmt: skip

    def negative_part(self, given):
        """Without what stands before the text."""
        part = self.part(given)
        part.text = part.text[:, self.beside :]
        part.mask = None if part.mask is None else part.mask[:, self.beside :]
        return part


class HunyuanVideo(Hunyuan):
    cls = "HunyuanVideoTransformer3DModel"
    config = {
        "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2,
        "num_refiner_layers": 1, "text_embed_dim": 32, "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 6, 6), **SIZE,
    }  # fmt: skip
    grid = (2, 2, 3)
    frames = 2

    def inputs_image(self):
        return self.leading + self.grid[0] * 6

    def first_inputs(self):
        return {
            "hidden_states": random(2, 4, self.frames, 4, 6, seed=1),
            "timestep": torch.tensor([500.0, 500.0]),
            "encoder_hidden_states": random(2, 7, 32, seed=2),
            "encoder_attention_mask": (torch.arange(7) < torch.tensor([[7], [5]])).long(),
            "pooled_projections": random(2, 8, seed=3),
            "guidance": torch.tensor([3500.0, 3500.0]),
        }


class TokenReplace(HunyuanVideo):
    """The first frame is an image that is given."""

    config = HunyuanVideo.config | {"image_condition_type": "token_replace"}
    leading, targets, frames = 6, 12, 3


class Framepack(HunyuanVideo):
    cls = "HunyuanVideoFramepackTransformer3DModel"
    config = HunyuanVideo.config | {
        "has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True,
    }  # fmt: skip
    # two frames as they are, two pooled to one of two tokens, five pooled to two of one token
    leading, targets = 12 + 2 + 2, 12

    def first_inputs(self):
        return super().first_inputs() | {
            "image_embeds": random(2, 3, 8, seed=4), "indices_latents": torch.arange(9, 11),
            "latents_clean": random(2, 4, 2, 4, 6, seed=5),
            "indices_latents_clean": torch.tensor([0, 11]),
            "latents_history_2x": random(2, 4, 2, 4, 6, seed=6),
            "indices_latents_history_2x": torch.arange(1, 3),
            "latents_history_4x": random(2, 4, 5, 4, 6, seed=7),
            "indices_latents_history_4x": torch.arange(3, 8),
        }  # fmt: skip


class HunyuanVideo15(Hunyuan):
    """An image's tokens and two texts; no blocks with one set of projections."""

    cls = "HunyuanVideo15Transformer3DModel"
    config = {
        "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_refiner_layers": 1,
        "text_embed_dim": 32, "text_embed_2_dim": 16, "image_embed_dim": 8,
        "rope_axes_dim": (4, 6, 6), **SIZE,
    }  # fmt: skip
    one_block = {"num_layers": 1}
    grid = (2, 2, 3)
    texts = ("encoder_hidden_states", "encoder_hidden_states_2")

    @property
    def blocks(self):
        return [(self.model.transformer_blocks, parts.TwoStreams, "encoder_hidden_states")]

    def inputs_image(self):
        return 12

    def first_inputs(self):
        return {
            "hidden_states": random(2, 4, 2, 2, 3, seed=1),
            "timestep": torch.tensor([500.0, 500.0]),
            "encoder_hidden_states": random(2, 7, 32, seed=2),
            "encoder_attention_mask": (torch.arange(7) < torch.tensor([[7], [5]])).float(),
            "encoder_hidden_states_2": random(2, 4, 16, seed=3),
            "encoder_attention_mask_2": (torch.arange(4) < torch.tensor([[3], [0]])).float(),
            "image_embeds": random(2, 3, 8, seed=4),
        }

    def mask_of(self, mask):
        return mask, mask[:, : mask.shape[1] // 2]

    def own_text(self):
        names = [name for name in self.inputs if name.startswith("encoder")]
        own = [[self.inputs[name] for name in names if kind in name] for kind in ("states", "mask")]
        return tuple(tuple(x) for x in own)

    def too_narrow(self, text):
        return tuple(x[..., :-1] for x in text)

    def text_of(self, tokens, seed):
        return random(1, tokens, 32, seed=seed), random(1, tokens // 2, 16, seed=seed + 10)

    def with_text(self, inputs, embeds, mask, rows):
        if isinstance(embeds, torch.Tensor):
            return super().with_text(inputs, embeds, mask, rows)
        masks = [torch.ones(x.shape[:2]) for x in embeds] if mask is None else mask
        named = {}
        for i, end in enumerate(("", "_2")):
            named[f"encoder_hidden_states{end}"] = embeds[i].expand(rows, -1, -1)
            named[f"encoder_attention_mask{end}"] = masks[i].expand(rows, -1).float()
        return inputs | named

    def part(self, given):
        return super().part(given | {"attention_mask": given["attention_mask"][:, None, None]})


class TextToVideo15(HunyuanVideo15):
    """Without an image."""

    def first_inputs(self):
        return super().first_inputs() | {"image_embeds": torch.zeros(2, 3, 8)}


class HunyuanImage(HunyuanVideo15):
    cls = "HunyuanImageTransformer2DModel"
    config = {
        "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2,
        "num_refiner_layers": 1, "text_embed_dim": 32, "text_embed_2_dim": 16,
        "rope_axes_dim": (8, 8), "guidance_embeds": True, **SIZE,
    }  # fmt: skip
    one_block = Hunyuan.one_block
    rope, grid = "image_rotary_emb", (1, 4, 3)
    blocks = Hunyuan.blocks
    part = Hunyuan.part

    def first_inputs(self):
        inputs = super().first_inputs() | {"hidden_states": random(2, 4, 4, 3, seed=1)}
        del inputs["image_embeds"]
        return inputs | {"guidance": torch.tensor([3500.0, 3500.0])}


class ImageRefiner(HunyuanImage):
    """One text; the image has frames, and lies beside the latents as more channels."""

    config = HunyuanImage.config | {
        "text_embed_2_dim": None, "rope_axes_dim": (4, 6, 6), "patch_size": (1, 1, 1),
    }  # fmt: skip
    grid = (2, 2, 3)
    texts = ("encoder_hidden_states",)

    def first_inputs(self):
        inputs = super().first_inputs() | {"hidden_states": random(2, 4, 2, 2, 3, seed=1)}
        return {name: x for name, x in inputs.items() if not name.endswith("_2")}

    def mask_of(self, mask):
        return mask

    def own_text(self):
        return Hunyuan.own_text(self)

    def too_narrow(self, text):
        return Hunyuan.too_narrow(self, text)

    def text_of(self, tokens, seed):
        return super().text_of(tokens, seed)[0]


class Mochi(Hunyuan):
    """The last block drops its text; positions are of each head."""

    cls = "MochiTransformer3DModel"
    config = {
        "in_channels": 4, "num_layers": 2, "pooled_projection_dim": 24, "text_embed_dim": 32,
        "time_embed_dim": 8, "max_sequence_length": 16, **SIZE,
    }  # fmt: skip
    one_block = {"num_layers": 1}
    attention, rope, grid = "attn1", "image_rotary_emb", (2, 2, 3)
    positions = (*Case.positions, "encoder_attention_mask")

    def __init__(self, **options):
        super().__init__(**options)
        turns = self.model.pos_frequencies
        turns.copy_(random(*turns.shape, seed=8))

    @property
    def blocks(self):
        return [(self.model.transformer_blocks, parts.MaybeWithoutText, "encoder_hidden_states")]

    @staticmethod
    def turn(x, rope):
        cos, sin = (y.repeat_interleave(2, -1) for y in rope)
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * cos + torch.stack([-odd, even], -1).flatten(-2) * sin

    def inputs_image(self):
        return 12

    def first_inputs(self):
        return {
            "hidden_states": random(2, 4, 2, 4, 6, seed=1),
            "encoder_hidden_states": random(2, 7, 32, seed=2),
            "timestep": torch.tensor([500.0, 500.0]),
            "encoder_attention_mask": torch.arange(7) < torch.tensor([[7], [5]]),
        }

    def with_text(self, inputs, embeds, mask, rows):
        made = super().with_text(inputs, embeds, mask, rows)
        return made | {"encoder_attention_mask": made["encoder_attention_mask"].bool()}

    def part(self, given):
        mask = given["encoder_attention_mask"]
        return SimpleNamespace(
            image=given["hidden_states"], text=given["encoder_hidden_states"], mask=mask,
            image_rope=given[self.rope], text_rope=None,
        )  # fmt: skip


class EasyAnimate(Hunyuan):
    """A block with projections of the text's own, and one with one set for both."""

    cls = "EasyAnimateTransformer3DModel"
    config = {
        "in_channels": 4, "out_channels": 4, "num_layers": 2, "mmdit_layers": 1, "patch_size": 2,
        "time_embed_dim": 16, "text_embed_dim": 32, "sample_width": 6, "sample_height": 4, **SIZE,
    }  # fmt: skip
    one_block = {"num_layers": 1}
    attention, rope, grid = "attn1", "image_rotary_emb", (2, 2, 3)

    @property
    def blocks(self):
        return [(self.model.transformer_blocks, parts.MaybeWithoutText, "encoder_hidden_states")]

    def inputs_image(self):
        return 12

    def first_inputs(self):
        return {
            "hidden_states": random(2, 4, 2, 4, 6, seed=1),
            "encoder_hidden_states": random(2, 7, 32, seed=2),
            "timestep": torch.tensor([500.0, 500.0]),
        }

    def with_text(self, inputs, embeds, mask, rows):
        return inputs | {"encoder_hidden_states": embeds.expand(rows, -1, -1)}

    def part(self, given):
        return super().part(given | {"attention_mask": None})


class HunyuanDiT(HunyuanVideo15):
    """Cross-attention to two texts side by side, whose padding is learned."""

    cls = "HunyuanDiT2DModel"
    config = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "patch_size": 2,
        "sample_size": 8, "hidden_size": 32, "num_layers": 4, "mlp_ratio": 2.0,
        "cross_attention_dim": 32, "cross_attention_dim_t5": 24, "pooled_projection_dim": 16,
        "text_len": 6, "text_len_t5": 9,
    }  # fmt: skip
    one_block = {"num_layers": 2}
    rules, grid = ("nasa", "vsf"), (1, 2, 3)
    lengths = (6, 9)
    names = (
        ("encoder_hidden_states", "text_embedding_mask"),
        ("encoder_hidden_states_t5", "text_embedding_mask_t5"),
    )

    def inputs_image(self):
        return 6

    def first_inputs(self):
        angles = random(6, 8, seed=7).repeat_interleave(2, dim=1)
        return {
            "hidden_states": random(2, 4, 4, 6, seed=1), "timestep": torch.tensor([500.0, 500.0]),
            "encoder_hidden_states": random(2, 6, 32, seed=2),
            "text_embedding_mask": (torch.arange(6) < torch.tensor([[6], [4]])).long(),
            "encoder_hidden_states_t5": random(2, 9, 24, seed=3),
            "text_embedding_mask_t5": (torch.arange(9) < torch.tensor([[7], [5]])).long(),
            "image_meta_size": torch.full((2, 6), 64.0),
            "style": torch.zeros(2, dtype=torch.long),
            "image_rotary_emb": (angles.cos(), angles.sin()),
        }  # fmt: skip

    def text_of(self, tokens, seed):
        return random(1, min(tokens, 6), 32, seed=seed), random(
            1, min(tokens, 9), 24, seed=seed + 9
        )

    def own_text(self):
        texts, masks = (
            [self.inputs[name] for name in pair] for pair in zip(*self.names, strict=True)
        )
        return tuple(texts), tuple(masks)

    def mask_of(self, mask):
        return mask[:, :6], mask

    def with_text(self, inputs, embeds, mask, rows):
        named = {}
        for i, (text, own) in enumerate(self.names):
            more = self.lengths[i] - embeds[i].shape[1]
            are = torch.ones(embeds[i].shape[:2]) if mask is None else mask[i]
            named[text] = F.pad(embeds[i], (0, 0, 0, more)).repeat(rows // len(embeds[i]), 1, 1)
            named[own] = F.pad(are.long(), (0, more)).expand(rows, -1)
        return inputs | named

    def look(self):
        self.image_tokens = self.targets = self.inputs["hidden_states"][0, 0].numel() // 4

    def expected(self, rule, negatives, **changes):
        model, inputs = self.model, self.inputs | changes
        texts, owns = [], []
        for embeds, alpha, mask in negatives:
            text = self.with_text(inputs, embeds, mask, self.rows)
            given = parts.block_inputs(model, model.blocks[0], **text)
            texts.append(given["encoder_hidden_states"])
            # padding takes weight of one softmax over all
            are = torch.cat([text[own] for _, own in self.names], 1).bool()
            owns.append((None, alpha, are if rule == "vsf" else None))
        make = parts.CrossTexts(rule, owns, texts, sum(self.lengths))
        with parts.attention([block.attn2 for block in model.blocks], make):
            return self.out(model(**inputs, return_dict=False))


class Lumina(Case):
    """Cross-attention to a text that each block norms; the block projects what comes out."""

    cls = "LuminaNextDiT2DModel"
    config = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "num_layers": 2,
        "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 8, "cross_attention_dim": 32,
    }  # fmt: skip
    rules, grid = ("nasa", "vsf"), (1, 2, 3)

    def __init__(self, **options):
        super().__init__(**options)
        for i, layer in enumerate(self.model.layers):
            layer.gate.copy_(random(4, seed=i))

    def inputs_image(self):
        return 6

    def first_inputs(self):
        return {
            "hidden_states": random(2, 4, 4, 6, seed=1), "timestep": torch.tensor([0.5, 0.5]),
            "encoder_hidden_states": random(2, 7, 32, seed=2),
            "encoder_mask": (torch.arange(7) < torch.tensor([[7], [5]])).long(),
            "image_rotary_emb": torch.polar(torch.ones(8, 8, 4), random(8, 8, 4, seed=7)),
            "cross_attention_kwargs": {},
        }  # fmt: skip

    def own_text(self):
        return self.inputs["encoder_hidden_states"], self.inputs["encoder_mask"].bool()

    def look(self):
        self.image_tokens = self.targets = self.inputs["hidden_states"][0, 0].numel() // 4

    def expected(self, rule, negatives, **changes):
        """Blocks that are told of no negative prompt, and norm it themselves."""
        inputs = self.inputs | changes
        with contextlib.ExitStack() as stack:
            for layer in self.model.layers:
                texts = [layer.norm1_context(e.expand(self.rows, -1, -1)) for e, _, _ in negatives]
                mask = inputs["encoder_mask"].bool()
                make = parts.UnprojectedTexts(rule, negatives, texts, mask)
                stack.enter_context(parts.attention([layer.attn2], make))
            return self.out(self.model(**inputs, return_dict=False))


CASES = {
    "cogview3+": CogView3Plus,
    "consisid": ConsisID,
    "hunyuan-video": HunyuanVideo,
    "hunyuan-video-replace": TokenReplace,
    "framepack": Framepack,
    "hunyuan-video-1.5": HunyuanVideo15,
    "hunyuan-video-1.5-t2v": TextToVideo15,
    "hunyuan-image": HunyuanImage,
    "hunyuan-image-refiner": ImageRefiner,
    "hunyuan-dit": HunyuanDiT,
    "lumina": Lumina,
    "mochi": Mochi,
    "easyanimate": EasyAnimate,
}
CASES = {name: case for name, case in CASES.items() if hasattr(diffusers, case.cls)}
