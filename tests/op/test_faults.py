"""A test of the tests: each fault, planted in a copy of the package, must turn the suite red.

The copy is tested in a process of its own, by the part of the suite that is about the broken idea.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from support.warm import Result, WarmPytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parents[1] / "nasa_kernels"


class Fault(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str  # a file of tests/, and after it what `pytest -k` selects in it


FORWARD = "test_forward.py test_matches_fp64 and triton and float16 and (basic or odd or no-neg)"
MASKS = "test_forward.py test_masks and triton and float16"
BACKWARD = "test_backward.py test_matches_fp64 and triton and float16 and (sd15-64 or odd)"
STREAMED = "test_forward.py test_matches_fp64 and triton and float16 and (long-and or short-and)"
EXACT = "test_properties.py (equal_prompts or alpha_zero or alpha_splits) and triton and float16"
ABSENT = "test_properties.py (masked_key_is or all_masked) and triton and (float16 or bias)"
JOINT_BACKWARD = "test_joint_backward.py matches_fp64 and triton and small and vsf and float32"

FAULTS = (
    Fault(
        "ragged-end", "_triton/softmax.py",
        'scores = tl.where((key < prompt.n)[None, :], scores, float("-inf"))', "scores += 0.0",
        FORWARD,
    ),
    Fault(
        "bias-not-in-base-2", "_triton/softmax.py", "(LOG2E / qk_scale)", "(1.0 / qk_scale)", MASKS
    ),
    Fault(
        "nan-of-masked-rows", "_triton/softmax.py", '> float("-inf")', '>= float("-inf")', ABSENT
    ),
    Fault("zero-over-zero", "_triton/softmax.py", "row_sum == 0.0", "row_sum == -1.0", ABSENT),
    Fault(
        "chained-rounding", "_triton/forward.py",
        "o = (z_pos_i - c[:, None] * z_neg_i)",
        "o = (z_pos_i - c[:, None] * 1.0001 * z_neg_i)", EXACT,
    ),
    Fault(
        "sign", "_triton/forward.py", "z_pos_i - c[:, None] * z_neg_i",
        "z_pos_i + c[:, None] * z_neg_i", FORWARD,
    ),
    Fault("normaliser", "_triton/forward.py", "tl.div_rn(l_pos, l_neg)", "1.0", FORWARD),
    Fault(
        "decay", "_triton/forward.py", "l = l * decay + tl.sum(p, 1)", "l = l + tl.sum(p, 1)",
        STREAMED,
    ),
    Fault(
        "first-tile-only", "_triton/forward.py",
        "range(first_tile, last_tile)", "range(first_tile, first_tile + 1)",
        "test_forward.py test_matches_fp64 and triton and float16 and tiles",
    ),
    Fault(
        "second-d-block", "_triton/tiles.py",
        "for i in tl.static_range(1, len(a)):", "for i in tl.static_range(1, 1):",
        "test_forward.py test_matches_fp64 and triton and float16 and sd15",
    ),
    Fault(
        "first-head-only", "_triton/forward.py", "range(first_head, last_head)",
        "range(first_head, first_head + 1)",
        "test_triton_launch.py bits_do_not_depend and nasa",
    ),
    Fault(
        "last-block-of-streamed-keys", "_triton/forward.py",
        "whole = prompt.n // BLOCK_N * BLOCK_N", "whole = tl.cdiv(prompt.n, BLOCK_N) * BLOCK_N",
        STREAMED,
    ),
    Fault(
        "projection-of-one-block", "_triton/projected.py",
        "for i in tl.static_range(len(a)):", "for i in tl.static_range(1):",
        "test_forward.py projected and matches and triton and float16 and sd15",
    ),
    Fault(
        "length-not-kept", "_triton/projected.py", "tl.rsqrt(1.0 + longer)", "1.0",
        "test_projected.py length_is_that and triton and float32",
    ),
    Fault(
        "own-gradient-of-a-prompt", "_triton/projected_backward.py",
        "of_g = r * (1.0 + a * t)", "of_g = r",
        "test_projected.py gradients_match and triton and float32",
    ),
    Fault(
        "rows-of-the-negative-text", "_triton/joint.py", "c = tl.where(is_neg, -1.0, c)",
        "c = tl.where(is_neg, 1.0, c)",
        "test_joint.py matches_fp64 and triton and flux",
    ),
    Fault("delta-of-flash", "_triton/backward.py", "u = u / l\n", "u = u / l * 0.5\n", BACKWARD),
    Fault(
        "weight-of-dv", "_triton/backward.py", "weighted, do)", "p, do)", BACKWARD
    ),
    Fault(
        "scale-of-dk", "_triton/backward.py",
        "factor = tl.full([BLOCK_N], 1.0, tl.float32) * scale",
        "factor = tl.full([BLOCK_N], 1.0, tl.float32)", BACKWARD,
    ),
    Fault(
        "alpha-gradient", "_triton/backward.py", "dalpha = -u_neg", "dalpha = u_neg",
        "test_backward.py test_alpha_tensors and triton",
    ),
    Fault(
        "split-parts", "_triton/backward.py", "x.sum(0)", "x[0]",
        "test_backward.py test_split_queries",
    ),
    Fault(
        "batch-stride-of-the-mask", "_triton/prompt.py", "(MASK + b * stride_mb,)", "(MASK,)",
        MASKS,
    ),
    Fault(
        "alignment-of-odd-strides", "_triton/launch.py", "return 1", "return 8 * 1",
        "test_triton_launch.py alignment",
    ),
    Fault(
        "cpu-nan", "_cpu/attention.py", "torch.where(present, v, 0.0)", "v",
        "test_properties.py masked_key_is and cpu",
    ),
    Fault(
        "cpu-alpha-map", "_cpu/attention.py", "value=-1, out=o", "value=1, out=o",
        "test_forward.py test_alpha_tensors and cpu",
    ),
    Fault(
        "nag-norm-of-one-block", "_triton/nag.py",
        "for i in tl.static_range(len(blocks)):", "for i in tl.static_range(1):",
        "test_nag.py published and triton and sdxl and float32",
    ),
    Fault(
        "nag-halves", "_triton/forward.py",
        "D_CUT) * (1.0 / l_neg)[:, None]", "D_CUT) * (1.0 / l_pos)[:, None]",
        "test_nag.py published and triton and basic and float32",
    ),
    Fault(
        "library-of-other-sources", "_library.py", "if is_ours and abi != ABI:", "if False:",
        "test_library.py other_sources",
    ),
    Fault(
        "modes-and-operators", "_quick.py", "raw_repr() not in _PLAIN", "raw_repr() in (None,)",
        "test_quick.py looks",
    ),
    Fault(
        "nag-norm-per-head", "nag.py", ".sum((2, 3), keepdim=True)", ".sum(3, keepdim=True)",
        "test_nag.py published and cpu and basic",
    ),
    Fault(
        "projection", "reference.py", "d = z_neg - (z_neg * z_pos)",
        "d = z_neg - 0.99 * (z_neg * z_pos)",
        "test_projected.py equal_prompts_give and cpu and small",
    ),
    Fault(
        "length-not-kept", "reference.py", "(z_pos - alpha * d) / longer", "z_pos - alpha * d",
        "test_projected.py the_length_is and reference",
    ),
    Fault(
        "no-direction-of-zeros", "reference.py", "torch.where(exists, (z_pos",
        "torch.where(exists | True, (z_pos",
        "test_projected.py rows_of_zeros and cpu",
    ),
    Fault(
        "nan-where-alpha-is-0", "reference.py", "z_neg = looked_at(z_neg, alpha)", "pass",
        "test_projected.py alpha_zero_is_plain_attention and cpu and small",
    ),
    Fault(
        "gradient-of-the-length", "_projected.py", "ds = -0.5 * a * a * dr", "ds = 0.0 * dr",
        "test_projected.py gradient_of_the_blend",
    ),
    Fault(
        "gradient-of-the-share", "_projected.py", "(along - 2 * t * ds)", "(along + 2 * t * ds)",
        "test_projected.py gradient_of_the_blend and z_pos",
    ),
    Fault(
        "gradient-of-alpha", "_projected.py", "dalpha = -r * g_d - a * s * dr", "dalpha = -r * g_d",
        "test_projected.py gradient_of_the_blend and alpha",
    ),
    Fault(
        "gradient-of-zeros", "_projected.py", "torch.where(exists, dz_neg, 0.0)", "dz_neg",
        "test_projected.py gradient_of_the_blend and z_neg",
    ),
    Fault(
        "kept-in-fp32", "_projected.py", "ctx.save_for_backward(z_pos, z_neg,",
        "ctx.save_for_backward(z_pos.float(), z_neg,",
        "test_projected.py the_backward_pass_keeps",
    ),
    Fault(
        "second-negative-twice", "projected.py", "part if w is None else w + part", "part",
        "test_projected.py several_negatives_match and cpu",
    ),
    Fault(
        "strength-of-a-row-of-text", "joint_attention.py", "alpha_map[:, : apart.z_pos.shape[1]]",
        "alpha_map[:, -apart.z_pos.shape[1] :]",
        "test_projected.py test_joint_gradients and cpu",
    ),
    Fault(
        "quick-beside-no-device", "ops.py", "if len(kinds) > 1:", "if False:",
        "test_quick.py of_no_device and triton",
    ),
    Fault(
        "quick-forgets-gradients", "_quick.py", "if q.requires_grad or", "if False and",
        "test_quick.py would_lose and triton",
    ),
    Fault(
        "launch-beside-another-device", "_triton/launch.py", "x.device != first.device", "False",
        "test_triton_remembered.py another_device",
    ),
    Fault(
        "launch-without-its-hooks", "_triton/launch.py",
        'enter is not None and getattr(enter, "calls", True)', "False",
        "test_triton_remembered.py hooks",
    ),
    Fault(
        "launch-forgets-alignment", "_triton/launch.py", "x.data_ptr() & 15)", "0)",
        "test_triton_remembered.py may_look_at and alignment",
    ),
    Fault(
        "launch-in-another-order", "_triton/launch.py",
        "[x for x in made.kernel.arg_names if x in made.constants]", "list(made.constants)",
        "test_triton_remembered.py comes_again",
    ),
    Fault(
        "refusal-forgotten", "_joint/shared.py", "_refused.add(_seen(q, k, v))", "pass",
        "test_joint.py cudnn_refuses",
    ),
    Fault(
        "void-negative-at-full-price", "joint_attention.py", "if call.text_neg:", "if False:",
        "test_joint.py alpha_0_costs and reference and cross",
    ),
    Fault(
        "flops", "_flops.py", "return 2 * _product(q, k_pos, k_neg)",
        "return 2 * _product(q, k_pos)", "test_ops.py test_flops_forward and cpu",
    ),
    Fault(
        "needs-ignored", "ops.py", "if needed else (0,)", "if True else (0,)",
        "test_ops.py test_opcheck and cpu",
    ),
    Fault(
        "autocast-inside", "_checks.py", "torch.autocast(call.q.device.type, enabled=False)",
        "torch.autocast(call.q.device.type, enabled=True)", "test_ops.py test_autocast",
    ),
    Fault(
        "joint-share", "_triton/joint.py", "return w_x / total, w_y / total",
        "return w_x / total, w_y", "test_joint.py matches_fp64 and triton and flux",
    ),
    Fault(
        "joint-image", "_triton/joint.py", "z[i] * normalise[:, None]", "z[i]",
        "test_joint_image.py both_ways and triton and vsf",
    ),
    Fault(
        "joint-row-kind", "_triton/joint.py", "(row >= first_pos) & (row < first_neg), row",
        "(row >= first_pos) & (row <= first_neg), row",
        "test_joint.py matches_fp64 and triton and flux",
    ),
    Fault(
        "joint-sum", "_triton/joint.py", "c_s, c_p, c_n = 1.0, 1.0, -alpha",
        "c_s, c_p, c_n = a_s, 1.0, -alpha", "test_joint.py a_sum_is and triton and streamed",
    ),
    Fault(
        "joint-gradient", "_joint/rules.py", "negative = b_s * b_n * by_b", "negative = b_s * by_b",
        "test_joint_backward.py matches_fp64 and cpu and flux",
    ),
    Fault(
        "joint-gradient-of-lse", "_triton/backward.py", "ds += p * dlse", "ds -= p * dlse",
        JOINT_BACKWARD,
    ),
    Fault(
        "joint-u-of-the-shared", "_triton/joint_backward.py", "u_shared += tl.sum(",
        "u_shared -= tl.sum(", JOINT_BACKWARD,
    ),
    Fault(
        "joint-hidden-tiles", "_triton/backward.py",
        "first_row += tl.where(tile < first_hidden, 0, hidden * BLOCK_L)", "first_row += 0",
        "test_joint_backward.py matches_fp64 and triton and much-text",
    ),
    Fault(
        "joint-no-key", "_joint/gradients.py", 'float("-inf"), float("inf")',
        'float("-inf"), float("-inf")', "test_joint_backward.py test_masks and triton and vsf",
    ),
    Fault(
        "joint-flops", "_flops.py", "_product(q, k_neg, less=text_pos),\n    )",
        "_product(q, k_neg),\n    )", "test_joint_backward.py test_flops and cpu and meta",
    ),
    Fault(
        "sign-of-the-reference", "reference.py",
        "else z_pos - alpha * z_neg", "else z_pos + alpha * z_neg",
        "test_forward.py test_matches_fp64 and reference and odd",
    ),
    Fault(
        "sign-of-the-joint-reference", "reference.py",
        "else z_pos - alpha * z_neg", "else z_pos + alpha * z_neg",
        "test_joint.py matches_fp64 and reference and vsf",
    ),
    Fault(
        "mask-of-the-reference", "reference.py",
        "* scale + bias[:, None, None, None, :]", "* scale",
        "test_forward.py test_masks and reference and float32",
    ),
    Fault(
        "rule-of-the-joint-reference", "reference.py", '"nasa-cross": (k_neg, v_neg, mask_neg)',
        '"nasa-cross": with_neg', "test_joint.py matches_fp64 and reference and nasa-cross",
    ),
    Fault(
        "head-of-a-group", "_triton/prompt.py", "h = h // GROUP", "h = h % 2",
        "test_grouped.py cross_attention and triton and nasa-2",
    ),
    Fault(
        "gradients-of-one-head-of-a-group", "_triton/backward.py", ".sum((0, 4))",
        ".sum(0)[..., 0, :]", "test_grouped.py test_gradients and triton and not joint",
    ),
    Fault(
        "group-of-the-reference", "reference.py",
        "q.unflatten(2, (k.shape[2], -1))", "q.unflatten(2, (-1, k.shape[2])).transpose(2, 3)",
        "test_grouped.py cross_attention and reference and nasa-2",
    ),
    Fault(
        "places-in-a-group", "_joint/shared.py", "slice(j, None, group)", "slice(0, None, group)",
        "test_grouped.py cross_attention and cpu and nasa-2",
    ),
    Fault(
        "other-heads-unchecked", "_quick.py", "shape[2] != heads and", "False and",
        "test_grouped.py are_refused and triton and nasa_joint",
    ),
    Fault(
        "dtype-unchecked", "_checks.py", "if x.dtype != q.dtype:", "if False:",
        "test_errors.py k-dtype",
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def warm():
    # faults of `cpu` are in the Python that runs without the compiled kernels
    process = WarmPytest({"NASA_CPU_ISA": "none"})
    yield process
    process.close()


def run(warm: WarmPytest, root: Path, tests: str) -> Result:
    file, _, selection = tests.partition(" ")
    options = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", selection)
    return warm.run(root, [*options, str(TESTS / file)])


def test_without_a_fault_the_copy_passes(warm, tmp_path):
    """That each selection passes is what the suite itself shows; here, that the copy runs."""
    shutil.copytree(PACKAGE, tmp_path / "nasa_kernels")
    imported = tmp_path / "imported"
    with (tmp_path / "nasa_kernels/__init__.py").open("a") as text:
        text.write(f"open({str(imported)!r}, 'w').close()\n")
    result = run(warm, tmp_path, "test_triton_launch.py alignment")
    assert result.code == 0, result.output[-2000:]
    # and not the package itself
    assert imported.exists()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_turns_them_red(warm, fault, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "nasa_kernels")
    source = tmp_path / "nasa_kernels" / fault.file
    text = source.read_text()
    assert fault.old in text, f"the fault {fault.name} has lost its place"
    source.write_text(text.replace(fault.old, fault.new))
    result = run(warm, tmp_path, fault.tests)
    # 1 is "tests failed"; 2 to 5 would be an error of this test
    assert result.code == 1, result.output[-2000:]
