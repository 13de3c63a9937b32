"""Runs csrc's forward_image on the CPU: the launch of a joint attention that attends to the image's
keys itself.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from support import cuda_emulation
from support.cuda_emulation import (
    ADDRESS,
    LONG_WARPS,
    NEG,
    RULES,
    Call,
    ForwardParams,
    Joint,
    Prompt,
    fields,
    forward,
    is_aligned,
    long_rows,
    long_shared_bytes,
    padded,
)


class Image(ctypes.Structure):
    _fields_ = fields(keys=Prompt, o=ADDRESS, lse=ADDRESS)


class ImageParams(ctypes.Structure):
    _fields_ = fields(call=ForwardParams, image=Image)


class Attended(NamedTuple):
    o: Tensor  # [b, l, h, d]
    o_shared: Tensor
    lse_shared: Tensor  # [b, h, l]


def forward_image(
    q: Tensor, k: Tensor, v: Tensor, k_pos: Tensor, v_pos: Tensor, k_neg: Tensor, v_neg: Tensor,
    alpha: float | Tensor = 0.5, mask_pos: Tensor | None = None, mask_neg: Tensor | None = None,
    scale: float | None = None, rule: str = "nasa", text_pos: int = 0, text_neg: int = 0,
) -> Attended:  # fmt: skip
    """A call as csrc/bindings.cpp hands it to the launcher."""
    b, l, h, d = q.shape
    scale = d**-0.5 if scale is None else scale
    alpha_map = alpha if isinstance(alpha, Tensor) else None
    number = 0.0 if alpha_map is not None else alpha
    call = Call(q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, number, scale)
    p = ImageParams(call=call.params)
    call.set_prompt(p.image.keys, k, v, None, "image")
    o_shared = torch.full(q.shape, float("nan"), dtype=q.dtype)
    p.image.o, p.image.lse = call.memory.upload(o_shared, "o_shared"), 0
    p.image.lse, lse_shared = call.output(b, h, l, dtype=torch.float32)
    own = p.call
    own.shared.o.data, own.shared.lse = p.image.o, p.image.lse
    own.shared.o.strides[:] = o_shared.stride()[:3]
    own.shared.lse_strides[:] = lse_shared.stride()
    own.shared.first_text_neg = l - text_neg
    own.shared.first_text_pos = l - text_neg - text_pos
    own.rule = RULES.index("nasa" if rule == "projected" and alpha is number == 0 else rule)
    if text_neg or rule == "vsf":
        own.prompt[NEG].n = k_neg.shape[1]
    own.aligned = is_aligned(q, k, v, k_pos, v_pos, k_neg, v_neg)
    size = padded(d)
    loaded = cuda_emulation.kernel("forward_long", "forward_image_kernel", q.dtype, size)
    blocks = b * h * -(-l // long_rows(size))
    call.launch(loaded, blocks, LONG_WARPS * 32, long_shared_bytes(size), bytes(p))
    return Attended(
        call.memory.download(own.o, like=call.o),
        call.memory.download(p.image.o, like=o_shared),
        call.memory.download(p.image.lse, like=lse_shared),
    )


def beside(found: Attended, inputs: dict, path: str | None = None, **how) -> Tensor:
    """O of the launch for the prompts alone, from the O_s and log-sum-exp that were found."""
    rows = {name: how.pop(name) for name in ("rule", "text_pos", "text_neg") if name in how}
    prompts = {name: x for name, x in inputs.items() if name not in ("k", "v")}
    joint = Joint(found.o_shared, found.lse_shared, **rows)
    return forward(**prompts, joint=joint, path=path, **how)
