"""The launchers of csrc without a GPU: they run against a CUDA runtime that writes launches down.

What they launch must be what tests/support/cuda_emulation.py launches and holds to fp64: the same
kernel, blocks, shared memory, arguments and tensor maps.
"""

import ctypes
import itertools
import re
from typing import NamedTuple

import pytest
import torch
from support import cuda_emulation
from support.cuda_emulation import (
    MAPPED_BYTES,
    MAPS,
    REPORTS,
    BackwardParams,
    ForwardParams,
    Matrix,
    nvcc,
    path_of_sm90,
)
from support.cuda_image import ImageParams, forward_image
from test_cuda_backward import make_grad
from test_cuda_forward import EDGES, MODELS, Shape, make
from test_cuda_grouped import grouped
from test_cuda_image import Shape as ImageShape
from test_cuda_image import make as make_image
from test_cuda_joint import make_joint
from test_cuda_joint_backward import TILES, backward
from test_cuda_joint_backward import make as make_segments

from bench import statics

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc: the launchers cannot be built")


class Gpu(NamedTuple):
    major: int
    sms: int
    shared_per_block: int
    shared_per_sm: int


A100 = Gpu(8, 108, 166912, 167936)
RTX4090 = Gpu(8, 128, 101376, 102400)
H200 = Gpu(9, 132, 232448, 233472)


# bytes of a Share of csrc/share.h
SHARE = 16


class Record(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char * 256),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint64),
        ("allowed", ctypes.c_uint64),
        ("overlaps", ctypes.c_uint64),
        ("arguments", ctypes.c_ubyte * 4096),
    ]

    @property
    def name(self) -> str:
        """Without the hash that the compiler puts into the name of an anonymous namespace."""
        return plain(self.kernel.decode())


def plain(mangled: str) -> str:
    name = re.search(r"([a-z][a-z0-9_]*_kernelI.*?E)v", mangled)[1]
    return re.sub(r"^.*?((forward|backward|sum)_)", r"\1", name)


@pytest.fixture(scope="module")
def recorder() -> ctypes.CDLL:
    library = ctypes.CDLL(str(cuda_emulation.build("recorder") / "recorder.so"))
    library.test_launch.restype = ctypes.POINTER(Record)
    library.test_partial_elements.restype = ctypes.c_int64
    library.gpu = None
    return library


def use(recorder, gpu: Gpu) -> None:
    """A new device only where it is another GPU: the launchers know 64."""
    if recorder.gpu != gpu:
        recorder.test_use_device(*gpu)
        recorder.gpu = gpu


def launches(recorder, gpu: Gpu, params) -> list[Record]:
    use(recorder, gpu)
    run = recorder.test_backward if isinstance(params, BackwardParams) else recorder.test_forward
    assert run(ctypes.byref(params)) == 0
    return [recorder.test_launch(i).contents for i in range(recorder.test_launches())]


def emulated(launch: cuda_emulation.Launch) -> tuple:
    grid = launch.grid if isinstance(launch.grid, tuple) else (launch.grid,)
    return plain(launch.kernel.name), (*grid, 1, 1)[:3], launch.block, launch.shared


def recorded(record: Record) -> tuple:
    assert record.shared <= record.allowed or record.shared == 0
    return record.name, tuple(record.grid), record.block[0], record.shared


def forward_params(launch: cuda_emulation.Launch) -> ForwardParams:
    return ForwardParams.from_buffer_copy(launch.args[0])


def sm90_params(launch: cuda_emulation.Launch) -> ForwardParams:
    return ForwardParams.from_buffer_copy(launch.args[0][MAPS * MAPPED_BYTES :])


CALLS = [s for s in (*MODELS, *EDGES) if s.n_pos + s.n_neg]


@pytest.mark.parametrize("shape", CALLS, ids=str)
def test_forward_launches_what_the_emulation_runs(recorder, shape):
    cuda_emulation.forward(**make(shape, torch.bfloat16))
    launch = REPORTS[-1]
    (record,) = launches(recorder, A100, forward_params(launch))
    if "short" not in record.name:
        cuda_emulation.forward(**make(shape, torch.bfloat16), path="long")
        assert recorded(record) == emulated(REPORTS[-1])
        return
    # with few heads every block has one tile of each warp's rows
    cuda_emulation.forward(**make(shape, torch.bfloat16), blocks=1 << 30)
    launch = REPORTS[-1]
    assert recorded(record) == emulated(launch)
    size = ctypes.sizeof(ForwardParams)
    assert bytes(record.arguments)[size : size + SHARE] == launch.args[1]
    assert bytes(record.arguments)[:size] == bytes(launch.args[0])


