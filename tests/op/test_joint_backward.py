"""Gradients of joint attention on every back end, against fp64 under the accuracy
rule of `testing.py`, and against properties that hold exactly.
"""

import pytest
import torch
from support import formula
from support.cases import DEVICE, DTYPES, mask_of
from support.gradients import check_joint_gradients, gradients
from test_joint import BACKENDS, SIZES
from test_joint import make as make_of
from torch import library
from torch.utils.flop_counter import FlopCounterMode

from nasa_kernels import (
    backends,
    nasa_attention,
    nasa_joint_attention,
    ops,
)
from nasa_kernels.reference import RULES

FUSED = tuple(name for name in BACKENDS if name != "reference")
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
SMALL_SIZES = {
    "small": (2, 19, 2, 17, 31, 7, 9, (2, 5)),
    # one tile
    "tiny": (2, 9, 1, 8, 11, 7, 9, (2, 5)),
}
# all rules in all dtypes, then what is special about a size; the interpreter is slow
CASES = (
    *(("small", rule, dtype) for rule in RULES for dtype in DTYPES),
    *((size, rule, torch.float32) for size in ("no-shared", "no-positive") for rule in RULES),
    *(("no-negative", rule, torch.float32) for rule in ("nasa", "vsf")),
    ("only-text", "nasa", torch.float32),
    ("much-text", "nasa-text", torch.float16),
    ("odd", "nasa-cross", torch.float32),
    ("flux", "nasa-cross", torch.bfloat16),
    ("flux", "vsf", torch.float16),
    ("no-negative", "sum", torch.float32),
)


def make(name, dtype=torch.float32):
    return make_of(name, dtype, SIZES | SMALL_SIZES)


def alpha_of(inputs):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(inputs["q"].shape[:3], generator=generator).to(DEVICE)


@pytest.mark.parametrize(("size", "rule", "dtype"), CASES, ids=str)
@EVERY_BACKEND
def test_matches_fp64(backend, size, rule, dtype):
    inputs, text = make(size, dtype)
    check_joint_gradients(backend, inputs, alpha_of(inputs), rule, text)


@pytest.mark.parametrize(
    ("kind", "rule"), [*(("bool", rule) for rule in RULES), ("bias", "nasa"), ("huge", "vsf")]
)
@EVERY_BACKEND
def test_masks(backend, rule, kind):
    """With NaN in masked rows, which get zeros, and a sample whose negative has no key left."""
    inputs, text = make("small")
    masks = {"mask_pos": mask_of(kind, 2, 7), "mask_neg": mask_of(kind, 2, 9, seed=2)}
    masks["mask_neg"][1] = False if kind == "bool" else float("-inf")
    inputs["v_neg"][1] = inputs["k_neg"][1] = float("nan")
    absent = masks["mask_pos"] == (False if kind == "bool" else float("-inf"))
    inputs["k_pos"][absent] = float("nan")
    found = check_joint_gradients(backend, inputs, 0.6, rule, text, **masks)
    for name in ("k_pos", "v_pos"):
        assert found[name][absent].count_nonzero() == 0
    for name in ("k_neg", "v_neg"):
        assert found[name][1].count_nonzero() == 0
        assert found[name][0].count_nonzero() > 0


@pytest.mark.parametrize("rule", RULES[:3])
@EVERY_BACKEND
def test_alpha_0_is_the_plain_joint_attention(backend, rule):
    inputs, _ = make("tiny")
    grad_o = torch.randn_like(inputs["q"])
    zero = torch.zeros((), device=DEVICE)
    options = {"rule": rule, "backend": backend}
    found = gradients(nasa_joint_attention, inputs, zero, grad_o, **options)
    plain_inputs = inputs | {name: inputs[name][:, :0] for name in ("k_neg", "v_neg")}
    plain = gradients(nasa_joint_attention, plain_inputs, 0.0, grad_o, **options)
    for name in ("q", "k", "v", "k_pos", "v_pos"):
        torch.testing.assert_close(found[name], plain[name], rtol=0, atol=0, msg=name)
    assert found["k_neg"].count_nonzero() == found["v_neg"].count_nonzero() == 0


