"""PTX text to a Kernel: parameters, variables, and instructions with scoped names resolved.

Follows PTX ISA chapter 4 (syntax) as far as nvcc, Triton and inline assembly use it. Nested
blocks open a scope: registers and labels declared inside are renamed, so that every inline
assembly block keeps its own ``p`` and ``L``.
"""

import re
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import Unsupported
from .formats import FORMATS


class Register(NamedTuple):
    name: str
    type: str
    negated: bool = False


class Special(NamedTuple):
    """``%tid.x`` and the other read-only registers; PTX ISA chapter 10."""

    name: str


class Symbol(NamedTuple):
    """A variable, a parameter or a label."""

    name: str


class Immediate(NamedTuple):
    value: int | float
    # the bits of a 0f / 0d literal
    bits: int | None = None


class Vector(NamedTuple):
    items: tuple


class Pair(NamedTuple):
    """``%p|%q``: two destinations."""

    first: object
    second: object


class Address(NamedTuple):
    base: object
    offset: int
    # tensor coordinates: [map, {x, y}]
    coordinates: tuple = ()


SINK = Symbol("_")


@dataclass
class Instruction:
    line: int
    text: str
    opcode: str
    operands: tuple
    guard: Register | None
    scope: "Scope"


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    offset: int
    bytes: int


@dataclass
class Variable:
    """A .shared, .local, .const or .global array; ``bytes`` is 0 for dynamic shared memory."""

    name: str
    align: int
    bytes: int
    data: bytes = b""


