"""A short run on a small pipeline, in a process of its own: `train_small.py OUT [--steps N]`."""

import argparse
from pathlib import Path

import torch
from nasa_diffusers import testing
from nasa_distill import networks
from nasa_distill.config import Settings
from nasa_distill.nasa_t import Run


def small_run(out, steps):
    settings = Settings(
        steps=steps, batch=4, lora_rank=4, student_rate=1e-3, clip_weight=0.0, ema=0.5
    )
    teacher, student = (networks.model_of(testing.stable_diffusion(), "sd") for _ in range(2))
    return Run(settings, teacher, student, ["a cat", "a dog"], ["blurry", "red"], out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    run = small_run(options.out, options.steps)
    alphas, draw = [], run._draw

    def noted(draws, stage):
        alphas.append(draws.alpha.tolist())
        return draw(draws, stage)

    run._draw = noted
    run.train(save_every=1, sample_every=100)
    process = run.accelerator.process_index
    end = {name: p.detach() for name, p in run.student.denoiser.named_parameters()}
    torch.save({"weights": end, "draws": alphas}, options.out / f"process-{process}.pt")
