"""Pieces of sm_90a kernels for tests: an mbarrier, TMA loads by thread 0, and their launch."""

from .launch import Report, load
from .snippet import module

# one mbarrier behind the first KiB-aligned 32 KiB of the buffer
SETUP = """
    mov.u32 %r10, buffer; add.u32 %r11, %r10, 32768;
    setp.eq.u32 %p1, %t, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r11], 1;
    fence.mbarrier_init.release.cluster;
    bar.sync 0;
"""
SHARED = 33024


def wait(parity: int, name: str = "W") -> str:
    return f"""
        {name}: mbarrier.try_wait.parity.shared::cta.b64 %p8, [%r11], {parity};
        @!%p8 bra {name};
    """


def launch(body, memory, arguments, threads=128, **options) -> Report:
    """``arguments``: name -> address, or tensor map bytes."""
    parameters, lines = [], []
    for name, value in arguments.items():
        if isinstance(value, bytes):
            parameters.append(f".param .align 64 .b8 p_{name}[128]")
            lines.append(f".reg .b64 %{name}; mov.b64 %{name}, p_{name};")
            lines.append(f"cvta.param.u64 %{name}, %{name};")
        else:
            parameters.append(f".param .u64 p_{name}")
            lines.append(f".reg .b64 %{name}; ld.param.u64 %{name}, [p_{name}];")
    text = module(f"""
        .visible .entry k({", ".join(parameters)}) {{
            .reg .b32 %t, %r<64>; .reg .b64 %d<32>; .reg .f32 %f<64>; .reg .pred %p<16>;
            .shared .align 1024 .b8 buffer[{SHARED}];
            {" ".join(lines)} mov.u32 %t, %tid.x;
            {body}
            ret;
        }}
    """)
    return load(text).launch((1,), threads, list(arguments.values()), memory, **options)


def tma_load(map_name: str, coordinates: list[int], offset: int, size: int) -> str:
    """Thread 0 loads a tile to ``buffer + offset``."""
    at = ", ".join(map(str, coordinates))
    rank = len(coordinates)
    return f"""
        add.u32 %r12, %r10, {offset};
        @%p1 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r11], {size};
        @%p1 cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes
            [%r12], [%{map_name}, {{{at}}}], [%r11];
    """


ARRIVE = "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r11];" + wait(0)
