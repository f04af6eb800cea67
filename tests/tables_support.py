"""What the tests of ``fpet tables`` share."""

from __future__ import annotations

from fpet import cli


def ran(*arguments: str) -> int:
    return cli.main(["tables", *arguments])


def columns(text: str) -> dict[str, list[str]]:
    """Cells by heading; ratios come with the quantity that they follow."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    found: dict[str, list[str]] = {}
    quantity = ""
    for i, heading in enumerate(lines[0]):
        quantity = quantity if heading.startswith("×") else heading.partition(",")[0]
        found[heading if not heading.startswith("×") else f"{quantity} {heading}"] = [line[i] for line in lines[2:]]
    return found
