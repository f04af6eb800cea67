"""The transcribed tables against the paper: its numbers are carried here, taken from its text by another way than the data."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from fpet.adapters import METHODS
from fpet.comparators import REDUCTIONS
from fpet.data import VTAB_TASKS
from fpet.tables import definitions, measure, published, render
from fpet.tables.paper import PAPER

NUMBERS = {
    "1": (
        "68.9 2.62 17.6 11.9 57.6 2.62 +0.0 17.6 +0.0 2.7 -77.3 72.0 2.79 +6.5 18.5 +5.1 9.8 -26.5 65.2 2.62 +0.0 17.6 "
        "+0.0 8.0 -33.0 75.7 2.62 +0.0 17.6 +0.0 10.9 -8.2 75.2 2.62 +0.0 17.8 +1.1 11.9 -0.0 76.1 2.62 +0.0 17.6 +0.0 "
        "8.9 -25.6 75.7 2.62 +0.0 17.6 +0.0 8.4 -29.6 76.2 2.68 +1.5 17.6 +0.0 7.6 -36.0 76.7 2.62 +0.0 17.6 +0.0 8.4 "
        "-29.4 77.0 2.77 +5.7 17.7 +0.6 7.6 -35.9 72.9 2.83 +8.0 16.84 -4.3 3.6 -69.9 74.8 1.06 2.62 7.1 17.6 5.9 8.9 "
        "76.1 2.10 -19.8 13.3 -24.4 7.4 -38.0 75.6 2.10 -19.8 13.3 -24.4 7.1 -40.3 76.2 2.12 -19.1 13.5 -23.3 6.2 "
        "-47.9 76.4 2.10 -19.8 13.3 -24.4 7.1 -40.3 77.0 2.17 -17.2 13.5 -23.3 6.2 -47.8"
    ),
    "2": (
        "100 101 397 45 85.8 68.9 68.9 87.7 64.3 97.2 86.9 87.4 38.8 79.7 95.7 84.2 73.9 56.3 58.6 41.7 65.5 57.5 46.7 "
        "25.7 29.1 0 57.6 64.4 85.0 63.2 97.0 86.3 36.6 51.0 78.5 87.5 68.5 74.0 34.3 30.6 33.2 55.4 12.5 20.0 9.6 "
        "19.2 0.06 67.8 77.7 86.9 62.6 97.5 87.3 74.5 51.2 78.2 92.0 75.6 72.9 50.5 58.6 40.5 67.1 68.7 36.1 20.2 34.1 "
        "0.53 72.0 78.8 90.8 65.8 98.0 88.3 78.1 49.6 81.8 96.1 83.4 68.4 68.5 60.0 46.5 72.8 73.6 47.9 32.9 37.8 0.36 "
        "75.5 69.6 92.7 70.2 99.1 90.4 86.1 53.7 84.4 95.4 83.9 75.8 82.8 68.9 49.9 81.7 81.8 48.3 32.8 44.2 0.10 65.2 "
        "72.8 87.0 59.2 97.5 85.3 59.9 51.4 78.7 91.6 72.9 69.8 61.5 55.6 32.4 55.9 66.6 40.0 15.7 25.1 0.24 75.7 69.0 "
        "92.6 75.1 99.4 91.8 90.2 52.9 87.4 95.9 87.4 75.5 75.9 62.3 53.3 80.6 77.3 54.9 29.5 37.9 0.04 75.3 71.3 89.6 "
        "70.7 98.9 91.0 87.8 54.6 85.2 95.5 83.4 75.7 82.0 69.0 49.8 80.0 79.2 48.4 34.2 41.4 0.22 76.1 72.4 91.6 71.0 "
        "99.2 91.4 90.7 55.1 85.3 95.9 84.6 75.9 82.3 68.0 50.4 79.9 80.4 49.2 38.6 41.0 0.29 75.7 70.9 93.0 70.0 99.1 "
        "91.2 86.0 55.8 87.1 94.6 82.4 74.7 83.5 63.1 51.7 79.3 85.2 51.8 33.5 43.6 0.16 76.2 72.0 92.7 70.2 99.3 91.0 "
        "87.5 54.8 87.4 95.2 85.2 75.2 83.6 62.6 52.1 81.0 86.2 53.1 34.5 40.3 1.17 76.7 72.1 91.7 71.2 99.1 91.4 90.2 "
        "55.8 87.0 95.4 85.5 75.5 83.1 64.1 52.2 81.3 86.4 53.5 36.7 44.4 0.64 77.0 74.1 92.4 72.1 99.3 91.6 89.0 56.3 "
        "88.2 95.2 86.0 76.2 83.9 63.6 53.0 81.4 86.2 54.8 35.2 41.3 2.72 72.9 70.9 89.7 68.8 98.5 89.6 77.8 50.6 82.3 "
        "96.7 83.5 75.2 71.8 62.7 48.5 75.4 74.1 49.0 31.7 36.1 0.18 74.8 71.4 87.3 68.1 96.0 89.9 89.3 53.4 85.0 95.3 "
        "81.9 75.2 80.9 69.8 50.5 80.7 80.5 47.1 35.7 41.0 0.23 76.1 72.1 91.5 71.8 99.3 90.7 90.3 55.0 85.2 96.2 84.5 "
        "75.6 82.2 67.7 49.7 79.9 82.2 48.7 36.9 41.7 0.30 75.6 70.1 92.7 69.4 99.1 90.8 85.4 55.6 87.2 94.6 82.5 74.1 "
        "83.0 63.4 50.6 81.6 84.7 51.5 34.3 43.3 0.17 76.2 71.3 93.5 69.9 99.3 90.7 87.0 54.7 87.5 95.1 84.5 76.2 83.6 "
        "63.1 52.2 81.3 87.1 54.1 33.5 40.2 1.18 76.4 71.9 91.1 70.9 99.1 90.5 89.4 55.9 87.4 94.7 84.4 74.9 83.5 65.1 "
        "52.1 79.7 85.8 54.2 36.7 44.4 0.64 77.0 74.1 92.8 72.5 99.4 91.1 89.6 56.2 88.3 94.9 86.3 75.3 83.8 63.0 52.8 "
        "81.4 85.7 54.4 35.9 42.2"
    ),
    "3": (
        "0 0 0 -0.38 +0.01 +5.84 -0.27 -0.56 -0.21 6 -0.18 -0.61 -1.38 -0.17 -0.61 -1.38 -1.70 -0.61 -1.41 -0.05 -0.62 -1.41"
    ),
    "4": ("5.62 4.52 -19.57 6.24 5.03 -19.39"),
    "5": ("76.0 8.67 61.8 19.6 76.0 6.60 -23.9 46.7 -24.4 15.5 -21.0 70.3 1.13 4.8 4.4 70.3 0.94 -20.7 3.7 -23.6 3.8 -12.5"),
    "A1": (
        "74.9 0.67 4.7 5.0 74.9 0.59 -15.8 3.6 -23.6 4.3 -13.8 76.0 8.67 61.8 19.6 76.0 6.60 -23.9 46.7 -24.4 15.5 "
        "-21.0 70.1 1.08 4.8 5.0 70.0 0.93 -14.2 3.6 -23.5 4.3 -13.9 70.2 1.08 4.8 5.0 70.2 0.93 -14.2 3.6 -23.5 4.3 "
        "-13.9 72.9 2.62 17.6 8.4 72.8 2.10 -18.7 13.3 -24.4 7.1 -15.5 72.7 2.73 17.7 7.7 72.6 2.15 -21.9 13.5 -21.9 "
        "6.2 -21.9"
    ),
    "A2": ("8 76.2 2.68 17.61 7.64 1 74.7 2.64 17.59 7.62 76.2 2.12 13.45 6.21"),
    "A3": (
        "76.22 2.68 17.6 6 75.68 2.06 13.5 75.87 2.08 13.5 76.03 2.12 13.5 76.22 2.12 13.5 4 75.03 1.89 12.0 75.13 "
        "1.89 12.0 75.40 1.92 12.0 75.65 1.92 12.0 2 73.41 1.67 10.5 73.43 1.68 10.5 73.95 1.71 10.5 74.29 1.71 10.5 1 "
        "71.46 1.56 9.8 71.45 1.57 9.8 71.06 1.58 9.8 72.21 1.59 9.8 0 68.95 1.40 9.0 69.33 1.42 9.0 67.39 1.44 9.0 "
        "69.09 1.45 9.0"
    ),
    "A4": (
        "77.01 2.77 17.7 6 76.65 2.13 13.5 76.79 2.14 13.5 76.83 2.17 13.5 76.96 2.17 13.5 4 76.06 1.92 12.0 76.22 "
        "1.91 12.0 76.50 1.94 12.0 76.34 1.94 12.0 2 74.26 1.71 10.5 74.66 1.71 10.5 74.96 1.72 10.5 75.18 1.71 10.5 1 "
        "72.23 1.58 9.8 72.41 1.59 9.8 72.02 1.60 9.8 73.00 1.60 9.8 0 69.68 1.51 9.0 70.31 1.52 9.0 67.98 1.54 9.0 "
        "69.75 1.53 9.0"
    ),
    "A5": ("-100 92.14 97.21 92.18 97.18 92.17 97.45 92.29 97.48"),
    "A6": ("-0.32 -0.33 -0.05 -0.32 -0.32 -0.12 -0.58 -0.34 0.00 -0.34 -0.34 -0.17 -0.38 -0.27 -0.05"),
    "A7": ("2 2 1 5 10 1 5 10 94.2 99.5 99.7 83.6 96.6 98.2 1.09 44.96 94.1 99.4 99.9 83.0 96.0 98.0 0.78 -28.44 34.79 -22.62"),
    "A8": ("64 1e-3 1e-4 100 10"),
    "A9": (
        "-1 100 100 10,000 101 102 6,084 47 1,880 102 102 800 1,000 200 6,149 37 3,669 10 26,032 397 397 21,750 2 "
        "32,768 10 800 1,000 200 5,400 45 45 6,300 5 42,670 8 15,000 6 15,000 6 22,735 4 800 1,000 200 711 16 73,728 "
        "16 73,728 18 12,150 18 12,150 -101 101 20,200 30,300 196 1,635 8,041 102 102 1 2 4 8 16 1,633 2,463 100 3,333 "
        "3,333 37 736 3,699 100 100 60,000 10,000 10 73,257 26,032"
    ),
}
"""Every number of each table's text from its heading to its caption, in the order of reading, references left out."""

