"""Calls of a denoiser that were seen in a guided pipeline, and what the eager oracles make of them.

The oracle of a family with a side stream is that of `side_cases.py`, of all others that of
`test_pipe_rows.py`; here they run on the inputs with which a pipeline called.
"""

from dataclasses import dataclass
from typing import Any

import flux_like_cases
import hunyuan_cases
import one_sequence_cases
import side_cases
import test_pipe_rows
import torch
from drawing import assert_same_image, relative_error
from nasa_diffusers import enable_nasa
from test_pipe_rows import Calls, unshared

ALPHA = 0.5
CASES = {
    case.cls: case
    for case in (
        side_cases.Qwen, side_cases.ZImage, side_cases.Flux2, side_cases.Krea2,
        side_cases.CogVideoX, side_cases.CogView4, side_cases.LTX2, *flux_like_cases.CASES.values(),
        *hunyuan_cases.CASES.values(),
        *one_sequence_cases.CASES.values(),
    )
}  # fmt: skip


@dataclass
class Seen:
    """One call, and what it returned guided and at alpha 0, `[b, ...]`."""

    model: Any
    inputs: dict
    ours: torch.Tensor
    idle: torch.Tensor

    @property
    def text(self):
        """The text of each row."""
        names = ("cap_feats", "text_bth", "encoder_hidden_states")
        return next(self.inputs[name] for name in names if name in self.inputs)

    def stock(self):
        return as_rows(self.model(**unshared(self.inputs)))

    def eager(self, negative):
        """By the oracle, all rows guided away from `negative`, `[1, n, c]`; of LTX-2 a pair."""
        case = CASES.get(type(self.model).__name__)
        if case is None:
            rows = len(self.ours)
            alpha = torch.full((rows, 1, 1, 1), ALPHA)
            if "img_ids" in self.inputs:
                # images that are edited have a time of their own
                alpha = alpha.where(self.inputs["img_ids"][:, 0].view(1, -1, 1, 1) == 0, 0.0)
            negative = negative.expand(rows, -1, -1)
            return test_pipe_rows.oracle(self.model, self.inputs, negative, alpha)
        case = case.__new__(case)
        case.model, case.rows = self.model, len(self.ours)
        case.inputs = {name: x for name, x in self.inputs.items() if name != "return_dict"}
        case.look()
        rule = case.rules[0]
        alpha = ALPHA
        if case.targets < case.image_tokens:
            alpha = over(case.leading, case.targets, case.image_tokens)
            if rule == "nasa":
                alpha = video_alone(alpha)
        elif case.made is not None and not case.made.all():
            alpha = video_alone(torch.where(case.made, ALPHA, 0.0).view(1, -1, 1, 1))
        return case.expected(rule, [(negative, alpha, None)])


class WholeCalls(Calls):
    """With all that the denoiser returns."""

    def after(self, _, __, output):
        super().after(_, __, [output])


def seen(pipe, run, negative):
    """The calls of the pipeline's denoisers in `run()`."""
    found = []

    @torch.no_grad()
    def keep(model, inputs, ours):
        handle.alpha = 0
        idle = model(**unshared(inputs))
        handle.alpha = ALPHA
        found.append(Seen(model, inputs, as_rows(ours), as_rows(idle)))

    calls = []
    for name in ("unet", "transformer", "transformer_2"):
        model = getattr(pipe, name, None)
        if model is not None:
            # before NASA, so that its hook sees the call first
            calls.append(WholeCalls(model, lambda i, o, model=model: keep(model, i, o)))
    handle = enable_nasa(pipe, negative_prompt_embeds=negative, alpha=ALPHA)
    try:
        run()
    finally:
        handle.disable()
        for each in calls:
            each.end()
    return found


@torch.no_grad()
def check(call, negative, carry):
    """Rows that carry the prompt are the oracle's, and all others stock's; at alpha 0 all are."""
    stock = call.stock()
    assert torch.equal(call.idle, stock)
    if not any(carry):
        assert torch.equal(call.ours, stock)
        return
    eager = call.eager(negative)
    for row, is_guided in enumerate(carry):
        assert_same_image(call.ours[row], (eager if is_guided else stock)[row])
        if is_guided:
            assert relative_error(eager[row], stock[row]) > 1e-3


def as_rows(output):
    """`[b, ...]`; Z-Image returns a list, LTX-2 video and sound."""
    if len(output) > 1:
        return torch.cat([x.flatten(1) for x in output], 1)
    rows = output[0]
    return torch.stack(rows) if isinstance(rows, list) else rows


def over(before, targets, tokens):
    """Alpha of so many tokens, and 0 of those before and behind them."""
    at = torch.arange(tokens)
    are = (at >= before) & (at < before + targets)
    return torch.where(are, ALPHA, 0.0).view(1, -1, 1, 1)


def video_alone(alpha):
    """Of LTX-2, whose layers of sound have other tokens."""
    return lambda tokens: alpha if tokens == alpha.shape[1] else ALPHA
