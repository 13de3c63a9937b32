"""How much of a prompt reaches a joint attention model through its pooled vector.

SD3 and FLUX.1 hear a prompt twice: as text tokens, which its attention sees and which a negative
prompt can act on, and as one vector, which modulates every block. Here a model gets the tokens of
one prompt and the vector of another, and the judge says which of the two its images follow. Then
the vector is guided as well, by the rule of the tokens.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import nasa_diffusers
import torch
from torch import Tensor
from tqdm import tqdm

from nasa_distill import tables
from nasa_distill.intervals import Share
from nasa_distill.train.networks import Model, Text, load
from nasa_distill.train.seeds import generator
from nasa_distill.world.evaluation.evaluate import (
    BATCH,
    Counts,
    call_pipeline,
    checksum,
    commit,
)
from nasa_distill.world.evaluation.prompts import pairs_of
from nasa_distill.world.kinds import LARGE, SMALL, World, world_of

# they name the same attributes, and other values; in the larger world of single objects
SMALL_SWAPS = (
    ("a photo of a red circle", "a photo of a blue square"),
    ("a photo of a small green shape", "a photo of a large yellow shape"),
    ("a photo of a striped triangle", "a photo of a solid circle"),
    ("a photo of a shape on a white background", "a photo of a shape on a black background"),
    ("a clean photo of a shape", "a blurry photo of a shape"),
    (
        "a clean photo of a large blue striped triangle on a white background",
        "a watermarked photo of a small red solid circle on a black background",
    ),
)
LARGE_SWAPS = (
    ("a photo of a single red circle", "a photo of a single blue square"),
    ("a photo of a single small green shape", "a photo of a single large yellow shape"),
    ("a photo of a single striped triangle", "a photo of a single solid circle"),
    ("a photo of a shape on a white background", "a photo of a shape on a black background"),
    ("a framed photo of a shape", "a frameless photo of a shape"),
    ("a clean photo of a shape", "a photo of a shape with text"),
    (
        "a framed photo of a single large blue striped triangle on a white background",
        "a frameless photo of a single small red solid circle on a black background",
    ),
)
SWAPS = {SMALL.name: SMALL_SWAPS, LARGE.name: LARGE_SWAPS}
STRENGTHS = (0.0, 0.5, 1.0, 2.0, 4.0)  # of the vector, beside the alpha of the tokens

# where the evaluation of a world's prompt pairs is
PAGES = {SMALL.name: "results.md", LARGE.name: "large.md"}


def swapped(model: Model, tokens: str, vector: str, steps: int, noise: Tensor, seed: int) -> Tensor:
    """Images of the tokens of one prompt under the vector of another."""
    text = model.encode([tokens])._replace(pooled=model.encode([vector]).pooled)
    return draw(model, text, steps, noise, seed)


def draw(model: Model, text: Text, steps: int, noise: Tensor, seed: int) -> Tensor:
    """By the model's own pipeline, from one encoded prompt."""
    images = []
    for number, z in enumerate(noise.split(BATCH)):
        given: dict[str, Any] = {
            "prompt_embeds": text.embeds.expand(len(z), -1, -1),
            "pooled_prompt_embeds": text.pooled.expand(len(z), -1),  # type: ignore[union-attr]
        }
        images.append(call_pipeline(model, None, steps, z, seed, number, guidance_scale=0, **given))
    return torch.cat(images)


def away(vector: Tensor, negative: Tensor, strength: float) -> Tensor:
    """A pooled vector `[1, c]` by the rule of projected NASA: as long as it was."""
    beside = negative - (negative * vector).sum(-1) / vector.square().sum(-1) * vector
    guided = vector - strength * beside
    return guided * (vector.norm(dim=-1) / guided.norm(dim=-1))


def follow(model: Model, steps: int, images: int, seed: int) -> dict[str, dict[str, int]]:
    """By attribute, of how many images whose; `same` where tokens and vector are of one prompt."""
    world = world_of(model)
    found: dict[str, dict[str, int]] = {}
    for number, swap in enumerate(tqdm(SWAPS[world.name], "swaps")):
        noise = torch.randn(images, *model.latent_shape, generator=generator(seed, number))
        for tokens, vector in (swap, swap[::-1]):
            asked, other = (owned(prompt, world) for prompt in (tokens, vector))
            plain = world.judge(swapped(model, tokens, tokens, steps, noise, seed))
            mixed = world.judge(swapped(model, tokens, vector, steps, noise, seed))
            for name, value in asked.items():
                if other[name] == value:
                    continue
                counts = found.setdefault(
                    name, dict.fromkeys(("images", "same", "tokens", "vector"), 0)
                )
                counts["images"] += images
                counts["same"] += int(plain.follows(value).sum())
                counts["tokens"] += int(mixed.follows(value).sum())
                counts["vector"] += int(mixed.follows(other[name]).sum())
    return found