DATASETS = {
    "CIFAR100": (100, 200, 10000), "Caltech101": (102, 200, 6084), "DTD": (47, 200, 1880), "Oxford-Flowers102": (102, 200, 6149),
    "Oxford-Pets": (37, 200, 3669), "SVHN": (10, 200, 26032), "Sun397": (397, 200, 21750), "Patch Camelyon": (2, 200, 32768),
    "EuroSAT": (10, 200, 5400), "Resisc45": (45, 200, 6300), "Retinopathy": (5, 200, 42670), "Clever/count": (8, 200, 15000),
    "Clever/distance": (6, 200, 15000), "DMLab": (6, 200, 22735), "KITTI-Dist": (4, 200, 711),
    "dSprites/location": (16, 200, 73728), "dSprites/orientation": (16, 200, 73728), "SmallNORB/azimuth": (18, 200, 12150),
    "SmallNORB/elevation": (18, 200, 12150), "few Food-101": (101, 20200, 30300), "few Stanford Cars": (196, 1635, 8041),
    "few Oxford-Flowers102": (102, 1633, 2463), "few FGVC-Aircraft": (100, 3333, 3333), "few Oxford-Pets": (37, 736, 3699),
    "full CIFAR100": (100, None, 10000), "full SVHN": (10, None, 26032),
}  # fmt: skip
"""Table A9: classes, validation images, test images."""


