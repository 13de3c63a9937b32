"""Rule "projected" in the CUDA C++ kernels, executed on the CPU from their PTX.

What Z- has and Z+ has not is taken, and the length of Z+ is kept, of each head and row. Rows are
summed over d in the epilogue, so what can go wrong is who adds what: lanes, tiles of a warp, warps
that share the columns of a row.
"""

import pytest
import torch
from support.cuda_emulation import assert_as_accurate_as_eager, eager, forward, nvcc
from test_cuda_forward import NAN, Shape, make
from test_cuda_joint import make_joint

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc: the PTX cannot be built")

PATHS = ("short", "long", "sm90-short", "sm90-long")
SDXL = Shape("sdxl", 1, 33, 2, 77, 77, 64)
# two tiles of a warp, one whose columns would not fit beside the other's, masks of 128 keys, warps
# that share a row by two and by four
SHAPES = (
    (SDXL, PATHS),
    (Shape("sd15-64", 1, 40, 1, 77, 20, 40), PATHS),
    (Shape("sd15-32", 1, 40, 1, 30, 77, 80), PATHS),
    (Shape("sd15-16", 1, 20, 1, 77, 77, 160), PATHS[1:]),
    (Shape("pixart", 1, 33, 1, 120, 120, 72), PATHS),
    (Shape("wan", 1, 33, 1, 140, 130, 128), ("long", "sm90-long")),
    (Shape("odd-d", 1, 19, 1, 5, 33, 33), ("short", "long")),
    (Shape("d192", 1, 70, 1, 131, 30, 192), ("long",)),
    (Shape("d256", 1, 40, 1, 60, 30, 256), ("long",)),
)
CALLS = [(shape, path) for shape, paths in SHAPES for path in paths]


def project(inputs: dict, alpha, **how) -> torch.Tensor:
    return forward(**inputs, alpha=alpha, rule="projected", **how)


def check(inputs: dict, alpha, path: str, **masks) -> torch.Tensor:
    o = project(inputs, alpha, path=path, **masks)
    wide = {name: x.double() for name, x in inputs.items()}
    exact = eager(**wide, alpha=alpha, rule="projected", **masks)
    assert_as_accurate_as_eager(o, exact, eager(**inputs, alpha=alpha, rule="projected", **masks))
    return o


def with_negative(inputs: dict, k: torch.Tensor, v: torch.Tensor) -> dict:
    return inputs | {"k_neg": k, "v_neg": v}


@pytest.mark.parametrize(("shape", "path"), CALLS, ids=lambda x: str(x))
def test_matches_fp64(shape, path):
    check(make(shape, torch.bfloat16), 1.5, path)


@pytest.mark.parametrize("path", PATHS)
def test_masks_and_alpha_maps_match_fp64(path):
    generator = torch.Generator().manual_seed(3)
    masks = {
        f"mask_{side}": torch.rand(1, 77, generator=generator) < 0.6 for side in ("pos", "neg")
    }
    alpha = torch.linspace(-1, 3, SDXL.l)[None, :, None].expand(1, -1, 2)
    check(make(SDXL, torch.float16), alpha, path, **masks)


@pytest.mark.parametrize("path", PATHS)
def test_equal_prompts_leave_the_positive_one_at_every_alpha(path):
    inputs = make(SDXL, torch.bfloat16)
    inputs = with_negative(inputs, inputs["k_pos"], inputs["v_pos"])
    alone = forward(**inputs, alpha=0.0, path=path)
    for alpha in (0.5, -3.0, 1e4):
        assert torch.equal(project(inputs, alpha, path=path), alone)


@pytest.mark.parametrize("path", PATHS)
def test_alpha_zero_is_the_positive_prompt_whatever_the_other_holds(path):
    inputs = make(SDXL, torch.bfloat16)
    alone = forward(**inputs, alpha=0.0, path=path)
    sound = project(inputs, 2.0, path=path)
    inputs["v_neg"][:, 3] = NAN
    assert torch.equal(project(inputs, 0.0, path=path), alone)
    alpha = torch.zeros(1, SDXL.l, 2)
    alpha[:, 5:9] = 2.0
    o = project(inputs, alpha, path=path)
    assert torch.equal(o[:, :5], alone[:, :5]) and torch.equal(o[:, 9:], alone[:, 9:])
    # a NaN that counts is seen
    assert o[:, 5:9].isnan().all()
    assert sound.isfinite().all() and not torch.equal(sound, alone)


