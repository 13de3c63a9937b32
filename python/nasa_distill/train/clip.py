"""A CLIP for the clamped CLIP loss: from a folder, differentiable in the image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

# of OpenAI's CLIP, for folders without a preprocessor_config.json
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Clip(nn.Module):
    """Frozen; embeddings are projected and not normalised."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, tokenizer: Any, mean=MEAN, std=STD):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.size = model.config.vision_config.image_size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    @staticmethod
    def load(path: str | Path) -> Clip:
        """A folder or hub id as transformers' `CLIPModel` saves it.

        Raises:
            ValueError: There is none.
        """
        try:
            model: Any = CLIPModel.from_pretrained(str(path))
            tokenizer = AutoTokenizer.from_pretrained(str(path))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"Clip.load: {path} holds no CLIPModel with its tokenizer ({error}); give one, or "
                "train without the CLIP loss (clip_weight 0)"
            ) from error
        try:
            processor = CLIPImageProcessor.from_pretrained(str(path))
        except OSError:
            return Clip(model, tokenizer)
        return Clip(model, tokenizer, processor.image_mean, processor.image_std)

    def images(self, images: Tensor) -> Tensor:
        """`[b, 3, height, width]` in [-1, 1] to `[b, c]`, with a gradient."""
        resized = F.interpolate(
            images.float() / 2 + 0.5,
            (self.size, self.size),
            mode="bicubic",
            antialias=images.shape[-1] != self.size,
        )
        pixels = (resized - self.mean) / self.std
        features = self.model.vision_model(pixel_values=pixels).pooler_output
        return self.model.visual_projection(features)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """`[b, c]`."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.model.config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        )
        ids = tokens.input_ids.to(self.mean.device)
        return self.model.text_projection(self.model.text_model(input_ids=ids).pooler_output)
