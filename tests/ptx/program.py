"""PTX text, taken apart into instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Instruction", "Program", "parse", "vector"]


@dataclass(frozen=True)
class Instruction:
    """``@guard name.modifier.modifier operands``; ``negated``: executed where the guard is false."""

    parts: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None
    negated: bool
    text: str

    @property
    def name(self) -> str:
        return self.parts[0].split("::")[0]

    @property
    def type(self) -> str:
        """The last modifier, which in most instructions is the type of the operands."""
        return self.parts[-1]

    def number(self, pattern: str, default: int = 1) -> int:
        """The number in the modifier that ``pattern`` matches whole, as 4 in ``.v4``."""
        return next((int(found[1]) for part in self.parts if (found := re.fullmatch(pattern, part))), default)


@dataclass(frozen=True)
class Program:
    """A kernel: its name, threads of a block, parameters as (type, name), code, and where its labels point."""

    name: str
    threads: int
    parameters: tuple[tuple[str, str], ...]
    code: tuple[Instruction, ...]
    labels: dict[str, int]


def parse(ptx: str) -> Program:
    """The one kernel in ``ptx``."""
    text = re.sub(r"//[^\n]*", "", ptx)
    entry = text[text.index(".entry") :]
    parameters = re.findall(r"\.param\s+\.(\w+)[^,\n]*?(\w+)\s*(?:,|\n|$)", entry[: entry.index(")")])
    body = entry[entry.index("{") + 1 :].split("\n}", 1)[0]
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in re.split(r"[;\n]", body):
        line = line.strip("{} \t") if re.match(r"\s*[{}]\s*(\.reg.*)?$", line) else line.strip()
        while label := re.match(r"(\$[\w$]+):\s*", line):
            labels[label[1]] = len(code)
            line = line[label.end() :]
        if line and not line.startswith("."):
            code.append(_instruction(line))
    threads = re.search(r"\.reqntid\s+(\d+)", text)
    name = re.match(r"\.entry\s+(\w+)", entry)
    assert threads and name, "no kernel of a known number of threads"
    return Program(name[1], int(threads[1]), tuple(parameters), tuple(code), labels)


def _instruction(line: str) -> Instruction:
    found = re.match(r"(?:@(!?)(%\w+)\s+)?(\S+)\s*(.*)$", line, re.S)
    assert found, line
    return Instruction(tuple(found[3].split(".")), _operands(found[4]), found[2], bool(found[1]), line)


def _operands(text: str) -> tuple[str, ...]:
    """Split at the commas outside of braces and brackets."""
    return tuple(part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip())


def vector(operand: str) -> list[str]:
    """The registers of ``{a, b}``; of a single one, that one."""
    return [part.strip() for part in operand.strip("{} ").split(",")]
