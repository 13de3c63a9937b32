"""The operator layer: registration, compilation, counting, autocast, transforms."""

import subprocess
import sys

import pytest
import torch
from support import formula
from support.cases import BACKENDS, DEVICE, make_inputs, mask_of, with_rule
from torch import library
from torch.utils.flop_counter import FlopCounterMode

from nasa_kernels import backends, nasa_attention, ops
from nasa_kernels.testing import Shape

SHAPE = Shape("ops", 2, 20, 2, 16, 9, 5)
# b, l, h, d, n_pos, n_neg
SIZES = ((2, 20, 3, 16, 9, 5), (4, 24, 3, 16, 7, 11), (5, 31, 3, 16, 13, 6), (6, 9, 3, 16, 21, 4))
FUSED = [name for name in BACKENDS if name in backends.FUSED]


def arguments(dtype=torch.float32, alpha_map=True, masks=True, requires_grad=True):
    """Arguments of a forward operator."""
    inputs = make_inputs(SHAPE, dtype, DEVICE)
    tensors = [x.requires_grad_(requires_grad) for x in inputs.values()]
    mask = (mask_of("bool", 2, 9), mask_of("bias", 2, 5)) if masks else (None, None)
    alpha = None
    if alpha_map:
        alpha = torch.full((1, 1, 2), 0.5, device=DEVICE).expand(2, 20, 2)
        alpha = alpha.detach().requires_grad_(requires_grad)
    return (*tensors, *mask, alpha, 0.5, 0.25)


def kept_of(result):
    """What an attention operator returns beside O for its backward pass."""
    return result[1:] if isinstance(result, tuple) else ()


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "everything"])
@pytest.mark.parametrize("backend", FUSED)
def test_opcheck(backend, plain):
    attention, forward = ops.ATTENTION[backend], ops.FORWARD[backend]
    backward = getattr(torch.ops.nasa_kernels, f"backward_{backend}").default
    call = arguments(alpha_map=not plain, masks=not plain)
    library.opcheck(attention, with_rule(attention, call))
    without = arguments(alpha_map=not plain, masks=not plain, requires_grad=False)
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    library.opcheck(forward, with_rule(forward, without), test_utils=utilities)
    grad_o = torch.randn_like(without[0])
    needs = [True, False, True, True, True, not plain]
    kept = kept_of(attention(*with_rule(attention, without)))
    inputs = (grad_o, *kept, *with_rule(backward, without), needs)
    library.opcheck(backward, inputs, test_utils=utilities)


def test_the_seam_for_cuda_is_there():
    """Schema, fake and FLOPs exist before, and without, the extension that implements them."""
    names = (str(op._schema).split("(")[0] for op in (ops.FORWARD["cuda"], ops.ATTENTION["cuda"]))
    assert list(names) == ["nasa_kernels::forward_cuda", "nasa_kernels::attention_cuda"]
    args = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments()]
    with FlopCounterMode(display=False) as counter:
        o = ops.FORWARD["cuda"](*with_rule(ops.FORWARD["cuda"], tuple(args)))
        assert o.shape == (2, 20, 2, 16)
    assert counter.get_total_flops() > 0


