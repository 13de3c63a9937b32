"""The public function for joint attention, where image keys are common to both prompts."""

import torch
from torch import Tensor

from nasa_kernels import backends, ops
from nasa_kernels.checks import (
    autocast,
    check_alpha,
    check_mask,
    check_prompt,
    check_queries,
    check_scale,
    check_text_queries,
    check_transforms,
)
from nasa_kernels.reference import RULES, nasa_joint_attention_reference

_NAME = "nasa_joint_attention"


def nasa_joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pos: Tensor,
    v_pos: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    alpha: float | Tensor,
    *,
    rule: str = "nasa-cross",
    text_queries: tuple[int, int] = (0, 0),
    mask_pos: Tensor | None = None,
    mask_neg: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Joint attention (FLUX, SD3) steered away from a negative prompt; one call serves a block.

    With rule "sum", cross-attention to a further prompt, as to the image of an IP-Adapter.

    Keys come in three segments: the image's, shared by both prompts, and those of each prompt.
    Each segment i gives an attention O_i and the log-sum-exp of its scores, s, p and n. With
    L+ = lse(s, p), L- = lse(s, n) and L = lse(s, p, n), an image query gets

        O = c_s O_shared + c_p O_pos + c_n O_neg

        rule          c_s                            c_p         c_n
        "nasa"        e^(s-L+) - alpha e^(s-L-)      e^(p-L+)    -alpha e^(n-L-)
        "nasa-text"   e^(s-L+)                       e^(p-L+)    -alpha e^(n-L-)
        "nasa-cross"  e^(s-L+)                       e^(p-L+)    -alpha
        "vsf"         e^(s-L)                        e^(p-L)     -alpha e^(n-L)
        "sum"         1                              1           -alpha

    "nasa" is Z+ - alpha Z- (the paper's equations 7 to 9) with each prompt in a joint attention
    of its own; the paper gives no algorithm for joint attention. It subtracts the image's
    attention to itself as well. "nasa-text" subtracts only the text's part of Z-, and
    "nasa-cross" the text under a softmax of its own, as cross-attention has it. "vsf" is value
    sign flip: one softmax over all keys, negative values flipped. "sum" has no joint attention
    in it: each segment under a softmax of its own, Z_shared + Z+ - alpha Z-, where a factor of
    Z_shared goes into `v`. A segment without keys contributes 0.

    The image keys are read once, whatever the rule: the cost beside a stock joint attention is
    the negative's keys and queries, not a second attention.

    Args:
        q: Queries `[b, l, h, d]`: of the image, then `text_queries[0]` of the positive text, then
            `text_queries[1]` of the negative text. The positive text's see [shared; pos] and the
            negative text's [shared; neg], in a plain softmax, whatever alpha is.
        k, v: The image's `[b, n, h, d]`.
        k_pos, v_pos, k_neg, v_neg: `[b, n_pos, h, d]`, `[b, n_neg, h, d]`. Broadcasting, strides,
            lengths and dtypes as in `nasa_attention`.
        alpha: As in `nasa_attention`; a tensor broadcasts to `[b, l, h]`, and what stands beside
            queries of the text is not used. At 0 the image's O is the plain attention over
            [shared; pos] of the same back end, bit for bit, except for "vsf", whose softmax
            holds the negative's keys all the same, and "sum", where it is Z_shared + Z+.
        rule: One of `"nasa"`, `"nasa-text"`, `"nasa-cross"`, `"vsf"`, `"sum"`.
        text_queries: How many of the last queries are the positive's and the negative's own.
        mask_pos, mask_neg, scale, backend: As in `nasa_attention`.

    Returns:
        `[b, l, h, d]`, contiguous, in the dtype of `q`, its rows in the order of `q`.

    Raises:
        ValueError, RuntimeError: As `nasa_attention` does.
    """
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        q, k, v, k_pos, v_pos, k_neg, v_neg = autocast(q, k, v, k_pos, v_pos, k_neg, v_neg)
        with torch.autocast(device, enabled=False):
            return nasa_joint_attention(
                q, k, v, k_pos, v_pos, k_neg, v_neg, alpha, rule=rule, text_queries=text_queries,
                mask_pos=mask_pos, mask_neg=mask_neg, scale=scale, backend=backend,
            )  # fmt: skip
    check_queries(_NAME, q)
    k, v = check_prompt(_NAME, q, k, v, "")
    k_pos, v_pos = check_prompt(_NAME, q, k_pos, v_pos, "_pos")
    k_neg, v_neg = check_prompt(_NAME, q, k_neg, v_neg, "_neg")
    if mask_pos is not None:
        mask_pos = check_mask(_NAME, q, k_pos, mask_pos, "mask_pos")
    if mask_neg is not None:
        mask_neg = check_mask(_NAME, q, k_neg, mask_neg, "mask_neg")
    alpha_map, alpha_number = check_alpha(_NAME, q, alpha)
    if scale is None:
        scale = q.shape[3] ** -0.5
    else:
        q, scale = check_scale(_NAME, q, scale)
    if rule not in RULES:
        raise ValueError(f"{_NAME}: rule must be one of {RULES}, got {rule!r}")
    text_pos, text_neg = check_text_queries(_NAME, q, text_queries)

    if alpha_map is None and alpha_number == 0 and rule != "vsf" and text_neg == 0:
        # nothing of the negative is used, and nothing of it is read
        k_neg, v_neg = k_neg[:, :0], v_neg[:, :0]
        mask_neg = None

    tensors = (q, k, v, k_pos, v_pos, k_neg, v_neg)
    differentiable = torch.is_grad_enabled() and (
        any(x.requires_grad for x in tensors) or (alpha_map is not None and alpha_map.requires_grad)
    )
    if backend is None:
        backend = backends.choose(q.device, q.dtype, q.shape[3], differentiable)
    else:
        backends.require(_NAME, backend, q, differentiable)
    if backend == "reference":
        return nasa_joint_attention_reference(
            *tensors, alpha_number if alpha_map is None else alpha_map,
            rule=rule, text_queries=(text_pos, text_neg),
            mask_pos=mask_pos, mask_neg=mask_neg, scale=scale,
        )  # fmt: skip
    check_transforms(_NAME, differentiable, *tensors)
    arguments = (
        *tensors, mask_pos, mask_neg, alpha_map, alpha_number, scale,
        RULES.index(rule), text_pos, text_neg,
    )  # fmt: skip
    if differentiable:
        return ops.JOINT_ATTENTION[backend](*arguments)[0]
    return ops.JOINT_FORWARD[backend](*arguments)
