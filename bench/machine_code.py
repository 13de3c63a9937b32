"""Machine code as `cuobjdump -sass` prints it: instructions, loops, and the path of a plain call.

A plain call takes the shortest way through a kernel's loop that still does the work: every product
of the tensor cores, and everything that is read from and written to memory. What is longer is for
masks, retries of a wait that was too early, denormal numbers or the segments of a joint attention.
"""

from __future__ import annotations

import heapq
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
PRODUCTS = ("HGMMA", "HMMA")
# tiles to and from memory; rows that lie on 16 bytes, whatever modifiers stand behind the width:
# LDGSTS.E.BYPASS.128 of sm_80 is LDGSTS.E.BYPASS.128.ZFILL of sm_100 and sm_120
STORES, LOADS = ("UTMASTG", "STG"), ("UTMALDG", "LDGSTS")
WIDE = {"2D", "3D", "4D", "5D", "128", "256"}
# these end a block; a call without a condition comes back, one with a condition is a jump
ENDS = ("BRA", "EXIT", "CALL", "RET", "BRX", "JMX")
# what these cost in the search for the shortest way. A call leads to the slow path of something;
# these loads fetch the shared segment of a joint attention, whose weights may be 0.
DETOUR = 1000
SEGMENT = ("LDS", "LDS.U16")


class Instruction(NamedTuple):
    address: int
    predicate: str
    opcode: str  # with its modifiers
    arguments: str

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def target(self) -> int | None:
        """Of a branch."""
        places = re.findall(r"0x([0-9a-f]+)", self.arguments)
        return int(places[-1], 16) if places else None

    @property
    def jumps(self) -> bool:
        return self.base == "BRA" or (self.base == "CALL" and bool(self.predicate))

    @property
    def may_fall_through(self) -> bool:
        if self.base == "BRA":
            guarded = self.predicate and self.predicate != "@PT"
            return bool(guarded or re.match(r"!?U?P\d", self.arguments) or ".ANY" in self.opcode)
        return self.base == "CALL" or self.base not in ENDS or bool(self.predicate)


def parse(text: str) -> dict[str, list[Instruction]]:
    """Mangled name -> instructions, of every kernel in the output of `cuobjdump -sass`."""
    kernels: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            current = kernels.setdefault(match[1], [])
        elif match := LINE.match(line):
            address, predicate, opcode, arguments = match.groups()
            current.append(Instruction(int(address, 16), predicate or "", opcode, arguments))
    return kernels


@dataclass
class Block:
    """Instructions that run one after the other."""

    code: list[Instruction]
    next: list[int] = field(default_factory=list)

    def has(self, bases: Iterable[str]) -> bool:
        return any(i.base in bases for i in self.code)


def blocks_of(code: list[Instruction]) -> dict[int, Block]:
    """First address -> block, in the order of the code."""
    starts = {code[0].address}
    for i, following in zip(code, code[1:], strict=False):
        if i.base in ENDS:
            starts.add(following.address)
    for i in code:
        if i.jumps and i.target is not None:
            starts.add(i.target)
    blocks: dict[int, Block] = {}
    for i in code:
        if i.address in starts:
            first = i.address
            blocks[first] = Block([])
        blocks[first].code.append(i)
    ordered = sorted(blocks)
    for at, first in enumerate(ordered):
        last = blocks[first].code[-1]
        if last.jumps and last.target in blocks:
            blocks[first].next.append(last.target)
        if last.may_fall_through and at + 1 < len(ordered):
            blocks[first].next.append(ordered[at + 1])
    return blocks


class Loop(NamedTuple):
    head: int
    body: frozenset[int]  # blocks, the head among them
    tails: frozenset[int]  # those that jump back to the head


