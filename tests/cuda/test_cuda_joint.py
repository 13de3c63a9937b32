"""The carry-in of a joint attention in the CUDA C++ kernels, executed on the CPU from their PTX.

Launch 1 of a joint attention attends to the keys that both prompts share and leaves O_s and its
log-sum-exp; the kernels here are launch 2. The oracle below is held to attention over the joined
keys, the kernels are held to the oracle.
"""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from support.cuda_emulation import (
    RULES,
    Joint,
    assert_as_accurate_as_eager,
    forward,
    forward_sm90,
    nvcc,
)
from support.formula import project
from test_cuda_forward import NAN, Shape, make, strided
from torch import Tensor

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc: the PTX cannot be built")

DTYPES = (torch.float16, torch.bfloat16)
MINUS_INFINITY = float("-inf")
PATHS = ("short", "long", "sm90-short", "sm90-long")
# rows of every kind in one tile
MIXED = Shape("mixed", 1, 40, 1, 30, 20, 64)
MIXED_TEXT = {"text_pos": 11, "text_neg": 9}
# and tiles of one kind alone
SD3 = Shape("sd3", 1, 150, 1, 77, 30, 64)
FLUX = Shape("flux", 1, 70, 1, 140, 256, 128)


class Segment(NamedTuple):
    o: Tensor  # [b, l, h, d]
    lse: Tensor  # [b, h, l]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Segment:
    """A softmax over one segment, in the dtype of q but for the log-sum-exp of half types."""
    # [b, h, l, n]
    scores = torch.einsum("blhd,bnhd->bhln", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], MINUS_INFINITY)
    lse = scores.to(torch.float64 if q.dtype == torch.float64 else torch.float32).logsumexp(-1)
    p = scores.softmax(-1).nan_to_num(0)
    return Segment(torch.einsum("bhln,bnhd->blhd", p, v), lse)


def oracle(inputs: dict, joint: Joint, alpha: float | Tensor, **masks: Tensor) -> Tensor:
    """O of a joint attention by the table of csrc/rules.cuh, in the dtype of the inputs."""
    b, l, h, _ = inputs["q"].shape
    pos = attend(inputs["q"], inputs["k_pos"], inputs["v_pos"], masks.get("mask_pos"))
    neg = attend(inputs["q"], inputs["k_neg"], inputs["v_neg"], masks.get("mask_neg"))
    s, p, n = (x.lse.to(pos.lse.dtype).transpose(1, 2) for x in (joint, pos, neg))  # [b, l, h]
    a = torch.as_tensor(alpha, dtype=p.dtype).expand(b, l, h)

    def share(x: Tensor, *others: Tensor) -> Tensor:
        return (x - torch.stack([x, *others]).logsumexp(0)).exp().nan_to_num(0)

    def whole(x: Tensor) -> Tensor:
        return (x > MINUS_INFINITY).to(a.dtype)

    zero = torch.zeros_like(a)
    image = {
        "nasa": (share(s, p) - a * share(s, n), share(p, s), -a * share(n, s)),
        "nasa-text": (share(s, p), share(p, s), -a * share(n, s)),
        "nasa-cross": (share(s, p), share(p, s), -a * whole(n)),
        "vsf": (share(s, p, n), share(p, s, n), -a * share(n, s, p)),
        "sum": (whole(s), whole(p), -a * whole(n)),
        "projected": (share(s, p), share(p, s), zero),
    }[joint.rule]
    kinds = (image, (share(s, p), share(p, s), zero), (share(s, n), zero, share(n, s)))
    sizes = (l - joint.text_pos - joint.text_neg, joint.text_pos, joint.text_neg)
    kind = torch.arange(3).repeat_interleave(torch.tensor(sizes))[None, :, None].expand(b, l, h)

    def mixed(rows: Sequence[tuple[Tensor, ...]]) -> Tensor:
        """The segments under the weights of each kind of rows."""
        o = torch.zeros_like(inputs["q"])
        for i, segment in enumerate((joint, pos, neg)):
            weight = torch.stack([row[i] for row in rows]).gather(0, kind[None])[0]
            o = o + weight[..., None].to(o.dtype) * segment.o.to(o.dtype)
        return o

    if joint.rule != "projected":
        return mixed(kinds)
    # Z- beside the Z+ of the image's rows; the texts' rows are what they are
    z_neg = mixed(((share(s, n), zero, share(n, s)), *kinds[1:]))
    strength = torch.where(kind == 0, a, 0)[..., None].to(z_neg.dtype)
    return project(mixed(kinds), z_neg, strength)