@EVERY_BACKEND
def test_without_shared_keys_it_is_cross_attention(backend):
    inputs, _ = make("no-shared")
    alpha, grad_o = alpha_of(inputs), torch.randn_like(inputs["q"])
    prompts = {name: inputs[name] for name in ("q", "k_pos", "v_pos", "k_neg", "v_neg")}
    expected = gradients(nasa_attention, prompts, alpha, grad_o, backend=backend)
    found = gradients(nasa_joint_attention, inputs, alpha, grad_o, backend=backend)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5, msg=name)


@EVERY_BACKEND
def test_text_queries_do_not_see_the_other_prompt(backend):
    """Of their own output nothing flows to the other prompt, and nothing of it into their dQ."""
    inputs, (text_pos, text_neg) = make("much-text", torch.float16)
    image = inputs["q"].shape[1] - text_pos - text_neg
    rows = {"pos": slice(image, image + text_pos), "neg": slice(image + text_pos, None)}
    options = {"rule": "nasa", "text_queries": (text_pos, text_neg), "backend": backend}
    for own, other in (("pos", "neg"), ("neg", "pos")):
        grad_o = torch.zeros_like(inputs["q"])
        grad_o[:, rows[own]].normal_()
        found = gradients(nasa_joint_attention, inputs, 0.6, grad_o, **options)
        for name in (f"k_{other}", f"v_{other}"):
            assert found[name].count_nonzero() == 0
        changed = {name: torch.randn_like(inputs[name]) for name in (f"k_{other}", f"v_{other}")}
        again = gradients(nasa_joint_attention, inputs | changed, 0.6, grad_o, **options)
        assert torch.equal(found["q"], again["q"])
        assert found["q"][:, rows[own]].count_nonzero() > 0


@EVERY_BACKEND
def test_broadcast_prompts_and_views(backend):
    """One negative prompt for the batch, inputs that are slices, a gradient that is broadcast."""
    inputs, text = make("tiny")
    inputs |= {name: inputs[name][:1] for name in ("k_neg", "v_neg")}
    options = {"alpha": 0.6, "rule": "nasa", "text_queries": text}
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    views = {
        name: torch.nn.functional.pad(x, (2, 1, 1, 0))[:, :, 1:, 2 : x.shape[3] + 2]
        for name, x in leaves.items()
    }
    nasa_joint_attention(**views, **options, backend=backend).sum().backward()
    doubles = {name: x.double().requires_grad_() for name, x in inputs.items()}
    formula.joint(**doubles, **options).sum().backward()
    for name, x in leaves.items():
        expected = doubles[name].grad.float()
        torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=2e-5, msg=name)


@EVERY_BACKEND
def test_one_gradient_alone(backend):
    """What is not asked for is not computed, and does not change what is."""
    inputs, text = make("tiny")
    inputs["alpha"] = alpha_of(inputs)
    grad_o = torch.randn_like(inputs["q"])
    options = {"rule": "nasa-text", "text_queries": text, "backend": backend}
    alpha = inputs.pop("alpha")
    everything = gradients(nasa_joint_attention, inputs, alpha, grad_o, **options)
    for wanted, expected in everything.items():
        leaves = {**inputs, "alpha": alpha}
        leaves[wanted] = leaves[wanted].clone().requires_grad_()
        nasa_joint_attention(**leaves, **options).backward(grad_o)
        assert torch.equal(leaves[wanted].grad, expected), wanted