def loops_of(blocks: dict[int, Block]) -> list[Loop]:
    """Natural loops, the smallest first."""
    before = defaultdict(set)
    for first, block in blocks.items():
        for after in block.next:
            before[after].add(first)
    tails = defaultdict(set)
    for tail, head in _back_edges(blocks):
        tails[head].add(tail)
    found = []
    for head, ends in tails.items():
        body, pending = {head}, list(ends)
        while pending:
            inside = pending.pop()
            if inside not in body:
                body.add(inside)
                pending += before[inside]
        found.append(Loop(head, frozenset(body), frozenset(ends)))
    return sorted(found, key=lambda loop: len(loop.body))


def _back_edges(blocks: dict[int, Block]) -> set[tuple[int, int]]:
    """Edges to a block that dominates the one they come from."""
    entry = next(iter(blocks))
    order, seen = [], {entry}
    stack = [(entry, iter(blocks[entry].next))]
    while stack:
        block, following = stack[-1]
        after = next((b for b in following if b not in seen), None)
        if after is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(after)
            stack.append((after, iter(blocks[after].next)))
    before = defaultdict(list)
    for first in seen:
        for after in blocks[first].next:
            before[after].append(first)
    dominators = {block: set(seen) for block in seen} | {entry: {entry}}
    changed = True
    while changed:
        changed = False
        for block in reversed(order):
            if block == entry:
                continue
            new = set.intersection(*(dominators[b] for b in before[block])) | {block}
            if new != dominators[block]:
                dominators[block], changed = new, True
    return {(b, head) for b in seen for head in blocks[b].next if head in dominators[b]}


# a root is taken of nothing but the lengths that rule "projected" compares
PROJECTION = "MUFU.RSQ"


def projections(blocks: dict[int, Block]) -> list[int]:
    return [b for b, x in blocks.items() if any(i.opcode == PROJECTION for i in x.code)]


def without_projection(blocks: dict[int, Block]) -> dict[int, Block]:
    """The blocks of every other rule."""
    left_out = set(projections(blocks))
    return {
        b: Block(x.code, [n for n in x.next if n not in left_out])
        for b, x in blocks.items()
        if b not in left_out
    }


def tile_path(blocks: dict[int, Block]) -> tuple[Loop, list[int]]:
    """The loop over tiles, and the plain path once around it: the smallest with the most products.

    Where the compiler made two of a loop, as for calls with and without a negative prompt, the one
    with more products is that of a plain call.
    """
    best = None
    for loop in loops_of(blocks):
        if any(blocks[b].has(PRODUCTS) for b in loop.body):
            path = plain_path(blocks, loop)
            made = sum(_products(blocks[b]) for b in path)
            if best is None or made > best[0]:
                best = made, loop, path
    if best is None:
        raise ValueError("no loop has products: not a kernel that walks over tiles")
    return best[1], best[2]


def _products(block: Block) -> int:
    return sum(i.base in PRODUCTS for i in block.code)


def _copies(block: Block, kinds: tuple[str, ...]) -> int:
    return sum(i.base in kinds and not WIDE.isdisjoint(i.opcode.split(".")) for i in block.code)


def product_loops(blocks: dict[int, Block]) -> list[Loop]:
    """The innermost loops around products, in the order of the code."""
    loops = [loop for loop in loops_of(blocks) if any(blocks[b].has(PRODUCTS) for b in loop.body)]
    inner = [a for a in loops if not any(b.body < a.body for b in loops)]
    return sorted(inner, key=lambda loop: loop.head)


