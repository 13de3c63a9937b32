"""NASA-T end to end on small pipelines of the families: steps, switches, files, errors."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from diffusers import DiffusionPipeline, LCMScheduler
from nasa_diffusers import enable_nasa, testing
from nasa_distill.cli import main
from nasa_distill.train import checkpoint, networks, sharding
from nasa_distill.train.checks import check_launch
from nasa_distill.train.config import PRESETS, STUDENT_STEPS, Settings
from nasa_distill.train.nasa_t import Run
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors import SafetensorError
from train_small import KILLED_AT, small_run

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


@pytest.mark.parametrize("student_steps", STUDENT_STEPS)
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
    picture = numpy.asarray(Image.open(tmp_path / "samples" / "step-000002.png"))
    without, guided = picture[:128], picture[144:272]
    assert without.shape == guided.shape == (128, 4 * 128, 3) and (without != guided).any()

    opened = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    denoiser = getattr(opened, "unet", None) or opened.transformer
    assert equal_bits(weights(run.average.module), weights(denoiser))
    opened.scheduler.set_timesteps(student_steps)
    assert tuple(opened.scheduler.timesteps.tolist()) == run.stages
    assert run.stages == (999, 759, 499, 259)[:student_steps]


def test_four_steps_are_those_of_the_students_own_scheduler():
    model = networks.model_of(testing.stable_diffusion(), "sd15")
    eighths = LCMScheduler.from_config(model.pipe.scheduler.config, original_inference_steps=8)
    model.pipe.scheduler = eighths
    assert model.stages(4) == (999, 749, 499, 249)


def test_at_the_start_the_scores_agree(tmp_path):
    """An adapter begins as nothing: teacher and LoRA teacher are one, and equation 6 is 0."""
    run = make_run(tmp_path, teacher_negative=False, student_nasa=False)
    assert run.step(0)["vsd_gradient"] == 0
    assert run.step(1)["vsd_gradient"] > 0


def test_the_lora_teacher_may_learn_first(tmp_path):
    run = make_run(tmp_path, lora_first=1, teacher_negative=False)
    networks = run.student.denoiser, run.teacher.denoiser
    before = [weights(network) for network in networks]
    seen = []
    run.train(after_step=lambda step: seen.append([weights(network) for network in networks]))
    assert not changed(before[0], seen[0][0]) and changed(before[1], seen[0][1])
    assert changed(seen[0][0], seen[1][0])
    first, second = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert {"vsd_gradient", "student_gradient"}.isdisjoint(first)
    # what it learned is what the student follows from its first step on
    assert second["vsd_gradient"] > 0


SWITCHES = {
    "teacher": {"teacher_negative": True},
    "lora": {"lora_negative": True},
    "student": {"student_nasa": True},
    "lora's NASA": {"lora_nasa": True},
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
    assert (first[0] > 0) == (switch in ("teacher", "lora", "lora's NASA"))


def test_the_lora_teachers_nasa_is_its_own_and_the_students(tmp_path):
    """Its two passes have the student's negatives and alpha where they have the prompt; the
    teacher's pass, through the same network, has none."""
    run = make_run(tmp_path, lora_nasa=True, p_no_negative=0.25, p_null=0.5)
    calls = []

    def note(module, args, kwargs):
        with_adapter = not any(layer.disable_adapters for layer in layers)
        calls.append((with_adapter, run.nasa_lora.alpha, len(kwargs["timestep"])))

    denoiser = run.teacher.denoiser
    layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
    denoiser.register_forward_pre_hook(note, with_kwargs=True)
    for step in range(2):
        calls.clear()
        logged = run.step(step)
        (_, teacher, _), (_, scores, rows), (_, learned, _) = calls
        assert [with_adapter for with_adapter, *_ in calls] == [False, True, True]
        assert teacher == 0 and run.nasa_lora.alpha == 0
        assert rows == 8 and not scores[:4].any() and scores[4:].any()
        for shares in (scores[4:], learned):
            assert all(share in (0, pytest.approx(logged["alpha"])) for share in shares.tolist())
        # without a prompt nothing is left out
        assert ((learned != 0) <= (scores[4:] != 0)).all()


