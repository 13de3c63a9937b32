"""The small FLUX.1 and SD3 pipelines, one call of their denoisers, and the oracle of each."""

import streams
import torch
from nasa_diffusers import NAG, NASA, VSF, ProjectedNASA, testing

RULES = ("nasa-cross", "nasa-text", "nasa", "vsf", "projected")
SIZE = {"height": 32, "width": 48, "max_sequence_length": 16}


class Case:
    """A pipeline, the inputs of one call of its transformer, and who else can compute it."""

    def __init__(self, pipe, oracle, **inputs):
        self.pipe, self.model, self.oracle = pipe, pipe.transformer, oracle
        self.inputs = inputs

    def __call__(self, **changes):
        return self.model(**self.inputs | changes, return_dict=False)[0]

    def expected(self, rule, negatives, **changes):
        """What two full text streams give; `negatives` are (embeds, alpha, mask)."""
        return self.oracle(self.model, rule, negatives, **self.inputs | changes)[0]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flux(dev=False, rows=2, tokens=7):
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    ids = torch.stack([torch.zeros(4, 6), y, x], -1).flatten(0, 1)
    inputs = {
        "hidden_states": random(rows, 24, 16, seed=1),
        "encoder_hidden_states": random(rows, tokens, 32, seed=2),
        "pooled_projections": random(rows, 32, seed=3),
        "timestep": torch.full((rows,), 0.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(tokens, 3),
    }
    if dev:
        inputs["guidance"] = torch.full((rows,), 3.5)
    return Case(testing.flux(dev=dev), streams.flux, **inputs)


def sd3(medium=False, rows=2, tokens=7):
    return Case(
        testing.stable_diffusion_3(medium=medium),
        streams.sd3,
        # latents of which no row equals another: not a doubled batch
        hidden_states=random(rows, 4, 8, 12, seed=1),
        encoder_hidden_states=random(rows, tokens, 32, seed=2),
        pooled_projections=random(rows, 32, seed=3),
        timestep=torch.full((rows,), 500.0),
    )


def negative(tokens=9, seed=4):
    return random(1, tokens, 32, seed=seed)


CASES = {
    "flux-schnell": flux,
    "flux-dev": lambda **sizes: flux(dev=True, **sizes),
    "sd3": sd3,
    "sd3.5-medium": lambda **sizes: sd3(medium=True, **sizes),
}
# one of each family, where the models of a family cannot differ
ONE_EACH = ("flux-schnell", "sd3.5-medium")
STRONG = NAG(scale=20.0, tau=2.0, alpha=0.5)


def by_rule(rule, alpha=None):
    """The method that an oracle's rule stands for."""
    others = {"vsf": VSF, "projected": ProjectedNASA}
    return others[rule](alpha) if rule in others else NASA(alpha, rule)


def gradients(case):
    """By name, of the mean square of a call."""
    case().square().mean().backward()
    found = {name: p.grad for name, p in case.model.named_parameters() if p.grad is not None}
    case.model.zero_grad()
    return found
