"""Whose launch attends to the image of a joint attention: a back end's own where it is small."""

import importlib

import pytest
import torch
from support.cases import DEVICE
from support.formula import exact_and_budget_of_joint
from test_joint import BACKENDS, make
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nasa_kernels import _quick, nag_joint_attention, nasa_joint_attention
from nasa_kernels._cuda import joint as cuda_joint
from nasa_kernels._joint import shared
from nasa_kernels._joint.shared import in_one_launch, take_in_one_launch
from nasa_kernels.backends import RECORDS
from nasa_kernels.reference import RULES

ONE_LAUNCH = [name for name in BACKENDS if name in ("cuda", "triton")]
# FLUX at 256, 384 and 512 pixels, SD3 at 512
SIZES = {(256, 24, 128): True, (576, 24, 128): True, (1024, 24, 128): False, (1024, 24, 64): False}
# the texts' own queries, and the rest of a call of an operator
TEXT = (2, 3)
REST = (None, None, None, 0.5, 0.125)
NAG = {"nag_scale": 3.0, "nag_tau": 2.5, "nag_alpha": 0.5}


def empty(b: int, n: int, h: int, d: int) -> Tensor:
    return torch.empty(b, n, h, d, dtype=torch.bfloat16, device="meta")


@pytest.fixture
def limit(monkeypatch):
    """A limit of FLOPs, as a call sets it; the old one comes back."""
    monkeypatch.setattr(shared, "_one_launch", shared._one_launch)
    return take_in_one_launch


@pytest.mark.parametrize(("n", "h", "d"), SIZES)
def test_small_images_take_one_launch(n, h, d):
    q, k = empty(1, n, h, d), empty(1, n, h, d)
    assert in_one_launch(q, k, 0) is SIZES[n, h, d]
    # it is FLOPs that count
    assert not in_one_launch(empty(64, n, h, d), empty(64, n, h, d), 0)


def test_few_keys_under_many_queries_are_no_small_image():
    """The image of an IP-Adapter, beside the latents of a picture and of a video."""
    assert in_one_launch(empty(1, 4096, 8, 40), empty(1, 257, 8, 40), 0)
    assert not in_one_launch(empty(1, 75600, 40, 128), empty(1, 257, 40, 128), 0)


def test_the_texts_queries_do_not_decide():
    """Else the image's rows would have other bits beside them."""
    k = empty(1, 576, 24, 128)
    for text in (0, 1024):
        assert in_one_launch(empty(1, 576 + text, 24, 128), k, text)
        assert not in_one_launch(empty(1, 999 + text, 24, 128), k, text)
    # queries of the texts alone
    assert not in_one_launch(empty(1, 8, 24, 128), empty(1, 4096, 24, 128), 8)
    assert in_one_launch(empty(1, 576, 24, 128), empty(1, 576, 2, 128), 0)


def test_another_limit(limit):
    q, k = empty(1, 4096, 24, 128), empty(1, 4096, 24, 128)
    limit(4 * 24 * 128 * 4096**2)
    assert in_one_launch(q, k, 0)
    limit(4 * 24 * 128 * 4096**2 - 1)
    assert not in_one_launch(q, k, 0)
    limit(0)
    assert not in_one_launch(empty(1, 1, 1, 1), empty(1, 1, 1, 1), 0)
    assert in_one_launch(empty(1, 1, 1, 1), empty(1, 0, 1, 1), 0)


def test_what_has_no_four_dimensions_is_for_the_checks():
    """A quick call that raises one of these goes to them, for their words."""
    q = empty(1, 8, 2, 64)
    for wrong in ((q[0], q), (q[None], q), (q, q[0, 0, 0])):
        with pytest.raises(_quick.REFUSALS):
            in_one_launch(*wrong, 0)


def test_fp32_is_for_pytorch():
    q = empty(1, 8, 2, 64)
    assert in_one_launch(q, q, 0) and not in_one_launch(q.float(), q.float(), 0)


# ---- what both ways compute, which test_joint.py has of small images in all sizes ----------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ONE_LAUNCH)
def test_both_ways_match_fp64(backend, rule, limit):
    inputs, text = make("odd", torch.bfloat16)
    exact, budget = exact_and_budget_of_joint(inputs, 0.6, rule, text)
    for flops in (0, 2**32):
        limit(flops)
        o = nasa_joint_attention(**inputs, alpha=0.6, rule=rule, text_queries=text, backend=backend)
        budget.check(o, exact)


