"""How often a program waits for global memory, one wait after another."""

from __future__ import annotations

import re

from .program import Instruction, Program

__all__ = ["RoundTrips"]

BOUNDARIES = ("bra", "ret", "exit", "bar", "barrier")
NO_RESULT = ("st", "cp", "bra", "bar", "barrier", "ret", "fence", "stmatrix")


class RoundTrips:
    """Counts serial round trips as the machine code could have them.

    A value is ready one trip after the load that it needs, or that its operands need, was issued. The assembler moves loads
    up within a basic block, but not over a branch, a barrier or a store: there everything before has been issued, and what it
    waited for has come.
    """

    def __init__(self, program: Program) -> None:
        self.plans = [self._plan(ins) for ins in program.code]
        targets = {program.labels[ins.operands[-1]] for ins in program.code if ins.name == "bra"}
        self.starts = [at in targets for at in range(len(program.code))]
        self.begin()

    @staticmethod
    def _plan(ins: Instruction) -> tuple[tuple[str, ...], tuple[str, ...], str]:
        """Registers read, registers written, and what kind of instruction it is."""
        named = [tuple(re.findall(r"%(?:p|rs|rd|r|fd|f)\d+", operand)) for operand in ins.operands]
        has_result = bool(named) and ins.name not in NO_RESULT and not (ins.name == "wgmma" and len(ins.operands) < 4)
        written = named[0] if has_result else ()
        read = tuple(r for operand in named[has_result:] for r in operand) + ((ins.guard,) if ins.guard else ())
        if ins.name == "wgmma" and has_result:
            read += written  # sums go on
        kind = "boundary" if ins.name in BOUNDARIES else ins.name
        if ins.name in ("st", "ld") and "global" not in ins.parts:
            kind = "other"
        return read, written, kind

    def begin(self) -> None:
        """A program starts."""
        self.ready: dict[str, int] = {}  # by register, if later than 0
        self.floor = self.issued = self.stored = 0
        self.copies: list[int] = [0]  # when the groups of cp.async under way are there; the last is open

    def follow(self, at: int, asked: bool) -> None:
        """Instruction ``at`` was executed; ``asked``: it asked global memory for something."""
        read, written, kind = self.plans[at]
        if self.starts[at]:
            self.floor = self.issued
        when = self.floor
        for register in read:
            when = max(when, self.ready.get(register, 0))
        if kind == "st":
            self.stored = max(self.stored, when)
        if asked:
            when = max(when, self.stored)
        if kind != "mov":  # which costs a register and no time
            self.issued = max(self.issued, when)
        if kind == "cp" and asked:
            self.copies[-1] = max(self.copies[-1], when + 1)
        for register in written:
            self.ready[register] = when + asked
        if kind == "boundary":
            self.floor = self.issued

    def close_copies(self) -> None:
        self.copies.append(0)

    def await_copies(self, left: int) -> None:
        """All but the last ``left`` closed groups are there."""
        while len(self.copies) > left + 1:
            self.issued = max(self.issued, self.copies.pop(0))
        self.floor = self.issued
