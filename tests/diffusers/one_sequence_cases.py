"""Further small denoisers in which text and image share their attention: one call of each, as in
`side_cases.py`."""

from types import SimpleNamespace

import diffusers
import parts
import torch
from joint_cases import random
from side_cases import SIZE, Case, L, grid_ids
from streams import heads, joint_attention


class Turned(parts.OneSequence):
    """Fewer heads of keys than of queries."""

    def __call__(self, attn, hidden_states, *_, **__):
        return super().__call__(attn, hidden_states)

    def heads(self, attn, x):
        d = attn.inner_dim // attn.heads
        q, k, v = (y(x).unflatten(-1, (-1, d)) for y in (attn.to_q, attn.to_k, attn.to_v))
        times = attn.heads // k.shape[2]
        k, v = (y.repeat_interleave(times, 2) for y in (attn.norm_k(k), v))
        return attn.norm_q(q), k, v


class Lumina2(Case):
    """Two prompts of unequal length: their images begin at other tokens."""

    cls = "Lumina2Transformer2DModel"
    config = {
        "in_channels": 4, "hidden_size": 64, "num_layers": 2, "num_refiner_layers": 1,
        "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 16,
        "axes_dim_rope": (4, 6, 6), "axes_lens": (64, 32, 32), "cap_feat_dim": 32,
    }  # fmt: skip
    positions = ("image_rotary_emb", "attention_mask")
    own = (7, 4)
    has_mask = True

    @staticmethod
    def turn(x, rope):
        return parts.turn_complex(x, rope).to(x.dtype)

    @property
    def blocks(self):
        return [(self.model.layers, Turned, None)]

    def mask(self, own, tokens):
        return (torch.arange(tokens) < torch.tensor(own)[:, None]).long()

    def first_inputs(self):
        return {
            "hidden_states": random(2, 4, 8, 12, seed=1),
            "encoder_hidden_states": random(2, 7, 32, seed=2),
            "encoder_attention_mask": self.mask(self.own, 7),
            "timestep": torch.tensor([0.5, 0.5]),
        }

    def with_text(self, inputs, embeds, mask, rows):
        if mask is None:
            mask = torch.ones(1, embeds.shape[1])
        text = embeds.expand(rows, -1, -1)
        mask = mask.long().expand(rows, -1)
        return inputs | {"encoder_hidden_states": text, "encoder_attention_mask": mask}

    def part(self, given):
        """Row by row, as the model lays them out: [text, image, filling]."""
        x, rope, mask = given["hidden_states"], given["image_rotary_emb"], given["attention_mask"]
        at = self.image_tokens
        own = [x.shape[1] - at] * len(x) if mask is None else (mask.sum(1) - at).tolist()
        n = max(own)

        def split(y):
            image = torch.stack([row[k : k + at] for row, k in zip(y, own, strict=True)])
            text = torch.stack(
                [torch.cat([row[:k], row[k + at :]]) for row, k in zip(y, own, strict=True)]
            )
            return image, text

        (image, text), (image_rope, text_rope) = split(x), split(rope)
        mask = None if min(own) == n else torch.arange(n) < torch.tensor(own)[:, None]
        return SimpleNamespace(
            image=image, text=text, image_rope=image_rope, text_rope=text_rope, mask=mask
        )

    def returned(self, image, pos):
        own = self.inputs["encoder_attention_mask"].sum(1).tolist()
        each = zip(image, pos, own, strict=True)
        return torch.stack([torch.cat([text[:k], row, text[k:]]) for row, text, k in each])


