"""FLOPs of each operator from the shapes of its arguments, at 2 a multiply-add, as PyTorch counts
attention: the products of matrices, and nothing of the softmax or of what a rule does with rows. So
every rule has the FLOPs of "nasa", whether one operator serves it or several are put together.
`ops.py` registers them with PyTorch's counter.
"""

from collections.abc import Sequence


def forward(
    q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, *args, out_shape=None,
    **kwargs,
) -> int:  # fmt: skip
    """Q K^T and P V of both prompts; of the positive one where alpha is the number 0."""
    if alpha_map is None and alpha == 0:
        return 2 * _product(q, k_pos)
    return 2 * _product(q, k_pos, k_neg)


def joint_forward(q, k, v, k_pos, v_pos, k_neg, v_neg, *args, out_shape=None, **kwargs) -> int:
    """Q K^T and P V of the three segments; queries of one text do not see the other."""
    *_, text_pos, text_neg = args
    return 2 * (
        _product(q, k) + _product(q, k_pos, less=text_neg) + _product(q, k_neg, less=text_pos)
    )


def joint_image(*args, out_shape=None, **kwargs) -> int:
    """`joint_forward` where the numbers of the texts' queries, 0, may be left out."""
    return joint_forward(*args[:7], *(*args[13:], 0, 0)[:2])


def nag_image(*args, out_shape=None, **kwargs) -> int:
    """The same of NAG, whose settings stand before them."""
    return joint_forward(*args[:7], *(*args[15:], 0, 0)[:2])


def backward(*args, out_shape=None, **kwargs) -> int:
    *_, q, k_pos, _, k_neg, _, _, _, _, _, _, needs = args
    return _gradients((_product(q, k_pos), _product(q, k_neg)), needs)


def joint_backward(*args, out_shape=None, **kwargs) -> int:
    *_, q, k, _, k_pos, _, k_neg, _, _, _, _, _, _, _, text_pos, text_neg, needs = args
    products = (
        _product(q, k),
        _product(q, k_pos, less=text_neg),
        _product(q, k_neg, less=text_pos),
    )
    return _gradients(products, needs)


def _gradients(products: Sequence[int], needs: Sequence[bool]) -> int:
    """Q K^T again and dO V^T, then one product for each of dQ, dK and dV that is asked for."""
    flops = (2 + needs[0]) * sum(products)
    for i, product in enumerate(products):
        flops += (needs[1 + 2 * i] + needs[2 + 2 * i]) * product
    return flops


def joint_statistics(
    grad_o, o_shared, q, k_pos, v_pos, k_neg, *args, out_shape=None, **kwargs
) -> int:
    """Q K^T and dO V^T of both prompts."""
    *_, text_pos, text_neg = args
    return 2 * (_product(q, k_pos, less=text_neg) + _product(q, k_neg, less=text_pos))


def joint_queries(
    grad_o, o_shared, q, k, v, k_pos, v_pos, k_neg, *args, out_shape=None, **kwargs
) -> int:
    """Q K^T again, dO V^T and dS K of the three segments."""
    *_, text_pos, text_neg = args
    return 3 * (
        _product(q, k) + _product(q, k_pos, less=text_neg) + _product(q, k_neg, less=text_pos)
    )


def joint_keys(grad_o, q, k, *args, out_shape=None, **kwargs) -> int:
    *_, first_hidden, end_hidden, needs = args
    return (2 + sum(needs)) * _product(q, k, less=end_hidden - first_hidden)


def _product(q, *segments, less: int = 0) -> int:
    """Of the queries, all but `less`, with the keys of the segments."""
    b, l, h, d = q
    return 2 * b * h * (l - less) * d * sum(k[1] for k in segments)