@dataclass
class Scope:
    parent: "Scope | None"
    number: int
    registers: dict[str, str] = field(default_factory=dict)
    ranges: dict[str, tuple[int, str]] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)

    def register(self, name: str) -> Register | None:
        """The declaration of ``name`` that is visible here."""
        prefix = name.rstrip("0123456789")
        scope: Scope | None = self
        while scope is not None:
            kind = scope.registers.get(name)
            if kind is None and prefix in scope.ranges and prefix != name:
                count, kind_of_range = scope.ranges[prefix]
                if int(name[len(prefix) :]) < count:
                    kind = kind_of_range
            if kind is not None:
                return Register(f"{name}@{scope.number}" if scope.number else name, kind)
            scope = scope.parent
        return None

    def label(self, name: str) -> int | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.labels:
                return scope.labels[name]
            scope = scope.parent
        return None

    def table(self, name: str) -> list[str] | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.tables:
                return scope.tables[name]
            scope = scope.parent
        return None


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter]
    parameter_bytes: int
    instructions: list[Instruction]
    shared: list[Variable]
    local: list[Variable]
    constants: list[Variable]
    # .reqntid, where the kernel has one
    required_block: tuple[int, ...] | None


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?([^{;]*)\{", re.S)
_MODULE_VARIABLE = re.compile(
    r"^\s*(?:\.(?:visible|weak|extern)\s+)*(\.(?:shared|const|global)\b[^;]*);", re.M
)
_STOP = re.compile(r'[;{}\n:]|"[^"\n]*"')
_LABEL = re.compile(r"\s*([\w$.%]+)\s*$")
_GUARD = re.compile(r"@(!?)\s*([%\w$]+)\s+(.*)", re.S)
_VARIABLE = re.compile(
    r"\.(shared|local|const|global)\s+(?:\.attribute\([^)]*\)\s*)?(?:\.align\s+(\d+)\s+)?"
    r"\.(\w+)\s+([\w$]+)\s*((?:\[\d*\])*)\s*(?:=\s*(.*))?$",
    re.S,
)
_ADDRESS = re.compile(r"([%\w$.]+)\s*(?:\+\s*(-?\w+))?$|(-?\w+)$")


def load(text: str, name: str | None = None) -> Kernel:
    """Parse one kernel: the only one, or the only one whose name contains ``name``."""
    text = _COMMENT.sub(lambda m: "\n" * m[0].count("\n") or " ", text)
    entries = list(_ENTRY.finditer(text))
    chosen = [m for m in entries if name is None or name in m[1]]
    exact = [m for m in chosen if m[1] == name]
    if len(exact or chosen) != 1:
        names = ", ".join(m[1] for m in entries)
        raise ValueError(f"ptx.load: {name!r} must name one kernel of: {names}")
    match = (exact or chosen)[0]
    end = _closing_brace(text, match.end())
    body = _Body(Scope(None, 0))
    # module-scope variables stand before the first entry, or between entries
    for m in _MODULE_VARIABLE.finditer(text):
        if not match.end() <= m.start() < end:
            body.declare_variable(m[1])
    body.parse(text[match.end() : end], text.count("\n", 0, match.end()) + 1)
    parameters, size = _parameters(match[2] or "")
    required = re.search(r"\.reqntid\s+([\d,\s]+)", match[3])
    return Kernel(
        match[1], parameters, size, body.instructions, body.variables["shared"],
        body.variables["local"], body.variables["const"] + body.variables["global"],
        tuple(int(n) for n in required[1].split(",")) if required else None,
    )  # fmt: skip


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for m in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if m[0] == "{" else -1
        if depth == 0:
            return m.start()
    raise ValueError("ptx.load: the kernel's body has no end")


def _parameters(text: str) -> tuple[list[Parameter], int]:
    parameters, end = [], 0
    for declaration in filter(None, (part.strip() for part in text.split(","))):
        words = declaration.split()
        kind = next(w[1:] for w in words if w[1:] in FORMATS)
        name, count = re.fullmatch(r"([\w$]+)(?:\[(\d+)\])?", words[-1]).groups()
        size = FORMATS[kind].bytes
        align = size
        # ".ptr .global .align 16" speaks of the pointee
        if ".align" in words and ".ptr" not in words:
            align = int(words[words.index(".align") + 1])
        offset = -(-end // align) * align
        end = offset + size * int(count or 1)
        parameters.append(Parameter(name, kind, offset, end - offset))
    return parameters, end


def split_operands(text: str) -> list[str]:
    """Split at commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for m in re.finditer(r"[\[\](){},]", text):
        if m[0] in "[({":
            depth += 1
        elif m[0] in "])}":
            depth -= 1
        elif depth == 0:
            parts.append(text[start : m.start()].strip())
            start = m.end()
    last = text[start:].strip()
    return [*parts, last] if last else parts


class _Body:
    """The statements of one kernel, read in order."""

    def __init__(self, scope: Scope):
        self.scope = scope
        self.scopes = 1
        self.instructions: list[Instruction] = []
        self.variables: dict[str, list[Variable]] = {
            space: [] for space in ("shared", "local", "const", "global")
        }

    def parse(self, text: str, line: int) -> None:
        start, depth, first_line = 0, 0, line
        for m in _STOP.finditer(text):
            stop, pending = m[0], text[start : m.start()]
            if stop == "\n":
                line += 1
                head = pending.lstrip()
                # .loc and .file end with their line, not with a semicolon
                if not head or head.startswith((".loc", ".file")):
                    first_line, start = line, m.end()
                continue
            if stop == ":":
                label = _LABEL.match(pending)
                if not label or text[m.end() : m.end() + 1] == ":" or pending.endswith(":"):
                    continue
                rest = text[m.end() : m.end() + 40].lstrip()
                if rest.startswith((".branchtargets", ".calltargets")):
                    continue
                self.scope.labels[label[1]] = len(self.instructions)
            elif stop == "{":
                if pending.strip():
                    depth += 1
                    continue
                self.scope = Scope(self.scope, self.scopes)
                self.scopes += 1
            elif stop == "}":
                if depth:
                    depth -= 1
                    continue
                self.scope = self.scope.parent
            elif stop == ";":
                if pending.strip():
                    self.statement(" ".join(pending.split()), first_line)
            else:
                continue
            start, first_line = m.end(), line

    def statement(self, text: str, line: int) -> None:
        table = re.match(r"([\w$]+)\s*:\s*\.branchtargets\s+(.*)", text)
        if table:
            self.scope.tables[table[1]] = split_operands(table[2])
        elif text.startswith(".reg"):
            self.declare_registers(text)
        elif text.startswith((".shared", ".local", ".const", ".global", ".extern .shared")):
            self.declare_variable(text.removeprefix(".extern "))
        elif text.startswith("."):
            if not text.startswith((".pragma", ".param")):
                raise Unsupported(f"line {line}: unknown directive: {text}")
        else:
            self.instruction(text, line)

    def declare_registers(self, text: str) -> None:
        _, kind, names = text.split(None, 2)
        for name in split_operands(names):
            many = re.fullmatch(r"(.*)<(\d+)>", name)
            if many:
                self.scope.ranges[many[1]] = int(many[2]), kind[1:]
            else:
                self.scope.registers[name] = kind[1:]

    def declare_variable(self, text: str) -> None:
        m = _VARIABLE.match(text)
        if not m:
            raise Unsupported(f"unknown variable declaration: {text}")
        space, align, kind, name, dims, init = m.groups()
        size = FORMATS[kind].bytes
        for n in re.findall(r"\[(\d*)\]", dims):
            size *= int(n or 0)
        data = b""
        if init:
            values = [int(v, 0) for v in re.findall(r"-?\w+", init)]
            item = FORMATS[kind].bytes
            data = b"".join((v & (1 << 8 * item) - 1).to_bytes(item, "little") for v in values)
        self.variables[space].append(Variable(name, int(align or 1), size, data.ljust(size, b"\0")))

    def instruction(self, text: str, line: int) -> None:
        guard, rest = None, text
        m = _GUARD.match(text)
        if m:
            guard, rest = self.operand(m[2])._replace(negated=bool(m[1])), m[3]
        opcode, _, operands = rest.partition(" ")
        parsed = tuple(self.operand(part) for part in split_operands(operands))
        self.instructions.append(Instruction(line, text, opcode, parsed, guard, self.scope))

    def operand(self, text: str) -> object:
        if text[0] == "{":
            return Vector(tuple(self.operand(part) for part in split_operands(text[1:-1])))
        if text[0] == "[":
            return self.address(text[1:-1].strip())
        if text[0] == "!":
            return self.operand(text[1:].strip())._replace(negated=True)
        if "|" in text:
            first, second = text.split("|")
            return Pair(self.operand(first.strip()), self.operand(second.strip()))
        register = self.scope.register(text)
        if register is not None:
            return register
        if text[0] == "%":
            return Special(text)
        return _literal(text) or Symbol(text)

    def address(self, text: str) -> Address:
        head, *coordinates = split_operands(text)
        m = _ADDRESS.match(head)
        if not m:
            raise Unsupported(f"unknown address: [{text}]")
        base = self.operand(m[1] or m[3])
        offset = int(m[2], 0) if m[2] else 0
        if isinstance(base, Immediate):
            base, offset = None, base.value + offset
        return Address(base, offset, tuple(self.operand(c) for c in coordinates))


def _literal(text: str) -> Immediate | None:
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        bits = int(text[2:], 16)
        return Immediate(struct.unpack("<f", struct.pack("<I", bits))[0], bits)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        bits = int(text[2:], 16)
        return Immediate(struct.unpack("<d", struct.pack("<Q", bits))[0], bits)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text):
        digits = text.rstrip("U")
        octal = re.fullmatch(r"-?0\d+", digits)
        return Immediate(int(digits, 8 if octal else 0))
    if re.fullmatch(r"-?\d+\.\d*(e[+-]?\d+)?", text):
        return Immediate(float(text))
    return {"WARP_SZ": Immediate(32), "true": Immediate(1), "false": Immediate(0)}.get(text)
