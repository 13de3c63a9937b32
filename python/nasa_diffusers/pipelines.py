"""Which pipelines of the installed diffusers take a negative prompt: `rows()` walks all of them.

A pipeline is told from its class: the denoiser that its constructor asks for has a family, or has
none. Pipelines in which something else decides stand in the tables here. The tests run a small
pipeline of every class that works, and see that every refusal is raised as it is told here.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from nasa_diffusers.families import FAMILIES, not_known
from nasa_diffusers.families.ltx2 import MEMORY_FIRST
from nasa_diffusers.families.unet import MIXES_TEXT
from nasa_diffusers.watch import DENOISERS

WORKS, CONDITION, REFUSED, NO_TEXT = "works", "works with a condition", "refused", "no text"
STATUSES = (WORKS, CONDITION, REFUSED, NO_TEXT)
# other parts that denoise
OTHER_DENOISERS = ("prior", "decoder", "prior_prior")


@dataclass(frozen=True)
class Row:
    """One exported pipeline."""

    name: str
    denoiser: str  # its class, empty where it has none
    family: str  # empty where none knows it
    status: str
    sentence: str = ""  # a condition, or why it is refused
    is_deprecated: bool = False
    is_modular: bool = False


@dataclass(frozen=True)
class Refusal:
    """Why pipelines with a denoiser that is known cannot be guided all the same."""

    sentence: str
    raised: str  # a part of the error that a user gets
    in_call: bool = True  # by the call of the pipeline; else by `enable_nasa`


EMBEDS = "give negative_prompt_embeds: it does not encode a prompt by itself"


def _processor(name: str) -> Refusal:
    return Refusal(
        f"it puts a {name} into its layers, whose computation NASA does not know",
        f"{name}, whose computation NASA does not know",
    )


_MIXES = Refusal(MIXES_TEXT, "mixes its text tokens", in_call=False)
_NO_TEXT_CALL = Refusal(
    "its denoiser is called without a text, so there is no prompt to guide", "called without a text"
)
_NO_ROW = Refusal(
    "its denoiser is called with an unconditional text and with edits; no row carries a prompt of "
    "the image",
    "no row carries a prompt of the image",
)
_IMAGE_CONTEXT = Refusal(
    "its layers attend to an image with queries of its own besides the text",
    "attend to an image with queries of its own",
    in_call=False,
)
_OMNI = Refusal(
    "its texts lie between images, in a list for each row, and are not told apart", "Omni"
)
_KEPT_KEYS = Refusal(
    "it keeps keys and values of reference images, in an attention of its own", "klein KV"
)
_CONTROL = Refusal(
    not_known("UNetControlNetXSModel"), "no family knows the denoiser UNetControlNet", in_call=False
)
# by how their names begin
REFUSALS: dict[str, Refusal] = {
    "IF": _MIXES,
    "Kandinsky": _MIXES,
    "UnCLIP": _MIXES,
    "StableDiffusionControlNetXS": _CONTROL,
    "StableDiffusionXLControlNetXS": _CONTROL,
    "Cosmos2_5_Transfer": _IMAGE_CONTEXT,
    "ZImageOmni": _OMNI,
    "Flux2KleinKV": _KEPT_KEYS,
    "LEditsPP": _NO_ROW,
    "AudioLDMPipeline": _NO_TEXT_CALL,
    "MusicLDM": _NO_TEXT_CALL,
    "StableDiffusionPix2PixZero": _processor("Pix2PixZeroAttnProcessor"),
    "StableDiffusionAttendAndExcite": _processor("AttendExciteAttnProcessor"),
    "TextToVideoZero": _processor("CrossFrameAttnProcessor2_0"),
}
CONDITIONS: dict[str, str] = {
    "BlipDiffusion": EMBEDS,
    "LDMTextToImage": EMBEDS,
    "SemanticStableDiffusion": EMBEDS,
    "StableDiffusionPipelineSafe": EMBEDS,
    "VisualCloze": EMBEDS,
    "EasyAnimateControl": "give its encode_prompt an option text_encoder_index: diffusers' own has "
    "none, and its call asks for it",
    "StableDiffusion3PAG": "with pag_scale=0: perturbed attention has processors of its own there",
}
MODULAR = "give negative_prompt_embeds: its blocks encode prompts"
MODULAR_CONDITIONS = {"Echo": f"{MODULAR}; without memory_images: it {MEMORY_FIRST}"}
# what cannot be imported without a package that is not installed, and their denoisers
BEHIND_PACKAGES = {
    "Kolors": "UNet2DConditionModel",
    "ConsisID": "ConsisIDTransformer3DModel",
}
ENGINE = "an exported engine has no layers in which a prompt could act; load the PyTorch model"
NO_BLOCKS = "what it denoises with is not told by its blocks in this diffusers"
NO_DENOISER = "it has no denoiser that attends to a text"


def rows() -> list[Row]:
    """Every exported pipeline of the installed diffusers, by name."""
    return [_row(name, kind) for name, kind in _exported()]


def totals(rows: Iterable[Row]) -> dict[str, int]:
    """How many live pipelines, deprecated and modular ones left out, have which status."""
    live = [row for row in rows if not row.is_deprecated and not row.is_modular]
    counted = Counter(row.status for row in live)
    with_text = {status: counted[status] for status in (WORKS, CONDITION, REFUSED)}
    return {"take a text": sum(with_text.values()), **with_text, NO_TEXT: counted[NO_TEXT]}


def as_markdown(rows: list[Row]) -> str:
    """The page of the documentation."""
    live = [row for row in rows if not row.is_deprecated and not row.is_modular]
    deprecated = [row for row in rows if row.is_deprecated and row.status in (WORKS, CONDITION)]
    modular = [row for row in rows if row.is_modular]
    counted = totals(rows)
    parts = [
        HEAD.format(version=diffusers.__version__),
        _table(("pipelines that", "are"), [(key, str(n)) for key, n in counted.items()]),
        "## Works\n\n" + _grouped("family", live, WORKS, lambda row: row.family),
        "## Works with a condition\n\n"
        + _grouped("condition", live, CONDITION, lambda row: row.sentence),
        "## Refused\n\nAs the error says it.\n\n"
        + _grouped("why", live, REFUSED, lambda row: row.sentence),
        "## Modular pipelines\n\n"
        + _grouped("what", modular, None, lambda row: row.sentence or row.status),
        "## Deprecated in diffusers, and work\n\n" + _names(deprecated),
        "## Without a text\n\n" + _names([row for row in rows if row.status == NO_TEXT]),
    ]
    return "\n\n".join(parts) + "\n"


def as_json(rows: list[Row]) -> dict[str, Any]:
    return {
        "diffusers": diffusers.__version__,
        "totals": totals(rows),
        "pipelines": [asdict(row) for row in rows],
    }


# ---- the page ------------------------------------------------------------------------------------

HEAD = """# Pipelines

