"""What of `bench` only a GPU can show: graphs, events, the profiler, the roofline."""

import pytest
import torch

from bench import launches, op, registers, session
from bench.machine import describe
from bench.providers import PROVIDERS, Case
from bench.timing import GraphTimer, HostTimer, synchroniser
from nasa_kernels.testing import Shape

pytestmark = pytest.mark.gpu
SHAPE = Shape("small", 1, 256, 4, 64, 77, 77)


def graph_us(cycles: int, calls: int = 1) -> float:
    run = [lambda: torch.cuda._sleep(cycles)] * calls
    timer = GraphTimer(run, "warm", stream=torch.cuda.Stream())
    timer.sample(12)
    us = timer.results["warm"].quantile(0.5)
    timer.close()
    return us


def test_graph_timer_against_a_kernel_that_sleeps():
    """Twice the cycles, twice the time, less one launch."""
    short, long = graph_us(200_000), graph_us(400_000)
    assert long / short == pytest.approx(2, rel=0.1)


def test_host_time_of_a_sleeping_kernel_is_short():
    call = [lambda: torch.cuda._sleep(2_000_000)]
    timer = HostTimer(call, "eager", synchronise=synchroniser(torch.device("cuda")))
    timer.sample(5)
    # the fastest of them: the host may be busy with something else
    assert timer.results["host"].quantile(0.0) < 0.5 * timer.results["eager"].quantile(0.0)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_rows_of_every_timing(tmp_path, direction):
    device = torch.device("cuda", torch.cuda.current_device())
    machine = describe(device)
    here = session.Session(machine, device, tmp_path / "rows.csv", session.console())
    providers = [PROVIDERS[name] for name in ("nasa-triton", "stock", "algorithm-1", "stacked")]
    case = Case(SHAPE, torch.bfloat16, device, direction)
    rows = op.run_case(here, case, providers, ["cold", "warm", "eager"])
    assert not here.left_out
    assert {r.timing for r in rows} == {"cold", "warm", "eager", "host"}
    assert len(rows) == 4 * len(providers)
    by = {(r.provider, r.timing): r.p50_us for r in rows}
    assert by["algorithm-1", "warm"] > by["stock", "warm"]


def test_one_launch():
    case = Case(SHAPE, torch.bfloat16, torch.device("cuda"))
    inputs = op.make_inputs(SHAPE, torch.bfloat16, "cuda")
    for name, expected in (("nasa-triton", 1), ("algorithm-1", 4)):
        (call,) = op._calls(PROVIDERS[name], case, [inputs], inputs["q"])
        assert launches.count_launches(call, case.device) in (expected, None)


@pytest.mark.parametrize(("name", "limit"), [("exponential", 0.6411857), ("issue", 1 / 3)])
def test_register_kernels_compute_what_they_say(name, limit):
    """2^-x and x / 4 + 1 / 4 go to their fixed points."""
    device = torch.device("cuda")
    call, amount = registers.workload(name, device, turns=8)
    (steps,) = amount.values()
    call()
    x = call.__closure__ and next(
        c.cell_contents for c in call.__closure__ if isinstance(c.cell_contents, torch.Tensor)
    )
    torch.testing.assert_close(x, torch.full_like(x, limit), rtol=1e-5, atol=1e-6)
    assert steps == x.numel() * 8 * registers.UNROLLED