def make_joint(shape: Shape, dtype: torch.dtype, n_shared: int = 50, seed: int = 5, **how) -> Joint:
    """O_s and its log-sum-exp for the queries of make(shape, dtype)."""
    generator = torch.Generator().manual_seed(seed)
    q = make(shape, dtype)["q"]
    k, v = (torch.randn(shape.b, n_shared, shape.h, shape.d, generator=generator) for _ in "kv")
    o, lse = attend(q.double(), k.to(dtype).double(), v.to(dtype).double())
    return Joint(o.to(dtype), lse.float(), **how)


def check(shape: Shape, dtype: torch.dtype, joint: Joint, alpha=0.5, path=None, **masks) -> Tensor:
    inputs = make(shape, dtype)
    o = forward(**inputs, alpha=alpha, joint=joint, path=path, **masks)
    wide = {name: x.double() for name, x in inputs.items()}
    exact = oracle(wide, joint._replace(o=joint.o.double()), alpha, **masks)
    assert_as_accurate_as_eager(o, exact, oracle(inputs, joint, alpha, **masks))
    return o


@pytest.mark.parametrize("rule", ["nasa", "positive", "negative"])
def test_the_oracle_is_attention_over_the_joined_keys(rule):
    inputs = {name: x.double() for name, x in make(SD3, torch.float32).items()}
    generator = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, 1, 50, 1, 64, generator=generator, dtype=torch.float64)
    rows = {"text_pos": SD3.l} if rule == "positive" else {"text_neg": SD3.l}
    joint = Joint(*attend(inputs["q"], k, v), **({} if rule == "nasa" else rows))
    pos, neg = (
        attend(inputs["q"], torch.cat([k, inputs[f"k_{side}"]], 1),
               torch.cat([v, inputs[f"v_{side}"]], 1)).o
        for side in ("pos", "neg")
    )  # fmt: skip
    expected = {"nasa": pos - 0.5 * neg, "positive": pos, "negative": neg}[rule]
    torch.testing.assert_close(oracle(inputs, joint, 0.5), expected)


# each rule and each kernel with both dtypes, which take turns
@pytest.mark.parametrize(
    ("path", "rule", "dtype"),
    [
        (path, rule, DTYPES[(i + j) % 2])
        for i, path in enumerate(PATHS)
        for j, rule in enumerate(RULES)
    ],
    ids=str,
)
def test_rules_match_fp64(path, rule, dtype):
    check(MIXED, dtype, make_joint(MIXED, dtype, rule=rule, **MIXED_TEXT), path=path)


@pytest.mark.parametrize("path", PATHS)
def test_tiles_of_one_kind_match_fp64(path):
    """150 rows: 77 of the image, 43 of the positive text, 30 of the negative one."""
    joint = make_joint(SD3, torch.bfloat16, text_pos=43, text_neg=30)
    check(SD3, torch.bfloat16, joint, path=path)