@pytest.mark.parametrize("gpu", [A100, H200], ids=["A100", "H200"])
@pytest.mark.parametrize("d", [64, 160])
def test_with_the_image_it_launches_what_the_emulation_runs(recorder, gpu, d):
    """On Hopper the same kernel."""
    inputs = make_image(ImageShape("launch", 1, 140, 2, 20, 9, 12, d), torch.bfloat16)
    forward_image(**inputs, rule="nasa-cross", text_pos=4)
    launch = REPORTS[-1]
    params = ImageParams.from_buffer_copy(launch.args[0])
    use(recorder, gpu)
    assert recorder.test_image(ctypes.byref(params)) == 0
    assert recorder.test_launches() == 1
    record = recorder.test_launch(0).contents
    assert recorded(record) == emulated(launch)
    assert bytes(record.arguments)[: ctypes.sizeof(ImageParams)] == bytes(params)


# ---- persistent grids ----------------------------------------------------------------------------

# the layers at the batches that fill a GPU, and what is asked of the grid there
BATCHED = [(name, b, statics.wanted(b)) for name, batches in statics.GRIDS.items() for b in batches]
# 2560 tiles of 32 rows for 170 SMs: 15.06 for each, and no tile is cut
UNEVEN = {("RTX 5090", "sdxl-32", 4): 0.94}


class Share(ctypes.Structure):
    """csrc/share.h"""

    _fields_ = [(name, ctypes.c_int) for name in ("each", "longer", "tiles", "heads")]


def plain_params(shape: statics.Shape) -> ForwardParams:
    """A call with contiguous tensors, which nobody reads here."""
    p = ForwardParams(b=shape.b, l=shape.l, h=shape.h, d=shape.d, scale=1.0, aligned=True, type=1)
    p.o = 1 << 20

    def matrix(rows: int) -> Matrix:
        row = shape.h * shape.d
        return Matrix(1 << 20, (ctypes.c_int64 * 3)(rows * row, row, shape.d))

    p.q = matrix(shape.l)
    for prompt, n in zip(p.prompt, (shape.n_pos, shape.n_neg), strict=True):
        prompt.k, prompt.v, prompt.n = matrix(n), matrix(n), n
    return p


def planned(recorder, gpu: statics.Gpu, shape: statics.Shape) -> tuple[Record, statics.Plan]:
    """The launch of a layer, and the one that the counts of the kernels speak of."""
    known = Gpu(gpu.major, gpu.sms, gpu.shared_per_block, gpu.shared_per_sm)
    (record,) = launches(recorder, known, plain_params(shape))
    plan = statics.plan(gpu, shape)
    assert plan.mangled.search(record.kernel.decode()), (record.name, plan)
    assert (record.block[0], record.shared) == (plan.threads, plan.shared), str(plan)
    return record, plan


