"""The hook on the denoiser: it decides, call by call, what is guided and how."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from nasa_diffusers import side
from nasa_diffusers.alpha import Alpha, Grid, LayerAlpha, Targets
from nasa_diffusers.cache import (
    MAX_OLDER_CALLS,
    MAX_OLDER_TIMES,
    Prompts,
    TextCache,
    all_tokens,
)
from nasa_diffusers.caller import Caller, find_caller
from nasa_diffusers.chain import Watch, as_called, attach, detach
from nasa_diffusers.encoding import call_defaults, reference
from nasa_diffusers.families import Family
from nasa_diffusers.guided_text import GuidedText, Images, Prepared
from nasa_diffusers.layer import CrossAttentionHook, refuse_copy
from nasa_diffusers.lists import find_listed_rows
from nasa_diffusers.methods import Method
from nasa_diffusers.negative import Encoded, Negative
from nasa_diffusers.prompts import Term
from nasa_diffusers.rows import Cfg, RowFinder, Rows
from nasa_diffusers.watch import PipelineWatch
from nasa_diffusers.weights import Fingerprint
from nasa_diffusers.window import Window

# hooks of diffusers that change weights for the time of a forward pass
MOVING = ("group_offloading", "layerwise_casting")
MAX_ALPHAS = 16


@dataclass(frozen=True, eq=False)
class Settings:
    """Everything a call reads. Replaced as a whole, so a call in progress keeps what it saw."""

    negative: Negative
    method: Method  # its defaults filled in
    alpha: Alpha  # of the method, as it was read
    alpha_is_default: bool
    window: Window
    backend: str | None
    cfg: Cfg


class Batch(NamedTuple):
    """The rows of a call, and where their image tokens lie."""

    rows: Rows
    device: torch.device
    grids: tuple[Grid, ...]  # for a map over the image
    targets: Targets | None  # where reference images stand beside it
    padding: int = 0  # tokens that follow those of a grid
    leading: int = 0  # and tokens before them


class LastText(NamedTuple):
    """The text of the last guided call, and the negative prompt that went with it."""

    text: Callable[[], Tensor | None]
    negative: Negative
    options: dict[str, Any]
    terms: tuple[Encoded, ...]


class Guidance:
    """A forward-pre-hook on one denoiser, and the hooks on its layers.

    Runs outside compiled code: a compiled denoiser receives its result as one more argument.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        denoiser: nn.Module,
        family: Family,
        settings: Settings,
        guided: dict[str, bool],
        cache: TextCache,
    ):
        self.denoiser, self.family = denoiser, family
        # not held: a pipeline that is deleted takes its text encoders with it
        self._pipe = reference(pipe)
        self.settings = settings
        self.cache = cache
        self.image_tokens = family.image_tokens(denoiser)
        self.find_rows = RowFinder(family.doubles_batch)
        # of the class: a hook on the denoiser may hide the signature of its own forward
        self.parameters = list(inspect.signature(type(denoiser).forward).parameters)[1:]
        self.alphas: dict[tuple, LayerAlpha] = {}
        self.last: LastText | None = None
        self.last_step: tuple[Callable[[], Any], Any] = (lambda: None, None)
        self.layers = {
            name: (attn, family.layer_hook(denoiser, name, cache, guided[name]))
            for name, attn in family.layers(denoiser)
        }
        self.text_hooks = family.text_hooks(denoiser, cache)
        self.block_hooks = family.block_hooks(denoiser, guided)
        self.path_to_layers = _path_to(denoiser, self.layers)
        self.watch = Watch(
            {
                name: modules
                for name, modules in family.hooked_modules(denoiser).items()
                if guided[name] or self.block_hooks
            }
        )
        # the last call had the negative prompts in its text, though it may not have been guided
        self.carries = False
        # a sentence, once a pipeline has run another denoiser in place of this one
        self.lost: str | None = None
        self._handles: list[Any] = []

    @property
    def guided_layers(self) -> dict[str, CrossAttentionHook]:
        return {name: hook for name, (_, hook) in self.layers.items() if hook.guided}

    def attach(self) -> None:
        for attn, hook in self.layers.values():
            attach(attn, hook)
        for module, hook in (*self.text_hooks, *self.block_hooks):
            attach(module, hook)
        own = self.denoiser.register_forward_pre_hook(self, with_kwargs=True)
        self._handles = [own, *PipelineWatch(self).attach(self.pipe)]
        if self.family.is_beside:
            self._handles.append(self.denoiser.register_forward_hook(side.end, always_call=True))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        for attn, _ in self.layers.values():
            detach(attn)
        for module, _ in (*self.text_hooks, *self.block_hooks):
            detach(module)
        self.cache.clear()

    __deepcopy__ = refuse_copy

    @torch.compiler.disable
    def __call__(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]):
        """Put a `GuidedText` in place of the text; None leaves the stock call as it is."""
        if self.family.is_beside:
            side.end()
        self.lost = None
        settings, caller = self.settings, find_caller()
        begins = self._begins(caller)
        if begins:
            # guided or not: weights may have changed in ways that nothing counts
            self.last = None
        if settings.alpha.is_zero and not self.carries:
            return None
        is_guided = not settings.alpha.is_zero and self._is_guided_step(caller, settings.window)
        self.carries = self._carries(caller, settings, begins)
        if not is_guided and not self.carries:
            return None
        kwargs = dict(zip(self.parameters, args, strict=False)) | kwargs
        given, samples = kwargs[self.family.text_argument], kwargs[self.parameters[0]]
        text, sample = self.family.as_text(given), self.family.as_sample(samples)
        if isinstance(given, Tensor):
            rows = self.find_rows(given, sample, caller, settings.cfg)
        else:
            rows = find_listed_rows(given, samples, caller, settings.cfg)
        if not any(rows.guided):
            return None
        self.family.check_call(denoiser, kwargs)
        key = given if isinstance(given, Tensor) else given[0]
        terms, afresh = self._current_terms(settings, key, caller)
        guided = self._guided_text(settings, terms, text, sample, kwargs, rows, afresh)
        if guided.prompts is not None:
            guided = replace(guided, images=self._images(kwargs, afresh))
            if self._is_compiled(caller) and self._can_prepare(kwargs):
                guided = self._prepare(guided)
        kwargs |= self.family.carry(denoiser, guided, kwargs, is_guided)
        self.watch.begin(denoiser, kwargs[self.family.text_argument], guided.reached)
        return as_called(self.parameters, args, kwargs)

    def _begins(self, caller: Caller | None) -> bool:
        """True when a run of a pipeline has begun since the last call, in whichever step: a
        denoiser may be the one for later steps only."""
        if caller is None:
            return False
        timesteps, step = caller.variables.get("timesteps"), caller.variables.get("i")
        last_timesteps, last_step = self.last_step
        self.last_step = reference(timesteps), step
        is_back = isinstance(step, int) and isinstance(last_step, int) and step < last_step
        return caller.begins or is_back or last_timesteps() is not timesteps

    def _carries(self, caller: Caller | None, settings: Settings, begins: bool) -> bool:
        """Whether the negative prompts go along in steps that are not guided, too: a cache keeps
        text, whose tokens must be as many from the first step of a run to its last."""
        if not self.family.keeps_text(self.denoiser):
            return False
        if settings.alpha.is_zero:
            # set within a run
            return not begins
        if caller is not None and caller.variables.get("i") and not self.carries:
            raise RuntimeError(
                "nasa_diffusers: a cache on the blocks of this transformer keeps the text of the "
                "steps before, which had no negative prompt; say from which step it acts with "
                "enable_nasa(..., start=...), or set alpha before the pipeline is called"
            )
        return True

    def _is_guided_step(self, caller: Caller | None, window: Window) -> bool:
        if window.is_everything:
            return True
        if caller is None:
            raise RuntimeError(
                "nasa_diffusers: start and stop are read from the pipeline that calls the "
                "denoiser, and none does; in a loop of your own set handle.alpha to 0 where the "
                "negative prompt must not act"
            )
        return window.holds(*caller.step)

    def _guided_text(
        self,
        settings: Settings,
        negatives: tuple[Encoded, ...],
        text: Tensor,
        sample: Tensor,
        inputs: dict[str, Any],
        rows: Rows,
        afresh: bool,
    ) -> GuidedText:
        placed = [term.rows(text, rows) for term in negatives]
        channels = self.family.channels(text, inputs)
        for embeds, _ in placed:
            if embeds.shape[2] != channels:
                raise ValueError(
                    f"nasa_diffusers: the negative prompt has {embeds.shape[2]} channels, the "
                    f"prompt has {channels}; encode both with the encoders of this pipeline"
                )
        prompts_seen = None
        if not torch.is_grad_enabled():
            prompts_seen = self._recognise(text, placed, inputs, afresh)
        grids: tuple[Grid, ...] = ()
        padding = leading = 0
        if settings.alpha.region is not None:
            grids = self.image_tokens.grids(sample, inputs)
            padding = self.image_tokens.padding(sample, inputs)
            leading = self.image_tokens.leading(sample, inputs)
        targets = self.image_tokens.targets(inputs)
        if targets is not None:
            settings.method.check_references()
        batch = Batch(rows, sample.device, grids, targets, padding, leading)
        alphas = (self._alpha(settings.alpha, term.weight, batch) for term in negatives)
        terms = tuple(
            Term(embeds, mask, alpha) for (embeds, mask), alpha in zip(placed, alphas, strict=True)
        )
        return GuidedText(text, terms, settings.method, settings.backend, prompts_seen)

    def _recognise(
        self,
        text: Tensor,
        placed: list[tuple[Tensor, Tensor | None]],
        inputs: dict[str, Any],
        afresh: bool,
    ) -> Prompts | None:
        """Where keys and values of these prompts are kept."""
        negatives = [embeds for embeds, _ in placed]
        if not self.family.is_beside:
            lengths = [
                self.family.folded_length if mask is None else all_tokens
                for mask in (None, *(mask for _, mask in placed))
            ]
            return self.cache.recognise([text, *negatives], lengths, afresh=afresh)
        others = self.family.kept_with(self.denoiser, inputs)
        if others is None:
            return None
        # what changes more often first: it is compared first
        texts = [*others, text, *negatives]
        follows_time = self.family.follows_time(self.denoiser)
        older = MAX_OLDER_TIMES if follows_time else MAX_OLDER_CALLS
        return self.cache.recognise(
            texts, [all_tokens] * len(texts), afresh=afresh, older_calls=older
        )

    def _images(self, kwargs: dict[str, Any], afresh: bool) -> Images | None:
        """The image prompts of an IP-Adapter, or the images that go beside the text, where the
        call brings some."""
        embeds = (kwargs.get("added_cond_kwargs") or {}).get("image_embeds")
        if embeds is None:
            options = kwargs.get("joint_attention_kwargs") or {}
            embeds = options.get("ip_adapter_image_embeds")
        projection = getattr(self.denoiser, "encoder_hid_proj", None)
        beside = self.family.images_beside(self.denoiser, kwargs)
        if beside is not None:
            embeds, projection = beside
        if projection is None or not isinstance(embeds, list):
            return None
        if not embeds or not all(isinstance(x, Tensor) for x in embeds):
            return None
        prompts = self.cache.recognise(embeds, afresh=afresh)
        return Images(prompts, Fingerprint([projection]), self.cache)

    # ---- compiled denoisers ------------------------------------------------------------------

    def _is_compiled(self, caller: Caller | None) -> bool:
        """Whether layers will run as part of a graph, as far as can be seen from outside."""
        if any(module._compiled_call_impl is not None for module in self.path_to_layers):
            return True
        return any(
            isinstance(part, OptimizedModule) and part._orig_mod is self.denoiser
            for pipe in self._pipes(caller)
            for part in vars(pipe).values()
        )

    def _can_prepare(self, kwargs: dict[str, Any]) -> bool:
        """False where projections are not yet, in this hook, what they are in the forward pass:
        LoRAs that the call rescales, weights that a hook brings, or casts, with a block."""
        for name, value in kwargs.items():
            if name.endswith("attention_kwargs") and value and value.get("scale") is not None:
                return False
        if not all(isinstance(hook, CrossAttentionHook) for _, hook in self.layers.values()):
            return False
        for module in self.path_to_layers:
            registry = getattr(module, "_diffusers_hook", None)
            if registry is not None and any(map(registry.get_hook, MOVING)):
                return False
            if hasattr(module, "_hf_hook"):
                return False
        return True

    def _prepare(self, guided: GuidedText) -> GuidedText:
        """Project the text here, outside the graph, where what is kept from earlier calls can be
        looked up; the graph receives keys and values as inputs."""
        text = guided
        for module, hook in self.text_hooks:
            text = hook.project(module, text)
        keys_values = {
            name: hook.keys_values(attn, text)
            for name, (attn, hook) in self.layers.items()
            if hook.guided
        }
        for prompts in keys_values.values():
            for prompt in prompts:
                for x in prompt:
                    # a prompt of another length is other data, too
                    if x is not None:
                        torch._dynamo.maybe_mark_dynamic(x, 1)
        return replace(guided, prepared=Prepared(text.text, keys_values))

    def _current_terms(
        self, settings: Settings, text: Tensor, caller: Caller | None
    ) -> tuple[tuple[Encoded, ...], bool]:
        """The negative prompt, and whether kept projections must be compared with the values of
        prompts and weights again.

        Encoded again after a text encoder changed, or for a call with another clip_skip, say;
        that is looked for only when a prompt is new or a run begins.
        """
        pipes, names = self._pipes(caller), self.family.text_options
        options: dict[str, Any] = {}
        if caller is not None:
            options = caller.text_options(names)
        elif pipes:
            options = call_defaults(pipes[0], names)
        last = self.last
        if (
            last is not None
            and last.text() is text
            and last.negative is settings.negative
            and last.options == options
        ):
            return last.terms, False
        terms = settings.negative.current(pipes, self.family, options)
        self.last = LastText(weakref.ref(text), settings.negative, options, terms)
        return terms, True

    @property
    def is_off(self) -> bool:
        """True at alpha 0, where the stock code runs."""
        return self.settings.alpha.is_zero

    @property
    def pipe(self) -> Any:
        """The pipeline that NASA was enabled on; None when it is gone."""
        return self._pipe()

    def _pipes(self, caller: Caller | None) -> list[Any]:
        """Those that may encode text for this denoiser."""
        pipes = [self.pipe] if caller is None else [self.pipe, caller.pipe]
        return [pipe for pipe in pipes if pipe is not None]

    def _alpha(self, alpha: Alpha, weight: float, batch: Batch) -> LayerAlpha:
        """One object for all steps of the same size: its tensors are made once."""
        if alpha.is_learned:
            return _make_alpha(alpha, weight, batch)
        key = (alpha, weight, batch, torch.is_inference_mode_enabled())
        # another thread may clear it at any time
        found = self.alphas.get(key)
        if found is None:
            if len(self.alphas) >= MAX_ALPHAS:
                self.alphas.clear()
            found = self.alphas[key] = _make_alpha(alpha, weight, batch)
        return found


def _make_alpha(alpha: Alpha, weight: float, batch: Batch) -> LayerAlpha:
    values = batch.rows.spread(alpha.values.to(batch.device) * weight, "alpha")
    is_for_all = values.shape[0] == 1 and batch.rows.are_all
    # [b], always: a graph that is compiled for one alpha takes one per image as well
    values = torch.where(torch.tensor(batch.rows.guided, device=batch.device), values, 0.0)
    guided = None if is_for_all else values != 0
    values = values[:, None, None]
    if alpha.region is None:
        return LayerAlpha(values, guided=guided, targets=batch.targets)
    region = alpha.region.to(batch.device)
    return LayerAlpha(
        values, region, batch.grids, guided=guided, targets=batch.targets,
        padding=batch.padding, leading=batch.leading,
    )  # fmt: skip


def _path_to(denoiser: nn.Module, layers: Iterable[str]) -> list[nn.Module]:
    """The layers and every module that calls them, `denoiser` first."""
    parts = (name.split(".") for name in layers)
    paths = {".".join(part[:i]) for part in parts for i in range(len(part) + 1)}
    return [denoiser.get_submodule(path) for path in sorted(paths)]
