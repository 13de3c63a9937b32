"""`torch.compile(fullgraph=True)` of the denoiser: same image, no break, no needless recompile."""

import changes
import pytest
import torch
from counting import Projections
from diffusers.hooks import HookRegistry, ModelHook
from drawing import assert_same_image
from nasa_diffusers import enable_nasa, nasa, testing
from oracle import algorithm_1
from peft import LoraConfig
from torch._dynamo.utils import counters


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compile_in_place(pipe):
    pipe.transformer.compile(fullgraph=True, backend="eager")


def compile_wrapper(pipe):
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="eager")


def compile_blocks(pipe):
    for block in pipe.transformer.transformer_blocks:
        block.compile(fullgraph=True, backend="eager")


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("order", ["compiled last", "compiled first"])
@pytest.mark.parametrize(
    "compile", [compile_in_place, compile_wrapper, compile_blocks], ids=lambda f: f.__name__[8:]
)
def test_same_image(draw, compile, order):
    """Compiled after NASA was enabled, or before, and then traced already without it."""
    pipe = testing.pixart()
    stock = draw(pipe)
    with nasa(pipe, "blurry", alpha=0.5):
        expected = draw(pipe)
    if order == "compiled first":
        compile(pipe)
        assert_same_image(draw(pipe), stock)
    with nasa(pipe, "blurry", alpha=0.5) as handle:
        if order == "compiled last":
            compile(pipe)
        assert_same_image(draw(pipe), expected)
        assert graphs() > 0
        handle.alpha = 0
        assert_same_image(draw(pipe), stock)
    assert_same_image(draw(pipe), stock)


def test_repeated_blocks_are_graphs_of_their_own_under_any_hook(draw):
    """torch.compile ties a graph to a hooked `forward`: an empty hook of diffusers has as many."""

    def repeated_blocks(pipe):
        torch._dynamo.reset()
        counters.clear()
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        return draw(pipe, **random_text("wan", 7, 1)), graphs()

    stock, hooked, pipe = testing.wan(), testing.wan(), testing.wan()
    for name, module in hooked.transformer.named_modules():
        if name.endswith(".attn2"):
            HookRegistry.check_if_exists_or_initialize(module).register_hook(ModelHook(), "empty")
    negative = {"negative_prompt_embeds": random_text("wan", 9, 2)["prompt_embeds"]}
    with nasa(stock, **negative, alpha=0.5):
        expected = draw(stock, **random_text("wan", 7, 1))
    with nasa(pipe, **negative, alpha=0.5):
        image, ours = repeated_blocks(pipe)
    assert_same_image(image, expected)
    assert ours == repeated_blocks(hooked)[1] == 2
    assert repeated_blocks(stock)[1] == 1


def test_settings_do_not_recompile(draw):
    """Alpha, steps, seeds and another negative prompt of the same length are data."""
    pipe = testing.pixart()
    compile_in_place(pipe)
    with nasa(pipe, "blur", alpha=0.5, stop=0.5) as handle:
        draw(pipe, steps=4)
        compiled = graphs()
        assert compiled > 0
        for alpha in (0.1, 0.7, [0.3], torch.tensor(0.2)):
            handle.alpha = alpha
            draw(pipe, steps=4)
        handle.set_negative_prompt("fuzz")
        draw(pipe, "a dog", seed=3)
        assert graphs() == compiled
        draw(pipe, ["a dog", "a cat"], steps=4)
        for_two = graphs()
        for alpha in ([0.1, 0.7], [0.3, 0], 0.5):
            handle.alpha = alpha
            draw(pipe, ["a dog", "a cat"], steps=4)
        assert graphs() == for_two


def test_unet_with_guidance_and_a_region(sd, draw):
    plain = testing.stable_diffusion()
    sd.unet.compile(fullgraph=True, backend="eager")
    for pipe in (plain, sd):
        enable_nasa(pipe, "blurry", alpha=torch.linspace(0, 1, 256).view(16, 16))
    assert_same_image(draw(sd, guidance=5.0), draw(plain, guidance=5.0))
    assert graphs() > 0