class AuraFlow(Case):
    cls = "AuraFlowTransformer2DModel"
    config = {
        "sample_size": 8, "num_mmdit_layers": 2, "num_single_dit_layers": 2,
        "joint_attention_dim": 32, "caption_projection_dim": 32, "pos_embed_max_size": 64, **SIZE,
    }  # fmt: skip
    one_block = {"num_mmdit_layers": 1, "num_single_dit_layers": 1}
    turn = staticmethod(lambda x, rope: x)
    has_mask = False

    def __init__(self, **options):
        super().__init__(**options)
        for name, weight in self.model.named_parameters():
            if ".norm1" in name or "to_out" in name:
                # what the attention gives is little of a block in the beginning
                torch.nn.init.normal_(weight, std=0.5)

    @property
    def blocks(self):
        return [
            (self.model.joint_transformer_blocks, parts.TwoStreams, "encoder_hidden_states"),
            (self.model.single_transformer_blocks, parts.OneSequence, None),
        ]

    def first_inputs(self):
        return {
            "hidden_states": random(2, 4, 8, 12, seed=1),
            "encoder_hidden_states": random(2, 7, 32, seed=2),
            "timestep": torch.tensor([0.5, 0.5]),
        }

    def with_text(self, inputs, embeds, mask, rows):
        return inputs | {"encoder_hidden_states": embeds.expand(rows, -1, -1)}

    def part(self, given):
        return SimpleNamespace(
            image=given["hidden_states"], text=given["encoder_hidden_states"], mask=None,
            image_rope=None, text_rope=None,
        )  # fmt: skip

    def returned(self, image, pos):
        return torch.cat([pos, image], 1)


class Ernie(Case):
    cls = "ErnieImageTransformer2DModel"
    config = {
        "hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 32,
        "in_channels": 16, "out_channels": 16, "text_in_dim": 24, "rope_axes_dim": (4, 6, 6),
    }  # fmt: skip
    attention, tokens, text = "self_attention", "x", "text_bth"
    text_shape = (7, 24)
    positions = ("rotary_pos_emb", "attention_mask")
    has_mask = True

    def __init__(self, **options):
        super().__init__(**options)
        for part in (self.model.adaLN_modulation[-1], self.model.final_linear):
            torch.nn.init.normal_(part.weight, std=0.2)

    @staticmethod
    def turn(x, angles):
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    @property
    def blocks(self):
        return [(self.model.layers, parts.OneSequence, None)]

    def first_inputs(self):
        return {
            "hidden_states": random(2, 16, *L, seed=1), "timestep": torch.tensor([500.0, 500.0]),
            "text_bth": random(2, 7, 24, seed=2), "text_lens": torch.tensor([7, 4]),
        }  # fmt: skip

    def with_text(self, inputs, embeds, mask, rows):
        own = torch.full((rows,), embeds.shape[1]) if mask is None else mask.sum(1).expand(rows)
        return inputs | {"text_bth": embeds.expand(rows, -1, -1), "text_lens": own}

    def part(self, given):
        x, rope, at = given["x"].transpose(0, 1), given["rotary_pos_emb"], self.image_tokens
        return SimpleNamespace(
            image=x[:, :at], text=x[:, at:], image_rope=rope[:, :at], text_rope=rope[:, at:],
            mask=given["attention_mask"][:, 0, 0, at:],
        )  # fmt: skip

    def own_text(self):
        return self.inputs["text_bth"], torch.arange(7) < self.inputs["text_lens"][:, None]

    def run(self, block, own, x):
        """The sequence first, and a row of the modulation for each token."""
        temb = [each[:1].expand(x.shape[1], -1, -1) for each in own["temb"]]
        return block(**own | {"x": x.transpose(0, 1), "temb": temb}).transpose(0, 1)

    def returned(self, image, pos):
        return torch.cat([image, pos], 1).transpose(0, 1)


