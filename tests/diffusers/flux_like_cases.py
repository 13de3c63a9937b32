"""The small denoisers built like FLUX.1: one call of each, as in `side_cases.py`."""

import diffusers
import parts
import torch
from joint_cases import random
from side_cases import SIZE, TextFirst, grid_ids

AXES = {"axes_dims_rope": (4, 6, 6)}


class Joined(parts.OneSequence):
    """A block that puts its texts before the image by itself, and whose attention has no output
    projection of its own."""

    def __call__(self, attn, hidden_states, *_, **__):
        n = sum(self.lengths)
        *texts, image = hidden_states.split([*self.lengths, hidden_states.shape[1] - n], 1)
        image, *texts = self.mix(self.heads(attn, image), [self.heads(attn, x) for x in texts])
        return torch.cat([*texts, image], 1)


class Plain(parts.OneSequence):
    """[image; texts], without an output projection."""

    def __call__(self, attn, hidden_states, *_, **__):
        lengths = [hidden_states.shape[1] - sum(self.lengths), *self.lengths]
        image, *texts = (self.heads(attn, x) for x in hidden_states.split(lengths, 1))
        return torch.cat(self.mix(image, texts), 1)


class FluxLike(TextFirst):
    config = {
        "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2,
        "joint_attention_dim": 32, **AXES, **SIZE,
    }  # fmt: skip
    one_block = {"num_layers": 1, "num_single_layers": 1}
    counts = False

    @property
    def blocks(self):
        text = "encoder_hidden_states"
        return [
            (self.model.transformer_blocks, parts.TwoStreams, text),
            (self.model.single_transformer_blocks, Joined, text),
        ]

    def text_ids(self, n):
        ids = torch.zeros(n, 3)
        if self.counts:
            ids[:, 1:] = torch.arange(n)[:, None]
        return ids

    def image_ids(self):
        return grid_ids(3, 1)

    def inputs_image(self):
        return len(self.image_ids())

    def first_inputs(self):
        return {
            "hidden_states": random(2, self.inputs_image(), 16, seed=1),
            "encoder_hidden_states": random(2, 7, 32, seed=2),
            "timestep": torch.tensor([0.5, 0.5]),
            "img_ids": self.image_ids(), "txt_ids": self.text_ids(7),
        }  # fmt: skip

    @property
    def has_mask(self):
        return False

    def with_text(self, inputs, embeds, mask, rows):
        text = embeds.expand(rows, -1, -1)
        return inputs | {"encoder_hidden_states": text, "txt_ids": self.text_ids(text.shape[1])}


class Ovis(FluxLike):
    cls = "OvisImageTransformer2DModel"
    counts = True


class LongCat(FluxLike):
    """With an image that is edited, at another time than the one that is made."""

    cls = "LongCatImageTransformer2DModel"
    config = FluxLike.config | {"pooled_projection_dim": 32}
    counts = True
    targets = 24

    def image_ids(self):
        return torch.cat([grid_ids(3, 1, a0=1) + torch.tensor([0, 9, 9]), grid_ids(3, 1, a0=2)])


class Bria(FluxLike):
    cls = "BriaTransformer2DModel"


class Chroma(FluxLike):
    """The second row has padding, which its mask weighs."""

    cls = "ChromaTransformer2DModel"
    modulates_anew = True
    config = FluxLike.config | {
        "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1,
    }  # fmt: skip

    @property
    def blocks(self):
        return [
            (self.model.transformer_blocks, parts.TwoStreams, "encoder_hidden_states"),
            (self.model.single_transformer_blocks, Plain, None),
        ]

    def first_inputs(self):
        own = torch.arange(7) < torch.tensor([[7], [4]])
        return super().first_inputs() | {"attention_mask": self.with_image(own)}

    def with_image(self, mask):
        image = torch.ones(len(mask), self.inputs_image())
        return torch.cat([mask.float(), image], 1)

    def with_text(self, inputs, embeds, mask, rows):
        if mask is None:
            mask = torch.ones(1, embeds.shape[1])
        mask = self.with_image(mask.expand(rows, -1))
        return super().with_text(inputs, embeds, None, rows) | {"attention_mask": mask}

    def part(self, given):
        mask = given["attention_mask"]
        part = super().part(given | {"attention_mask": None})
        n = part.text.shape[1]
        part.mask = None if mask is None else mask[:, :n]
        return part

    @property
    def has_mask(self):
        return True

    def own_text(self):
        """Without padding: a negative prompt has none, and of the prompt it counts."""
        self.inputs |= {"attention_mask": torch.ones_like(self.inputs["attention_mask"])}
        return self.inputs[self.text], None


class Fibo(FluxLike):
    """Half of the channels of a text is written anew before each block."""

    cls = "BriaFiboTransformer2DModel"
    config = FluxLike.config | {"joint_attention_dim": 24, "text_encoder_dim": 12}

    @property
    def blocks(self):
        return [
            (self.model.transformer_blocks, parts.TwoStreams, "encoder_hidden_states"),
            (self.model.single_transformer_blocks, Plain, None),
        ]

    def layers(self, rows, tokens, seed):
        count = len(self.model.caption_projection)
        return [random(rows, tokens, 12, seed=seed + i) for i in range(count)]

    def first_inputs(self):
        own = torch.arange(7) < torch.tensor([[7], [4]])
        return super().first_inputs() | {
            "encoder_hidden_states": random(2, 7, 24, seed=2),
            "text_encoder_layers": self.layers(2, 7, seed=20),
            "joint_attention_kwargs": self.masked(own),
        }  # fmt: skip

    def masked(self, own):
        image = own.new_ones(len(own), self.inputs_image())
        return {"attention_mask": torch.cat([own, image], 1)[:, None, None]}

    def text_of(self, tokens, seed):
        return random(1, tokens, 24, seed=seed), self.layers(1, tokens, seed=10 * seed)

    def with_text(self, inputs, embeds, mask, rows):
        text, layers = embeds
        if mask is None:
            mask = torch.ones(1, text.shape[1], dtype=torch.bool)
        return super().with_text(inputs, text, None, rows) | {
            "text_encoder_layers": [x.expand(rows, -1, -1) for x in layers],
            "joint_attention_kwargs": self.masked(mask.expand(rows, -1)),
        }  # fmt: skip

    def before(self, index, texts, inputs, negatives):
        layers = [inputs["text_encoder_layers"][index]]
        layers += [embeds[1][index].expand(self.rows, -1, -1) for embeds, *_ in negatives]
        anew = self.model.caption_projection[index](torch.cat(layers, 1))
        return torch.cat([texts[..., : texts.shape[2] // 2], anew], 2)

    positions = ("image_rotary_emb", "joint_attention_kwargs")

    def part(self, given):
        options = given["joint_attention_kwargs"]
        part = super().part(given)
        mask = (options or {}).get("attention_mask")
        part.mask = None if mask is None else mask[:, 0, 0, : part.text.shape[1]]
        return part

    @property
    def has_mask(self):
        return True

    def own_text(self):
        mask = self.inputs["joint_attention_kwargs"]["attention_mask"][:, 0, 0, :7]
        return (self.inputs[self.text], self.inputs["text_encoder_layers"]), mask

    def too_narrow(self, text):
        return text[0][..., :-1], text[1]


CASES = {"chroma": Chroma, "ovis": Ovis, "longcat": LongCat, "bria": Bria, "fibo": Fibo}
CASES = {name: case for name, case in CASES.items() if hasattr(diffusers, case.cls)}
