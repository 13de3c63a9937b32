"""The world of 64x64 images: its scenes, captions and judge, and the stages of its models."""

import copy
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from nasa_distill.__main__ import main
from nasa_distill.train.networks import load
from nasa_distill.train.seeds import generator
from nasa_distill.world import kinds, make, settle, shipped, students, teacher
from nasa_distill.world import model as world_model
from nasa_distill.world.evaluation import evaluate, prompts, reliability, report
from nasa_distill.world.fit import Settings
from nasa_distill.world.kinds import LARGE, SMALL
from nasa_distill.world.large import autoencoder
from nasa_distill.world.large.captions import (
    MENTIONED,
    Item,
    draw_caption,
    holds,
    mentions,
    read,
)
from nasa_distill.world.large.judge import VALID_BELOW, judge, local_distance, nearest
from nasa_distill.world.large.scene import (
    IMAGE_RATES,
    NUMBERS,
    OBJECT_RATES,
    OBJECTS,
    WHOLES,
    Object,
    Scene,
    rates,
    render,
    scenes,
)
from small_world import CYCLES, FEW, FEW_SCENES, TINY, TINY_LARGE

PAIR = Scene(
    (Object("red", "circle"), Object("blue", "square")),
    texture="striped",
    size="large",
    ground="white",
    frame="framed",
    defect="text",
)
ALONE = Scene((Object("green", "triangle"),), "solid", "small", "black", "frameless", "blurry")


def some(count, seed=0):
    rows = random.Random(seed).choices(range(len(scenes())), rates().tolist(), k=count)
    return rows, [scenes()[i] for i in rows]


# ---- scenes --------------------------------------------------------------------------------------


def test_rates_are_those_of_the_attributes():
    assert len(rates()) == len(scenes()) == len(set(scenes())) == 9984
    assert rates().sum().item() == pytest.approx(1)

    def share(is_so):
        return rates()[torch.tensor([is_so(scene) for scene in scenes()])].sum().item()

    for name, values in (IMAGE_RATES | {"number": NUMBERS}).items():
        for value, rate in values.items():
            assert share(lambda s, n=name, v=value: getattr(s, n) == v) == pytest.approx(rate)
    for name, values in OBJECT_RATES.items():
        for value, rate in values.items():
            for slot in (0, -1):
                found = share(lambda s, n=name, v=value, i=slot: getattr(s.objects[i], n) == v)
                assert found == pytest.approx(rate)


def test_an_object_of_a_pair_is_not_seen_on_the_other_side():
    """The judge looks for the two halves by themselves."""
    one, other = Object("red", "circle"), Object("yellow", "square")
    for thing in OBJECTS:
        left = [render([Scene((thing, x), *whole) for whole in WHOLES]) for x in (one, other)]
        right = [render([Scene((x, thing), *whole) for whole in WHOLES]) for x in (one, other)]
        assert torch.equal(*(x[..., :32] for x in left))
        assert torch.equal(*(x[..., 32:] for x in right))
        assert not torch.equal(*left)


# ---- the judge -----------------------------------------------------------------------------------


def test_the_judge_is_exact_on_renders():
    rows, drawn = some(300)
    verdict = judge(render(drawn))
    assert verdict.scene.tolist() == rows
    assert verdict.residual.max() == 0 and verdict.valid.all()


def test_the_judge_finds_what_comparing_every_render_finds():
    _, drawn = some(12, seed=1)
    images = render(drawn)
    # between two scenes, and so noisy that the nearest is a third
    images = (images + images.roll(1, 0)) / 2
    images += 1.5 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    images = images.clamp(-1, 1)
    distances = []
    for start in range(0, len(scenes()), 312):
        known = render(scenes()[start : start + 312]).flatten(1).double()
        distances.append(torch.cdist(images.flatten(1).double(), known))
    assert torch.equal(judge(images).scene, torch.cat(distances, 1).argmin(1))