@pytest.mark.parametrize(
    "shape",
    [
        FLUX,
        Shape("clip", 2, 33, 2, 77, 77, 64),
        Shape("two-shares", 1, 70, 1, 10, 140, 160),
        Shape("odd-d", 1, 19, 2, 5, 33, 33),
        Shape("d256", 1, 17, 1, 40, 30, 256),
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", ["nasa", "nasa-cross", "projected"])
def test_shapes_match_fp64(shape, rule):
    joint = make_joint(shape, torch.bfloat16, rule=rule, text_pos=3, text_neg=5)
    check(shape, torch.bfloat16, joint, alpha=0.8)


@pytest.mark.parametrize(
    ("shape", "path"),
    [
        (FLUX, "sm90-long"),
        (Shape("many-tiles", 1, 64 * 7 + 5, 1, 150, 30, 64), "sm90-long"),
        (Shape("many-tiles", 2, 64 * 7 + 5, 1, 77, 30, 40), "sm90-short"),
        (Shape("d160", 1, 70, 2, 77, 33, 160), "sm90-short"),
        (Shape("d160", 1, 70, 2, 177, 33, 160), "sm90-long"),
        (Shape("d128", 1, 200, 1, 128, 100, 128), "sm90-short"),
    ],
    ids=str,
)
def test_shapes_match_fp64_on_hopper(shape, path):
    """More rounds than stages; blocks whose rows leave out a prompt, and blocks that do not."""
    joint = make_joint(shape, torch.bfloat16, text_pos=33, text_neg=5)
    check(shape, torch.bfloat16, joint, alpha=0.8, path=path)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("vsf", "projected")])
@pytest.mark.parametrize("path", PATHS)
def test_without_shared_keys_it_is_the_attention_of_the_two_prompts(path, rule):
    """Bit for bit, whatever O_s holds."""
    inputs = make(MIXED, torch.bfloat16)
    nothing = Joint(
        torch.full_like(inputs["q"], NAN), torch.full((1, 1, MIXED.l), MINUS_INFINITY), rule
    )
    assert torch.equal(forward(**inputs, joint=nothing, path=path), forward(**inputs, path=path))


@pytest.mark.parametrize("path", PATHS)
def test_equal_prompts_cancel_to_zero(path):
    shape = SD3._replace(n_neg=SD3.n_pos)
    inputs = make(shape, torch.float16)
    inputs |= {"k_neg": inputs["k_pos"], "v_neg": inputs["v_pos"]}
    joint = make_joint(shape, torch.float16)
    assert forward(**inputs, alpha=1.0, joint=joint, path=path).count_nonzero() == 0


@pytest.mark.parametrize("run", [forward, forward_sm90], ids=["sm80", "sm90"])
@pytest.mark.parametrize("rule", RULES[:3])
@pytest.mark.parametrize("shape", [SD3, FLUX], ids=str)
def test_alpha_zero_is_the_attention_over_shared_and_positive_keys(shape, rule, run):
    """Whatever the negative prompt is, also where alpha is a map and its rows hold NaN."""
    inputs = make(shape, torch.bfloat16)
    joint = make_joint(shape, torch.bfloat16, rule=rule)
    none = {"k_neg": inputs["k_neg"][:, :0], "v_neg": inputs["v_neg"][:, :0]}
    alone = run(**(inputs | none), alpha=0.0, joint=joint)
    assert torch.equal(run(**inputs, alpha=0.0, joint=joint), alone)
    zeros = torch.zeros(shape.b, shape.l, shape.h)
    inputs["v_neg"][:, 3:] = NAN
    assert torch.equal(run(**inputs, alpha=zeros, joint=joint), alone)
    text = joint._replace(rule="nasa-cross", text_pos=shape.l)
    assert torch.equal(run(**inputs, alpha=0.7, joint=text), alone)


def test_alpha_zero_under_vsf_keeps_the_negative_prompt_in_the_denominator():
    joint = make_joint(SD3, torch.float16, rule="vsf")
    number = check(SD3, torch.float16, joint, alpha=0.0)
    assert torch.equal(number, forward(**make(SD3, torch.float16), joint=joint,
                                       alpha=torch.zeros(1, SD3.l, 1)))  # fmt: skip


@pytest.mark.parametrize("run", [forward, forward_sm90], ids=["sm80", "sm90"])
@pytest.mark.parametrize("shape", [SD3, FLUX], ids=str)
def test_a_text_attends_to_its_own_prompt_alone(shape, run):
    """NaN in the other one changes nothing, in tiles of one kind of rows and in tiles of all."""
    inputs = make(shape, torch.bfloat16)
    text = shape.l // 2
    joint = make_joint(shape, torch.bfloat16, text_pos=shape.l - text, text_neg=text)
    sound = run(**inputs, alpha=0.5, joint=joint)
    for side, rows in (("neg", slice(None, -text)), ("pos", slice(-text, None))):
        poisoned = inputs | {f"v_{side}": torch.full_like(inputs[f"v_{side}"], NAN)}
        o = run(**poisoned, alpha=0.5, joint=joint)
        assert torch.equal(o[:, rows], sound[:, rows])
        assert o.isnan().any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rule", RULES)
