"""Keys and values of negative prompts beside the text of cross-attention: made once for a prompt,
and again when anything has changed that they depend on."""

import diffusers
import pytest
import torch
from drawing import relative_error
from nasa_diffusers import NASA, nasa, testing_side
from peft import LoraConfig
from side_cases import CASES
from side_pipes import PIPES, draw
from test_side_walk import DFR, RUN, run

VERSIONS = [name for name in ("ltx2", "ltx2.3", "ltx2.5") if name in CASES]


class Tokens:
    """How many tokens each call of a projection was given."""

    def __init__(self, layer):
        self.seen = []
        layer.register_forward_hook(lambda _, args, __: self.seen.append(args[0].shape[1]))

    def since(self):
        seen, self.seen = self.seen, []
        return seen


@pytest.fixture(params=VERSIONS)
def version(request):
    return request.param.removeprefix("ltx").lstrip("2").lstrip(".") or "0"


@pytest.fixture
def pipe(version):
    return testing_side.ltx2(f"2.{version}")


def drawn(pipe, **others):
    return draw(pipe, PIPES["ltx2"][1], **others)


def test_once_for_a_prompt(pipe, version):
    """2.3's follow the time: once for each, and the same times come again in the next image."""
    layers = [pipe.transformer.transformer_blocks[1].attn2.to_k]
    layers.append(pipe.transformer.transformer_blocks[0].audio_attn2.to_v)
    tokens = [Tokens(layer) for layer in layers]
    with nasa(pipe, "blurry", NASA(0.5)) as handle:
        first = drawn(pipe, steps=3)
        # 16 of the prompt and 16 of the negative one
        expected = [32] * (3 if version == "3" else 1)
        assert [each.since() for each in tokens] == [expected] * 2
        report = handle.report()
        assert report.projection_flops > 0 and report.cache_bytes > 0
        assert torch.equal(drawn(pipe, steps=3), first)
        assert [each.since() for each in tokens] == [[]] * 2
        # others, and these again
        handle.set_negative_prompt("fuzzy")
        other = drawn(pipe, steps=3)
        handle.set_negative_prompt("blurry")
        [each.since() for each in tokens]
        assert torch.equal(drawn(pipe, steps=3), first)
        # nothing is kept
        handle.cache_limit = 0
        handle.clear_cache()
        [each.since() for each in tokens]
        assert torch.equal(drawn(pipe, steps=3), first)
        assert [each.since() for each in tokens] == [[32] * 3] * 2
    assert relative_error(first, other) > 1e-4


CHANGES = {
    "its projection": lambda model: model.transformer_blocks[0].attn2.to_v.weight.mul_(2),
    "its norm": lambda model: model.transformer_blocks[0].audio_attn2.norm_k.weight.mul_(2),
    "the sound's first": lambda model: (
        model.caption_projection
        if getattr(model, "caption_projection", None) is not None
        else model.transformer_blocks[0].audio_attn2.to_k
    ).apply(lambda part: part.weight.mul_(2) if isinstance(part, torch.nn.Linear) else None),
    "what modulates": lambda model: (
        model.transformer_blocks[0].prompt_scale_shift_table.add_(1)
        if hasattr(model.transformer_blocks[0], "prompt_scale_shift_table")
        else None
    ),
    "its time": lambda model: (
        model.prompt_adaln.linear.weight.mul_(3) if hasattr(model, "prompt_adaln") else None
    ),
}


@torch.no_grad()
def test_until_a_weight_changes(pipe):
    model = pipe.transformer
    with nasa(pipe, "blurry", NASA(0.5)) as handle:
        drawn(pipe)
        for name, change in CHANGES.items():
            change(model)
            kept = drawn(pipe)
            handle.clear_cache()
            assert torch.equal(kept, drawn(pipe)), name
        before = drawn(pipe)
        names = ["to_k", "to_v"]
        model.add_adapter(LoraConfig(r=2, target_modules=names, init_lora_weights=False))
        adapted = drawn(pipe)
        handle.clear_cache()
        assert torch.equal(adapted, drawn(pipe))
        assert relative_error(adapted, before) > 1e-4
        model.disable_adapters()
        assert torch.equal(drawn(pipe), before)


def test_of_rows_that_differ_each_its_own(pipe):
    """And under guidance, where half of the rows is not guided."""
    with nasa(pipe, ["blurry", "so dull"], NASA(0.5)) as handle:
        both = drawn(pipe, prompt=["a cat", "a dog"])
        assert torch.equal(drawn(pipe, prompt=["a cat", "a dog"]), both)
        handle.set_negative_prompt("blurry")
        alone = drawn(pipe, prompt="a cat")
        one = drawn(pipe, guidance_scale=3.0, negative_prompt="dull")
        assert torch.equal(drawn(pipe, guidance_scale=3.0, negative_prompt="dull"), one)
    assert relative_error(both[0], alone[0]) < 1e-4


@pytest.mark.parametrize("name", ["HunyuanDiTPipeline", "LuminaPipeline"])
def test_of_other_families_as_well(name):
    key = {"HunyuanDiTPipeline": "hunyuan-dit", "LuminaPipeline": "lumina"}[name]
    build, options = PIPES[key]
    pipe = build()
    blocks = getattr(pipe.transformer, "blocks", None) or pipe.transformer.layers
    tokens = Tokens(blocks[0].attn2.to_k)
    with nasa(pipe, "blurry", NASA(0.5)) as handle:
        first = draw(pipe, options, steps=3)
        assert len(tokens.since()) == 1
        assert torch.equal(draw(pipe, options, steps=3), first)
        assert len(tokens.since()) == 0
        with torch.no_grad():
            for part in (blocks[0].attn2.norm_k, getattr(blocks[0], "norm1_context", None)):
                if part is not None and part.weight is not None:
                    part.weight.mul_(2)
        changed = draw(pipe, options, steps=3)
        handle.clear_cache()
        assert torch.equal(draw(pipe, options, steps=3), changed)


def test_only_what_is_made_is_guided_where_references_lie_behind():
    """LTX-2.5's pipeline for details: 81 tokens of the video, then 20 of a given one."""
    name = "LTX2DFRPipeline"
    if not hasattr(diffusers, name):
        pytest.skip("a newer diffusers has it")
    build, options, _ = RUN[name]
    assert "reference_latents" in options and DFR.items() <= options.items()
    pipe, seen = build(name), []
    layer = pipe.transformer.transformer_blocks[0].attn2.to_out[0]
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    run(pipe, options)
    with nasa(pipe, "blurry", NASA(0.5)):
        run(pipe, options)
    stock, guided = seen
    given = options["reference_latents"][0, 0].numel()
    moved = (guided - stock).norm(dim=2)[0] / stock.norm(dim=2)[0]
    assert 0 < given < len(moved)
    assert (moved[:-given] > 1e-4).all() and (moved[-given:] < 1e-6).all()
