"""Video made chunk by chunk with causal self-attention: text is projected once for all of it."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from counting import Projections
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from drawing import assert_same_image, draw
from nasa_diffusers import enable_nasa, nasa, testing
from nasa_diffusers.families.skyreels import ATTENTION
from oracle import algorithm_1

LAYERS = 2


def padded(real, n=40, seed=1):
    text = torch.randn(1, n, 32, generator=torch.Generator().manual_seed(seed))
    text[:, real:] = 0
    return text


@torch.no_grad()
def projected(transformer, text):
    return transformer.condition_embedder.text_embedder(text)


# ---- CausVid: a few steps per chunk, self-attention over a cache of the chunks before ------------


class CausalSelfAttention(WanAttnProcessor):
    """Wan's self-attention, which also sees the keys and values of the chunks before."""

    def __init__(self):
        super().__init__()
        self.past, self.is_clean = [], False

    def __call__(self, attn, hidden_states, text=None, mask=None, rotary_emb=None):
        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, attn.to_v(hidden_states)))
        q, k = (rotated(x, *rotary_emb) for x in (q, k))
        keys, values = zip(*self.past, (k, v), strict=True)
        if self.is_clean:
            self.past.append((k, v))
        k, v = torch.cat(keys, dim=1), torch.cat(values, dim=1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](o))


def rotated(x, cos, sin):
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)


class Positions(torch.nn.Module):
    """Wan's positions for a chunk that begins at frame `start`."""

    def __init__(self, rope):
        super().__init__()
        self.rope, self.start = rope, 0

    def forward(self, latents):
        until = F.pad(latents, (0, 0, 0, 0, self.start, 0))
        tokens = latents.shape[2] * latents.shape[3] * latents.shape[4] // 4
        return tuple(x[:, -tokens:] for x in self.rope(until))


def causal(pipe):
    """The same weights as a causal model, by diffusers' own means."""
    transformer = pipe.transformer
    transformer.set_attn_processor(
        {
            name: CausalSelfAttention() if ".attn1." in name else own
            for name, own in dict(transformer.attn_processors).items()
        }
    )
    transformer.rope = Positions(transformer.rope)
    return pipe


@torch.no_grad()
def stream(pipe, text, chunks=3, frames=2, on_chunk=None):
    """CausVid's loop: every chunk in four steps, then once more, clean, for the chunks to come."""
    transformer = pipe.transformer
    caches = [p for p in transformer.attn_processors.values() if hasattr(p, "past")]
    for cache in caches:
        cache.past.clear()
    generator = torch.Generator().manual_seed(0)
    video = []
    for i in range(chunks):
        if on_chunk is not None:
            on_chunk(i)
        transformer.rope.start = i * frames
        x = torch.randn(1, 16, frames, 4, 4, generator=generator)
        for t in (1000, 757, 522, 250):
            sigma = t / 1000
            clean = x - sigma * transformer(x, torch.tensor([t]), text)[0]
            noise = torch.randn(x.shape, generator=generator)
            x = (1 - sigma) * clean + sigma * noise if t > 250 else clean
        for cache in caches:
            cache.is_clean = True
        transformer(x, torch.tensor([0]), text)
        for cache in caches:
            cache.is_clean = False
        video.append(x)
    return torch.cat(video, dim=2)


def test_causvid_is_algorithm_1_and_projects_text_once():
    pipe, negative, positive = causal(testing.wan()), padded(5, seed=2), padded(9)
    plain = stream(pipe, positive)
    with algorithm_1(pipe.transformer, [(projected(pipe.transformer, negative), None, 0.5)]):
        eager = stream(pipe, positive)
    count = Projections(pipe.transformer)
    with nasa(pipe, negative_prompt_embeds=negative, alpha=0.5, cfg=False):
        assert_same_image(stream(pipe, positive), eager)
        # 15 calls of the transformer: its text layers projected once, padding as one key
        assert count.take() == LAYERS
        assert count.tokens == 10 + 6
        assert_same_image(stream(pipe, positive), eager)
        assert count.take() == 0
    assert not torch.allclose(eager, plain)
    assert torch.equal(stream(pipe, positive), plain)


def test_causvid_with_another_negative_from_the_second_chunk_on():
    """What came before stays as it is; the new prompt is projected once."""
    pipe, positive = causal(testing.wan()), padded(9)
    first, second = padded(5, seed=2), padded(7, seed=3)
    with nasa(pipe, negative_prompt_embeds=first, alpha=0.5, cfg=False) as handle:
        count = Projections(pipe.transformer)
        whole = stream(pipe, positive)
        count.take()

        def switch(chunk):
            if chunk == 1:
                handle.set_negative_prompt(negative_prompt_embeds=second)
            if chunk == 2:
                handle.alpha = 0

        ours = stream(pipe, positive, on_chunk=switch)
        # once for the new prompt; the stock layers of chunk 2 project in each of its 5 calls
        assert count.take() == LAYERS + 5 * LAYERS
    assert torch.equal(ours[:, :, :2], whole[:, :, :2])
    assert not torch.allclose(ours[:, :, 2:4], whole[:, :, 2:4])


