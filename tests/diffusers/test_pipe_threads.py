"""Threads that share a denoiser: what is kept for one may be thrown away by another at any time."""

import sys
import threading
import time

import pytest
import torch
from nasa_diffusers import guidance, nasa, negative, testing

THREADS, CALLS = 8, 150


@pytest.fixture(autouse=True)
def busy(monkeypatch):
    """Threads take turns all the time, and next to nothing is kept."""
    monkeypatch.setattr(negative, "MAX_PLACED", 1, raising=False)
    monkeypatch.setattr(guidance, "MAX_ALPHAS", 1, raising=False)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


class Slow(dict):
    """Lets other threads run after every look and every change."""

    def __contains__(self, key):
        found = super().__contains__(key)
        time.sleep(1e-5)
        return found

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        time.sleep(1e-5)


def slow_down(handle):
    (hook,) = handle._guidances
    hook.alphas = Slow()
    for term in hook.settings.negative.terms:
        object.__setattr__(term, "placed", Slow())


def run(work, calls=CALLS):
    """`work(i)` in many threads at once; the first error of any is raised here."""
    errors, barrier = [], threading.Barrier(THREADS)

    def guarded(i):
        barrier.wait()
        try:
            for _ in range(calls):
                work(i)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def hook(handle, rows):
    """What the hook on the denoiser makes of a call with so many rows."""
    sample, text = torch.zeros(rows, 4, 16, 16), torch.full((rows, 7, 32), float(rows))
    with torch.no_grad():
        hook = handle._guidances[0]
        (*_, text), _ = hook(hook.denoiser, (sample, 1, text), {})
    return text


def test_batches_of_many_sizes():
    embeds = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    pipe = testing.stable_diffusion()
    with nasa(pipe, negative_prompt_embeds=embeds, alpha=0.5, cfg=False) as handle:
        slow_down(handle)

        def work(i):
            (term,) = hook(handle, i + 1).terms
            assert torch.equal(term.text, embeds)
            assert torch.equal(term.alpha.at(256), torch.full((i + 1, 1, 1), 0.5))

        run(work)


def test_maps_over_images_of_many_sizes():
    pipe = testing.stable_diffusion()
    options = {"negative_prompt_embeds": torch.ones(1, 5, 32), "cfg": False}
    with nasa(pipe, **options, alpha=torch.ones(16, 16)) as handle:
        slow_down(handle)

        def work(i):
            (term,) = hook(handle, i + 1).terms
            for size in (256, 64):
                assert term.alpha.at(size).shape == (i + 1, size, 1)

        run(work)


def test_what_is_set_during_calls_is_not_lost():
    pipe = testing.stable_diffusion()
    with nasa(pipe, "blurry", alpha=1.0, cfg=False) as handle:

        def work(i):
            if i > 0:
                hook(handle, i)
            else:
                work.alpha += 1.0
                handle.alpha = work.alpha
                for _ in range(50):
                    assert handle.alpha == work.alpha

        work.alpha = 1.0
        run(work)


def test_pipelines_with_options_of_their_own():
    """Each gets the negative prompt that was encoded as its own call says."""
    pipe = testing.flux()

    def encode(length):
        return pipe.encode_prompt("blurry", None, device="cpu", max_sequence_length=length)[0]

    expected = {length: encode(length) for length in (9, 12, 16)}
    with nasa(pipe, "blurry") as handle:
        held = handle._guidances[0].settings.negative

        def work(i):
            length = (9, 12, 16)[i % 3]
            options = {"max_sequence_length": length}
            (term,) = held.current([pipe], handle._guidances[0].family, options)
            assert torch.equal(term.embeds, expected[length])

        run(work, 20)