What `python -m nasa_diffusers pipelines` says of diffusers {version}: every pipeline that it
exports. With `--json` the same for programs. Deprecated and modular pipelines are not in the
totals.

```python
from nasa_diffusers import pipelines

rows = pipelines.rows()
counted = pipelines.totals(rows)
assert {{row.status for row in rows}} <= set(pipelines.STATUSES)
```"""


def _table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    cells = [head, ("---",) * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _grouped(title: str, rows: Iterable[Row], status: str | None, key: Callable[[Row], str]) -> str:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if status in (None, row.status):
            groups.setdefault(key(row), []).append(row)
    lines = [(each, str(len(group)), _names(group)) for each, group in groups.items()]
    return _table((title, "how many", "pipelines"), lines)


def _names(rows: Iterable[Row]) -> str:
    return ", ".join(row.name.replace("Pipeline", "") for row in rows)


# ---- walking -------------------------------------------------------------------------------------


def _exported() -> Iterator[tuple[str, Any]]:
    """Names and classes; for what cannot be imported, an error or diffusers' stand-in."""
    for name in sorted(n for n in dir(diffusers) if "Pipeline" in n):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                kind = getattr(diffusers, name)
            except (ImportError, RuntimeError) as error:
                yield name, error
                continue
        if not inspect.isclass(kind) or kind in (DiffusionPipeline, _modular_base()):
            continue
        is_pipeline = issubclass(kind, DiffusionPipeline) or _is_modular(kind)
        if is_pipeline or hasattr(kind, "_backends"):
            yield name, kind


def _row(name: str, kind: Any) -> Row:
    if isinstance(kind, Exception) or hasattr(kind, "_backends"):
        return _behind_a_package(name, kind)
    if _is_modular(kind):
        denoisers = _denoisers_of_blocks(kind)
        if not denoisers:
            return Row(name, "", "", REFUSED, NO_BLOCKS, is_modular=True)
        return _judged(name, denoisers, is_modular=True)
    is_deprecated = "deprecated" in kind.__module__
    denoisers = _denoisers(kind)
    if not _takes_text(kind):
        return Row(name, _first(denoisers), "", NO_TEXT, is_deprecated=is_deprecated)
    return _judged(name, denoisers, is_deprecated)


