"""Runs on a small pipeline that need processes of their own: `train_small.py OUT`.

    OUT/killed          one process, killed while it wrote its last checkpoint but one
    OUT/ddp             two processes, each with the whole networks
    OUT/fsdp            two processes, each with half of every weight
    OUT/resumed         likewise, begun with the checkpoint of the first of its two steps

The processes are forked from this one: importing is what takes them longest.
"""

import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from nasa_diffusers import testing
from nasa_distill.train import networks
from nasa_distill.train.config import Settings
from nasa_distill.train.nasa_t import Run

STEPS, KILLED_AT = 4, 3


def small_run(out, steps=STEPS, **changes):
    settings = Settings(
        steps=steps, batch=4, lora_rank=4, student_rate=1e-3, clip_weight=0.0, ema=0.5
    )
    teacher, student = (networks.model_of(testing.stable_diffusion(), "sd") for _ in range(2))
    settings = settings.changed(**changes)
    return Run(settings, teacher, student, ["a cat", "a dog"], ["blurry", "red"], out)


def killed(out):
    save = torch.save

    def half(state, file):
        save(state, file)
        if state["step"] == KILLED_AT:
            file.truncate(file.tell() // 2)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half
    small_run(out).train(save_every=1, sample_every=100)


def two(out, rank):
    names = ("RANK", "LOCAL_RANK"), ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ |= dict.fromkeys(names[0], str(rank)) | dict.fromkeys(names[1], "2")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2
    )
    run = small_run(out / "ddp", 2)
    draws, draw = [], run.draw

    def noted(drawn, stage):
        draws.append((drawn.prompts, drawn.alpha.tolist()))
        return draw(drawn, stage)

    run.draw = noted
    run.train(save_every=1, sample_every=1)
    weights = {name: p.detach() for name, p in run.student.denoiser.named_parameters()}

    # what `accelerate launch --use_fsdp --fsdp_version 2` says
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}

    def keep_first(step):
        if rank == 0 and step == 1:
            (out / "resumed").mkdir()
            for name in ("state.pt", "log.jsonl"):
                shutil.copy(out / "fsdp" / name, out / "resumed")

    run = small_run(out / "fsdp", 2, gradient_checkpointing=True)
    run.train(1, 1, keep_first)
    held = {name: p.to_local().shape for name, p in run.student.denoiser.named_parameters()}
    small_run(out / "resumed", 2, gradient_checkpointing=True).train(1, 1)
    torch.save({"weights": weights, "draws": draws, "held": held}, out / f"process-{rank}.pt")


def fork(function, *arguments):
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


if __name__ == "__main__":
    out = Path(sys.argv[1])
    alone = fork(killed, out / "killed")
    alone.join()
    assert alone.exitcode == -signal.SIGKILL, alone.exitcode
    pair = [fork(two, out, rank) for rank in range(2)]
    for process in pair:
        process.join()
        if process.exitcode != 0:
            # the other one would wait for it
            for each in pair:
                each.kill()
            sys.exit(f"a process of two ended with {process.exitcode}")