def plain_path(blocks: dict[int, Block], loop: Loop, tiles: int = 1) -> list[int]:
    """Blocks of the shortest way once around the loop that meets all of the work.

    Inner loops are passed through once. Of several copies from memory that lie on no common way,
    as those of a joint attention's segment do, the ones that cost least are taken: as many as there
    are tiles that come from memory in one turn.
    """
    backward = _back_edges(blocks)
    order = _topological(blocks, loop, backward)
    # of alternatives the one with more products; then what is stored, then what is loaded: the last
    # in the loop are the next tile's rows
    wanted = sorted(order, key=lambda b: (-_products(blocks[b]), order.index(b)))
    wanted = [b for b in wanted if _products(blocks[b])]
    for copies in (STORES, LOADS):
        wanted += [b for b in reversed(order) if _copies(blocks[b], copies)]
    stops: list[int] = []
    path = _through(blocks, loop, backward, stops)
    # projections of rows without shared keys: those that are reached by the shortest ways
    ways = ((b, _through(blocks, loop, backward, [b])) for b in projections(blocks) if b in order)
    cheapest = sorted((_cost(blocks, way), b) for b, way in ways if way is not None)
    wanted = [b for _, b in cheapest] + wanted
    for block in wanted:
        longer = _through(blocks, loop, backward, sorted({*stops, block}, key=order.index))
        if longer is None:
            continue
        stops, path = sorted({*stops, block}, key=order.index), longer
        tiles -= _copies(blocks[block], LOADS) > 0
        if tiles == 0:
            break
    assert path is not None
    return path


def _topological(blocks: dict[int, Block], loop: Loop, backward: set) -> list[int]:
    order, seen = [], set()

    def visit(block: int) -> None:
        pending = [(block, iter(blocks[block].next))]
        seen.add(block)
        while pending:
            current, following = pending[-1]
            after = next(
                (b for b in following
                 if b in loop.body and b not in seen and (current, b) not in backward),
                None,
            )  # fmt: skip
            if after is None:
                order.append(current)
                pending.pop()
            else:
                seen.add(after)
                pending.append((after, iter(blocks[after].next)))

    visit(loop.head)
    return order[::-1]


def _through(blocks, loop: Loop, backward: set, stops: list[int]) -> list[int] | None:
    """The shortest way from the head through `stops`, in this order, to a jump back to the head."""
    path, at = [loop.head], loop.head
    for stop in stops:
        if stop == at:
            continue
        part = _shortest(blocks, loop, backward, at, {stop})
        if part is None:
            return None
        path += part[1:]
        at = stop
    part = _shortest(blocks, loop, backward, at, set(loop.tails))
    return None if part is None else path + part[1:]


def _cost(blocks: dict[int, Block], path: list[int]) -> int:
    code = [i for b in path for i in blocks[b].code]
    detours = sum(i.base == "CALL" or (i.opcode in SEGMENT and i.predicate != "@!PT") for i in code)
    return len(code) + DETOUR * detours


def _shortest(blocks, loop: Loop, backward: set, start: int, ends: set[int]) -> list[int] | None:
    best, queue = {start: 0}, [(0, start, [start])]
    while queue:
        cost, block, path = heapq.heappop(queue)
        if block in ends:
            return path
        if cost > best[block]:
            continue
        for after in blocks[block].next:
            if after not in loop.body or (block, after) in backward:
                continue
            new = cost + _cost(blocks, [after])
            if new < best.get(after, 1 << 30):
                best[after] = new
                heapq.heappush(queue, (new, after, [*path, after]))
    return None


