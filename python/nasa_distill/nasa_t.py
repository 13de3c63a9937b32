"""NASA-T: distil a one- or few-step student that has a negative prompt.

    student       x_0 = G(z, y, NASA(y-, alpha)), gradient of equation 6
    teacher       frozen, guided away from y- (equation 5)
    LoRA teacher  learns the student's distribution, and sees no y-

Every random number is a function of seed, step and process, so an interrupted run goes on with
the same command and ends with the same bits.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import LCMScheduler
from nasa_diffusers import enable_nasa
from nasa_diffusers.cli import grid
from peft import LoraConfig
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from nasa_distill import checkpoint, losses
from nasa_distill.clip import Clip
from nasa_distill.config import STAGES, Settings
from nasa_distill.fit import generator
from nasa_distill.networks import Model, Text, add_lora, check_fit, without_lora


@dataclasses.dataclass
class Draws:
    """The random part of one micro-batch."""

    prompts: list[str]
    negatives: list[str]
    z: Tensor
    alpha: Tensor  # [b], one value or 0
    kappa: Tensor  # [b, 1, 1, 1]
    random: torch.Generator

    @staticmethod
    def of(
        settings: Settings,
        prompts: Sequence[str],
        negatives: Sequence[str],
        latent: tuple[int, int, int],
        rows: int,
        random: torch.Generator,
        alpha: float,
    ) -> Draws:
        def choose(pool: Sequence[str]) -> list[str]:
            return [pool[i] for i in torch.randint(len(pool), (rows,), generator=random)]

        chosen = choose(prompts)
        against = choose(negatives) if settings.needs_negatives else []
        low, high = settings.kappa
        kappa = low + (high - low) * torch.rand(rows, generator=random)
        keep = torch.rand(rows, generator=random) >= settings.p_no_negative
        z = torch.randn(rows, *latent, generator=random)
        return Draws(chosen, against, z, alpha * keep, kappa.view(-1, 1, 1, 1), random)

    def normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.random).to(like.device)

    def timesteps(self, low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (len(self.prompts),), generator=self.random)


class Run:
    """The networks, optimisers and files of one run; `Run(...).train()` is all of it.

    Args:
        settings: See `nasa_distill.config`.
        teacher: A checkpoint's model. It gets an adapter, and is teacher and LoRA teacher in one.
        student: Another copy of it, or a one-step model of its family; it is trained in place.
        prompts, negatives: Texts to draw from, uniformly and with replacement.
        out: Folder of the log, the samples, the checkpoint, and `pipeline` at the end.
        clip: For the clamped CLIP loss; None leaves that loss out.

    Raises:
        ValueError: Empty data, networks that do not fit, or a checkpoint of another run.
    """

    def __init__(
        self,
        settings: Settings,
        teacher: Model,
        student: Model,
        prompts: Sequence[str],
        negatives: Sequence[str],
        out: Path,
        clip: Clip | None = None,
        identity: dict[str, Any] | None = None,
    ):
        check_data(prompts, negatives, settings)
        check_fit(teacher, student.denoiser)
        if teacher.denoiser is student.denoiser:
            raise ValueError("Run: teacher and student must be two copies, got one network")
        self.settings, self.out = settings, out
        self.prompts, self.negatives = list(prompts), list(negatives)
        self.teacher, self.student = teacher, student
        self.clip = clip if settings.clip_weight > 0 else None
        self.accelerator = Accelerator(mixed_precision=settings.precision)
        if self.accelerator.distributed_type not in (
            DistributedType.NO,
            DistributedType.MULTI_CPU,
            DistributedType.MULTI_GPU,
        ):
            raise ValueError(
                f"Run: {self.accelerator.distributed_type} is not supported; launch with one "
                "process or with plain data parallelism (accelerate launch --multi_gpu)"
            )
        shares = self.accelerator.num_processes * settings.accumulate
        if settings.batch % shares:
            raise ValueError(
                f"Run: batch {settings.batch} must be a multiple of processes x accumulate = "
                f"{self.accelerator.num_processes} x {settings.accumulate}"
            )
        self.rows = settings.batch // shares
        self.identity = {
            **dataclasses.asdict(settings),
            **(identity or {}),
            "processes": self.accelerator.num_processes,
        }
        self._build()
        self.start = self._resume()
        is_main = self.accelerator.is_main_process
        self.log = checkpoint.Log(out / "log.jsonl", self.start) if is_main else None

    # ---- set-up ----------------------------------------------------------------------------------

    def _build(self) -> None:
        settings, device = self.settings, self.accelerator.device
        torch.manual_seed(settings.seed)  # the adapter's first weights
        for model in (self.teacher, self.student):
            model.pipe.to(device)
            model.alphas_cumprod = model.alphas_cumprod.to(device)
        if self.clip is not None:
            self.clip.to(device)
        add_lora(
            self.teacher.denoiser,
            LoraConfig(
                r=settings.lora_rank,
                lora_alpha=settings.lora_alpha,
                target_modules=list(settings.lora_targets),
            ),
        )
        network = self.student.denoiser.requires_grad_(True).train()
        self.average = copy.deepcopy(network).requires_grad_(False) if settings.ema else None
        if settings.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        # the negative prompt travels with the call, so a recomputed block sees it again
        self.nasa = None
        if settings.student_nasa:
            null = self.student.encode([""]).embeds
            self.nasa = enable_nasa(
                self.student.pipe, negative_prompt_embeds=null, alpha=0.0, cfg=False
            )
        self.null_teacher = self.teacher.encode([""])

        self.lora_parameters = [p for p in self.teacher.denoiser.parameters() if p.requires_grad]
        decay = settings.weight_decay
        optimisers = (
            torch.optim.AdamW(network.parameters(), settings.student_rate, weight_decay=decay),
            torch.optim.AdamW(self.lora_parameters, settings.lora_rate, weight_decay=decay),
        )
        prepare = self.accelerator.prepare
        self.network, self.lora_teacher = prepare(network), prepare(self.teacher.denoiser)
        self.student_optimiser, self.lora_optimiser = (prepare(x) for x in optimisers)

    @property
    def _checkpoint(self) -> Path:
        return self.out / "state.pt"

    def _resume(self) -> int:
        state = checkpoint.load(self._checkpoint, self.identity)
        if state is None:
            return 0
        self.accelerator.unwrap_model(self.network).load_state_dict(state["student"])
        own = dict(self.teacher.denoiser.named_parameters())
        with torch.no_grad():
            for name, value in state["lora"].items():
                own[name].copy_(value)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.student_optimiser.load_state_dict(state["student_optimiser"])
        self.lora_optimiser.load_state_dict(state["lora_optimiser"])
        return state["step"]

    def _save(self, step: int) -> None:
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        lora = {n: p for n, p in self.teacher.denoiser.named_parameters() if p.requires_grad}
        state = {
            "settings": self.identity,
            "step": step,
            "student": self.accelerator.unwrap_model(self.network).state_dict(),
            "lora": {name: p.detach() for name, p in lora.items()},
            "student_optimiser": self.student_optimiser.state_dict(),
            "lora_optimiser": self.lora_optimiser.state_dict(),
        }
        if self.average is not None:
            state["average"] = self.average.state_dict()
        checkpoint.save(state, self._checkpoint)

    # ---- one step --------------------------------------------------------------------------------

    def step(self, step: int) -> dict[str, float]:
        """One step of the student and `lora_updates` of the LoRA teacher; what to log of it.

        Raises:
            FloatingPointError: A latent, loss or gradient is not finite. No weight was changed.
        """
        settings = self.settings
        shared = generator(settings.seed, step)  # the same in every process
        stages = STAGES[settings.student_steps]
        stage = int(torch.randint(len(stages), (), generator=shared))
        own = generator(settings.seed, step, 1 + self.accelerator.process_index)
        low, high = settings.alpha
        alpha = low + (high - low) * torch.rand((), generator=own).item()
        made: list[tuple[Draws, Tensor, Text]] = []
        logged: dict[str, float] = {"alpha": alpha, "stage": float(stage)}

        for micro in range(settings.accumulate):
            draws = Draws.of(
                settings, self.prompts, self.negatives, self.student.latent_shape, self.rows, own,
                alpha,
            )  # fmt: skip
            with self._synchronised(self.network, micro):
                x0, text, values = self._student_loss(draws, step, stage)
                self.accelerator.backward(values.pop("loss") / settings.accumulate)
            made.append((draws, x0.detach(), text))
            for name, value in values.items():
                logged[name] = logged.get(name, 0.0) + float(value) / settings.accumulate
        logged["student_gradient"] = self._update(self.student_optimiser, self.network, step)
        self._follow()

        for _ in range(settings.lora_updates):
            total = 0.0
            for micro, (draws, x0, text) in enumerate(made):
                with self._synchronised(self.lora_teacher, micro):
                    loss = self._lora_loss(draws, x0, text)
                    self._check("LoRA loss", loss, step)
                    self.accelerator.backward(loss / settings.accumulate)
                total += loss.item() / settings.accumulate
            logged["lora_gradient"] = self._update(self.lora_optimiser, self.lora_teacher, step)
            logged["lora_loss"] = total
        return logged

    def _student_loss(self, draws: Draws, step: int, stage: int) -> tuple[Tensor, Text, dict]:
        """The latents of the student, the teacher's prompts, and the loss (equation 6 and CLIP)."""
        settings, device = self.settings, self.accelerator.device
        kappa, rows = draws.kappa.to(device), len(draws.prompts)
        x0 = self._draw(draws, stage)
        self._check("student's latents", x0, step)

        text = self.teacher.encode(draws.prompts)
        null = self._null(rows)
        against = self.teacher.encode(draws.negatives) if settings.needs_negatives else null
        timesteps = draws.timesteps(*settings.noise).to(device)
        alpha, sigma = self.teacher.alpha_sigma(timesteps)
        with torch.no_grad():
            x_t = alpha * x0.detach() + sigma * draws.normal(x0)
            denoiser = self.accelerator.unwrap_model(self.lora_teacher)
            text_teacher = against if settings.teacher_negative else null
            with without_lora(denoiser):
                eps_teacher = self.teacher.guided_epsilon(
                    denoiser, x_t, timesteps, text, text_teacher, kappa
                )
            text_lora = against if settings.lora_negative else null
            eps_lora = self.teacher.guided_epsilon(denoiser, x_t, timesteps, text, text_lora, kappa)
            gradient = losses.vsd_gradient(eps_teacher, eps_lora, sigma**2)
        loss = losses.vsd_loss(x0, gradient)
        values = {"vsd_gradient": gradient.square().mean().sqrt()}
        if self.clip is not None:
            weight = losses.linear_decay(settings.clip_weight, step, settings.steps)
            clip = losses.clip_loss(
                self.clip.images(self.teacher.decode(x0)),
                self.clip.texts(draws.prompts),
                settings.clip_threshold,
            )
            values["clip_loss"] = clip.detach()
            loss = loss + weight * clip
        self._check("student's loss", loss, step)
        return x0, text, {"loss": loss, **values}

    def _draw(self, draws: Draws, stage: int) -> Tensor:
        """The student's x_0 at a stage; earlier stages are run without a gradient (DMD2)."""
        device = self.accelerator.device
        stages = STAGES[self.settings.student_steps]
        text = self.student.encode(draws.prompts)
        if self.nasa is not None:
            against = self.student.encode(draws.negatives)
            self.nasa.set_negative_prompt(
                negative_prompt_embeds=against.embeds, negative_prompt_attention_mask=against.mask
            )
            self.nasa.alpha = draws.alpha.to(device)
        x = draws.z.to(device)
        for earlier in range(stage):
            with torch.no_grad():
                network = self.accelerator.unwrap_model(self.network)
                x0 = self.student.x0(network, x, self._at(stages[earlier], x), text)
                alpha, sigma = self.student.alpha_sigma(self._at(stages[earlier + 1], x))
                x = alpha * x0 + sigma * draws.normal(x)
        return self.student.x0(self.network, x, self._at(stages[stage], x), text)

    def _lora_loss(self, draws: Draws, x0: Tensor, text: Text) -> Tensor:
        """The LoRA teacher denoises what the student drew, a few of them without a prompt."""
        settings, rows = self.settings, len(draws.prompts)
        other = self._null(rows)
        if settings.lora_negative:
            other = self.teacher.encode(draws.negatives)
        keep = (torch.rand(rows, generator=draws.random) >= settings.p_null).to(x0.device)
        timesteps = draws.timesteps(0, self.teacher.last_timestep).to(x0.device)
        alpha, sigma = self.teacher.alpha_sigma(timesteps)
        noise = draws.normal(x0)
        output = self.teacher.output(
            self.lora_teacher, alpha * x0 + sigma * noise, timesteps, text.where(keep, other)
        )
        return losses.denoising_loss(output, x0, noise, alpha, sigma, self.teacher.prediction)

    def _null(self, rows: int) -> Text:
        embeds, mask = self.null_teacher
        return Text(embeds.expand(rows, -1, -1), None if mask is None else mask.expand(rows, -1))

    def _at(self, timestep: int, like: Tensor) -> Tensor:
        return torch.full((len(like),), timestep, device=like.device)

    def _synchronised(self, network: nn.Module, micro: int):
        """Gradients are averaged over processes with the last micro-batch only."""
        last = micro + 1 == self.settings.accumulate
        return contextlib.nullcontext() if last else self.accelerator.no_sync(network)

    def _update(self, optimiser: Any, network: nn.Module, step: int) -> float:
        parameters = [p for p in network.parameters() if p.requires_grad]
        norm = self.accelerator.clip_grad_norm_(parameters, self.settings.clip_gradient)
        self._check("gradient", norm, step)
        optimiser.step()
        optimiser.zero_grad()
        return float(norm)

    def _check(self, what: str, value: Tensor, step: int) -> None:
        if not torch.isfinite(value).all():
            kept = self._checkpoint.exists()
            raise FloatingPointError(
                f"nasa_t: the {what} is not finite at step {step}; "
                + (f"{self._checkpoint} holds the last good step" if kept else "nothing was saved")
                + ". Lower the learning rates, or train in fp32 (--precision no)"
            )

    @torch.no_grad()
    def _follow(self) -> None:
        if self.average is None:
            return
        now = self.accelerator.unwrap_model(self.network).parameters()
        for mean, value in zip(self.average.parameters(), now, strict=True):
            mean.lerp_(value, 1 - self.settings.ema)

    # ---- the whole run ---------------------------------------------------------------------------

    def train(
        self,
        save_every: int = 500,
        sample_every: int = 500,
        after_step: Callable[[int], None] | None = None,
    ) -> Path:
        """Go on to the last step; the folder of the finished pipeline."""
        is_main, steps = self.accelerator.is_main_process, self.settings.steps
        bar = tqdm(total=steps, initial=self.start, desc="NASA-T", disable=not is_main)
        for step in range(self.start, steps):
            logged = self.step(step)
            done = step + 1
            if self.log is not None:
                self.log.write(done, **logged)
            bar.update()
            bar.set_postfix(vsd=f"{logged['vsd_gradient']:.3f}", lora=f"{logged['lora_loss']:.3f}")
            if is_main and (done % sample_every == 0 or done == steps):
                self._sample(done)
            if done % save_every == 0 or done == steps:
                self._save(done)
            if after_step is not None:
                after_step(done)
        bar.close()
        self._export()
        self.accelerator.wait_for_everyone()
        return self.out / "pipeline"

    @torch.no_grad()
    def _sample(self, step: int) -> None:
        """Two prompts without and with NASA, from the same noise at every time."""
        random = generator(self.settings.seed, -1)
        draws = Draws.of(
            self.settings, self.prompts[:2], self.negatives[:2], self.student.latent_shape, 4,
            random, 0.5,
        )  # fmt: skip
        stage = self.settings.student_steps - 1
        state = random.get_state()
        images, labels = [], []
        for alpha in (0.0, 0.5) if self.nasa is not None else (0.0,):
            draws.alpha = torch.full((4,), alpha)
            random.set_state(state)
            for row in self.student.decode(self._draw(draws, stage)):
                pixels = ((row.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
                image = Image.fromarray(pixels.cpu().numpy())
                images.append(image.resize((128, 128), Image.Resampling.NEAREST))
                labels.append(f"alpha {alpha:g}")
        path = self.out / "samples" / f"step-{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        grid(images, labels).save(path)

    def _export(self) -> None:
        """The student as a pipeline, averaged if there is an average; whole or not at all."""
        pipe = self.student.pipe
        if self.nasa is not None:
            self.nasa.disable()
        network = self.accelerator.unwrap_model(self.network).eval()
        network.disable_gradient_checkpointing()
        if self.average is not None:
            network.load_state_dict(self.average.state_dict())
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
        if not self.accelerator.is_main_process:
            return
        partial = self.out / "pipeline.partial"
        shutil.rmtree(partial, ignore_errors=True)
        pipe.save_pretrained(partial)
        shutil.rmtree(self.out / "pipeline", ignore_errors=True)
        partial.rename(self.out / "pipeline")


def check_data(prompts: Sequence[str], negatives: Sequence[str], settings: Settings) -> None:
    """Raise unless there is something to draw, and all of it has words."""
    pools = {"prompts": prompts}
    if settings.needs_negatives:
        pools["negative prompts"] = negatives
    for name, pool in pools.items():
        if not pool:
            raise ValueError(
                f"nasa_t: there are no {name}; give a file with one per line, or switch off "
                "teacher_negative and student_nasa to train without negatives"
            )
        for number, line in enumerate(pool, start=1):
            if not line.strip():
                raise ValueError(f"nasa_t: line {number} of the {name} is empty; remove it")