def numbers(text: str) -> list[str]:
    return re.findall(r"[-+]?\d[\d,]*\.?\d*(?:e-\d+)?", text)


def as_printed(name: str) -> list[str]:
    """The numbers of the transcribed table in the order in which the paper's text has them."""
    table = PAPER[name]
    found = numbers(" ".join(table.columns))
    if name == "A7":  # two lines of headings
        found = ["1", "5", "10", "1", "5", "10"]
    group = ""
    before = ""
    for row in table.rows:
        cells = list(row.cells)
        if row.group != group:
            found += numbers(group := row.group)
        if name in ("A3", "A4"):  # a layer is printed once
            cells[0], before = ("" if cells[0] == before else cells[0]), cells[0]
        found += numbers(" ".join(cells))
    return found


@pytest.mark.parametrize("name", [name for name in PAPER if name != "A9"])
def test_every_number_is_the_papers(name: str) -> None:
    expected = NUMBERS[name].split()
    if name == "A7":  # "I2T" and "T2I"
        expected = [n for n in expected if n != "2"]
    assert as_printed(name) == expected


def test_the_statistics_of_data_sets_are_the_papers() -> None:
    prefix = {"VTAB-1K": "", "Few-shot learning": "few ", "Full datasets": "full "}
    found = {prefix[row.group] + row.cells[1]: tuple(row.number(i) for i in (2, 4, 5)) for row in PAPER["A9"].rows}
    assert found == DATASETS
    # All of the text's numbers are in these, but for names, and sizes that several rows share.
    counted = [n.replace(",", "") for n in NUMBERS["A9"].split()]
    assert all(str(value) in counted for values in DATASETS.values() for value in values if value is not None)


