"""Special registers: who a thread is; PTX ISA chapter 10.

A launch has no clusters, so a cluster is one CTA. Clocks stand still.
"""

import numpy as np

WARP = 32


def special_registers(m) -> dict[str, np.ndarray]:
    """Name -> ``[threads]``, for a wave ``m`` of CTAs."""
    t = m.all_threads % m.block_size
    cta = m.cta_ids[m.cta]
    bx, by, bz = m.block
    gx, gy, gz = m.grid
    one, zero = np.ones_like(t), np.zeros_like(t)
    ctaid = (cta % gx, cta // gx % gy, cta // (gx * gy))
    axes = {
        "tid": (t % bx, t // bx % by, t // (bx * by)),
        "ntid": (one * bx, one * by, one * bz),
        "ctaid": ctaid,
        "nctaid": (one * gx, one * gy, one * gz),
        "clusterid": ctaid,
        "nclusterid": (one * gx, one * gy, one * gz),
        "cluster_ctaid": (zero, zero, zero),
        "cluster_nctaid": (one, one, one),
    }
    bit = np.uint64(1) << m.lane.astype(np.uint64)
    registers = {
        f"%{name}.{axis}": values
        for name, xyz in axes.items()
        for axis, values in zip("xyz", xyz, strict=True)
    }
    return registers | {
        "%laneid": m.lane,
        "%warpid": t // WARP,
        "%nwarpid": one * (m.block_size // WARP),
        "%smid": cta % 132,
        "%nsmid": one * 132,
        "%cluster_ctarank": zero,
        "%cluster_nctarank": one,
        "%lanemask_eq": bit,
        "%lanemask_lt": bit - np.uint64(1),
        "%lanemask_le": 2 * bit - np.uint64(1),
        "%lanemask_ge": np.uint64(2**32) - bit,
        "%lanemask_gt": np.uint64(2**32) - 2 * bit,
        "%dynamic_smem_size": one * m.dynamic_shared,
        "%total_smem_size": one * m.shared_size,
        "%clock": zero,
        "%clock64": zero,
        "%globaltimer": zero,
    }