def test_the_judge_refuses_blends():
    other = PAIR._replace(objects=(Object("yellow", "circle"), PAIR.objects[1]))
    whole, changed = render([PAIR]), render([other])
    assert not judge((whole + changed) / 2).valid.any()
    # small beside the image, and where it is it counts in full
    assert local_distance(whole, changed) > 5 * (whole - changed).square().mean()
    assert not judge(torch.zeros(1, 3, 64, 64)).valid.any()
    noise = 0.05 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert judge(whole + noise).valid.all() and local_distance(whole + noise, whole) < VALID_BELOW


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.zeros(3, 64, 64), r"must be \[b, 3, 64, 64\]"),
        (torch.zeros(1, 3, 32, 32), r"got \[1, 3, 32, 32\]"),
        (torch.full((1, 3, 64, 64), torch.nan), "must be finite"),
    ],
)
def test_the_judge_refuses(images, message):
    with pytest.raises(ValueError, match=message):
        judge(images)


# ---- captions ------------------------------------------------------------------------------------


def test_captions_are_true_of_their_scene():
    random_ = random.Random(0)
    rows, drawn = some(400, seed=2)
    for row, scene in zip(rows, drawn, strict=True):
        caption = draw_caption(scene, random_)
        assert holds(caption)[row], (scene, caption)
        assert 0 < len(caption.split()) <= LARGE.max_tokens - 2


@pytest.mark.parametrize(
    "caption, pair, alone",
    [
        ("a photo of a shape", True, True),
        ("", True, True),
        ("a photo of a red circle and a blue square", True, False),
        ("a photo of a blue square and a red circle", True, False),
        ("a photo of a blue circle and a red square", False, False),
        # one object is not two
        ("a photo of a red shape and a circle", False, False),
        ("a photo of a shape and a shape", True, False),
        ("a photo of a red square", False, False),
        ("a photo of a single shape", False, True),
        ("single, blurry", False, True),
        ("a framed photo of a striped square with text", True, False),
        ("a blurry photo of a small green triangle on a black background", False, True),
        # either
        ("red, green", True, True),
        ("red, triangle", False, False),
    ],
)
def test_what_a_caption_is_true_of(caption, pair, alone):
    verdict = judge(render([PAIR, ALONE]))
    assert verdict.follows(caption).tolist() == [pair, alone]


def test_without_the_square_the_circle_stays():
    alone = PAIR._replace(objects=PAIR.objects[:1])
    verdict = judge(render([PAIR, alone]))
    assert verdict.shows("square").tolist() == [True, False]
    assert verdict.follows("a photo of a red circle").tolist() == [True, True]
    assert verdict.shows("red square, yellow").tolist() == [False, False]
    assert verdict.shows("text, blurry").tolist() == [True, True]
    assert verdict.shows("").tolist() == [False, False]


def test_what_a_caption_names():
    (item,) = read("a clean photo of a red circle and a square on a black background")
    assert item == Item((Object("red", "circle"), Object("", "square")), {"clean", "black"})
    (row,) = mentions(["a clean photo of a red circle and a square"])
    named = {what for what, is_named in zip(MENTIONED, row.tolist(), strict=True) if is_named}
    assert named == {"clean", "pair", Object("red", "circle"), Object("", "square")}


@pytest.mark.parametrize(
    "caption, message",
    [
        ("a photo of a cat", "'cat' in .* is not a word of this world"),
        ("a red blue circle", "gives one object two of colour"),
        ("a circle and a square and a triangle", "more than two objects"),
    ],
)
def test_captions_that_cannot_be_read(caption, message):
    with pytest.raises(ValueError, match=message):
        read(caption)


def test_the_nearest_scene_can_be_one_of_a_few():
    random_ = torch.Generator().manual_seed(0)
    pixels = torch.rand(6, 3, 64, 64, generator=random_) * 2 - 1
    allowed = torch.rand(6, len(scenes()), generator=random_) < 0.01
    few = allowed.any(0).nonzero()[:, 0]
    images = render([scenes()[i] for i in few.tolist()])
    distance = torch.cdist(pixels.flatten(1), images.flatten(1))
    expected = few[distance.masked_fill(~allowed[:, few], torch.inf).argmin(1)]
    assert torch.equal(nearest(pixels, allowed.float()), expected)
    assert not torch.equal(nearest(pixels), expected)


# ---- models --------------------------------------------------------------------------------------


def test_the_stages_end_with_a_stock_pipeline(large):
    before = {path: path.stat().st_mtime_ns for path in large.rglob("*.pt")}
    assert large / "autoencoder" / "cycle-1" / "autoencoder.pt" in before
    assert large / "four-step" / "settled-0" / "student.pt" in before
    assert not (large / "joint").exists()
    make.make(TINY_LARGE, large, "four-step", FEW_SCENES)
    assert {path: path.stat().st_mtime_ns for path in large.rglob("*.pt")} == before
    pipe = StableDiffusionPipeline.from_pretrained(large / "four-step" / "pipeline")
    assert isinstance(pipe.vae, AutoencoderKL) and pipe.vae_scale_factor == 8
    call = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "pt"}
    images = pipe(LARGE.checks[1], **call).images
    assert images.shape == (1, 3, 64, 64)