@pytest.mark.skipif("FPET_PAPER" not in os.environ, reason="FPET_PAPER names no file with the paper's text")
def test_the_numbers_carried_here_are_in_the_text() -> None:
    text = numbers(re.sub(r"\[\d+\]", "", Path(os.environ["FPET_PAPER"]).read_text(encoding="utf-8")))
    joined = " ".join(text)
    for name, carried in NUMBERS.items():
        assert carried in joined, name


def test_averages_and_gaps_agree_with_each_other() -> None:
    """Table 2's average is that of the three groups' means; Table 1's gaps are to full tuning."""
    for row in PAPER["2"].rows:
        values = [row.number(i) for i in range(3, 22)]
        groups = [values[:7], values[7:11], values[11:]]
        mean = sum(sum(v for v in group if v is not None) / len(group) for group in groups) / 3
        assert row.number(2) == pytest.approx(mean, abs=0.16), row.cells[0]  # SynQT's is 0.15 off
    full = PAPER["1"].rows[0]
    for row in PAPER["1"].rows:
        for column in (2, 3, 4):
            if gap := re.search(r"\(([-+]\d+\.\d)%\)", row.cells[column]):
                value, whole = row.number(column), full.number(column)
                assert value is not None and whole is not None
                if (row.cells[0], column) != ("VPT-Deep", 4):  # 9.8 would be −17.6 %; −26.5 % is 8.75
                    assert float(gap[1]) == pytest.approx(100 * (value / whole - 1), abs=0.9), row.cells


@pytest.mark.parametrize("name", definitions.TABLES)
def test_rows_are_the_papers_and_known_here(name: str) -> None:
    table = definitions.TABLES[name]
    assert table.title == PAPER[name].caption
    cells = {"4": 4, "A6": 20}.get(name, len(PAPER[name].rows))
    assert len(table.rows) in (0, cells)
    for row in table.rows:
        assert set(row.numbers) <= set(table.quantities) | {"accuracy", "parameters_m"}
        if row.variant is None:
            assert row.label in ("NOAH", "SynQT", "Pruned RepAdapter")
            continue
        v = row.variant
        assert v.model in measure.MODELS and v.method in METHODS and v.reduction in REDUCTIONS
        assert (v.layer is None) == (v.reduction == "none" or REDUCTIONS[v.reduction].everywhere)


def test_layers_are_the_papers_zero_among_them() -> None:
    layers = [row.variant.layer for row in definitions.TABLES["A3"].rows if row.variant is not None]
    assert layers == [None, *[n for n in (6, 4, 2, 1, 0) for _ in range(4)]]
    assert published.lookup("vitb16", "adaptformer", "fpet", 0)["accuracy"].value == 69.09
    assert definitions.merging("vitb16", "lora", "fpet", 0).layer == 0
    assert published.lookup("vitb16", "bi-adaptformer", "fpet", 6)["time_ms"].source == "Table 1"


def test_tables_without_rows_here_are_printed_as_they_are() -> None:
    text = render.paper_table("A5")
    assert text.splitlines()[2] == "| AdaptFormer | 92.14 | 97.21 |"
    assert "| VTAB-1K | Natural | DTD | 47 | 800/1,000 | 200 | 1,880 |" in render.paper_table("A9")


def test_tasks_of_table_2_are_in_the_order_of_the_data() -> None:
    assert len(VTAB_TASKS) == 19 == len(PAPER["2"].columns) - 3
    shown = [(row.label, row.variant) for row in definitions.TABLES["2"].rows]
    adaptformer = next(variant for label, variant in shown if label == "FPET-AdaptFormer")
    here = {"measured": {"accuracy": 50.0}, "accuracies": {"cifar": [40.0, 42.0], "smallnorb_ele": [30.0]}}
    lines = render.task_table({adaptformer: here}, shown).splitlines()
    (line,) = (i for i, text in enumerate(lines) if "… here" in text)
    assert "| AdaptFormer | 0.17 | 76.2 | 71.3 |" in lines[line - 1]
    assert lines[line] == "|  | … here | – | 50.0 | 41.0 | " + "– | " * 17 + "30.0 |"
