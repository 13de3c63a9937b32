"""ld, st, atom and red in every state space; PTX ISA 9.7.9.8 to 9.7.13.

A vector access is one access of its full width, as on the hardware: it must be aligned to it, and
it counts as one for bank conflicts.
"""

from collections.abc import Callable

import numpy as np

from .arithmetic import check_modifiers, types_of
from .errors import OutOfBounds, Unsupported
from .formats import FORMATS, WORD
from .isa import instruction
from .memory import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, check_alignment

# .const variables live in global memory, where a launch puts them
_SPACES = {"global": "global", "const": "global", "shared": "shared", "local": "local",
           "param": "param"}  # fmt: skip
_VECTOR = {"v2": 2, "v4": 4, "v8": 8}
# cache hints and memory order: threads here see each other's writes at once
_HINTS = {
    "relaxed", "acquire", "release", "acq_rel", "volatile", "weak", "cta", "cluster", "gpu", "sys",
    "ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "L1::evict_normal", "L1::evict_first",
    "L1::evict_last", "L1::evict_unchanged", "L1::no_allocate", "L2::cache_hint", "L2::64B",
    "L2::128B", "L2::256B", "L2::evict_last", "L2::evict_first", "unified", "noftz",
}  # fmt: skip


def space_of(modifiers: tuple[str, ...]) -> str:
    """The state space; generic where none is named. shared::cluster is this CTA's shared."""
    for modifier in modifiers:
        space = modifier.partition("::")[0]
        if space in _SPACES and modifier.partition("::")[2] in ("", "cta", "cluster", "entry"):
            return _SPACES[space]
    return "generic"


def locate(m, code, space: str, threads, address, size: int, write: bool, atomic: bool = False):
    """``(words, index)``: the checked place of an access of ``size`` bytes per thread."""
    if space == "shared":
        index = m.shared.index(m.cta[threads], address, size, threads)
        if m.watch:
            m.watch.generic(code, threads, address, size, write, atomic)
        if m.banks:
            m.banks.count(code, threads, address, size)
        return m.shared.words(size), index
    if space == "local":
        return m.local.words(size), m.local.index(threads, address, size, threads)
    check_alignment(address, size, threads)
    if space == "global":
        m.check_global(address, size, threads, write)
        return m.memory.words(size), (address - m.memory.BASE) // size
    if (address + size > m.parameters.size).any() or (address < 0).any() or write:
        raise OutOfBounds("outside the kernel's parameters", int(threads[0]))
    return m.parameters.view(WORD[size]), address // size


def by_space(space: str, address: np.ndarray) -> list[tuple[str, int, np.ndarray | None]]:
    """Where generic addresses point: ``(space, window, mask)``; mask None means all threads."""
    if space != "generic":
        return [(space, 0, None)]
    windows = (("global", 0, SHARED_WINDOW), ("shared", SHARED_WINDOW, LOCAL_WINDOW),
               ("local", LOCAL_WINDOW, PARAM_WINDOW), ("param", PARAM_WINDOW, 1 << 62))  # fmt: skip
    parts = []
    for name, low, high in windows:
        mask = (address >= low) & (address < high)
        if mask.all():
            return [(name, low, None)]
        if mask.any():
            parts.append((name, low, mask))
    return parts


def access(m, code, space: str, size: int, write: bool, atomic: bool = False) -> Callable:
    """``(threads, address, use)``: call ``use(words, index, mask)`` for each space involved."""

    def run(threads, address, use):
        for name, window, mask in by_space(space, address):
            if mask is None:
                at = address - window if window else address
                use(*locate(m, code, name, threads, at, size, write, atomic), mask)
            else:
                who, at = threads[mask], address[mask] - window
                use(*locate(m, code, name, who, at, size, write, atomic), mask)

    return run


def _width(modifiers) -> tuple[str, int]:
    """``(element type, elements)``."""
    kind = types_of(modifiers)[-1]
    return kind, next((n for name, n in _VECTOR.items() if name in modifiers), 1)


def _moved(kind: str) -> str:
    """Bits move unchanged: bf16 is not decoded."""
    return "b16" if FORMATS[kind].decode else kind


