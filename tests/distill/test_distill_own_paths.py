"""The teacher's walks by its own steps: where they go, and that a stopped run goes on with them."""

from dataclasses import replace

import pytest
import torch
from nasa_distill.train.clip import Clip
from nasa_distill.train.seeds import generator
from nasa_distill.world import clip, model, own_paths, teacher
from nasa_distill.world.code import PatchCode
from nasa_distill.world.fit import Settings
from nasa_distill.world.kinds import SMALL
from nasa_distill.world.own_paths import STEPS, OwnPaths

UNSEEN = replace(SMALL, checks=())
SETTINGS = Settings(steps=4, batch=6, learning_rate=1e-3, ema=0.5, seed=3)


@pytest.fixture(scope="module")
def known():
    return teacher.latents(SMALL, PatchCode())


def paths_of(network, known, count=2):
    return OwnPaths(network, known, SMALL, count, 5, 0.1)


def test_a_walk_is_the_path_of_the_sampler(known, monkeypatch):
    """From the noise with which one begins again to the end: `teacher.ddim` of the same prompt."""
    monkeypatch.setattr(own_paths, "ROUNDS", 1)
    torch.manual_seed(0)
    network = model.make_unet((16, 32)).eval()
    width = network.config.cross_attention_dim
    texts = {}

    def text_of(captions):
        for caption in captions:
            texts.setdefault(caption, torch.randn(1, 4, width, generator=generator(9, len(texts))))
        return torch.cat([texts[caption] for caption in captions])

    paths, random_ = paths_of(network, known), generator(0, 0)
    begun, found = {}, {}
    with torch.no_grad():
        for step in range(2 * STEPS):
            walk = paths.take(network, step)
            turns = network.own_turns.tolist()
            x0 = network(walk.x_t, walk.timesteps, text_of(walk.captions)).sample
            paths.move(network, walk, x0, random_)
            for i, turn in enumerate(turns):
                if turn == 0 and i not in found:
                    begun[i] = (walk.x_t[i : i + 1].clone(), walk.captions[i])
                if turn == STEPS - 1 and i in begun and i not in found:
                    found[i] = x0[i : i + 1]
        assert len(found) == 2
        for i, (noise, caption) in begun.items():
            if i in found:
                text = text_of([caption])
                *_, expected = teacher.ddim(network, noise, text, text, 1, STEPS)
                torch.testing.assert_close(found[i], expected, atol=1e-4, rtol=1e-4)


def test_who_is_at_the_end_begins_with_noise_and_another_caption(known):
    network = torch.nn.Module()
    paths, random_ = paths_of(network, known, count=40), generator(0, 0)
    assert len(network.own_turns.unique()) > STEPS / 2  # all over their paths
    before = paths.take(network, 0)
    network.own_turns[before.rows] = STEPS - 1
    last = paths.take(network, 0)
    assert (last.timesteps == paths.scheduler.timesteps[-1]).all()
    assert last.captions == before.captions
    paths.move(network, last, torch.zeros_like(last.x_t), random_)
    after = paths.take(network, own_paths.ROUNDS)
    assert (after.timesteps == 999).all() and after.captions != before.captions
    assert after.x_t.std() == pytest.approx(1, abs=0.05)
    # the others stayed where they were
    assert set(network.own_laps[40:].tolist()) == {0}
    paths.leave(network)
    assert not network.state_dict()


def test_a_teacher_that_was_stopped_goes_on_with_its_walks(known, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    tokenizer = model.make_tokenizer(SMALL)
    torch.manual_seed(0)
    made = Clip(clip.make_clip(tokenizer, SMALL.size), tokenizer, clip.MEAN, clip.STD)
    encoder = clip.text_encoder(made)
    how = ((SETTINGS,), (None,), encoder, tokenizer)
    what = (UNSEEN, known, PatchCode(), (16, 32))
    whole = teacher.train(*how, tmp_path / "whole", *what, own=1).state_dict()
    real = teacher.fit

    def stopped(module, loss, settings, out, name, check):
        def until(module, step, random_):
            if step == 3:
                raise KeyboardInterrupt
            return loss(module, step, random_)

        return real(module, until, settings, out, name, check, save_every=1)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(teacher, "fit", stopped)
        teacher.train(*how, tmp_path / "parts", *what, own=1)
    kept = torch.load(tmp_path / "parts" / "cycle-0" / "teacher.pt", weights_only=True)
    assert kept["step"] == 3
    resumed = teacher.train(*how, tmp_path / "parts", *what, own=1).state_dict()
    assert whole.keys() == resumed.keys() and not any(name.startswith("own_") for name in whole)
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name]), name
    plain = teacher.train(*how, tmp_path / "plain", *what).state_dict()
    assert any(not torch.equal(plain[name], whole[name]) for name in whole)
