"""Properties with an exact answer: worth more than a tolerance."""

import pytest
import torch
from support.cases import (
    BACKENDS,
    DEVICE,
    DTYPES,
    is_long_in_fp32,
    make_inputs,
    mask_of,
    strided,
)

from nasa_kernels import nasa_attention
from nasa_kernels.testing import Shape

RESIDENT = Shape("resident", 2, 70, 2, 64, 77, 77)
STREAMED = Shape("streamed", 2, 70, 2, 40, 200, 200)
BOTH = pytest.mark.parametrize("shape", [RESIDENT, STREAMED], ids=str)
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def every_shape(*dtypes):
    """With every back end."""
    cases = [
        (backend, dtype, shape)
        for backend in BACKENDS
        for dtype in dtypes
        for shape in (RESIDENT, STREAMED)
        if not is_long_in_fp32(backend, dtype, shape.n_pos)
    ]
    return pytest.mark.parametrize(("backend", "dtype", "shape"), cases, ids=str)


@every_shape(*DTYPES)
def test_equal_prompts_cancel_to_zero(backend, dtype, shape):
    """Same K and V on both sides and alpha 1: both sides run the same code on the same numbers."""
    inputs = make_inputs(shape, dtype, DEVICE)
    inputs |= {"k_neg": inputs["k_pos"], "v_neg": inputs["v_pos"]}
    o = nasa_attention(**inputs, alpha=1.0, backend=backend)
    assert o.count_nonzero() == 0


@every_shape(*DTYPES)
def test_alpha_zero_is_plain_attention(backend, dtype, shape):
    """Bit for bit: as a number, as a tensor, and with no negative prompt at all."""
    inputs = make_inputs(shape, dtype, DEVICE)
    none = {**inputs, "k_neg": inputs["k_neg"][:, :0], "v_neg": inputs["v_neg"][:, :0]}
    plain = nasa_attention(**none, alpha=0.7, backend=backend)
    zero = torch.zeros((), device=DEVICE)
    assert torch.equal(nasa_attention(**inputs, alpha=0, backend=backend), plain)
    assert torch.equal(nasa_attention(**inputs, alpha=zero, backend=backend), plain)
    if backend != "reference":
        return
    # and the reference's plain attention is PyTorch's own
    q, k, v = (inputs[name].float().transpose(1, 2) for name in ("q", "k_pos", "v_pos"))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    u = torch.finfo(dtype).eps
    torch.testing.assert_close(plain, expected.to(dtype), rtol=u, atol=8 * 2**-23)


@EVERY_BACKEND
def test_alpha_zero_ignores_where_the_rows_of_the_negative_prompt_start(backend):
    """Rows that TMA could not read, or that do not move, must not lead to other sums."""
    inputs = make_inputs(RESIDENT, torch.float16, DEVICE)
    plain = nasa_attention(**inputs, alpha=0, backend=backend)
    zero = torch.zeros((), device=DEVICE)
    for view in (strided, lambda x: x[:, :1].expand_as(x)):
        views = {name: view(inputs[name]) for name in ("k_neg", "v_neg")}
        o = nasa_attention(**{**inputs, **views}, alpha=zero, backend=backend)
        assert torch.equal(o, plain)


@EVERY_BACKEND
def test_alpha_zero_ignores_a_negative_prompt_of_nan(backend):
    """The number 0 reads no negative prompt; a tensor of 0 ignores what is masked in it."""
    inputs = make_inputs(RESIDENT, torch.float16, DEVICE)
    plain = nasa_attention(**inputs, alpha=0, backend=backend)
    mask = mask_of("bool", 2, 77)
    for name in ("k_neg", "v_neg"):
        inputs[name] = torch.where(mask[..., None, None], inputs[name], float("nan"))
    zero = torch.zeros((), device=DEVICE)
    o = nasa_attention(**inputs, alpha=zero, mask_neg=mask, backend=backend)
    assert torch.equal(o, plain)
    everything = {**inputs, "v_neg": torch.full_like(inputs["v_neg"], float("inf"))}
    assert torch.equal(nasa_attention(**everything, alpha=0, backend=backend), plain)


