"""The small denoisers with a side stream: one call of each, and what the oracle asks about it."""

import inspect
from types import SimpleNamespace

import diffusers
import parts
import torch
from joint_cases import random
from nasa_diffusers.families.qwen import MASKS_TEXT
from nasa_diffusers.testing_side import LTX2_VERSIONS

SIZE = {"attention_head_dim": 16, "num_attention_heads": 2}
L = (4, 6)  # rows and columns of image tokens


def made(cls, config, seed=0):
    """A denoiser with random weights, also where the class begins with zeros."""
    torch.manual_seed(seed)
    model = getattr(diffusers, cls)(**config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "pad_token" in name or "scale_shift" in name:
            torch.nn.init.normal_(weight)
    return model


def grid_ids(axes, row, **others):
    """Positions `[l, axes]` with the row at axis `row` and the column after it."""
    height, width = L
    ids = torch.zeros(height * width, axes)
    ids[:, row] = torch.arange(height * width) // width
    ids[:, row + 1] = torch.arange(height * width) % width
    for axis, value in others.items():
        ids[:, int(axis[1:])] = value
    return ids


class Case:
    """A denoiser and the inputs of one call; the rest is asked by `parts.guided`."""

    cls: str
    config: dict
    text_first = True  # of what a block of two streams returns
    one_block = {"num_layers": 1}
    attention = "attn"
    tokens = "hidden_states"
    # of a block: what the attention reads, and the oracle's does not
    positions = (
        "image_rotary_emb", "freqs_cis", "encoder_hidden_states_mask", "attention_mask",
        "attn_mask",
    )  # fmt: skip
    text = "encoder_hidden_states"
    text_shape = (7, 32)
    rows = 2
    rules = ("nasa-cross", "nasa-text", "nasa", "vsf")
    grid = (1, *L)
    modulates_anew = False  # each block gets a modulation of its own
    targets = None  # how many image tokens are made, where others stand behind or before them
    leading = 0  # how many of them
    made = None  # which are made, [l], where those that are given may lie anywhere

    def __init__(self, **options):
        self.model = made(self.cls, self.config | options)
        self.pipe = SimpleNamespace(transformer=self.model)
        self.inputs = self.first_inputs()
        self.image_tokens = self.inputs_image()

    def inputs_image(self):
        return L[0] * L[1]

    def __call__(self, **changes):
        return self.out(self.model(**self.inputs | changes, return_dict=False))

    def out(self, output):
        return output[0]

    def mask_of(self, mask):
        """As `enable_nasa` takes that of its text, or those of several."""
        return mask

    def before(self, index, texts, inputs, negatives):
        """The tokens of all prompts as the block of this number gets them."""
        return texts

    def run(self, block, own, x):
        """A block of one sequence with these tokens and what else it is called with."""
        return block(**own | {self.tokens: x})

    def both(self, block, own, image, texts):
        """Texts and image after a block of two streams."""
        output = block(**own | {self.tokens: image, self.text_name: texts})
        return output if self.text_first else output[::-1]

    def last(self, image, pos):
        """What the last block of two streams returns."""
        return (pos, image) if self.text_first else (image, pos)

    text_name = "encoder_hidden_states"

    @property
    def has_mask(self):
        """Whether the model masks its text; Qwen-Image's did not before diffusers 0.37."""
        is_old = self.cls.startswith("Qwen") and not MASKS_TEXT
        have_none = "Flux2", "Cog", "ConsisID", "EasyAnimate"
        return not self.cls.startswith(have_none) and not is_old

    def own_text(self):
        """The text of the call as a negative prompt with its mask."""
        masks = [
            x for name, x in self.inputs.items() if name.startswith("encoder") and "mask" in name
        ]
        return self.inputs[self.text], masks[0].bool() if masks and self.has_mask else None

    def too_narrow(self, text):
        """The same with too few channels."""
        return text[..., :-1]

    def text_of(self, tokens, seed):
        return random(1, tokens, *self.text_shape[1:], seed=seed)

    def look(self):
        """Where the tokens that are made lie, in a call that was seen."""
        inputs, tokens = self.inputs, self.inputs.get("hidden_states")
        if tokens is None:
            _, f, h, w = inputs["x"][0].shape
            self.image_tokens = self.targets = -(-f * h * w // 4 // 32) * 32
            return
        self.image_tokens = self.targets = tokens.shape[1]
        if tokens.dim() == 4 and hasattr(self.model.config, "patch_size"):
            patch = self.model.config.patch_size
            self.image_tokens = self.targets = tokens.shape[2] * tokens.shape[3] // patch**2
        if inputs.get("img_shapes") is not None:
            shapes = inputs["img_shapes"][0]
            # what is made are all layers, or one image; behind them stands what is edited
            are_layers = getattr(self.model.config, "use_layer3d_rope", False)
            made = shapes[:-1] if are_layers else shapes[:1]
            self.targets = sum(f * h * w for f, h, w in made)
        elif inputs.get("img_ids") is not None:
            ids = inputs["img_ids"]
            ids = ids[0] if ids.dim() == 3 else ids
            # the first one is of the image that is made
            self.targets = int((ids[:, 0] == ids[0, 0]).sum())
        elif inputs.get("audio_hidden_states") is not None and inputs.get("num_frames") is not None:
            self.targets = inputs["num_frames"] * inputs["height"] * inputs["width"]
        elif inputs.get("audio_hidden_states") is not None:
            # what is given is less noisy
            times = inputs["timestep"][0]
            self.made = times == times.max()

    def negative_part(self, given):
        return self.part(given)

    def expected(self, rule, negatives, **changes):
        return parts.guided(self, rule, negatives, **changes)


class Qwen(Case):
    cls = "QwenImageTransformer2DModel"
    config = {
        "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2,
        "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6), **SIZE,
    }  # fmt: skip
    shapes = ((1, *L),)
    turn = staticmethod(parts.turn_complex)

    @property
    def blocks(self):
        return [(self.model.transformer_blocks, parts.TwoStreams, "encoder_hidden_states")]

    def inputs_image(self):
        return sum(f * h * w for f, h, w in self.shapes)

    def first_inputs(self):
        return {
            "hidden_states": random(2, self.inputs_image(), 16, seed=1),
            "encoder_hidden_states": random(2, 7, 32, seed=2),
            "encoder_hidden_states_mask": torch.arange(7) < torch.tensor([[7], [5]]),
            "timestep": torch.tensor([0.5, 0.5]),
            "img_shapes": [list(self.shapes)] * 2,
            **self.lengths(7),
        }

    def lengths(self, n):
        """Before diffusers 0.37 a list said them, and the mask was not looked at."""
        return {} if MASKS_TEXT else {"txt_seq_lens": [n, n]}

    def with_text(self, inputs, embeds, mask, rows):
        mask = None if mask is None else mask.expand(rows, -1)
        text = embeds.expand(rows, -1, -1)
        own = {"encoder_hidden_states": text, "encoder_hidden_states_mask": mask}
        return inputs | own | self.lengths(text.shape[1])

    def part(self, given):
        image_rope, text_rope = given["image_rotary_emb"]
        mask = given["encoder_hidden_states_mask"] if MASKS_TEXT else None
        text = given["encoder_hidden_states"]
        return SimpleNamespace(
            image=given["hidden_states"], text=text, image_rope=image_rope,
            text_rope=text_rope[: text.shape[1]], mask=mask,
        )  # fmt: skip


class QwenEdit(Qwen):
    """Two images that are edited, and their tokens modulated as clean ones."""

    shapes = ((1, *L), (1, 2, 4), (1, 3, 2))
    targets = 24
    config = Qwen.config | {"zero_cond_t": True}


class QwenLayered(Qwen):
    shapes = ((1, *L), (1, *L), (1, 3, 4))
    targets = 48
    grid = (2, *L)
    config = Qwen.config | {"use_layer3d_rope": True}


class ZImage(Case):
    cls = "ZImageTransformer2DModel"
    config = {
        "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2,
        "n_kv_heads": 2, "cap_feat_dim": 32, "axes_dims": [4, 6, 6], "axes_lens": [128, 64, 64],
    }  # fmt: skip
    one_block = {"n_layers": 1}
    attention = "attention"
    tokens = "x"
    text = "cap_feats"
    turn = staticmethod(parts.turn_complex)
    # padded to a multiple of 32
    padding = 8

    @property
    def blocks(self):
        return [(self.model.layers, parts.OneSequence, None)]

    def inputs_image(self):
        return 32

    def first_inputs(self):
        return {
            "x": list(random(2, 4, 1, 8, 12, seed=1)),
            "t": torch.tensor([0.5, 0.5]),
            "cap_feats": [random(40, 32, seed=2), random(5, 32, seed=3)],
        }

    def out(self, output):
        return torch.stack(output[0])

    def with_text(self, inputs, embeds, mask, rows):
        texts = list(embeds.expand(rows, -1, -1))
        if mask is not None:
            texts = [x[own] for x, own in zip(texts, mask.expand(rows, -1), strict=True)]
        return inputs | {"cap_feats": texts}

    def part(self, given):
        x, rope, mask = given["x"], given["freqs_cis"], given["attn_mask"]
        at = self.image_tokens
        return SimpleNamespace(
            image=x[:, :at], text=x[:, at:], image_rope=rope[:, :at], text_rope=rope[:, at:],
            mask=None if mask is None else mask[:, at:],
        )  # fmt: skip

    def returned(self, image, pos):
        return torch.cat([image, pos], 1)


class TextFirst(Case):
    """[text, image] with cosines and sines."""

    turn = staticmethod(parts.turn_real)

    def part(self, given):
        rope, x = given["image_rotary_emb"], given["hidden_states"]
        n = rope[0].shape[0] - self.image_tokens
        mask = given.get("attention_mask")
        mask = None if mask is None else mask[:, 0, 0, :n]
        text = given.get("encoder_hidden_states")
        return SimpleNamespace(
            image=x[:, -self.image_tokens :], text=x[:, :n] if text is None else text, mask=mask,
            image_rope=[y[n:] for y in rope], text_rope=[y[:n] for y in rope],
        )  # fmt: skip

    def returned(self, image, pos):
        return torch.cat([pos, image], 1)


class Flux2(TextFirst):
    cls = "Flux2Transformer2DModel"
    one_block = {"num_layers": 1, "num_single_layers": 1}
    config = {
        "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2,
        "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 4, 4), **SIZE,
    }  # fmt: skip

    @property
    def blocks(self):
        return [
            (self.model.transformer_blocks, parts.TwoStreams, "encoder_hidden_states"),
            (self.model.single_transformer_blocks, parts.WithFeedForward, None),
        ]

    def text_ids(self, n):
        ids = torch.zeros(n, 4)
        ids[:, 3] = torch.arange(n)
        return ids

    def image_ids(self):
        return grid_ids(4, 1)

    def inputs_image(self):
        return len(self.image_ids())

    def first_inputs(self):
        ids = self.image_ids()
        return {
            "hidden_states": random(2, len(ids), 16, seed=1),
            "encoder_hidden_states": random(2, 7, 32, seed=2),
            "timestep": torch.tensor([0.5, 0.5]),
            "img_ids": ids, "txt_ids": self.text_ids(7),
            "guidance": torch.tensor([3.5, 3.5]) if self.targets is None else None,
        }  # fmt: skip

    def with_text(self, inputs, embeds, mask, rows):
        assert mask is None or mask.all(), "FLUX.2 has no mask"
        text = embeds.expand(rows, -1, -1)
        return inputs | {"encoder_hidden_states": text, "txt_ids": self.text_ids(text.shape[1])}


class Klein(Flux2):
    """With two images that are edited."""

    config = Flux2.config | {"guidance_embeds": False}
    targets = 24

    def image_ids(self):
        others = [grid_ids(4, 1, a0=10)[:12], grid_ids(4, 1, a0=20)[:6]]
        return torch.cat([grid_ids(4, 1), *others])


class Krea2(TextFirst):
    cls = "Krea2Transformer2DModel"
    config = {
        "in_channels": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 32, "timestep_embed_dim": 16,
        "text_hidden_dim": 8, "num_text_layers": 4, "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2, "text_intermediate_size": 16, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    text_shape = (7, 4, 8)

    @property
    def blocks(self):
        return [(self.model.transformer_blocks, parts.Gated, None)]

    def ids(self, n):
        return torch.cat([torch.zeros(n, 3), grid_ids(3, 1)])

    def first_inputs(self):
        return {
            "hidden_states": random(2, 24, 16, seed=1),
            "encoder_hidden_states": random(2, 7, 4, 8, seed=2),
            "timestep": torch.tensor([0.5, 0.5]),
            "position_ids": self.ids(7),
            # the pipeline's padding lies before the end
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1]])
            .bool(),
        }  # fmt: skip

    def with_text(self, inputs, embeds, mask, rows):
        text, n = embeds.expand(rows, -1, -1, -1), embeds.shape[1]
        mask = None if mask is None else mask.expand(rows, -1)
        return inputs | {
            "encoder_hidden_states": text, "position_ids": self.ids(n),
            "encoder_attention_mask": mask,
        }  # fmt: skip


