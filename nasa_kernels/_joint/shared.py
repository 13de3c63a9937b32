"""The image's keys in joint attention: whose launch attends to them.

Of a small image a back end's own kernel does, in its one launch for all segments. Of any other
PyTorch's attention does so first, with its log-sum-exp, which lets the keys of the prompts be added
afterwards: the fastest kernel there is, for one launch more and the host time of its call.
"""

import functools
from collections.abc import Callable, Sequence
from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor

_aten, _FLOAT = torch.ops.aten, torch.float32
# calls that cuDNN refused, by what it could see of them; another library takes the next one at once
_refused: set[tuple] = set()

# The most FLOPs in the attention to an image's keys that our kernels take over from PyTorch's. No
# GPU has decided it; by a model, the counts of docs/kernels/statics.md: on Hopper a step of 64
# queries and 128 keys of d 128 takes `forward_image` 2328 cycles of an SM, and a kernel of wgmma at
# three quarters of its peak 1365. So at this many FLOPs it takes 4 us longer, elsewhere less.
# A call of PyTorch's attention costs the host more than that, and the GPU the start of a kernel.
_one_launch = 2**32


def take_in_one_launch(flops: int) -> int:
    """Another limit in this process, to measure it: 0 for two launches of every image. Returns the
    one before.
    """
    global _one_launch
    before, _one_launch = _one_launch, flops
    return before


def in_one_launch(q: Tensor, k: Tensor, text: int) -> bool:
    """Whether the image of k is small enough for the one launch of a back end that has it. It says
    nothing of their shapes otherwise.

    text: How many of the queries are the texts' own. They do not decide, so that the bits of the
        image's rows are the same with them and without.

    Raises:
        ValueError, IndexError: q has not 4 dimensions, or k not two.
    """
    # fp32 is multiplied without tensor cores, where our kernels are the slower ones at any size
    return q.dtype is not _FLOAT and is_small(q.shape, k.shape[1], text)


def is_small(shape: torch.Size, n: int, text: int) -> bool:
    """The same of q's shape and n keys."""
    b, l, h, d = shape
    rows = l - text
    return 4 * b * h * d * n * (rows if rows > n else n) <= _one_launch


def attend_shared(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """O [b, l, h, d] in the dtype of q and the natural log-sum-exp [b, h, l] in fp32, both
    contiguous. Without keys they are 0 and -inf.
    """
    b, l, h, d = q.shape
    _, n, h_kv, _ = k.shape
    if 0 in (b, l, h, d, n):
        lse = torch.full((b, h, l), float("-inf"), dtype=torch.float32, device=q.device)
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device), lse
    # PyTorch's kernels want rows of 16 bytes
    padding = -d % 8
    if padding:
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
    # [b, h, l, d]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    group = h // h_kv
    if group == 1 or _takes_groups(q):
        o, lse = _attend(q, k, v, scale)
    else:
        o, lse = of_groups(group, lambda own: _attend(own(q), k, v, scale))
    if lse.shape != (b, h, l):
        # some pad it to whole tiles of queries, or give it a dimension more
        lse = lse.reshape(b, h, -1)[..., :l]
    o = o.transpose(1, 2)
    return (o[..., :d] if padding else o).contiguous(), lse.contiguous()


def of_groups(
    group: int, attend: Callable[[Callable[[Tensor], Tensor]], Sequence[Tensor]]
) -> tuple[Tensor, ...]:
    """What `attend(own)` makes of the first head of every group, of the second, and so on, as that
    of all heads: `own` takes them out of a [b, h, ...], as a view. So keys that a group of heads
    looks at are read where they are. All are [b, h, l, ...], and in memory [b, l, h, ...].
    """
    every = slice(None)
    parts = [attend(itemgetter((every, slice(j, None, group)))) for j in range(group)]
    return tuple(
        # [b, l, h_kv, group, ...]
        torch.stack([x.transpose(1, 2) for x in some], dim=3).flatten(2, 3).transpose(1, 2)
        for some in zip(*parts, strict=True)
    )


def _takes_groups(q: Tensor) -> bool:
    """Whether PyTorch's kernel takes keys of fewer heads. That for CPUs does so in new versions
    alone, and asks for nothing in the others; the one for fp32 does not.
    """
    return q.device.type != "cpu" and q.dtype != torch.float32


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    if q.dtype == torch.float32:
        o, lse, *_ = _aten._scaled_dot_product_efficient_attention(
            q, k, v, None, compute_log_sumexp=True, scale=scale
        )
        return o, lse
    # a key is made where one was refused so far, which is nowhere but in odd shapes
    if _cudnn_takes(q, k, v) and not (_refused and _seen(q, k, v) in _refused):
        try:
            o, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
                q, k, v, None, compute_log_sumexp=True, scale=scale
            )
            return o, lse
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            # a version of it that has no plan for these sizes
            _refused.add(_seen(q, k, v))
    o, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    return o, lse


def _seen(q: Tensor, k: Tensor, v: Tensor) -> tuple:
    return q.device, q.dtype, q.shape, q.stride(), k.shape, k.stride(), v.stride()


def _cudnn_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """cuDNN's attention is the faster one on Hopper and later, up to a head_dim of 128. This calls
    it past torch's own checks, which keep a lone query or key from it.
    """
    return (
        q.shape[3] <= 128
        and q.shape[2] > 1
        and k.shape[2] > 1
        # untested with a stride of 0, that of prompts which are broadcast
        and 0 not in (*k.stride(), *v.stride())
        and torch.backends.cuda.cudnn_sdp_enabled()
        and _has_cudnn(q.device)
    )


@functools.cache
def _has_cudnn(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.backends.cudnn.is_available()
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )
