"""`nasa_joint_attention`, where image keys are common to both prompts: its contract, and one
operator of the back end that takes the call.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nasa_kernels import _projected, _sdpa, ops
from nasa_kernels._checks import Call, check_rule, outside_autocast, prepare
from nasa_kernels._quick import NO_TEXT, REFUSALS, are_two, joint_operator, quick, remember
from nasa_kernels.backends import RECORDS
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
    text_queries: tuple[int, int] = NO_TEXT,
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
        "projected"   Z+ and Z- as in "nasa", and of them what `nasa_attention` says

    "nasa" is Z+ - alpha Z- (the paper's equations 7 to 9) with each prompt in a joint attention
    of its own; the paper gives no algorithm for joint attention. It subtracts the image's
    attention to itself as well. "nasa-text" subtracts only the text's part of Z-, and
    "nasa-cross" the text under a softmax of its own, as cross-attention has it. "vsf" is value
    sign flip: one softmax over all keys, negative values flipped. "sum" has no joint attention
    in it: each segment under a softmax of its own, Z_shared + Z+ - alpha Z-, where a factor of
    Z_shared goes into `v`. "projected" takes only what Z- has and Z+ has not, and keeps the length
    of Z+: what both take from the image alike falls out. A segment without keys contributes 0.

    The image keys are read once, whatever the rule: the cost beside a stock joint attention is
    the negative's keys and queries, not a second attention. (Once for each prompt by "projected",
    where the kernels of a back end do not know it yet and have no operator that gives both.)

    Args:
        q: Queries `[b, l, h, d]`: of the image, then `text_queries[0]` of the positive text, then
            `text_queries[1]` of the negative text. The positive text's see [shared; pos] and the
            negative text's [shared; neg], in a plain softmax, whatever alpha is.
        k, v: The image's `[b, n, h_kv, d]`.
        k_pos, v_pos, k_neg, v_neg: `[b, n_pos, h_kv, d]`, `[b, n_neg, h_kv, d]`. Broadcasting,
            strides, lengths, dtypes, and fewer heads than those of `q`, as in `nasa_attention`; all
            six have the same h_kv.
        alpha: As in `nasa_attention`; a tensor broadcasts to `[b, l, h]`, and what stands beside
            queries of the text is not used. At 0 the image's O is the plain attention over
            [shared; pos] of the same back end, bit for bit, except for "vsf", whose softmax
            holds the negative's keys all the same, and "sum", where it is Z_shared + Z+.
        rule: One of `"nasa"`, `"nasa-text"`, `"nasa-cross"`, `"vsf"`, `"sum"`, `"projected"`.
        text_queries: How many of the last queries are the positive's and the negative's own.
        mask_pos, mask_neg, scale, backend: As in `nasa_attention`.

    Returns:
        `[b, l, h, d]`, contiguous, in the dtype of `q`, its rows in the order of `q`.

    Raises:
        ValueError, RuntimeError: As `nasa_attention` does.
    """
    asked = (_NAME, backend, rule)
    keys_values = (k, v, k_pos, v_pos, k_neg, v_neg)
    plain = quick(asked, q, keys_values, mask_pos, mask_neg, alpha, scale)
    if plain is not None and (text_queries is NO_TEXT or are_two(text_queries)):
        known, alpha_map, number, factor, shape = plain
        # of alpha 0 there is less to do
        if alpha_map is not None or number != 0 or rule == "vsf":
            try:
                text_pos, text_neg = text_queries
                operator = joint_operator(known, text_pos + text_neg, q, shape, keys_values)
                if operator is not None:
                    # no *: unpacking costs the host
                    if operator is known.brief and text_queries is NO_TEXT:
                        return operator(
                            q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map,
                            number, factor, known.rest[0],
                        )  # fmt: skip
                    return operator(
                        q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, number,
                        factor, known.rest[0], text_pos, text_neg,
                    )  # fmt: skip
            except REFUSALS:
                # the checks say what is wrong
                pass
    check_rule(_NAME, rule, RULES)
    call = prepare(
        _NAME,
        q,
        (("", k, v, None), ("_pos", k_pos, v_pos, mask_pos), ("_neg", k_neg, v_neg, mask_neg)),
        alpha,
        scale,
        backend,
        text_queries,
    )
    if RECORDS[call.backend].fuses_joint(rule, differentiable=False):
        operator = ops.JOINT_FORWARD.get(call.backend)
        remember(asked, call, operator, (RULES.index(rule),), joint="forward")
    return outside_autocast(attend, call, rule)


