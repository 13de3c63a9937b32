"""What networks draw, and the decoder and the student that learn from it."""

import copy
from dataclasses import replace

import pytest
import torch
from nasa_distill.train.networks import load
from nasa_distill.train.seeds import generator
from nasa_distill.world import draws, make, settle, students, teacher
from nasa_distill.world.draws import Draws
from nasa_distill.world.fit import Settings
from nasa_distill.world.kinds import LARGE
from nasa_distill.world.large import autoencoder
from nasa_distill.world.large.judge import local_distance, nearest
from nasa_distill.world.large.scene import scenes
from small_world import FEW, FEW_SCENES, TINY, TINY_LARGE


def test_draws_are_those_of_the_pipeline(large, tmp_path):
    """After one step and after more by a student, with and without guidance by a teacher."""
    student, teacher_ = (load(large / x / "pipeline") for x in ("four-step", "teacher"))
    world, count = replace(LARGE, checks=()), 6
    path = tmp_path / "student.pt"
    found = draws.of_student(student, student.denoiser, 4, count, world, path, seed=3)
    assert len(found) == 4 and all(len(x.captions) == count for x in found)
    # the same noise, by the walk that the students settle on
    random_ = generator(3, 0)
    world.draw(draws.CHUNK, random_)
    noise = torch.randn(draws.CHUNK, *student.latent_shape, generator=random_)
    text = student.encode(found[0].captions)
    whole = torch.zeros_like(noise)  # the rest of the chunk draws noise too
    for turn, now in enumerate(students.begins(student, 4)):
        x = students.renoised(student, whole, now, random_)[:count] if turn else noise[:count]
        x0 = student.x0(student.denoiser, x, now.expand(count), text).detach()
        torch.testing.assert_close(found[turn].latents, x0, atol=1e-4, rtol=1e-4)
        whole[:count] = x0
    (found,) = draws.of_teacher(teacher_, count, world, tmp_path / "teacher.pt", seed=3)
    text, null = teacher_.encode(found.captions).embeds, teacher_.encode([""]).embeds
    for i, guidance in ((0, 1.0), (1, 2.0)):
        *_, expected = teacher.ddim(
            teacher_.denoiser, noise[i:count:2], text[i::2], null, guidance, draws.TEACHER_STEPS
        )
        torch.testing.assert_close(found.latents[i::2], expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="count=6"):
        draws.of_student(student, student.denoiser, 4, 7, world, path, seed=3)


def test_a_decoder_learns_from_draws_what_their_captions_allow(tmp_path, monkeypatch):
    """Its images of latents that no scene has come nearer to the nearest one."""
    torch.manual_seed(0)
    model = autoencoder.normalised(autoencoder.make_autoencoder((8, 8, 8, 8)).eval())
    captions = ["a photo of a single red circle", "a photo of a pair on a black background"] * 4
    drawn = Draws(
        torch.randn(8, autoencoder.CHANNELS, autoencoder.GRID, autoencoder.GRID), captions
    )
    allowed = LARGE.matches(captions)
    known = torch.zeros(len(scenes()), *drawn.latents.shape[1:])
    asked, said, some = [], [], autoencoder._some

    def nearest_(pixels, of):
        asked.append(of)
        return nearest(pixels, of)

    def some_(*of):
        found = some(*of)
        said.append(found[1])
        return found

    def distance(model):
        decoded = autoencoder.TrainedCode(model).decode(drawn.latents).clamp(-1, 1)
        found = nearest(decoded, allowed)
        return local_distance(decoded, LARGE.images(found)).mean()

    monkeypatch.setattr(autoencoder, "nearest", nearest_)
    monkeypatch.setattr(autoencoder, "_some", some_)
    before = distance(model)
    few = Settings(steps=40, batch=6, learning_rate=5e-3, warmup=5, ema=0.8)
    after = autoencoder.train_decoder(model, known, (few,), tmp_path, [drawn])
    assert distance(after) < 0.7 * before
    assert len(asked) == few.steps and all(len(of) == 4 for of in asked)  # two thirds of a batch
    for of, captions in zip(asked, said, strict=True):
        assert torch.equal(of, LARGE.matches(captions))
    assert {caption for captions in said for caption in captions} == set(drawn.captions)