@pytest.mark.parametrize("kind", ["number", "tensor"])
@pytest.mark.parametrize("backend", [*BACKENDS, None])
def test_compiles_whole_with_changing_sizes_and_alpha(backend, kind):
    """No graph break; batch, queries and both lengths dynamic; alpha never recompiles."""
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def layer(q, k_pos, v_pos, k_neg, v_neg, alpha):
        return nasa_attention(q * 2, k_pos, v_pos, k_neg, v_neg, alpha, backend=backend) + 1

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=count, dynamic=True)
    for i, sizes in enumerate(SIZES):
        # no two sizes alike: the compiler would take them for one
        inputs = make_inputs(Shape("dynamic", *sizes), torch.float32, DEVICE)
        alpha = 0.25 + i / 8
        if kind == "tensor":
            alpha = torch.tensor(alpha, device=DEVICE)
        torch.testing.assert_close(compiled(**inputs, alpha=alpha), layer(**inputs, alpha=alpha))
    # dynamic=True makes the number a symbol from the first call on
    assert len(graphs) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_with_a_scale_that_is_an_attribute(backend):
    class Layer(torch.nn.Module):
        scale = 0.3

        def forward(self, q, k_pos, v_pos, k_neg, v_neg):
            return nasa_attention(
                q, k_pos, v_pos, k_neg, v_neg, 0.5, scale=self.scale, backend=backend
            )

    torch._dynamo.reset()
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    inputs = make_inputs(SHAPE, torch.float32, DEVICE)
    for layer.scale in (0.3, 0.4, 0.5):
        torch.testing.assert_close(compiled(**inputs), layer(**inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_gradients(backend):
    def loss(q, k_pos, v_pos, k_neg, v_neg, alpha):
        return nasa_attention(q, k_pos, v_pos, k_neg, v_neg, alpha, backend=backend).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = {k: x.requires_grad_() for k, x in make_inputs(SHAPE, torch.float32, DEVICE).items()}
    inputs["alpha"] = torch.tensor(0.5, device=DEVICE, requires_grad=True)
    leaves = list(inputs.values())
    found = torch.autograd.grad(compiled(**inputs), leaves)
    expected = torch.autograd.grad(loss(**inputs), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_inductor():
    """The compiler that people use, on the back end that this machine chooses."""

    def layer(q, k_pos, v_pos, k_neg, v_neg, alpha):
        return nasa_attention(q * 2, k_pos, v_pos, k_neg, v_neg, alpha).flatten(2).relu()

    torch._dynamo.reset()
    inputs = make_inputs(SHAPE, torch.float32, DEVICE)
    # a view whose strides the compiler must keep: d contiguous, heads not
    inputs["q"] = inputs["q"].transpose(1, 2).contiguous().transpose(1, 2)
    compiled = torch.compile(layer, fullgraph=True)
    alpha = torch.tensor(0.5, device=DEVICE)
    torch.testing.assert_close(compiled(**inputs, alpha=alpha), layer(**inputs, alpha=alpha))


def flops(function, device, backward):
    inputs = make_inputs(SHAPE, torch.float32, "cpu")
    inputs = {name: x.to(device).requires_grad_() for name, x in inputs.items()}
    with FlopCounterMode(display=False) as counter:
        o = function(**inputs)
        if backward:
            o.backward(torch.ones_like(o))
    return counter.get_total_flops()


# `sdpa` is counted by PyTorch, which has no formula for its own attention on the CPU
@pytest.mark.parametrize("backend", [None, *FUSED, "reference"])
@pytest.mark.parametrize("device", ["meta", DEVICE], ids=str)
def test_flops_forward(device, backend):
    pairs = SHAPE.b * SHAPE.h * SHAPE.l * (SHAPE.n_pos + SHAPE.n_neg) * SHAPE.d
    count = flops(lambda **x: nasa_attention(**x, alpha=0.5, backend=backend), device, False)
    assert count == 4 * pairs


@pytest.mark.parametrize("device", ["meta", DEVICE], ids=str)
@pytest.mark.parametrize("backend", [None, *FUSED])
def test_flops_backward(device, backend):
    """Two products forward, five backward, as PyTorch counts its fused attention."""
    pairs = SHAPE.b * SHAPE.h * SHAPE.l * (SHAPE.n_pos + SHAPE.n_neg) * SHAPE.d
    count = flops(lambda **x: nasa_attention(**x, alpha=0.5, backend=backend), device, True)
    assert count == (4 + 10) * pairs


def test_flops_of_what_is_not_asked_for_are_not_counted():
    inputs = make_inputs(SHAPE, torch.float32, "meta")
    inputs["q"].requires_grad_()
    pairs = SHAPE.b * SHAPE.h * SHAPE.l * (SHAPE.n_pos + SHAPE.n_neg) * SHAPE.d
    with FlopCounterMode(display=False) as counter:
        nasa_attention(**inputs, alpha=0.5).sum().backward()
    assert counter.get_total_flops() == (4 + 6) * pairs


def test_flops_on_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        q = torch.empty(2, 20, 2, 16)
        k = torch.empty(2, 9, 2, 16)
        assert nasa_attention(q, k, k, k, k, 0.5).shape == q.shape
    assert counter.get_total_flops() == 4 * 2 * 2 * 20 * 18 * 16


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_is_that_of_scaled_dot_product_attention(backend):
    inputs = make_inputs(SHAPE, torch.float32, DEVICE)
    alpha = torch.tensor(0.3, device=DEVICE)
    bias = mask_of("bias", 2, 9)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        o = nasa_attention(**inputs, alpha=alpha, mask_pos=bias, backend=backend)
        q = inputs["q"].transpose(1, 2)
        stock = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert o.dtype == stock.dtype == torch.bfloat16
    # q, k, v were rounded; alpha and the bias were not
    cast = {name: x.bfloat16() for name, x in inputs.items()}
    assert torch.equal(o, nasa_attention(**cast, alpha=alpha, mask_pos=bias, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_flow_through_autocast(backend):
    inputs = {k: x.requires_grad_() for k, x in make_inputs(SHAPE, torch.float32, DEVICE).items()}
    with torch.autocast(DEVICE.type, torch.bfloat16):
        o = nasa_attention(**inputs, alpha=0.5, backend=backend)
    o.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in inputs.values())


def test_gradcheck_and_gradgradcheck():
    """The oracle itself, against finite differences."""
    inputs = [x.requires_grad_() for x in make_inputs(SHAPE, torch.float64, DEVICE).values()]
    alpha = torch.rand(2, 1, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    masks = {"mask_pos": mask_of("bool", 2, 9), "mask_neg": mask_of("bias", 2, 5).double()}

    def function(*x):
        return nasa_attention(*x, **masks, backend="reference")

    small = [x[:, :3].detach().requires_grad_() for x in inputs]
    masks = {name: mask[:, :3] for name, mask in masks.items()}
    assert torch.autograd.gradcheck(function, (*small, alpha), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (*small, alpha), fast_mode=True)


@pytest.mark.parametrize("backend", FUSED)
def test_gradcheck_of_fused_back_ends(backend):
    """fp32 finite differences: coarse, but independent of the reference."""
    small = SHAPE._replace(b=1, l=3, h=1, d=4, n_pos=4, n_neg=3)
    inputs = [x.requires_grad_() for x in make_inputs(small, torch.float32, DEVICE).values()]
    alpha = torch.tensor(0.5, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: nasa_attention(*x, backend=backend),
        (*inputs, alpha), eps=1e-2, atol=2e-3, rtol=2e-2, fast_mode=backend == "triton",
    )  # fmt: skip


def test_torch_func_grad():
    inputs = make_inputs(SHAPE, torch.float32, DEVICE)

    def loss(q):
        o = nasa_attention(**{**inputs, "q": q}, alpha=0.5, backend="reference")
        return o.square().sum()

    q = inputs["q"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(q), q)
    torch.testing.assert_close(torch.func.grad(loss)(inputs["q"]), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_over_prompts(backend):
    """Several negative prompts for one image, mapped."""
    inputs = make_inputs(SHAPE, torch.float32, DEVICE)
    k_neg = torch.stack([inputs["k_neg"], -inputs["k_neg"], inputs["k_neg"] * 2])

    def one(k):
        return nasa_attention(**{**inputs, "k_neg": k}, alpha=0.5, backend=backend)

    mapped = torch.func.vmap(one)(k_neg)
    torch.testing.assert_close(mapped, torch.stack([one(k) for k in k_neg]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing(backend):
    inputs = {k: x.requires_grad_() for k, x in make_inputs(SHAPE, torch.float32, DEVICE).items()}
    leaves = list(inputs.values())

    def layer(*x):
        return nasa_attention(*x, 0.5, backend=backend)

    expected = torch.autograd.grad(layer(*leaves).sum(), leaves)
    again = torch.utils.checkpoint.checkpoint(layer, *leaves, use_reentrant=False)
    found = torch.autograd.grad(again.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_mode(backend):
    inputs = make_inputs(SHAPE, torch.float32, DEVICE)
    with torch.inference_mode():
        o = nasa_attention(**inputs, alpha=0.5, backend=backend)
    torch.testing.assert_close(o, formula.nasa(**inputs, alpha=0.5))


def test_importing_needs_no_back_end():
    """`import nasa_kernels` loads no kernel, and nothing of diffusion."""
    code = (
        "import sys, nasa_kernels;"
        "kernels = {'nasa_kernels._triton', 'nasa_kernels._cpu.attention'};"
        "print((kernels | {'diffusers'}) & set(sys.modules))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert printed.stdout.strip() == "set()", printed.stderr


def test_preference():
    first = "cpu" if DEVICE.type == "cpu" else "triton"
    assert backends.choose(DEVICE, torch.float16) == first
    assert backends.choose(DEVICE, torch.float64) == "reference"
    assert backends.choose(torch.device("meta"), torch.float16) == "triton"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", FUSED)
def test_cuda_graph(backend):
    """Captured once, replayed with other inputs and another alpha."""
    inputs = make_inputs(SHAPE, torch.bfloat16, DEVICE)
    alpha = torch.tensor(0.5, device=DEVICE)
    nasa_attention(**inputs, alpha=alpha, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = nasa_attention(**inputs, alpha=alpha, backend=backend)
    for value in (0.0, 1.0):
        inputs["q"].normal_()
        alpha.fill_(value)
        graph.replay()
        assert torch.equal(o, nasa_attention(**inputs, alpha=alpha, backend=backend))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", FUSED)
def test_runs_on_the_current_stream(backend):
    inputs = make_inputs(SHAPE._replace(l=4096, h=8), torch.bfloat16, DEVICE)
    expected = nasa_attention(**inputs, alpha=0.5, backend=backend)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = {name: x * 1 for name, x in inputs.items()}
        o = nasa_attention(**late, alpha=0.5, backend=backend)
    stream.synchronize()
    assert torch.equal(o, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", FUSED)
def test_nothing_synchronises(backend):
    inputs = make_inputs(SHAPE, torch.bfloat16, DEVICE)
    alpha = torch.tensor(0.5, device=DEVICE)
    nasa_attention(**inputs, alpha=alpha, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        nasa_attention(**inputs, alpha=alpha, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