@pytest.mark.parametrize("build", [testing.sana, testing.wan], ids=["sana", "wan"])
def test_other_families(build, draw):
    pipe = build()
    text = {"prompt_embeds": torch.randn(1, 7, 32)}
    if build is testing.sana:
        text["prompt_attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    with nasa(pipe, negative_prompt_embeds=torch.randn(1, 9, 32), alpha=0.5):
        expected = draw(pipe, prompt=None, **text)
        pipe.transformer.compile(fullgraph=True, backend="eager")
        assert_same_image(draw(pipe, prompt=None, **text), expected)
    assert graphs() > 0


def test_inductor(draw):
    """The whole way down, once: the op is opaque to Inductor, what is around it is not."""
    pipe = testing.pixart()
    with nasa(pipe, "blurry", alpha=0.5):
        expected = draw(pipe)
        pipe.transformer.transformer_blocks[0].attn2.compile(fullgraph=True)
        assert_same_image(draw(pipe), expected)


# ---- text keys and values are inputs of the graph ------------------------------------------------


class Graphs:
    """A compiler back end that runs what it is given, and keeps it."""

    def __init__(self):
        self.seen = []

    def __call__(self, graph, inputs):
        self.seen.append(graph)
        return graph

    def projects_text(self):
        """Whether weights of text projections are inputs of any graph."""
        names = [n.name for g in self.seen for n in g.graph.nodes if n.op == "placeholder"]
        assert any("attn2" in name and "to_q" in name for name in names)
        return any("attn2" in name and "to_k" in name for name in names)


BUILDS = {
    "sd": testing.stable_diffusion,
    "pixart": testing.pixart,
    "sana": testing.sana,
    "wan": testing.wan,
}


def random_text(build, n, seed):
    text = torch.randn(1, n, 32, generator=torch.Generator().manual_seed(seed))
    masks = {"prompt_attention_mask": torch.ones(1, n)} if build in ("pixart", "sana") else {}
    return {"prompt": None, "prompt_embeds": text, **masks}


@pytest.mark.parametrize("build", BUILDS)
def test_text_is_projected_outside_and_kept(build, draw):
    """Once per layer for the same prompts; prompts, their lengths and alpha are data."""
    plain, pipe = BUILDS[build](), BUILDS[build]()
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    graphs = Graphs()
    # no recompilation: the first one would be an error
    with torch._dynamo.config.patch(error_on_recompile=True):
        denoiser.compile(fullgraph=True, backend=graphs)
        count = Projections(denoiser)
        layers = sum(name.endswith("attn2") for name, _ in denoiser.named_modules())
        negative = {"negative_prompt_embeds": random_text(build, 9, 0)["prompt_embeds"]}
        handles = [enable_nasa(each, **negative, alpha=0.5) for each in (plain, pipe)]

        def compare(**options):
            assert_same_image(draw(pipe, **options), draw(plain, **options))
            return count.take()

        first = random_text(build, 7, 1)
        assert compare(steps=2, **first) == layers
        assert not graphs.projects_text()
        assert compare(steps=2, seed=3, **first) == 0
        for handle in handles:
            handle.alpha = 0.2
        assert compare(**first) == 0
        assert compare(**random_text(build, 7, 2)) == layers
        if build == "sd":
            # a stock transformer is traced again for another length
            assert compare(**random_text(build, 12, 3)) == layers
        for handle in handles:
            handle.set_negative_prompt(
                negative_prompt_embeds=random_text(build, 5, 4)["prompt_embeds"]
            )
        assert compare(**first) == layers
        assert compare(**first) == 0
    # one graph for the whole denoiser
    assert len(graphs.seen) == 1


@pytest.mark.parametrize("compile", [compile_wrapper, compile_blocks], ids=lambda f: f.__name__[8:])
def test_text_is_projected_outside_however_it_is_compiled(draw, compile):
    pipe = testing.pixart()
    count = Projections(pipe.transformer)
    with nasa(pipe, "blurry", alpha=0.5):
        compile(pipe)
        draw(pipe, steps=4)
        assert count.take() == 2
        draw(pipe)
        assert count.take() == 0


def test_a_weight_that_changes_is_seen_by_the_graph(draw):
    def change(pipe):
        with torch.no_grad():
            pipe.transformer.transformer_blocks[0].attn2.to_k.weight.mul_(2)

    pipe, fresh = testing.pixart(), testing.pixart()
    pipe.transformer.compile(fullgraph=True, backend="eager")
    with nasa(pipe, "blurry", alpha=0.5):
        before = draw(pipe)
        change(pipe)
        after = draw(pipe)
    change(fresh)
    with nasa(fresh, "blurry", alpha=0.5):
        assert_same_image(after, draw(fresh))
    assert not torch.allclose(after, before)


def test_a_lora_scale_of_the_call_acts_on_text_in_the_graph(draw):
    """It holds inside the denoiser only, so there the text is projected."""
    oracle, pipe = testing.wan(), testing.wan()
    for each in (oracle, pipe):
        torch.manual_seed(1)
        each.transformer.add_adapter(
            LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
        )
        each.transformer.requires_grad_(False)
    text, embeds = random_text("wan", 7, 1), random_text("wan", 9, 2)["prompt_embeds"]
    with torch.no_grad():
        negative = oracle.transformer.condition_embedder.text_embedder(embeds)
    graphs, drawn = Graphs(), []
    pipe.transformer.compile(fullgraph=True, backend=graphs)
    with (
        algorithm_1(oracle.transformer, [(negative, None, 0.5)]),
        nasa(pipe, negative_prompt_embeds=embeds, alpha=0.5),
    ):
        for options in ({}, {"attention_kwargs": {"scale": 0.1}}, {}):
            drawn.append(draw(pipe, **text, **options))
            assert_same_image(drawn[-1], draw(oracle, **text, **options))
            assert graphs.projects_text() == (len(drawn) > 1)
    assert not torch.allclose(drawn[0], drawn[1])


def test_weights_that_offloading_brings_with_a_block(draw):
    """On the CPU nothing moves, but the text must not be projected before its block is called."""
    changes.skip_without_group_offload()
    pipe = testing.stable_diffusion()
    with nasa(pipe, "blurry", alpha=0.5):
        expected = draw(pipe)
    changes.offload_blocks(pipe.unet)
    with nasa(pipe, "blurry", alpha=0.5) as handle:
        pipe.unet.mid_block.attentions[0].compile(backend="eager")
        guidance = handle._guidances[0]
        assert guidance._is_compiled(None) and not guidance._can_prepare({})
        assert_same_image(draw(pipe), expected)