def _carrier(size: int) -> tuple[int, int]:
    """A 32-byte access is two 16-byte words."""
    return (size, 1) if size <= 16 else (16, size // 16)


@instruction("ld", "ldu")
def load(m, code, modifiers):
    check_modifiers(modifiers, *_HINTS, *_VECTOR, *_plain_spaces(modifiers))
    space, (kind, count) = space_of(modifiers), _width(modifiers)
    fmt, moved = FORMATS[kind], _moved(kind)
    size = fmt.bytes * count
    puts = [m.write(op, moved) for op in m.vector(code.operands[0])]
    address = m.address(code.operands[1])
    word, words = _carrier(size)
    reach = access(m, code, space, word, write=False)

    def step(active):
        threads, at = m.threads(active), address(active)
        data = np.empty((len(threads), words), WORD[word])
        for i in range(words):

            def use(source, index, mask, i=i):
                data[slice(None) if mask is None else mask, i] = source[index]

            reach(threads, at + word * i if i else at, use)
        # [threads, count]
        values = data.view(fmt.dtype)
        for i, put in enumerate(puts):
            put(active, values[:, i])

    return step


@instruction("ld.volatile", "ld.acquire", "ld.relaxed", schedules=True)
def poll(m, code, modifiers):
    """A load that may poll for another thread's write: the others get a turn after it."""
    plain, after = load(m, code, modifiers), m.pc + 1

    def step(active):
        plain(active)
        return after, m.let_others_go(active, after)

    return step


def _plain_spaces(modifiers):
    return [x for x in modifiers if x.partition("::")[0] in _SPACES]


@instruction("st")
def store(m, code, modifiers):
    check_modifiers(modifiers, *_HINTS, *_VECTOR, *_plain_spaces(modifiers))
    space, (kind, count) = space_of(modifiers), _width(modifiers)
    fmt, moved = FORMATS[kind], _moved(kind)
    size = fmt.bytes * count
    gets = [m.read(op, moved) for op in m.vector(code.operands[1])]
    address = m.address(code.operands[0])
    word, words = _carrier(size)
    reach = access(m, code, space, word, write=True)

    def step(active):
        threads, at = m.threads(active), address(active)
        values = np.empty((len(threads), count), FORMATS[moved].dtype)
        for i, get in enumerate(gets):
            values[:, i] = get(active)
        data = values.view(WORD[word]).reshape(len(threads), words)
        for i in range(words):

            def use(target, index, mask, i=i):
                mine = data[slice(None) if mask is None else mask, i]
                target[index] = mine
                if m.watch:
                    m.watch.confirm(target[index].tobytes() == mine.tobytes())

            reach(threads, at + word * i if i else at, use)

    return step


# ---- atomics ---------------------------------------------------------------------------------

_ATOMIC = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "inc": lambda old, top: np.where(old >= top, old.dtype.type(0), old + old.dtype.type(1)),
    "dec": lambda old, top: np.where((old == 0) | (old > top), top, old - old.dtype.type(1)),
}  # fmt: skip


def _one_by_one(words, index, old, update) -> None:
    """Apply ``update(old, threads)`` so that threads with one address come in thread order."""
    order = np.argsort(index, kind="stable")
    sorted_index = index[order]
    # how many earlier threads have the same address
    first = np.searchsorted(sorted_index, sorted_index, "left")
    turn = np.arange(len(index)) - first
    for t in range(int(turn.max(initial=-1)) + 1):
        who = order[turn == t]
        old[who] = words[index[who]]
        words[index[who]] = update(old[who], who)


def _atomic(m, code, modifiers, address_operand, value_operands, result) -> Callable:
    check_modifiers(
        modifiers, *_HINTS, *_VECTOR, *_ATOMIC, *_plain_spaces(modifiers), "cas", "global"
    )
    space, (kind, count) = space_of(modifiers), _width(modifiers)
    name = next(x for x in modifiers if x in _ATOMIC or x == "cas")
    fmt = FORMATS[kind]
    address = m.address(address_operand)
    size = fmt.bytes * count
    columns = [[m.read_array(x, kind) for x in m.vector(op)] for op in value_operands]
    puts = [m.write(op, kind) for op in m.vector(result)] if result is not None else None
    reach = access(m, code, space, fmt.item_bytes, write=True, atomic=True)
    decode = fmt.decode or (lambda x: x)
    encode = fmt.encode or (lambda x: x)

    def update_of(values):
        if name == "cas":
            expected, new = values
            return lambda old, who: np.where(old == expected[who], new[who], old)
        function = _ATOMIC[name]
        (operand,) = values
        return lambda old, who: encode(function(decode(old), operand[who]).astype(operand.dtype))

    def step(active):
        threads, at = m.threads(active), address(active)
        if size > fmt.item_bytes:
            check_alignment(at, size, threads)
        for i in range(count):
            # packed values: [threads, lanes]
            values = [np.array(column[i](active)).reshape(len(threads), -1) for column in columns]
            before = np.empty((len(threads), fmt.lanes), fmt.dtype)
            for lane in range(fmt.lanes):
                update = update_of([v[:, lane] for v in values])

                def use(words, index, mask, lane=lane, update=update, before=before):
                    where = np.arange(len(threads)) if mask is None else np.flatnonzero(mask)
                    old = np.empty(len(index), fmt.dtype)
                    _one_by_one(
                        words.view(fmt.dtype), index, old, lambda o, who: update(o, where[who])
                    )
                    before[where, lane] = old

                reach(threads, at + i * fmt.bytes + lane * fmt.item_bytes, use)
            if puts:
                old = decode(before)
                puts[i](active, old if fmt.lanes > 1 else old[:, 0])

    return step


@instruction("atom", schedules=True)
def atomic(m, code, modifiers):
    result, address, *values = code.operands
    if "L2::cache_hint" in modifiers:
        values.pop()
    update, after = _atomic(m, code, modifiers, address, values, result), m.pc + 1
    # a lock: who does not get it tries again until another thread lets go
    may_poll = "cas" in modifiers or "exch" in modifiers

    def step(active):
        update(active)
        return after, m.let_others_go(active, after) if may_poll else active

    return step


@instruction("red")
def reduction(m, code, modifiers):
    if "async" in modifiers:
        raise Unsupported("red.async: clusters are not modelled")
    address, *values = code.operands
    if "L2::cache_hint" in modifiers:
        values.pop()
    return _atomic(m, code, modifiers, address, values, None)
