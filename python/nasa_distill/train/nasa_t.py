"""NASA-T: distil a one- or few-step student that has a negative prompt.

    student       x_0 = G(z, y, NASA(y-, alpha)), gradient of equation 6
    teacher       frozen, guided away from y- (equation 5)
    LoRA teacher  learns the student's distribution, and sees no y- (`lora_nasa`: as the student)

Every random number is a function of seed, step and process, so an interrupted run goes on with
the same command and ends with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from nasa_diffusers import Handle, enable_nasa
from peft import LoraConfig
from torch import Tensor, nn
from tqdm import tqdm

from nasa_distill import pictures
from nasa_distill.scalars import plain
from nasa_distill.train import checkpoint, losses, sharding
from nasa_distill.train.average import average_of
from nasa_distill.train.checks import check_data, check_launch, check_model, digest
from nasa_distill.train.clip import Clip
from nasa_distill.train.config import Settings
from nasa_distill.train.draws import Draws
from nasa_distill.train.networks import Model, Text, add_lora, check_fit, without_lora
from nasa_distill.train.output import write_pipeline
from nasa_distill.train.seeds import generator


def show(nasa: Handle, against: Text, alpha: Tensor) -> None:
    """A negative prompt and an alpha for each row, from the next call on."""
    nasa.set_negative_prompt(
        negative_prompt_embeds=against.embeds, negative_prompt_attention_mask=against.mask
    )
    nasa.alpha = alpha


# settings that do not change what is computed: a resumed run may have others
HOW = ("accumulate", "gradient_checkpointing")


class Run:
    """The networks, optimisers and files of one run; `Run(...).train()` is all of it.

    Args:
        settings: See `nasa_distill.train.config`.
        teacher: A checkpoint's model. It gets an adapter, and is teacher and LoRA teacher in one.
        student: Another copy of it, or a one-step model of its family; it is trained in place.
        prompts, negatives: Texts to draw from, uniformly and with replacement.
        out: Folder of the log, the samples, the checkpoint, and `pipeline` at the end.
        clip: For the clamped CLIP loss; None: train without that loss.
        identity: What else the run depends on; a checkpoint with another identity is refused.
        fsdp: Split student and LoRA teacher over the processes (see `nasa_distill.train.sharding`).

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
        fsdp: bool = False,
    ):
        check_data(prompts, negatives, settings)
        check_fit(teacher, student.denoiser)
        for role, model in (("teacher", teacher), ("student", student)):
            check_model(model, role)
        if teacher.denoiser is student.denoiser:
            raise ValueError("Run: teacher and student must be two copies, got one network")
        self.settings, self.out = settings, out
        self.prompts, self.negatives = list(prompts), list(negatives)
        self.teacher, self.student = teacher, student
        self.stages = student.stages(settings.student_steps)
        self.clip = clip if settings.clip_weight > 0 else None
        self.is_split = sharding.is_asked_by_launcher() or fsdp
        self.accelerator = Accelerator(mixed_precision=settings.precision)
        check_launch(self.accelerator.distributed_type, self.is_split)
        shares = self.accelerator.num_processes * settings.accumulate
        if settings.batch % shares:
            raise ValueError(
                f"Run: batch {settings.batch} must be a multiple of processes x accumulate = "
                f"{self.accelerator.num_processes} x {settings.accumulate}"
            )
        self.rows = settings.batch // shares
        asked = dataclasses.asdict(settings)
        self.identity = {
            **{name: value for name, value in asked.items() if name not in HOW},
            **(identity or {}),
            "prompts": digest(prompts),
            "negatives": digest(negatives if settings.needs_negatives else ()),
            "clip_loss": self.clip is not None,
        }
        self._build()
        self.start = self._resume()
        is_main = self.accelerator.is_main_process
        self.log = checkpoint.Log(out / "log.jsonl", self.start) if is_main else None

    # ---- set-up ----------------------------------------------------------------------------------

    def _build(self) -> None:
        settings, device = self.settings, self.accelerator.device
        torch.manual_seed(settings.seed)  # the adapter's first weights
        add_lora(
            self.teacher.denoiser,
            LoraConfig(
                r=settings.lora_rank,
                lora_alpha=settings.lora_alpha,
                target_modules=list(settings.lora_targets),
            ),
        )
        for model in (self.teacher, self.student):
            model.pipe.to(device)
            model.alphas_cumprod = model.alphas_cumprod.to(device)
        if self.clip is not None:
            self.clip.to(device)
        network = self.student.denoiser.requires_grad_(True).train()
        # FSDP copies no network that is split, so the copy comes first
        ema = settings.ema
        self.average = average_of(network, lambda _: ema) if ema else None
        if settings.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        self.nasa = self._guided(self.student) if settings.student_nasa else None
        self.nasa_lora = self._guided(self.teacher) if settings.lora_nasa else None
        self.null_teacher = self.teacher.encode([""])

        self.kind = type(network)
        self.network, self.lora_teacher = map(self._prepare, (network, self.teacher.denoiser))
        if self.average is not None and self.is_split:
            sharding.shard(self.average.module, self.accelerator)
        trained = [p for p in self.teacher.denoiser.parameters() if p.requires_grad]
        decay = settings.weight_decay
        self.student_optimiser = torch.optim.AdamW(
            network.parameters(), settings.student_rate, weight_decay=decay
        )
        self.lora_optimiser = torch.optim.AdamW(trained, settings.lora_rate, weight_decay=decay)

    def _guided(self, model: Model) -> Handle:
        """NASA on a network, at alpha 0. The negative prompt travels with the call, so a recomputed
        block sees it again."""
        null = model.encode([""]).embeds
        nasa = enable_nasa(model.pipe, negative_prompt_embeds=null, alpha=0.0, cfg=False)
        if self.is_split:
            # FSDP reuses memory, so the cache would not see that weights have changed
            nasa.cache_limit = 0
        return nasa

    def _prepare(self, network: Any) -> Any:
        if not self.is_split:
            return self.accelerator.prepare(network)
        # for its autocast alone
        network = self.accelerator.prepare_model(network, evaluation_mode=True)
        sharding.shard(network, self.accelerator)
        return network

    @property
    def _checkpoint(self) -> Path:
        return self.out / "state.pt"

    def _resume(self) -> int:
        state = checkpoint.load(self._checkpoint, self.identity)
        step = 0 if state is None else state["step"]
        steps = self.accelerator.gather(torch.tensor([step], device=self.accelerator.device))
        if len(set(steps.tolist())) > 1:
            raise ValueError(
                f"Run: the processes would begin at the steps {steps.tolist()}: they must all see "
                f"{self._checkpoint}; give a folder that the machines share"
            )
        if state is None:
            return 0
        student, teacher, split = self.student.denoiser, self.teacher.denoiser, self.is_split
        # moments first: PyTorch makes them by a step of length 0
        for network, optimiser, name in (
            (student, self.student_optimiser, "student_optimiser"),
            (teacher, self.lora_optimiser, "lora_optimiser"),
        ):
            sharding.restore_moments(network, optimiser, state[name], split)
        sharding.restore(student, state["student"], "student", split)
        sharding.restore(teacher, state["lora"], "LoRA teacher", split)
        if self.average is not None:
            sharding.restore(self.average.module, state["average"], "average", split)
        return step

    def _save(self, step: int) -> None:
        student, teacher, split = self.student.denoiser, self.teacher.denoiser, self.is_split
        state = {
            "student": sharding.weights_of(student, split),
            "lora": sharding.weights_of(teacher, split, trained_only=True),
            "student_optimiser": sharding.moments_of(student, self.student_optimiser, split),
            "lora_optimiser": sharding.moments_of(teacher, self.lora_optimiser, split),
        }
        if self.average is not None:
            state["average"] = sharding.weights_of(self.average.module, split)
        if self.accelerator.is_main_process:
            checkpoint.save({"settings": self.identity, "step": step, **state}, self._checkpoint)
        self.accelerator.wait_for_everyone()

    # ---- one step --------------------------------------------------------------------------------

    def step(self, step: int) -> dict[str, float]:
        """One step of the student, from `lora_first` on, and `lora_updates` of the LoRA teacher.

        Returns:
            What to log of it.

        Raises:
            FloatingPointError: A latent, score, loss or gradient is not finite. The step is not
                made, and checkpoints hold only steps before it.
        """
        settings = self.settings
        shared = generator(settings.seed, step)  # the same in every process
        stage = int(torch.randint(len(self.stages), (), generator=shared))
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
            text = self.teacher.encode(draws.prompts)
            if step < settings.lora_first:
                with torch.no_grad():
                    made.append((draws, self.draw(draws, stage), text))
                continue
            with self._synchronised(self.network, micro):
                x0, values = self._student_loss(draws, text, step, stage)
                self.accelerator.backward(values.pop("loss") / settings.accumulate)
            made.append((draws, x0.detach(), text))
            for name, value in values.items():
                logged[name] = logged.get(name, 0.0) + float(value) / settings.accumulate
        if step >= settings.lora_first:
            logged["student_gradient"] = self._update(self.student_optimiser, self.network, step)
            if self.average is not None:
                self.average.update_parameters(self.student.denoiser)

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

    def _student_loss(
        self, draws: Draws, text: Text, step: int, stage: int
    ) -> tuple[Tensor, dict[str, Any]]:
        """The latents of the student, and the loss (equation 6 and CLIP)."""
        settings, device = self.settings, self.accelerator.device
        kappa, rows = draws.kappa.to(device), len(draws.prompts)
        x0 = self.draw(draws, stage)
        self._check("student's latents", x0, step)

        null = self.null(rows)
        against = self.teacher.encode(draws.negatives) if settings.needs_negatives else null
        timesteps = draws.timesteps(*settings.noise).to(device)
        alpha, sigma = self.teacher.alpha_sigma(timesteps)
        with torch.no_grad():
            x_t = alpha * x0.detach() + sigma * draws.normal(x0)
            denoiser = self.teacher.denoiser
            text_teacher = against if settings.teacher_negative else null
            with without_lora(denoiser):
                eps_teacher = self.teacher.guided_epsilon(
                    denoiser, x_t, timesteps, text, text_teacher, kappa
                )
            text_lora = against if settings.lora_negative else null
            # of guidance's two halves the second has the prompt
            shares = torch.cat([torch.zeros_like(draws.alpha), draws.alpha])
            with self._lora_sees(Text.cat([against, against]), shares):
                eps_lora = self.teacher.guided_epsilon(
                    denoiser, x_t, timesteps, text, text_lora, kappa
                )
            self._check("teacher's noise", eps_teacher, step)
            self._check("LoRA teacher's noise", eps_lora, step)
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
        return x0, {"loss": loss, **values}

    def draw(self, draws: Draws, stage: int) -> Tensor:
        """The student's x_0 at a stage; earlier stages are run without a gradient (DMD2)."""
        device, stages = self.accelerator.device, self.stages
        text = self.student.encode(draws.prompts)
        if self.nasa is not None:
            show(self.nasa, self.student.encode(draws.negatives), draws.alpha.to(device))
        x = draws.z.to(device)
        for earlier in range(stage):
            with torch.no_grad():
                network = self.student.denoiser
                x0 = self.student.x0(network, x, self._at(stages[earlier], x), text)
                alpha, sigma = self.student.alpha_sigma(self._at(stages[earlier + 1], x))
                x = alpha * x0 + sigma * draws.normal(x)
        return self.student.x0(self.network, x, self._at(stages[stage], x), text)

    def _lora_loss(self, draws: Draws, x0: Tensor, text: Text) -> Tensor:
        """The LoRA teacher denoises what the student drew, a few of them without a prompt."""
        settings, rows = self.settings, len(draws.prompts)
        other = self.null(rows)
        if settings.lora_negative:
            other = self.teacher.encode(draws.negatives)
        keep = (torch.rand(rows, generator=draws.random) >= settings.p_null).to(x0.device)
        timesteps = draws.timesteps(0, self.teacher.last_timestep).to(x0.device)
        alpha, sigma = self.teacher.alpha_sigma(timesteps)
        noise = draws.normal(x0)
        against = self.teacher.encode(draws.negatives) if settings.lora_nasa else other
        with self._lora_sees(against, draws.alpha * keep.to(draws.alpha.device)):
            output = self.teacher.output(
                self.lora_teacher, alpha * x0 + sigma * noise, timesteps, text.where(keep, other)
            )
        return losses.denoising_loss(output, x0, noise, alpha, sigma, self.teacher.prediction)

    @contextlib.contextmanager
    def _lora_sees(self, against: Text, alpha: Tensor) -> Iterator[None]:
        """Calls of the LoRA teacher with NASA, if it has NASA; the teacher's have none."""
        if self.nasa_lora is None:
            yield
            return
        show(self.nasa_lora, against, alpha.to(self.accelerator.device))
        yield
        self.nasa_lora.alpha = 0.0

    def null(self, rows: int) -> Text:
        """The empty prompt, `rows` times."""
        null = self.null_teacher
        mask = None if null.mask is None else null.mask.expand(rows, -1)
        return Text(null.embeds.expand(rows, -1, -1), mask)

    def _at(self, timestep: int, like: Tensor) -> Tensor:
        return torch.full((len(like),), timestep, device=like.device)

    def _synchronised(self, network: nn.Module, micro: int):
        """Average gradients over processes at the last micro-batch only. Split gradients are
        averaged at each, since no process could hold the whole sum."""
        last = micro + 1 == self.settings.accumulate
        if last or self.is_split:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(network)

    def _update(self, optimiser: Any, network: nn.Module, step: int) -> float:
        parameters = [p for p in network.parameters() if p.requires_grad]
        norm: Any = nn.utils.clip_grad_norm_(parameters, self.settings.clip_gradient)
        if self.is_split:
            norm = norm.full_tensor()
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
                + ". Lower the learning rates, or train in fp32 (--set precision=no)"
            )

    # ---- the whole run ---------------------------------------------------------------------------

    def train(
        self,
        save_every: int = 500,
        sample_every: int = 500,
        after_step: Callable[[int], None] | None = None,
    ) -> Path:
        """Go on to the last step; the folder of the finished pipeline.

        Raises:
            FloatingPointError: As `step`.
            OSError: A file cannot be written; what the last checkpoint holds is kept.
        """
        save_every, sample_every = plain(save_every), plain(sample_every)
        if save_every < 1 or sample_every < 1:
            raise ValueError(
                "Run.train: save_every and sample_every must be at least 1 step, got "
                f"{save_every} and {sample_every}"
            )
        is_main, steps = self.accelerator.is_main_process, self.settings.steps
        bar = tqdm(total=steps, initial=self.start, desc="NASA-T", disable=not is_main)
        for step in range(self.start, steps):
            logged = self.step(step)
            done = step + 1
            if self.log is not None:
                self.log.write(done, **logged)
            bar.update()
            shown = {"vsd_gradient", "lora_loss"} & logged.keys()
            bar.set_postfix({name: f"{logged[name]:.3f}" for name in sorted(shown)})
            if done % sample_every == 0 or done == steps:
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
        """Two prompts without and with NASA, from the same noise each time. All processes draw,
        because a split network needs all of them for a forward pass."""
        random = generator(self.settings.seed, -1)
        draws = Draws.of(
            self.settings, self.prompts[:2], self.negatives[:2], self.student.latent_shape, 4,
            random, 0.5,
        )  # fmt: skip
        stage = self.settings.student_steps - 1
        state = random.get_state()
        rows = []
        for alpha in (0.0, 0.5) if self.nasa is not None else (0.0,):
            draws.alpha = torch.full((4,), alpha)
            random.set_state(state)
            images = self.student.decode(self.draw(draws, stage))
            rows.append((f"alpha {alpha:g}", (images / 2 + 0.5).clamp(0, 1)))
        if not self.accelerator.is_main_process:
            return
        path = self.out / "samples" / f"step-{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        pictures.rows(rows, 128).save(path)

    def _export(self) -> None:
        """Write the student, or its average, as a pipeline; a failure leaves no half of it."""
        pipe, network = self.student.pipe, self.student.denoiser
        if self.nasa is not None:
            self.nasa.disable()
        network.disable_gradient_checkpointing()
        finished: Any = network if self.average is None else self.average.module
        if self.is_split:
            weights = sharding.weights_of(finished, True)
        if not self.accelerator.is_main_process:
            return
        if self.is_split:
            finished = sharding.as_one(network, self.kind, weights)
        kept = f"{self._checkpoint} holds the whole run"
        write_pipeline(pipe, network, finished, self.out / "pipeline", kept)