def test_a_segment_without_keys_contributes_nothing(rule, path):
    """Row by row for the shared keys, by a mask for a prompt; and a row without any key is 0."""
    joint = make_joint(MIXED, torch.bfloat16, rule=rule, **MIXED_TEXT)
    joint.lse[..., ::3] = MINUS_INFINITY
    joint.o[:, ::3] = 0
    nobody = torch.zeros(1, MIXED.n_neg, dtype=torch.bool)
    check(MIXED, torch.bfloat16, joint, path=path, mask_neg=nobody)
    masks = {"mask_pos": torch.zeros(1, MIXED.n_pos, dtype=torch.bool), "mask_neg": nobody}
    o = forward(**make(MIXED, torch.bfloat16), joint=joint, path=path, **masks)
    assert o[:, ::3].count_nonzero() == 0 and o.isfinite().all()


def test_nothing_but_shared_keys():
    """No prompt has a key: the long kernel walks over nothing."""
    shape = SD3._replace(n_pos=0, n_neg=0, d=128)
    joint = make_joint(shape, torch.float16, rule="nasa-cross")
    for path in ("long", "sm90-short", "sm90-long"):
        assert torch.equal(forward(**make(shape, torch.float16), joint=joint, path=path), joint.o)


@pytest.mark.parametrize("kind", ["", "sm90-"], ids=["sm80", "sm90"])
def test_the_kernel_cannot_be_seen_in_the_result(kind):
    inputs = make(SD3, torch.bfloat16)
    joint = make_joint(SD3, torch.bfloat16, text_pos=43, text_neg=30)
    short = forward(**inputs, joint=joint, path=kind + "short")
    assert torch.equal(short, forward(**inputs, joint=joint, path=kind + "long"))
    assert torch.equal(short, forward(**inputs, joint=joint, path=kind + "short", blocks=3))


@pytest.mark.parametrize(
    ("how", "path"),
    [
        *((how, path) for how in ("bhnd", "odd-rows", "odd-start") for path in PATHS[:2]),
        *((how, path) for how in ("bhnd", "padded-rows") for path in PATHS[2:]),
    ],
)
def test_strides_do_not_matter(how, path):
    shape = Shape("strides", 2, 18, 2, 21, 30, 40)
    inputs = make(shape, torch.float16)
    joint = make_joint(shape, torch.float16, text_pos=4, text_neg=3)
    expected = forward(**inputs, joint=joint, path=path)
    padded = torch.full((2, 2, 3, 18), NAN)
    padded[:, :, 1] = joint.lse
    views = joint._replace(o=strided(joint.o, how), lse=padded[:, :, 1])
    assert torch.equal(forward(**inputs, joint=views, path=path), expected)
    heads = joint.lse.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(forward(**inputs, joint=joint._replace(lse=heads), path=path), expected)


@pytest.mark.parametrize("path", ["long", "sm90-long"])
def test_masks_and_alpha_maps_match_fp64(path):
    generator = torch.Generator().manual_seed(3)
    mask_pos, mask_neg = (torch.rand(1, n, generator=generator) < 0.6 for n in (140, 256))
    alpha = torch.linspace(-1, 2, FLUX.l)[None, :, None]
    joint = make_joint(FLUX, torch.float16, rule="nasa-text", text_pos=9, text_neg=20)
    check(FLUX, torch.float16, joint, alpha, path, mask_pos=mask_pos, mask_neg=mask_neg)


@pytest.mark.parametrize("run", [forward, forward_sm90], ids=["sm80", "sm90"])
def test_large_scores_do_not_overflow(run):
    inputs = make(SD3, torch.bfloat16)
    shared = make_joint(SD3, torch.bfloat16)
    o = run(**(inputs | {"q": inputs["q"] * 100}), joint=shared._replace(lse=shared.lse * 100))
    assert o.isfinite().all()
