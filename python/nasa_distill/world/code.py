"""The latent code: 4x4 patches of pixels as 16 numbers, in a diffusers autoencoder.

The code is fixed and linear: a principal component analysis of the world's patches. Autoencoders
of diffusers are not linear, and enlarge by repeating pixels. So the weights of an `AutoencoderTiny`
(the class of TAESD) are set by hand to compute this code exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from torch.nn import functional as F

from nasa_distill.world.scene import SIZE, renders

PATCH = 4
CHANNELS = 16
GRID = SIZE // PATCH
# 1: all components have the same variance; 0: the variance they have in the image
WHITENING = 0.5
# the decoder first maps x to 3 tanh(x / 3). Codes reach 7; divided by 32 they change by 0.2 percent
SCALING = 32.0


class PatchCode:
    """`encode` and `decode` between `[b, 3, 32, 32]` and `[b, 16, 8, 8]`, variance 1 on average."""

    def __init__(self) -> None:
        images, rates = renders()
        patches = _patches(images).flatten(0, 2).double()
        weight = (rates / GRID**2).repeat_interleave(GRID**2)[:, None]
        mean = (weight * patches).sum(0)
        centred = patches - mean
        variance, axes = torch.linalg.eigh(centred.T @ (weight * centred))
        variance, axes = variance.flip(0)[:CHANNELS], axes.flip(1)[:, :CHANNELS]
        # an eigenvector has no sign of its own: its largest entry is positive
        axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
        size = variance ** (WHITENING / 2)
        size = size * (variance / size**2).mean().sqrt()
        self.mean = mean.float()
        self.analysis = (axes / size).float()
        self.synthesis = (axes * size).T.float()

    def encode(self, images: Tensor) -> Tensor:
        return ((_patches(images) - self.mean) @ self.analysis).permute(0, 3, 1, 2).contiguous()

    @property
    def vae(self) -> Any:
        return make_autoencoder()

    def decode(self, codes: Tensor) -> Tensor:
        patches = codes.permute(0, 2, 3, 1) @ self.synthesis + self.mean
        return F.pixel_shuffle(patches.permute(0, 3, 1, 2), PATCH)


def _patches(images: Tensor) -> Tensor:
    """`[b, 3, 32, 32]` to `[b, 8, 8, 48]`."""
    return F.pixel_unshuffle(images, PATCH).permute(0, 2, 3, 1)


@torch.no_grad()
def make_autoencoder() -> AutoencoderTiny:
    """An `AutoencoderTiny` that encodes and decodes as `PatchCode` does; nothing is trained.

    The decoder has to know where in its patch a pixel is. Zero padding marks the border, from which
    three blocks count the patches, even and odd. In an enlarged row of parities a pixel whose left
    neighbour differs is the first of its patch (or half), so two enlargements give two bits for x
    and two for y. The last block makes every pixel of the patch from its code and lets one pass.
    """
    code = PatchCode()
    model: Any = AutoencoderTiny(
        encoder_block_out_channels=(3 * PATCH**2,) * 3,
        decoder_block_out_channels=(WIDTH,) * 3,
        num_encoder_blocks=(0, 0, 0),
        num_decoder_blocks=(3, 1, 1),
        latent_channels=CHANNELS,
        scaling_factor=SCALING,
    )
    for parameter in model.parameters():
        parameter.zero_()
    _set_encoder(model.encoder.layers, code)
    _set_decoder(model.decoder.layers, code)
    return model.eval().requires_grad_(False)


WIDTH = 64
LIFT = 0.5  # added to a code, so that it is positive and passes ReLU
SHUT = 8.0  # subtracted per bit that does not match; pixels are below it
# channels of the decoder behind the code's, four for each axis: parity of the patch column and row
X, Y = 16, 20
AXES = ((X, (0, -1)), (Y, (-1, 0)))  # with the neighbour before, as (dy, dx)


def _set_encoder(layers: Any, code: PatchCode) -> None:
    first, halve, quarter, last = layers
    for c in range(3):
        first.weight[c, c, 1, 1] = 1
        for dy in range(2):
            for dx in range(2):
                # pixel_unshuffle by 2, twice; its order is channel, row, column
                halve.weight[4 * c + 2 * dy + dx, c, 1 + dy, 1 + dx] = 1
                for half in range(4):
                    to = 16 * c + 4 * half + 2 * dy + dx
                    quarter.weight[to, 4 * c + half, 1 + dy, 1 + dx] = 1
    order = _pixel_order()
    # the encoder is given pixels in [0, 1]
    last.weight[:, order, 1, 1] = 2 * code.analysis.T / SCALING
    last.bias.copy_(-(1 + code.mean) @ code.analysis / SCALING)


def _pixel_order() -> list[int]:
    """For each entry of a patch (channel, y, x), the encoder's channel that holds it."""
    return [
        16 * c + 4 * (2 * (y % 2) + x % 2) + 2 * (y // 2) + x // 2
        for c in range(3)
        for y in range(PATCH)
        for x in range(PATCH)
    ]


def _set_decoder(layers: Any, code: PatchCode) -> None:
    read, _, *counters, _, widen, halves, _, widen_again, pixels, write = layers
    for c in range(CHANNELS):
        read.weight[c, c, 1, 1] = 1
        read.bias[c] = LIFT
    for layer in (widen, widen_again):
        for channel in (*range(CHANNELS), X, X + 1, Y, Y + 1):
            layer.weight[channel, channel, 1, 1] = 1
    for axis, _ in AXES:
        read.bias[axis] = 1
        for channel in (axis, axis + 1):
            widen.weight[channel] = 0
        widen.weight[axis, axis + len(counters), 1, 1] = 1
    for turn, block in enumerate(counters):
        _count(block, turn)
    _mark_first(halves)
    _make_pixels(pixels, write, code)


def _convolutions(block: Any) -> list[Any]:
    return [layer for layer in block.conv if isinstance(layer, nn.Conv2d)]


def _count(block: Any, turn: int) -> None:
    """Three times `parity = relu(1 - parity of the patch before)`: 1, 0, 1, 0, ... from the border.

    A block adds its input to its output, so each leaves its result in a fresh channel.
    """
    first, second, third = _convolutions(block)
    for axis, (dy, dx) in AXES:
        steps = ((first, axis + turn, axis), (second, axis, axis), (third, axis, axis + turn + 1))
        for layer, source, target in steps:
            layer.weight[target, source, 1 + dy, 1 + dx] = -1
            layer.bias[target] = 1


def _mark_first(block: Any) -> None:
    """Where the value before differs from this one: 1 for the first of a pair, else 0."""
    differ, join, add = _convolutions(block)
    for axis, (dy, dx) in AXES:
        for channel, sign in ((axis, 1), (axis + 1, -1)):
            differ.weight[channel, axis, 1, 1] = sign
            differ.weight[channel, axis, 1 + dy, 1 + dx] = -sign
            join.weight[axis, channel, 1, 1] = 1
        # into the second channel: the first keeps the parity, which the block adds by itself
        add.weight[axis + 1, axis, 1, 1] = 1


def _make_pixels(block: Any, write: Any, code: PatchCode) -> None:
    """All 48 values of a patch in every pixel, of which the pixel's own three stay open."""
    differ, join, gate = _convolutions(block)
    for c in range(CHANNELS):
        for layer in (differ, join):
            layer.weight[c, c, 1, 1] = 1
    for axis, (dy, dx) in AXES:
        # half: axis + 1; the first of each pair of pixels: made from it as `_mark_first` does
        for channel, sign in ((axis + 8, 1), (axis + 9, -1)):
            differ.weight[channel, axis + 1, 1, 1] = sign
            differ.weight[channel, axis + 1, 1 + dy, 1 + dx] = -sign
            join.weight[axis + 8, channel, 1, 1] = 1
        for layer in (differ, join):
            for channel in (axis, axis + 1):
                layer.weight[channel, channel, 1, 1] = 1
    # [16, 3, 4, 4] and [3, 4, 4], of pixels in [0, 1]
    synthesis = code.synthesis.view(CHANNELS, 3, PATCH, PATCH) * SCALING / 2
    mean = (code.mean.view(3, PATCH, PATCH) + 1) / 2
    for index in range(3 * PATCH**2):
        c, y, x = index // PATCH**2, index // PATCH % PATCH, index % PATCH
        channel = CHANNELS + index
        gate.weight[channel, :CHANNELS, 1, 1] = synthesis[:, c, y, x]
        gate.bias[channel] = mean[c, y, x] - LIFT * synthesis[:, c, y, x].sum() + SHUT / 2
        for axis, position in ((X, x), (Y, y)):
            for bit, is_first in ((axis + 1, position < 2), (axis + 8, position % 2 == 0)):
                # shut where the bit is not the pixel's
                gate.weight[channel, bit, 1, 1] += SHUT if is_first else -SHUT
                gate.bias[channel] -= SHUT if is_first else 0
        write.weight[c, channel, 1, 1] = 1
    for axis, _ in AXES:
        for channel in (axis, axis + 1):
            gate.weight[channel, channel, 1, 1] -= 1  # the block adds its input
    write.bias.fill_(-SHUT / 2)
