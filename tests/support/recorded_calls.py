"""What the operators of csrc/bindings.cpp launch, on CPU tensors, with fake_cuda.cpp's runtime.

Run as a program with the folder of the build, since its operators are then those of this process;
prints of each call its launches, with the addresses in them named after the tensors.
"""

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from support.cuda_emulation import MAPPED_BYTES, MAPS, ForwardParams, NagParams
from support.cuda_image import ImageParams

# major, multiprocessors, shared memory of a block and of a multiprocessor
HOPPER, AMPERE = (9, 132, 232448, 233472), (8, 108, 166912, 167936)


class Record(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char * 256), ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3),
        ("sizes", ctypes.c_uint64 * 3), ("arguments", ctypes.c_ubyte * 4096),
    ]  # fmt: skip


class Recorder:
    def __init__(self, build: Path):
        self.library = ctypes.CDLL(str(build / "recorder.so"), mode=ctypes.RTLD_GLOBAL)
        self.library.test_launch.restype = ctypes.POINTER(Record)
        torch.ops.load_library(build / "calls.so")

    def launches_of(self, operator: str, tensors: dict[str, torch.Tensor], *others) -> list[dict]:
        """`tensors` are q, k and v of the image where it is attended to, and of both prompts; more
        of them are named in the result.
        """
        first = self.library.test_launches()
        call = getattr(torch.ops.nasa_kernels, operator).default
        names = {x.data_ptr(): name for name, x in tensors.items()}
        found = call(*list(tensors.values())[: 7 if "image" in operator else 5], *others)
        results = found if isinstance(found, tuple) else (found,)
        names |= zip((x.data_ptr() for x in results), ("o", "o_shared", "lse_shared"), strict=False)
        found = range(first, self.library.test_launches())
        return [self._told(self.library.test_launch(i).contents, names) for i in found]

    def _told(self, record: Record, names: dict[int, str]) -> dict[str, Any]:
        kernel, content = record.kernel.decode(), bytes(record.arguments)

        def name(address: int) -> str | None:
            return names.get(address, "new") if address else None

        if "nag_blend" in kernel:
            nag = NagParams.from_buffer_copy(content)
            return {
                "kernel": "nag_blend", "o": name(nag.o), "z_neg": name(nag.z_neg),
                "alpha_map": name(nag.alpha_map), "alpha_strides": list(nag.alpha_strides),
                "rows": nag.rows, "l": nag.l, "channels": nag.channels,
                "texts": [nag.first_text_pos, nag.first_text_neg],
                "numbers": [nag.alpha, nag.scale, nag.tau, nag.norm], "is_bf16": nag.type,
            }  # fmt: skip
        if "forward_image" in kernel:
            p = ImageParams.from_buffer_copy(content)
            image, shared = p.image, p.call.shared
            return self._forward(p.call, "image", name) | {
                "image": [name(image.keys.k.data), name(image.keys.v.data), image.keys.n],
                # what the launch leaves is what it reads
                "left": [name(image.o), name(image.lse)], "is_read": shared.o.data == image.o
                and shared.lse == image.lse, "strides": list(shared.o.strides),
                "lse_strides": list(shared.lse_strides), "address": image.o % 16,
            }  # fmt: skip
        is_hopper = "sm90" in kernel
        p = ForwardParams.from_buffer_copy(content[MAPS * MAPPED_BYTES * is_hopper :])
        return self._forward(p, "hopper" if is_hopper else "generic", name)

    @staticmethod
    def _forward(p: ForwardParams, kernel: str, name: Callable) -> dict[str, Any]:
        pos, neg = p.prompt
        return {
            "kernel": kernel, "q": name(p.q.data), "o": name(p.o),
            "k": name(pos.k.data), "v": name(pos.v.data), "mask": name(pos.mask.data),
            "keys": [pos.n, neg.n], "alpha": p.alpha, "alpha_map": name(p.alpha_map),
            "shared": name(p.shared.o.data), "is_aligned": p.aligned, "rule": p.rule,
            "texts": [p.shared.first_text_pos, p.shared.first_text_neg],
        }  # fmt: skip


