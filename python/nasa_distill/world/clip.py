"""The world's own CLIP. Its text tower is the text encoder of the models."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from nasa_distill.train.clip import Clip
from nasa_distill.world.fit import Settings, fit
from nasa_distill.world.kinds import SMALL, World
from nasa_distill.world.model import TEXT_WIDTH, text_config, tokenize

MEAN = STD = (0.5, 0.5, 0.5)


def make_clip(tokenizer: CLIPTokenizer, size: int) -> CLIPModel:
    """Eight by eight patches of an image, whatever its size."""
    vision = CLIPVisionConfig(
        image_size=size,
        patch_size=size // 8,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return CLIPModel(
        CLIPConfig(
            text_config=text_config(tokenizer).to_dict(),
            vision_config=vision.to_dict(),
            projection_dim=TEXT_WIDTH,
        )
    )


class Reader(nn.Module):
    """CLIP, and a head that says which values a caption names; the head is not kept."""

    def __init__(self, tokenizer: CLIPTokenizer, world: World):
        super().__init__()
        self.clip: Any = make_clip(tokenizer, world.size)
        self.named = nn.Linear(TEXT_WIDTH, world.mentioned)


def train_clip(
    settings: Settings, out: Path, tokenizer: CLIPTokenizer, world: World = SMALL
) -> Clip:
    """Train, or go on training: images with captions of their own, against those of a batch.

    The loss is CLIP's, except that a caption may be true of several images of the batch: all of
    those count as its own (supervised contrastive learning). With that loss alone shapes are
    learned late, so the end-of-text tokens must also predict what the caption named.
    """
    torch.manual_seed(settings.seed)

    def loss(model: Any, step: int, random_: torch.Generator) -> Tensor:
        rows = world.draw(settings.batch, random_)
        rng = random.Random(f"{settings.seed} {step}")
        captions, images = world.captions(rows, rng), world.images(rows)
        noise = 0.1 * torch.randn(images.shape, generator=random_)
        tokens = tokenize(tokenizer, captions)
        output = model.clip(input_ids=tokens, pixel_values=images + noise)
        # [caption, image]
        contrast = contrastive_loss(output.logits_per_text, world.matches(captions)[:, rows])
        hidden = output.text_model_output.last_hidden_state
        ends = (tokens == tokenizer.eos_token_id)[..., None]  # padding is the same token
        summary = (hidden * ends).sum(1) / ends.sum(1)
        said = F.binary_cross_entropy_with_logits(model.named(summary), world.mentions(captions))
        return contrast + 5 * said

    model = fit(Reader(tokenizer, world), loss, settings, out, "clip")
    return Clip(model.clip, tokenizer, MEAN, STD)


def contrastive_loss(logits: Tensor, match: Tensor) -> Tensor:
    """Cross-entropy to the uniform distribution over what matches, both ways round."""
    losses = []
    for scores, own in ((logits, match), (logits.T, match.T)):
        target = own / own.sum(1, keepdim=True)
        losses.append(F.cross_entropy(scores, target))
    return (losses[0] + losses[1]) / 2


def text_encoder(clip: Clip, projected: bool = False) -> Any:
    """The text tower alone, in the class that pipelines have for it, with its projection or not."""
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    encoder = kind(clip.model.config.text_config)
    own = {name.removeprefix("text_model."): name for name in encoder.state_dict()}
    tower = clip.model.text_model.state_dict()
    if projected:
        tower |= {"text_projection.weight": clip.model.text_projection.weight}
    encoder.load_state_dict({own[name]: value for name, value in tower.items()})
    return encoder.eval().requires_grad_(False)


def with_identity(encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """The same text tower with a projection that hands on what it is given."""
    projected: Any = CLIPTextModelWithProjection(encoder.config)
    weights = {name.removeprefix("text_model."): x for name, x in encoder.state_dict().items()}
    own = {name.removeprefix("text_model."): name for name in projected.state_dict()}
    identity = torch.eye(*projected.text_projection.weight.shape)
    weights["text_projection.weight"] = identity
    projected.load_state_dict({own[name]: x for name, x in weights.items()})
    return projected.eval().requires_grad_(False)