def test_latents_are_normal_and_images_are_what_they_were():
    torch.manual_seed(0)
    model = autoencoder.make_autoencoder((8, 8, 8, 8)).eval()
    _, drawn = some(64, seed=3)
    before = autoencoder.TrainedCode(model)
    images = render(drawn)
    expected = before.decode(before.encode(images))
    after = autoencoder.TrainedCode(autoencoder.normalised(model))
    codes = after.encode(images)
    torch.testing.assert_close(after.decode(codes), expected, atol=1e-4, rtol=1e-4)
    assert codes.mean((0, 2, 3)).abs().max() < 0.3
    torch.testing.assert_close(codes.std((0, 2, 3)), torch.ones(16), atol=0.3, rtol=0)


def test_a_longer_trained_decoder_has_the_same_latents(tmp_path):
    torch.manual_seed(0)
    model = autoencoder.normalised(autoencoder.make_autoencoder((8, 8, 8, 8)).eval())
    images = render(some(4, seed=4)[1])
    before = autoencoder.TrainedCode(copy.deepcopy(model))
    known = torch.zeros(len(scenes()), autoencoder.CHANNELS, autoencoder.GRID, autoencoder.GRID)
    recipe = replace(TINY_LARGE, decoder=CYCLES)
    after = make.make_decoder(recipe, autoencoder.TrainedCode(model), known, tmp_path)
    codes = before.encode(images)
    assert torch.equal(after.encode(images), codes)
    assert not torch.equal(after.decode(codes), before.decode(codes))
    kept = AutoencoderKL.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(autoencoder.TrainedCode(kept).decode(codes), after.decode(codes))


def test_another_scene_differs_in_one_attribute():
    rng, seen = random.Random(0), set()
    for scene in some(300, seed=5)[1]:
        other = autoencoder.other(scene, rng)
        assert other in scenes()
        here, there = (
            [*x, *(value for thing in x.objects for value in thing)][1:] for x in (scene, other)
        )
        changed = [i for i, (a, b) in enumerate(zip(here, there, strict=True)) if a != b]
        assert len(changed) == 1
        seen.update(changed)
    assert seen == set(range(9))


def whitened(known, rates, floor):
    """By Cholesky's factor instead of eigenvectors: `|L^-1 x|^2` of `C + floor I = L L^T`."""
    x = known.flatten(1).double()
    mean = (rates[:, None] * x).sum(0) / rates.sum()
    covariance = sum(r * torch.outer(v, v) for r, v in zip(rates, x - mean, strict=True))
    inverse = torch.linalg.inv(covariance + floor * torch.eye(x.shape[1], dtype=x.dtype))
    return inverse * covariance.trace() / (inverse @ covariance).trace()


def test_whitening_weighs_each_direction_by_its_variance():
    random_ = torch.Generator().manual_seed(0)
    known = torch.randn(9, 2, 2, 2, generator=random_) * torch.tensor([5.0, 0.5]).view(2, 1, 1)
    rates = torch.rand(9, generator=random_).double()
    rates /= rates.sum()
    ours = teacher.whitening(known, rates, 0.3).double()
    torch.testing.assert_close(ours @ ours, whitened(known, rates, 0.3), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours, ours.T)
    # the mean variance is what it was
    spread = known.flatten(1).double() - rates @ known.flatten(1).double()
    before, after = ((rates[:, None] * x.square()).sum() for x in (spread, spread @ ours))
    assert after.item() == pytest.approx(before.item(), rel=1e-4)
    weigh = teacher.weigher(known, rates, 0.3)
    torch.testing.assert_close(weigh(known).flatten(1), known.flatten(1) @ ours.float())
    assert teacher.weigher(known, rates, None)(known) is known


