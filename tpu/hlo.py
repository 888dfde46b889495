"""What the text of a compiled program says of it: traffic with memory, and what it should not hold.

XLA's own count of bytes includes those in a chip's fast memory and takes a loop's body once. Here
what lies in fast memory (`S(1)` in a layout) is left out, a loop's body counts as often as it runs,
and what is cut out of an array or written into it counts with its own size, not the array's.
"""

import math
import re
from typing import NamedTuple

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
FREE |= {"partition-id", "replica-id", "copy-done", "slice-done", "opt-barrier"}
FREE_CALLS = ("AllocateBuffer", "ConcatBitcast")  # custom calls that only name memory
PARTS = {"dynamic-slice", "slice", "gather"}  # these read as much of an array as they give
COLLECTIVES = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
COLLECTIVES = re.compile(rf"(ragged-)?({COLLECTIVES}|collective-broadcast)(-start)?")

_SCRATCH = re.compile(r'custom_call_target="__(?:cublas|cudnn)\$')
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)")


class Instruction(NamedTuple):
    """One instruction: its result's type, what stands in its parentheses, and what after them."""

    name: str
    opcode: str
    result: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """The names of its operands."""
        return re.findall(r"%([\w.-]+)", self.arguments)

    def called(self, role: str) -> str:
        """The computation that it calls as `body`, `condition` or `calls`."""
        found = re.search(rf"\b{role}=%?([\w.-]+)", self.attributes)
        if found is None:
            raise ValueError(f"{self.name}, a {self.opcode}, names no {role}")
        return found[1]


Computation = dict[str, Instruction]


class Program(NamedTuple):
    """A compiled program: computations by name, the name of the one that starts, its first line."""

    computations: dict[str, Computation]
    entry: str
    header: str

    @property
    def instructions(self) -> list[Instruction]:
        """All instructions, those of loops and fusions once."""
        return [one for computation in self.computations.values() for one in computation.values()]


def parse(text: str) -> Program:
    """Read a module's text, as `compiled.as_text()` gives it.

    Args:
        text: of the optimised module.

    Returns:
        The program.

    Raises:
        ValueError: if it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    current, entry = {}, ""
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if found := _COMPUTATION.fullmatch(line):
            current = computations[found[2]] = {}
            entry = found[2] if found[1] else entry
        elif found := _INSTRUCTION.match(line):
            result, rest = _split(found[2], " ")
            opcode, rest = rest.split("(", 1)
            arguments, attributes = _split(f"({rest}", ")")
            current[found[1]] = Instruction(found[1], opcode, result, arguments[1:], attributes)
    if not entry:
        raise ValueError("no entry computation in the compiled program's text")
    return Program(computations, entry, text.split("\n", 1)[0])


def _split(text: str, end: str) -> tuple[str, str]:
    """Split at the first `end` that stands in no parentheses but those that it closes."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if character == end and not depth:
            return text[:place], text[place + 1 :]
    return text, ""


def memory_bytes(program: Program, name: str | None = None) -> float:
    """Bytes that a computation reads from a chip's main memory and writes there.

    Args:
        program: a compiled program.
        name: of the computation; None for the whole program.

    Returns:
        The bytes, without what the layouts pad.
    """
    computation, total = program.computations[name or program.entry], 0.0
    for one in computation.values():
        if one.opcode == "while":
            total += trips(program, one) * memory_bytes(program, one.called("body"))
        elif one.opcode == "conditional":
            total += max(memory_bytes(program, branch) for branch in _branches(one))
        elif one.opcode == "call":
            total += memory_bytes(program, one.called("to_apply"))
        elif one.opcode in ("copy-start", "slice-start"):  # (from or to, to or from, a flag)
            moved = min(_size(part) for part in _arrays(one.result)[:2])
            total += moved * sum(_in_memory(part) for part in _arrays(one.result)[:2])
        elif one.opcode not in FREE and not any(name in one.attributes for name in FREE_CALLS):
            total += _read(program, computation, one) + _written(program, computation, one)
    return total


def kernels(program: Program, name: str | None = None) -> int:
    """How many operations a computation starts, those of loops as often as they run.

    Args:
        program: a compiled program.
        name: of the computation; None for the whole program.

    Returns:
        The number; of a branch, the larger one.
    """
    total = 0
    for one in program.computations[name or program.entry].values():
        if one.opcode == "while":
            total += trips(program, one) * kernels(program, one.called("body"))
        elif one.opcode == "conditional":
            total += max(kernels(program, branch) for branch in _branches(one))
        elif one.opcode == "call":
            total += kernels(program, one.called("to_apply"))
        else:
            free = one.opcode in FREE or one.opcode.endswith(("-done", "-update"))
            total += not (free or any(name in one.attributes for name in FREE_CALLS))
    return total


def _branches(one: Instruction) -> list[str]:
    branches = re.search(r"branch_computations=\{(.*?)\}", one.attributes)
    names = re.findall(r"[\w.-]+", branches[1]) if branches else []
    return names or [one.called("true_computation"), one.called("false_computation")]


