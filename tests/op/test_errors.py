"""Every way to call it wrong: the error names what it is about, what it must be and what it was."""

import re

import numpy as np
import pytest
import torch
from support.cases import BACKENDS, DEVICE, make_inputs, refuses_dtype

from nasa_kernels import backends, nag_attention, nasa_attention, nasa_joint_attention
from nasa_kernels.testing import Shape

SHAPE = Shape("wrong", 2, 9, 3, 16, 5, 7)


def call(alpha=0.5, backend=None, mask_pos=None, mask_neg=None, scale=None, **changes):
    inputs = make_inputs(SHAPE, torch.float32, DEVICE) | changes
    options = {"mask_pos": mask_pos, "mask_neg": mask_neg, "scale": scale, "backend": backend}
    return nasa_attention(**inputs, alpha=alpha, **options)


def x(*shape, dtype=torch.float32, device=DEVICE):
    return torch.zeros(shape, dtype=dtype, device=device)


WRONG = {
    "q-3d": ({"q": x(2, 9, 48)}, "q must be [b, l, h, d], got [2, 9, 48]"),
    "q-int": ({"q": x(2, 9, 3, 16, dtype=torch.int32)}, "q must be fp16, bf16, fp32 or fp64"),
    "q-wide": ({"q": x(2, 9, 3, 257)}, "head_dim d of q must be 1 to 256, got [2, 9, 3, 257]"),
    "q-no-d": ({"q": x(2, 9, 3, 0)}, "head_dim d of q must be 1 to 256"),
    "q-strides": (
        {"q": x(2, 9, 16, 3).transpose(2, 3)},
        "the last dimension of q must be contiguous, got strides [432, 48, 1, 3]; "
        "call q.contiguous()",
    ),
    "k-strides": (
        {"k_pos": x(2, 5, 16, 3).transpose(2, 3)},
        "the last dimension of k_pos must be contiguous",
    ),
    "v-broadcast-d": (
        {"v_neg": x(2, 7, 3, 1).expand(-1, -1, -1, 16)},
        "the last dimension of v_neg must be contiguous",
    ),
    "k-3d": ({"k_neg": x(7, 3, 16)}, "k_neg must be [2 or 1, n, 3 or 1, 16] to match q [2, 9, 3"),
    "k-and-v-1d": (
        {"k_neg": x(7), "v_neg": x(7)},
        "k_neg must be [2 or 1, n, 3 or 1, 16] to match q [2, 9, 3, 16], got [7]",
    ),
    "k-d": ({"k_neg": x(2, 7, 3, 8)}, "k_neg must be [2 or 1, n, 3 or 1, 16] to match q"),
    "v-heads": ({"v_pos": x(2, 5, 2, 16)}, "got [2, 5, 2, 16]"),
    "k-batch": ({"k_pos": x(3, 5, 3, 16)}, "got [3, 5, 3, 16]"),
    "lengths": ({"v_neg": x(2, 6, 3, 16)}, "k_neg has 7 tokens but v_neg has 6"),
    "k-dtype": (
        {"k_pos": x(2, 5, 3, 16, dtype=torch.float16)},
        "k_pos must have the dtype of q, torch.float32, got torch.float16; call k_pos.to(q.dtype)",
    ),
    "k-device": (
        {"k_neg": x(2, 7, 3, 16, device="meta")},
        f"k_neg must be on the device of q, {DEVICE}, got meta; call k_neg.to(q.device)",
    ),
    "mask-shape": ({"mask_pos": x(2, 7)}, "mask_pos must be [2 or 1, 5], one value per key, got"),
    "mask-4d": ({"mask_neg": x(2, 1, 1, 7)}, "mask_neg must be [2 or 1, 7], one value per key"),
    "mask-int": (
        {"mask_pos": x(2, 5, dtype=torch.int64)},
        "mask_pos must be bool (True = attend) or an additive bias in fp32 or in the dtype of q, "
        "torch.float32, got torch.int64; for a mask of 0 and 1 call mask_pos.bool()",
    ),
    "mask-grad": (
        {"mask_pos": x(2, 5).requires_grad_()},
        "mask_pos must not require a gradient, there is none for masks; call mask_pos.detach()",
    ),
    "mask-device": (
        {"mask_neg": x(2, 7, device="meta")},
        f"mask_neg must be on the device of q, {DEVICE}, got meta",
    ),
    "alpha-nan": ({"alpha": float("nan")}, "alpha must be finite, got nan"),
    "alpha-inf": ({"alpha": float("-inf")}, "alpha must be finite, got -inf"),
    "alpha-str": ({"alpha": "0.5"}, "alpha must be a number or a tensor, got str"),
    "alpha-bool": ({"alpha": True}, "alpha must be a number or a tensor, got bool"),
    "alpha-none": ({"alpha": None}, "alpha must be a number or a tensor, got NoneType"),
    "alpha-half": (
        {"alpha": x(2, 1, 1, dtype=torch.float16)},
        "a tensor alpha must be fp32, got torch.float16; call alpha.float()",
    ),
    "alpha-shape": (
        {"alpha": x(2)},
        "alpha must broadcast to [b, l, h] [2, 9, 3], got [2]; one value per sample is [b, 1, 1]",
    ),
    "alpha-4d": ({"alpha": x(2, 9, 3, 1)}, "alpha must broadcast to [b, l, h]"),
    "alpha-device": (
        {"alpha": x(device="meta")},
        f"alpha must be on the device of q, {DEVICE}, got meta",
    ),
    "scale-nan": ({"scale": float("nan")}, "scale must be finite and not 0, got nan"),
    "scale-zero": ({"scale": 0.0}, "scale must be finite and not 0, got 0.0"),
    "scale-tensor": ({"scale": x(1)}, "scale must be a number, got Tensor"),
    "backend": (
        {"backend": "flash"},
        "backend must be None or one of ('cuda', 'triton', 'cpu', 'sdpa', 'reference'), "
        "got 'flash'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    changes, message = WRONG[case]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call(**changes)
    assert str(error.value).startswith("nasa_attention: ")


@pytest.mark.parametrize("number", [np.float64, np.float32, np.float16, int, np.int64])
def test_numbers_of_numpy_are_numbers(number):
    expected = call(alpha=2.0, scale=1.0)
    assert torch.equal(call(alpha=number(2), scale=number(1)), expected)
    inputs = make_inputs(SHAPE, torch.float32, DEVICE)
    k, v = inputs["k_pos"], inputs["v_pos"]
    plain = {"rule": "vsf", "text_queries": (2, 3), "backend": "reference"}
    joint = nasa_joint_attention(k=k, v=v, **inputs, alpha=2.0, **plain)
    if issubclass(number, (int, np.integer)):
        plain["text_queries"] = (number(2), number(3))
    assert torch.equal(nasa_joint_attention(k=k, v=v, **inputs, alpha=number(2), **plain), joint)
    nag = {"nag_scale": 3.0, "nag_tau": 2.0, "nag_alpha": 1.0}
    expected = nag_attention(**inputs, **nag)
    assert torch.equal(
        nag_attention(**inputs, **{name: number(x) for name, x in nag.items()}), expected
    )


def test_a_bool_of_numpy_is_no_number():
    for name in ("alpha", "scale"):
        with pytest.raises(ValueError, match=f"{name} must be a number"):
            call(**{name: np.True_})


@pytest.mark.parametrize("backend", [name for name in backends.NAMES if name not in BACKENDS])
def test_a_back_end_that_does_not_run_says_why_and_what_does(backend):
    with pytest.raises(RuntimeError) as error:
        call(backend=backend)
    message = str(error.value)
    assert f"backend '{backend}' does not run here: " in message
    assert message.endswith("Available: " + ", ".join(map(repr, BACKENDS)) + ".")


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_fp64_is_for_the_reference(backend):
    inputs = make_inputs(SHAPE, torch.float64, DEVICE)
    with pytest.raises(ValueError, match="got q of torch.float64; cast the inputs or use backend"):
        nasa_attention(**inputs, alpha=0.5, backend=backend)
    assert nasa_attention(**inputs, alpha=0.5).dtype == torch.float64


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in backends.FUSED])
def test_second_derivatives_are_refused(backend):
    inputs = {
        name: tensor.requires_grad_()
        for name, tensor in make_inputs(SHAPE, torch.float32, DEVICE).items()
    }
    o = nasa_attention(**inputs, alpha=0.5, backend=backend)
    (gradient,) = torch.autograd.grad(o.square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_forward_mode_is_refused(backend):
    inputs = make_inputs(SHAPE, torch.float32, DEVICE)
    with torch.autograd.forward_ad.dual_level():
        inputs["k_neg"] = torch.autograd.forward_ad.make_dual(inputs["k_neg"], inputs["k_neg"])
        with pytest.raises(RuntimeError, match="no forward-mode derivative; use backend='refer"):
            nasa_attention(**inputs, alpha=0.5, backend=backend)
        o = nasa_attention(**inputs, alpha=0.5, backend="reference")
        assert torch.autograd.forward_ad.unpack_dual(o).tangent is not None


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_torch_func_grad_is_refused(backend):
    inputs = make_inputs(SHAPE, torch.float32, DEVICE)

    def loss(q):
        return nasa_attention(**{**inputs, "q": q}, alpha=0.5, backend=backend).sum()

    with pytest.raises(RuntimeError, match="call .backward\\(\\) or use backend='reference'"):
        torch.func.grad(loss)(inputs["q"])


def test_reasons_are_sentences():
    for name in backends.NAMES:
        reason = backends.why_not(name, DEVICE)
        assert (reason is None) == (name in BACKENDS)
        assert reason is None or (len(reason) > 20 and not reason.endswith("."))


def test_triton_without_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reason = backends.why_not.__wrapped__("triton", torch.device("cuda"))
    assert reason == "the package triton is not installed; pip install 'triton>=3.6'"


def test_triton_on_an_amd_gpu(monkeypatch):
    """ROCm calls its devices cuda; nobody ran the kernels there, so `sdpa` takes the call."""
    monkeypatch.setattr("torch.version.hip", "6.4")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 4))
    device = torch.device("cuda", 63)
    assert backends.why_not.__wrapped__("triton", device) == (
        "its kernels were never run on an AMD GPU"
    )
    for name in ("why_not", "_running"):
        fresh = backends.why_not.__wrapped__ if name == "why_not" else {}
        monkeypatch.setattr(backends, name, fresh)
    assert backends.choose(device, torch.float16) == "sdpa"
    assert backends.choose(device, torch.float64) == "reference"


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_a_device_without_kernels_gets_two_attentions(kind):
    device = torch.device(kind)
    assert backends.choose(device, torch.float16) == "sdpa"
    assert backends.choose(device, torch.float64) == "reference"
    assert backends.available(device) == ("sdpa", "reference")


