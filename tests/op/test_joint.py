"""Joint attention on every back end, against fp64 and against properties that hold exactly."""

import re
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from support.cases import DEVICE, DTYPES, mask_of
from support.formula import exact_and_budget_of_joint
from torch import library
from torch.utils.flop_counter import FlopCounterMode

from nasa_kernels import backends, nasa_attention, nasa_joint_attention, ops
from nasa_kernels._joint import shared
from nasa_kernels.reference import RULES
from nasa_kernels.testing import largest_score

BACKENDS = tuple(
    name for name in (*ops.JOINT_FORWARD, "reference") if backends.why_not(name, DEVICE) is None
)
# b, image queries, h, d, shared keys, positive keys, negative keys, text queries
SIZES = {
    "flux": (1, 70, 2, 128, 70, 40, 33, (40, 33)),
    "streamed": (2, 37, 1, 64, 100, 150, 170, (0, 0)),
    "short-and-long": (1, 33, 1, 64, 20, 17, 200, (17, 0)),
    "odd": (2, 19, 3, 33, 31, 7, 9, (2, 5)),
    "no-shared": (1, 20, 2, 64, 0, 12, 16, (12, 16)),
    "no-negative": (1, 20, 2, 64, 24, 12, 0, (0, 0)),
    "no-positive": (1, 20, 2, 64, 24, 0, 12, (0, 3)),
    # tiles of nothing but text, and tiles that are mixed
    "much-text": (1, 40, 1, 16, 24, 130, 140, (130, 140)),
    "only-text": (1, 0, 2, 40, 24, 12, 8, (12, 8)),
}


def every_case():
    """The coefficients are computed in fp32 in any case, and Triton's interpreter is slow: there
    each pair of a rule and a size, a rule and a dtype, a size and a dtype."""
    for backend in BACKENDS:
        for (i, rule), (j, size) in product(enumerate(RULES), enumerate(SIZES)):
            if size not in ("flux", "streamed", "odd"):
                yield backend, rule, size, torch.float16
            elif backend == "triton" and DEVICE.type == "cpu":
                yield backend, rule, size, DTYPES[(i + j) % 3]
            else:
                yield from ((backend, rule, size, dtype) for dtype in DTYPES)


def make(name="odd", dtype=torch.float32, sizes=SIZES):
    b, image, h, d, n, n_pos, n_neg, text = sizes[name]
    generator = torch.Generator().manual_seed(0)

    def normal(length):
        return torch.randn(b, length, h, d, generator=generator).to(DEVICE, dtype)

    lengths = (image + sum(text), n, n, n_pos, n_pos, n_neg, n_neg)
    names = ("q", "k", "v", "k_pos", "v_pos", "k_neg", "v_neg")
    return {name: normal(x) for name, x in zip(names, lengths, strict=True)}, text


@pytest.mark.parametrize(("backend", "rule", "size", "dtype"), every_case(), ids=str)
def test_matches_fp64(backend, rule, size, dtype):
    inputs, text = make(size, dtype)
    o = nasa_joint_attention(**inputs, alpha=0.6, rule=rule, text_queries=text, backend=backend)
    assert o.dtype == dtype
    assert o.is_contiguous()
    exact, budget = exact_and_budget_of_joint(inputs, 0.6, rule, text)
    budget.check(o, exact)


