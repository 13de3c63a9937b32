"""NAG against a plain eager computation of its published formula, in every back end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import formula
from support.cases import BACKENDS, DEVICE, DTYPES, make_inputs, mask_of
from torch import library
from torch.utils.flop_counter import FlopCounterMode

from nasa_kernels import (
    _quick,
    backends,
    nag_attention,
    nag_joint_attention,
    nasa_joint_attention,
    ops,
)
from nasa_kernels.testing import Shape, budget, eager_attention, largest_score

BASIC = Shape("basic", 2, 19, 3, 40, 77, 33)
SHAPES = (
    BASIC,
    Shape("one-of-each", 1, 1, 1, 1, 1, 1),
    Shape("odd", 2, 7, 3, 33, 5, 18),
    Shape("streamed", 1, 9, 2, 64, 200, 77),
    Shape("no-negative-keys", 2, 5, 2, 16, 9, 0),
    Shape("no-queries", 2, 0, 2, 16, 9, 5),
    # rows of the real widths, in one block, in two, and in more than three
    Shape("sdxl", 1, 3, 20, 64, 5, 7),
    Shape("sana-1.6b", 1, 3, 20, 112, 5, 7),
    Shape("wan-14b", 1, 2, 40, 128, 3, 4),
)
# R = |G| / |Z+| is above the limit on all rows, on none, on some
STRONG = {"nag_scale": 11.0, "nag_tau": 2.5, "nag_alpha": 0.25}
WEAK = {"nag_scale": 1.5, "nag_tau": 4.0, "nag_alpha": 0.5}
BOTH_SIDES = {"nag_scale": 3.0, "nag_tau": 4.3, "nag_alpha": 0.5}
SETTINGS = {"strong": STRONG, "weak": WEAK, "both-sides": BOTH_SIDES}


def attend(q, k, v, mask, scale):
    exact = q.dtype == torch.float64
    return (formula.attend if exact else eager_attention)(q, k, v, mask, scale)


def plain_nag(inputs, nag_scale, nag_tau, nag_alpha, nag_norm=1, mask_pos=None, mask_neg=None):
    """The published formula step by step, in the dtype of the inputs; heads merged for the norm."""

    def one(k, v, mask):
        z = attend(inputs["q"], k, v, mask, inputs["q"].shape[-1] ** -0.5)
        return z.flatten(2)

    z_pos = one(inputs["k_pos"], inputs["v_pos"], mask_pos)
    z_neg = one(inputs["k_neg"], inputs["v_neg"], mask_neg)
    guided = z_pos * nag_scale - z_neg * (nag_scale - 1)
    p = {"p": nag_norm, "dim": -1, "keepdim": True}
    ratio = guided.norm(**p) / z_pos.norm(**p)
    ratio = ratio.nan_to_num(10)
    guided = guided * torch.minimum(ratio, torch.full_like(ratio, nag_tau)) / ratio
    o = guided * nag_alpha + z_pos * (1 - nag_alpha)
    return o.unflatten(2, inputs["q"].shape[2:]), ratio


def exact_and_budget(inputs, settings, **masks):
    doubles = {name: x.double() for name, x in inputs.items()}
    settings64 = {
        name: x.double() if isinstance(x, torch.Tensor) else x for name, x in settings.items()
    }
    exact, ratio = plain_nag(doubles, **settings64, **masks)
    eager, _ = plain_nag(inputs, **settings, **masks)
    # weights, Z+, Z- and the result
    rule = budget(exact, eager, largest_score(inputs), inputs["q"].dtype, roundings=4)
    return exact, rule, ratio


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "settings"),
    [(BASIC, "both-sides"), (BASIC, "weak"), *((shape, "strong") for shape in SHAPES)],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_published_formula(backend, shape, settings, dtype):
    inputs = make_inputs(shape, dtype, DEVICE)
    o = nag_attention(**inputs, **SETTINGS[settings], backend=backend)
    assert o.dtype == dtype and o.is_contiguous()
    exact, rule, ratio = exact_and_budget(inputs, SETTINGS[settings])
    rule.check(o, exact)
    if shape is BASIC:
        clipped = (ratio > SETTINGS[settings]["nag_tau"]).double().mean().item()
        assert {"strong": clipped == 1, "weak": clipped == 0}.get(settings, 0.1 < clipped < 0.9)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((BASIC, dtype) for dtype in DTYPES), (SHAPES[2], DTYPES[1]), (SHAPES[6], DTYPES[2])],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_norm_of_the_published_flux_code(backend, shape, dtype):
    """The root of the sum of squares; some rows are above the limit and some are not."""
    inputs, settings = make_inputs(shape, dtype, DEVICE), {**BOTH_SIDES, "nag_norm": 2}
    o = nag_attention(**inputs, **settings, backend=backend)
    exact, rule, ratio = exact_and_budget(inputs, settings)
    rule.check(o, exact)
    if shape is BASIC:
        assert 0 < (ratio > settings["nag_tau"]).double().mean() < 1
        assert not torch.equal(o, nag_attention(**inputs, **BOTH_SIDES, backend=backend))


@pytest.mark.parametrize("kind", ["bool", "bias"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks(backend, kind):
    inputs = make_inputs(BASIC, torch.float32, DEVICE)
    masks = {"mask_pos": mask_of(kind, 2, 77), "mask_neg": mask_of(kind, 2, 33, seed=2)}
    exact, rule, _ = exact_and_budget(inputs, BOTH_SIDES, **masks)
    rule.check(nag_attention(**inputs, **BOTH_SIDES, **masks, backend=backend), exact)


@pytest.mark.parametrize("size", [(), (2, 1, 1), (1, 19, 1), (2, 19, 1)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_alpha_tensors(backend, size):
    """All, per sample, per region; where the share is 0 the bits are those of Z+."""
    inputs = make_inputs(BASIC, torch.float16, DEVICE)
    share = torch.rand(size, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    if size:
        share.view(-1)[0] = 0
    settings = {**BOTH_SIDES, "nag_alpha": share}
    o = nag_attention(**inputs, **settings, backend=backend)
    settings64 = {**settings, "nag_alpha": share.double()}
    exact, _ = plain_nag({name: x.double() for name, x in inputs.items()}, **settings64)
    _, rule, _ = exact_and_budget(inputs, BOTH_SIDES)
    rule.check(o, exact)
    if size:
        plain = nag_attention(**inputs, **{**BOTH_SIDES, "nag_alpha": 0}, backend=backend)
        off = (share == 0).expand(2, 19, 1)[..., 0]
        assert torch.equal(o[off], plain[off]) and not torch.equal(o[~off], plain[~off])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_answers(backend, dtype):
    """Scale 1 and a negative like the positive leave Z+; without a clip G is the extrapolation."""
    inputs = make_inputs(BASIC, dtype, DEVICE)
    z_pos = nag_attention(**inputs, **{**WEAK, "nag_alpha": 0}, backend=backend)
    off = nag_attention(**inputs, **{**WEAK, "nag_scale": 1, "nag_alpha": 1}, backend=backend)
    assert torch.equal(off, z_pos)
    same = inputs | {"k_neg": inputs["k_pos"], "v_neg": inputs["v_pos"]}
    # 3 Z - 2 Z rounds nothing twice in fp32 for half precision inputs
    o = nag_attention(**same, nag_scale=3, nag_tau=2, nag_alpha=1, backend=backend)
    torch.testing.assert_close(o, z_pos, rtol=1e-6 if dtype == torch.float32 else 0, atol=0)
    # one key a prompt: Z+- are v+-, small integers, and 2 Z+ - Z- is exact
    one = make_inputs(BASIC._replace(n_pos=1, n_neg=1), dtype, DEVICE)
    one |= {name: one[name].mul(4).round() for name in ("v_pos", "v_neg")}
    o = nag_attention(**one, nag_scale=2, nag_tau=1e6, nag_alpha=1, backend=backend)
    assert torch.equal(o, (2 * one["v_pos"] - one["v_neg"]).expand_as(o))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_share_do_not_read_the_negative_prompt(backend):
    inputs = make_inputs(BASIC, torch.float32, DEVICE)
    z_pos = nag_attention(**inputs, **{**STRONG, "nag_alpha": 0}, backend=backend)
    inputs["v_neg"][0] = float("inf")
    share = torch.tensor([0.0, 0.5], device=DEVICE).view(2, 1, 1)
    o = nag_attention(**inputs, **{**STRONG, "nag_alpha": share}, backend=backend)
    assert torch.equal(o[0], z_pos[0]) and o[1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_without_positive_attention_stays_zero(backend):
    """Z+ = 0: 0 / 0 is no NaN, and nothing may grow out of nothing."""
    inputs = make_inputs(BASIC, torch.float16, DEVICE)
    inputs["v_pos"] = torch.zeros_like(inputs["v_pos"])
    o = nag_attention(**inputs, **STRONG, backend=backend)
    assert o.count_nonzero() == 0
    inputs["v_neg"] = torch.zeros_like(inputs["v_neg"])
    assert nag_attention(**inputs, **STRONG, backend=backend).count_nonzero() == 0


@pytest.mark.parametrize(
    ("backend", "settings"),
    [*((name, "both-sides") for name in BACKENDS), ("reference", "strong"), ("reference", "weak")],
)
def test_gradients(backend, settings):
    """Of all tensors and of the share, against autograd through the published formula in fp64."""
    inputs = make_inputs(BASIC, torch.float32, DEVICE)
    share = torch.full((2, 1, 1), SETTINGS[settings]["nag_alpha"], device=DEVICE)
    grad_o = torch.randn(inputs["q"].shape, generator=torch.Generator().manual_seed(7)).to(DEVICE)

    def gradients(function, dtype):
        leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
        alpha = share.to(dtype).requires_grad_()
        o = function(leaves, **{**SETTINGS[settings], "nag_alpha": alpha})
        return torch.autograd.grad(o, [*leaves.values(), alpha], grad_o.to(dtype))

    def ours(leaves, **options):
        return nag_attention(**leaves, **options, backend=backend)

    actual = gradients(ours, torch.float32)
    exact = gradients(lambda leaves, **options: plain_nag(leaves, **options)[0], torch.float64)
    for a, e in zip(actual, exact, strict=True):
        assert (a.double() - e).norm() <= 1e-5 * e.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_operator_serves_where_no_gradient_is_recorded(backend, monkeypatch):
    inputs = make_inputs(BASIC, torch.float32, DEVICE)
    calls = []
    # a call like one before might go to what the operator runs
    monkeypatch.setattr(_quick, "_known", {})
    for name, operator in ops.NAG.items():
        monkeypatch.setitem(ops.NAG, name, lambda *args, f=operator: calls.append(f) or f(*args))
    share = torch.tensor(0.5, device=DEVICE, requires_grad=True)
    cold = nag_attention(**inputs, **STRONG, backend=backend)
    assert len(calls) == (backend in ops.NAG)
    o = nag_attention(**inputs, **{**STRONG, "nag_alpha": share}, backend=backend)
    assert o.requires_grad
    inputs["q"].requires_grad_()
    o = nag_attention(**inputs, **STRONG, backend=backend)
    assert o.requires_grad and len(calls) == (backend in ops.NAG)
    torch.testing.assert_close(o.detach(), cold, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_map", [True, False], ids=["map", "number"])
@pytest.mark.parametrize("backend", [x for x in BACKENDS if x in ops.NAG])
def test_opcheck(backend, with_map):
    inputs = make_inputs(BASIC._replace(d=16, l=5), torch.float32, DEVICE)
    mask = mask_of("bool", 2, 77)
    share = torch.rand(2, 1, 1, device=DEVICE) if with_map else None
    library.opcheck(
        ops.NAG[backend],
        (*inputs.values(), mask, None, share, 0.5, 0.25, 3.0, 2.5, 1),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("device", [DEVICE, "meta"], ids=str)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "sdpa"])
def test_flops_are_those_of_two_attentions(backend, device):
    """Whether the blend is a kernel or PyTorch's own operations."""
    inputs = {k: x.to(device) for k, x in make_inputs(BASIC, torch.float32, "cpu").items()}
    with FlopCounterMode(display=False) as counter:
        nag_attention(**inputs, **STRONG, backend=backend)
    assert counter.get_total_flops() == 4 * 2 * 19 * 3 * 40 * (77 + 33)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend):
    graphs = []
    torch._dynamo.reset()

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph

    function = torch.compile(nag_attention, fullgraph=True, backend=compiler)
    inputs = make_inputs(BASIC, torch.float16, DEVICE)
    for value in (0.5, 0.25):
        options = {**BOTH_SIDES, "nag_alpha": torch.tensor(value, device=DEVICE)}
        options["backend"] = backend
        o = function(**inputs, **options)
        assert torch.equal(o, nag_attention(**inputs, **options))
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nag_scale": float("inf")}, "nag_scale must be finite, got inf"),
        ({"nag_scale": "3"}, "nag_scale must be a number, got str"),
        ({"nag_tau": 0.0}, "nag_tau must be above 0, got 0.0"),
        ({"nag_tau": float("nan")}, "nag_tau must be finite"),
        ({"nag_norm": 3}, "nag_norm must be 1 or 2, got 3"),
        ({"nag_norm": float("inf")}, "nag_norm must be 1 or 2, got inf"),
        ({"nag_alpha": True}, "nag_alpha must be a number, got bool"),
        ({"nag_alpha": torch.ones(3)}, "must broadcast to [b, l, 1] [2, 19, 1], got [3]"),
        ({"nag_alpha": torch.ones(2, 19, 3)}, "must broadcast to [b, l, 1]"),
        ({"nag_alpha": torch.ones(2, 1, 1, dtype=torch.float64)}, "call nag_alpha.float()"),
        ({"q": torch.zeros(2, 3)}, "q must be [b, l, h, d]"),
        # the negative's tensors by their own name, also where they are not used
        ({"k_neg": torch.zeros(3)}, "nag_attention: k_neg must be [2 or 1, n,"),
        ({"k_neg": torch.zeros(3), "nag_alpha": 0.0}, "nag_attention: k_neg must be [2 or 1, n,"),
        ({"mask_neg": torch.ones(2, 1)}, "nag_attention: mask_neg must be [2 or 1, "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(change, message):
    inputs = make_inputs(BASIC, torch.float32, DEVICE)
    change = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError) as error:
        nag_attention(**{**inputs, **STRONG, **change})
    assert message in str(error.value)


