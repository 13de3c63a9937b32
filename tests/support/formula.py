"""NASA attention written out from its definition, with nothing of the package's oracle in it.

    O = softmax(Q K+^T * scale + bias+) V+  -  alpha * softmax(Q K-^T * scale + bias-) V-

Every back end, `reference` among them, is judged by this in fp64. It is plain and slow, and
differentiable. The budgets are those of `nasa_kernels.testing`; eager PyTorch, whose error they
are made of, attends by `eager_attention`.
"""

import torch
from torch import Tensor

from nasa_kernels.testing import (
    Budget,
    budget,
    eager_attention,
    largest_score,
    without_nan,
)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Z [b, l, h, d] of one prompt: a weighted mean of v; 0 where no key is left."""
    b, n = k.shape[:2]
    bias = torch.zeros(b, n, dtype=q.dtype, device=q.device)
    if mask is not None and mask.dtype == torch.bool:
        bias = bias.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        bias = bias + mask.to(q.dtype)
    # [b, n, 1, 1]: a row of zeros in place of what a masked key holds
    absent = (bias == float("-inf"))[:, :, None, None]
    k, v = k.masked_fill(absent, 0.0), v.masked_fill(absent, 0.0)
    # [b, h, l, n]
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * scale + bias[:, None, None, :]
    if n == 0:
        return q * 0.0
    shift = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).min)
    weights = torch.exp(scores - shift)
    total = weights.sum(-1, keepdim=True)
    # [b, h, l, d]
    z = weights @ v.transpose(1, 2) / torch.where(total == 0, 1.0, total)
    return z.transpose(1, 2)


def nasa(
    q: Tensor, k_pos: Tensor, v_pos: Tensor, k_neg: Tensor, v_neg: Tensor, alpha: float | Tensor, *,
    mask_pos: Tensor | None = None, mask_neg: Tensor | None = None, scale: float | None = None,
    rule: str = "nasa", attend=attend,
) -> Tensor:  # fmt: skip
    """`attend`: another attention over one set of keys, such as eager PyTorch's."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    z_pos = attend(q, k_pos, v_pos, mask_pos, scale)
    z_neg = attend(q, k_neg, v_neg, mask_neg, scale)
    if rule == "projected":
        return project(z_pos, z_neg, _per_row(q, alpha))
    return z_pos - _per_row(q, alpha) * z_neg


def project(z_pos: Tensor, z_neg: Tensor, alpha: Tensor) -> Tensor:
    """Row by row: Z- without its part along Z+, taken from Z+, which then gets its length back."""
    length = z_pos.norm(dim=-1, keepdim=True)
    # a row of zeros has no direction, and nothing is taken from it
    exists = length > 0
    unit = z_pos / torch.where(exists, length, 1.0)
    across = z_neg - (z_neg * unit).sum(-1, keepdim=True) * unit
    guided = torch.where(exists, z_pos - alpha * across, 1.0)
    return guided * length / guided.norm(dim=-1, keepdim=True)


def joint(
    q: Tensor, k: Tensor, v: Tensor, k_pos: Tensor, v_pos: Tensor, k_neg: Tensor, v_neg: Tensor,
    alpha: float | Tensor, *, rule: str, text_queries: tuple[int, int] = (0, 0),
    mask_pos: Tensor | None = None, mask_neg: Tensor | None = None, scale: float | None = None,
    attend=attend,
) -> Tensor:  # fmt: skip
    """Joint attention, row by kind of row, by the table in `nasa_joint_attention`.

    `attend`: another attention over one set of keys, such as eager PyTorch's.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    text_pos, text_neg = text_queries
    image = q.shape[1] - text_pos - text_neg
    shared, pos, neg = (k, v, None), (k_pos, v_pos, mask_pos), (k_neg, v_neg, mask_neg)

    def bias(k: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return torch.zeros(q.shape[0], k.shape[1], dtype=q.dtype, device=q.device)
        if mask.dtype == torch.bool:
            return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(
                ~mask, float("-inf")
            )
        return mask.to(q.dtype)

    def over(rows: Tensor, *segments) -> Tensor:
        """One softmax over all keys of the segments."""
        b, _, h, d = q.shape
        keys, values = (
            torch.cat([segment[i].expand(b, -1, h, d) for segment in segments], 1) for i in (0, 1)
        )
        mask = None
        if any(mask is not None for _, _, mask in segments):
            mask = torch.cat([bias(k, mask).expand(b, -1) for k, _, mask in segments], 1)
        return attend(rows, keys, values, mask, scale)

    def silent(segment):
        """Its keys take weight, its values give nothing."""
        keys, values, mask = segment
        return keys, torch.zeros_like(values), mask

    rows = q[:, :image]
    if rule == "nasa":
        z_pos, z_neg = over(rows, shared, pos), over(rows, shared, neg)
    elif rule == "projected":
        z_pos, z_neg = over(rows, shared, pos), over(rows, shared, neg)
        o = project(z_pos, z_neg, _per_row(q, alpha)[:, :image])
    elif rule == "nasa-text":
        z_pos, z_neg = over(rows, shared, pos), over(rows, silent(shared), neg)
    elif rule == "nasa-cross":
        z_pos, z_neg = over(rows, shared, pos), over(rows, neg)
    elif rule == "vsf":
        z_pos = over(rows, shared, pos, silent(neg))
        z_neg = over(rows, silent(shared), silent(pos), neg)
    else:
        assert rule == "sum"
        z_pos, z_neg = over(rows, shared) + over(rows, pos), over(rows, neg)
    if rule != "projected":
        o = z_pos - _per_row(q, alpha)[:, :image] * z_neg
    o_pos = over(q[:, image : image + text_pos], shared, pos)
    return torch.cat((o, o_pos, over(q[:, image + text_pos :], shared, neg)), dim=1)


def _per_row(q: Tensor, alpha: float | Tensor) -> Tensor:
    """[b, l, h, 1]"""
    alpha = torch.as_tensor(alpha, dtype=q.dtype, device=q.device)
    return alpha.expand(q.shape[:3]).unsqueeze(-1)


def doubles(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() for name, x in inputs.items()}


def exact_and_budget(
    inputs: dict[str, Tensor], alpha: float | Tensor, **options
) -> tuple[Tensor, Budget]:
    """The fp64 result, and the error allowed to a back end on these inputs."""
    exact = nasa(**doubles(without_nan(inputs)), alpha=alpha, **options)
    clean = without_nan(inputs)
    eager = nasa(**clean, alpha=alpha, **options, attend=eager_attention).nan_to_num(0.0)
    score = largest_score(inputs, options.get("scale"))
    # where the kernels do not know it, Z+ and Z- are rounded by themselves
    roundings = 4 if options.get("rule") == "projected" else 2
    return exact, budget(exact, eager, score, inputs["q"].dtype, roundings)


def exact_and_budget_of_joint(
    inputs: dict[str, Tensor], alpha: float | Tensor, rule: str, text_queries: tuple[int, int],
    **masks: Tensor,
) -> tuple[Tensor, Budget]:  # fmt: skip
    options = {"alpha": alpha, "rule": rule, "text_queries": text_queries, **masks}
    clean = without_nan(inputs)
    exact = joint(**doubles(clean), **options)
    eager = joint(**clean, **options, attend=eager_attention).nan_to_num(0.0)
    # the attention over the shared keys is rounded once more, between the launches
    roundings = 5 if rule == "projected" else 3
    return exact, budget(exact, eager, largest_score(inputs), inputs["q"].dtype, roundings)