def _judged(
    name: str, denoisers: list[str], is_deprecated: bool = False, is_modular: bool = False
) -> Row:
    # AnimateDiff's is made of one of Stable Diffusion, which its constructor takes as well
    by_name = {name: family for family in FAMILIES for name in family.denoisers}
    known = next(((d, by_name[d]) for d in reversed(denoisers) if d in by_name), None)
    denoiser, family = (_first(denoisers), "") if known is None else (known[0], known[1].name)
    status, sentence = WORKS, ""
    refusal = _by_beginning(REFUSALS, name)
    if refusal is not None and (known is not None or not denoisers):
        status, sentence, family = REFUSED, refusal.sentence, ""
    elif known is not None and known[1].missing:
        status, sentence, family = REFUSED, known[1].missing, ""
    elif known is None:
        status, sentence = REFUSED, not_known(denoiser) if denoiser else NO_DENOISER
    elif is_modular:
        status, sentence = CONDITION, _by_beginning(MODULAR_CONDITIONS, name) or MODULAR
    elif (condition := _by_beginning(CONDITIONS, name)) is not None:
        status, sentence = CONDITION, condition
    return Row(name, denoiser, family, status, sentence, is_deprecated, is_modular)


def _behind_a_package(name: str, kind: Any) -> Row:
    """A pipeline that diffusers exports and cannot import here."""
    if "Onnx" in name:
        is_deprecated = name in ("StableDiffusionOnnxPipeline",) or "Legacy" in name
        return Row(name, "OnnxRuntimeModel", "", REFUSED, ENGINE, is_deprecated)
    denoiser = _by_beginning(BEHIND_PACKAGES, name)
    packages = getattr(kind, "_backends", ["ftfy"])
    missing = "it needs " + ", ".join(p for p in packages if p not in ("torch", "transformers"))
    if denoiser is None:
        denoiser = _by_beginning({"SkyReels": "SkyReelsV2Transformer3DModel"}, name)
    if denoiser is None:
        return Row(name, "", "", NO_TEXT, missing, is_deprecated=True)
    row = _judged(name, [denoiser])
    if row.status == REFUSED:
        return row
    return Row(name, denoiser, row.family, CONDITION, missing)


def _takes_text(kind: type) -> bool:
    named = inspect.signature(kind.__call__).parameters
    return any(
        re.fullmatch(r"(\w+_)?prompt(_embeds)?", name) and not name.startswith(("negative", "num"))
        for name in named
    )


def _denoisers(kind: type) -> list[str]:
    """Class names of what a constructor asks for as its denoiser."""
    asked = inspect.signature(kind).parameters
    found: list[str] = []
    for name in (*DENOISERS, *OTHER_DENOISERS):
        if name in asked:
            found += _class_names(asked[name].annotation)
    return found


def _class_names(annotation: Any) -> list[str]:
    text = annotation.__name__ if inspect.isclass(annotation) else str(annotation)
    return [n for n in re.findall(r"[A-Za-z_0-9]+", text.replace(".", " ")) if _is_model(n)]


def _is_model(name: str) -> bool:
    return name[0].isupper() and name not in ("None", "Optional", "Union")


def _first(names: list[str]) -> str:
    return names[0] if names else ""


def _by_beginning(table: dict[str, Any], name: str) -> Any:
    return next((value for start, value in table.items() if name.startswith(start)), None)


def _modular_base() -> Any:
    return getattr(diffusers, "ModularPipeline", None)


def _is_modular(kind: Any) -> bool:
    base = _modular_base()
    return base is not None and inspect.isclass(kind) and issubclass(kind, base)


def _denoisers_of_blocks(kind: Any) -> list[str]:
    """Of a modular pipeline, whose blocks say what components they expect."""
    package = sys.modules[kind.__module__.rpartition(".")[0]]
    blocks = getattr(package, getattr(kind, "default_blocks_name", None) or "", None)
    if blocks is None:
        return []
    specs = blocks().expected_components
    found = (s for s in specs if re.fullmatch(r"(unet|transformer)(_2|_ref)?", s.name))
    return [name for spec in found for name in _class_names(spec.type_hint)]