@EVERY_DTYPE
@EVERY_BACKEND
def test_one_negative_key_is_subtracted_whole(backend, dtype):
    """Softmax over one key is 1 whatever q is: Z- is v_neg itself. Small integers: no rounding."""
    inputs = make_inputs(RESIDENT._replace(n_pos=1, n_neg=1), dtype, DEVICE)
    inputs |= {name: inputs[name].mul(4).round() for name in ("v_pos", "v_neg")}
    o = nasa_attention(**inputs, alpha=0.5, backend=backend)
    expected = (inputs["v_pos"] - 0.5 * inputs["v_neg"]).expand_as(o)
    torch.testing.assert_close(o, expected, rtol=2e-7 if dtype == torch.float32 else 0, atol=0)


@every_shape(*DTYPES)
def test_zero_queries_average_the_values(backend, dtype, shape):
    """q = 0 weighs all keys alike, in any order of the keys; sums of small integers are exact."""
    n = 64 if shape is RESIDENT else 256
    inputs = make_inputs(shape._replace(n_pos=n, n_neg=n), dtype, DEVICE)
    inputs["q"] = torch.zeros_like(inputs["q"])
    inputs |= {name: inputs[name].mul(2).round() for name in ("v_pos", "v_neg")}
    o = nasa_attention(**inputs, alpha=0.5, backend=backend)
    mean = inputs["v_pos"].float().mean(1) - 0.5 * inputs["v_neg"].float().mean(1)
    assert torch.equal(o, mean[:, None].to(dtype).expand_as(o))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(5))
    permuted = {name: x if name == "q" else x[:, order] for name, x in inputs.items()}
    assert torch.equal(nasa_attention(**permuted, alpha=0.5, backend=backend), o)


@EVERY_BACKEND
def test_order_of_the_keys_does_not_matter(backend):
    inputs = make_inputs(RESIDENT, torch.float32, DEVICE)
    o = nasa_attention(**inputs, alpha=0.5, backend=backend)
    order = torch.randperm(77, generator=torch.Generator().manual_seed(5))
    permuted = {name: x if name == "q" else x[:, order] for name, x in inputs.items()}
    p = nasa_attention(**permuted, alpha=0.5, backend=backend)
    torch.testing.assert_close(o, p, rtol=1e-5, atol=1e-6)