def trips(program: Program, loop: Instruction) -> int:
    """How often a loop's body runs; 1 if that is not known before it runs."""
    if found := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(found[1])
    condition = program.computations[loop.called("condition")]
    # `lax.scan` counts from 0 to a constant: the only one that its condition has.
    limits = [one.arguments for one in condition.values() if one.opcode == "constant"]
    return int(limits[0]) if len(limits) == 1 and limits[0].isdecimal() else 1


def _read(program: Program, computation: Computation, one: Instruction) -> float:
    total = 0.0
    for name in dict.fromkeys(one.operands):
        size = sum(_size(array) for array in _arrays(computation[name].result) if _in_memory(array))
        total += min(size, _touched_by_name(program, one, name)) if size else 0
    return total


def _touched_by_name(program: Program, one: Instruction, name: str) -> float:
    places = [place for place, used in enumerate(one.operands) if used == name]
    return sum(_touched(program, one, place) for place in places)


def _touched(program: Program, one: Instruction, place: int) -> float:
    """Bytes of an operand that an instruction reads, at most; infinite for all of it."""
    if place == 0 and one.opcode in PARTS:
        return sum(map(_size, _arrays(one.result)))
    if place == 0 and one.opcode in ("dynamic-update-slice", "scatter"):  # in place
        return 0
    if one.opcode != "fusion":
        return math.inf
    inside, total = program.computations[one.called("calls")], 0.0
    parameters = [other for other in inside.values() if other.opcode == "parameter"]
    waiting = [other.name for other in parameters if other.arguments == str(place)]
    while waiting:
        name = waiting.pop()
        users = [other for other in inside.values() if name in other.operands]
        for user in users:
            if user.opcode == "bitcast":
                waiting.append(user.name)
            else:
                total += _touched_by_name(program, user, name)
        if not users:  # what is given back as it is
            return math.inf
    return total


def _written(program: Program, computation: Computation, one: Instruction) -> float:
    sizes = _made(program, computation, one)
    arrays = _arrays(one.result)
    if len(arrays) > 1 and _SCRATCH.search(one.attributes):  # the last, of which little is used
        sizes, arrays = sizes[:-1], arrays[:-1]
    if len(sizes) != len(arrays):
        sizes = [_size(array) for array in arrays]
    return sum(size for size, array in zip(sizes, arrays, strict=True) if _in_memory(array))


def _made(program: Program, computation: Computation, one: Instruction) -> list[float]:
    """Bytes that an instruction writes of each array of its result."""
    if one.opcode in ("dynamic-update-slice", "scatter"):
        update = one.operands[1 if one.opcode == "dynamic-update-slice" else -1]
        return [sum(map(_size, _arrays(computation[update].result)))]
    if one.opcode == "bitcast":
        return _made(program, computation, computation[one.operands[0]])
    if one.opcode == "tuple":
        parts = (computation[name] for name in one.operands)
        return [size for part in parts for size in _made(program, computation, part)]
    if one.opcode == "fusion":
        inside = program.computations[one.called("calls")]
        return _made(program, inside, [*inside.values()][-1])
    return [_size(array) for array in _arrays(one.result)]


def _arrays(result: str) -> list[tuple[str, str, str]]:
    return _ARRAY.findall(result)


def _size(array: tuple[str, str, str]) -> float:
    dtype, dimensions, _ = array
    bits = re.search(r"\d+", dtype)
    bits = int(bits[0]) if bits else 8 * (dtype == "pred")  # tokens have none
    return math.prod(int(side.lstrip("<=")) for side in dimensions.split(",") if side) * bits / 8


def _in_memory(array: tuple[str, str, str]) -> bool:
    return "S(" not in array[2]


def counts(program: Program, lowered: str) -> dict[str, int]:
    """Count what a program for an accelerator should not hold, and what is worth knowing.

    Args:
        program: the compiled program.
        lowered: the StableHLO that it was compiled from.

    Returns:
        Numbers of arrays in float64, transfers to the host or callbacks, arrays of dynamic shape,
        collectives, aliased outputs, products, products at the highest precision, and scatters.
    """
    every = program.instructions
    products = re.findall(r"stablehlo\.dot_general .*", lowered)
    return {
        "float64": sum("f64[" in one.result for one in every)
        + len(re.findall(r"[<x]f64\b", lowered)),
        "callbacks": sum(
            one.opcode in ("infeed", "outfeed")
            or "is_host_transfer=true" in one.attributes
            or bool(re.search(r'custom_call_target="[^"]*callback', one.attributes))
            for one in every
        ),
        "dynamic": sum("<=" in sides for one in every for _, sides, _ in _arrays(one.result))
        + len(re.findall(r"tensor<(?:\d+x)*\?", lowered)),
        "collectives": sum(bool(COLLECTIVES.fullmatch(one.opcode)) for one in every),
        "aliased": len(re.findall(r"(?:may|must)-alias\)", program.header)),
        "products": len(products),
        "highest": sum("HIGHEST" in product for product in products),
        "scatters": sum(one.opcode == "scatter" for one in every),
    }
