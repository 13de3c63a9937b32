"""Instructions that pass values between the lanes of a warp; PTX ISA 9.7.9.6 and 9.7.13."""

import numpy as np

from .arithmetic import types_of
from .errors import Unsupported
from .isa import instruction
from .operands import EVERYONE
from .parser import SINK, Pair
from .special import WARP


@instruction("shfl.sync", together="members")
def shuffle(m, code, modifiers):
    """d|p = a of another lane; c packs the segment mask and the clamp (PTX ISA 9.7.9.6)."""
    mode = modifiers[0]
    destination, source, lane_operand, clamp_operand, _ = code.operands
    first, second = destination if isinstance(destination, Pair) else (destination, SINK)
    put, put_valid = m.write(first, "b32"), m.write(second, "pred")
    values = m.read_array(source, "b32")
    b, c = m.read_array(lane_operand, "u32"), m.read_array(clamp_operand, "u32")

    def step(active):
        threads, lane = m.threads(active), m.lane[active]
        amount = (b(active) & np.uint32(31)).astype(np.int64)
        clamp = (c(active) & np.uint32(31)).astype(np.int64)
        segment = (c(active) >> np.uint32(8) & np.uint32(31)).astype(np.int64)
        highest = (lane & segment) | (clamp & ~segment)
        if mode == "up":
            target = lane - amount
            valid = target >= highest
        elif mode == "down":
            target = lane + amount
            valid = target <= highest
        elif mode == "bfly":
            target = lane ^ amount
            valid = target <= highest
        else:
            target = (lane & segment) | (amount & ~segment)
            valid = target <= highest
        target = np.where(valid, target, lane)
        # the whole register: the source lane's entry is there even if it is another thread's turn
        moved = values(EVERYONE)[threads - lane + target]
        put(active, moved)
        put_valid(active, valid)

    return step


def _ballot(m, active, value: np.ndarray) -> np.ndarray:
    """uint32 per warp of the wave: bit i is lane i's ``value``."""
    bits = np.where(value, np.uint32(1) << m.lane[active].astype(np.uint32), np.uint32(0))
    ballot = np.zeros(m.count // WARP, np.uint32)
    np.bitwise_or.at(ballot, m.warp[active], bits)
    return ballot


@instruction("vote.sync", together="members")
def vote(m, code, modifiers):
    mode = modifiers[0]
    value = m.read_array(code.operands[1], "pred")
    mask = m.read_array(code.operands[2], "u32")
    put = m.write(code.operands[0], "b32" if mode == "ballot" else "pred")

    def step(active):
        ballot = _ballot(m, active, value(active))[m.warp[active]] & mask(active)
        full = mask(active)
        result = {
            "ballot": lambda: ballot,
            "all": lambda: ballot == full,
            "any": lambda: ballot != 0,
            "uni": lambda: (ballot == full) | (ballot == 0),
        }[mode]()
        put(active, result)

    return step


@instruction("activemask")
def active_mask(m, code, modifiers):
    put = m.write(code.operands[0], "b32")
    return lambda active: put(
        active, _ballot(m, active, np.ones(m.size(active), bool))[m.warp[active]]
    )


@instruction("elect.sync", together="members")
def elect(m, code, modifiers):
    """The lowest lane of the membermask is the leader."""
    first, second = code.operands[0]
    put_lane, put_leader = m.write(first, "b32"), m.write(second, "pred")
    mask = m.read_array(code.operands[1], "u32")

    def step(active):
        members = mask(active)
        lowest = np.log2((members & (~members + np.uint32(1))).astype(np.float64)).astype(np.int64)
        put_lane(active, lowest)
        put_leader(active, m.lane[active] == lowest)

    return step


_REDUCE = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


@instruction("redux.sync", together="warp")
def reduce(m, code, modifiers):
    (kind,) = types_of(modifiers)
    function = _REDUCE.get(modifiers[0])
    if function is None:
        raise Unsupported(f"redux.sync.{modifiers[0]}")
    get, put = m.read_array(code.operands[1], kind), m.write(code.operands[0], kind)

    def step(active):
        lanes = get(active).reshape(-1, WARP)
        put(active, function.reduce(lanes, axis=1, dtype=lanes.dtype).repeat(WARP))

    return step


@instruction("match.any.sync", together="warp")
def match_any(m, code, modifiers):
    (kind,) = types_of(modifiers)
    get, put = m.read_array(code.operands[1], kind), m.write(code.operands[0], "b32")

    def step(active):
        lanes = get(active).reshape(-1, WARP)
        same = lanes[:, :, None] == lanes[:, None, :]
        weights = np.uint32(1) << np.arange(WARP, dtype=np.uint32)
        put(active, (same * weights).sum(2, dtype=np.uint32).reshape(-1))

    return step