class CogVideoX(Case):
    cls = "CogVideoXTransformer3DModel"
    config = {
        "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 32,
        "time_embed_dim": 16, "sample_width": 6, "sample_height": 4, "sample_frames": 5,
        "max_text_seq_length": 7, "use_rotary_positional_embeddings": True, **SIZE,
    }  # fmt: skip
    text_first, attention, grid = False, "attn1", (2, 2, 3)
    turn = staticmethod(parts.turn_real)

    @property
    def blocks(self):
        return [(self.model.transformer_blocks, parts.Shared, "encoder_hidden_states")]

    def inputs_image(self):
        return self.grid[0] * self.grid[1] * self.grid[2]

    def first_inputs(self):
        angles = random(12, 8, seed=7).repeat_interleave(2, dim=1)
        return {
            "hidden_states": random(2, 2, 4, 4, 6, seed=1),
            "encoder_hidden_states": random(2, 7, 32, seed=2),
            "timestep": torch.tensor([500.0, 500.0]),
            "image_rotary_emb": (angles.cos(), angles.sin()),
        }  # fmt: skip

    def with_text(self, inputs, embeds, mask, rows):
        return inputs | {"encoder_hidden_states": embeds.expand(rows, -1, -1)}

    def part(self, given):
        return SimpleNamespace(
            image=given["hidden_states"], text=given["encoder_hidden_states"], mask=None,
            image_rope=given.get("image_rotary_emb"), text_rope=None,
        )  # fmt: skip