def count(
    blocks: dict[int, Block],
    path: list[int],
    loop: Loop,
    scores: int = 0,
    values: int = 0,
    copies: int = 0,
) -> Counter:
    """Instructions along a path, by opcode with its modifiers.

    Of an inner loop the path has one turn: it is repeated until it has made its products.

    Args:
        scores: Products that a loop over columns of Q and K makes, with one prompt.
        values: Products that a loop over columns of V makes, which it reads transposed.
        copies: Loads, or stores, of 16 bytes a lane that a loop over the rows of a tile makes.
    """
    kinds = (*STORES, *LOADS)
    inner = [x for x in loops_of(blocks) if x.body < loop.body
             and any(_products(blocks[b]) or _copies(blocks[b], kinds)
                     for b in x.body & set(path))]  # fmt: skip
    total: Counter = Counter()
    repeated: set[int] = set()
    for turn in inner:
        own = [b for b in path if b in turn.body and b not in repeated]
        repeated |= set(own)
        counts = _opcodes(blocks, own)
        made = sum(n for opcode, n in counts.items() if opcode.split(".")[0] in PRODUCTS)
        if made:
            needed = values if any(".MT88" in opcode for opcode in counts) else scores
        else:
            # loads or stores, whichever are in it
            made = max(sum(_copies(blocks[b], kind) for b in own) for kind in (STORES, LOADS))
            # of rows whose copies do not fill the last turn
            needed = -(-copies // made) * made if made else copies
        turns, rest = divmod(needed, made) if made and needed else (1, 0)
        if rest or turns < 1:
            raise ValueError(f"{needed} products or copies are not some turns of {made}")
        total += Counter({opcode: n * turns for opcode, n in counts.items()})
    return total + _opcodes(blocks, [b for b in path if b not in repeated])


def count_turns(
    blocks: dict[int, Block], path: list[int], loop: Loop, turns: Callable[[Counter], int]
) -> Counter:
    """The same where loops stand in loops: turns(opcodes) is how often the path goes around one, in
    all, if these are what one turn of it does.
    """
    inner = [x for x in loops_of(blocks) if x.body < loop.body and x.body & set(path)]
    times = dict.fromkeys(path, 1)
    # an inner loop's turns are those of all turns of the loop around it
    for turn in sorted(inner, key=lambda x: -len(x.body)):
        own = [b for b in path if b in turn.body]
        times |= dict.fromkeys(own, turns(_opcodes(blocks, own)))
    total: Counter = Counter()
    for block in path:
        for opcode, n in _opcodes(blocks, [block]).items():
            total[opcode] += n * times[block]
    return total


def straight_counts(blocks: dict[int, Block], loads: int) -> Counter:
    """Opcodes of a kernel without a loop over tiles, each of its loops once: of the shortest way
    from its entry to an end that meets all wide stores, and so many wide loads before them.
    """
    ends = frozenset(b for b, x in blocks.items() if x.code[-1].base == "EXIT")
    whole = Loop(next(iter(blocks)), frozenset(blocks), ends)
    backward = _back_edges(blocks)
    order = _topological(blocks, whole, backward)
    stops = {b for b in order if _copies(blocks[b], ("STG",))}
    for block in order:
        if loads > 0 and (read := _copies(blocks[block], ("LDG",))):
            stops.add(block)
            loads -= read
    path = _through(blocks, whole, backward, sorted(stops, key=order.index))
    if path is None or not stops or loads > 0:
        raise ValueError("no way through the kernel meets its loads and its stores")
    return _opcodes(blocks, path)


def _opcodes(blocks: dict[int, Block], path: list[int]) -> Counter:
    return Counter(i.opcode for b in path for i in blocks[b].code)


# ---- from a library ------------------------------------------------------------------------------


def tools() -> str | None:
    """A folder with cuobjdump and nvdisasm: of Triton's package, the toolkit, or the PATH."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(p) / "backends" / "nvidia" / "bin"
               for p in (triton and triton.submodule_search_locations) or ()]  # fmt: skip
    folders += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    if found := shutil.which("cuobjdump"):
        folders.append(Path(found).parent)
    both = (f for f in folders if (f / "cuobjdump").is_file() and (f / "nvdisasm").is_file())
    return next((str(folder) for folder in both), None)


def cuobjdump(library: Path, *flags: str) -> str:
    folder = tools()
    if folder is None:
        raise OSError(
            "no cuobjdump and nvdisasm: install a CUDA toolkit, triton, or "
            "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        )
    env = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    command = [f"{folder}/cuobjdump", *flags, str(library)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def registers(library: Path) -> dict[tuple[str, str], int]:
    """(architecture, mangled name) -> registers of a thread."""
    found, arch, name = {}, "", ""
    for line in cuobjdump(library, "-res-usage").splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+)", line):
            found[arch, name] = int(match[1])
    return found


def disassemble(library: Path, arch: str, names: list[str]) -> dict[str, list[Instruction]]:
    """Some kernels of one architecture, by mangled name."""
    return parse(cuobjdump(library, "-sass", "-arch", arch, "-fun", ",".join(names)))