def test_a_grown_autoencoder_gives_the_same_and_can_learn_more():
    torch.manual_seed(0)
    model = autoencoder.make_autoencoder((8, 8, 8, 8)).eval()
    larger = autoencoder.grown(model)
    images = LARGE.images(torch.tensor([30, 4000]))
    before, after = autoencoder.TrainedCode(model), autoencoder.TrainedCode(larger)
    codes = before.encode(images)
    assert torch.equal(after.encode(images), codes)
    assert torch.equal(after.decode(codes), before.decode(codes))
    blocks = [[len(x.resnets) for x in vae.decoder.up_blocks] for vae in (model, larger)]
    assert blocks == [[2] * 4, [3] * 4]
    larger.decoder.requires_grad_(True)
    autoencoder.loss_by(larger)(codes, torch.tensor([0, 1])).backward()
    new = larger.decoder.up_blocks[0].resnets[2]
    assert not new.conv2.weight.any() and new.conv2.weight.grad.any()


def test_settling_can_look_at_images_too(large, tmp_path):
    """At those of the choice, for the first of each batch."""
    model = load(large / "student" / "pipeline")
    world = replace(FEW_SCENES, checks=())
    known = torch.load(large / "autoencoder" / "latents.pt", weights_only=True)["latents"]
    pairs = students.exact_pairs(known, world, 1, tmp_path, 4)
    few = Settings(steps=20, batch=settle.SEEN + 8, learning_rate=3e-3, warmup=5, ema=0.9)
    seen = []

    def loss(codes, rows):
        seen.append((len(codes), rows))
        return 1000 * (codes - known[7]).square().mean()

    def distance(student):
        with torch.no_grad():
            z, text = pairs.states[0, :32], model.encode(pairs.captions[:32])
            drawn = model.x0(student, z, students.begins(model, 1).expand(len(z)), text)
        return (drawn - known[7]).square().mean()

    how = (model, model.denoiser, pairs, 1, (few,))
    plain = settle.train(*how, tmp_path / "plain", world, None, known)
    pulled = settle.train(*how, tmp_path / "pulled", world, None, known, image_loss=loss)
    assert distance(pulled) < 0.9 * distance(plain)
    assert len(seen) == few.steps and {count for count, _ in seen} == {settle.SEEN}
    assert {len(rows) for _, rows in seen} == {settle.SEEN}
    assert all(0 <= int(i) < FEW for _, rows in seen for i in rows)


def test_finishing_ends_with_a_student_and_a_decoder_of_its_own(large, tmp_path, monkeypatch):
    model = load(large / "four-step" / "pipeline")
    recipe = replace(
        TINY_LARGE,
        draws=3,
        finish=(
            make.Round(decoder=(TINY,), settled=(TINY,)),
            make.Round(decoder=(TINY,), grown=True),
        ),
    )
    random_ = torch.Generator().manual_seed(0)
    known = torch.randn(len(scenes()), *model.latent_shape, generator=random_)
    world, code = replace(LARGE, checks=()), autoencoder.TrainedCode(model.pipe.vae)
    pairs = students.exact_pairs(known, world, 1, tmp_path, 4)
    lessons = make.Lessons(world, code, known, pairs, 1.0)
    begun = copy.deepcopy(model.denoiser.state_dict())
    codes, decoded = known[:2], code.decode(known[:2])
    seen, loss_by = [], autoencoder.loss_by

    def loss_by_(vae):
        def loss(codes, rows):
            seen.append(vae)
            return loss_by(vae)(codes, rows)

        return loss

    monkeypatch.setattr(autoencoder, "loss_by", loss_by_)
    student, found = make.make_finish(recipe, model, model.denoiser, lessons, tmp_path)
    # by the decoder of its round, which has no block more yet
    assert len(seen) == TINY.steps and {x.config.layers_per_block for x in seen} == {1}
    assert all(torch.equal(begun[x], w) for x, w in model.denoiser.state_dict().items())
    assert not torch.equal(begun["conv_in.weight"], student.conv_in.weight)
    assert torch.equal(code.decode(codes), decoded)
    assert not torch.equal(found.decode(codes), decoded)
    assert found.vae.config.layers_per_block == 1 + code.vae.config.layers_per_block
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    names = {str(path.relative_to(tmp_path)) for path in files}
    assert {
        "round-0/drawn-by-student.pt",
        "round-0/drawn-by-teacher.pt",
        "round-0/decoder/cycle-0/decoder.pt",
        "round-0/settled-0/student.pt",
        "round-1/decoder/cycle-0/decoder.pt",
    } < names
    make.make_finish(recipe, model, model.denoiser, lessons, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")} == files
