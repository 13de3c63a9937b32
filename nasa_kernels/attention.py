"""`nasa_attention`: its contract, and one operator of the back end that takes the call."""

from torch import Tensor

from nasa_kernels import _projected, _sdpa, ops
from nasa_kernels._checks import Call, check_rule, outside_autocast, prepare
from nasa_kernels._quick import REFUSALS, past_operator, quick, remember
from nasa_kernels.backends import RECORDS
from nasa_kernels.reference import CROSS_RULES, RULES, nasa_attention_reference

_NAME = "nasa_attention"


def nasa_attention(
    q: Tensor,
    k_pos: Tensor,
    v_pos: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    alpha: float | Tensor,
    *,
    rule: str = "nasa",
    mask_pos: Tensor | None = None,
    mask_neg: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention guided away from a negative prompt (NASA, equations 7 to 9).

        O = softmax(q k_pos^T * scale + bias_pos) v_pos
            - alpha * softmax(q k_neg^T * scale + bias_neg) v_neg

    Z+ and Z- for short. The two softmaxes are separate: the prompts may differ in length, and
    `alpha = 0` is exactly the attention over the positive prompt alone. O is computed in fp32 and
    rounded once. (`cpu` without its compiled kernels rounds the attention over either prompt to
    bf16 first.)

    Rule "projected" takes only what Z- has and Z+ has not, and keeps the length of Z+, per head
    and query:

        D = Z- - t Z+        t = <Z-, Z+> / <Z+, Z+>
        O = (Z+ - alpha D) |Z+| / |Z+ - alpha D|

    Equal prompts give exactly Z+ at every alpha, and so does a Z- that is Z+ times a number, but
    for rounding. Where Z+ is 0 so is O. Rows of Z, or alphas, above 1e18 have squares that fp32
    does not hold: nothing is promised of them. Where the kernels of a back end do not know the
    rule yet, Z+ and Z- are two calls, each rounded to the dtype of `q`.

    Keys and values may have fewer heads than `q`, h_kv of them, as in grouped-query attention: with
    g = h / h_kv heads of `q` to a group, head i looks at head i // g of all four, which is
    `enable_gqa` of `scaled_dot_product_attention`. The kernels read them where they are, and the
    bits are those of keys repeated for each head. Gradients of keys and values are summed over the
    group: each head of `q` makes its own, `[b, n, h, d]` in fp32, and their sum is rounded once.

    Results are deterministic, bit for bit, forward and backward. Under autocast the five
    tensors are cast to the autocast dtype, as `scaled_dot_product_attention` does.

    Args:
        q: Image queries `[b, l, h, d]`, fp16, bf16 or fp32 (fp64 on the reference), d from 1 to
            256. Any strides with a contiguous last dimension; nothing is copied, but for a
            negative prompt whose rows do not start on 16 bytes where `"cuda"` runs on Hopper: lay
            it out once, with `.contiguous()`, if you call with it often.
        k_pos, v_pos: Positive prompt `[b, n_pos, h_kv, d]`, `n_pos >= 0`, h_kv h or a divisor of
            it. b and h_kv may be 1, or strides of 0: one prompt for a whole batch is read where it
            is.
        k_neg, v_neg: Negative prompt `[b, n_neg, h_kv, d]`, likewise, with the same h_kv.
        alpha: Strength of the removal. A finite number, or an fp32 tensor on the device of `q`
            that broadcasts to `[b, l, h]`: 0-d for all, `[b, 1, 1]` per sample, `[b, l, 1]` per
            region. A tensor is differentiated, is read on the device, and never recompiles.
        rule: `"nasa"` or `"projected"`.
        mask_pos, mask_neg: Per key, `[b, n]` or `[1, n]`. Bool (True = attend), or additive in
            fp32 or in the dtype of `q` (0, -inf, or any finite bias). A masked key counts as
            absent whatever its row holds, NaN included; a prompt without keys contributes 0.
        scale: Softmax scale. `None` means `d ** -0.5`.
        backend: `"cuda"`, `"triton"`, `"cpu"`, `"sdpa"` or `"reference"`. `None` takes the first
            that runs: on a GPU of `"triton"`, `"cuda"`, `"sdpa"`, on a CPU `"cpu"`, elsewhere
            `"sdpa"` (fp64: the reference). A back end named here is never replaced by another.

    Returns:
        `[b, l, h, d]`, contiguous, in the dtype of `q`: `o.flatten(2)` feeds `to_out` as it is.

    Raises:
        ValueError: A shape, dtype, device, layout or number is not supported. The message names
            the tensor, what it must be and what it was.
        RuntimeError: `backend` does not run here; the message says why, and what does. Or more
            than a first reverse-mode derivative was asked of a fused back end: second
            derivatives, forward mode and `torch.func.grad` are for `backend="reference"`.
    """
    asked = (_NAME, backend, rule)
    plain = quick(asked, q, (k_pos, v_pos, k_neg, v_neg), mask_pos, mask_neg, alpha, scale)
    if plain is not None:
        known, alpha_map, number, factor, _ = plain
        try:
            run = known.operator if known.function is None else past_operator(known, known.function)
            return run(
                q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, number, factor,
                *known.rest,
            )  # fmt: skip
        except REFUSALS:
            # the checks say what is wrong
            pass
    check_rule(_NAME, rule, CROSS_RULES)
    call = prepare(
        _NAME,
        q,
        (("_pos", k_pos, v_pos, mask_pos), ("_neg", k_neg, v_neg, mask_neg)),
        alpha,
        scale,
        backend,
    )
    if RECORDS[call.backend].fuses(rule, differentiable=False):
        operator = ops.FORWARD.get(call.backend)
        remember(asked, call, operator, _rule(call.backend, rule), cross="forward")
    return outside_autocast(attend, call, rule)


def _rule(backend: str, rule: str) -> tuple[int, ...]:
    """The last argument of an operator, where it takes one."""
    return (RULES.index(rule),) if RECORDS[backend].takes_rule else ()


def attend(call: Call, rule: str = "nasa") -> Tensor:
    """`nasa_attention` of a call that was checked."""
    k_pos, v_pos, k_neg, v_neg = call.keys_values
    if call.backend == "reference":
        return nasa_attention_reference(
            call.q, k_pos, v_pos, k_neg, v_neg,
            call.alpha if call.alpha_map is None else call.alpha_map,
            rule=rule, mask_pos=call.mask_pos, mask_neg=call.mask_neg, scale=call.scale,
        )  # fmt: skip
    if call.alpha_map is None and call.alpha == 0:
        # nothing of the negative prompt is read
        k_neg, v_neg = k_neg[:, :0], v_neg[:, :0]
        call = call._replace(keys_values=(k_pos, v_pos, k_neg, v_neg), mask_neg=None)
    record = RECORDS[call.backend]
    if not record.fuses(rule, call.differentiable):
        return _project(call)
    if call.backend == "sdpa":
        return _sdpa.cross(
            call.q, k_pos, v_pos, k_neg, v_neg,
            call.alpha if call.alpha_map is None else call.alpha_map,
            mask_pos=call.mask_pos, mask_neg=call.mask_neg, scale=call.scale,
        )  # fmt: skip
    operator = (ops.ATTENTION if call.differentiable else ops.FORWARD)[call.backend]
    result = operator(
        call.q, *call.keys_values, call.mask_pos, call.mask_neg, call.alpha_map, call.alpha,
        call.scale, *_rule(call.backend, rule),
    )  # fmt: skip
    # O alone, or followed by what is saved for the backward pass
    return result[0] if isinstance(result, tuple) else result


def attend_pos(call: Call) -> Tensor:
    """Z+ alone."""
    k, v, *_ = call.keys_values
    return attend(_alone(call, k, v, call.mask_pos))


def attend_neg(call: Call) -> Tensor:
    """Z- alone."""
    *_, k, v = call.keys_values
    return attend(_alone(call, k, v, call.mask_neg))


def _alone(call: Call, k: Tensor, v: Tensor, mask: Tensor | None) -> Call:
    """A call of one prompt."""
    return call._replace(keys_values=(k, v, k, v), mask_pos=mask, alpha_map=None, alpha=0.0)


def _project(call: Call) -> Tensor:
    """Rule "projected" where no operator takes it."""
    z_pos = attend_pos(call)
    # without positive keys Z+ is 0, and so is O
    if call.keys_values[0].shape[1] == 0 or (call.alpha_map is None and call.alpha == 0):
        return z_pos
    return _projected.blend(z_pos, attend_neg(call), call.alpha_map, call.alpha)
