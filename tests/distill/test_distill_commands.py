"""The commands: the small world from nothing, NASA-T on it, its evaluation, and their errors."""

import contextlib
import csv
import json
from dataclasses import replace

import pytest
import torch
from diffusers import PixArtAlphaPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from nasa_diffusers import NAG, NASA, VSF, ProjectedNASA, enable_nasa
from nasa_distill import pictures
from nasa_distill.cli import main, parse_settings
from nasa_distill.intervals import Share
from nasa_distill.scores import pairs
from nasa_distill.train.clip import Clip
from nasa_distill.train.networks import load
from nasa_distill.train.seeds import generator
from nasa_distill.world import shipped, students, teacher
from nasa_distill.world.code import PatchCode
from nasa_distill.world.evaluation import ablation, evaluate, prompts, report
from nasa_distill.world.evaluation.progress import checksum
from nasa_distill.world.fit import Settings, fit, in_bf16
from nasa_distill.world.make import Recipe, make
from nasa_distill.world.scene import render, scenes
from PIL import Image
from small_world import RECIPE, TINY


def test_the_world_is_made_stage_by_stage(world):
    for name in ("teacher", "student", "four-step"):
        pipe = StableDiffusionPipeline.from_pretrained(world / name / "pipeline")
        assert pipe.unet.config.cross_attention_dim == 64
    pipe = StableDiffusion3Pipeline.from_pretrained(
        world / "joint" / "pipeline", text_encoder_3=None, tokenizer_3=None
    )
    assert pipe.transformer.config.qk_norm == "rms_norm"
    pipe = StableDiffusion3Pipeline.from_pretrained(
        world / "words" / "pipeline", text_encoder_3=None, tokenizer_3=None
    )
    assert pipe.transformer.config.patch_size == 1
    pipe = PixArtAlphaPipeline.from_pretrained(world / "pixart" / "pipeline")
    assert pipe.transformer.config.attention_head_dim == 72
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*.pt")}
    assert len(before) == 14
    make(RECIPE, world)  # all done: nothing is trained or drawn again
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*.pt")} == before
    with pytest.raises(ValueError, match="is of a run with steps=2, this one has 3"):
        make(replace(RECIPE, teacher=(replace(TINY, steps=3),)), world)


