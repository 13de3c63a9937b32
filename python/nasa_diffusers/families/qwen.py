"""Qwen-Image, Edit and Layered: Qwen2.5-VL text beside the image in 60 blocks of two streams.

The text's projections act token by token. Text positions begin after the largest position of the
image and are counted, so a negative prompt takes those of the prompt, and a longer one goes on
from there. Classifier-free guidance (`true_cfg_scale`) is two calls; the one with the pipeline's
own negative prompt is left alone. In Edit the tokens of the images that are edited stand behind
those of the image that is made, which alone is guided; in Layered all layers are made, and the
image that they are taken from stands behind them.

A negative prompt of Edit is encoded without the images: it says what is not wanted, whatever the
images show.
"""

import inspect

import torch
from diffusers.models.transformers import transformer_qwenimage as qwen

from nasa_diffusers.alpha import Targets
from nasa_diffusers.families.base import ImageTokens, config
from nasa_diffusers.families.side import SideStream, complex_rotation
from nasa_diffusers.side import Layout

# before diffusers 0.37 the lengths of the texts were a list, and their mask was not looked at
COUNTS_ONE_LENGTH = "max_txt_seq_len" in inspect.signature(qwen.QwenEmbedRope.forward).parameters
MASKS_TEXT = hasattr(qwen, "compute_text_seq_len_from_mask")


IMAGE_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")


def tokens_of(shape: tuple[int, int, int]) -> int:
    frames, height, width = shape
    return frames * height * width


class QwenTokens(ImageTokens):
    """Said by `img_shapes`: of each image in the batch, the image that is made and those beside."""

    def __init__(self, family, denoiser):
        super().__init__(family, denoiser)
        # of a call's shapes the targets: the same object for the same shapes
        self._targets: dict[tuple, Targets] = {}

    def shapes(self, inputs):
        shapes = inputs["img_shapes"]
        first = shapes[0] if isinstance(shapes, list) else shapes
        return [tuple(shape) for shape in (first if isinstance(first, list) else [first])]

    def made(self, inputs):
        """How many of the shapes are of images that are made."""
        shapes = self.shapes(inputs)
        if config(self.denoiser, "use_layer3d_rope"):
            return len(shapes) - 1
        return 1

    def grids(self, sample, inputs):
        frames, height, width = self.shapes(inputs)[0]
        return ((frames * self.made(inputs), height, width),)

    def padding(self, sample, inputs):
        return sum(tokens_of(shape) for shape in self.shapes(inputs)[self.made(inputs) :])

    def targets(self, inputs):
        shapes, device = self.shapes(inputs), inputs["hidden_states"].device
        own = sum(tokens_of(shape) for shape in shapes[: self.made(inputs)])
        total = sum(map(tokens_of, shapes))
        if own == total or device.type == "meta":
            return None
        key = own, total, device
        if key not in self._targets:
            # another thread may do the same: both make the same
            self._targets = {key: Targets(torch.arange(total, device=device) < own)}
        return self._targets[key]


class QwenImage(SideStream):
    name = "Qwen-Image"
    denoisers = ("QwenImageTransformer2DModel",)
    doubles_batch = False
    masks_text = True
    text_parts = ("text_encoder", "tokenizer")
    text_options = ("max_sequence_length",)
    processors = (qwen.QwenDoubleStreamAttnProcessor2_0,)
    block_lists = (("transformer_blocks", Layout(text="encoder_hidden_states")),)
    reads = ("img_shapes",)

    def default_nag(self, denoiser):
        """No published code has it: the NAG paper's for FLUX.1, which it is built like."""
        return 5.0, 2.5, 0.25

    def encode(self, pipe, prompts, **options):
        embeds, mask = super().encode(pipe, prompts, **options)
        # those that stand for an image in the template of Edit
        template = getattr(pipe, "prompt_template_encode", "")
        own = sum(template.count(token) for token in IMAGE_TOKENS)
        return embeds[:, own:], None if mask is None else mask[:, own:]

    def image_tokens(self, denoiser):
        return QwenTokens(self, denoiser)

    def prepare(self, denoiser, side, term):
        return denoiser.txt_in(denoiser.txt_norm(term.text)), term.mask

    def arrange(self, denoiser, side, rope):
        image, text = rope
        longest = max(side.lengths)
        if longest > text.shape[0]:
            shapes, device = side.inputs["img_shapes"], image.device
            if COUNTS_ONE_LENGTH:
                _, text = denoiser.pos_embed(shapes, max_txt_seq_len=longest, device=device)
            else:
                _, text = denoiser.pos_embed(shapes, [longest], device=device)
        if text.shape[0] < longest:
            raise ValueError(
                f"nasa_diffusers: the negative prompt has {longest} tokens, and this model has no "
                f"positions for more than {text.shape[0]} beside this image; shorten it"
            )
        return torch.cat([image, *(text[:n] for n in side.lengths)])

    def rotate(self, x, rope):
        return complex_rotation(x, rope)

    def text_mask(self, side, options):
        mask = options.get("encoder_hidden_states_mask")
        return mask.bool() if MASKS_TEXT and mask is not None else None

    def text_layers(self, block):
        return (
            "attn.add_q_proj",
            "attn.add_k_proj",
            "attn.add_v_proj",
            "attn.to_add_out",
            "txt_mlp",
        )