class CogView4(CogVideoX):
    cls = "CogView4Transformer2DModel"
    config = {
        "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 32,
        "time_embed_dim": 16, "condition_dim": 4, "rope_axes_dim": (16, 16), **SIZE,
    }  # fmt: skip
    grid = (1, *L)
    turn = staticmethod(parts.turn_halves)

    def first_inputs(self):
        size = torch.tensor([[64.0, 96.0]] * 2)
        return {
            "hidden_states": random(2, 4, 8, 12, seed=1),
            "encoder_hidden_states": random(2, 7, 32, seed=2),
            "timestep": torch.tensor([500.0, 500.0]), "original_size": size, "target_size": size,
            "crop_coords": torch.zeros(2, 2),
        }  # fmt: skip


class LTX2(Case):
    """Video and sound; of 2.3 with gates and texts modulated by the time."""

    cls = "LTX2VideoTransformer3DModel"
    config = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
        "cross_attention_dim": 32, "audio_in_channels": 4, "audio_out_channels": 4,
        "audio_num_attention_heads": 2, "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16, "num_layers": 2, "caption_channels": 32,
        "rope_double_precision": False, "rope_type": "split",
    }  # fmt: skip
    texts = ("encoder_hidden_states", "audio_encoder_hidden_states")
    masks = ("encoder_attention_mask", "audio_encoder_attention_mask")
    channels = (32, 32)
    rules = ("nasa", "vsf")
    grid = (2, 3, 4)

    def attentions(self):
        return [a for b in self.model.transformer_blocks for a in (b.attn2, b.audio_attn2)]

    def first_inputs(self):
        frames, height, width = self.grid
        video, sound = self.channels
        mask = torch.arange(7) < torch.tensor([[7], [5]])
        return {
            "hidden_states": random(2, 24, 4, seed=1),
            "audio_hidden_states": random(2, 5, 4, seed=2),
            "encoder_hidden_states": random(2, 7, video, seed=3),
            "audio_encoder_hidden_states": random(2, 7, sound, seed=4),
            "timestep": torch.tensor([500.0, 500.0]), "sigma": torch.tensor([500.0, 500.0]),
            "encoder_attention_mask": mask.long(), "audio_encoder_attention_mask": mask.long(),
            "num_frames": frames, "height": height, "width": width, "audio_num_frames": 5,
        }  # fmt: skip

    def out(self, output):
        return torch.cat([x.flatten(1) for x in output[:2]], 1)

    def text_of(self, tokens, seed):
        return tuple(random(1, tokens, c, seed=seed + 10 * c) for c in self.channels)

    def own_text(self):
        _, mask = super().own_text()
        return tuple(self.inputs[name] for name in self.texts), mask

    def too_narrow(self, text):
        return tuple(x[..., :-1] for x in text)

    def expected(self, rule, negatives, **changes):
        return parts.guided_by_cross_attention(self, rule, negatives, **changes)


class LTX23(LTX2):
    config = LTX2.config | LTX2_VERSIONS["2.3"]
    channels = (32, 16)


class LTX25(LTX23):
    config = LTX2.config | LTX2_VERSIONS["2.5"]


CASES = {
    "qwen": Qwen,
    "qwen-edit": QwenEdit,
    "qwen-layered": QwenLayered,
    "z-image": ZImage,
    "flux2": Flux2,
    "klein": Klein,
    "krea2": Krea2,
    "cogvideox": CogVideoX,
    "cogview4": CogView4,
    "ltx2": LTX2,
    "ltx2.3": LTX23,
    "ltx2.5": LTX25,
}
CASES = {name: case for name, case in CASES.items() if hasattr(diffusers, case.cls)}
LTX2_OPTIONS = inspect.signature(getattr(diffusers, LTX2.cls, object).__init__).parameters
if "use_prompt_adaln_single" not in LTX2_OPTIONS:
    CASES.pop("ltx2.5", None)
if not MASKS_TEXT:
    # Edit 2511 and Layered came with it
    CASES = {
        name: case for name, case in CASES.items() if name not in ("qwen-edit", "qwen-layered")
    }