@pytest.mark.parametrize("wrong", [("k", 0), ("k", (0, 0, 0)), ("q", 0), ("q", None), ("v", 0)])
@pytest.mark.parametrize("backend", ONE_LAUNCH)
def test_a_quick_call_with_other_dimensions_gets_the_words_of_a_first_one(backend, wrong):
    inputs, text = make("odd", torch.bfloat16)
    name, index = wrong
    found = []
    _quick._known.clear()
    for call in (
        lambda **given: nasa_joint_attention(
            **given, alpha=0.6, text_queries=text, backend=backend
        ),
        lambda **given: nag_joint_attention(**given, **NAG, text_queries=text, backend=backend),
    ):
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"_attention: {name} must") as error:
                call(**inputs | {name: inputs[name][index]})
            found.append(str(error.value))
            call(**inputs)
        assert found[-1] == found[-2]
    assert len(_quick._known) == 2


@pytest.mark.parametrize("backend", ONE_LAUNCH)
def test_a_gradient_is_that_of_two_launches(backend, limit):
    """O_s and its log-sum-exp are all that the backward pass knows of the image's attention."""
    inputs, text = make("odd", torch.float16)
    grad_o = torch.randn(inputs["q"].shape, generator=torch.Generator().manual_seed(1))
    found = []
    for flops in (0, 2**32):
        limit(flops)
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        o = nasa_joint_attention(**leaves, alpha=0.6, text_queries=text, backend=backend)
        found.append(torch.autograd.grad(o, tuple(leaves.values()), grad_o.to(o)))
        with torch.no_grad():
            alone = nasa_joint_attention(**inputs, alpha=0.6, text_queries=text, backend=backend)
        assert torch.equal(o.detach(), alone)
    for two, one in zip(*found, strict=True):
        largest = two.abs().max().item()
        assert (two - one).abs().max().item() <= 4 * torch.finfo(torch.float16).eps * largest


# ---- which launches ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ONE_LAUNCH)
def test_pytorch_attends_to_large_images_alone(backend, limit, monkeypatch):
    module = importlib.import_module(RECORDS[backend].joint.forward)
    seen = []

    def attend_shared(*args):
        seen.append("pytorch")
        return shared.attend_shared(*args)

    monkeypatch.setattr(module, "attend_shared", attend_shared)
    inputs, text = make("odd", torch.bfloat16)
    how = {"text_queries": text, "backend": backend}
    for flops, expected in ((2**32, []), (0, ["pytorch"] * 2)):
        limit(flops)
        seen.clear()
        nasa_joint_attention(**inputs, alpha=0.6, **how)
        nag_joint_attention(**inputs, **NAG, **how)
        assert seen == expected


@pytest.fixture
def operators(monkeypatch) -> list[str]:
    """What the functions of `cuda` call, PyTorch's attention among it; nothing is computed."""
    called: list[str] = []

    def operator(name, result):
        def run(*args):
            called.append(name)
            return result(*args)

        return run

    def like(q, *args):
        return torch.empty_like(q)

    def kept(q, *args):
        b, l, h, _ = q.shape
        return torch.empty_like(q), torch.empty(b, h, l)

    monkeypatch.setattr(cuda_joint, "attend_shared", operator("pytorch", kept))
    monkeypatch.setattr(cuda_joint, "_forward", operator("forward_joint", like))
    monkeypatch.setattr(cuda_joint, "_nag", operator("nag_joint", like))
    one = {
        "forward": operator("forward_image", like),
        "attention": operator("attention_image", lambda q, *x: (like(q), *kept(q))),
        "nag": operator("nag_image", like),
    }
    monkeypatch.setattr(cuda_joint, "ONE_LAUNCH", one)
    return called


def call_all(n: int) -> None:
    q, k, x = (torch.zeros(1, rows, 2, 16, dtype=torch.bfloat16) for rows in (n + 5, n, 4))
    cuda_joint.forward(q, k, k, x, x, x, x, *REST, 0, *TEXT)
    found = cuda_joint.attention(q, k, k, x, x, x, x, *REST, 0, *TEXT)
    assert [y.shape for y in found] == [q.shape, q.shape, (1, 2, n + 5)]
    cuda_joint.nag(q, k, k, x, x, x, x, *REST, 3.0, 2.5, 1, *TEXT)


def test_a_small_image_is_one_operator_and_a_large_one_two(operators, limit):
    limit(4 * 2 * 16 * 20**2)
    call_all(20)
    assert operators == ["forward_image", "attention_image", "nag_image"]
    operators.clear()
    call_all(21)
    assert operators == ["pytorch", "forward_joint"] * 2 + ["pytorch", "nag_joint"]


