"""The CUDA C++ forward kernels against fp64, executed on the CPU from the PTX of the build.

Every case runs the very instructions that ptxas turns into the kernel. What only a GPU can show
(ptxas itself, races between warps, speed) is not shown here; tests/cuda/test_cuda_sass.py looks at
the machine code, and the suite runs again wherever there is a GPU.
"""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from support.cuda_emulation import (
    REPORTS,
    assert_as_accurate_as_eager,
    eager,
    forward,
    nvcc,
    path_of,
)

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc: the PTX cannot be built")

DTYPES = (torch.float16, torch.bfloat16)
NAN = float("nan")


class Shape(NamedTuple):
    name: str
    b: int
    l: int
    h: int
    n_pos: int
    n_neg: int
    d: int

    def __str__(self) -> str:
        return f"{self.name}-b{self.b}-l{self.l}-h{self.h}-n{self.n_pos}+{self.n_neg}-d{self.d}"


MODELS = (
    Shape("sd15-64", 1, 40, 2, 77, 77, 40),
    Shape("sd15-32", 1, 17, 1, 77, 77, 80),
    Shape("sd15-16", 1, 17, 1, 77, 77, 160),
    Shape("sdxl", 2, 65, 2, 77, 77, 64),
    Shape("pixart", 1, 33, 1, 120, 120, 72),
    Shape("wan", 1, 33, 1, 140, 260, 128),
)
EDGES = (
    Shape("one", 1, 1, 1, 1, 1, 1),
    Shape("odd-d", 1, 19, 2, 5, 33, 33),
    Shape("d256", 1, 17, 1, 77, 30, 256),
    Shape("d192", 1, 65, 1, 131, 30, 192),
    Shape("d96", 1, 15, 1, 80, 16, 96),
    Shape("full-tiles", 1, 64, 1, 128, 80, 128),
    Shape("no-positive", 1, 18, 1, 0, 9, 64),
    Shape("no-negative", 1, 18, 1, 9, 0, 64),
    Shape("no-keys", 1, 18, 1, 0, 0, 64),
    Shape("ragged-long", 1, 70, 1, 129, 257, 48),
)


def in_turn(shapes: Sequence[Shape]) -> list[tuple[Shape, torch.dtype]]:
    """Each shape in one of the dtypes: a kernel is one template, and the interpreter slow. MODELS
    have both in the forward pass, so that the instructions of each dtype meet each head_dim."""
    return [(shape, DTYPES[i % 2]) for i, shape in enumerate(shapes)]


def make(shape: Shape, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    b, l, h, d = shape.b, shape.l, shape.h, shape.d
    sizes = {"q": l, "k_pos": shape.n_pos, "v_pos": shape.n_pos}
    sizes |= {"k_neg": shape.n_neg, "v_neg": shape.n_neg}
    return {
        name: torch.randn(b, n, h, d, generator=generator).to(dtype) for name, n in sizes.items()
    }


def check(inputs: dict, alpha, mask_pos=None, mask_neg=None, scale=None, **how) -> torch.Tensor:
    o = forward(**inputs, alpha=alpha, mask_pos=mask_pos, mask_neg=mask_neg, scale=scale, **how)
    masks = {"mask_pos": mask_pos, "mask_neg": mask_neg, "scale": scale}
    wide = {k: m.double() if torch.is_tensor(m) and m.is_floating_point() else m
            for k, m in masks.items()}  # fmt: skip
    wide_alpha = alpha.double() if torch.is_tensor(alpha) else alpha
    exact = eager(**{k: x.double() for k, x in inputs.items()}, alpha=wide_alpha, **wide)
    assert_as_accurate_as_eager(o, exact, eager(**inputs, alpha=alpha, **masks))
    return o


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MODELS, ids=str)
def test_matches_fp64(shape, dtype):
    check(make(shape, dtype), alpha=0.5)


@pytest.mark.parametrize(
    ("shape", "dtype"), in_turn([s for s in EDGES if s.n_pos and s.n_neg]), ids=str
)
def test_edges_match_fp64(shape, dtype):
    check(make(shape, dtype), alpha=-1.25)


def test_a_prompt_without_keys_contributes_nothing():
    inputs = make(EDGES[6], torch.float16)
    weight = {"k_pos": inputs["k_neg"], "v_pos": inputs["v_neg"]}
    negative_alone = forward(**(inputs | weight), alpha=0.0)
    assert torch.equal(forward(**inputs, alpha=1.0), -negative_alone)
    inputs = make(EDGES[7], torch.float16)
    assert torch.equal(forward(**inputs, alpha=1.0), forward(**inputs, alpha=0.0))
    assert forward(**make(EDGES[8], torch.float16), alpha=1.0).count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [MODELS[0], MODELS[4], MODELS[5]], ids=str)
