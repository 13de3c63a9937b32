"""The prompts of the evaluation, each with what must not be in its images.

No prompt fixes what its negative names: of the images it is true of, some show that and some do
not.
"""

from __future__ import annotations

from nasa_distill.world.kinds import LARGE, SMALL, World

Pairs = tuple[tuple[str, str], ...]
PAIRS: Pairs = (
    ("a photo of a shape", "red"),
    ("a photo of a circle", "red"),
    ("a photo of a shape on a white background", "circle"),
    ("a photo of a red shape", "circle"),
    ("a photo of a blue square", "striped"),
    ("a photo of a shape", "striped"),
    ("a photo of a red circle", "large"),
    ("a photo of a green triangle", "black"),
    ("a photo of a shape", "blurry"),
    ("a photo of a red circle", "watermarked"),
    ("a photo of a yellow shape", "blurry, watermarked"),
)
# written down before anything was drawn for them, and after the rules were chosen on the others
HELD_OUT: Pairs = (
    ("a photo of a square", "blue"),
    ("a photo of a triangle", "green, yellow"),
    ("a photo of a large shape", "solid"),
    ("a photo of a yellow shape on a black background", "triangle"),
    ("a photo of a blue circle", "small"),
    ("a photo of a striped shape", "white"),
    ("a photo of a green shape", "square"),
    ("a clean photo of a shape", "yellow"),
    ("a photo of a large red shape", "circle, triangle"),
    ("a photo of a red striped square on a white background", "blurry"),
    ("a photo of a small shape", "red, circle"),
)
# both lists of the larger world were written down before it had a model
LARGE_PAIRS: Pairs = (
    ("a photo of a shape", "red"),
    ("a photo of a triangle", "circle"),
    ("a photo of a circle and a shape", "square"),
    ("a photo of a green square and a shape", "red"),
    ("a photo of a shape on a white background", "circle"),
    ("a photo of a shape", "text"),
    ("a photo of a red circle", "framed"),
    ("a photo of a blue square", "striped"),
    ("a photo of a shape and a shape", "blurry"),
    ("a photo of a large circle", "watermarked, text"),
    ("a photo of a yellow shape", "pair"),
)
LARGE_HELD_OUT: Pairs = (
    ("a photo of a square", "green, yellow"),
    ("a photo of a blue triangle", "circle, square"),
    ("a photo of a red circle and a shape", "triangle"),
    ("a photo of a shape on a black background", "framed, blurry"),
    ("a clean photo of a shape", "red circle"),
    ("a photo of a single shape", "solid"),
    ("a photo of a green circle and a shape", "large"),
    ("a photo of a striped shape", "white"),
    ("a framed photo of a square", "text, watermarked"),
    ("a photo of a small yellow shape", "watermarked"),
    ("a photo of a triangle and a shape", "blue, yellow"),
)
NAMES = ("first", "held-out")
LISTS: dict[str, dict[str, Pairs]] = {
    SMALL.name: dict(zip(NAMES, (PAIRS, HELD_OUT), strict=True)),
    LARGE.name: dict(zip(NAMES, (LARGE_PAIRS, LARGE_HELD_OUT), strict=True)),
}


def pairs_of(world: World, name: str) -> Pairs:
    """A list by its name.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in NAMES:
        raise ValueError(f"prompts.pairs_of: pairs must be one of {', '.join(NAMES)}, got {name!r}")
    return LISTS[world.name][name]