def test_a_quick_call_goes_to_the_operator_of_small_images(monkeypatch, limit):
    """Past the questions that PyTorch's attention needs; a large image has them."""
    asked = []
    monkeypatch.setattr(_quick, "like", lambda *tensors: asked.append("like") or True)
    known = _quick.Known(
        "two", (1,), "cuda", DEVICE.type, 0.25, None, lambda q, *args: ("one", args)
    )
    known = known._replace(operator=lambda q, *args: ("two", args))
    q, k, x = (torch.zeros(1, n, 2, 16, dtype=torch.bfloat16, device=DEVICE) for n in (21, 16, 4))
    kinds = (q.dtype, q.device, 16)
    found = {
        ("nasa_joint_attention", "cuda", "nasa-text"): known,
        ("nag_joint_attention", "cuda"): known._replace(rest=()),
    }
    monkeypatch.setattr(_quick, "_known", {(asked, *kinds): x for asked, x in found.items()})

    def run() -> list[str]:
        tensors, how = (q, k, k, x, x, x, x), {"text_queries": TEXT, "backend": "cuda"}
        joint, args = nasa_joint_attention(*tensors, 0.5, rule="nasa-text", **how)
        nag, nag_args = nag_joint_attention(*tensors, **NAG, **how)
        assert len(args) == len(tensors) - 1 + 5 + 3 and args[-3:] == (1, *TEXT)
        assert len(nag_args) == len(tensors) - 1 + 5 + 5 and nag_args[-2:] == TEXT
        return [joint, nag]

    with torch.no_grad():
        assert run() == ["one", "one"] and not asked
        limit(1)
        assert run() == ["two", "two"] and asked == ["like"] * 2


def test_what_a_brief_call_leaves_out_is_what_the_operator_fills_in(monkeypatch):
    q, k, x = (torch.zeros(1, n, 2, 16, dtype=torch.bfloat16, device=DEVICE) for n in (16, 16, 4))
    tensors, kinds = (q, k, k, x, x, x, x), (q.dtype, q.device, 16)
    found = {}
    for asked, name, rest in (
        (("nasa_joint_attention", "cuda", "vsf"), "forward_image_cuda", (2,)),
        (("nag_joint_attention", "cuda"), "nag_image_cuda", ()),
    ):
        schema = getattr(torch.ops.nasa_kernels, name).default._schema

        def operator(*args, schema=schema):
            left_out = [argument.default_value for argument in schema.arguments[len(args) :]]
            return len(left_out), [*args, *left_out]

        known = _quick.Known(None, rest, "cuda", DEVICE.type, 0.25, None, operator, operator)
        found[(asked, *kinds)] = known
    monkeypatch.setattr(_quick, "_known", found)

    def joint(text):
        how = {"text_queries": text, "backend": "cuda"}
        return nasa_joint_attention(*tensors, 0.5, rule="vsf", **how)

    def nag(text, norm):
        how = {"text_queries": text, "nag_norm": norm, "backend": "cuda"}
        return nag_joint_attention(*tensors, **NAG | how)

    # a pair like the default, but another object
    none = (0, 0)
    with torch.no_grad():
        for brief, whole, saved in (
            (joint(_quick.NO_TEXT), joint(none), 2),
            (nag(_quick.NO_TEXT, 1), nag(none, 1), 3),
        ):
            assert (brief[0], whole[0]) == (saved, 0)
            assert all(a is b or a == b for a, b in zip(brief[1], whole[1], strict=True))
        # what is not as usual is said
        assert nag(_quick.NO_TEXT, 2)[0] == 0 and nag(_quick.NO_TEXT, 2)[1][-3:] == [2, 0, 0]


@pytest.mark.parametrize("name", ["forward_image_cuda", "nag_image_cuda"])
def test_flops_are_the_same_where_numbers_are_left_out(name):
    operator = getattr(torch.ops.nasa_kernels, name).default
    q, k, x = (torch.empty(2, n, 4, 16, device="meta") for n in (20, 16, 5))
    rest = (0,) if name == "forward_image_cuda" else (3.0, 2.5)
    usual = [argument.default_value for argument in operator._schema.arguments][-3:]

    def count(*numbers) -> int:
        with FlopCounterMode(display=False) as counter:
            operator(q, k, k, x, x, x, x, *REST, *rest, *numbers)
        return counter.get_total_flops()

    norm = [usual[0]] if name == "nag_image_cuda" else []
    assert count() == count(*norm, 0, 0) == 4 * 2 * 4 * 16 * 20 * (16 + 5 + 5)
    # the queries of a text do not see the other
    assert count(*norm, 1, 3) == 4 * 2 * 4 * 16 * (20 * 16 + 17 * 5 + 19 * 5)