def share_of(record: Record) -> Share:
    """The last parameter, after those of the call, or after those of TMA."""
    start = ctypes.sizeof(ForwardParams)
    if "sm90" in record.name:
        start = -(-(MAPS * MAPPED_BYTES + start) // 128) * 128
    return Share.from_buffer_copy(bytes(record.arguments)[start : start + SHARE])


@pytest.mark.parametrize("gpu", statics.GPUS, ids=lambda gpu: gpu.name)
def test_a_persistent_grid_fits_the_gpu_and_loads_it_evenly(recorder, gpu):
    """From the launcher's own numbers: blocks, and the tiles of the longest one.

    The driver, which is asked for the blocks that reside, knows the registers of the machine code:
    here those that docs/kernels/statics.json recorded.
    """
    shapes = {shape.name: shape for shape in statics.SHAPES}
    rows = {(row.gpu, row.shape): row for row in statics.recorded()}
    recorder.test_registers(b"", 0)
    recorder.gpu = None
    for shape in shapes.values():
        mangled = statics.plan(gpu, shape).mangled.pattern.encode()
        recorder.test_registers(mangled, rows[gpu.name, str(shape)].registers)
    for name, b, target in BATCHED:
        shape = shapes[name]._replace(b=b)
        record, plan = planned(recorder, gpu, shape)
        if not plan.persistent:
            continue
        share, blocks = share_of(record), record.grid[0]
        tiles = b * shape.h * -(-shape.l // plan.rows)
        assert share.tiles == -(-shape.l // plan.rows) and share.heads == shape.h
        assert share.each * blocks + share.longer == tiles and share.longer < blocks
        slots = gpu.sms * rows[gpu.name, str(shapes[name])].blocks_per_sm
        assert blocks == min(tiles, slots)
        longest = share.each + (share.longer > 0)
        efficiency = tiles / (slots * longest)
        target = UNEVEN.get((gpu.name, name, b), target)
        assert efficiency >= target, f"{plan} {shape}: {efficiency:.3f}"


@pytest.mark.parametrize("gpu", statics.GPUS, ids=lambda gpu: gpu.name)
def test_the_counts_speak_of_the_kernels_that_are_launched(recorder, gpu):
    for shape in statics.SHAPES:
        planned(recorder, gpu, shape)


def test_the_blocks_that_reside_are_asked_of_the_driver(recorder):
    """Of a kernel with more registers fewer fit: the grid follows."""
    recorder.test_registers(b"", 0)
    recorder.gpu = None
    shape = next(s for s in statics.SHAPES if s.name == "sdxl-64")._replace(d=32, b=4)
    a100 = statics.GPUS[0]
    record, plan = planned(recorder, a100, shape)
    assert record.grid[0] == 3 * a100.sms
    recorder.test_registers(b"forward_short_kernel", 255)
    try:
        recorder.gpu = None
        assert planned(recorder, a100, shape)[0].grid[0] == a100.sms
    finally:
        recorder.test_registers(b"", 0)
        recorder.gpu = None


def test_a_void_prompt_has_a_kernel_without_it(recorder):
    """Alpha 0, and a call with one prompt alone: half of the products, K and V are never loaded."""
    cuda_emulation.forward_sm90(**make(SM90[0], torch.bfloat16), alpha=0.0)
    params = sm90_params(REPORTS[-1])
    (record,) = launches(recorder, H200, params)
    assert "Li64ELi80ELi1ELb1E" in record.name
    params.prompt[1].n = 77
    (record,) = launches(recorder, H200, params)
    assert "Li64ELi80ELi2ELb1E" in record.name


SMALL = Shape("d160", 1, 16, 1, 77, 77, 160)


def test_where_shared_memory_is_small_the_long_kernel_takes_the_call(recorder):
    cuda_emulation.forward(**make(SMALL, torch.bfloat16))
    params = forward_params(REPORTS[-1])
    assert "forward_short" in launches(recorder, A100, params)[0].name
    assert "forward_long" in launches(recorder, RTX4090, params)[0].name


def test_where_registers_are_few_the_long_kernel_projects(recorder):
    cuda_emulation.forward(**make(SMALL, torch.bfloat16), rule="projected")
    params = forward_params(REPORTS[-1])
    (record,) = launches(recorder, A100, params)
    assert "forward_long" in record.name and recorded(record) == emulated(REPORTS[-1])
    params.d = 128
    assert "forward_short" in launches(recorder, A100, params)[0].name


def test_a_head_dim_that_does_not_fit_is_an_error_and_not_a_launch(recorder):
    cuda_emulation.forward(**make(EDGES[3], torch.bfloat16))
    params = forward_params(REPORTS[-1])
    use(recorder, RTX4090)
    params.d = 256
    assert recorder.test_forward(ctypes.byref(params)) != 0
    assert recorder.test_launches() == 0


SM90 = (
    Shape("sdxl", 2, 65, 2, 77, 77, 64),
    Shape("pixart", 1, 33, 1, 120, 77, 72),
    Shape("sd15", 1, 17, 3, 77, 20, 160),
    Shape("wan", 1, 130, 2, 140, 260, 128),
    Shape("sd15-long", 2, 70, 1, 77, 81, 40),
    Shape("sd15-16-long", 1, 70, 1, 160, 81, 160),
)


def told(map_bytes: bytes) -> dict:
    """A Told of tests/support/fake_cuda.cpp, as the fields of the interpreter's tensor map."""
    words = [int.from_bytes(map_bytes[i : i + 8], "little") for i in range(0, 64, 8)]
    box = [int.from_bytes(map_bytes[i : i + 4], "little") for i in range(64, 80, 4)]
    return {"address": words[0], "shape": words[1:5], "strides": words[5:8], "box": box}


@pytest.mark.parametrize("how", ["own", "broadcast", "grouped", "joint"])
@pytest.mark.parametrize("shape", SM90, ids=str)
def test_hopper_launches_what_the_emulation_runs(recorder, shape, how):
    inputs, joint = make(shape, torch.bfloat16), None
    if how == "broadcast":
        inputs = {
            name: x if name == "q" else x[:1, :, :1].expand(shape.b, -1, shape.h, -1)
            for name, x in inputs.items()
        }
    elif how == "grouped":
        inputs, _ = grouped(make(shape._replace(l=17, h=4), torch.bfloat16), 2)
    elif how == "joint":
        joint = make_joint(shape, torch.bfloat16, text_pos=9, text_neg=7)
    cuda_emulation.forward_sm90(**inputs, blocks=1 << 30, joint=joint)
    launch = REPORTS[-1]
    params, call = launch.args[0], sm90_params(launch)
    (record,) = launches(recorder, H200, call)
    assert recorded(record) == emulated(launch)
    arguments, first = bytes(record.arguments), MAPS * MAPPED_BYTES
    assert arguments[first : first + ctypes.sizeof(call)] == bytes(call)
    assert arguments[len(params) : len(params) + SHARE] == launch.args[1]
    # without shared keys there is no map of O_s
    places = [i for i in range(MAPS) if joint or i != 2]
    for i, expected in zip(places, launch.memory.tensor_maps, strict=True):
        place = slice(MAPPED_BYTES * i, MAPPED_BYTES * (i + 1))
        mapped = arguments[place]
        # step_h, step_b, first_row
        assert mapped[128:140] == params[place][128:140]
        actual = told(mapped)
        assert actual["address"] == expected.address
        assert actual["shape"] == list(expected.shape)
        assert actual["box"] == list(expected.box)
        moving = [n > 1 for n in expected.shape[1:]]
        strides = zip(actual["strides"], expected.strides[1:], moving, strict=True)
        assert all(a == e for a, e, moves in strides if moves)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"aligned": False}, "rows at any address"),
        ({"d": 48}, "no kernel for the head_dim"),
        ({"q": (0, 0, 0)}, "rows that do not move"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_hopper_leaves_other_calls_to_the_other_kernels(recorder, change, reason):
    cuda_emulation.forward_sm90(**make(SM90[0], torch.bfloat16))
    params = sm90_params(REPORTS[-1])
    assert "sm90" in launches(recorder, H200, params)[0].name
    assert "sm90" not in launches(recorder, A100, params)[0].name
    for name, value in change.items():
        if isinstance(value, tuple):
            getattr(params, name).strides[:] = value
        else:
            setattr(params, name, value)
    assert "short" in launches(recorder, H200, params)[0].name


def test_hopper_leaves_a_shared_segment_that_does_not_move_to_the_other_kernels(recorder):
    shape = SM90[0]
    joint = make_joint(shape, torch.bfloat16, text_pos=9, text_neg=7)
    cuda_emulation.forward(**make(shape, torch.bfloat16), joint=joint)
    params = forward_params(REPORTS[-1])
    assert "sm90" in launches(recorder, H200, params)[0].name
    params.shared.o.strides[1] = 0
    (record,) = launches(recorder, H200, params)
    assert "short" in record.name
    assert bytes(record.arguments)[: ctypes.sizeof(params)] == bytes(params)


@pytest.mark.parametrize("joint", [False, True], ids=["two-prompts", "joint"])
def test_hopper_takes_a_positive_prompt_whatever_the_negative_one_is(recorder, joint):
    """Its two kernels give the same bits, so alpha 0 keeps those of the positive prompt alone."""
    shape = SM90[2]
    segment = make_joint(shape, torch.bfloat16) if joint else None
    cuda_emulation.forward(**make(shape, torch.bfloat16), joint=segment)
    params = forward_params(REPORTS[-1])
    use(recorder, H200)
    lengths = (0, 1, 80, 81, 128, 129, 5000)
    for params.d, n_pos, n_neg in itertools.product((40, 64, 128, 160), lengths, lengths):
        params.prompt[0].n, params.prompt[1].n = n_pos, n_neg
        assert recorder.test_forward(ctypes.byref(params)) == 0
        path = path_of_sm90(params.d, n_pos, n_neg)
        name = recorder.test_launch(0).contents.name
        assert ("sm90_long" if path == "long" else "sm90_short") in name, (params.d, n_pos, n_neg)


@pytest.mark.parametrize("shape", [SM90[0], SM90[3]], ids=str)
def test_a_kernel_that_waits_may_start_while_the_one_before_it_ends(recorder, shape):
    """Off by default, and nothing else of the launch depends on it."""
    cuda_emulation.forward(**make(shape, torch.bfloat16))
    params = forward_params(REPORTS[-1])
    try:
        for gpu, on in ((H200, False), (H200, True), (A100, True)):
            recorder.test_overlap(on)
            (record,) = launches(recorder, gpu, params)
            assert record.overlaps == ("sm90" in record.name and on)
            if not on:
                plain_launch = recorded(record), bytes(record.arguments)
            elif gpu is H200:
                assert (recorded(record), bytes(record.arguments)) == plain_launch
    finally:
        recorder.test_overlap(False)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", [MODELS[0], MODELS[5], EDGES[2]], ids=str)
def test_backward_launches_what_the_emulation_runs(recorder, shape, splits):
    inputs = make(shape, torch.float16)
    REPORTS.clear()
    cuda_emulation.backward(make_grad(inputs), **inputs, splits=splits)
    params = BackwardParams.from_buffer_copy(REPORTS[0].args[0])
    records = launches(recorder, A100, params)
    assert len(records) == len(REPORTS) == (2 if splits == 1 else 3)
    for record, launch in zip(records[:2], REPORTS, strict=False):
        assert recorded(record) == emulated(launch)
        assert bytes(record.arguments)[: ctypes.sizeof(params)] == launch.args[0]
    if splits > 1:
        assert records[2].name == emulated(REPORTS[2])[0]
        assert tuple(records[2].grid)[1] == 4
    elements = 2 * sum(shape.b * n * shape.h * shape.d for n in (shape.n_pos, shape.n_neg))
    assert recorder.test_partial_elements(ctypes.byref(params)) == elements


def test_backward_of_groups_is_summed_by_the_last_launch(recorder):
    """Also without splits: what a head adds to the keys of its group is scratch of all heads."""
    shape = MODELS[0]._replace(l=17, h=4)
    inputs, _ = grouped(make(shape, torch.float16), 2)
    REPORTS.clear()
    cuda_emulation.backward(make_grad(inputs), **inputs)
    params = BackwardParams.from_buffer_copy(REPORTS[0].args[0])
    records = launches(recorder, A100, params)
    assert [record.name for record in records] == [emulated(launch)[0] for launch in REPORTS]
    assert len(records) == 3
    elements = 2 * sum(shape.b * n * shape.h * shape.d for n in (shape.n_pos, shape.n_neg))
    assert recorder.test_partial_elements(ctypes.byref(params)) == elements


def test_joint_backward_launches_what_the_emulation_runs(recorder):
    inputs = make_segments(TILES, torch.float16)
    REPORTS.clear()
    backward(make_grad(inputs), inputs, 0.5, text=TILES.text)
    for launch in REPORTS:
        params = BackwardParams.from_buffer_copy(launch.args[0])
        # joint_keys_cuda launches the last one alone
        record = launches(recorder, A100, params)[-1]
        assert recorded(record) == emulated(launch)
        assert bytes(record.arguments)[: ctypes.sizeof(params)] == launch.args[0]


def test_rows_that_are_hidden_are_no_reason_to_split(recorder):
    inputs = make(MODELS[0], torch.float16)
    cuda_emulation.backward(make_grad(inputs), **inputs)
    params = BackwardParams.from_buffer_copy(REPORTS[-1].args[0])
    use(recorder, H200)
    params.call.b, params.call.h, params.call.l = 1, 1, 64 * 20
    for hidden, splits in ((0, 10), (12, 4), (18, 1)):
        params.hidden = hidden
        assert recorder.test_splits(ctypes.byref(params)) == splits


def test_splits_fill_the_gpu_where_there_are_few_keys(recorder):
    inputs = make(MODELS[0], torch.float16)
    cuda_emulation.backward(make_grad(inputs), **inputs)
    params = BackwardParams.from_buffer_copy(REPORTS[-1].args[0])
    use(recorder, H200)
    # one tile of keys per prompt and head: b h 2 blocks
    for b, h, l, splits in ((1, 8, 4096, 16), (16, 8, 4096, 1), (1, 8, 100, 1), (1, 1, 4096, 32)):
        params.call.b, params.call.h, params.call.l = b, h, l
        assert recorder.test_splits(ctypes.byref(params)) == splits, (b, h, l)


def test_nothing_to_do_launches_nothing(recorder):
    cuda_emulation.forward(**make(MODELS[0], torch.float16))
    params = forward_params(REPORTS[-1])
    params.b = 0
    use(recorder, A100)
    assert recorder.test_forward(ctypes.byref(params)) == 0
    assert recorder.test_launches() == 0
