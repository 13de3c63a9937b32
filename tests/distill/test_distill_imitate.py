"""Students of other architectures, which learn from what another student draws."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from nasa_distill.__main__ import main
from nasa_distill.train.networks import load
from nasa_distill.train.seeds import generator
from nasa_distill.world import imitate, make, shipped, students
from nasa_distill.world.evaluation import pooled
from nasa_distill.world.evaluation.prompts import LARGE_PAIRS
from nasa_distill.world.fit import Settings
from nasa_distill.world.kinds import LARGE
from small_world import FEW_SCENES, TINY, TINY_LARGE

WORLD = replace(FEW_SCENES, checks=())


@pytest.fixture(scope="module")
def shown(large):
    """Away from its beginning, where what it draws hardly depends on anything."""
    model = load(large / "four-step" / "pipeline")
    torch.manual_seed(0)
    for parameter in model.denoiser.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def known(large):
    return torch.load(large / "autoencoder" / "latents.pt", weights_only=True)["latents"]


def test_the_pairs_of_a_student_are_its_walks_and_its_draws(shown, tmp_path):
    pairs = students.shown_pairs(shown, "one", WORLD, students.CHUNK + 1, tmp_path)
    assert pairs.states.shape == pairs.x0.shape
    assert pairs.states.shape[:2] == (4, 2 * students.CHUNK) == (4, len(pairs.captions))
    # image 5 of the second chunk, and the first two steps of its walk written out
    n, when = students.CHUNK + 5, students.begins(shown, 4)
    text = shown.encode([pairs.captions[n]])
    for quarter in range(4):
        x_t = pairs.states[quarter, n : n + 1]
        with torch.no_grad():
            x0 = shown.x0(shown.denoiser, x_t, when[quarter : quarter + 1], text)
        torch.testing.assert_close(pairs.x0[quarter, n : n + 1], x0, atol=1e-4, rtol=1e-4)
    alpha, sigma = shown.alpha_sigma(when)
    noise = (pairs.states[1:] - alpha[1:, None] * pairs.x0[:3]) / sigma[1:, None]
    assert noise.std().item() == pytest.approx(1, rel=0.01) and abs(noise.mean()) < 0.01
    again = students.shown_pairs(shown, "one", WORLD, students.CHUNK + 1, tmp_path)
    assert torch.equal(again.x0, pairs.x0) and again.captions == pairs.captions
    with pytest.raises(ValueError, match="is of a run with"):
        students.shown_pairs(shown, "another", WORLD, 1, tmp_path)


def test_lessons_are_of_their_quarter():
    states = torch.arange(12.0).view(4, 3, 1, 1, 1)
    quarters, rows = torch.tensor([0, 3, 2]), torch.tensor([2, 0, 1])
    for x0, expected in ((states[0], [2, 0, 1]), (states + 100, [102, 109, 107])):
        x_t, drawn = students.Pairs(states, x0, [""] * 3).lessons(quarters, rows)
        assert x_t.flatten().tolist() == [2, 9, 7]
        assert drawn.flatten().tolist() == expected


def test_a_student_learns_what_another_draws(shown, known, tmp_path):
    """From the other's latents, then from its own: each brings it nearer."""
    pairs = students.shown_pairs(shown, "one", WORLD, 1, tmp_path)
    few = Settings(steps=24, batch=8, learning_rate=3e-3, warmup=2, ema=0.8)
    torch.manual_seed(1)
    begun = copy.deepcopy(shown.denoiser)
    for parameter in begun.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)

    def distance(student):
        """At the latents that it walks to itself."""
        random_ = generator(5, 0)
        text = shown.encode(pairs.captions[:16])
        noise = torch.randn(16, *shown.latent_shape, generator=random_)
        when = students.begins(shown, 4)
        states, _ = students.walk(shown, student, noise, text, when, random_)
        with torch.no_grad():
            drawn, answers = (
                torch.stack(
                    [
                        shown.x0(net, x_t, t.expand(16), text)
                        for x_t, t in zip(states, when, strict=True)
                    ]
                )
                for net in (student, shown.denoiser)
            )
        return (drawn - answers).square().mean().sqrt().item()

    of = (tmp_path, WORLD, None)
    first = students.train(shown, begun, pairs, 4, (few,), *of, known=known, floor=1.0)
    second = imitate.train(shown, first, shown, (few,), *of, known, floor=1.0)
    distances = [distance(student) for student in (begun, first, second)]
    assert distances[1] < 0.85 * distances[0] and distances[2] < 0.97 * distances[1]


def test_what_draws_the_same_has_nothing_to_learn(shown, known, tmp_path):
    """So the other is asked for the same latents, at the same steps, with the same captions."""
    how = Settings(steps=1, batch=16)
    imitate.train(shown, shown.denoiser, shown, (how,), tmp_path, WORLD, None, known)
    log = (tmp_path / "shown-0" / "student.jsonl").read_text(encoding="utf-8").splitlines()
    # but for rounding: its weights lie otherwise
    assert json.loads(log[0])["loss"] < 1e-6


def test_the_command_makes_students_of_the_larger_world(tmp_path, monkeypatch, capsys):
    """From the shipped one, with its decoder, as a stock pipeline."""
    monkeypatch.setitem(make.RECIPES, 64, replace(TINY_LARGE, words_shown=(TINY,)))
    monkeypatch.setitem(make.WORLDS, 64, WORLD)
    monkeypatch.setattr(students, "CHUNK", 4)
    command = ["world", "--size", "64", "--from-shipped", "--stage", "words"]
    assert main([*command, "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    assert not (tmp_path / "pixart").exists()
    path = tmp_path / "words" / "pipeline"
    pipe = StableDiffusion3Pipeline.from_pretrained(path, text_encoder_3=None, tokenizer_3=None)
    call = {"num_inference_steps": 1, "guidance_scale": 0, "max_sequence_length": 0}
    noise = torch.randn(1, 16, 8, 8, generator=generator(0, 0))
    latents = pipe(LARGE.checks[1], latents=noise, output_type="latent", **call).images
    image = pipe(LARGE.checks[1], latents=noise, output_type="pt", **call).images
    decoded = load(shipped.path(64)).decode(latents).clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(image, decoded, atol=1e-5, rtol=1e-5)
    # the other one has a pooled vector, which is asked as on the smaller world
    monkeypatch.setattr(pooled, "STRENGTHS", (0.0,))
    monkeypatch.setattr(pooled, "pairs_of", lambda world, name: LARGE_PAIRS[:2])
    found = pooled.run(tmp_path / "joint" / "pipeline", 1, 1, 0, 1.0)
    assert found["about"]["world"] == "large"
    # in both directions; that there is one object is what both prompts say
    asked = {"colour": 6, "shape": 6, "size": 4, "texture": 4, "ground": 4, "frame": 4, "defect": 2}
    assert {name: counts["images"] for name, counts in found["follow"].items()} == asked
    assert found["steer"]["tokens 1, vector 0"]["n"] == 2
    assert "[the evaluation](large.md)" in pooled.page(found)