def attend(call: Call, rule: str) -> Tensor:
    """`nasa_joint_attention` of a call that was checked."""
    if call.alpha_map is None and call.alpha == 0 and rule != "vsf":
        # nothing of the negative is used but by its own queries, and nothing of it is read
        rule = "nasa-cross" if rule == "projected" else rule
        if call.text_neg:
            image, text_pos = attend_pos(call, rule)
            return Apart(image, text_pos, image, attend_text_neg(call)).joined(image)
        *others, k_neg, v_neg = call.keys_values
        call = call._replace(keys_values=(*others, k_neg[:, :0], v_neg[:, :0]), mask_neg=None)
    k, v, k_pos, v_pos, k_neg, v_neg = call.keys_values
    if call.backend == "reference":
        return nasa_joint_attention_reference(
            call.q, k, v, k_pos, v_pos, k_neg, v_neg,
            call.alpha if call.alpha_map is None else call.alpha_map,
            rule=rule, text_queries=(call.text_pos, call.text_neg),
            mask_pos=call.mask_pos, mask_neg=call.mask_neg, scale=call.scale,
        )  # fmt: skip
    if not RECORDS[call.backend].fuses_joint(rule, call.differentiable):
        return _project(call)
    if call.backend == "sdpa":
        k, v, k_pos, v_pos, k_neg, v_neg = call.keys_values
        return _sdpa.joint(
            call.q, k, v, k_pos, v_pos, k_neg, v_neg,
            call.alpha if call.alpha_map is None else call.alpha_map,
            rule=rule, text_queries=(call.text_pos, call.text_neg),
            mask_pos=call.mask_pos, mask_neg=call.mask_neg, scale=call.scale,
        )  # fmt: skip
    arguments = (
        call.q, *call.keys_values, call.mask_pos, call.mask_neg, call.alpha_map, call.alpha,
        call.scale, RULES.index(rule), call.text_pos, call.text_neg,
    )  # fmt: skip
    if call.differentiable:
        return ops.JOINT_ATTENTION[call.backend](*arguments)[0]
    return ops.JOINT_FORWARD[call.backend](*arguments)


class Apart(NamedTuple):
    """The joint attentions over [shared; pos] and [shared; neg], by whose the queries are."""

    z_pos: Tensor  # of the image's queries
    text_pos: Tensor
    z_neg: Tensor
    text_neg: Tensor

    def joined(self, image: Tensor) -> Tensor:
        """The rows in the order of q, the image's made of Z+ and Z-."""
        if self.text_pos.shape[1] == self.text_neg.shape[1] == 0:
            return image
        return torch.cat((image, self.text_pos, self.text_neg), dim=1)


def attend_apart(call: Call) -> Apart:
    """Z+ and Z-. One operator gives both and reads the image's keys once; where a gradient is
    recorded, or a back end has no such operator, each of the two is a call that reads them.
    """
    if call.backend in ops.JOINT_PAIR and not call.differentiable:
        image = call.q.shape[1] - call.text_pos - call.text_neg
        pos, neg = ops.JOINT_PAIR[call.backend](
            call.q, *call.keys_values, call.mask_pos, call.mask_neg, call.scale, call.text_pos,
            call.text_neg,
        )  # fmt: skip
        return Apart(
            *pos.split((image, call.text_pos), dim=1), *neg.split((image, call.text_neg), dim=1)
        )
    return Apart(*attend_pos(call), *attend_neg(call))


def attend_pos(call: Call, rule: str = "nasa-cross") -> tuple[Tensor, Tensor]:
    """Of the image's queries and of the positive text's, without a negative prompt."""
    k, v, k_pos, v_pos, _, _ = call.keys_values
    q = call.q[:, : call.q.shape[1] - call.text_neg]
    return _alone(call, q, call.text_pos, (k, v, k_pos, v_pos), call.mask_pos, rule)


def attend_neg(call: Call) -> tuple[Tensor, Tensor]:
    """The same with the negative prompt for the positive one."""
    k, v, _, _, k_neg, v_neg = call.keys_values
    q = call.q
    if call.text_pos:
        image = q.shape[1] - call.text_pos - call.text_neg
        q = torch.cat((q[:, :image], q[:, image + call.text_pos :]), dim=1)
    return _alone(call, q, call.text_neg, (k, v, k_neg, v_neg), call.mask_neg)


def attend_text_neg(call: Call) -> Tensor:
    """That of the negative text's queries alone."""
    k, v, _, _, k_neg, v_neg = call.keys_values
    q = call.q[:, call.q.shape[1] - call.text_neg :]
    return _alone(call, q, call.text_neg, (k, v, k_neg, v_neg), call.mask_neg)[1]


def _alone(
    call: Call, q: Tensor, text: int, keys_values: tuple[Tensor, ...], mask: Tensor | None,
    rule: str = "nasa-cross",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over the image's keys and one prompt's. The last queries are the text's."""
    k, v = keys_values[2:]
    o = attend(
        call._replace(
            q=q, keys_values=(*keys_values, k[:, :0], v[:, :0]), mask_pos=mask, mask_neg=None,
            alpha_map=None, alpha=0.0, text_pos=text, text_neg=0,
        ),
        rule,
    )  # fmt: skip
    image, own = o.split((o.shape[1] - text, text), dim=1)
    return image, own


def _project(call: Call) -> Tensor:
    """Rule "projected" where no operator takes it."""
    apart = attend_apart(call)
    alpha_map = call.alpha_map
    if alpha_map is not None:
        alpha_map = alpha_map[:, : apart.z_pos.shape[1]]
    return apart.joined(_projected.blend(apart.z_pos, apart.z_neg, alpha_map, call.alpha))
