"""The order of branches in the batches of diffusers' own pipelines.

Values say which rows carry the prompt; the order says it where values do not: where the prompt and
another text are the same, or where a callback has rewritten them.
"""

from __future__ import annotations

from collections.abc import Callable

from nasa_diffusers.caller import Caller

# of branches in a batch: whether they carry the prompt
Layout = tuple[bool, ...]


def _pix2pix(caller: Caller) -> Layout:
    """[prompt, negative with the image, negative without]"""
    return True, False, False


def _prompt_first(caller: Caller) -> Layout:
    """[prompt, negative]"""
    return True, False


def _semantic(caller: Caller) -> Layout:
    """[negative, prompt, each edit]"""
    return False, True, *[False] * caller.variables.get("enabled_editing_prompts", 0)


def _safe(caller: Caller) -> Layout:
    """[negative, prompt, safety concept]"""
    return (False, True, False) if caller.variables.get("enable_safety_guidance") else (False, True)


# under classifier-free guidance; all others: [negative, prompt]
LAYOUTS: dict[str, Callable[[Caller], Layout]] = {
    "LuminaPipeline": _prompt_first,
    "StableDiffusionInstructPix2PixPipeline": _pix2pix,
    "StableDiffusionXLInstructPix2PixPipeline": _pix2pix,
    "SemanticStableDiffusionPipeline": _semantic,
    "StableDiffusionPipelineSafe": _safe,
}
# their edits are directions from the unconditional branch; no row has the prompt of the image
WITHOUT_PROMPT = ("LEditsPPPipelineStableDiffusion", "LEditsPPPipelineStableDiffusionXL")


def layout_of(caller: Caller, is_doubled: bool) -> Layout | None:
    """The branches in what the pipeline holds as its prompt; None where that is not known."""
    if caller.is_modular or caller.is_stock and not is_doubled:
        # a call of the denoiser for each branch
        return (True,)
    if not caller.is_stock:
        return None
    if caller.perturbs_attention:
        # the perturbed rows carry the prompt as well
        return (False, True, True) if caller.uses_cfg else (True, True)
    if caller.uses_cfg is None:
        return None
    if not caller.uses_cfg:
        return (True,)
    for name, layout in LAYOUTS.items():
        if caller.is_a((name,)):
            return layout(caller)
    return False, True
