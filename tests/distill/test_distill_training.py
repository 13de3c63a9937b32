"""NASA-T end to end on small pipelines of the families: steps, switches, files, errors."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline, LCMScheduler
from nasa_diffusers import enable_nasa, testing
from nasa_distill import checkpoint, networks
from nasa_distill.config import PRESETS, STAGES, Settings
from nasa_distill.nasa_t import Run
from train_small import small_run

SMALL = Settings(
    steps=2, batch=4, lora_rank=4, lora_alpha=8, student_rate=1e-3, clip_weight=0.0, ema=0.5
)
PROMPTS, NEGATIVES = ["a cat", "a dog", "a cow"], ["blurry", "red"]
FAMILIES = {"sd15": testing.stable_diffusion, "pixart": testing.pixart}
HERE = Path(__file__).parent


def make_run(out, family="sd15", clip=None, **changes):
    teacher, student = (networks.model_of(FAMILIES[family](), family) for _ in range(2))
    return Run(SMALL.changed(**changes), teacher, student, PROMPTS, NEGATIVES, out, clip)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(before, after):
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize("student_steps", STAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_trains_student_and_adapter_and_nothing_else(tmp_path, family, student_steps):
    run = make_run(tmp_path, family, student_steps=student_steps)
    teacher, student = run.teacher.denoiser, run.student.denoiser
    before = weights(teacher), weights(student)
    run.train(save_every=1, sample_every=1)
    after = weights(teacher), weights(student)
    assert changed(before[0], after[0]) == {n for n, p in teacher.named_parameters() if "lora" in n}
    assert len(changed(before[1], after[1])) > 0.9 * len(after[1])
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["vsd_gradient"] >= 0 and row["lora_loss"] > 0 for row in rows)
    assert len(list((tmp_path / "samples").glob("*.png"))) == 2

    opened = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    denoiser = getattr(opened, "unet", None) or opened.transformer
    average = run.average.state_dict()
    assert all(torch.equal(average[name], p) for name, p in denoiser.state_dict().items())
    opened.scheduler.set_timesteps(student_steps)
    assert tuple(opened.scheduler.timesteps.tolist()) == STAGES[student_steps]


def test_at_the_start_the_scores_agree(tmp_path):
    """An adapter begins as nothing: teacher and LoRA teacher are one, and equation 6 is 0."""
    run = make_run(tmp_path, teacher_negative=False, student_nasa=False)
    assert run.step(0)["vsd_gradient"] == 0
    assert run.step(1)["vsd_gradient"] > 0


SWITCHES = {
    "teacher": {"teacher_negative": True},
    "lora": {"lora_negative": True},
    "student": {"student_nasa": True},
}


@pytest.mark.parametrize("switch", [*SWITCHES, None])
def test_each_switch_shows_the_negatives_to_one_network(tmp_path, switch):
    """The negatives of a step change what that network sees, and nothing where all are off."""
    off = dict.fromkeys(("teacher_negative", "lora_negative", "student_nasa"), False)
    settings = off | SWITCHES.get(switch, {})
    results = []
    for negatives in (["blurry"], ["red"]):
        teacher, student = (networks.model_of(testing.stable_diffusion(), "sd") for _ in range(2))
        run = Run(
            SMALL.changed(**settings), teacher, student, PROMPTS, negatives, tmp_path / negatives[0]
        )
        results.append([run.step(step) for step in range(2)])
    assert (results[0] != results[1]) == (switch is not None)
    first = [result[0]["vsd_gradient"] for result in results]
    # the LoRA teacher's own negative is in the teacher's place, with the opposite sign
    assert (first[0] > 0) == (switch in ("teacher", "lora"))


def test_the_student_runs_the_operator_forward_and_backward(tmp_path):
    """The gradient that reaches the student is that of `enable_nasa` with the same numbers."""
    run = make_run(tmp_path, p_no_negative=0.5)
    from nasa_distill.fit import generator
    from nasa_distill.nasa_t import Draws

    draws = Draws.of(
        run.settings, PROMPTS, NEGATIVES, run.student.latent_shape, 4, generator(0, 0), 0.7
    )
    assert sorted(set(draws.alpha.tolist())) == [0.0, pytest.approx(0.7)]
    run._draw(draws, 0).square().sum().backward()
    ours = {n: p.grad.clone() for n, p in run.student.denoiser.named_parameters()}

    pipe = testing.stable_diffusion()
    pipe.unet.requires_grad_(True).train()
    model = networks.model_of(pipe, "sd")
    pipe.unet.requires_grad_(True).train()
    enable_nasa(pipe, draws.negatives, alpha=draws.alpha.tolist(), cfg=False)
    text, last = model.encode(draws.prompts), torch.full((4,), 999)
    model.x0(pipe.unet, draws.z, last, text).square().sum().backward()
    for name, p in pipe.unet.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_bit(tmp_path, family):
    ends = []
    for on in (False, True):
        run = make_run(tmp_path / str(on), family, gradient_checkpointing=on)
        run.step(0)
        ends.append(weights(run.student.denoiser))
    assert not changed(*ends)


def test_bf16_stays_near_fp32(tmp_path):
    ends = []
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state()
        run = make_run(tmp_path / precision, precision=precision)
        ends.append([run.step(step) for step in range(2)])
        assert all(p.dtype == torch.float32 for p in run.network.parameters())
    for exact, rounded in zip(*ends, strict=True):
        assert rounded != exact
        assert rounded["lora_loss"] == pytest.approx(exact["lora_loss"], rel=0.05)


def test_micro_batches_are_one_batch(tmp_path):
    """Four micro-batches of one image give the log and the length of one step."""
    run = make_run(tmp_path, accumulate=4)
    before = weights(run.student.denoiser)
    run.step(0)
    assert changed(before, weights(run.student.denoiser))
    assert run.rows == 1


# ---- resuming ------------------------------------------------------------------------------------


def launch(out, *options, processes=1, **environment):
    command = [sys.executable, str(HERE / "train_small.py"), str(out), *options]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        command = [sys.executable, *launcher, str(processes), *command[1:]]
    paths = [str(Path(p).resolve()) for p in sys.path if p]
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    environment |= {"ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process, timeout=300):
    output = process.communicate(timeout=timeout)[0].decode()
    assert process.returncode == 0, output
    return output


def final(out):
    return torch.load(out / "state.pt", weights_only=True)


def equal_bits(left, right):
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal_bits(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal_bits, left, right))
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    small_run(whole, 8).train(save_every=1, sample_every=100)
    process = launch(broken)
    deadline = time.monotonic() + 120
    while not (broken / "state.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    reached = final(broken)["step"]
    assert 0 < reached < final(whole)["step"], "killed too late to test anything"
    small_run(broken, 8).train(save_every=1, sample_every=100)
    assert equal_bits(final(whole), final(broken))
    assert (whole / "log.jsonl").read_text() == (broken / "log.jsonl").read_text()


def test_two_processes_agree(tmp_path):
    """Both hold the same weights after training on different halves of the batch."""
    finish(launch(tmp_path, "--steps", "2", processes=2))
    ends = [torch.load(tmp_path / f"process-{i}.pt", weights_only=True) for i in range(2)]
    assert equal_bits(ends[0]["weights"], ends[1]["weights"])
    assert ends[0]["draws"] != ends[1]["draws"]
    assert final(tmp_path)["settings"]["processes"] == 2


# ---- what goes wrong -----------------------------------------------------------------------------


def test_nan_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    run = make_run(tmp_path, steps=4)

    def poison(step):
        if step == 2:
            with torch.no_grad():
                next(run.student.denoiser.parameters()).fill_(torch.nan)

    with pytest.raises(FloatingPointError, match="not finite at step 2; .*state.pt holds the last"):
        run.train(save_every=1, after_step=poison)
    state = final(tmp_path)
    assert state["step"] == 2
    assert all(torch.isfinite(value).all() for value in state["student"].values())


@pytest.mark.parametrize(
    "prompts, negatives, message",
    [
        ([], NEGATIVES, "there are no prompts"),
        (PROMPTS, [], "there are no negative prompts"),
        (["a cat", " "], NEGATIVES, "line 2 of the prompts is empty"),
        (PROMPTS, ["blurry", ""], "line 2 of the negative prompts is empty"),
    ],
)
def test_data_without_words_is_refused(tmp_path, prompts, negatives, message):
    teacher, student = (networks.model_of(testing.stable_diffusion(), "sd") for _ in range(2))
    with pytest.raises(ValueError, match=message):
        Run(SMALL, teacher, student, prompts, negatives, tmp_path)


def test_networks_that_do_not_fit_are_refused(tmp_path):
    teacher = networks.model_of(testing.stable_diffusion(), "sd")
    other = networks.model_of(testing.stable_diffusion_xl(), "xl")
    with pytest.raises(ValueError, match="same cross_attention_dim, got 32 and 64"):
        Run(SMALL, teacher, other, PROMPTS, NEGATIVES, tmp_path)
    with pytest.raises(ValueError, match="must be two copies"):
        Run(SMALL, teacher, teacher, PROMPTS, NEGATIVES, tmp_path)
    joint = testing.stable_diffusion_3()
    with pytest.raises(ValueError, match="the scheduler in sd3 predicts None"):
        networks.model_of(joint, "sd3")
    joint.register_modules(scheduler=LCMScheduler(prediction_type="sample"))
    with pytest.raises(ValueError, match="with cross-attention, got a SD3Transformer2DModel"):
        Run(SMALL, *(networks.model_of(joint, "sd3") for _ in "ab"), PROMPTS, NEGATIVES, tmp_path)
    with pytest.raises(ValueError, match="is a WanTransformer3DModel; it must be one of"):
        networks.model_of(testing.wan(), "wan")
    with pytest.raises(ValueError, match="holds no diffusers pipeline"):
        networks.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kappa": (4.0, 0.5)}, "kappa must be a range"),
        ({"student_steps": 3}, "student_steps must be 1 or 4"),
        ({"p_null": 1.5}, "p_null must be between 0 and 1"),
        ({"precision": "fp8"}, "precision must be"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"colour": 1}, "there is no 'colour'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SMALL.changed(**changes)


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch 4 must be a multiple of"):
        make_run(tmp_path, accumulate=3)


def test_another_run_is_not_continued(tmp_path):
    make_run(tmp_path).train(save_every=1)
    with pytest.raises(ValueError, match="is of a run with seed=0, this one has 1"):
        make_run(tmp_path, seed=1)
    (tmp_path / "state.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="is not a checkpoint of this command"):
        make_run(tmp_path)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    checkpoint.save({"settings": {}, "step": 0}, path)
    before = path.stat().st_ino
    checkpoint.save({"settings": {}, "step": 1}, path)
    assert path.stat().st_ino != before  # another file in its place, never one half written

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device; the last checkpoint is kept"):
        checkpoint.save({"settings": {}, "step": 2}, path)
    monkeypatch.undo()
    assert checkpoint.load(path, {})["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_presets_are_those_of_table_6():
    expected = {"sd15": (64, 60_000), "sd21": (64, 40_000), "pixart": (32, 50_000)}
    for name, (batch, steps) in expected.items():
        preset = PRESETS[name]
        assert (preset.batch, preset.steps) == (batch, steps)
        assert preset.kappa == ((0.5, 3.0) if name == "pixart" else (0.5, 4.0))
        assert (preset.lora_rank, preset.lora_alpha) == (64, 128)
        assert (preset.student_rate, preset.lora_rate) == (1e-6, 1e-3)
        assert preset.precision == "bf16"
        flags = preset.teacher_negative, preset.lora_negative, preset.student_nasa
        assert flags == (True, False, True)
