"""Joint attention around the launches of the CUDA C++ extension, forward and backward.

A small image is attended to in the launch for the prompts: operators with `image` in their name.
Its operators are implementations in `_C.so`; `nasa_kernels/ops.py` has their schemas.
"""

import torch
from torch import Tensor

from nasa_kernels._joint.gradients import Launches, Rows, joint_gradients
from nasa_kernels._joint.shared import attend_shared, in_one_launch

# looked up once: what follows the first launch
_forward = torch.ops.nasa_kernels.forward_joint_cuda.default
_nag = torch.ops.nasa_kernels.nag_joint_cuda.default
# all of a call, by the function here that does as much in two launches
ONE_LAUNCH = {
    "forward": torch.ops.nasa_kernels.forward_image_cuda.default,
    "attention": torch.ops.nasa_kernels.attention_image_cuda.default,
    "nag": torch.ops.nasa_kernels.nag_image_cuda.default,
}


def forward(q, k, *rest) -> Tensor:
    *_, text_pos, text_neg = rest
    if in_one_launch(q, k, text_pos + text_neg):
        return ONE_LAUNCH["forward"](q, k, *rest)
    return attention(q, k, *rest)[0]


def attention(
    q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale,
    rule, text_pos, text_neg,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Joint attention: PyTorch's over the image keys, then one launch that adds both prompts; or
    that launch alone.

    Also O_s and its log-sum-exp, those of the image.
    """
    if in_one_launch(q, k, text_pos + text_neg):
        return ONE_LAUNCH["attention"](
            q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale,
            rule, text_pos, text_neg,
        )  # fmt: skip
    o_shared, lse_shared = attend_shared(q, k, v, scale)
    o = _forward(
        q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale,
        o_shared, lse_shared, rule, text_pos, text_neg,
    )  # fmt: skip
    return o, o_shared, lse_shared


def nag(
    q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale,
    nag_scale, nag_tau, nag_norm, text_pos, text_neg,
) -> Tensor:  # fmt: skip
    """Normalised attention guidance beside the image's keys, which are read once."""
    if in_one_launch(q, k, text_pos + text_neg):
        return ONE_LAUNCH["nag"](
            q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale,
            nag_scale, nag_tau, nag_norm, text_pos, text_neg,
        )  # fmt: skip
    return _nag(
        q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale,
        *attend_shared(q, k, v, scale), nag_scale, nag_tau, nag_norm, text_pos, text_neg,
    )  # fmt: skip


def backward(
    grad_o, o_shared, lse_shared,
    q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale,
    rule, text_pos, text_neg, needs,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of `attention` that `needs` asks for."""
    operators = torch.ops.nasa_kernels
    prompts = (k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg)

    def statistics():
        lse, u = operators.joint_statistics_cuda.default(
            grad_o, o_shared, q, *prompts, scale, text_pos, text_neg
        )
        return lse, u

    def queries(rows):
        return operators.joint_queries_cuda.default(
            grad_o, o_shared, q, k, v, *prompts, *_weighed(rows), scale, text_pos, text_neg
        )

    def keys(segment, needed):
        return operators.joint_keys_cuda.default(
            grad_o, q, segment.k, segment.v, segment.mask, *_weighed(segment.rows), scale,
            *segment.hidden, needed,
        )  # fmt: skip

    return joint_gradients(
        Launches(statistics, queries, keys), lse_shared,
        q, k, v, *prompts, alpha_map, alpha, rule, text_pos, text_neg, needs,
    )  # fmt: skip


def _weighed(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """lse, weight and shift: c (dP - u) + dlse = weight dP + shift."""
    return rows.lse, rows.c, torch.addcmul(rows.dlse, rows.c, rows.u, value=-1)