def test_steps_of_the_command_are_those_of_every_student(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(
        "nasa_distill.world.make.make", lambda recipe, out, last: made.append(recipe)
    )
    assert main(["world", "--out", str(tmp_path), "--student-steps", "7", "--pairs", "9"]) == 0
    (recipe,) = made
    for name in ("student", "four_step", "joint", "words", "pixart"):
        assert {cycle.steps for cycle in getattr(recipe, name)} == {7}
    assert recipe.teacher == Recipe().teacher and recipe.pairs == 9


def test_nasa_t_runs_on_the_world_and_goes_on(world, tmp_path, capsys):
    command = ["train", "--preset", "world", "--teacher", str(world / "teacher" / "pipeline")]
    command += ["--student", str(world / "student" / "pipeline")]
    command += ["--data", str(world / "prompts.txt"), "--negatives", str(world / "negatives.txt")]
    command += ["--clip", str(world / "clip" / "model"), "--out", str(tmp_path / "run")]
    small = [f"--set={item}" for item in ("steps=2", "batch=2", "lora_rank=2", "lora_first=0")]
    small += ["--save-every", "1"]
    assert main([*command, *small]) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all("clip_loss" in row for row in rows)
    image = Image.open(tmp_path / "run/samples/step-000002.png")
    assert image.size == (4 * 128, 2 * (128 + pictures.LABEL_HEIGHT))
    # a second student step changes the settings of the run
    assert main([*command, *small, "--set", "steps=3"]) == 1
    assert "is of a run with steps=2" in capsys.readouterr().err


def test_the_ablation_trains_every_variant(world, tmp_path, capsys, monkeypatch):
    names = ("none", "teacher and student (NASA-T)")
    assert set(ablation.VARIANTS.values()) > {ablation.VARIANTS[name] for name in names}
    command = ["ablate", "--world", str(world), "--seeds", "5", "--images", "1", "--clip"]
    command += ["--variants", ",".join(names), "--methods", "nasa:0.5,projected:1"]
    changes = ("steps=1", "batch=1", "lora_rank=2", "lora_first=0", "lora_updates=1", "ema=0")
    small = [f"--set={item}" for item in changes]
    assert main([*command, *small, "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    rows = json.loads((tmp_path / "ablation.json").read_text())
    before, rows = rows[:3], rows[3:]
    assert len(rows) == 3 * len(names)
    assert [row["variant"] for row in before] == [ablation.BEFORE] * 3
    assert {row["student"] for row in before} == {checksum(world / "student" / "pipeline")}
    assert all(-1 < row[name] < 1 for row in rows for name in ablation.SCORES)
    assert len({row["CLIP+"] for row in rows}) == len({row["CLIP-"] for row in rows}) == len(rows)
    assert {row["seed"] for row in rows} == {5}
    # the seed is the same: what differs is who saw the negatives, and that reaches the weights
    assert len({row["student"] for row in rows}) > 1
    assert "teacher and student (NASA-T) | projected 1 | 1 |" in capsys.readouterr().out
    assert main([*command, "--variants", "everyone", "--out", str(tmp_path)]) == 1
    assert "variants must be of none, teacher, LoRA teacher" in capsys.readouterr().err
    # what is made later joins what is there, if it begins where that began
    command = [*command, *small, "--variants", "all", "--seeds", "6", "--out", str(tmp_path)]
    assert main(command) == 0, capsys.readouterr().err
    joined = json.loads((tmp_path / "ablation.json").read_text())
    assert joined[:9] == before + rows
    assert [(row["variant"], row["seed"]) for row in joined[9:]] == [("all", 6)] * 3
    assert main([*command, "--set", "student_rate=1e-3"]) == 1
    assert "is of a run with student_rate=1e-05" in capsys.readouterr().err
    assert main([*command, "--student", str(world / "four-step" / "pipeline")]) == 1
    assert "holds cells of another run" in capsys.readouterr().err


def test_the_ablation_is_compared_seed_by_seed():
    shares = {"none": (0.4, 0.6), "teacher": (0.45, 0.67)}
    rows = [
        {"variant": name, "seed": seed, "alpha": 0.5, **dict.fromkeys(ablation.COLUMNS, share)}
        for name, of_seed in shares.items()
        for seed, share in enumerate(of_seed)
    ]
    assert "Against" not in ablation.page(rows[2:])  # nothing to compare with
    shares, differences = ablation.page([*rows, rows[-1] | {"seed": 2}]).split("Against")
    assert "| none | 0.5 | 2 |" + " 50.0 ± 14.1 |" * 4 in shares
    assert "| teacher | 0.5 | 3 |" + " 59.7 ± 12.7 |" * 4 in shares
    # the seeds differ by far more than the variants do
    assert "none" not in differences and "logged" not in differences
    course = {"vsd_gradient, first": 0.02, "vsd_gradient, last": 0.01}
    course |= {"lora_loss, first": 0.3, "lora_loss, last": 0.2}
    logged = ablation.page([rows[0] | course, rows[1] | course, rows[2]]).split("logged")[1]
    assert (
        "| none | 2 | 0.0200 | 0.0100 | 0.3000 | 0.2000 |" in logged and "teacher |" not in logged
    )
    assert "| teacher | 0.5 | 2 |" + " +6.0 ± 1.4 |" * 4 in differences


@pytest.mark.parametrize("student", ["student", "pixart"])
def test_evaluation_counts_what_the_judge_sees(world, tmp_path, student):
    methods = (evaluate.NONE, evaluate.Method("cfg", 2.0), evaluate.Method("nasa", 0.5))
    student = world / student / "pipeline"
    results = evaluate.run(student, [1, 4], 2, methods=methods)
    assert [(c.steps, str(c.method)) for c in results.cells] == [
        (s, m) for s in (1, 4) for m in ("none", "cfg 2", "nasa 0.5")
    ]
    assert all(cell.total.n == 2 * len(prompts.PAIRS) for cell in results.cells)
    page = tmp_path / "docs" / "results.md"
    report.write(results, tmp_path / "out", page)
    assert report.read(tmp_path / "out" / "results.json") == results
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert len(rows) == 6 and rows[0]["commit"] == results.about["commit"]
    text = page.read_text()
    assert "## 4 steps" in text and "nasa 0.5" in text
    assert (page.parent / "../out/sweep-1.png").exists() and "../out/sweep-1.png" in text


def test_the_rules_of_joint_attention_have_a_page(world, tmp_path, monkeypatch):
    """By the command, from the student's folder to the page and its pictures."""
    methods = (evaluate.NONE, *(evaluate.Method(rule, 1.0) for rule in evaluate.ALPHAS))
    monkeypatch.setattr(evaluate, "JOINT", methods)
    page = tmp_path / "docs" / "rules.md"
    command = ["eval", "--student", str(world / "joint" / "pipeline"), "--images", "2"]
    command += ["--steps", "1,4"]
    assert main([*command, "--out", str(tmp_path / "docs" / "rules"), "--page", str(page)]) == 0
    results = report.read(tmp_path / "docs" / "rules" / "results.json")
    assert [cell.method for cell in results.cells] == 2 * list(methods)
    text = page.read_text()
    assert text.startswith("# The rules of joint attention")
    for name in ("sweep-1.png", "sweep-4.png", "price.png", "samples.png"):
        assert f"(rules/{name})" in text and (page.parent / "rules" / name).exists()


@pytest.mark.parametrize("name", ["student", "joint"])
def test_methods_are_those_of_the_pipeline(world, name):
    """What `draw` does for NASA and CFG is what a user does by hand."""
    model = load(world / name / "pipeline")
    # SD3 without its T5 appends as many empty tokens as it would have had
    text = {"max_sequence_length": 0} if name == "joint" else {}
    noise = torch.randn(3, *model.latent_shape, generator=generator(0, 0))
    prompt, negative = prompts.PAIRS[0]

    def by_hand(output_type="latent", **options):
        call = {"num_inference_steps": 1, "latents": noise, "output_type": output_type} | options
        images = model.pipe([prompt] * 3, **call, **text).images
        return images * 2 - 1 if output_type == "pt" else PatchCode().decode(images).clamp(-1, 1)

    def ours(name, strength=0.0):
        method = evaluate.Method(name, strength)
        return evaluate.draw(model, prompt, negative, method, 1, noise, 0)

    assert torch.equal(ours("none"), by_hand(guidance_scale=0))
    # the pipeline's own images are the same but for what the autoencoder bends
    assert (ours("none") - by_hand("pt", guidance_scale=0)).abs().mean() < 0.02
    assert torch.equal(
        ours("cfg", 3.0), by_hand(guidance_scale=3.0, negative_prompt=[negative] * 3)
    )
    drawn = [ours("none")]
    by_default, *others = ("nasa-cross", "nasa-text", "nasa") if text else ("nasa",)
    for name, method in (
        (by_default, NASA(2.0)),
        ("nag", NAG(scale=2.0)),
        ("vsf", VSF(2.0)),
        ("projected", ProjectedNASA(2.0)),
        *((rule, NASA(2.0, rule)) for rule in others),
    ):
        handle = enable_nasa(model.pipe, negative, method, **text)
        images = by_hand(guidance_scale=0)
        handle.disable()
        assert torch.equal(ours(name, 2.0), images)
        assert not any(torch.equal(images, other) for other in drawn)
        drawn.append(images)


@pytest.mark.parametrize("name", ["four-step", "joint"])
def test_noise_between_steps_is_of_the_seed(world, name):
    """Also of SD3, whose pipeline would take it from the generator that all share."""
    model = load(world / name / "pipeline")
    noise = torch.randn(2, *model.latent_shape, generator=generator(0, 0))
    images = []
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    for seed in (0, 0, 1):
        drawn = evaluate.draw(model, *prompts.PAIRS[0], evaluate.NONE, 4, noise, seed)
        images.append(drawn)
        assert torch.rand(1) == expected[len(images) - 1]  # the shared one is left alone
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_wilson_intervals():
    """Of the tables: 10 of 20, and the ends that a normal interval gets wrong."""
    assert Share(10, 20).interval == pytest.approx((0.2993, 0.7007), abs=1e-4)
    assert Share(0, 10).interval == pytest.approx((0, 0.2775), abs=1e-4)
    assert Share(10, 10).interval == pytest.approx((0.7225, 1), abs=1e-4)
    assert str(Share(0, 0)) == "-"


def test_findings_say_what_the_numbers_say():
    """A NASA that only destroys is not praised."""

    def cell(name, strength, removed, valid, good):
        counts = evaluate.Counts(1100, removed, 1000, valid, valid, good, good)
        return evaluate.Cell("student", 1, evaluate.Method(name, strength), [counts])

    results = evaluate.Results(
        [cell("none", 0, 500, 1000, 450), cell("cfg", 2.0, 700, 900, 600)]
        + [cell("nasa", 0.5, 510, 990, 455), cell("nasa", 1.0, 900, 100, 50)],
        {},
    )
    text = " ".join(report.findings(results, 1))
    assert "best alpha is nasa 0.5" in text and "cannot be told apart" in text
    assert "best guidance scale is cfg 2" in text and "do not overlap" in text
    assert "scale of NAG" not in text  # it was not measured


# ---- the teacher's target ------------------------------------------------------------------------


def test_the_posterior_mean_is_bayes_rule():
    random_ = torch.Generator().manual_seed(0)
    known = torch.randn(5, 2, 3, 3, generator=random_)
    rates = torch.rand(4, 5, generator=random_)
    rates[0, 2] = 0
    alpha = torch.tensor([0.9, 0.5, 0.1, 0.01]).view(-1, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    x_t = alpha * known[:4] + sigma * torch.randn(4, 2, 3, 3, generator=random_)
    ours = teacher.posterior_mean(x_t, alpha, sigma, known.double(), rates)
    for row in range(4):
        distances = (x_t[row] - alpha[row] * known).double().square().flatten(1).sum(1)
        weight = rates[row] * (-0.5 * distances / sigma[row].double().square().flatten()).exp()
        expected = (weight / weight.sum() @ known.double().flatten(1)).view(2, 3, 3)
        torch.testing.assert_close(ours[row].double(), expected, atol=1e-5, rtol=1e-5)
    near = known.double() / alpha[0]
    clean = teacher.posterior_mean(known, alpha[:1], alpha[:1] * 0.01, near, rates[1:2])
    torch.testing.assert_close(clean, known / alpha[0])


def has_bf16():
    with in_bf16():
        return torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("known", [{"avx512_bf16": True}, {"avx512_bf16": False}, {}])
def test_bf16_is_for_processors_that_have_it(known, monkeypatch):
    """And where PyTorch does not say, as on other architectures."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert has_bf16() == known.get("avx512_bf16", True)


def test_pairs_are_those_of_the_teacher(world, tmp_path, monkeypatch):
    model = load(world / "teacher" / "pipeline")
    how = (RECIPE.guidance, RECIPE.ddim_steps, RECIPE.guided_from)
    states, x0, captions = students.make_pairs(model, 1, world, *how)
    assert states.shape == (4, *x0.shape) and len(x0) == len(captions) == students.CHUNK
    noise = states[0]

    with monkeypatch.context() as patch:
        patch.setattr(students, "in_bf16", lambda _: contextlib.nullcontext())
        path, exact, _ = students.make_pairs(model, 1, tmp_path, *how)
    error = (x0 - exact).norm() / exact.norm()
    assert error < 0.02 and bool(error) == has_bf16()

    # eight of them by the stock pipeline, which guides them itself
    def guide_from_here(pipe, step, timestep, values):
        pipe._guidance_scale = RECIPE.guidance
        passed.append(values["latents"])
        return values

    passed = []

    drawn = {
        first: model.pipe(
            captions[:8],
            negative_prompt=[""] * 8,
            latents=noise[:8],
            num_inference_steps=RECIPE.ddim_steps,
            guidance_scale=first,
            output_type="latent",
            callback_on_step_end=guide_from_here,
        ).images
        for first in (1 + 1e-9, RECIPE.guidance)
    }
    torch.testing.assert_close(drawn[1 + 1e-9], exact[:8], atol=1e-4, rtol=1e-4)
    quarters = torch.stack([noise[:8], *passed[:3]])
    torch.testing.assert_close(quarters, path[:, :8], atol=1e-4, rtol=1e-4)
    assert (drawn[RECIPE.guidance] - exact[:8]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="is of a run with guidance=1.5, this one has 3.0"):
        students.make_pairs(model, 1, world, 3.0, *how[1:])
    with pytest.raises(ValueError, match="steps must be a multiple of 4, got 6"):
        students.make_pairs(model, 1, world, RECIPE.guidance, 6)


STARTS = [("student", 1), ("four-step", 1), ("four-step", 4), ("joint", 1), ("joint", 4)]


@pytest.mark.parametrize("name, steps", STARTS)
def test_the_pipeline_begins_where_the_student_was_taught(world, name, steps):
    model = load(world / name / "pipeline")
    seen = []

    def note(_, given, named):
        seen.append(int(named["timestep"] if model.joint else given[1]))

    model.denoiser.register_forward_pre_hook(note, with_kwargs=True)
    prompt = "a photo of a red circle"
    images = model.pipe(
        prompt,
        num_inference_steps=steps,
        guidance_scale=0,
        output_type="pt",
        **model.text_options,
    )
    assert images.images.shape == (1, 3, 32, 32)
    assert seen == students.begins(model, steps).tolist() == [999, 749, 499, 249][:steps]


# ---- one loop for all ----------------------------------------------------------------------------


@pytest.mark.parametrize("muon", [None, 0.01])
def test_fit_stops_and_goes_on(tmp_path, muon):
    def loss(module, step, random_):
        x = torch.randn(8, 3, generator=random_)
        return (module(x) - x.sum(1, keepdim=True)).square().mean()

    def module():
        torch.manual_seed(0)
        return torch.nn.Linear(3, 1)

    class Stop(Exception):
        pass

    def interrupted(linear, step, random_):
        if step == 7:
            raise Stop
        return loss(linear, step, random_)

    settings = Settings(steps=10, learning_rate=0.1, warmup=1, muon=muon)
    whole = fit(module(), loss, settings, tmp_path / "whole", "line", save_every=3)
    with pytest.raises(Stop):
        fit(module(), interrupted, settings, tmp_path / "broken", "line", save_every=3)
    resumed = fit(module(), loss, settings, tmp_path / "broken", "line", save_every=3)
    assert torch.equal(whole.weight, resumed.weight)
    logs = [(tmp_path / name / "line.jsonl").read_text() for name in ("whole", "broken")]
    assert logs[0] == logs[1]
    other = replace(settings, muon=0.02)
    with pytest.raises(ValueError, match="is of a run with muon="):
        fit(module(), loss, other, tmp_path / "whole", "line")

    with pytest.raises(FloatingPointError, match="loss of the line is nan at step 0; nothing was"):
        fit(module(), lambda *_: torch.tensor(torch.nan), settings, tmp_path / "nan", "line")


def test_clip_scores_of_images_of_any_model(world, tmp_path, capsys):
    """Against the embeddings taken one by one, normalised by hand."""
    clip = Clip.load(world / "clip" / "model")
    for number, scene in enumerate(scenes()[:3]):
        pixels = ((render(scene) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    header = "image,prompt,negative,present,absent\n"
    rows = "".join(f"{i}.png,red,blue,circle,square\n" for i in range(3))
    (tmp_path / "pairs.csv").write_text(header + rows)
    command = ["score", "--clip", str(world / "clip" / "model"), "--out", str(tmp_path / "s.json")]
    assert main([*command, "--pairs", str(tmp_path / "pairs.csv")]) == 0
    result = json.loads((tmp_path / "s.json").read_text())

    images = torch.cat([pairs.load_image(tmp_path / f"{i}.png") for i in range(3)])
    with torch.no_grad():
        image = torch.nn.functional.normalize(clip.images(images), dim=1)
    text = torch.nn.functional.normalize(clip.texts(["red", "blue", "circle", "square"]), dim=1)
    cosines = image @ text.T
    assert result["clip_pos"] == pytest.approx(cosines[:, 0].mean().item(), abs=1e-5)
    assert result["clip_neg"] == pytest.approx(cosines[:, 1].mean().item(), abs=1e-5)
    removed = (cosines[:, 3] > cosines[:, 2]).float().mean().item()
    assert result["removed"] == pytest.approx(removed)
    # any CLIP in the scorer's place: its score is a percentage of the same cosine
    scored = pairs.score(tmp_path / "pairs.csv", clip, clip)
    assert "hps" not in result
    assert scored["hps"] == pytest.approx(100 * result["clip_pos"], abs=1e-3)

    for content, message in (
        ("image,prompt\na.png,red\n", "has no column 'negative'"),
        (header.replace(",absent", "") + "0.png,red,blue,circle\n", "both present and absent"),
        (header, "has no rows"),
        (header + "0.png,red,,circle,square\n", "line 2 of .* has no negative"),
    ):
        (tmp_path / "bad.csv").write_text(content)
        with pytest.raises(ValueError, match=message):
            pairs.read_pairs(tmp_path / "bad.csv")


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is empty; it must hold one prompt per line"),
        ("a photo of a shape\n\na photo of a red shape\n", "line 2 of .* is empty"),
        ("a photo of a cat\n", "'cat' in 'a photo of a cat' is not a word"),
        (None, "cannot read .*No such file"),
    ],
)
def test_bad_data_is_one_line(tmp_path, capsys, content, message):
    data, negatives = tmp_path / "prompts.txt", tmp_path / "negatives.txt"
    negatives.write_text("red\n")
    if content is not None:
        data.write_text(content)
    teacher = str(shipped.path(32))
    command = ["train", "--preset", "world", "--teacher", teacher, "--out", str(tmp_path)]
    assert main([*command, "--data", str(data), "--negatives", str(negatives)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    import re

    assert re.search(message, error)


def test_a_missing_checkpoint_is_one_line(tmp_path, capsys):
    data = tmp_path / "prompts.txt"
    data.write_text("a cat\n")
    command = ["train", "--preset", "sd15", "--teacher", str(tmp_path), "--out", str(tmp_path)]
    assert main([*command, "--data", str(data), "--negatives", str(data)]) == 1
    assert "holds no diffusers pipeline" in capsys.readouterr().err
    # what costs nothing to see is seen before that
    assert main([*command, "--data", str(data)]) == 1
    assert "there are no negative prompts" in capsys.readouterr().err


def test_settings_on_the_command_line_have_their_types():
    given = ["kappa=0.5,3", "steps=7", "student_nasa=false", "lora_targets=to_q,to_v"]
    assert parse_settings(given) == {
        "kappa": (0.5, 3.0),
        "steps": 7,
        "student_nasa": False,
        "lora_targets": ("to_q", "to_v"),
    }
    for bad in ("steps=many", "kappa=1", "colour=red", "student_nasa=perhaps", "steps"):
        with pytest.raises(ValueError, match=f"--set {bad}"):
            parse_settings([bad])
