"""What the operators of csrc/bindings.cpp hand to the launchers, NAG's three launches above all.

The bindings run on CPU tensors, with the runtime that writes launches down, in a process of their
own: tests/support/recorded_calls.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import cuda_emulation
from support.cuda_emulation import nvcc

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc: the bindings cannot be built")
ROOT = Path(__file__).parents[2]
GPUS = pytest.mark.parametrize("gpu", ["hopper", "ampere"])


@pytest.fixture(scope="module")
def recorded() -> dict:
    build = cuda_emulation.build("calls")
    path = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, ROOT / "tests/support/recorded_calls.py", build],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@GPUS
@pytest.mark.parametrize("call", ["number", "map", "unaligned", "joint"])
def test_nag_is_z_pos_then_z_neg_then_what_is_made_of_them(recorded, gpu, call):
    z_pos, z_neg, end = recorded[gpu][call]
    # O is Z+ first, and Z- is where nobody else looks
    assert (z_pos["o"], z_neg["o"], end["o"], end["z_neg"]) == ("o", "new", "o", "new")
    for launch, side, keys in ((z_pos, "pos", 77), (z_neg, "neg", 33)):
        assert launch["q"] == "q" and launch["keys"] == [keys, 0]
        assert (launch["alpha"], launch["alpha_map"]) == (0.0, None)
        if call != "unaligned":
            assert (launch["k"], launch["v"]) == (f"k_{side}", f"v_{side}")
            kernel = "hopper" if gpu == "hopper" else "generic"
            assert launch["is_aligned"] and launch["kernel"] == kernel
    assert (z_pos["mask"], z_neg["mask"]) == (None, "mask")
    assert (end["rows"], end["l"], end["channels"], end["is_bf16"]) == (32, 16, 256, 1)


@GPUS
def test_the_numbers_and_the_map_of_nag(recorded, gpu):
    number, mapped, joint = (recorded[gpu][call][2] for call in ("number", "map", "joint"))
    assert number["numbers"] == [0.25, 3.0, 2.5, 1] and number["alpha_map"] is None
    assert mapped["numbers"] == [0.0, 3.0, 2.5, 2]
    assert (mapped["alpha_map"], mapped["alpha_strides"]) == ("map", [1, 0])
    assert (joint["alpha_map"], joint["alpha_strides"]) == ("rows", [9, 1])
    assert number["texts"] == mapped["texts"] == [16, 16] and joint["texts"] == [9, 13]


@GPUS
def test_nag_without_a_share_is_one_launch(recorded, gpu):
    (launch,) = recorded[gpu]["off"]
    assert launch["o"] == "o" and launch["k"] == "k_pos" and launch["keys"] == [77, 0]


@GPUS
def test_a_negative_that_starts_anywhere_is_no_reason_to_read_the_positive_slowly(recorded, gpu):
    z_pos, z_neg, _ = recorded[gpu]["unaligned"]
    assert z_pos["is_aligned"] and not z_neg["is_aligned"] and z_neg["kernel"] == "generic"


@GPUS
def test_beside_the_image_both_halves_have_its_attention(recorded, gpu):
    z_pos, z_neg, _ = recorded[gpu]["joint"]
    assert z_pos["shared"] == z_neg["shared"] == "shared"
    # in the second launch the negative prompt stands where the positive one did
    assert z_pos["texts"] == [9, 13] and z_neg["texts"] == [16, 16]


# ---- the image's keys in the launch for the prompts ----------------------------------------------


@GPUS
def test_a_small_image_is_one_launch(recorded, gpu):
    for call in ("forward", "attention"):
        (launch,) = recorded[gpu]["image"][call]
        assert launch["kernel"] == "image" and launch["image"] == ["k", "v", 20]
        assert (launch["q"], launch["k"], launch["v"]) == ("q", "k_pos", "v_pos")
        assert launch["keys"] == [77, 33] and launch["alpha"] == 0.25 and launch["rule"] == 4
        assert launch["texts"] == [9, 13] and launch["is_aligned"]
        # O_s and its log-sum-exp, [2, 16, 4, 64] and [2, 4, 16]
        assert launch["is_read"] and launch["address"] == 0
        assert launch["strides"] == [4096, 256, 64] and launch["lse_strides"] == [64, 16, 1]
        kept = ["o_shared", "lse_shared"] if call == "attention" else ["new", "new"]
        assert launch["left"] == kept and launch["o"] == "o"


@GPUS
def test_beside_a_small_image_no_negative_is_read_that_no_row_asks_for(recorded, gpu):
    (off,), (text,) = recorded[gpu]["image"]["off"], recorded[gpu]["image"]["projected-off"]
    assert off["keys"] == [77, 0] and text["keys"] == [77, 33]
    # nothing is projected, and the rule is "nasa"
    assert text["rule"] == 0


@GPUS
def test_of_nag_the_first_launch_has_the_small_image(recorded, gpu):
    z_pos, z_neg, end = recorded[gpu]["image"]["nag"]
    assert (z_pos["kernel"], z_neg["kernel"], end["kernel"]) == ("image", "generic", "nag_blend")
    assert z_pos["image"] == ["k", "v", 20] and z_pos["is_read"]
    assert z_pos["shared"] == z_neg["shared"] == "new"
    assert (z_pos["o"], z_neg["o"], end["o"], end["z_neg"]) == ("o", "new", "o", "new")
    assert z_pos["keys"] == [77, 0] and z_neg["keys"] == [33, 0] and z_neg["k"] == "k_neg"
    assert z_pos["texts"] == [9, 13] and z_neg["texts"] == [16, 16]
    assert (end["alpha_map"], end["texts"]) == ("rows", [9, 13])
    (off,) = recorded[gpu]["image"]["nag-off"]
    assert off["kernel"] == "image" and off["o"] == "o"


@GPUS
def test_what_a_small_image_may_be(recorded, gpu):
    image = recorded[gpu]["image"]
    # copied element by element, all of them
    for call in ("odd-image", "odd-negative"):
        (launch,) = image[call]
        assert launch["kernel"] == "image" and not launch["is_aligned"]
    (launch,) = image["one-head"]
    assert launch["image"] == ["k", "v", 20] and launch["is_aligned"]
    (launch,) = image["no-keys"]
    assert launch["image"][2] == 0


def test_what_a_call_with_an_image_refuses(recorded):
    said = recorded["hopper"]["image"]["refused"]
    assert "v must have the dtype and the device of q" in said["dtype"]
    assert "k has 20 tokens but v has 8" in said["tokens"]
    assert "k_pos must have 4 heads, as the keys before it, or 1, got 2" in said["heads"]
    assert "k must have the b and d of q" in said["head_dim"]
    assert "k must have the b and d of q" in said["batch"]
    assert "q must have 4 dimensions, got 3" in said["dimensions"]
    assert "rule must be 0 to 5, got 6" in said["rule"]
    assert "text_pos and text_neg must be numbers of the 16 rows" in said["texts"]


def test_what_the_operator_refuses(recorded):
    norm, rows, *maps = recorded["refusals"]
    assert "nag_norm must be 1 or 2, got 3" in norm
    assert "at most 1073741824 queries of all images, got 2147483648; split the batch" in rows
    assert all("alpha_map must be fp32 and broadcast to [2, 16, 1]" in text for text in maps)