def test_an_unknown_back_end_is_an_error():
    inputs = make_inputs(BASIC, torch.float32, DEVICE)
    with pytest.raises(ValueError, match="backend must be None or one of"):
        nag_attention(**inputs, **STRONG, backend="none")


def compile_for(arch: int) -> None:
    """Print what the kernel becomes on a GPU, for the widths of SDXL and of Wan 14B."""
    from triton.runtime.driver import driver
    from triton_aot import CompileOnly, NoGpu, statistics

    from nasa_kernels._triton import nag as kernels

    driver.set_active(NoGpu(arch))
    kernels.blend_kernel = CompileOnly(kernels.blend_kernel)
    for h, d in ((20, 64), (16, 72), (40, 128)):
        z = torch.empty(2, 4, h, d, dtype=torch.bfloat16)
        kernels.blend(z, z, z, torch.empty(2, 1, 1), 0.0, 3.0, 2.5, 1)
        print(json.dumps(statistics(kernels.blend_kernel.compiled)), flush=True)


@pytest.mark.parametrize("arch", [90, 100], ids=lambda arch: f"sm_{arch}")
def test_compiled_without_a_spill(arch):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    here, tests, root = Path(__file__).parents[:3]
    path = [str(here), str(tests), str(root / "tools"), str(root)]
    path.append(environment.get("PYTHONPATH", ""))
    result = subprocess.run(
        [sys.executable, "-c", f"import test_nag; test_nag.compile_for({arch})"],
        env=environment | {"PYTHONPATH": os.pathsep.join(path), "TRITON_INTERPRET": "0"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert row["stack"] == row["ldl"] == row["stl"] == 0, row
        # a row of 5120 channels stays in the registers of its 256 threads
        assert row["registers"] <= 128, row


# ---- joint attention -----------------------------------------------------------------------------

JOINT_BACKENDS = tuple(
    name for name in (*ops.JOINT_FORWARD, "reference") if backends.why_not(name, DEVICE) is None
)
TEXT_QUERIES = {
    "both": (5, 4),
    "none": (0, 0),
    "positive": (5, 0),
    "negative": (0, 4),
    "only": (5, 4),
}


def make_joint(which, dtype=torch.float32):
    """q, k, v, k_pos, v_pos, k_neg, v_neg of 21 image tokens, 5 and 4 of text."""
    generator = torch.Generator().manual_seed(0)
    image = 0 if which == "only" else 21
    lengths = (image + sum(TEXT_QUERIES[which]), 21, 21, 5, 5, 4, 4)
    names = ("q", "k", "v", "k_pos", "v_pos", "k_neg", "v_neg")
    return {
        name: torch.randn(2, n, 3, 16, generator=generator).to(DEVICE, dtype)
        for name, n in zip(names, lengths, strict=True)
    }


def plain_joint_nag(inputs, text, mask_neg=None, **settings):
    """Two whole attentions, over [image; positive] and over [image; negative], and the steps."""
    rows = inputs["q"].shape[1] - sum(text)
    q, q_pos, q_neg = inputs["q"].split((rows, *text), dim=1)
    mask = None
    if mask_neg is not None:
        mask = torch.cat((torch.ones_like(inputs["k"][..., 0, 0], dtype=torch.bool), mask_neg), 1)

    def joined(name):
        return torch.cat((inputs[name[0]], inputs[name]), dim=1)

    both = {"q": q} | {name: joined(name) for name in ("k_pos", "v_pos", "k_neg", "v_neg")}
    o, ratio = plain_nag(both, **settings, mask_neg=mask)
    scale = q.shape[-1] ** -0.5
    texts = (
        attend(q_pos, both["k_pos"], both["v_pos"], None, scale),
        attend(q_neg, both["k_neg"], both["v_neg"], mask, scale),
    )
    return torch.cat((o, *texts), dim=1), ratio


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", TEXT_QUERIES)
@pytest.mark.parametrize("backend", JOINT_BACKENDS)
def test_joint_matches_the_published_formula(backend, which, dtype):
    inputs, text = make_joint(which, dtype), TEXT_QUERIES[which]
    doubles = {name: x.double() for name, x in inputs.items()}
    _, ratio = plain_joint_nag(doubles, text, **BOTH_SIDES)
    # half of the rows are above it
    settings = BOTH_SIDES | {"nag_tau": ratio.median().item() if ratio.numel() else 2.0}
    o = nag_joint_attention(**inputs, **settings, text_queries=text, backend=backend)
    assert o.dtype == dtype and o.is_contiguous()
    exact, _ = plain_joint_nag(doubles, text, **settings)
    eager, _ = plain_joint_nag(inputs, text, **settings)
    budget(exact, eager, largest_score(inputs), dtype, roundings=4).check(o, exact)


@pytest.mark.parametrize("backend", JOINT_BACKENDS)
def test_joint_with_a_mask_a_map_and_a_gradient(backend):
    inputs, text = make_joint("both"), TEXT_QUERIES["both"]
    mask = torch.tensor([[True, False, True, True], [True, True, True, False]], device=DEVICE)
    share = torch.rand(2, 21, 1, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    settings = STRONG | {"nag_alpha": share}

    def gradients(function):
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        o = function(leaves)
        return o, torch.autograd.grad(o.square().sum(), tuple(leaves.values()))

    plain, expected = gradients(lambda x: plain_joint_nag(x, text, mask, **settings)[0])
    with torch.no_grad():
        o = nag_joint_attention(
            **inputs, **settings, text_queries=text, mask_neg=mask, backend=backend
        )
    assert torch.allclose(o, plain, rtol=1e-4, atol=1e-5)
    _, found = gradients(
        lambda x: nag_joint_attention(
            **x, **settings, text_queries=text, mask_neg=mask, backend=backend
        )
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", sorted({*ops.JOINT_PAIR, *ops.JOINT_NAG}))
@pytest.mark.parametrize("which", TEXT_QUERIES)
def test_joint_reads_the_image_once(backend, which):
    """Without a gradient one operator of the back end gives O, or Z+ and Z-; with one there are
    two."""
    inputs, (text_pos, text_neg) = make_joint(which), TEXT_QUERIES[which]
    inputs = {name: x.to("meta", torch.bfloat16) for name, x in inputs.items()}
    options = STRONG | {"text_queries": (text_pos, text_neg), "backend": backend}

    def count():
        with FlopCounterMode(display=False) as counter:
            nag_joint_attention(**inputs, **options)
        return counter.get_total_flops(), [str(x) for x in counter.get_flop_counts()["Global"]]

    l = inputs["q"].shape[1]
    flops, names = count()
    one = "nag" if backend in ops.NAG else "pair"
    assert names[0] == f"nasa_kernels.joint_{one}_{backend}"
    assert flops == 4 * 2 * 3 * 16 * (l * 21 + (l - text_neg) * 5 + (l - text_pos) * 4)
    inputs["k"].requires_grad_()
    flops, names = count()
    assert names[0] == f"nasa_kernels.joint_attention_{backend}"
    image = l - text_pos - text_neg
    assert flops == 4 * 2 * 3 * 16 * ((l + image) * 21 + (l - text_neg) * 5 + (l - text_pos) * 4)


@pytest.mark.parametrize("backend", [x for x in JOINT_BACKENDS if x in ops.JOINT_PAIR])
def test_opcheck_of_the_pair(backend):
    inputs, text = make_joint("both"), TEXT_QUERIES["both"]
    mask = torch.ones(2, 4, dtype=torch.bool, device=DEVICE)
    library.opcheck(
        ops.JOINT_PAIR[backend],
        (*inputs.values(), None, mask, 0.25, *text),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("share", ["number", "map"])
@pytest.mark.parametrize("backend", [x for x in JOINT_BACKENDS if x in ops.JOINT_NAG])
def test_opcheck_of_joint_attention(backend, share):
    inputs, (text_pos, text_neg) = make_joint("both"), TEXT_QUERIES["both"]
    mask = torch.ones(2, 4, dtype=torch.bool, device=DEVICE)
    image = inputs["q"].shape[1] - text_pos - text_neg
    alpha_map = torch.rand(2, image, 1, device=DEVICE) if share == "map" else None
    library.opcheck(
        ops.JOINT_NAG[backend],
        (*inputs.values(), None, mask, alpha_map, 0.3, 0.25, 5.0, 2.5, 1, text_pos, text_neg),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("backend", JOINT_BACKENDS)
def test_joint_with_a_share_of_0_is_plain_attention(backend):
    """As a number or a tensor, and whatever the negative prompt holds."""
    inputs, text = make_joint("both"), TEXT_QUERIES["both"]
    plain = nasa_joint_attention(**inputs, alpha=0.0, text_queries=text, backend=backend)
    inputs["v_neg"] = torch.full_like(inputs["v_neg"], float("inf"))
    for share in (0.0, torch.zeros(2, 1, 1, device=DEVICE)):
        settings = STRONG | {"nag_alpha": share}
        o = nag_joint_attention(**inputs, **settings, text_queries=text, backend=backend)
        assert torch.allclose(o[:, :26], plain[:, :26], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nag_tau": 0.0}, "nag_tau must be above 0, got 0"),
        ({"nag_scale": "3"}, "nag_scale must be a number, got str"),
        ({"nag_alpha": float("nan")}, "nag_alpha must be finite, got nan"),
        ({"nag_alpha": torch.ones(30, 1)}, r"nag_alpha must broadcast to \[b, l, 1\] \[2, 21, 1\]"),
        ({"text_queries": (20, 11)}, "no more than the 30 queries of q together"),
        ({"text_queries": 9}, "text_queries must be two integers"),
        ({"v_neg": torch.zeros(3)}, r"v_neg must be \[2 or 1, n, 3 or 1, 16\]"),
    ],
    ids=str,
)
def test_joint_refusals(options, message):
    with pytest.raises(ValueError, match="nag_joint_attention: .*" + message):
        nag_joint_attention(**make_joint("both") | {"text_queries": (5, 4)} | STRONG | options)
