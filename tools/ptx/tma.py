"""The TMA unit: cp.async.bulk and cp.async.bulk.tensor (tiled); PTX ISA 9.7.9.25.4 and .5.

A load arrives when no thread can run any more, the latest moment allowed; until then its
destination is poison. A store reads shared memory when its thread waits for it, or at the very end.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .arithmetic import types_of
from .errors import BarrierMisuse, Hazard, OutOfBounds, Unsupported
from .formats import FORMATS
from .isa import instruction
from .loadstore import by_space, locate
from .mbarrier import Mbarriers, barrier_address
from .memory import POISON, check_alignment
from .parser import Address
from .tensor_map import TensorMap, find
from .wgmma import swizzle


@dataclass
class Load:
    """Bytes on their way to shared memory: ``data`` goes to byte addresses ``target``."""

    code: object
    cta: int
    thread: int
    target: np.ndarray
    fetch: Callable[[], np.ndarray]
    barrier: int


@dataclass
class Store:
    """A bulk store of one thread; ``deliver`` reads shared and writes global memory."""

    code: object
    thread: int
    group: int
    source: np.ndarray
    deliver: Callable[[], None]


class BulkCopies:
    def __init__(self, m):
        self.m = m
        self.loads: list[Load] = []
        self.stores: list[Store] = []
        self.committed = np.zeros(m.count, np.int64)
        self.mbarriers = m.unit(Mbarriers)
        m.engines.append(self.deliver)
        m.finishers.append(self.finish)

    def load(self, load: Load) -> None:
        shared = self.m.shared
        shared.bytes[load.cta, load.target - shared.base] = POISON
        if self.m.watch:
            self.m.watch.bulk_issue(load.code, load.thread, load.target)
        self.loads.append(load)

    def deliver(self) -> None:
        """All loads arrive."""
        loads, self.loads = self.loads, []
        for load in loads:
            data = load.fetch()
            self.mbarriers.at(load.barrier, np.array([load.cta]))
            self.m.shared.bytes[load.cta, load.target - self.m.shared.base] = data
            if self.m.watch:
                phase = int(self.mbarriers.barriers[load.barrier].phase[load.cta])
                self.m.watch.bulk_landed(load.code, load.cta, load.target, load.barrier, phase)
            cta = np.array([load.cta])
            self.mbarriers.arrive(load.barrier, cta, np.array([0]), np.array([-len(data)]))
            if self.mbarriers.barriers[load.barrier].bytes[load.cta] < 0:
                raise BarrierMisuse(
                    f"line {load.code.line}: more bytes arrive at the mbarrier at "
                    f"{self.mbarriers.place(load.barrier)} than its phase expects",
                    load.thread,
                )

    def wait(self, threads: np.ndarray, keep: int) -> None:
        """Complete all but the ``keep`` newest groups of ``threads``."""
        waiting = np.zeros(self.m.count, bool)
        waiting[threads] = True
        left = []
        for store in self.stores:
            if waiting[store.thread] and store.group < self.committed[store.thread] - keep:
                self._complete(store)
            else:
                left.append(store)
        self.stores = left

    def _complete(self, store: Store) -> None:
        if self.m.watch:
            self.m.watch.bulk_read_done(store.code, store.thread, store.source)
        store.deliver()

    def finish(self) -> None:
        if self.loads:
            load = self.loads[0]
            raise Hazard(f"line {load.code.line}: the CTA exits before its bulk load has arrived")
        for store in self.stores:
            if store.group >= self.committed[store.thread]:
                raise Hazard(f"line {store.code.line}: a bulk store that was never committed")
            raise Hazard(
                f"line {store.code.line}: the CTA exits while a bulk store reads its shared memory"
            )


# ---- operands --------------------------------------------------------------------------------


def _map_at(m, code, thread: int, address: int) -> TensorMap:
    """The tensor map a generic address points at (a kernel parameter, or global memory)."""
    at = np.array([address])
    (space, window, _), *_ = by_space("generic", at)
    words, index = locate(m, code, space, np.array([thread]), at - window, 16, False)
    found = find(m.memory, words[index].tobytes())
    if found is None:
        raise OutOfBounds(f"no tensor map at {address:#x}", thread)
    return found


def _box_addresses(entry: TensorMap, start: int) -> np.ndarray:
    """Shared byte addresses ``[elements, item bytes]`` of a box at ``start``."""
    first = start + np.arange(0, entry.box_bytes, entry.item.itemsize)
    if entry.swizzle:
        first = swizzle(first, entry.swizzle)
    return first[:, None] + np.arange(entry.item.itemsize)


def _check_shared(m, thread: int, addresses: np.ndarray, alignment: int, start: int) -> None:
    who = np.array([thread])
    check_alignment(np.array([start]), alignment, who)
    ends = np.array([addresses.min(), addresses.max()])
    m.shared.offsets(ends, 1, np.repeat(who, 2))


def _coordinates(m, operand: Address, rank: int) -> list[Callable]:
    items = operand.coordinates[0].items
    if len(items) != rank:
        raise Unsupported(f"{len(items)} coordinates for a {rank}d copy")
    return [m.read_array(c, "s32") for c in items]


def _rank(modifiers) -> int:
    if any(x in modifiers for x in ("im2col", "tile::gather4", "multicast::cluster")):
        raise Unsupported("im2col, gather and multicast copies")
    return int(next(x for x in modifiers if x[1:] == "d" and x[0].isdigit())[0])


def _check_rank(entry: TensorMap, rank: int, thread: int) -> None:
    if len(entry.shape) != rank:
        raise OutOfBounds(f"a {rank}d copy with a {len(entry.shape)}d tensor map", thread)


# ---- tensor tiles ----------------------------------------------------------------------------


@instruction("cp.async.bulk.tensor")
def copy_tile(m, code, modifiers):
    rank = _rank(modifiers)
    if modifiers[1].startswith("global"):
        return _store_tile(m, code, rank, None)
    unit = m.unit(BulkCopies)
    destination = barrier_address(m, code.operands[0])
    tensor, barrier = code.operands[1], barrier_address(m, code.operands[2])
    map_address = m.read_array(tensor.base, "u64")
    coordinates = _coordinates(m, tensor, rank)

    def step(active):
        threads = m.threads(active)
        to, bars, maps = destination(active), barrier(active), map_address(active)
        starts = [c(active) for c in coordinates]
        # the copy may read at once, though it is delivered late
        m.check_dependent(threads)
        for i, thread in enumerate(threads.tolist()):
            entry = _map_at(m, code, thread, int(maps[i]))
            _check_rank(entry, rank, thread)
            target = _box_addresses(entry, int(to[i]))
            _check_shared(m, thread, target, 128, int(to[i]))
            box = [int(s[i]) for s in starts]
            unit.load(Load(
                code, int(m.cta[thread]), thread, target.reshape(-1),
                lambda entry=entry, box=box, thread=thread: _fetch(m, entry, box, thread),
                int(bars[i]),
            ))  # fmt: skip

    return step


def _fetch(m, entry: TensorMap, box: list[int], thread: int) -> np.ndarray:
    """The bytes of a box; outside of the tensor they are zero, or the NaN the map asks for."""
    address, inside = entry.elements(box)
    item = entry.item.itemsize
    data = np.full(len(address), -1 if entry.fill_nan else 0).astype(entry.item)
    address = address[inside]
    m.check_global(address, item, np.full(len(address), thread), write=False)
    data[inside] = m.memory.words(item)[(address - m.memory.BASE) // item]
    return data.view(np.uint8)


def _store_tile(m, code, rank: int, reduce: Callable | None):
    """Also cp.reduce: ``reduce(words, index, values)`` instead of a plain write."""
    unit = m.unit(BulkCopies)
    tensor, source = code.operands[0], barrier_address(m, code.operands[1])
    map_address = m.read_array(tensor.base, "u64")
    coordinates = _coordinates(m, tensor, rank)

    def step(active):
        origin, maps = source(active), map_address(active)
        starts = [c(active) for c in coordinates]
        for i, thread in enumerate(m.threads(active).tolist()):
            entry = _map_at(m, code, thread, int(maps[i]))
            _check_rank(entry, rank, thread)
            place = _box_addresses(entry, int(origin[i]))
            _check_shared(m, thread, place, 128, int(origin[i]))
            address, inside = entry.elements([int(s[i]) for s in starts])
            who = np.full(int(inside.sum()), thread)
            m.check_global(address[inside], entry.item.itemsize, who, write=True)
            _queue_store(m, unit, code, thread, place, address, inside, reduce)

    return step


def _queue_store(m, unit, code, thread, place, address, inside, reduce):
    """``place [elements, item]``: shared bytes; ``address [elements]``: where they go."""
    item, cta = place.shape[1], int(m.cta[thread])

    def deliver():
        data = m.shared.bytes[cta, place - m.shared.base].reshape(-1).view(f"u{item}")[inside]
        index = (address[inside] - m.memory.BASE) // item
        if reduce:
            reduce(m.memory.words(item), index, data)
        else:
            m.memory.words(item)[index] = data

    if m.watch:
        m.watch.bulk_read(code, thread, place.reshape(-1))
    group = int(unit.committed[thread])
    unit.stores.append(Store(code, thread, group, place.reshape(-1), deliver))


def _reduction(modifiers) -> Callable:
    if "add" not in modifiers:
        raise Unsupported("a bulk reduction other than .add")
    fmt = FORMATS[types_of(modifiers)[-1]] if types_of(modifiers) else FORMATS["f32"]

    def add(words, index, data):
        np.add.at(words.view(fmt.dtype), index, data.view(fmt.dtype))

    if fmt.decode:
        raise Unsupported("a bulk reduction in bf16")
    return add


@instruction("cp.reduce.async.bulk.tensor")
def reduce_tile(m, code, modifiers):
    # the element type is the map's; only fp32 sums are known
    return _store_tile(m, code, _rank(modifiers), _reduction(modifiers))


# ---- plain bytes -----------------------------------------------------------------------------


@instruction("cp.async.bulk")
def copy_bytes(m, code, modifiers):
    if modifiers[0].startswith("global"):
        return _store_bytes(m, code, None, 1)
    if modifiers[1] != "global" or "multicast::cluster" in modifiers:
        raise Unsupported("a bulk copy between CTAs")
    unit = m.unit(BulkCopies)
    destination, barrier = (barrier_address(m, code.operands[i]) for i in (0, 3))
    source, size = m.address(code.operands[1]), m.read_array(code.operands[2], "u32")

    def step(active):
        to, origin, bars = destination(active), source(active), barrier(active)
        sizes = size(active)
        for i, thread in enumerate(m.threads(active).tolist()):
            n, start = int(sizes[i]), int(origin[i])
            check_alignment(np.array([n, start]), 16, np.array([thread, thread]))
            m.check_global(np.array([start]), n, np.array([thread]), write=False)
            target = int(to[i]) + np.arange(n)
            _check_shared(m, thread, target, 16, int(to[i]))
            unit.load(Load(
                code, int(m.cta[thread]), thread, target,
                lambda start=start, n=n: m.memory.bytes[start - m.memory.BASE :][:n].copy(),
                int(bars[i]),
            ))  # fmt: skip

    return step


def _store_bytes(m, code, reduce, item: int):
    unit = m.unit(BulkCopies)
    target, source = m.address(code.operands[0]), barrier_address(m, code.operands[1])
    size = m.read_array(code.operands[2], "u32")

    def step(active):
        to, origin, sizes = target(active), source(active), size(active)
        for i, thread in enumerate(m.threads(active).tolist()):
            n = int(sizes[i])
            check_alignment(np.array([n, int(to[i])]), 16, np.array([thread, thread]))
            place = int(origin[i]) + np.arange(n).reshape(-1, item)
            _check_shared(m, thread, place, 16, int(origin[i]))
            m.check_global(to[i : i + 1], n, np.array([thread]), write=True)
            address = int(to[i]) + np.arange(0, n, item)
            everything = np.ones(len(address), bool)
            _queue_store(m, unit, code, thread, place, address, everything, reduce)

    return step


@instruction("cp.reduce.async.bulk")
def reduce_bytes(m, code, modifiers):
    item = FORMATS[types_of(modifiers)[-1]].item_bytes
    return _store_bytes(m, code, _reduction(modifiers), item)


@instruction("cp.async.bulk.commit_group")
def commit(m, code, modifiers):
    unit = m.unit(BulkCopies)

    def step(active):
        unit.committed[active] += 1

    return step


@instruction("cp.async.bulk.wait_group")
def wait(m, code, modifiers):
    """.read waits until shared memory has been read; here the write happens then, too."""
    unit, keep = m.unit(BulkCopies), code.operands[0].value
    return lambda active: unit.wait(m.threads(active), keep)


@instruction("cp.async.bulk.prefetch")
def prefetch(m, code, modifiers):
    return lambda active: None


@instruction("fence.proxy.async")
def fence_proxy(m, code, modifiers):
    """Makes ordinary writes to shared memory visible to TMA and wgmma."""

    def step(active):
        if m.watch:
            m.watch.fence_proxy(active)

    return step