class KeysOnly(parts.Rules):
    """Text that is keys and values, and no queries (PRX)."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, *_, **__):
        heads = attn.heads
        q, k, v = attn.img_qkv_proj(hidden_states).unflatten(-1, (3, heads, -1)).unbind(2)
        texts = []
        for text in encoder_hidden_states.split(self.lengths, 1):
            text_k, text_v = attn.txt_kv_proj(text).unflatten(-1, (2, heads, -1)).unbind(2)
            # its rows are thrown away
            texts.append((text_k, attn.norm_added_k(text_k), text_v))
        o, *_ = self.mix((attn.norm_q(q), attn.norm_k(k), v), texts)
        return attn.to_out[0](o)


class PRX(Case):
    cls = "PRXTransformer2DModel"
    config = {
        "in_channels": 4, "context_in_dim": 32, "hidden_size": 32, "mlp_ratio": 2.0,
        "num_heads": 2, "depth": 2, "axes_dim": [8, 8],
    }  # fmt: skip
    one_block = {"depth": 1}
    attention = "attention"
    has_mask = True
    positions = ("image_rotary_emb", "attention_mask")

    def __init__(self, **options):
        super().__init__(**options)
        for name, weight in self.model.named_parameters():
            if "modulation.lin" in name:
                torch.nn.init.normal_(weight, std=0.2)

    @staticmethod
    def turn(x, rope):
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = rope[:, 0, :, None, :, 0, 0], rope[:, 0, :, None, :, 1, 0]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    @property
    def blocks(self):
        return [(self.model.blocks, KeysOnly, "encoder_hidden_states")]

    def first_inputs(self):
        return {
            "hidden_states": random(2, 4, 8, 12, seed=1), "timestep": torch.tensor([0.5, 0.5]),
            "encoder_hidden_states": random(2, 7, 32, seed=2),
            "attention_mask": torch.arange(7) < torch.tensor([[7], [4]]),
        }  # fmt: skip

    def with_text(self, inputs, embeds, mask, rows):
        mask = None if mask is None else mask.expand(rows, -1)
        text = embeds.expand(rows, -1, -1)
        return inputs | {"encoder_hidden_states": text, "attention_mask": mask}

    def own_text(self):
        return self.inputs[self.text], self.inputs["attention_mask"]

    def part(self, given):
        return SimpleNamespace(
            image=given["hidden_states"], text=given["encoder_hidden_states"],
            mask=given["attention_mask"], image_rope=given["image_rotary_emb"], text_rope=None,
        )  # fmt: skip

    def both(self, block, own, image, texts):
        return texts, block(**own | {"hidden_states": image, "encoder_hidden_states": texts})

    def last(self, image, pos):
        return image


class Target:
    """The attention of a block of Qwen-Image 2.1 with the negatives' keys beside the prompt's."""

    def __init__(self, rule, negatives, kept, stock):
        self.rule, self.negatives, self.kept, self.stock = rule, negatives, kept, stock

    def __call__(self, attn, hidden_states, rotary_emb, segments, key_valid=None, **others):
        o = self.stock(
            attn, hidden_states, rotary_emb=rotary_emb, segments=segments, key_valid=key_valid,
            **others,
        )  # fmt: skip
        n = segments[-1][1]
        q, k, v = heads_of(attn, hidden_states, rotary_emb)
        image, pos = ([x[:, rows] for x in (q, k, v)] for rows in (slice(n, None), slice(0, n)))
        negs = [(ks[attn], ks[attn], vs[attn]) for ks, vs in self.kept]
        negs = [[x.expand(len(q), -1, -1, -1) for x in each] for each in negs]
        masks = [
            (None, alpha, None if own is None else own.expand(len(q), -1))
            for _, alpha, own in self.negatives
        ]
        valid = None if key_valid is None else key_valid[:, :n]
        made, *_ = joint_attention(self.rule, masks, image, pos, negs, valid)
        return torch.cat([o[:, :n], attn.to_out[0](made)], 1)


def heads_of(attn, x, rope):
    q, k, v = (y(x).unflatten(-1, (attn.heads, -1)) for y in (attn.to_q, attn.to_k, attn.to_v))
    return *(parts.turn_complex(y, rope) for y in (attn.norm_q(q), attn.norm_k(k))), v


class Qwen21(Case):
    """With an image that is edited between two parts of the text, and a prompt with padding."""

    cls = "QwenImage21Transformer2DModel"
    config = {
        "in_channels": 8, "out_channels": 8, "num_layers": 2, "context_in_dim": 32,
        "axes_dims_rope": (4, 6, 6), **SIZE,
    }  # fmt: skip
    has_mask = True
    edited = (1, 2, 2)

    def inputs_image(self):
        return 24

    def first_inputs(self):
        # a slot of the encoder for four tokens of an image
        slots = torch.tensor([0, 0, 0, 1, 0, 0, 0, 0, *[1] * 6], dtype=torch.bool)
        own = torch.arange(8) < torch.tensor([[8], [6]])
        return {
            "hidden_states": random(2, 28, 8, seed=1), "timestep": torch.tensor([0.5, 0.5]),
            "encoder_hidden_states": random(2, 8, 32, seed=2),
            "encoder_hidden_states_mask": own,
            "img_shapes": [[self.edited, (1, *L)]] * 2, "img_mask": slots.expand(2, -1),
        }  # fmt: skip

    def own_text(self):
        """Without an image that is edited: a negative prompt has none."""
        self.inputs = self.first_inputs() | {
            "hidden_states": random(2, 24, 8, seed=1), "img_shapes": [[(1, *L)]] * 2,
            "img_mask": (torch.arange(8 + 6) >= 8).expand(2, -1),
        }  # fmt: skip
        return self.inputs[self.text], self.inputs["encoder_hidden_states_mask"]

    def expected(self, rule, negatives, **changes):
        model, inputs = self.model, self.inputs | changes
        kept = []
        for embeds, _, own in negatives:
            rows = len(embeds) if own is None else len(own)
            text = embeds.expand(rows, -1, -1)
            kept.append(self.keys_values(inputs, text, own))
        blocks = model.transformer_blocks
        make = Target(rule, negatives, kept, blocks[0].attn.processor)
        with parts.attention([block.attn for block in blocks], make):
            return self.out(model(**inputs, return_dict=False))

    def keys_values(self, inputs, text, own):
        """Of the text as a prompt of its own, with an image after it."""
        rows, m = text.shape[:2]
        keys, values = {}, {}
        stock = self.model.transformer_blocks[0].attn.processor

        def keep(attn, x, rotary_emb=None, **others):
            _, k, v = heads_of(attn, x, rotary_emb)
            keys[attn], values[attn] = k[:, :m], v[:, :m]
            return stock(attn, x, rotary_emb=rotary_emb, **others)

        with parts.attention([block.attn for block in self.model.transformer_blocks], keep):
            self.model(
                hidden_states=random(rows, 4, 8, seed=9), encoder_hidden_states=text,
                encoder_hidden_states_mask=own, timestep=inputs["timestep"][:1].expand(rows),
                img_shapes=[[(1, 2, 2)]] * rows,
                img_mask=(torch.arange(m + 1) >= m).expand(rows, -1),
            )  # fmt: skip
        return keys, values


class Ideogram4(Case):
    """Its text is filled up in front, and the image behind it."""

    cls = "Ideogram4Transformer2DModel"
    config = {
        "in_channels": 16, "num_layers": 2, "intermediate_size": 32, "adaln_dim": 16,
        "llm_features_dim": 24, "mrope_section": (4, 2, 2), **SIZE,
    }  # fmt: skip
    attention = "attention"
    has_mask = True

    @property
    def blocks(self):
        return [(self.model.layers, Halves, None)]

    @staticmethod
    def turn(x, rope):
        cos, sin = (y[:, :, None] for y in rope)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def laid_out(self, own, image):
        """For tokens of a text, True where they are some: what the pipeline says of each."""
        rows, n = own.shape
        ids = torch.zeros(rows, n + 24, 3, dtype=torch.long)
        ids[:, :n] = ((own.cumsum(1) - 1).clamp(min=0) * own)[..., None]
        ids[:, n:] = grid_ids(3, 1).long() + 65536
        both = torch.cat([own, own.new_ones(rows, 24)], 1)
        indicator = torch.where(both, 2, 0)
        indicator[:, :n] = torch.where(own, 3, 0)
        return {
            "position_ids": ids, "segment_ids": torch.where(both, 1, -1), "indicator": indicator,
            "hidden_states": torch.cat([torch.zeros(rows, n, 16), image], 1),
        }  # fmt: skip

    def with_image(self, text):
        return torch.cat([text, torch.zeros(len(text), 24, text.shape[2])], 1)

    def first_inputs(self):
        own = torch.arange(7) >= torch.tensor([[0], [3]])
        return {
            "timestep": torch.tensor([0.5, 0.5]), **self.laid_out(own, random(2, 24, 16, seed=1)),
            "encoder_hidden_states": self.with_image(random(2, 7, 24, seed=2) * own[..., None]),
        }  # fmt: skip

    def inputs_image(self):
        return 24

    alone = False  # without the rows of padding, of which stock makes something else

    def __init__(self, **options):
        super().__init__(**options)
        self.alone = True

    def out(self, output):
        return output[0][:, -24:] if self.alone else output[0]

    def text_of(self, tokens, seed):
        return random(1, tokens, 24, seed=seed)

    def with_text(self, inputs, embeds, mask, rows):
        if mask is None:
            mask = torch.ones(1, embeds.shape[1], dtype=torch.bool)
        text = self.with_image(embeds.expand(rows, -1, -1))
        image = inputs["hidden_states"][:, -24:]
        own = {"encoder_hidden_states": text}
        return inputs | self.laid_out(mask.expand(rows, -1), image) | own

    def own_text(self):
        text = self.inputs["encoder_hidden_states"][:, :-24]
        return text, self.inputs["indicator"][:, :-24] == 3

    def part(self, given):
        x, rope, mask = given["hidden_states"], given["image_rotary_emb"], given["attention_mask"]
        n = x.shape[1] - 24
        return SimpleNamespace(
            image=x[:, n:], text=x[:, :n], mask=mask[:, 0, -1, :n],
            image_rope=[y[:, n:] for y in rope], text_rope=[y[:, :n] for y in rope],
        )  # fmt: skip

    def returned(self, image, pos):
        return torch.cat([pos, image], 1)


class Halves(parts.OneSequence):
    def heads(self, attn, x):
        layer = SimpleNamespace(heads=attn.num_heads)
        linears = attn.to_q, attn.to_k, attn.to_v
        return heads(layer, x, linears, (attn.norm_q, attn.norm_k))


class HiDreamHeads(parts.Rules):
    """Normed over all heads; keys of what fills up the image are 0."""

    masks = None

    def of(self, attn, x, kind, masks=None):
        def project(name):
            return getattr(attn, f"to_{name}{kind}")(x)

        q, k = (getattr(attn, f"{y}_rms_norm{kind}")(project(y)) for y in "qk")
        k = k if masks is None else k * masks[..., None]
        return [y.unflatten(-1, (attn.heads, -1)) for y in (q, k, project("v"))]

    def __call__(
        self, attn, hidden_states, hidden_states_masks=None, encoder_hidden_states=None, **_
    ):
        size = self.parts[0].image.shape[1]
        masks = None if hidden_states_masks is None else hidden_states_masks[:, :size]
        image, texts, kind = hidden_states, encoder_hidden_states, "_t"
        if texts is None:
            image, texts, kind = image[:, :size], image[:, size:], ""
        texts = [self.of(attn, x, kind) for x in texts.split(self.lengths, 1)]
        o, *of_texts = self.mix(self.of(attn, image, "", masks), texts)
        of_texts = torch.cat(of_texts, 1)
        if kind:
            return attn.to_out(o), attn.to_out_t(of_texts)
        return attn.to_out(torch.cat([o, of_texts], 1))


class HiDream(Case):
    """An image that is not square, and is filled up."""

    cls = "HiDreamImageTransformer2DModel"
    config = {
        "patch_size": 2, "in_channels": 4, "num_layers": 2, "num_single_layers": 2,
        "caption_channels": [24, 16], "text_emb_dim": 32, "num_routed_experts": 2,
        "num_activated_experts": 1, "axes_dims_rope": (8, 4, 4), "max_resolution": (12, 12),
        "llama_layers": [0, 1, 2, 2], **SIZE,
    }  # fmt: skip
    one_block = {"num_layers": 1, "num_single_layers": 1, "llama_layers": [0, 2]}
    attention, text_first, text = "attn1", False, "encoder_hidden_states_t5"
    has_mask = False
    positions = ("image_rotary_emb",)

    def inputs_image(self):
        return 36

    @property
    def blocks(self):
        lists = self.model.double_stream_blocks, self.model.single_stream_blocks
        double, single = ([each.block for each in blocks] for blocks in lists)
        return [(double, HiDreamHeads, "encoder_hidden_states"), (single, HiDreamHeads, None)]

    @staticmethod
    def turn(x, rope):
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = rope[..., 0, 0], rope[..., 1, 0]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    def first_inputs(self):
        return {
            "hidden_states": random(2, 4, 8, 12, seed=1), "pooled_embeds": random(2, 32, seed=3),
            "timesteps": torch.tensor([500.0, 500.0]),
            "encoder_hidden_states_t5": random(2, 7, 24, seed=2),
            "encoder_hidden_states_llama3": random(3, 2, 7, 16, seed=5),
        }  # fmt: skip

    def text_of(self, tokens, seed):
        return random(1, tokens, 24, seed=seed), random(3, 1, tokens, 16, seed=seed + 20)

    def with_text(self, inputs, embeds, mask, rows):
        t5, llama = embeds
        return inputs | {
            "encoder_hidden_states_t5": t5.expand(rows, -1, -1),
            "encoder_hidden_states_llama3": llama.expand(-1, rows, -1, -1),
        }

    def own_text(self):
        names = "encoder_hidden_states_t5", "encoder_hidden_states_llama3"
        return tuple(self.inputs[name] for name in names), None

    def too_narrow(self, text):
        return text[0][..., :-1], text[1]

    def part(self, given):
        x, rope = given["hidden_states"], given["image_rotary_emb"]
        at = x.shape[1]
        return SimpleNamespace(
            image=x, text=given["encoder_hidden_states"], mask=None, image_rope=rope[:, :at],
            text_rope=rope[:, at:],
        )  # fmt: skip

    def before(self, index, texts, inputs, negatives):
        """The last third of a text is of this block's layer."""
        layer = self.model.config.llama_layers[index]
        llamas = [inputs["encoder_hidden_states_llama3"], *(embeds[1] for embeds, *_ in negatives)]
        made, parts_of = [], texts.split([3 * x.shape[2] for x in llamas], 1)
        for x, llama in zip(parts_of, llamas, strict=True):
            own = self.model.caption_projection[index](llama[layer]).expand(len(x), -1, -1)
            made += [x[:, : -own.shape[1]], own]
        return torch.cat(made, 1)

    def returned(self, image, pos):
        return torch.cat([image, pos], 1)