def test_equal_prompts_cancel_to_zero(shape, dtype):
    inputs = make(shape._replace(n_neg=shape.n_pos), dtype)
    inputs |= {"k_neg": inputs["k_pos"], "v_neg": inputs["v_pos"]}
    assert forward(**inputs, alpha=1.0).count_nonzero() == 0


@pytest.mark.parametrize("shape", [MODELS[3], MODELS[5]], ids=str)
def test_alpha_zero_is_the_positive_prompt_alone(shape):
    """Whatever the negative prompt is, and whichever kernel its length leads to."""
    inputs = make(shape, torch.bfloat16)
    none = {"k_neg": inputs["k_neg"][:, :0], "v_neg": inputs["v_neg"][:, :0]}
    alone = forward(**(inputs | none), alpha=1.0)
    zeros = torch.zeros(shape.b, shape.l, shape.h)
    assert torch.equal(forward(**inputs, alpha=0.0), alone)
    assert torch.equal(forward(**inputs, alpha=zeros), alone)
    longer = make(shape._replace(n_neg=140), torch.bfloat16, seed=1)
    longer = inputs | {"k_neg": longer["k_neg"], "v_neg": longer["v_neg"]}
    assert torch.equal(forward(**longer, alpha=zeros), alone)


@pytest.mark.parametrize("shape", [MODELS[0], MODELS[4]], ids=str)
def test_the_kernel_cannot_be_seen_in_the_result(shape):
    """The launcher takes forward_short where shared memory allows: the bits must not tell."""
    assert path_of(shape.d, shape.n_pos, shape.n_neg) == "short"
    inputs = make(shape, torch.bfloat16)
    short = forward(**inputs, path="short")
    assert torch.equal(short, forward(**inputs, path="long"))
    assert torch.equal(short, forward(**inputs, path="short", blocks=3))


def cut_out(inputs: dict) -> tuple[dict, dict, dict]:
    """Masks that leave out the last 7 positive and all but 3 negative keys, whose rows become NaN.

    Returns ``(inputs without these keys, masks, masks of the shorter prompts)``: the kernel that a
    shorter prompt leads to may be another one, but with a mask its scores are not.
    """
    b, n_pos, n_neg = (*inputs["k_pos"].shape[:2], inputs["k_neg"].shape[1])
    keep_pos, keep_neg = torch.arange(n_pos) < n_pos - 7, torch.arange(n_neg) < 3
    cut = dict(inputs)
    for side, keep in (("pos", keep_pos), ("neg", keep_neg)):
        for name in (f"k_{side}", f"v_{side}"):
            cut[name] = inputs[name][:, keep]
            inputs[name][:, ~keep] = NAN
    bias = torch.zeros(b, n_neg).masked_fill(~keep_neg, float("-inf"))
    masks = {"mask_pos": keep_pos.expand(b, -1), "mask_neg": bias}
    ones = {"mask_pos": torch.ones(b, n_pos - 7, dtype=torch.bool), "mask_neg": torch.zeros(b, 3)}
    return cut, masks, ones


MASKED = (MODELS[0], MODELS[4], MODELS[5]._replace(n_pos=150, n_neg=40))


@pytest.mark.parametrize("shape", MASKED, ids=str)
def test_masked_keys_are_absent(shape):
    """Bit for bit the result without them, NaN in their rows included."""
    inputs = make(shape, torch.float16)
    cut, masks, ones = cut_out(inputs)
    assert torch.equal(forward(**inputs, **masks), forward(**cut, **ones))


def test_a_prompt_with_every_key_masked_contributes_nothing():
    inputs = make(MODELS[3], torch.bfloat16)
    nothing = torch.zeros(2, 77, dtype=torch.bool)
    alone = forward(**inputs, alpha=0.0)
    inputs["v_neg"][:] = NAN
    assert torch.equal(forward(**inputs, alpha=0.5, mask_neg=nothing), alone)