def test_an_old_triton(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.3.1")
    reason = backends.why_not.__wrapped__("triton", torch.device("cuda"))
    assert reason == "its kernels need Triton 3.6 or newer, triton 3.3.1 is installed"


def test_triton_on_an_old_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    reason = backends.why_not.__wrapped__("triton", torch.device("cuda"))
    assert reason == "its kernels need compute capability 8.0, this GPU has 7.5"


def test_a_dtype_that_a_back_end_does_not_take():
    """On a GPU it skips the fp32 cases of `cuda`, and nothing else does."""
    q = x(1, 1, 1, 8, device="meta")
    with pytest.raises(ValueError, match="takes torch.float16, torch.bfloat16, got q of") as error:
        backends.require("nasa_attention", "cuda", q)
    assert refuses_dtype("cuda", error.value)
    assert not refuses_dtype("triton", error.value) and not refuses_dtype(None, error.value)
    for backend, dtype in (("triton", "float32"), ("cuda", "bfloat16")):
        wrong = ValueError(f"backend {backend!r} takes torch.float16, got q of torch.{dtype}; cast")
        assert not refuses_dtype(backend, wrong)
    with pytest.raises(ValueError) as error:
        call(mask_pos=x(3, 5), backend="cpu")
    assert not refuses_dtype("cpu", error.value)
