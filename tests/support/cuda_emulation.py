"""Runs the CUDA C++ kernels on the CPU: the PTX of the build, through the interpreter in tools/ptx.

`forward` takes tensors as the op does, fills the params struct and launches what the launchers in
csrc would launch. The PTX is made by the build's own target, with its flags, once per session.
"""

import ctypes
import fcntl
import functools
import os
import shutil
import struct
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import NamedTuple

import ptx
import torch
from torch import Tensor, library

from support.formula import project

ROOT = Path(__file__).parents[2]
BUILD = Path(os.environ.get("NASA_PTX_BUILD", ROOT / "build" / "ptx"))
LOG2E = 1.4426950408889634
WARPS, WARP_ROWS, BLOCK_KEYS, CLIP_KEYS = 4, 16, 128, 80
SHORT_WARPS = 8
LONG_WARPS, LONG_STAGES = 8, 3
BACKWARD_KEYS, BACKWARD_ROWS = 80, 64
HEAD_DIMS = (32, 48, 64, 80, 96, 128, 160, 192, 256)
POS, NEG = 0, 1
RULES = ("nasa", "nasa-text", "nasa-cross", "vsf", "sum", "projected")
# what the last launches did
REPORTS: deque = deque(maxlen=4)


def nvcc() -> str | None:
    """The compiler that setup.py would take."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    found = [Path(home) / "bin" / "nvcc" for home in homes if home]
    return next((str(p) for p in found if p.is_file()), shutil.which("nvcc"))


@functools.cache
def build(target: str) -> Path:
    """Build a target of CMakeLists.txt; returns the build folder."""
    BUILD.mkdir(parents=True, exist_ok=True)
    torch_dir = Path(torch.__file__).parent
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    configure = [
        *("cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", "-DNASA_CPU=OFF", "-DNASA_CUDA=ON"),
        *(f"-DNASA_TORCH_DIR={torch_dir}", f"-DCMAKE_CUDA_COMPILER={nvcc()}"),
    ]
    # one test process builds, the others wait
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", BUILD, "--target", target]):
            done = subprocess.run(
                command, env=os.environ | {"PATH": path}, capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(f"{target} does not build:\n{done.stdout}\n{done.stderr}")
    return BUILD


@functools.cache
def source(name: str) -> str:
    return (build("ptx") / "ptx" / f"{name}.ptx").read_text()


@functools.cache
def kernel(file: str, name: str, dtype: torch.dtype, *sizes: int | bool) -> ptx.LoadedKernel:
    kind = {torch.float16: "6__half", torch.bfloat16: "13__nv_bfloat16"}[dtype]
    numbers = "".join(f"Lb{size:d}E" if isinstance(size, bool) else f"Li{size}E" for size in sizes)
    return ptx.load(source(file), f"{name}I{kind}{numbers}E")


# ---- csrc/nasa.h -------------------------------------------------------------------------------


ADDRESS, INT64, INT, FLOAT = ctypes.c_uint64, ctypes.c_int64, ctypes.c_int, ctypes.c_float
UINT = ctypes.c_uint32


def fields(**types: type) -> list[tuple[str, type]]:
    return list(types.items())


class Mask(ctypes.Structure):
    _fields_ = fields(data=ADDRESS, strides=INT64 * 2, type=INT)


class Matrix(ctypes.Structure):
    _fields_ = fields(data=ADDRESS, strides=INT64 * 3)


class Prompt(ctypes.Structure):
    _fields_ = fields(k=Matrix, v=Matrix, mask=Mask, n=INT)


class Shared(ctypes.Structure):
    _fields_ = fields(
        o=Matrix, lse=ADDRESS, lse_strides=INT64 * 3, first_text_pos=INT, first_text_neg=INT,
    )  # fmt: skip


class ForwardParams(ctypes.Structure):
    _fields_ = fields(
        q=Matrix, o=ADDRESS, prompt=Prompt * 2, alpha_map=ADDRESS, alpha_strides=INT64 * 3, b=INT,
        l=INT, h=INT, d=INT, key_step=UINT, rule=INT, shared=Shared, alpha=FLOAT, scale=FLOAT,
        aligned=ctypes.c_bool, type=INT,
    )  # fmt: skip


class BackwardParams(ctypes.Structure):
    _fields_ = fields(
        call=ForwardParams, image=Prompt, grad_o=Matrix, dq=ADDRESS, dalpha=ADDRESS,
        dk=ADDRESS * 2, dv=ADDRESS * 2, lse=ADDRESS, u=ADDRESS, weight=ADDRESS, shift=ADDRESS,
        partial=ADDRESS, splits=INT, first_hidden=INT, hidden=INT,
    )  # fmt: skip


class NagParams(ctypes.Structure):
    _fields_ = fields(
        o=ADDRESS, z_neg=ADDRESS, alpha_map=ADDRESS, alpha_strides=INT64 * 2, rows=INT64, l=INT,
        channels=INT, first_text_pos=INT, first_text_neg=INT, alpha=FLOAT, scale=FLOAT, tau=FLOAT,
        norm=INT, type=INT, row_warps=INT,
    )  # fmt: skip


MASK_TYPES = {torch.bool: 1, torch.float32: 2, torch.float16: 3, torch.bfloat16: 4}


def step_of(group: int) -> int:
    """From head to head of Q in those of K and V, in parts of 2^31, rounded up."""
    return -(-(1 << 31) // group)


def padded(d: int) -> int:
    return next(size for size in HEAD_DIMS if d <= size)


def tile_bytes(rows: int, d: int) -> int:
    return rows * 2 * (d + 8)


def short_rows(d: int, keys: int, plain: bool) -> int:
    """Query rows that a warp of forward_short takes at once."""
    return 32 if plain and (d <= 128 if keys == CLIP_KEYS else d == 80) else 16


def short_shared_bytes(d: int, keys: int, plain: bool) -> int:
    rows = short_rows(d, keys, plain)
    # four operands of 32 lanes are parked
    parked = 4 * 32 * 16 if rows == 32 and keys == BLOCK_KEYS else 0
    biases = 0 if plain else 2 * keys * 4
    return 4 * tile_bytes(keys, d) + SHORT_WARPS * (tile_bytes(rows, d) + parked) + biases


def is_plain(p: "ForwardParams") -> bool:
    """Whether only keys past the end of the prompts are absent."""
    return p.scale > 0 and not any(side.mask.type and side.n for side in p.prompt)


def share(heads_of_a_batch: int, b: int, tiles: int, blocks: int | None) -> tuple[int, bytes]:
    """How many blocks a persistent grid has, and its Share of csrc/share.h.

    blocks: None for as many as there are heads.
    """
    heads = b * heads_of_a_batch
    blocks = min(blocks or heads, heads * tiles)
    each, longer = divmod(heads * tiles, blocks)
    return blocks, struct.pack("<4i", each, longer, tiles, heads_of_a_batch)


def long_columns(d: int) -> int:
    return d if d <= 128 else d // 2 if d <= 192 else d // 4


def long_rows(d: int) -> int:
    return WARP_ROWS * LONG_WARPS // (d // long_columns(d))


def long_shared_bytes(d: int) -> int:
    tiles = LONG_STAGES * tile_bytes(BLOCK_KEYS // 2, d)
    return tiles + tile_bytes(long_rows(d), d) + BLOCK_KEYS * 4


def backward_columns(d: int) -> int:
    return d if d <= 128 else d // 2 if d <= 192 else d // 4


def queries_shared_bytes(d: int) -> int:
    tiles = 2 * tile_bytes(BACKWARD_ROWS, d) + 2 * tile_bytes(BACKWARD_KEYS, d)
    return tiles + BACKWARD_KEYS * 4


def keys_tile(d: int) -> int:
    """Keys of a block of backward_keys."""
    return 64 if d in (96, 128) else 80


def keys_shared_bytes(d: int) -> int:
    stage = 2 * tile_bytes(BACKWARD_ROWS, d) + 3 * BACKWARD_ROWS * 4
    return 2 * tile_bytes(keys_tile(d), d) + (2 if d <= 80 else 1) * stage


def has_short(d: int, keys: int) -> bool:
    return d <= 160 if keys == CLIP_KEYS else d in (64, 80, 128)


def path_of(d: int, n_pos: int, n_neg: int) -> str:
    """forward_short or forward_long, where shared memory is no limit."""
    keys = CLIP_KEYS if max(n_pos, n_neg) <= CLIP_KEYS else BLOCK_KEYS
    return "short" if max(n_pos, n_neg) <= BLOCK_KEYS and has_short(padded(d), keys) else "long"


def is_aligned(*tensors: Tensor) -> bool:
    return tensors[0].shape[-1] % 8 == 0 and all(
        x.storage_offset() % 8 == 0
        and all(s % 8 == 0 for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1)
        for x in tensors
    )


class Launch(NamedTuple):
    kernel: ptx.LoadedKernel
    grid: int | tuple[int, ...]
    block: int
    shared: int
    args: tuple
    report: ptx.Report
    memory: ptx.Memory


class Joint(NamedTuple):
    """The shared segment of a joint attention, in the terms of csrc/nasa.h."""

    o: Tensor  # [b, l, h, d]
    lse: Tensor  # [b, h, l]
    rule: str = "nasa"
    text_pos: int = 0
    text_neg: int = 0


class Call:
    """One call of the op: its tensors in the interpreter's memory, its params struct."""

    def __init__(self, q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale):
        self.memory = ptx.Memory()
        p = self.params = ForwardParams()
        p.q = self.matrix(q, "q")
        self.o = torch.full(q.shape, float("nan"), dtype=q.dtype)
        p.o = self.memory.upload(self.o, "o")
        sides = ((k_pos, v_pos, mask_pos, "pos"), (k_neg, v_neg, mask_neg, "neg"))
        for side, (k, v, mask, name) in enumerate(sides):
            self.set_prompt(p.prompt[side], k, v, mask, name)
        if alpha_map is not None:
            p.alpha_map = self.memory.upload(alpha_map, "alpha")
            p.alpha_strides[:] = alpha_map.stride()
        elif alpha == 0:
            p.prompt[NEG].n = 0
        p.b, p.l, p.h, p.d = q.shape
        self.group = p.h // max(1, k_pos.shape[2])
        p.key_step = step_of(self.group)
        p.alpha, p.scale, p.type = alpha, scale * LOG2E, q.dtype == torch.bfloat16
        p.aligned = is_aligned(q, k_pos, v_pos, k_neg, v_neg)

    def matrix(self, x: Tensor, name: str) -> Matrix:
        return Matrix(self.memory.upload(x, name), (INT64 * 3)(*x.stride()[:3]))

    def set_prompt(self, prompt: Prompt, k, v, mask, name: str) -> None:
        prompt.k, prompt.v = self.matrix(k, f"k_{name}"), self.matrix(v, f"v_{name}")
        prompt.n = k.shape[1]
        if mask is not None:
            prompt.mask.data = self.memory.upload(mask, f"mask_{name}")
            prompt.mask.strides[:] = mask.stride()
            prompt.mask.type = MASK_TYPES[mask.dtype]

    def set_shared(self, o: Tensor) -> None:
        self.params.shared.o = self.matrix(o, "o_shared")

    def set_text_rows(self, text_pos: int, text_neg: int) -> None:
        p, shared = self.params, self.params.shared
        shared.first_text_neg = p.l - text_neg
        shared.first_text_pos = shared.first_text_neg - text_pos

    def add(self, joint: Joint, tensors: tuple[Tensor, ...]) -> None:
        p, shared = self.params, self.params.shared
        self.set_shared(joint.o)
        shared.lse = self.memory.upload(joint.lse, "lse_shared")
        shared.lse_strides[:] = joint.lse.stride()
        p.rule = RULES.index(joint.rule)
        self.set_text_rows(joint.text_pos, joint.text_neg)
        p.aligned = is_aligned(*tensors, joint.o)

    def launch(
        self, loaded: ptx.LoadedKernel, grid: int | tuple[int, ...], block: int, shared: int, *args
    ) -> None:
        """Run a kernel; a race in shared memory, or a read of what nobody wrote, is an error."""
        report = loaded.launch(
            grid, block, list(args), self.memory, shared, check_races=True,
            count_bank_conflicts=True, dependent="sm90" in loaded.name,
        )  # fmt: skip
        REPORTS.append(Launch(loaded, grid, block, shared, args, report, self.memory))

    def output(self, *shape: int, dtype: torch.dtype) -> tuple[int, Tensor]:
        """The address of a new tensor, full of NaN, and its host copy."""
        host = torch.full(shape, float("nan"), dtype=dtype)
        return self.memory.upload(host), host


