"""Bank conflicts of shared memory: 32 banks of 4 bytes.

A warp's access is served in phases of 32, 16 or 8 lanes for accesses of 4, 8 or 16 bytes; a phase
takes as many wavefronts as the busiest bank has different words. A row of ldmatrix is a 16-byte
access, so each 8x8 matrix is a phase.
"""

from collections import Counter

import numpy as np

BANKS = 32


class BankCounter:
    """``extra[line]``: wavefronts beyond one per phase; ``phases[line]``: phases."""

    def __init__(self):
        self.extra: Counter[int] = Counter()
        self.phases: Counter[int] = Counter()

    def count(self, code, threads: np.ndarray, address: np.ndarray, size: int) -> None:
        phase = threads // (BANKS * 4 // max(size, 4))
        words = address[:, None] // 4 + np.arange(max(size // 4, 1))
        # the same word is served once
        keys = np.unique((phase[:, None] << np.int64(24)) | words)
        phase, bank = keys >> 24, keys % BANKS
        first = np.flatnonzero(np.diff(phase, prepend=-1))
        slots = np.searchsorted(phase[first], phase) * BANKS + bank
        per_bank = np.bincount(slots, minlength=len(first) * BANKS).reshape(-1, BANKS)
        self.phases[code.line] += len(first)
        self.extra[code.line] += int((per_bank.max(1) - 1).sum())