@pytest.mark.parametrize("path", PATHS)
def test_prompts_without_keys(path):
    inputs = make(SDXL, torch.bfloat16)
    alone = forward(**inputs, alpha=0.0, path=path)
    none = {name: inputs[name][:, :0] for name in ("k_pos", "v_pos", "k_neg", "v_neg")}
    nothing = with_negative(inputs, none["k_neg"], none["v_neg"])
    assert torch.equal(project(nothing, 2.0, path=path), alone)
    nothing = inputs | {"k_pos": none["k_pos"], "v_pos": none["v_pos"]}
    assert project(nothing, 2.0, path=path).count_nonzero() == 0


@pytest.mark.parametrize("path", PATHS)
def test_a_parallel_prompt_takes_nothing_and_its_scale_is_one_of_alpha(path):
    inputs = make(SDXL, torch.float16)
    alone = forward(**inputs, alpha=0.0, path=path)
    parallel = with_negative(inputs, inputs["k_pos"], -0.5 * inputs["v_pos"])
    o = project(parallel, 3.0, path=path)
    # the last bit of a few
    torch.testing.assert_close(o, alone, rtol=2**-10, atol=1e-6)
    doubled = with_negative(inputs, inputs["k_neg"], 2 * inputs["v_neg"])
    assert torch.equal(project(doubled, 0.75, path=path), project(inputs, 1.5, path=path))


@pytest.mark.parametrize("path", PATHS)
def test_one_key_of_each_prompt_is_a_line_of_geometry(path):
    inputs = make(SDXL._replace(n_pos=1, n_neg=1), torch.bfloat16)
    p, n = (inputs[f"v_{side}"].double() for side in ("pos", "neg"))
    across = n - (n * p).sum(-1, keepdim=True) / (p * p).sum(-1, keepdim=True) * p
    length, unit = p.norm(dim=-1, keepdim=True), across / across.norm(dim=-1, keepdim=True)
    o = project(inputs, 1e6, path=path)
    torch.testing.assert_close(o.double(), (-length * unit).expand(o.shape), rtol=0.01, atol=1e-3)
    o = project(inputs, 1.0, path=path)
    torch.testing.assert_close(
        o.double().norm(dim=-1, keepdim=True), length.expand(*o.shape[:3], 1), rtol=2e-3, atol=0
    )


@pytest.mark.parametrize(
    ("shape", "kind"),
    [*((SHAPES[i][0], kind) for i in (0, 2, 4) for kind in ("", "sm90-")), (SHAPES[3][0], "sm90-")],
    ids=str,
)
def test_the_kernel_cannot_be_seen_in_the_result(shape, kind):
    inputs = make(shape, torch.bfloat16)
    short = project(inputs, 1.5, path=kind + "short")
    assert torch.equal(short, project(inputs, 1.5, path=kind + "long"))
    joint = make_joint(shape, torch.bfloat16, rule="projected", text_pos=3, text_neg=4)
    short = forward(**inputs, alpha=1.5, joint=joint, path=kind + "short")
    assert torch.equal(short, forward(**inputs, alpha=1.5, joint=joint, path=kind + "long"))


@pytest.mark.parametrize("path", PATHS)
def test_equal_prompts_beside_shared_keys_leave_the_positive_one(path):
    inputs = make(SDXL, torch.bfloat16)
    inputs = with_negative(inputs, inputs["k_pos"], inputs["v_pos"])
    joint = make_joint(SDXL, torch.bfloat16, rule="projected")
    alone = forward(**inputs, alpha=0.0, joint=joint, path=path)
    assert torch.equal(forward(**inputs, alpha=2.5, joint=joint, path=path), alone)
    zeros = torch.zeros(1, SDXL.l, 2)
    inputs["v_neg"] = torch.full_like(inputs["v_neg"], NAN)
    assert torch.equal(forward(**inputs, alpha=zeros, joint=joint, path=path), alone)


@pytest.mark.parametrize(
    ("shape", "path"),
    [*((SDXL, path) for path in PATHS), (SHAPES[2][0], "short"), (SHAPES[3][0], "long")],
    ids=str,
)
def test_without_negative_keys_the_shared_ones_are_projected(shape, path):
    """Z- is O_s then, and not nothing: Hopper's kernel for one prompt would not do."""
    inputs = make(shape, torch.bfloat16)
    joint = make_joint(shape, torch.bfloat16, rule="projected")
    nobody = {"mask_neg": torch.zeros(1, shape.n_neg, dtype=torch.bool)}
    masked = forward(**inputs, alpha=2.0, joint=joint, path=path, **nobody)
    inputs |= {"k_neg": inputs["k_neg"][:, :0], "v_neg": inputs["v_neg"][:, :0]}
    empty = forward(**inputs, alpha=2.0, joint=joint, path=path)
    torch.testing.assert_close(empty, masked, rtol=2**-7, atol=1e-3)
    alone = forward(**inputs, alpha=0.0, joint=joint, path=path)
    assert not torch.allclose(empty, alone, rtol=0.1, atol=0.1)