# ---- SkyReels-V2: a stock pipeline with blocks of frames -----------------------------------------

SUPPORTED = pytest.mark.skipif(ATTENTION is None, reason="SkyReels-V2 needs diffusers 0.36")
VIDEO = {"height": 16, "width": 32, "num_frames": 13}
MODES = {
    "all at once": {},
    "blocks one after another": {"ar_step": 2, "causal_block_size": 2},
    "piece by piece": {"num_frames": 21, "base_num_frames": 13, "overlap_history": 5},
}


@SUPPORTED
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("guidance", [1.0, 5.0], ids=["no-cfg", "cfg"])
def test_skyreels_is_algorithm_1_and_projects_text_once(mode, guidance):
    pipe, negative = testing.skyreels(), padded(5, seed=2)
    call = {"prompt": None, "prompt_embeds": padded(9), "guidance": guidance, "steps": 4}
    call |= VIDEO | MODES[mode]
    if guidance > 1:
        call["negative_prompt_embeds"] = padded(3, seed=4)
    stock = draw(pipe, **call)
    with nasa(pipe, negative_prompt_embeds=negative, alpha=0.5) as handle:
        count = Projections(pipe.transformer)
        ours = draw(pipe, **call)
        if guidance == 1:
            assert count.take() == LAYERS
            draw(pipe, **call)
            assert count.take() == 0
            assert (handle.report().keys_pos, handle.report().keys_neg) == (10, 6)
        handle.alpha = 0
        assert torch.equal(draw(pipe, **call), stock)
    if guidance == 1:
        with algorithm_1(pipe.transformer, [(projected(pipe.transformer, negative), None, 0.5)]):
            assert_same_image(ours, draw(pipe, **call))
    assert not torch.allclose(ours, stock)
    assert torch.equal(draw(pipe, **call), stock)


@SUPPORTED
def test_skyreels_leaves_the_unconditional_call_alone():
    """Its output is stock's, the conditional one's is that without guidance."""
    pipe = testing.skyreels()
    call = {"prompt": None, "prompt_embeds": padded(9), **VIDEO}
    both = {"guidance": 5.0, "negative_prompt_embeds": padded(3, seed=4)}
    outputs = []
    pipe.transformer.register_forward_hook(lambda _, __, out: outputs.append(out[0]))
    draw(pipe, **call, **both)
    with nasa(pipe, negative_prompt_embeds=padded(5, seed=2), alpha=0.5):
        draw(pipe, **call, guidance=1.0)
        draw(pipe, **call, **both)
    _, stock, guided, conditional, unconditional = outputs
    assert torch.equal(unconditional, stock)
    assert torch.equal(conditional, guided)


@SUPPORTED
def test_skyreels_steps_are_those_of_its_matrix():
    """One block after another takes more steps than the scheduler has: fractions are of all."""
    pipe, seen = testing.skyreels(), []
    call = {"prompt": None, "prompt_embeds": padded(9), "steps": 4, "guidance": 1.0}
    handle = enable_nasa(pipe, negative_prompt_embeds=padded(5, seed=2), stop=0.5)
    hook = next(iter(handle._guidances[0].guided_layers.values()))
    pipe.transformer.register_forward_hook(lambda *_: seen.append(hook.last_call is not None))
    pipe.transformer.register_forward_hook(lambda *_: setattr(hook, "last_call", None))
    draw(pipe, **call, **VIDEO, **MODES["blocks one after another"])
    assert len(seen) > 4
    assert seen == [i / len(seen) < 0.5 for i in range(len(seen))]


@SUPPORTED
def test_skyreels_encodes_a_string(monkeypatch):
    from diffusers.pipelines.skyreels_v2 import pipeline_skyreels_v2_diffusion_forcing as module

    monkeypatch.setattr(module, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    pipe = testing.skyreels()
    handle = enable_nasa(pipe, "blurry")
    assert handle.alpha == 0.5 and handle.report().keys_neg == 512


@pytest.mark.skipif(ATTENTION is not None, reason="only before diffusers 0.36")
def test_skyreels_of_an_older_diffusers_is_refused():
    with pytest.raises(ValueError, match=r"from diffusers 0\.36 on"):
        enable_nasa(
            SimpleNamespace(transformer=testing.skyreels_transformer()),
            negative_prompt_embeds=padded(5),
        )
