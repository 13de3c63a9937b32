"""`nasa_joint_attention`, where image keys are common to both prompts: its contract, and one
operator of the back end that takes the call.
"""

from torch import Tensor

from nasa_kernels import _sdpa, backends, ops
from nasa_kernels._checks import Call, outside_autocast, prepare
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
    """Joint attention (FLUX, SD3) guided away from a negative prompt; one call serves a block.

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
    if rule not in RULES:
        raise ValueError(f"{_NAME}: rule must be one of {RULES}, got {rule!r}")
    call = prepare(
        _NAME,
        q,
        (("", k, v, None), ("_pos", k_pos, v_pos, mask_pos), ("_neg", k_neg, v_neg, mask_neg)),
        alpha,
        scale,
        backend,
        text_queries,
    )
    return outside_autocast(attend, call, rule)


def attend(call: Call, rule: str) -> Tensor:
    """`nasa_joint_attention` of a call that was checked."""
    k, v, k_pos, v_pos, k_neg, v_neg = call.keys_values
    mask_neg = call.mask_neg
    if call.alpha_map is None and call.alpha == 0 and rule != "vsf" and call.text_neg == 0:
        # nothing of the negative is used, and nothing of it is read
        k_neg, v_neg, mask_neg = k_neg[:, :0], v_neg[:, :0], None
    if call.backend in backends.PLAIN:
        plain = nasa_joint_attention_reference if call.backend == "reference" else _sdpa.joint
        return plain(
            call.q, k, v, k_pos, v_pos, k_neg, v_neg,
            call.alpha if call.alpha_map is None else call.alpha_map,
            rule=rule, text_queries=(call.text_pos, call.text_neg),
            mask_pos=call.mask_pos, mask_neg=mask_neg, scale=call.scale,
        )  # fmt: skip
    arguments = (
        call.q, k, v, k_pos, v_pos, k_neg, v_neg, call.mask_pos, mask_neg,
        call.alpha_map, call.alpha, call.scale, RULES.index(rule), call.text_pos, call.text_neg,
    )  # fmt: skip
    if call.differentiable:
        return ops.JOINT_ATTENTION[call.backend](*arguments)[0]
    return ops.JOINT_FORWARD[call.backend](*arguments)