def images_of(recorder: Recorder, x: dict[str, torch.Tensor], odd: torch.Tensor) -> dict[str, Any]:
    """Calls that attend to an image of 20 keys themselves; of the refused ones what is said."""
    image = {"q": x["q"], "k": x["k_pos"][:, :20].clone(), "v": x["v_pos"][:, :20].clone(), **x}
    number, rows = (None, x["mask"], None, 0.25, 0.125), (None, x["mask"], x["rows"], 0.0, 0.125)
    off = (None, x["mask"], None, 0.0, 0.125)
    rule = (4, 4, 3)

    def run(name: str, changes: dict[str, torch.Tensor], *others) -> list[dict] | str:
        try:
            return recorder.launches_of(f"{name}_image_cuda", image | changes, *others)
        except RuntimeError as error:
            return str(error).splitlines()[0]

    k, v, nag = image["k"], image["v"], (3.0, 2.5, 1, 4, 3)
    return {
        "forward": run("forward", {}, *number, *rule),
        "attention": run("attention", {}, *number, *rule),
        "off": run("forward", {}, *off, 0, 0, 0),
        "projected-off": run("forward", {}, *off, 5, 4, 3),
        "nag": run("nag", {}, *rows, *nag),
        "nag-off": run("nag", {}, *off, 3.0, 2.5, 1, 0, 0),
        "odd-image": run("forward", {"k": odd[:, :20]}, *number, *rule),
        "odd-negative": run("forward", {"k_neg": odd}, *number, *rule),
        "one-head": run("forward", {"k": k[:1, :, :1], "v": v[:1, :, :1]}, *number, *rule),
        "no-keys": run("forward", {"k": k[:, :0], "v": v[:, :0]}, *number, *rule),
        "refused": {
            "dtype": run("forward", {"v": v.half()}, *number, *rule),
            "tokens": run("forward", {"v": v[:, :8]}, *number, *rule),
            "heads": run("forward", {"k": x["q"], "v": x["q"]}, *number, *rule),
            "head_dim": run("nag", {"k": k[..., :8]}, *rows, *nag),
            "batch": run("attention", {"k": k.repeat(2, 1, 1, 1)}, *number, *rule),
            "dimensions": run("attention", {"q": x["q"][0]}, *number, *rule),
            "rule": run("forward", {}, *number, 6, 4, 3),
            "texts": run("nag", {}, *rows, 3.0, 2.5, 1, 9, 9),
        },
    }


def main(build: Path) -> None:
    import nasa_kernels.ops  # noqa: F401, the schemas

    recorder = Recorder(build)

    def normal(n: int, h: int = 2, d: int = 64) -> torch.Tensor:
        return torch.randn(2, n, h, d).bfloat16()

    def tensors() -> dict[str, torch.Tensor]:
        # two heads of the keys for four of the queries
        return {
            "q": normal(16, 4), "k_pos": normal(77), "v_pos": normal(77), "k_neg": normal(33),
            "v_neg": normal(33), "mask": torch.ones(2, 33, dtype=torch.bool),
            "map": torch.rand(2, 1, 1), "rows": torch.rand(2, 9, 1),
            "shared": normal(16, 4),
        }  # fmt: skip

    found: dict[str, Any] = {}
    lse, settings = torch.rand(2, 4, 16), (3.0, 2.5)
    for gpu, limits in (("hopper", HOPPER), ("ampere", AMPERE)):
        recorder.library.test_use_device(*limits)
        x = tensors()
        # masks, map, alpha, scale
        number = (None, x["mask"], None, 0.25, 0.125)
        mapped = (None, x["mask"], x["map"], 0.0, 0.125)
        of_rows = (None, x["mask"], x["rows"], 0.0, 0.125)
        odd = torch.randn(2, 33, 2, 65).bfloat16()[..., 1:]
        unaligned = x | {"k_neg": odd, "v_neg": odd}
        joint = (x["shared"], lse, *settings, 1, 4, 3)
        found[gpu] = {
            "number": recorder.launches_of("nag_cuda", x, *number, *settings, 1),
            "map": recorder.launches_of("nag_cuda", x, *mapped, *settings, 2),
            "off": recorder.launches_of("nag_cuda", x, *number[:3], 0.0, 0.125, *settings, 1),
            "unaligned": recorder.launches_of("nag_cuda", unaligned, *number, *settings, 1),
            "joint": recorder.launches_of("nag_joint_cuda", x, *of_rows, *joint),
        }
        found[gpu]["image"] = images_of(recorder, x, odd)
    refusals = []
    many = {name: each[:1].expand(2**27, *each.shape[1:]) for name, each in tensors().items()}
    for x, alpha, norm in (
        (tensors(), None, 3), (many, None, 1),
        (tensors(), torch.rand(2, 16, 4), 1), (tensors(), torch.rand(3), 1),
    ):  # fmt: skip
        try:
            recorder.launches_of("nag_cuda", x, None, None, alpha, 0.5, 0.125, *settings, norm)
            refusals.append("")
        except RuntimeError as error:
            refusals.append(str(error).splitlines()[0])
    print(json.dumps(found | {"refusals": refusals}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