@EVERY_BACKEND
def test_deterministic(backend):
    inputs, text = make("tiny", torch.bfloat16)
    alpha, grad_o = alpha_of(inputs), torch.randn_like(inputs["q"])
    options = {"rule": "vsf", "text_queries": text, "backend": backend}
    first, second = (
        gradients(nasa_joint_attention, inputs, alpha, grad_o, **options) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", [name for name in FUSED if name == "triton"])
def test_split_queries(backend, monkeypatch):
    """Where heads do not fill a GPU, the visible queries are split and the parts summed."""
    from nasa_kernels._triton import backward

    inputs, text = make("much-text", torch.float16)
    monkeypatch.setattr(backward, "multiprocessors", lambda device: 9)
    check_joint_gradients(backend, inputs, 0.6, "nasa", text)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton does not run here")
def test_tiles_that_see_nothing_of_a_segment_are_left_out():
    from nasa_kernels._triton.backward import visible_tiles

    assert visible_tiles(310, 32, (0, 0)) == (10, 0, 0)
    # the negative text's own, to the end: the last tile is ragged
    assert visible_tiles(310, 32, (170, 310)) == (6, 6, 4)
    # the positive text's own: 64 to 159 lie within 40 to 169
    assert visible_tiles(310, 32, (40, 170)) == (7, 2, 3)
    assert visible_tiles(310, 32, (40, 60)) == (10, 2, 0)
    assert visible_tiles(20, 32, (0, 20)) == (0, 0, 1)
    assert visible_tiles(0, 32, (0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("backend", FUSED)
def test_opcheck(backend):
    inputs, text = make("tiny")
    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    rest = (mask_of("bool", 2, 7), None, alpha_of(inputs).requires_grad_(), 0.5, 0.25, 1, *text)
    library.opcheck(ops.JOINT_ATTENTION[backend], (*leaves, *rest))
    arguments = (*inputs.values(), mask_of("bool", 2, 7), None, None, 0.5, 0.25, 1, *text)
    _, *kept = ops.JOINT_ATTENTION[backend](*arguments)
    backward = getattr(torch.ops.nasa_kernels, f"joint_backward_{backend}").default
    grad_o, needs = torch.randn_like(inputs["q"]), [True, False, True, True, True, True, False]
    library.opcheck(
        backward,
        (grad_o, *kept, *arguments, [*needs, False]),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", FUSED)
def test_gradcheck_of_fused_back_ends(backend, rule):
    """fp32 finite differences: coarse, but independent of the reference."""
    generator = torch.Generator().manual_seed(5)
    inputs = [
        torch.randn(1, n, 1, 4, generator=generator).to(DEVICE).requires_grad_()
        for n in (4, 3, 3, 2, 2, 3, 3)
    ]
    alpha = torch.tensor(0.5, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: nasa_joint_attention(*x, rule=rule, text_queries=(1, 1), backend=backend),
        (*inputs, alpha), eps=1e-2, atol=2e-3, rtol=2e-2, fast_mode=True,
    )  # fmt: skip


@EVERY_BACKEND
def test_compiled_gradients(backend):
    inputs, text = make("tiny")
    inputs["alpha"] = torch.tensor(0.5, device=DEVICE)
    leaves = [x.requires_grad_() for x in inputs.values()]

    def loss(**x):
        return nasa_joint_attention(**x, text_queries=text, backend=backend).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(**inputs), leaves)
    expected = torch.autograd.grad(loss(**inputs), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@EVERY_BACKEND
def test_checkpointing(backend):
    inputs, text = make("tiny")
    leaves = [x.requires_grad_() for x in inputs.values()]

    def layer(*x):
        return nasa_joint_attention(*x, 0.5, text_queries=text, backend=backend)

    expected = torch.autograd.grad(layer(*leaves).sum(), leaves)
    again = torch.utils.checkpoint.checkpoint(layer, *leaves, use_reentrant=False)
    found = torch.autograd.grad(again.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("device", ["meta", DEVICE], ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_flops(backend, device):
    """Two products forward and five backward, over what each query can see."""
    inputs, (text_pos, text_neg) = make("tiny")
    inputs = {name: x.to(device) for name, x in inputs.items()}
    (b, l, h, d), n, n_pos, n_neg = inputs["q"].shape, 11, 7, 9
    pairs = l * n + (l - text_neg) * n_pos + (l - text_pos) * n_neg
    options = {"alpha": 0.5, "text_queries": (text_pos, text_neg), "backend": backend}
    for wanted, products in (((*inputs,), 2 + 5), (("q",), 2 + 3)):
        leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
        with FlopCounterMode(display=False) as counter:
            nasa_joint_attention(**leaves, **options).sum().backward()
        assert counter.get_total_flops() == 2 * products * b * h * d * pairs


def test_preference():
    """A gradient is no reason for another back end where the first one has it."""
    first = "cpu" if DEVICE.type == "cpu" else "triton"
    for device, name in ((DEVICE, first), (torch.device("meta"), "triton")):
        assert backends.choose(device, torch.float16, 64, True) == name


@pytest.mark.parametrize("backend", FUSED)
def test_a_second_derivative_is_refused(backend):
    inputs, text = make("tiny")
    q = inputs["q"].requires_grad_()
    o = nasa_joint_attention(**inputs, alpha=0.5, text_queries=text, backend=backend)
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="have no second derivative; use backend='reference'"):
        torch.autograd.grad(dq.sum(), q)