@every_shape(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("factor", [2.0, -0.25])
def test_scaling_values_by_a_power_of_two(backend, factor, dtype, shape):
    """O is linear in V, and a power of two rounds nothing (fp16 has small numbers that it does)."""
    inputs = make_inputs(shape, dtype, DEVICE)
    scaled = {name: x * factor if name[0] == "v" else x for name, x in inputs.items()}
    o = nasa_attention(**inputs, alpha=0.5, backend=backend)
    assert torch.equal(nasa_attention(**scaled, alpha=0.5, backend=backend), o * factor)


@EVERY_BACKEND
def test_alpha_is_a_weight_of_the_negative_values(backend):
    """alpha 1 with half the values is alpha 0.5, bit for bit: halving rounds nothing."""
    inputs = make_inputs(RESIDENT, torch.float32, DEVICE)
    half = {**inputs, "v_neg": inputs["v_neg"] * 0.5}
    o = nasa_attention(**inputs, alpha=0.5, backend=backend)
    assert torch.equal(nasa_attention(**half, alpha=1.0, backend=backend), o)


@BOTH
@EVERY_BACKEND
def test_alpha_splits(backend, shape):
    """A map of alphas is each alpha on its rows: per sample, region and head, bit for bit."""
    inputs = make_inputs(shape, torch.float16, DEVICE)
    values = (0.0, 0.25, 1.0)
    index = torch.arange(2 * 70 * 2, device=DEVICE).view(2, 70, 2) % 3
    alpha = torch.tensor(values, device=DEVICE)[index]
    o = nasa_attention(**inputs, alpha=alpha, backend=backend)
    for i, value in enumerate(values):
        alone = nasa_attention(**inputs, alpha=value, backend=backend)
        assert torch.equal(o[index == i], alone[index == i])


@every_shape(*DTYPES)
def test_a_masked_key_is_an_absent_key(backend, dtype, shape):
    """Masking the tail equals cutting it, whatever the masked rows hold."""
    inputs = make_inputs(shape, dtype, DEVICE)
    n = shape.n_pos - 13
    cut = {**inputs, "k_pos": inputs["k_pos"][:, :n], "v_pos": inputs["v_pos"][:, :n]}
    expected = nasa_attention(**cut, alpha=0.5, backend=backend)
    mask = (torch.arange(shape.n_pos, device=DEVICE) < n).expand(2, -1)
    for name in ("k_pos", "v_pos"):
        inputs[name] = torch.where(mask[..., None, None], inputs[name], float("nan"))
    o = nasa_attention(**inputs, alpha=0.5, mask_pos=mask, backend=backend)
    u = torch.finfo(dtype).eps
    torch.testing.assert_close(o, expected, rtol=2 * u, atol=8 * u if dtype == torch.float32 else u)


@pytest.mark.parametrize("kind", ["bool", "bias"])
@BOTH
@EVERY_BACKEND
def test_a_prompt_whose_keys_are_all_masked_contributes_nothing(backend, shape, kind):
    inputs = make_inputs(shape, torch.float16, DEVICE)
    mask = torch.zeros(2, shape.n_neg, dtype=torch.bool, device=DEVICE)
    if kind == "bias":
        mask = torch.where(mask, 0.0, float("-inf"))
    for name in ("k_neg", "v_neg"):
        inputs[name] = torch.full_like(inputs[name], float("nan"))
    o = nasa_attention(**inputs, alpha=0.5, mask_neg=mask, backend=backend)
    assert torch.equal(o, nasa_attention(**inputs, alpha=0, backend=backend))


@EVERY_BACKEND
def test_identical_keys_are_one_key_with_a_bias_of_log_m(backend):
    """m identical padded tokens may be passed as one, with log m as its bias."""
    inputs = make_inputs(RESIDENT, torch.float32, DEVICE)
    for letter in "kv":
        inputs[f"{letter}_neg"][:, 20:] = inputs[f"{letter}_neg"][:, 20:21]
    expected = nasa_attention(**inputs, alpha=0.5, backend=backend)
    short = {**inputs, "k_neg": inputs["k_neg"][:, :21], "v_neg": inputs["v_neg"][:, :21]}
    bias = torch.zeros(1, 21, device=DEVICE)
    bias[:, 20] = torch.log(torch.tensor(57.0))
    o = nasa_attention(**short, alpha=0.5, mask_neg=bias, backend=backend)
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-6)


@EVERY_BACKEND
def test_equal_finite_biases_change_nothing(backend):
    """All keys at -10000, as diffusers masks a prompt: a bias of all is a bias of none."""
    inputs = make_inputs(RESIDENT, torch.float32, DEVICE)
    bias = torch.full((1, 77), -10000.0, device=DEVICE)
    o = nasa_attention(**inputs, alpha=0.5, mask_pos=bias, mask_neg=bias, backend=backend)
    expected = nasa_attention(**inputs, alpha=0.5, backend=backend)
    # a score keeps 2^-10 of its digits beside 10000
    torch.testing.assert_close(o, expected, rtol=1e-2, atol=5e-3)


@BOTH
@EVERY_BACKEND
def test_inputs_are_not_written(backend, shape):
    inputs = make_inputs(shape, torch.bfloat16, DEVICE)
    inputs["mask_pos"] = mask_of("bias", 2, shape.n_pos)
    before = {name: x.clone() for name, x in inputs.items()}
    leaves = {name: x if "mask" in name else x.requires_grad_() for name, x in inputs.items()}
    nasa_attention(**leaves, alpha=0.5, backend=backend).sum().backward()
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


@EVERY_BACKEND
def test_deterministic(backend):
    inputs = make_inputs(RESIDENT, torch.bfloat16, DEVICE)
    first, second = (nasa_attention(**inputs, alpha=0.5, backend=backend) for _ in range(2))
    assert torch.equal(first, second)