def owned(prompt: str, world: World) -> dict[str, str]:
    """The value that a prompt names, by attribute."""
    return {world.owner[word]: word for word in prompt.split() if word in world.owner}


def steer(
    model: Model, steps: int, images: int, seed: int, alpha: float
) -> dict[str, dict[str, float]]:
    """The evaluation's prompt pairs, the tokens guided at alpha, and the vector as well."""
    found, pairs = {}, pairs_of(world_of(model), "first")
    for strength in tqdm(STRENGTHS, "strengths"):
        for of_tokens in sorted({0.0, alpha}):
            total = Counts()
            for number, (prompt, negative) in enumerate(pairs):
                noise = torch.randn(images, *model.latent_shape, generator=generator(seed, number))
                text, other = model.encode([prompt]), model.encode([negative])
                text = text._replace(pooled=away(text.pooled, other.pooled, strength))  # type: ignore[arg-type]
                guided: Any = contextlib.nullcontext()
                if of_tokens:
                    method = nasa_diffusers.ProjectedNASA(of_tokens)
                    guided = nasa_diffusers.nasa(
                        model.pipe, negative, method, cfg=False, **model.text_options
                    )
                with guided:
                    drawn = draw(model, text, steps, noise, seed)
                total.add(Counts.of(drawn, prompt, negative))
            found[f"tokens {of_tokens:g}, vector {strength:g}"] = {
                name: getattr(total, name) for name in ("n", "removed", "valid", "followed", "good")
            }
    return found


def run(student: Path, steps: int, images: int, seed: int, alpha: float) -> dict[str, Any]:
    """What `page` is made of.

    Raises:
        ValueError: The student is of no world, or has no pooled vector.
    """
    model = load(student)
    world = world_of(model)
    pooled = model.encode(["red"]).pooled
    if pooled is None or not pooled.any():
        raise ValueError(f"pooled.run: the model in {student} has no pooled vector")
    return {
        "about": {
            "commit": commit(),
            "seed": seed,
            "steps": steps,
            "images per prompt": images,
            "alpha of the tokens": alpha,
            "student": checksum(student),
            "world": world.name,
        },
        "follow": follow(model, steps, images, seed),
        "steer": steer(model, steps, images, seed, alpha),
    }


def page(found: dict[str, Any]) -> str:
    about = "\n".join(f"- {name}: {value}" for name, value in found["about"].items())
    rows = []
    for name, counts in found["follow"].items():
        shares = (Share(counts[x], counts["images"]) for x in ("same", "tokens", "vector"))
        rows.append((name, counts["images"], *shares))
    follow_table = tables.markdown(
        ("attribute", "images", "right, own vector", "as the tokens say", "as the vector says"),
        rows,
    )
    rows = []
    for name, counts in found["steer"].items():
        shares = (Share(counts[x], counts["n"]) for x in ("removed", "valid", "followed", "good"))
        rows.append((name, *shares))
    steer_table = tables.markdown(
        ("strengths", "removed", "valid", "followed", "all three"),
        rows,
    )
    pairs = PAGES[found["about"]["world"]]
    return TEMPLATE.format(about=about, follow=follow_table, steer=steer_table, pairs=pairs)


TEMPLATE = """# What reaches a joint attention model through its pooled vector

Made by `python -m nasa_distill pooled`, which measured every number, on the small world's
`SD3Transformer2DModel` ([the world](training.md)). In percent, with Wilson's 95 % intervals.

{about}

## Tokens of one prompt, vector of another

Two prompts that name the same attributes and other values. The model gets the tokens of one and the
vector of the other; each image is judged by attribute. `right, own vector` is the model as it is,
tokens and vector of the same prompt.

{follow}

## The vector guided as well

The prompt pairs of [the evaluation]({pairs}). The tokens are guided by `ProjectedNASA`, the
vector by the same rule, outside the attention: what the negative prompt's vector has beside the
prompt's is taken away, and the length is kept. Strength 0 leaves them as they are.

{steer}
"""


def write(found: dict[str, Any], out: Path, page_path: Path | None) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if page_path is not None:
        page_path.parent.mkdir(parents=True, exist_ok=True)
        page_path.write_text(page(found), encoding="utf-8")