@pytest.mark.parametrize("kind", ["bool", "fp32", "half", "broadcast"])
@pytest.mark.parametrize("shape", [MODELS[3], MASKED[2]], ids=str)
def test_masks_match_fp64(shape, kind):
    generator = torch.Generator().manual_seed(3)
    bias = torch.randn(shape.b, shape.n_pos, generator=generator) * 2
    bias[:, 5] = -10000.0
    mask_neg = torch.rand(shape.b, shape.n_neg, generator=generator) < 0.6
    mask_pos = {
        "bool": bias > 0,
        "fp32": bias,
        "half": bias.half(),
        "broadcast": bias[:1].expand(shape.b, -1),
    }[kind]
    check(make(shape, torch.float16), 0.5, mask_pos, mask_neg)


def test_a_bias_of_log_m_is_m_keys():
    """Padded tokens that are identical can be one key."""
    inputs = make(Shape("pads", 1, 16, 1, 12, 7, 64), torch.float16)
    whole = dict(inputs)
    for name in ("k_pos", "v_pos"):
        pads = inputs[name][:, -1:].expand(-1, 9, -1, -1)
        whole[name] = torch.cat([inputs[name][:, :-1], pads], 1)
    bias = torch.zeros(1, 12)
    bias[:, -1] = torch.tensor(9.0).log()
    difference = forward(**inputs, mask_pos=bias) - forward(**whole)
    assert difference.abs().max() <= 2e-3


@pytest.mark.parametrize("scale", [-0.2, 0.0, 3.0])
def test_any_scale(scale):
    check(make(MODELS[0], torch.bfloat16), 0.5, scale=scale)


ALPHAS = {
    "sample": torch.tensor([0.2, -1.0])[:, None, None].expand(2, 65, 2),
    "head": torch.tensor([0.0, 0.7]).expand(2, 65, 2),
    "region": torch.linspace(-1, 2, 65)[None, :, None].expand(2, 65, 2),
    "all": torch.linspace(-1, 2, 2 * 65 * 2).reshape(2, 65, 2),
    "number": torch.tensor(0.3).expand(2, 65, 2),
}


@pytest.mark.parametrize("alpha", ALPHAS)
def test_alpha_maps_match_fp64(alpha):
    check(make(MODELS[3], torch.bfloat16), ALPHAS[alpha])


def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    b, n, h, d = x.shape
    if how == "bhnd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "padded-rows":  # rows of d + 8: still on 16 bytes
        return torch.nn.functional.pad(x, (0, 8))[..., :d]
    if how == "odd-rows":  # rows of d + 1: element by element
        return torch.nn.functional.pad(x, (0, 1))[..., :d]
    if how == "odd-start":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if how == "fused-qkv":
        return torch.stack([x, x * 0, x * 0], 3).flatten(2, 3)[:, :, ::3]
    raise KeyError(how)


@pytest.mark.parametrize("how", ["bhnd", "padded-rows", "odd-rows", "odd-start", "fused-qkv"])
@pytest.mark.parametrize("path", ["short", "long"])
def test_strides_do_not_matter(how, path):
    inputs = make(Shape("strides", 2, 18, 2, 21, 30, 40), torch.float16)
    views = {name: strided(x, how) for name, x in inputs.items()}
    assert all(torch.equal(x, inputs[name]) for name, x in views.items())
    assert torch.equal(forward(**views, path=path), forward(**inputs, path=path))


@pytest.mark.parametrize("path", ["short", "long"])
def test_a_prompt_for_the_whole_batch_is_read_where_it_is(path):
    inputs = make(Shape("broadcast", 3, 17, 2, 30, 30, 64), torch.bfloat16)
    one = {name: x[:1, :, :1].expand(3, -1, 2, -1) for name, x in inputs.items() if name != "q"}
    copies = {name: x.contiguous() for name, x in one.items()}
    views = forward(inputs["q"], **one, path=path)
    assert torch.equal(views, forward(inputs["q"], **copies, path=path))


def test_large_scores_do_not_overflow():
    inputs = make(MODELS[0], torch.bfloat16)
    check(inputs | {"q": inputs["q"] * 100}, 0.5)


@pytest.mark.parametrize("path", ["short", "long"])
def test_fragments_are_read_without_bank_conflicts(path):
    """Rows of a tile are padded so that the eight rows of an 8x8 matrix lie in distinct banks."""
    for d in (40, 64, 72, 80, 128, 160):
        REPORTS.clear()
        forward(**make(Shape("banks", 1, 16, 1, 77, 77, d), torch.bfloat16), path=path)
        launch = REPORTS[-1]
        code = launch.kernel.kernel.instructions
        lines = {c.line for c in code if c.opcode.startswith("ldmatrix")}
        conflicts = {line for line, extra in launch.report.bank_conflicts.items() if extra}
        assert lines and not lines & conflicts
