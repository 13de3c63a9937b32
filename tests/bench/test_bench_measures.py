"""Timers, work, the gate, the methods: what a row's numbers rest on."""

import os
import time

import pytest
import torch
from nasa_diffusers import flops as nasa_flops
from support.bench_rows import MACHINE
from torch.utils.flop_counter import FlopCounterMode

from bench import baselines, flops, gate, launches, layer, model, op, session, timing
from bench import row as rows_of
from bench.kinds import KINDS
from bench.providers import PROVIDERS, Case, Provider, two_calls
from bench.roofline import Rates, _cpu_cases
from bench.timing import GRAPH_SECONDS, HostTimer, Samples, calls_in_graph, measure, rotations
from bench.work import Work, attention_work
from nasa_kernels import nasa_attention
from nasa_kernels.testing import Shape, make_inputs, why_no_cpu_kernels

CPU = torch.device("cpu")
SMALL = Shape("small", 2, 48, 2, 16, 13, 13)


class Clock:
    """Time that passes only where it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def busy(self, seconds):
        def call():
            self.now += seconds

        return call


@pytest.fixture
def here(tmp_path):
    return session.Session(MACHINE, CPU, tmp_path / "rows.csv", session.console(), seconds=0.02)


# ---- timers --------------------------------------------------------------------------------------


def test_quantiles():
    samples = Samples([40.0, 10.0, 20.0, 30.0, 50.0])
    assert [samples.quantile(q) for q in (0, 0.2, 0.5, 0.8, 1)] == [10, 18, 30, 42, 50]
    with pytest.raises(ValueError, match="nothing was measured"):
        Samples().quantile(0.5)


@pytest.mark.parametrize("sets", [1, 7])
def test_host_timer_divides_by_its_calls(sets):
    clock = Clock()
    timer = HostTimer([clock.busy(3e-4)] * sets, "warm", clock=clock)
    assert timer.in_sample % sets == 0 and timer.in_sample * 3e-4 >= 1e-3
    timer.sample(4)
    assert timer.results["warm"].us == pytest.approx([300.0] * 4)


def test_host_time_ends_before_the_device_does():
    clock = Clock()
    queue = []

    def synchronise():
        clock.now += sum(queue)
        queue.clear()

    def call():
        clock.now += 1e-5
        queue.append(1e-4)

    timer = HostTimer([call], "eager", clock=clock, synchronise=synchronise)
    timer.sample(3)
    assert timer.results["eager"].us == pytest.approx([110.0] * 3)
    assert timer.results["host"].us == pytest.approx([10.0] * 3)


def test_host_timer_against_a_sleep():
    timer = HostTimer([lambda: time.sleep(0.004)], "warm")
    timer.sample(5)
    # no upper bound: a busy machine sleeps as long as it likes
    assert timer.results["warm"].quantile(0.0) >= 4000


def test_timers_are_sampled_in_turn():
    clock, order = Clock(), []

    def timer(name):
        def call():
            order.append(name)
            clock.now += 1e-3

        return HostTimer([call], "warm", clock=clock, least_seconds=0)

    timers = [timer("a"), timer("b")]
    order.clear()
    measure(timers, samples=10, seconds=1.0)
    assert "".join(order) == "aabb" * 5
    assert len(timers[0].results["warm"].us) == 10
    measure(timers, samples=10, seconds=1e-6)
    assert len(timers[0].results["warm"].us) == 15


def test_rotating_buffers_exceed_five_caches():
    tensors = [torch.empty(1000, dtype=torch.int8)]
    sets = rotations(tensors, 24, cache_bytes=10_000)
    assert (sets - 1) * 1024 >= 5 * 10_000 > (sets - 2) * 1024
    assert rotations(tensors, 0, cache_bytes=1) == 2
    assert rotations([torch.empty(2**20)], 0, cache_bytes=1) == 2


def test_calls_in_a_graph():
    assert calls_in_graph(sets=1, seconds=1e-6) == 50
    assert calls_in_graph(sets=300, seconds=1e-6) == 300
    assert calls_in_graph(sets=1, seconds=GRAPH_SECONDS / 8) == 8
    assert calls_in_graph(sets=1, seconds=1.0) == 2
    assert calls_in_graph(sets=1, seconds=1.0, least=1) == 1


# ---- work and floors -----------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("lengths", [(13, 13), (77, 31)])
def test_flops_are_those_of_the_counter(direction, lengths):
    shape = SMALL._replace(n_pos=lengths[0], n_neg=lengths[1])
    inputs = make_inputs(shape, torch.bfloat16, "meta")
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    with FlopCounterMode(display=False) as counter:
        o = nasa_attention(**leaves, alpha=0.5)
        if direction == "backward":
            torch.autograd.grad(o, list(leaves.values()), torch.empty_like(o))
    forward = attention_work(shape, torch.bfloat16).flops
    expected = forward if direction == "forward" else (
        forward + attention_work(shape, torch.bfloat16, "backward").flops
    )  # fmt: skip
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("guided", [True, False])
def test_bytes_are_those_of_the_tensors(dtype, guided):
    inputs = make_inputs(SMALL._replace(n_neg=20), dtype, "cpu")
    if not guided:
        inputs = {name: x for name, x in inputs.items() if "neg" not in name}
    read = sum(x.nbytes for x in inputs.values())
    o = inputs["q"].nbytes
    shape = SMALL._replace(n_neg=20)
    assert attention_work(shape, dtype, guided=guided).bytes == read + o
    # dO is read, a gradient of each input is written
    assert attention_work(shape, dtype, "backward", guided).bytes == read + o + read


def test_the_floor_is_the_largest_time():
    work = Work(bytes=4 * 10**6, flops=10**9, exponentials=10**6, instructions=10**7)
    rates = Rates(10**12, {"bfloat16": 10**15}, 10**12, 10**13, 2e-6)
    assert rates.floor(work, torch.bfloat16) == (pytest.approx(4.0), "memory")
    assert rates.floor(Work(1, 10**10, 1, 1), torch.bfloat16) == (pytest.approx(10.0), "matrix")
    assert rates.floor(Work(1, 1, 1, 1), torch.bfloat16) == (pytest.approx(2.0), "launch")
    assert Rates().floor(work, torch.bfloat16) is None


def test_peak_and_launches_of_a_call():
    x = torch.ones(1024)

    def call():
        y = x + 1  # 4 KiB
        z = y * 2  # 4 KiB more
        del y
        return z.view(2, 512) - 1  # in place of y

    assert launches.count_launches(call, CPU) == 3
    # and the few bytes of the numbers 1 and 2
    assert launches.peak_bytes(call, CPU) == pytest.approx(2 * 4096, abs=64)
    assert launches.peak_of([(3, -5), (1, 4), (2, 5)]) == 9


# ---- the gate ------------------------------------------------------------------------------------

PROVIDERS_HERE = [PROVIDERS[name] for name in ("nasa-cpu", "stock", "algorithm-1", "stacked")]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_right_results_get_rows(here, direction, dtype):
    rows = op.run_case(here, Case(SMALL, dtype, CPU, direction), PROVIDERS_HERE, ["warm"])
    assert [r.provider for r in rows] == ["nasa-cpu", "stock", "algorithm-1", "stacked"]
    assert not here.left_out
    for r in rows:
        assert r.error_against == "fp64" and 0 < r.l2_error < 0.05
        assert r.baseline == "algorithm-1" and r.baseline_us == rows[2].p50_us
        assert r.launches and r.peak_bytes and r.bytes and r.flops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_call(here, kind, dtype):
    shape = Shape("small", 1, 48, 4, 16, 40, 40)
    case = Case(shape, dtype, CPU, kind=kind)
    rows = op.run_case(here, case, PROVIDERS_HERE, ["warm"])
    # "stacked" makes no such call
    assert [r.provider for r in rows] == ["nasa-cpu", "stock", "algorithm-1"]
    assert {r.case for r in rows} == {f"{kind}-{shape}"}
    assert not here.left_out
    ours, stock, in_two = rows
    assert 0 < ours.l2_error < 0.05 and 0 < in_two.l2_error < 0.05
    assert stock.flops < ours.flops == in_two.flops
    if why_no_cpu_kernels() is None:
        assert ours.launches == 1 < in_two.launches


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_call_of_a_kind_gets_no_row(here, kind, monkeypatch):
    """Its last row is that of a call without a negative prompt."""
    of = KINDS[kind]

    def wrong(x, alpha):
        o = of.two_calls(x, alpha).clone()
        last = of.stock(x).shape[1] - 1 if of.is_by_row else x["k"].shape[1] - 1
        o[:, last] = of.stock(x)[:, last]
        return o

    monkeypatch.setitem(KINDS, kind, of._replace(two_calls=wrong))
    case = Case(Shape("small", 1, 48, 2, 16, 40, 40), torch.float32, CPU, kind=kind)
    assert op.run_case(here, case, [PROVIDERS["algorithm-1"]], ["warm"]) == []
    assert next(iter(here.left_out.values())).startswith("its result is wrong")


def test_names_of_cases():
    made = op.cases(CPU, op.ALL_NAMES, [1], [torch.float32], ["forward", "backward"])
    names = [str(case).split("-b1-")[0] for case in made]
    # other kinds are measured forward alone
    assert len(names) == 2 * (len(op.NAMES) + 1) + sum(map(len, op.KINDS_OF.values()))
    assert set(names) == set(op.ALL_NAMES)
    assert {name for name in names if op.is_whole_layer(f"{name}-b1-x")} == set(op.NAMES)


def _wrong_sign(x, alpha):
    return two_calls(x, -alpha)


def _last_row_lost(x, alpha):
    o = two_calls(x, alpha).clone()
    o[:, -1] = 0
    return o


def _nan(x, alpha):
    return two_calls(x, alpha) * torch.tensor(float("nan"))


def _wrong_shape(x, alpha):
    return two_calls(x, alpha)[:, 1:]


@pytest.mark.parametrize("wrong", [_wrong_sign, _last_row_lost, _nan, _wrong_shape])
def test_a_wrong_kernel_gets_no_row(here, wrong):
    providers = [Provider("wrong", wrong, ours=True), PROVIDERS["algorithm-1"]]
    rows = op.run(here, [Case(SMALL, torch.float32, CPU)], providers, ["warm"])
    assert {r.provider for r in rows} == {r.provider for r in rows_of.read(here.out)}
    assert {r.provider for r in rows} == {"algorithm-1"}
    (reason,) = here.left_out.values()
    assert reason.startswith("its result is wrong")


@pytest.mark.parametrize("first", [0, 1])
def test_a_wrong_gradient_gets_no_row(here, first):
    """Wrong from one sample of the batch on."""

    def wrong(x, alpha):
        k = x["k_neg"]
        return two_calls({**x, "k_neg": torch.cat([k[:first], k[first:].detach()]) + 0 * k}, alpha)

    case = Case(SMALL, torch.float32, CPU, "backward")
    assert op.run_case(here, case, [Provider("wrong", wrong)], ["warm"]) == []
    assert "the gradient of k_neg" in next(iter(here.left_out.values()))


def test_errors_are_counted_over_all_chunks(monkeypatch):
    inputs = make_inputs(SMALL, torch.bfloat16, "cpu")
    o = two_calls(inputs, 0.5)
    whole = gate.check_forward(o, inputs, 0.5, 2.0)
    monkeypatch.setattr(gate, "CHUNK_BYTES", 8 * SMALL.b * SMALL.h * 13 * 7)
    parts = gate.check_forward(o, inputs, 0.5, 2.0)
    assert parts.largest == pytest.approx(whole.largest)
    assert parts.l2 == pytest.approx(whole.l2)


def test_what_does_not_run_has_a_reason(here):
    names = ["nasa-cuda", "algorithm-1-cudnn", "stacked"]
    case = Case(SMALL._replace(n_neg=7), torch.float32, CPU)
    assert op.run_case(here, case, [PROVIDERS[name] for name in names], ["warm"]) == []
    assert len(here.left_out) == 3 and all(here.left_out.values())


def test_no_case_begins_after_the_minutes(here):
    here.minutes, here.clock = 1.0, Clock()
    here.started, here.clock.now = 0.0, 61.0
    assert op.run(here, [Case(SMALL, torch.float32, CPU)], PROVIDERS_HERE, ["warm"]) == []
    assert list(here.left_out.values()) == ["no time was left"]


# ---- methods -------------------------------------------------------------------------------------


def test_nag_is_off_at_scale_1_and_clips_the_norm():
    z_pos, z_neg = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    torch.testing.assert_close(baselines.nag(z_pos, z_neg, scale=1.0), z_pos)
    far = baselines.nag(z_pos, z_neg, scale=1000.0, tau=2.5, alpha=1.0)
    torch.testing.assert_close(far.norm(p=1, dim=-1), 2.5 * z_pos.norm(p=1, dim=-1))


def tiny(name):
    """The class of a model in small, with sizes that its methods must not mix up."""
    real = flops.MODELS[name]
    if name.startswith("FLUX"):
        config = {
            "in_channels": 8, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 12,
            "axes_dims_rope": (4, 4, 8),
        }  # fmt: skip
        inputs = {
            "pooled_projections": torch.empty(1, 12, device="meta"),
            "img_ids": torch.empty(9, 3, device="meta"),
            "txt_ids": torch.empty(5, 3, device="meta"),
        }
        return model.Model(real.build, config, (9, 8), 5, 24, inputs)
    if name.startswith("SD3"):
        config = {
            "sample_size": 8, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
            "num_attention_heads": 4, "joint_attention_dim": 24, "caption_projection_dim": 32,
            "pooled_projection_dim": 12, "out_channels": 4, "pos_embed_max_size": 8,
        }  # fmt: skip
        inputs = {"pooled_projections": torch.empty(1, 12, device="meta")}
        return model.Model(real.build, config, (4, 8, 8), 5, 24, inputs)
    if name.startswith("Wan"):
        config = {
            "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 32,
            "text_dim": 24, "in_channels": 4, "out_channels": 4,
        }  # fmt: skip
        return model.Model(real.build, config, (4, 2, 8, 8), 5, 24)
    config = {
        "block_out_channels": (32, 64), "cross_attention_dim": 24, "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 4,
        "norm_num_groups": 8,
    }  # fmt: skip
    return model.Model(real.build, config, (4, 8, 8), 5, 24)


TINY = ("SD 1.5, 512 px", "Wan 2.1 1.3B, 480p, 81 frames", "SD3 medium, 1024 px",
        "FLUX.1 schnell, 1024 px")  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_methods_that_are_off_are_the_stock_model(name):
    denoiser = model.build(tiny(name), torch.float32, CPU)
    stock = denoiser()
    with baselines.algorithm_1(denoiser.module, denoiser.negative, alpha=0.0):
        torch.testing.assert_close(denoiser(), stock, rtol=1e-4, atol=1e-5)
    with baselines.algorithm_1(denoiser.module, denoiser.negative):
        assert (denoiser() - stock).abs().max() > 1e-4
    with baselines.nag_published(denoiser.module, denoiser.negative, scale=1.0):
        torch.testing.assert_close(denoiser(), stock, rtol=1e-4, atol=1e-5)
    with baselines.nag_published(denoiser.module, denoiser.negative):
        assert (denoiser() - stock).abs().max() > 1e-4
    # the same prompt on both sides: nothing to guide away from
    same = denoiser.inputs["encoder_hidden_states"]
    with baselines.nag_published(denoiser.module, same):
        torch.testing.assert_close(denoiser(), stock, rtol=1e-4, atol=1e-5)
    assert torch.equal(denoiser(), stock)
    with model.METHODS["cfg"](denoiser) as call:
        torch.testing.assert_close(
            call(), 5 * stock - 4 * denoiser(encoder_hidden_states=denoiser.negative),
            rtol=1e-3, atol=1e-3,
        )  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_rows_of_a_model(here, name):
    wanted = ["nasa", "stock", "algorithm-1", "nasa-first", "nag", "nag-ours", "cfg"]
    rows = model.time_model(here, name, tiny(name), torch.float32, wanted, ["eager"])
    by = {r.provider: r for r in rows}
    assert sorted(r.provider for r in rows) == sorted(wanted) and not here.left_out
    assert by["nag-ours"].error_against == "nag" and by["nag-ours"].l2_error < 1e-5
    assert by["nasa"].error_against == "algorithm-1" and by["nasa"].l2_error < 1e-5
    assert by["nasa"].launches < by["nasa-first"].launches < by["nag"].launches
    assert all(r.baseline_us == by["stock"].p50_us for r in rows)


def test_a_wrong_model_method_gets_no_row(here, monkeypatch):
    monkeypatch.setitem(model.METHODS, "nasa", model.METHODS["stock"])
    wanted = ["stock", "nasa"]
    rows = model.time_model(here, "sd", tiny(TINY[0]), torch.float32, wanted, ["eager"])
    assert {r.provider for r in rows} == {"stock"}
    assert "from algorithm-1" in here.left_out["nasa on sd"]
    monkeypatch.setitem(model.METHODS, "nag-ours", model.METHODS["stock"])
    rows = model.time_model(here, "sd", tiny(TINY[0]), torch.float32, ["nag-ours"], ["eager"])
    assert not rows and "from nag," in here.left_out["nag-ours on sd"]


def test_rows_of_a_layer(here):
    shape = Shape("sd15-8", 1, 64, 8, 16, 13, 13)
    rows = layer.time_layer(here, shape, torch.float32, list(layer.METHODS))
    assert {r.provider: r.launches for r in rows if r.provider not in ("nag", "nag-ours")} == {
        "stock": 5, "algorithm-1": 10, "nasa-first": 6, "nasa": 3, "projected": 3, "cfg": 7,
    }  # fmt: skip
    assert not here.left_out


def test_a_wrong_layer_gets_no_row(here, monkeypatch):
    shape = Shape("sd15-8", 1, 64, 8, 16, 13, 13)
    for method in ("nasa", "nag-ours"):
        monkeypatch.setitem(layer.METHODS, method, layer.METHODS["stock"])
        assert layer.time_layer(here, shape, torch.float32, [method]) == []


def test_flops_by_method():
    """Algorithm 1 does what our first call does; joint attention twice is what it takes."""
    counted = flops.count("SD 1.5, 512 px")
    assert counted["algorithm-1"] == counted["nasa-first"] == counted["nag"] > counted["stock"]
    assert counted["cfg"] == 2 * counted["stock"]
    ours = nasa_flops.count("SD 1.5, 512 px")
    assert (ours.first, ours.later) == (counted["nasa-first"], counted["nasa-later"])
    joint = flops.count("SD3 medium, 1024 px")
    l, n, layers, width = 4096, 333, 24, 1536
    attention = 4 * layers * width * (l + n) ** 2
    # the negative text through the blocks; the last block projects it and no more
    linear = 2 * n * width**2 * ((layers - 1) * 12 + 3) + 2 * n * 4096 * width
    assert joint["algorithm-1"] - joint["stock"] == attention + linear
    assert flops.count_encoder("CLIP-L (SD 1.5)") > 0


def test_kinds_of_timing_are_documented():
    assert all(kind in timing.__doc__ for kind in ("cold", "warm", "eager", "host"))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the interpreter")
@pytest.mark.parametrize("name", ["exponential", "issue"])
def test_register_kernels_compute_what_they_say(name):
    """2^-x twice 16 times, and x / 4 + 1 / 4, by Triton's interpreter."""
    from bench import registers

    x = torch.rand(2 * registers.ELEMENTS)
    expected, steps = x.clone(), 2 * registers.UNROLLED
    for _ in range(steps):
        expected = torch.exp2(-expected) if name == "exponential" else expected * 0.25 + 0.25
    if name == "exponential":
        registers.exponentials[(2,)](x, 2, registers.ELEMENTS, registers.UNROLLED)
    else:
        registers.multiply_adds[(2,)](x, 2, 0.25, registers.ELEMENTS, registers.UNROLLED)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-6)


def test_rows_of_a_free_mkl_are_of_a_device_of_their_own(monkeypatch):
    from bench import machine, mkl

    before = machine.device_name(CPU)
    monkeypatch.setenv("LD_PRELOAD", f"/somewhere/{mkl._NAME}")
    assert machine.device_name(CPU) == f"{before}, MKL free"
    assert machine.slug(machine.device_name(CPU)) != machine.slug(before)


@pytest.mark.skipif(why_no_cpu_kernels() is not None, reason=str(why_no_cpu_kernels()))
def test_floors_of_a_cpu_come_from_its_kernels():
    """Each call returns how much work it was."""
    found = {case: (dtype, *rest) for case, dtype, *rest in _cpu_cases()}
    _, columns, (call,) = found["exponential-registers"]
    assert columns["exponentials"] == call() > 0
    _, columns, (call,) = found["matrix-registers"]
    assert columns["flops"] == call() > 10**6
