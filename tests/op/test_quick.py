"""Calls that skip the checks: the same bits, the same errors, little work before the operator."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.fx.experimental.proxy_tensor
from support.cases import BACKENDS, DEVICE, make_inputs, mask_of
from support.launches import calls_of_python
from test_errors import SHAPE, WRONG
from test_joint import WRONG as WRONG_JOINT
from test_joint import make as make_joint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nasa_kernels import (
    _quick,
    attention,
    backends,
    nag_attention,
    nag_joint_attention,
    nasa_attention,
    nasa_joint_attention,
)
from nasa_kernels import joint_attention as joint_module
from nasa_kernels import nag as nag_module

QUICK = [name for name in BACKENDS if name in backends.RECORDS and backends.RECORDS[name].checks]
NAG = {"nag_scale": 3.0, "nag_tau": 2.5, "nag_alpha": 0.5}
EVERY = pytest.mark.parametrize("backend", QUICK)
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(_quick, "_known", {})


def message(call) -> str:
    with pytest.raises((ValueError, RuntimeError, AttributeError)) as error:
        call()
    return f"{type(error.value).__name__}: {error.value}"


def without_checks(monkeypatch, call):
    """What a call gives that may not look anything up in the checks."""

    def unexpected(*args):
        raise AssertionError("the call was checked again")

    with monkeypatch.context() as patch:
        for module in (attention, joint_module, nag_module):
            patch.setattr(module, "prepare", unexpected)
        return call()


@pytest.mark.parametrize("case", WRONG)
@EVERY
def test_an_error_has_the_words_that_it_has_without(backend, case):
    changes, _ = WRONG[case]
    call = {**make_inputs(SHAPE, torch.float32, DEVICE), "alpha": 0.5, "backend": backend}
    wrong = call | changes
    cold = message(lambda: nasa_attention(**wrong))
    nasa_attention(**call)
    assert len(_quick._known) == 1
    assert message(lambda: nasa_attention(**wrong)) == cold
    # and the same of NAG, which has a share in place of alpha
    if not case.startswith("alpha"):
        del call["alpha"], wrong["alpha"]
        _quick._known.clear()
        cold = message(lambda: nag_attention(**wrong, **NAG))
        nag_attention(**call, **NAG)
        assert len(_quick._known) == 1
        assert message(lambda: nag_attention(**wrong, **NAG)) == cold


@EVERY
def test_a_tensor_of_no_device_is_named_where_modes_see_the_operator_too(backend):
    """The operator itself would compute nothing and return a tensor of no device."""
    call = {**make_inputs(SHAPE, torch.float32, DEVICE), "alpha": 0.5, "backend": backend}
    wrong = call | {"k_pos": call["k_pos"].to("meta")}
    cold = message(lambda: nasa_attention(**wrong))
    nasa_attention(**call)
    with FlopCounterMode(display=False):
        assert message(lambda: nasa_attention(**wrong)) == cold


@pytest.mark.parametrize("case", [*WRONG_JOINT, "k-pos", "half-v"])
@EVERY
def test_an_error_of_joint_attention_has_the_same_words(backend, case):
    inputs, text = make_joint()
    more = {"k-pos": {"k_pos": inputs["k_pos"][..., :8]}, "half-v": {"v": inputs["v"].half()}}
    changes = more[case] if case in more else WRONG_JOINT[case][0]
    changes = {k: x.to(DEVICE) if torch.is_tensor(x) else x for k, x in changes.items()}
    call = {**inputs, "alpha": 0.5, "text_queries": text, "backend": backend}
    cold = message(lambda: nasa_joint_attention(**call | changes))
    nasa_joint_attention(**call)
    assert len(_quick._known) == 1
    assert message(lambda: nasa_joint_attention(**call | changes)) == cold


WRONG_NAG = {
    "tau": {"nag_tau": 0.0},
    "scale": {"nag_scale": "3"},
    "norm": {"nag_norm": True},
    "share": {"nag_alpha": float("nan")},
    "map": {"nag_alpha": torch.ones(2, 2, 1)},
    "map-of-heads": {"nag_alpha": torch.ones(3)},
    "map-of-doubles": {"nag_alpha": torch.ones((2, 1, 1), dtype=torch.float64)},
    "key": {"k_neg": torch.zeros(3)},
    "softmax-scale": {"scale": -float("inf")},
}


@pytest.mark.parametrize("case", [*WRONG_NAG, "text"])
@pytest.mark.parametrize("is_joint", [False, True], ids=["cross", "joint"])
@EVERY
def test_an_error_of_nag_has_the_same_words(backend, is_joint, case):
    if case == "text" and not is_joint:
        pytest.skip("cross-attention has no queries of the texts")
    function = nag_joint_attention if is_joint else nag_attention
    inputs, text = make_joint() if is_joint else (make_inputs(SHAPE, torch.float32, DEVICE), None)
    call = {**inputs, **NAG, "backend": backend} | ({"text_queries": text} if is_joint else {})
    changes = WRONG_NAG.get(case, {"text_queries": (1 << 20, 0)})
    wrong = call | {k: x.to(DEVICE) if torch.is_tensor(x) else x for k, x in changes.items()}
    cold = message(lambda: function(**wrong))
    function(**call)
    assert len(_quick._known) == 1
    assert message(lambda: function(**wrong)) == cold


@pytest.mark.parametrize("share", ["number", "map", "off"])
@EVERY
def test_the_bits_of_joint_nag_are_the_same(backend, share, monkeypatch):
    inputs, text = make_joint()
    shares = {"number": 0.5, "off": 0.0, "map": torch.tensor([[[0.5]], [[0.0]]], device=DEVICE)}
    call = {**inputs, **NAG, "nag_alpha": shares[share], "text_queries": text, "backend": backend}
    cold = nag_joint_attention(**call)
    if share == "off":
        # checked again, and the same
        assert torch.equal(nag_joint_attention(**call), cold)
        return
    warm = without_checks(monkeypatch, lambda: nag_joint_attention(**call))
    assert torch.equal(warm, cold)


VARIANTS = {
    "plain": {},
    "masks": {"mask_pos": mask_of("bool", 2, 5), "mask_neg": mask_of("bias", 1, 7)},
    "per-sample": {"alpha": torch.tensor([[[0.5]], [[-1.0]]], device=DEVICE)},
    "per-head": {"alpha": torch.tensor([0.5, -1.0, 0.0], device=DEVICE)},
    "one-number": {"alpha": torch.tensor(0.7, device=DEVICE)},
    "zero": {"alpha": 0},
    "scale": {"scale": 0.3},
}


@pytest.mark.parametrize("variant", VARIANTS)
@EVERY
def test_the_bits_are_the_same(backend, variant, monkeypatch):
    inputs = make_inputs(SHAPE, torch.float32, DEVICE)
    call = {**inputs, "alpha": 0.5, "backend": backend, **VARIANTS[variant]}
    cold = nasa_attention(**call)
    for name in ("k_neg", "v_neg"):
        call[name] = call[name].clone()
    assert torch.equal(without_checks(monkeypatch, lambda: nasa_attention(**call)), cold)
    if "alpha" not in VARIANTS[variant]:
        del call["alpha"]
        cold = nag_attention(**call, **NAG)
        warm = without_checks(monkeypatch, lambda: nag_attention(**call, **NAG))
        assert torch.equal(warm, cold)


@EVERY
def test_one_prompt_for_all_needs_no_checks(backend, monkeypatch):
    inputs = make_inputs(SHAPE, torch.float32, DEVICE)
    inputs |= {name: inputs[name][:1, :, :1] for name in ("k_neg", "v_neg")}
    cold = nasa_attention(**inputs, alpha=0.5, backend=backend)
    warm = without_checks(monkeypatch, lambda: nasa_attention(**inputs, alpha=0.5, backend=backend))
    assert torch.equal(warm, cold)


@pytest.mark.parametrize("rule", ["nasa", "nasa-cross", "vsf", "sum"])
@EVERY
def test_the_bits_of_joint_attention_are_the_same(backend, rule, monkeypatch):
    inputs, text = make_joint()
    alpha = torch.tensor([[[0.5]], [[-1.0]]], device=DEVICE)
    for strength in (0.5, alpha):
        call = {**inputs, "alpha": strength, "rule": rule, "text_queries": text}
        cold = nasa_joint_attention(**call, backend=backend)
        warm = without_checks(
            monkeypatch, lambda c=call: nasa_joint_attention(**c, backend=backend)
        )
        assert torch.equal(warm, cold)


@EVERY
def test_what_a_quick_call_would_lose_is_checked(backend):
    """Gradients, autocast, forward mode, a shape without tensors: after a call that is known."""
    inputs = make_inputs(SHAPE, torch.float32, DEVICE)
    nasa_attention(**inputs, alpha=0.5, backend=backend)
    alpha = torch.tensor(0.5, device=DEVICE, requires_grad=True)
    for changes in ({"alpha": alpha}, {"v_neg": inputs["v_neg"].clone().requires_grad_()}):
        call, (leaf,) = {**inputs, "alpha": 0.5, **changes}, changes.values()
        found, expected = (
            torch.autograd.grad(nasa_attention(**call, backend=name).sum(), leaf)[0]
            for name in (backend, "reference")
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not nasa_attention(**inputs, alpha=alpha, backend=backend).requires_grad
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert nasa_attention(**inputs, alpha=0.5, backend=backend).dtype == torch.bfloat16
    meta = {name: x.to("meta") for name, x in inputs.items()}
    wrong = meta | {"k_neg": meta["k_neg"][..., :3]}
    assert nasa_attention(**meta, alpha=0.5, backend=backend).is_meta
    with pytest.raises(ValueError, match="k_neg must be"):
        nasa_attention(**wrong, alpha=0.5, backend=backend)


def test_who_looks_at_operators_sees_them():
    """A quick call may go past the operator: not where someone is told of operators, or changes
    what they do."""
    known = _quick.Known("operator", (), "triton", DEVICE.type, 1.0, "function")
    assert _quick.past_operator(known, known.function) == "function"
    with torch.inference_mode():
        assert _quick.past_operator(known, known.function) == "function"
    seen = []

    def look(x):
        seen.append(_quick.past_operator(known, known.function))
        return x + 1

    x = torch.ones(2)
    with FlopCounterMode(display=False):
        look(x)
    torch.vmap(look)(x)
    torch.func.functionalize(look)(x)
    torch.jit.trace(look, x, check_trace=False)
    torch.fx.experimental.proxy_tensor.make_fx(look)(x)
    with torch.profiler.profile():
        look(x)
    assert seen == ["operator"] * 6
    assert _quick.past_operator(known, known.function) == "function"


@pytest.mark.parametrize("name", ["nasa", "nag"])
@EVERY
def test_a_mode_sees_one_operator_in_a_quick_call(backend, name):
    inputs = make_inputs(SHAPE, torch.float32, DEVICE)
    more = {"alpha": 0.5} if name == "nasa" else NAG
    function = nasa_attention if name == "nasa" else nag_attention
    seen = []

    class See(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            seen.append(f.name())
            return f(*args, **kwargs or {})

    cold = function(**inputs, **more, backend=backend)
    assert len(_quick._known) == 1
    with See():
        warm = function(**inputs, **more, backend=backend)
    assert torch.equal(warm, cold)
    assert seen == [f"nasa_kernels::{'forward' if name == 'nasa' else 'nag'}_{backend}"]


# ---- the work before an operator -----------------------------------------------------------------


def test_a_quick_call_does_little_before_its_operator():
    """Of any back end that checks for itself; counted, since times stray."""
    inputs = make_inputs(SHAPE, torch.bfloat16, DEVICE)
    known = _quick.Known(lambda q, *args: q, (), "cuda", DEVICE.type, 0.25)
    key = (("nasa_attention", "cuda", "nasa"), torch.bfloat16, inputs["q"].device, 16)
    _quick._known[key] = known
    mask = torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
    alpha = torch.tensor(0.5, device=DEVICE)

    def count(**options):
        call = {**inputs, "alpha": 0.5, "backend": "cuda", **options}
        return calls_of_python(lambda: nasa_attention(**call))

    with torch.no_grad():
        plain = count()
        # the function, `quick`, three questions, a look-up, the operator
        assert plain <= 10
        assert count(mask_pos=mask) <= plain + 1
        assert count(alpha=alpha) <= plain
        assert count(k_neg=inputs["k_neg"][:1], v_neg=inputs["v_neg"][:1]) <= plain
        # NAG looks at its settings as well
        _quick._known[(("nag_attention", "cuda"), *key[1:])] = known
        nag = calls_of_python(lambda: nag_attention(**inputs, **NAG, backend="cuda"))
        assert nag <= plain + 1


@pytest.fixture(scope="module")
def remembered() -> dict:
    """Of each call what the driver was told the first time and the second; Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        [sys.executable, ROOT / "tests/support/launches.py"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "call",
    ["plain", "masks", "alpha", "zero", "broadcast", "unaligned", "joint", "nag", "joint-nag"],
)
def test_a_remembered_launch_is_the_one_that_triton_makes(remembered, call):
    """Grid, integers, numbers and constants; the same operands in the same places."""
    found = remembered[call]
    # of NAG that of Z+ and Z-, and that of what is made of them
    expected = 2 if call.endswith("nag") else 1
    assert found["launches"] == found["planned"] == expected
    assert found["same"] and found["operands"]


def test_the_work_of_a_remembered_launch(remembered):
    plain = remembered["plain"]["calls"]
    # 260 before launches were remembered
    assert plain <= 48
    # of NAG a second launch, of joint attention PyTorch's own and what it needs
    most = {"masks": 4, "alpha": 4, "broadcast": 2, "nag": 32, "joint": 36, "joint-nag": 66}
    for call, more in most.items():
        assert remembered[call]["calls"] <= plain + more, call