class JoyHeads(parts.Rules):
    """One projection for queries, keys and values of each stream."""

    def of(self, attn, x, kind):
        qkv = getattr(attn, f"{kind}_attn_qkv")(x).unflatten(-1, (3, attn.heads, -1)).unbind(2)
        norms = [getattr(attn, f"{kind}_attn_{y}_norm") for y in "qk"]
        return [norms[0](qkv[0]), norms[1](qkv[1]), qkv[2]]

    def __call__(self, attn, hidden_states, encoder_hidden_states, *_, **__):
        texts = [self.of(attn, x, "txt") for x in encoder_hidden_states.split(self.lengths, 1)]
        o, *of_texts = self.mix(self.of(attn, hidden_states, "img"), texts)
        return attn.img_attn_proj(o), attn.txt_attn_proj(torch.cat(of_texts, 1))


class Joy(Case):
    """With an image that is edited, which the model puts behind the one that is made."""

    cls = "JoyImageEditTransformer3DModel"
    config = {
        "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 32,
        "mlp_width_ratio": 2.0, "num_layers": 2, "rope_dim_list": [4, 6, 6],
    }  # fmt: skip
    text_first, targets, has_mask = False, 24, False
    turn = staticmethod(parts.turn_real)

    def __init__(self, **options):
        super().__init__(**options)
        for name, weight in self.model.named_parameters():
            if "modulate_table" in name:
                torch.nn.init.normal_(weight, std=0.3)

    @property
    def blocks(self):
        return [(self.model.double_blocks, JoyHeads, "encoder_hidden_states")]

    def inputs_image(self):
        return 48

    def first_inputs(self):
        return {
            "hidden_states": random(2, 2, 4, 1, 8, 12, seed=1),
            "timestep": torch.tensor([500.0, 500.0]),
            "encoder_hidden_states": random(2, 7, 32, seed=2),
        }  # fmt: skip

    def with_text(self, inputs, embeds, mask, rows):
        return inputs | {"encoder_hidden_states": embeds.expand(rows, -1, -1)}

    def part(self, given):
        image, text = given["image_rotary_emb"]
        return SimpleNamespace(
            image=given["hidden_states"], text=given["encoder_hidden_states"], mask=None,
            image_rope=image, text_rope=text,
        )  # fmt: skip


class JoyCounted(Joy):
    """Text has positions after those of the image."""

    config = Joy.config | {"rope_type": "mrope"}


CASES = {
    "joy": Joy,
    "joy-mrope": JoyCounted,
    "hidream": HiDream,
    "ideogram4": Ideogram4,
    "qwen21": Qwen21,
    "prx": PRX,
    "lumina2": Lumina2,
    "aura-flow": AuraFlow,
    "ernie": Ernie,
}
CASES = {name: case for name, case in CASES.items() if hasattr(diffusers, case.cls)}
