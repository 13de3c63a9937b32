"""The world's own T5: the text encoder of its PixArt. The encoder alone, with a tokenizer."""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from nasa_distill.world.fit import Settings, fit
from nasa_distill.world.kinds import SMALL, World
from nasa_distill.world.model import TEXT_WIDTH, tokenize

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def make_tokenizer(world: World = SMALL) -> PreTrainedTokenizerFast:
    """SentencePiece's unigrams, as T5's, in which every word of the world is one token.

    Other words fall apart into letters, for which no model of the world was trained.
    """
    space = "\N{LOWER ONE EIGHTH BLOCK}"
    # of two ways to write a word the one with the larger sum is taken
    pieces = [(piece, 0.0) for piece in (PAD, END, UNKNOWN)]
    pieces += [(space + word, -1.0) for word in world.words]
    pieces += [(letter, -10.0) for letter in string.ascii_lowercase + string.digits + ",." + space]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Metaspace(),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(f"$A {END}", special_tokens=[(END, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=world.max_tokens,
    )


def make_encoder(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    """Of T5 1.1: two layers, gated GELU, relative positions."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=TEXT_WIDTH // 4,
            d_ff=4 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )


class Reader(nn.Module):
    """The encoder, and a head that says which values a caption names; the head is not kept."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, world: World):
        super().__init__()
        self.encoder = make_encoder(tokenizer)
        self.named = nn.Linear(TEXT_WIDTH, world.mentioned)


def train(
    settings: Settings, out: Path, tokenizer: PreTrainedTokenizerFast, world: World = SMALL
) -> Any:
    """Train, or go on training; see `fit` for what it raises.

    The last token must predict what the caption named; there is no loss on the others.
    """
    torch.manual_seed(settings.seed)
    rates = world.rates().tolist()

    def loss(model: Any, step: int, random_: torch.Generator) -> Tensor:
        rng = random.Random(f"{settings.seed} {step}")
        drawn = rng.choices(range(len(rates)), rates, k=settings.batch)
        captions = [world.caption(scene, rng, 0.0) for scene in drawn]
        tokens = tokenize(tokenizer, captions)
        mask = tokens != tokenizer.pad_token_id
        hidden = model.encoder(tokens, attention_mask=mask).last_hidden_state
        closing = hidden[tokens == tokenizer.eos_token_id]
        return F.binary_cross_entropy_with_logits(model.named(closing), world.mentions(captions))

    encoder = fit(Reader(tokenizer, world), loss, settings, out, "t5").encoder
    return encoder.eval().requires_grad_(False)
