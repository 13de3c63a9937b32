"""Launching: grids and blocks, arguments, parsing of what compilers write."""

import re
from pathlib import Path

import numpy as np
import ptx
import pytest
import torch

IDENTITY = """
    .visible .entry identity(.param .u64 out) {
        .reg .b32 %r<20>; .reg .b64 %d<4>;
        mov.u32 %r1, %tid.x; mov.u32 %r2, %tid.y; mov.u32 %r3, %tid.z;
        mov.u32 %r4, %ntid.x; mov.u32 %r5, %ntid.y; mov.u32 %r6, %ntid.z;
        mad.lo.u32 %r7, %r3, %r5, %r2; mad.lo.u32 %r7, %r7, %r4, %r1;
        mov.u32 %r8, %ctaid.x; mov.u32 %r9, %ctaid.y; mov.u32 %r10, %ctaid.z;
        mov.u32 %r11, %nctaid.x; mov.u32 %r12, %nctaid.y;
        mad.lo.u32 %r13, %r10, %r12, %r9; mad.lo.u32 %r13, %r13, %r11, %r8;
        mul.lo.u32 %r14, %r4, %r5; mul.lo.u32 %r14, %r14, %r6;
        mad.lo.u32 %r15, %r13, %r14, %r7;
        ld.param.u64 %d1, [out]; mad.wide.u32 %d2, %r15, 4, %d1;
        st.global.b32 [%d2], %r15;
        ret;
    }
"""


@pytest.mark.parametrize(
    ("grid", "block"),
    # the last one does not fit one wave of threads
    [((1,), 32), ((3, 2, 2), (16, 4, 2)), ((400,), 128)],
)
def test_every_thread_knows_who_it_is(grid, block):
    count = int(np.prod(grid) * np.prod(block))
    out, memory = torch.zeros(count, dtype=torch.int32), ptx.Memory()
    address = memory.upload(out)
    report = ptx.load(ptx.module(IDENTITY)).launch(grid, block, [address], memory)
    assert torch.equal(memory.download(address, out), torch.arange(count, dtype=torch.int32))
    assert report.counts["st.global.b32"] >= 1


def test_a_dependent_grid_waits_before_it_touches_global_memory():
    out, memory = torch.zeros(64, dtype=torch.int32), ptx.Memory()
    address = memory.upload(out)
    early = ptx.load(ptx.module(IDENTITY))
    early.launch((2,), 32, [address], memory)
    with pytest.raises(ptx.Hazard, match=r"global memory before griddepcontrol\.wait"):
        early.launch((2,), 32, [address], memory, dependent=True)
    waits = IDENTITY.replace("ld.param", "griddepcontrol.wait; ld.param")
    ptx.load(ptx.module(waits)).launch((2,), 32, [address], memory, dependent=True)


def test_kernels_are_found_by_part_of_their_name():
    text = ptx.module(IDENTITY, IDENTITY.replace("identity", "identity_2"))
    assert ptx.load(text, "identity_2").name == "identity_2"
    # a whole name wins over a part
    assert ptx.load(text, "identity").name == "identity"
    with pytest.raises(ValueError, match="'other' must name one kernel of: identity, identity_2"):
        ptx.load(text, "other")


def test_arguments_are_checked():
    kernel = ptx.load(ptx.module(IDENTITY))
    with pytest.raises(ValueError, match=r"identity has 1 parameters \(out: u64\), got 2"):
        kernel.launch((1,), 32, [0, 0], ptx.Memory())
    with pytest.raises(ValueError, match="out has 8 bytes, got 4"):
        kernel.launch((1,), 32, [b"1234"], ptx.Memory())
    with pytest.raises(ValueError, match="a block of 33 threads has a broken warp"):
        kernel.launch((1,), 33, [0], ptx.Memory())
    required = IDENTITY.replace("out) {", "out) .reqntid 64 {")
    with pytest.raises(ValueError, match=r"needs a block of \(64,\)"):
        ptx.load(ptx.module(required)).launch((1,), 32, [0], ptx.Memory())


def test_scopes_comments_and_line_numbers():
    """Inline assembly brings its own names; an error says the line of the text."""
    text = """.version 8.4
.target sm_90a
.address_size 64
// a comment; with a { brace
.visible .entry k(.param .u64 out)
{
    .reg .b32 %r<4>; .reg .pred p;
    .loc 1 2 3
    setp.eq.u32 p, 0, 0; /* true
        here */
    { .reg .pred p; setp.ne.u32 p, 0, 0; @p bra DONE;
      { .reg .b32 x; mov.b32 x, 5; mov.b32 %r1, x; } DONE: }
    { .reg .pred p; setp.ne.u32 p, 0, 0; @p bra DONE; mov.b32 %r2, 6; DONE: }
    .pragma "nounroll";
    @!p trap;
    add.u32 %r3, %r1, %r2;
    setp.eq.u32 p, %r3, 11;
    @p trap;
    ret;
}
"""
    with pytest.raises(ptx.Fault, match=r"^k, line 18: `@p trap`, CTA \(0, 0, 0\) thread 0: "):
        ptx.load(text).launch((1,), 32, [0], ptx.Memory())


def test_endless_loop_is_given_up():
    text = ptx.module(".visible .entry k() { L: bra L; }")
    with pytest.raises(ptx.Fault, match="more than 1000 steps"):
        ptx.load(text).launch((1,), 32, [], ptx.Memory(), max_steps=1000)


def test_the_example_of_the_readme_runs():
    text = Path(ptx.__file__).with_name("README.md").read_text(encoding="utf-8")
    (example, _) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(example, {})
