"""The world's own CLIP. Its text tower is the text encoder of the models."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig

from nasa_distill.clip import Clip
from nasa_distill.fit import Settings, fit
from nasa_distill.world.captions import OWNER, draw_caption, read
from nasa_distill.world.model import TEXT_WIDTH, text_config, tokenize
from nasa_distill.world.scene import SIZE, renders, scenes

MEAN = STD = (0.5, 0.5, 0.5)


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=8,
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


def train_clip(settings: Settings, out: Path, tokenizer: CLIPTokenizer) -> Clip:
    """Train, or go on training: images with captions of their own, against those of a batch.

    The loss is CLIP's, except that a caption may be true of several images of the batch: all of
    those count as its own (supervised contrastive learning).
    """
    torch.manual_seed(settings.seed)
    images, rates = renders()

    def loss(model: Any, step: int, random_: torch.Generator) -> Tensor:
        rows = torch.multinomial(rates, settings.batch, replacement=True, generator=random_)
        rng = random.Random(f"{settings.seed} {step}")
        captions = [draw_caption(scenes()[i], rng) for i in rows.tolist()]
        noise = 0.1 * torch.randn(images[rows].shape, generator=random_)
        output = model(input_ids=tokenize(tokenizer, captions), pixel_values=images[rows] + noise)
        # [caption, image]
        return contrastive_loss(output.logits_per_text, matches(captions)[:, rows])

    model = fit(make_clip(tokenizer), loss, settings, out, "clip", check_every=10_000)
    return Clip(model, tokenizer, MEAN, STD)


def contrastive_loss(logits: Tensor, match: Tensor) -> Tensor:
    """Cross-entropy to the uniform distribution over what matches, both ways round."""
    losses = []
    for scores, own in ((logits, match), (logits.T, match.T)):
        target = own / own.sum(1, keepdim=True)
        losses.append(F.cross_entropy(scores, target))
    return (losses[0] + losses[1]) / 2


@cache
def _truth() -> Tensor:
    """Whether each value is in each scene: `[values, scenes]`."""
    return torch.tensor(
        [[getattr(scene, OWNER[value]) == value for scene in scenes()] for value in OWNER]
    )


def matches(captions: list[str]) -> Tensor:
    """Whether each caption is true of each scene, as numbers: `[captions, scenes]`."""
    values = list(OWNER)
    rows = []
    for caption in captions:
        true = torch.ones(len(scenes()), dtype=torch.bool)
        for named in read(caption).values():
            true &= _truth()[[values.index(value) for value in named]].any(0)
        rows.append(true)
    return torch.stack(rows).float()


def text_encoder(clip: Clip) -> CLIPTextModel:
    """The text tower alone, in the class that pipelines have for it."""
    encoder = CLIPTextModel(clip.model.config.text_config)
    own = {name.removeprefix("text_model."): name for name in encoder.state_dict()}
    tower = clip.model.text_model.state_dict()
    encoder.load_state_dict({own[name]: value for name, value in tower.items()})
    return encoder.eval().requires_grad_(False)