def call_of(q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha, scale, joint, rule) -> Call:
    """A forward call as csrc/bindings.cpp hands it to the launchers."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    alpha_map = alpha if isinstance(alpha, Tensor) else None
    number = 0.0 if alpha_map is not None else alpha
    call = Call(q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, number, scale)
    if joint is not None:
        call.add(joint, (q, k_pos, v_pos, k_neg, v_neg))
        if joint.text_neg or joint.rule == "vsf":
            call.params.prompt[NEG].n = k_neg.shape[1]
    else:
        call.params.rule = RULES.index(rule)
    if alpha_map is None and alpha == 0 and call.params.rule == RULES.index("projected"):
        call.params.rule = RULES.index("nasa")
    return call


def forward(
    q: Tensor, k_pos: Tensor, v_pos: Tensor, k_neg: Tensor, v_neg: Tensor,
    alpha: float | Tensor = 0.5, mask_pos: Tensor | None = None, mask_neg: Tensor | None = None,
    scale: float | None = None, path: str | None = None, blocks: int | None = None,
    joint: Joint | None = None, rule: str = "nasa",
) -> Tensor:  # fmt: skip
    """O `[b, l, h, d]` as the CUDA back end computes it on sm_80.

    path: "short" or "long" where both take the call; None is the launcher's choice. "sm90-short"
        and "sm90-long" are forward_sm90's.
    blocks: Blocks that share the rows of all heads in forward_short.
    rule: "nasa" or "projected"; beside shared keys `joint` has one of its own.
    """
    if path is not None and path.startswith("sm90-"):
        return forward_sm90(
            q, k_pos, v_pos, k_neg, v_neg, alpha, mask_pos, mask_neg, scale,
            path.removeprefix("sm90-"), blocks, joint, rule,
        )  # fmt: skip
    b, l, h, d = q.shape
    call = call_of(q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha, scale, joint, rule)
    n_pos, n_neg = (call.params.prompt[side].n for side in (POS, NEG))
    if q.numel() == 0:
        return call.o
    size = padded(d)
    if path is None:
        path = path_of(d, n_pos, n_neg)
        if call.params.rule == RULES.index("projected") and size > 128:
            # its registers would not hold all columns, of which there are sums to take
            path = "long"
    if path == "short":
        keys = CLIP_KEYS if max(n_pos, n_neg) <= CLIP_KEYS else BLOCK_KEYS
        plain = is_plain(call.params)
        loaded = kernel("forward_short", "forward_short_kernel", q.dtype, size, keys, plain)
        blocks, parts = share(h, b, -(-l // short_rows(size, keys, plain)), blocks)
        shared = short_shared_bytes(size, keys, plain)
        call.launch(loaded, blocks, SHORT_WARPS * 32, shared, bytes(call.params), parts)
    else:
        loaded = kernel("forward_long", "forward_long_kernel", q.dtype, size)
        blocks = b * h * -(-l // long_rows(size))
        call.launch(loaded, blocks, LONG_WARPS * 32, long_shared_bytes(size), bytes(call.params))
    return call.memory.download(call.params.o, like=call.o)


MAPPED_BYTES = 256
# of the Params of csrc/tensor_maps.h: q, o, o_shared, k and v of both prompts
MAPS = 7


def mapped(
    call: Call, address: int, x: Tensor, box_rows: int, first_row: int = 0, group: int = 1
) -> bytes:
    """A `Mapped` of csrc/tensor_maps.h: a tensor map of x as [b, h, rows, d], and its steps."""
    b, _, h, _ = x.shape
    step_h, step_b = h > 1 and x.stride(2) != 0, b > 1 and x.stride(0) != 0
    # [b or 1, h or 1, rows, d]
    view = x[: b if step_b else 1, :, : h if step_h else 1].transpose(1, 2)
    tensor_map = ptx.tensor_map(call.memory, address, view, (1, 1, box_rows, 64), swizzle=128)
    steps = struct.pack("<I2i", step_h * step_of(group), step_b, first_row)
    return (tensor_map + steps).ljust(MAPPED_BYTES, b"\0")


# csrc/sm90.cuh
GROUP_ROWS, ATOM_BYTES, QUERY_STAGES = 64, 128, 2


def stream_keys(d: int) -> int:
    return BLOCK_KEYS if d <= 128 else CLIP_KEYS


def path_of_sm90(d: int, n_pos: int, n_neg: int) -> str:
    """forward_sm90 or forward_sm90_long."""
    longest = max(n_pos, n_neg)
    return "short" if longest <= (BLOCK_KEYS if d in (64, 72, 128) else CLIP_KEYS) else "long"


class Sm90Kernel(NamedTuple):
    """What the launchers give to a kernel for Hopper: of its K and V tiles, its warpgroups."""

    file: str
    sizes: tuple[int | bool, ...]
    keys: int
    groups: int  # with rows
    threads: int
    shared: int

    @classmethod
    def of(cls, path: str, d: int, n_pos: int, n_neg: int, plain: bool, sides: int) -> "Sm90Kernel":
        atoms = -(-d // 64)
        rows, barriers = QUERY_STAGES * atoms * GROUP_ROWS * ATOM_BYTES, QUERY_STAGES + 1
        if path == "short":
            keys = CLIP_KEYS if max(n_pos, n_neg) <= CLIP_KEYS else BLOCK_KEYS
            groups = 3 if sides == 2 and d <= 80 and keys == CLIP_KEYS else 2
            tiles = 2 * sides * atoms * keys * ATOM_BYTES
            shared = tiles + groups * rows + sides * keys * 4 + 8 * (2 + groups * barriers)
            sizes = (d, keys, sides, plain)
            return cls("forward_sm90_short", sizes, keys, groups, groups * 128, shared)
        keys, groups = stream_keys(d), 2
        slots = 8 if d <= 64 else 4 if d <= 80 else 3
        parked = 0 if d <= 80 else 16 if d <= 128 else 8
        tiles = slots * atoms * keys * ATOM_BYTES + groups * 128 * parked * 16
        shared = tiles + groups * rows + slots * keys * 4 + 8 * (3 * slots + groups * barriers)
        return cls("forward_sm90_long", (d, plain), keys, groups, groups * 128 + 128, shared)


def forward_sm90(
    q: Tensor, k_pos: Tensor, v_pos: Tensor, k_neg: Tensor, v_neg: Tensor,
    alpha: float | Tensor = 0.5, mask_pos: Tensor | None = None, mask_neg: Tensor | None = None,
    scale: float | None = None, path: str | None = None, blocks: int | None = None,
    joint: Joint | None = None, rule: str = "nasa",
) -> Tensor:  # fmt: skip
    """O `[b, l, h, d]` as the CUDA back end computes it on sm_90a.

    path: "short" or "long" where both take the call; None is the launcher's choice.
    blocks: Blocks that share the rows of all heads.
    """
    b, l, h, d = q.shape
    call = call_of(q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha, scale, joint, rule)
    p = call.params
    n_pos, n_neg = (p.prompt[side].n for side in (POS, NEG))
    path = path or path_of_sm90(d, n_pos, n_neg)
    projected = joint is not None and p.rule == RULES.index("projected")
    how = Sm90Kernel.of(path, d, n_pos, n_neg, is_plain(p), 2 if n_neg or projected else 1)
    maps = [mapped(call, p.q.data, q, GROUP_ROWS), mapped(call, p.o, call.o, GROUP_ROWS)]
    shared = p.shared.o.data
    maps.append(mapped(call, shared, joint.o, GROUP_ROWS) if joint else bytes(MAPPED_BYTES))
    for tensors, field in (((k_pos, k_neg), "k"), ((v_pos, v_neg), "v")):
        for side in (POS, NEG):
            prompt = p.prompt[side]
            if prompt.n:
                at = getattr(prompt, field).data
                maps.append(mapped(call, at, tensors[side], how.keys, group=call.group))
            else:
                void = q[:1, :, :1].expand_as(q)
                maps.append(mapped(call, p.q.data, void, how.keys, first_row=l))
    params = b"".join(maps) + bytes(p)
    loaded = kernel(how.file, f"{how.file}_kernel", q.dtype, *how.sizes)
    params = params.ljust(-(-len(params) // 128) * 128, b"\0")
    tiles = -(-l // (GROUP_ROWS * how.groups if path == "long" else GROUP_ROWS))
    blocks, parts = share(h, b, tiles, blocks)
    call.launch(loaded, blocks, how.threads, how.shared, params, parts)
    return call.memory.download(p.o, like=call.o)


# csrc/nag_blend.cu: warps of a block, and channels that one of them keeps
NAG_WARPS, NAG_CHANNELS = 8, 1280


def nag_blend(
    z_pos: Tensor, z_neg: Tensor, alpha: float | Tensor, nag_scale: float, nag_tau: float,
    nag_norm: int = 1, text_pos: int = 0, text_neg: int = 0,
) -> Tensor:  # fmt: skip
    """What normalised attention guidance makes of Z+ and Z- `[b, l, h, d]`; alpha `[b, l, 1]`."""
    b, l, h, d = z_pos.shape
    memory = ptx.Memory()
    p = NagParams(rows=b * l, l=l, channels=h * d, scale=nag_scale, tau=nag_tau, norm=nag_norm)
    p.o, p.z_neg = memory.upload(z_pos, "z_pos"), memory.upload(z_neg, "z_neg")
    if isinstance(alpha, Tensor):
        p.alpha_map = memory.upload(alpha, "alpha")
        p.alpha_strides[:] = alpha.stride()[:2]
    else:
        p.alpha = alpha
    p.first_text_pos, p.first_text_neg = l - text_pos - text_neg, l - text_neg
    p.type = z_pos.dtype == torch.bfloat16
    p.row_warps = 1
    while p.row_warps < NAG_WARPS and p.channels > NAG_CHANNELS * p.row_warps:
        p.row_warps *= 2
    loaded = kernel("nag_blend", "nag_blend_kernel", z_pos.dtype, p.channels % 8 == 0)
    blocks, args = -(-p.rows // (NAG_WARPS // p.row_warps)), (bytes(p),)
    report = loaded.launch(
        blocks, NAG_WARPS * 32, list(args), memory, 0, check_races=True, count_bank_conflicts=True
    )
    REPORTS.append(Launch(loaded, blocks, NAG_WARPS * 32, 0, args, report, memory))
    return memory.download(p.o, like=z_pos)


def nag(
    q: Tensor, k_pos: Tensor, v_pos: Tensor, k_neg: Tensor, v_neg: Tensor, alpha: float | Tensor,
    nag_scale: float, nag_tau: float, nag_norm: int = 1, mask_pos: Tensor | None = None,
    mask_neg: Tensor | None = None, path: str | None = None, joint: Joint | None = None,
) -> Tensor:  # fmt: skip
    """Normalised attention guidance as the CUDA back end computes it: three launches."""
    texts = (joint.text_pos, joint.text_neg) if joint else (0, 0)
    one = joint and joint._replace(rule="nasa", text_pos=0, text_neg=0)
    z_pos = forward(
        q, k_pos, v_pos, k_pos, v_pos, 0.0, mask_pos, path=path,
        joint=joint and one._replace(text_pos=texts[0], text_neg=texts[1]),
    )  # fmt: skip
    z_neg = forward(q, k_neg, v_neg, k_neg, v_neg, 0.0, mask_neg, path=path, joint=one)
    return nag_blend(z_pos, z_neg, alpha, nag_scale, nag_tau, nag_norm, *texts)


def backward(
    grad_o: Tensor, q: Tensor, k_pos: Tensor, v_pos: Tensor, k_neg: Tensor, v_neg: Tensor,
    alpha: float | Tensor = 0.5, mask_pos: Tensor | None = None, mask_neg: Tensor | None = None,
    scale: float | None = None, splits: int = 1, needs: tuple[bool, ...] = (True,) * 6,
) -> dict[str, Tensor]:  # fmt: skip
    """The gradients that `needs` asks for, as the CUDA back end computes them on sm_80."""
    b, l, h, d = q.shape
    scale = d**-0.5 if scale is None else scale
    alpha_map = alpha if isinstance(alpha, Tensor) else None
    number = 0.0 if alpha_map is not None else alpha
    # the number 0 is no reason here to leave the negative prompt out: its gradients are asked for
    call = Call(q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, number or 1.0, scale)
    call.params.alpha = number
    call.params.aligned = is_aligned(grad_o, q, k_pos, v_pos, k_neg, v_neg)
    p = BackwardParams(call=call.params)
    p.grad_o = call.matrix(grad_o, "grad_o")
    outputs = {}
    likes = {"q": q, "k_pos": k_pos, "v_pos": v_pos, "k_neg": k_neg, "v_neg": v_neg}
    likes["alpha"] = torch.empty(b, l, h)
    for need, (name, like) in zip(needs, likes.items(), strict=True):
        if need and like.numel():
            outputs[name] = call.output(*like.shape, dtype=like.dtype)
    address = {name: outputs[name][0] if name in outputs else 0 for name in likes}
    p.dq, p.dalpha = address["q"], address["alpha"]
    p.dk[:] = address["k_pos"], address["k_neg"]
    p.dv[:] = address["v_pos"], address["v_neg"]
    p.lse = call.output(2, b, h, l, dtype=torch.float32)[0]
    p.u = call.output(2, b, h, l, dtype=torch.float32)[0]
    elements = 2 * sum(b * p.call.prompt[side].n * h * d for side in (POS, NEG))
    if splits > 1 or call.group > 1:
        p.partial = call.output(splits, elements, dtype=torch.float32)[0]
    p.splits = splits
    launch_queries(call, p)
    if any(p.dk) or any(p.dv):
        launch_keys(call, p)
    return {name: call.memory.download(at, like=host) for name, (at, host) in outputs.items()}


def launch_queries(call: Call, p: BackwardParams) -> None:
    size = padded(p.call.d)
    blocks = p.call.b * p.call.h * size // backward_columns(size) * -(-p.call.l // BACKWARD_ROWS)
    loaded = kernel("backward_queries", "backward_queries_kernel", call.o.dtype, size)
    call.launch(loaded, blocks, WARPS * 32, queries_shared_bytes(size), bytes(p))


def launch_keys(call: Call, p: BackwardParams) -> None:
    size = padded(p.call.d)
    blocks = p.call.b * p.call.h * size // backward_columns(size) * p.splits
    blocks *= sum(-(-p.call.prompt[side].n // keys_tile(size)) for side in (POS, NEG))
    loaded = kernel("backward_keys", "backward_keys_kernel", call.o.dtype, size)
    call.launch(loaded, blocks, keys_tile(size) * 2, keys_shared_bytes(size), bytes(p))
    if p.partial:
        sums = kernel("backward_keys", "sum_splits_kernel", call.o.dtype)
        call.launch(sums, (3, 4), 256, 0, bytes(p))


class JointBackward:
    """The operators of a joint attention's backward pass, as csrc/bindings.cpp has them."""

    splits = 1  # of the query rows in joint_keys_cuda

    @staticmethod
    def of(grad_o, q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, scale, *others) -> tuple:
        tensors = (q, k_pos, v_pos, k_neg, v_neg)
        call = Call(*tensors, mask_pos, mask_neg, None, 1.0, scale)
        call.params.alpha = 0.0
        call.params.aligned = is_aligned(grad_o, *tensors, *others)
        p = BackwardParams()
        p.grad_o = call.matrix(grad_o, "grad_o")
        return call, p

    def statistics(
        self, grad_o, o_shared, q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, scale,
        text_pos, text_neg,
    ) -> Tensor:  # fmt: skip
        b, l, h, _ = q.shape
        prompts = (k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg)
        call, p = self.of(grad_o, q, *prompts, scale)
        call.set_shared(o_shared)
        call.set_text_rows(text_pos, text_neg)
        p.call = call.params
        at, rows = call.output(2, 3, b, h, l, dtype=torch.float32)
        p.lse = at + 4 * b * h * l
        p.u = p.lse + 12 * b * h * l
        launch_queries(call, p)
        return call.memory.download(at, like=rows)

    def queries(
        self, grad_o, o_shared, q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, lse,
        weight, shift, scale, text_pos, text_neg,
    ) -> Tensor:  # fmt: skip
        prompts = (k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg)
        call, p = self.of(grad_o, q, *prompts, scale, k, v)
        call.set_shared(o_shared)
        call.set_text_rows(text_pos, text_neg)
        p.call = call.params
        call.set_prompt(p.image, k, v, None, "shared")
        step = 4 * lse.numel() // 3
        p.lse, p.weight, p.shift = (call.memory.upload(x) + step for x in (lse, weight, shift))
        p.dq, dq = call.output(*q.shape, dtype=q.dtype)
        launch_queries(call, p)
        return call.memory.download(p.dq, like=dq)

    def keys(
        self, grad_o, q, k, v, mask, lse, weight, shift, scale, first_hidden, end_hidden, needs
    ) -> tuple[Tensor, ...]:
        tiles = -(-q.shape[1] // BACKWARD_ROWS)
        last = tiles if end_hidden == q.shape[1] else end_hidden // BACKWARD_ROWS
        first = -(-first_hidden // BACKWARD_ROWS)
        shapes = [k.shape if needed else (0,) for needed in needs]
        if k.numel() == 0 or last - first == tiles or not any(needs):
            return tuple(q.new_zeros(shape) for shape in shapes)
        call, p = self.of(grad_o, q, k, v, k, v, mask, None, scale)
        p.call = call.params
        p.call.prompt[NEG].n = 0
        p.first_hidden, p.hidden = first, max(0, last - first)
        p.lse, p.weight, p.shift = (call.memory.upload(x) for x in (lse, weight, shift))
        outputs = [call.output(*shape, dtype=q.dtype) for shape in shapes]
        p.dk[POS], p.dv[POS] = (
            at if needed else 0 for (at, _), needed in zip(outputs, needs, strict=True)
        )
        p.splits = self.splits
        if p.splits > 1 or call.group > 1:
            elements = 2 * k.numel() * call.group
            p.partial = call.output(p.splits, elements, dtype=torch.float32)[0]
        launch_keys(call, p)
        return tuple(
            call.memory.download(at, like=host) if host.numel() else host for at, host in outputs
        )


@functools.cache
def joint_backward_operators() -> JointBackward:
    """Registers the emulation as those operators on CPU tensors, for `_cuda/joint.py`."""
    emulation = JointBackward()
    for step in ("statistics", "queries", "keys"):
        library.impl(f"nasa_kernels::joint_{step}_cuda", "CPU", getattr(emulation, step))
    return emulation


# ---- the accuracy rule ---------------------------------------------------------------------------


def eager(
    q, k_pos, v_pos, k_neg, v_neg, alpha, mask_pos=None, mask_neg=None, scale=None, rule="nasa"
) -> Tensor:
    """Algorithm 1 in PyTorch, in the dtype of the inputs: each step of it rounds."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def attend(k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        # [b, h, l, n]
        scores = torch.einsum("blhd,bnhd->bhln", q, k) * scale
        if mask is not None:
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf"))
            scores = scores + mask[:, None, None, :].to(q.dtype)
        return torch.einsum("bhln,bnhd->blhd", scores.softmax(-1), v)

    weight = alpha[..., None].to(q.dtype) if isinstance(alpha, Tensor) else alpha
    z_pos, z_neg = attend(k_pos, v_pos, mask_pos), attend(k_neg, v_neg, mask_neg)
    return project(z_pos, z_neg, weight) if rule == "projected" else z_pos - weight * z_neg


def assert_as_accurate_as_eager(actual: Tensor, exact: Tensor, low: Tensor) -> None:
    """Against fp64: relative L2 error at most that of eager PyTorch, max error at most 1.5 times.

    The largest error of a small tensor is one element's luck: eager's counts as no less than what
    rounding the exact result once would lose.
    """
    assert torch.isfinite(actual).all(), f"{(~actual.isfinite()).sum()} values are not finite"
    error, budget = actual.double() - exact, low.double() - exact
    assert error.norm() <= budget.norm(), f"L2: {error.norm():.2e}, eager {budget.norm():.2e}"
    rounding = (exact.to(actual.dtype).double() - exact).abs().max()
    top, limit = error.abs().max(), 1.5 * max(budget.abs().max(), rounding)
    assert top <= limit, f"max: {top:.2e}, 1.5 times eager {limit:.2e}"