def test_the_student_runs_the_operator_forward_and_backward(tmp_path):
    """The gradient that reaches the student is that of `enable_nasa` with the same numbers."""
    run = make_run(tmp_path, p_no_negative=0.5)
    from nasa_distill.train.draws import Draws
    from nasa_distill.train.seeds import generator

    draws = Draws.of(
        run.settings, PROMPTS, NEGATIVES, run.student.latent_shape, 4, generator(0, 0), 0.7
    )
    assert sorted(set(draws.alpha.tolist())) == [0.0, pytest.approx(0.7)]
    run.draw(draws, 0).square().sum().backward()
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


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """What `train_small.py` leaves."""
    out = tmp_path_factory.mktemp("elsewhere")
    paths = [str(Path(p).resolve()) for p in sys.path if p]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    environment |= {"ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(HERE / "train_small.py"), str(out)]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def final(out):
    return torch.load(out / "state.pt", weights_only=True)


def equal_bits(left, right):
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal_bits(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal_bits, left, right))
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, elsewhere):
    """It was killed in the middle of writing a checkpoint."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    small_run(whole).train(save_every=1, sample_every=100)
    shutil.copytree(elsewhere / "killed", broken)
    assert (broken / "state.pt.partial").exists() and len(log(broken)) == KILLED_AT
    run = small_run(broken)
    assert run.start == KILLED_AT - 1
    run.train(save_every=1, sample_every=100)
    assert equal_bits(final(whole), final(broken))
    assert log(whole) == log(broken)


def numbered(state):
    """An optimiser's state as the first versions of this package saved it."""
    order = [name for group in state["param_groups"] for name in group["params"]]
    number = {name: i for i, name in enumerate(order)}
    return {
        "state": {number[name]: values for name, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [number[name] for name in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def test_a_checkpoint_with_numbered_weights_goes_on(tmp_path):
    ends = []
    for is_old in (False, True):
        out = tmp_path / str(is_old)
        with pytest.raises(KeyboardInterrupt):
            small_run(out, 3).train(2, 100, stop_after(2))
        state = final(out)
        assert "conv_in.weight" in state["student_optimiser"]["state"]
        if is_old:
            for name in ("student_optimiser", "lora_optimiser"):
                state[name] = numbered(state[name])
            checkpoint.save(state, out / "state.pt")
        run = small_run(out, 3)
        assert run.start == 2
        run.train(save_every=1, sample_every=100)
        ends.append(final(out))
    assert equal_bits(*ends)


def stop_after(last):
    def stop(step):
        if step == last:
            raise KeyboardInterrupt

    return stop


def test_saving_is_not_training(tmp_path):
    """Also where an optimiser has not made a step yet: PyTorch's functions would make one."""
    ends = []
    for save_every in (1, 3):
        run = small_run(tmp_path / str(save_every), 3, lora_first=2)
        run.train(save_every, sample_every=100)
        ends.append(final(tmp_path / str(save_every)))
    assert equal_bits(*ends)


def test_two_processes_agree(elsewhere):
    """Both hold the same weights after training on different halves of the batch."""
    ends = [torch.load(elsewhere / f"process-{i}.pt", weights_only=True) for i in range(2)]
    assert equal_bits(ends[0]["weights"], ends[1]["weights"])
    assert ends[0]["draws"] != ends[1]["draws"]


def test_two_processes_with_half_of_each_weight_train_the_same(tmp_path, elsewhere):
    """FSDP against DDP. They differ where a tensor's elements are added or vectorised in another
    order, so by some roundings of fp32 (1.2e-7), against what the weights have moved."""
    ddp, fsdp = elsewhere / "ddp", elsewhere / "fsdp"
    for ours, theirs in zip(log(fsdp), log(ddp), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    start = small_run(tmp_path, 2)
    before = {"student": weights(start.student.denoiser), "lora": weights(start.teacher.denoiser)}
    before["average"] = before["student"]
    ends = final(fsdp), final(ddp)
    for part, values in before.items():
        ours, theirs = (torch.cat([x.flatten() for x in end[part].values()]) for end in ends)
        moved = theirs - torch.cat([values[name].flatten() for name in ends[0][part]])
        assert (ours - theirs).norm() < 1e-3 * moved.norm()

    shapes = {name: p.shape for name, p in before["student"].items()}
    held = [torch.load(elsewhere / f"process-{i}.pt", weights_only=True)["held"] for i in range(2)]
    total = sum(shape.numel() for shape in shapes.values())
    assert all(sum(x.numel() for x in half.values()) < 0.51 * total for half in held)
    pictures = [
        numpy.asarray(Image.open(out / "samples/step-000002.png"), float) for out in (ddp, fsdp)
    ]
    assert abs(pictures[0] - pictures[1]).max() <= 1

    # written whole: a single process goes on with it, and opens what was exported
    shutil.copytree(fsdp, tmp_path / "one")
    one = small_run(tmp_path / "one", 2)
    assert one.start == 2
    assert equal_bits(weights(one.student.denoiser), ends[0]["student"])
    opened = DiffusionPipeline.from_pretrained(fsdp / "pipeline").unet
    assert equal_bits(weights(opened), ends[0]["average"])


def test_split_networks_resume_to_the_same_bits(elsewhere):
    assert equal_bits(final(elsewhere / "fsdp"), final(elsewhere / "resumed"))
    assert log(elsewhere / "fsdp") == log(elsewhere / "resumed")


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


def test_a_teacher_without_a_finite_score_is_not_followed(tmp_path):
    run = make_run(tmp_path)
    before = weights(run.student.denoiser)
    with torch.no_grad():
        run.teacher.denoiser.conv_in.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="teacher's noise is not finite at step 0"):
        run.step(0)
    assert not changed(before, weights(run.student.denoiser))


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
    another = networks.model_of(testing.stable_diffusion_xl(), "xl")
    with pytest.raises(ValueError, match="the teacher takes more than a text .text_time, as SDXL"):
        Run(SMALL, other, another, PROMPTS, NEGATIVES, tmp_path)
    short = networks.model_of(testing.stable_diffusion(), "sd")
    short.alphas_cumprod = short.alphas_cumprod[:500]
    with pytest.raises(ValueError, match="the student must have 1000 timesteps, got 500"):
        Run(SMALL, teacher, short, PROMPTS, NEGATIVES, tmp_path)
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
        ({"lora_first": 2}, "lora_first must be from 0 to below steps"),
        ({"lora_nasa": True, "lora_negative": True}, "two ways of one network"),
        ({"colour": 1}, "there is no 'colour'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SMALL.changed(**changes)


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch 4 must be a multiple of"):
        make_run(tmp_path, accumulate=3)


def test_never_is_no_interval(tmp_path):
    with pytest.raises(ValueError, match="at least 1 step, got 0 and 500"):
        make_run(tmp_path).train(save_every=0)


@pytest.mark.parametrize(
    "options, must",
    [
        ({}, "--fsdp_version 2"),
        ({"RESHARD_AFTER_FORWARD": "false"}, "--fsdp_reshard_after_forward true"),
        ({"OFFLOAD_PARAMS": "true"}, "--fsdp_offload_params false"),
        ({"ACTIVATION_CHECKPOINTING": "true"}, "--set gradient_checkpointing=true does it"),
        ({"AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "TRANSFORMER_BASED_WRAP"),
    ],
)
def test_what_is_not_done_of_accelerates_fsdp_is_refused(monkeypatch, options, must):
    assert not sharding.is_asked_by_launcher()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    if options:
        monkeypatch.setenv("FSDP_VERSION", "2")
        monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
        assert sharding.is_asked_by_launcher()
    for name, value in options.items():
        monkeypatch.setenv(f"FSDP_{name}", value)
    with pytest.raises(ValueError, match=f"must be given .*{must}"):
        sharding.is_asked_by_launcher()


def test_launches_that_a_run_does_not_know_are_refused():
    for kind in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        check_launch(kind, True)
        check_launch(kind, False)
    with pytest.raises(ValueError, match="splits the networks over several .*, and there is one"):
        check_launch(DistributedType.NO, True)
    with pytest.raises(ValueError, match="DEEPSPEED is not supported"):
        check_launch(DistributedType.DEEPSPEED, False)


def test_another_run_is_not_continued(tmp_path, monkeypatch):
    make_run(tmp_path).train(save_every=1)
    with pytest.raises(ValueError, match="is of a run with seed=0, this one has 1"):
        make_run(tmp_path, seed=1)
    with pytest.raises(ValueError, match="is of a run with negatives="):
        small = (networks.model_of(testing.stable_diffusion(), "sd") for _ in range(2))
        Run(SMALL, *small, PROMPTS, ["blue"], tmp_path)
    # how a step is computed may change
    assert make_run(tmp_path, accumulate=2, gradient_checkpointing=True).start == 2

    state = final(tmp_path)
    state["student"]["conv_in.weight"] = state["student"]["conv_in.weight"][:, :3]
    checkpoint.save(state, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="conv_in.weight of the student is .32, 3, 3, 3. in"):
        make_run(tmp_path)
    (tmp_path / "state.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint of this command"):
        make_run(tmp_path)
    for error in (MemoryError, PermissionError, OSError):
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(torch, "load", Mock(side_effect=error))
            make_run(tmp_path)
    (tmp_path / "state.pt").unlink()
    (tmp_path / "log.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match="is not the log of this command"):
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


def test_a_full_disk_at_the_end_loses_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    run = make_run(tmp_path, steps=1)
    monkeypatch.setattr(run.average.module, "save_pretrained", full)
    with pytest.raises(OSError, match="left on device .*; .*state.pt holds the whole run"):
        run.train()
    assert not list(tmp_path.glob("pipeline*"))
    run = make_run(tmp_path, steps=1)
    assert run.start == 1
    opened = DiffusionPipeline.from_pretrained(run.train())
    assert equal_bits(weights(opened.unet), weights(run.average.module))


def test_a_full_disk_leaves_the_log(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    checkpoint.Log(path).write(1, loss=0.5)
    before = path.read_text()

    def full(self, text, **_):
        self.open("w").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left on device"):
        checkpoint.Log(path, 1)
    assert path.read_text() == before


FULL = {
    "sd15": testing.stable_diffusion,
    "sd21": lambda: testing.stable_diffusion(version_2=True),
    "pixart": testing.pixart,
}


@pytest.mark.parametrize("preset", FULL)
def test_a_preset_runs_from_files(tmp_path, preset):
    """A small checkpoint of the family, on disk, and the command with the preset as it is but for
    its size."""
    FULL[preset]().save_pretrained(tmp_path / "teacher")
    (tmp_path / "data.txt").write_text("a cat\na dog\n")
    command = ["train", "--preset", preset, "--teacher", str(tmp_path / "teacher")]
    command += ["--out", str(tmp_path / "run"), "--data", str(tmp_path / "data.txt")]
    command += ["--negatives", str(tmp_path / "data.txt")]
    for small in ("steps=1", "batch=1", "lora_rank=2"):
        command += ["--set", small]
    assert main(command) == 0
    state = final(tmp_path / "run")
    assert state["settings"]["precision"] == "bf16" and log(tmp_path / "run")[0]["step"] == 1
    opened = DiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    denoiser = getattr(opened, "unet", None) or opened.transformer
    assert equal_bits(weights(denoiser), {n: state["student"][n] for n in weights(denoiser)})


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
        assert flags == (True, False, True) and not preset.lora_nasa