def test_exact_pairs_end_at_images_of_which_the_caption_is_true(tmp_path):
    # far apart, so that no path of eight steps ends between two
    known = 4 * torch.randn(FEW, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    states, x0, captions = students.exact_pairs(known, FEW_SCENES, 130, tmp_path, 8)
    assert states.shape == (4, *x0.shape) == (4, 2 * students.CHUNK, 2, 4, 4)
    distance = torch.cdist(x0.flatten(1).double(), known.flatten(1).double())
    assert distance.min(1).values.max() < 1e-3
    allowed = FEW_SCENES.matches(captions).bool()
    assert allowed[torch.arange(len(x0)), distance.argmin(1)].all()
    assert len(set(distance.argmin(1).tolist())) > FEW / 2
    assert torch.equal(states[0, : students.CHUNK], noise_of_chunk(0))
    again = students.exact_pairs(known, FEW_SCENES, 130, tmp_path, 8)
    assert torch.equal(again.states, states) and again.captions == captions
    with pytest.raises(ValueError, match="exact_pairs: steps must be a multiple of 4, got 6"):
        students.exact_pairs(known, FEW_SCENES, 1, tmp_path, 6)
    with pytest.raises(ValueError, match="is of a run with"):
        students.exact_pairs(known, FEW_SCENES, 1, tmp_path, 4)


def noise_of_chunk(number):
    random_ = generator(0, number)
    FEW_SCENES.draw(students.CHUNK, random_)
    return torch.randn(students.CHUNK, 2, 4, 4, generator=random_)


@pytest.mark.parametrize("world", [SMALL, LARGE], ids=lambda world: world.name)
def test_every_word_is_one_token(world):
    """And stays one beside others, so that no caption is cut."""
    tokenizer = world_model.make_tokenizer(world)
    for word in world.words:
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
    longest = " ".join(world.words[: world.max_tokens - 2])
    assert len(tokenizer(longest).input_ids) == world.max_tokens


def test_a_folder_of_other_tokens_is_refused(large, monkeypatch):
    words = tuple(word for word in LARGE.words if word != "triangle")
    other_tokens = world_model.make_tokenizer(replace(LARGE, words=words))
    monkeypatch.setattr(make.model, "make_tokenizer", lambda world: other_tokens)
    with pytest.raises(ValueError, match="was trained with other tokens for .*triangle"):
        make.make(TINY_LARGE, large, "clip", FEW_SCENES)


def test_a_walk_is_that_of_the_pipeline(large):
    """What a student settles on is what it meets when it draws."""
    model = load(large / "four-step" / "pipeline")
    prompt, passed = "a photo of a red circle", []

    def note(pipe, step, timestep, values):
        passed.append(values["latents"])
        return values

    random_ = generator(3, 0)
    noise = torch.randn(2, *model.latent_shape, generator=random_)
    state = random_.get_state()
    call = {"num_inference_steps": 4, "guidance_scale": 0, "output_type": "latent"}
    model.pipe([prompt] * 2, latents=noise, generator=random_, callback_on_step_end=note, **call)
    text = model.encode([prompt] * 2)
    for count in range(1, 5):
        random_.set_state(state)
        timesteps = students.begins(model, 4)[:count]
        found, drawn = students.walk(model, model.denoiser, noise, text, timesteps, random_)
        expected = torch.stack([noise, *passed][:count])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert len(drawn) == count - 1


def test_students_are_judged_on_the_way(large, tmp_path, monkeypatch):
    monkeypatch.setattr(settle, "CHECKED", 3)
    model = load(large / "four-step" / "pipeline")
    world, code = (
        replace(FEW_SCENES, checks=(LARGE.checks[1],)),
        autoencoder.TrainedCode(model.pipe.vae),
    )
    known = torch.load(large / "autoencoder" / "latents.pt", weights_only=True)["latents"]
    pairs = students.exact_pairs(known, world, 1, tmp_path, 4)
    how = (model, model.denoiser, pairs)
    students.train(*how, 1, (TINY,), tmp_path / "one", world, code)
    settle.train(*how, 4, (TINY,), tmp_path / "four", world, code, known)
    for folder in ("one/cycle-0", "four/settled-0"):
        last = (tmp_path / folder / "student.jsonl").read_text().splitlines()[-1]
        (found,) = json.loads(last)["check"]
        assert found["prompt"] == LARGE.checks[1] and 0 <= found["valid"] <= 1


def test_a_student_that_weighs_needs_the_latents(large):
    model = load(large / "student" / "pipeline")
    with pytest.raises(ValueError, match="floor needs known"):
        students.train(model, None, None, 1, (), large, LARGE, None, floor=1.0)


def test_settling_makes_blends_of_two_images_one_of_them(large, tmp_path):
    """A network that begins between two images draws nearly one after it has settled."""
    model = load(large / "student" / "pipeline")
    world = replace(FEW_SCENES, checks=())
    known = torch.load(large / "autoencoder" / "latents.pt", weights_only=True)["latents"]
    pairs = students.exact_pairs(known, world, 1, tmp_path, 4)
    few = Settings(steps=60, batch=16, learning_rate=3e-3, warmup=5, ema=0.9)

    def distance(student):
        with torch.no_grad():
            z, text = pairs.states[0, :32], model.encode(pairs.captions[:32])
            drawn = model.x0(student, z, students.begins(model, 1).expand(len(z)), text)
        return torch.cdist(drawn.flatten(1), known.flatten(1)).min(1).values.mean()

    before = distance(model.denoiser)
    how = (model, model.denoiser, pairs, 1, (few,), tmp_path, world, None, known)
    settled = settle.train(*how)
    assert distance(settled) < 0.8 * before
    assert settled.state_dict().keys() == model.denoiser.state_dict().keys()
    # prices go on where a run is stopped
    kept = torch.load(tmp_path / "settled-0" / "student.pt", weights_only=True)["module"]["prices"]
    features = settle.features_of([""], world).shape[1]
    assert kept.shape == (1, features, settle.values_of(world).shape[1]) and kept.any()


def test_the_last_cycle_of_settling_has_a_weight_of_its_own(large, tmp_path):
    model = load(large / "student" / "pipeline")
    world = replace(FEW_SCENES, checks=())
    known = torch.load(large / "autoencoder" / "latents.pt", weights_only=True)["latents"]
    pairs = students.exact_pairs(known, world, 1, tmp_path, 4)
    weights = {}
    for last in (settle.ANCHOR, 9.0):
        folder = tmp_path / str(last)
        settle.train(
            model, model.denoiser, pairs, 1, CYCLES, folder, world, None, known, last_anchor=last
        )
        for number in (0, 1):
            kept = torch.load(folder / f"settled-{number}" / "student.pt", weights_only=True)
            weights[last, number] = kept["module"]["conv_in.weight"]
    assert torch.equal(weights[settle.ANCHOR, 0], weights[9.0, 0])
    assert not torch.equal(weights[settle.ANCHOR, 1], weights[9.0, 1])


def test_the_students_of_the_command_know_their_world(large):
    model = load(large / "student" / "pipeline")
    assert model.latent_shape == (autoencoder.CHANNELS, autoencoder.GRID, autoencoder.GRID)
    assert model.encode(["text"]).embeds.shape[1] == LARGE.max_tokens


def test_the_command_refuses_a_stage_that_there_is_not(tmp_path, capsys):
    command = ["world", "--size", "64", "--out", str(tmp_path), "--stage", "paint"]
    assert main(command) == 1
    assert "--stage must be one of clip, autoencoder, " in capsys.readouterr().err


def test_the_evaluation_knows_the_world_of_a_model(large, tmp_path, capsys):
    """By the size of its images: prompts, judge and page are those of the larger world."""
    student = large / "student" / "pipeline"
    methods = (evaluate.NONE, evaluate.Method("nasa", 0.5))
    results = evaluate.run(student, [1], 1, methods=methods)
    assert results.about["world"] == "large"
    assert results.quality["student, 1 step"].n == len(prompts.LARGE_PAIRS)
    assert all(cell.total.n == len(prompts.LARGE_PAIRS) for cell in results.cells)
    report.write(results, tmp_path, tmp_path / "page.md")
    assert report.as_json(results)["pairs"] == [list(pair) for pair in prompts.LARGE_PAIRS]
    page = (tmp_path / "page.md").read_text()
    assert "the nearest of the 9984" in page and "97 % and 97 % in four" in page
    # decoded as the pipeline decodes
    model = load(student)
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    call = {"latents": noise, "num_inference_steps": 1, "guidance_scale": 0, "output_type": "pt"}
    drawn = evaluate.draw(model, "a photo of a circle", "", evaluate.NONE, 1, noise, 0)
    torch.testing.assert_close(drawn / 2 + 0.5, model.pipe("a photo of a circle", **call).images)
    pooled = ["pooled", "--student", str(student), "--out", str(tmp_path / "pooled.json")]
    assert main(pooled) == 1
    assert "has no pooled vector" in capsys.readouterr().err


def test_nasa_t_reads_prompts_of_its_teachers_world(large, tmp_path, capsys):
    (tmp_path / "negatives.txt").write_text("glowing\n")
    teacher = str(large / "teacher" / "pipeline")
    command = ["train", "--preset", "world", "--teacher", teacher, "--out", str(tmp_path / "run")]
    command += ["--data", str(large / "prompts.txt")]
    assert main([*command, "--negatives", str(tmp_path / "negatives.txt")]) == 1
    assert "'glowing' in 'glowing' is not a word of this world" in capsys.readouterr().err
    small = [f"--set={item}" for item in ("steps=1", "batch=2", "lora_rank=2", "lora_first=0")]
    command += ["--negatives", str(large / "negatives.txt"), *small]
    assert main([*command, "--clip", str(large / "clip" / "model")]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("world", (SMALL, LARGE), ids=lambda world: world.name)
def test_how_far_the_judge_is_trusted(world):
    """What it says of changed renders, counted; and a judge that errs is found out."""
    few = replace(world, rates=lambda: world.rates()[:50])
    rows = reliability.run(few, 30, 0)["rows"]
    assert rows["every render"]["images"] == 50 and rows["noise of 0.05"]["images"] == 30
    assert rows["every render"]["misread"] == 0 and rows["every render"]["valid"] == 50
    assert rows["noise of 0.2"]["valid"] <= rows["noise of 0.05"]["valid"] == 30
    assert rows["smooth noise of 0.2"]["valid"] < 30
    blind = replace(
        few,
        judge=lambda images: world.judge(world.images(torch.zeros(len(images), dtype=torch.long))),
    )
    found = reliability.run(blind, 30, 0)
    assert found["rows"]["every render"]["misread"] == 49
    assert sum(found["rows"]["every render"]["by attribute"].values()) >= 49
    assert "| every render | 50 | 98.0 " in reliability.page(found)


def test_the_command_that_measures_the_judge(large, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(kinds.WORLDS, 64, FEW_SCENES)
    out, page = tmp_path / "judge.json", tmp_path / "judge.md"
    command = ["judge", "--size", "64", "--images", "3", "--out", str(out), "--page", str(page)]
    vae = ["--autoencoder", str(large / "autoencoder" / "model")]
    assert main([*command, *vae]) == 0, capsys.readouterr().err
    found = json.loads(out.read_text())
    assert found["rows"]["encoded and decoded"]["images"] == 3
    assert page.read_text() == reliability.page(found)
    assert main(["judge", "--size", "32", "--out", str(out), *vae]) == 1
    assert "must be of images of 32 pixels, got 64" in capsys.readouterr().err
    assert main([*command, "--autoencoder", str(tmp_path)]) == 1
    assert "holds no AutoencoderKL" in capsys.readouterr().err


def test_the_world_of_a_folder_and_of_its_model(large, tmp_path):
    """Of networks of the pipeline's own sizes, and of one that is of no world."""
    for folder, world in ((large / "student" / "pipeline", LARGE), (shipped.path(32), SMALL)):
        assert kinds.world_at(folder) is world
    assert kinds.world_of(load(large / "student" / "pipeline")) is LARGE
    assert kinds.of_images(torch.zeros(1, 3, 32, 32)) is SMALL
    with pytest.raises(ValueError, match="must be 32 or 64 pixels wide, got .1, 3, 48, 48."):
        kinds.of_images(torch.zeros(1, 3, 48, 48))
    with pytest.raises(ValueError, match="must hold a pipeline of a small world"):
        kinds.world_at(tmp_path)
    for name, config in (("unet", {"sample_size": 64}), ("vae", {"block_out_channels": [1] * 4})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="images of 32 or 64 pixels, got 512"):
        kinds.world_at(tmp_path)


@pytest.mark.parametrize("name", ("small", "large"))
def test_the_pages_of_the_judges_are_made_of_their_numbers(name):
    docs = Path(__file__).parents[2] / "docs" / "distill"
    found = json.loads((docs / "judge" / f"{name}.json").read_text())
    assert found["about"]["world"] == name
    assert (docs / f"judge-{name}.md").read_text() == reliability.page(found)
    half = found["rows"]["50% of another scene"]
    said = f"{100 * half['valid'] / half['images']:.1f} %"
    assert said in (docs / "training.md").read_text()