@pytest.mark.parametrize("kind", ["bool", "bias"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_and_alpha_per_query(backend, rule, kind):
    inputs, text = make()
    alpha = torch.randn(2, 26, 3, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    masks = {"mask_pos": mask_of(kind, 2, 7), "mask_neg": mask_of(kind, 2, 9, seed=2)}
    # a sample whose negative has no key left; what masked rows hold must not count
    masks["mask_neg"][1] = False if kind == "bool" else float("-inf")
    inputs["v_neg"][1] = float("nan")
    o = nasa_joint_attention(
        **inputs, alpha=alpha, rule=rule, text_queries=text, **masks, backend=backend
    )
    exact, budget = exact_and_budget_of_joint(inputs, alpha, rule, text, **masks)
    budget.check(o, exact)


@pytest.mark.parametrize("kind", ["number", "tensor"])
@pytest.mark.parametrize("rule", RULES[:3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_alpha_0_is_the_plain_joint_attention(backend, rule, kind):
    inputs, _ = make("streamed", torch.float16)
    alpha = 0.0 if kind == "number" else torch.zeros((), device=DEVICE)
    o = nasa_joint_attention(**inputs, alpha=alpha, rule=rule, backend=backend)
    empty = {name: inputs[name][:, :0] for name in ("k_neg", "v_neg")}
    plain = nasa_joint_attention(**inputs | empty, alpha=0.7, rule="nasa-text", backend=backend)
    assert torch.equal(o, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_shared_keys_it_is_cross_attention(backend):
    """The first three rules are one operation then."""
    inputs, _ = make("no-shared")
    prompts = {name: inputs[name] for name in ("q", "k_pos", "v_pos", "k_neg", "v_neg")}
    expected = nasa_attention(**prompts, alpha=0.6, backend=backend)
    for rule in RULES[:3]:
        o = nasa_joint_attention(**inputs, alpha=0.6, rule=rule, backend=backend)
        torch.testing.assert_close(o, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_prompts_cancel(backend):
    inputs, _ = make("streamed")
    inputs |= {"k_neg": inputs["k_pos"], "v_neg": inputs["v_pos"]}
    o = nasa_joint_attention(**inputs, alpha=1.0, rule="nasa", backend=backend)
    assert o.abs().max() < 1e-6


# ---- rule "sum": Z_shared + Z+ - alpha Z- --------------------------------------------------------


def three_attentions(inputs, backend, **options):
    """`nasa_attention` over the prompts, and a plain attention over the shared keys."""
    q, k, v, *prompts = inputs.values()
    plain = nasa_attention(q, k, v, k[:, :0], v[:, :0], 0.0, backend=backend)
    return plain + nasa_attention(q, *prompts, backend=backend, **options)


@pytest.mark.parametrize("size", ["streamed", "no-shared", "no-positive", "no-negative"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_is_three_attentions(backend, size):
    dtype = torch.float64 if backend == "reference" else torch.float32
    inputs, _ = make(size, dtype)
    q = inputs["q"]
    alpha = torch.randn(q.shape[:3], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected = three_attentions(inputs, backend, alpha=alpha)
    o = nasa_joint_attention(**inputs, alpha=alpha, rule="sum", backend=backend)
    torch.testing.assert_close(o, expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_at_alpha_0_has_nothing_of_the_negative(backend):
    inputs, _ = make("streamed", torch.float16)
    empty = {name: inputs[name][:, :0] for name in ("k_neg", "v_neg")}
    plain = nasa_joint_attention(**inputs | empty, alpha=0.7, rule="sum", backend=backend)
    for alpha in (0.0, torch.zeros((), device=DEVICE)):
        o = nasa_joint_attention(**inputs, alpha=alpha, rule="sum", backend=backend)
        assert torch.equal(o, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_a_sum_equal_segments_cancel(backend):
    inputs, _ = make("flux")
    inputs |= {"k_neg": inputs["k"], "v_neg": inputs["v"]}
    prompt = (inputs["k_pos"], inputs["v_pos"])
    nothing = (x[:, :0] for x in prompt)
    expected = nasa_attention(inputs["q"], *prompt, *nothing, 0.0, backend=backend)
    o = nasa_joint_attention(**inputs, alpha=1.0, rule="sum", backend=backend)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_text_queries_do_not_see_the_other_prompt(backend):
    inputs, text = make("flux", torch.float16)
    call = {"rule": "nasa", "text_queries": text, "backend": backend}
    o = nasa_joint_attention(**inputs, alpha=0.6, **call)
    other = {name: torch.randn_like(inputs[name]) for name in ("k_neg", "v_neg")}
    changed = nasa_joint_attention(**inputs | other, alpha=0.1, **call)
    assert torch.equal(o[:, 70:110], changed[:, 70:110])
    assert not torch.equal(o[:, :70], changed[:, :70])
    assert not torch.equal(o[:, 110:], changed[:, 110:])


def test_flops_of_flux_stay_below_1_13_of_stock():
    def normal(n):
        return torch.empty(1, n, 24, 128, dtype=torch.bfloat16, device="meta")

    image, text = 4096, 256
    stock = 4 * 24 * 128 * (image + text) ** 2
    prompt = (normal(text),) * 4
    with FlopCounterMode(display=False) as counter:
        nasa_joint_attention(
            normal(image + 2 * text), normal(image), normal(image), *prompt, 0.5,
            text_queries=(text, text),
        )  # fmt: skip
    # the image's queries with all keys, the text's with their own and the image's
    pairs = image * (image + 2 * text) + 2 * text * (image + text)
    assert counter.get_total_flops() == 4 * 24 * 128 * pairs
    assert counter.get_total_flops() / stock < 1.13


@pytest.mark.parametrize("backend", [x for x in BACKENDS if x != "reference"])
def test_opcheck(backend):
    inputs, text = make()
    arguments = (*inputs.values(), mask_of("bool", 2, 7), None, None, 0.5, 0.25, 1, *text)
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    library.opcheck(ops.JOINT_FORWARD[backend], arguments, test_utils=utilities)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend):
    inputs, text = make("flux")

    def block(alpha, **x):
        return nasa_joint_attention(**x, alpha=alpha, text_queries=text, backend=backend) * 2

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for alpha in (0.3, 0.6):
        torch.testing.assert_close(compiled(alpha, **inputs), block(alpha, **inputs))


WRONG = {
    "rule": ({"rule": "nag"}, f"rule must be one of {RULES}"),
    "text-type": ({"text_queries": 5}, "text_queries must be two integers"),
    "text-many": ({"text_queries": (20, 7)}, "no more than the 26 queries of q together"),
    "text-negative": ({"text_queries": (-1, 0)}, "text_queries must be at least 0"),
    "shared": ({"k": torch.zeros(2, 31, 3, 8)}, "k must be [2 or 1, n, 3 or 1, 33] to match q"),
    "lengths": ({"v": torch.zeros(2, 30, 3, 33)}, "k has 31 tokens but v has 30"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    changes, message = WRONG[name]
    inputs, text = make()
    changes = {k: x.to(DEVICE) if torch.is_tensor(x) else x for k, x in changes.items()}
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        nasa_joint_attention(**{**inputs, "text_queries": text, **changes}, alpha=0.5)
    assert str(error.value).startswith("nasa_joint_attention: ")


def test_the_bound_on_scores_covers_the_shared_keys():
    inputs, _ = make()
    assert largest_score({**inputs, "k": inputs["k"] * 100}) > 10 * largest_score(inputs)


# ---- the first launch on a GPU -------------------------------------------------------------------


@pytest.fixture
def libraries(monkeypatch):
    """PyTorch's attention on a GPU, written down: cuDNN's refuses lengths of 7, flash takes all."""
    called = []

    def attend(name, refuses=()):
        def run(q, k, v, *args, **options):
            called.append(name)
            if k.shape[2] in refuses:
                raise RuntimeError("cuDNN Frontend error: no valid execution plans built")
            return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32), None

        return run

    aten = SimpleNamespace(
        _scaled_dot_product_cudnn_attention=attend("cudnn", (7,)),
        _scaled_dot_product_flash_attention=attend("flash"),
    )
    monkeypatch.setattr(shared, "_aten", aten)
    monkeypatch.setattr(shared, "_has_cudnn", lambda device: True)
    monkeypatch.setattr(shared, "_refused", set())
    return called


def attend_shared(l, n, d=64):
    q, k = (torch.empty(1, x, 2, d, dtype=torch.bfloat16, device="meta") for x in (l, n))
    o, lse = shared.attend_shared(q, k, k, 0.125)
    assert o.shape == q.shape and lse.shape == (1, 2, l)


def test_where_cudnn_refuses_flash_takes_over_and_it_is_not_asked_again(libraries):
    attend_shared(16, 7)
    assert libraries == ["cudnn", "flash"]
    attend_shared(16, 7)
    assert libraries == ["cudnn", "flash", "flash"]
    # other sizes are another question
    attend_shared(16, 8)
    attend_shared(17, 7)
    assert libraries[3:] == ["cudnn", "cudnn", "flash"]


@pytest.mark.parametrize(("l", "n", "d"), [(1, 8, 64), (8, 1, 64), (1, 1, 64), (8, 8, 136)])
def test_cudnn_is_not_asked_for_a_single_query_or_key(libraries, l, n, d):
    attend_shared(l, n, d)
    assert libraries == ["flash"]


def test_out_of_memory_is_no_refusal(libraries, monkeypatch):
    def exhausted(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(shared._aten, "_scaled_dot_product_cudnn_attention", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        attend_shared(16, 8)
    assert shared._refused == set() and libraries == []


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "vsf"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_alpha_0_costs_no_attention_of_the_image_to_the_negative(backend, rule):
    """Its own queries still see it, and nothing else does."""
    inputs, text = make("flux")
    inputs = {name: x.to("meta") for name, x in inputs.items()}
    with FlopCounterMode(display=False) as counter:
        nasa_joint_attention(**inputs, alpha=0.0, rule=rule, text_queries=text, backend=backend)
    seen = (70 + 40) * (70 + 40) + 33 * (70 + 33)
    assert counter.get_total_flops() == 4 * 2 * 128 * seen
