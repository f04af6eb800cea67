"""The tables of the paper (CVPR 2025, arXiv 2503.20282), 1 to 5 and A1 to A9, transcribed: :data:`PAPER`.

Cells are the paper's, without references to literature; what several rows of one backbone or layer share stands in each. A line
that starts with ">" names the group of the rows below it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["PAPER", "PaperRow", "PaperTable"]


class PaperRow(NamedTuple):
    """Attributes: group, or nothing; cells, the first of which are labels."""

    group: str
    cells: tuple[str, ...]

    def number(self, column: int) -> float | None:
        """What a cell says first, as a number; None where it says none, or a range."""
        found = re.match(r"[+-]?\d[\d,]*\.?\d*", self.cells[column]) if column < len(self.cells) else None
        return None if found is None else float(found[0].replace(",", ""))


class PaperTable(NamedTuple):
    """Attributes: caption; columns, their headings; rows."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[PaperRow, ...]


def _table(caption: str, columns: str, body: str) -> PaperTable:
    rows, group = [], ""
    for line in map(str.strip, body.strip().splitlines()):
        if line.startswith(">"):
            group = line[1:].strip()
        else:
            rows.append(PaperRow(group, tuple(cell.strip() for cell in line.split("|"))))
    return PaperTable(caption, tuple(name.strip() for name in columns.split("|")), tuple(rows))


PAPER: dict[str, PaperTable] = {
    "1": _table(
        "Comparison with state-of-the-art methods in terms of accuracy, inference time per image, FLOPs, "
        "and GPU memory usage during training",
        "Method | Acc (%) | Time (ms) | FLOPs (G) | Mem (GB)",
        """
        > Traditional Fine-Tuning
        Full | 68.9 | 2.62 | 17.6 | 11.9
        Linear | 57.6 | 2.62 (+0.0%) | 17.6 (+0.0%) | 2.7 (-77.3%)
        > Parameter-Efficient Tuning
        VPT-Deep | 72.0 | 2.79 (+6.5%) | 18.5 (+5.1%) | 9.8 (-26.5%)
        BitFit | 65.2 | 2.62 (+0.0%) | 17.6 (+0.0%) | 8.0 (-33.0%)
        SSF | 75.7 | 2.62 (+0.0%) | 17.6 (+0.0%) | 10.9 (-8.2%)
        FacT-TT | 75.2 | 2.62 (+0.0%) | 17.8 (+1.1%) | 11.9 (-0.0%)
        RepAdapter | 76.1 | 2.62 (+0.0%) | 17.6 (+0.0%) | 8.9 (-25.6%)
        LoRA | 75.7 | 2.62 (+0.0%) | 17.6 (+0.0%) | 8.4 (-29.6%)
        AdaptFormer | 76.2 | 2.68 (+1.5%) | 17.6 (+0.0%) | 7.6 (-36.0%)
        Bi-LoRA | 76.7 | 2.62 (+0.0%) | 17.6 (+0.0%) | 8.4 (-29.4%)
        Bi-AdaptFormer | 77.0 | 2.77 (+5.7%) | 17.7 (+0.6%) | 7.6 (-35.9%)
        > Efficiency-gained Parameter-Efficient Tuning
        SynQT | 72.9 | 2.83 (+8.0%) | 16.84 (-4.3%) | 3.6 (-69.9%)
        Pruned RepAdapter | 74.8 | [1.06, 2.62] | [7.1, 17.6] | [5.9, 8.9]
        > Faster Parameter-Efficient Tuning (Ours)
        RepAdapter | 76.1 | 2.10 (-19.8%) | 13.3 (-24.4%) | 7.4 (-38.0%)
        LoRA | 75.6 | 2.10 (-19.8%) | 13.3 (-24.4%) | 7.1 (-40.3%)
        AdaptFormer | 76.2 | 2.12 (-19.1%) | 13.5 (-23.3%) | 6.2 (-47.9%)
        Bi-LoRA | 76.4 | 2.10 (-19.8%) | 13.3 (-24.4%) | 7.1 (-40.3%)
        Bi-AdaptFormer | 77.0 | 2.17 (-17.2%) | 13.5 (-23.3%) | 6.2 (-47.8%)
        """,
    ),
    "2": _table(
        "Comparison with state-of-the-art methods on VTAB-1K benchmark",
        "Method | # param (M) | Average | CIFAR100 | Caltech101 | DTD | Flowers | Pets | SVHN | Sun397 | "
        "Camelyon | EuroSAT | Resisc45 | Retinopathy | Clevr-Count | Clevr-Dist | DMLab | KITTI-Dist "
        "| dSpr-Loc | dSpr-Ori | sNORB-Azim | sNORB-Ele",
        """
> Traditional Fine-Tuning
Full|85.8|68.9|68.9|87.7|64.3|97.2|86.9|87.4|38.8|79.7|95.7|84.2|73.9|56.3|58.6|41.7|65.5|57.5|46.7|25.7|29.1
Linear|0|57.6|64.4|85.0|63.2|97.0|86.3|36.6|51.0|78.5|87.5|68.5|74.0|34.3|30.6|33.2|55.4|12.5|20.0|9.6|19.2
> Parameter-Efficient Tuning
VPT-Shallow|0.06|67.8|77.7|86.9|62.6|97.5|87.3|74.5|51.2|78.2|92.0|75.6|72.9|50.5|58.6|40.5|67.1|68.7|36.1|20.2|34.1
VPT-DEEP|0.53|72.0|78.8|90.8|65.8|98.0|88.3|78.1|49.6|81.8|96.1|83.4|68.4|68.5|60.0|46.5|72.8|73.6|47.9|32.9|37.8
NOAH|0.36|75.5|69.6|92.7|70.2|99.1|90.4|86.1|53.7|84.4|95.4|83.9|75.8|82.8|68.9|49.9|81.7|81.8|48.3|32.8|44.2
BitFit|0.10|65.2|72.8|87.0|59.2|97.5|85.3|59.9|51.4|78.7|91.6|72.9|69.8|61.5|55.6|32.4|55.9|66.6|40.0|15.7|25.1
SSF|0.24|75.7|69.0|92.6|75.1|99.4|91.8|90.2|52.9|87.4|95.9|87.4|75.5|75.9|62.3|53.3|80.6|77.3|54.9|29.5|37.9
FacT-TT|0.04|75.3|71.3|89.6|70.7|98.9|91.0|87.8|54.6|85.2|95.5|83.4|75.7|82.0|69.0|49.8|80.0|79.2|48.4|34.2|41.4
RepAdapter|0.22|76.1|72.4|91.6|71.0|99.2|91.4|90.7|55.1|85.3|95.9|84.6|75.9|82.3|68.0|50.4|79.9|80.4|49.2|38.6|41.0
LoRA|0.29|75.7|70.9|93.0|70.0|99.1|91.2|86.0|55.8|87.1|94.6|82.4|74.7|83.5|63.1|51.7|79.3|85.2|51.8|33.5|43.6
AdaptFormer|0.16|76.2|72.0|92.7|70.2|99.3|91.0|87.5|54.8|87.4|95.2|85.2|75.2|83.6|62.6|52.1|81.0|86.2|53.1|34.5|40.3
Bi-LoRA|1.17|76.7|72.1|91.7|71.2|99.1|91.4|90.2|55.8|87.0|95.4|85.5|75.5|83.1|64.1|52.2|81.3|86.4|53.5|36.7|44.4
Bi-AdaptFormer|0.64|77.0|74.1|92.4|72.1|99.3|91.6|89.0|56.3|88.2|95.2|86.0|76.2|83.9|63.6|53.0|81.4|86.2|54.8|35.2|41.3
> Efficiency-gained Parameter-Efficient Tuning
SynQT|2.72|72.9|70.9|89.7|68.8|98.5|89.6|77.8|50.6|82.3|96.7|83.5|75.2|71.8|62.7|48.5|75.4|74.1|49.0|31.7|36.1
Pruned RepAdapter|0.18|74.8|71.4|87.3|68.1|96.0|89.9|89.3|53.4|85.0|95.3|81.9|75.2|80.9|69.8|50.5|80.7|80.5|47.1|35.7|41.0
> Faster Parameter-Efficient Tuning (Ours)
RepAdapter|0.23|76.1|72.1|91.5|71.8|99.3|90.7|90.3|55.0|85.2|96.2|84.5|75.6|82.2|67.7|49.7|79.9|82.2|48.7|36.9|41.7
LoRA|0.30|75.6|70.1|92.7|69.4|99.1|90.8|85.4|55.6|87.2|94.6|82.5|74.1|83.0|63.4|50.6|81.6|84.7|51.5|34.3|43.3
AdaptFormer|0.17|76.2|71.3|93.5|69.9|99.3|90.7|87.0|54.7|87.5|95.1|84.5|76.2|83.6|63.1|52.2|81.3|87.1|54.1|33.5|40.2
Bi-LoRA|1.18|76.4|71.9|91.1|70.9|99.1|90.5|89.4|55.9|87.4|94.7|84.4|74.9|83.5|65.1|52.1|79.7|85.8|54.2|36.7|44.4
Bi-Adaptformer|0.64|77.0|74.1|92.8|72.5|99.4|91.1|89.6|56.2|88.3|94.9|86.3|75.3|83.8|63.0|52.8|81.4|85.7|54.4|35.9|42.2
        """,
    ),
    "3": _table(
        "Performance on other token reduction strategies",
        "Method | Δ Acc (%) | Δ Time (ms) | Δ Mem (GB)",
        """
        w/o merging | 0 | 0 | 0
        LTMP | -0.38 | +0.01 | +5.84
        ToMe | -0.27 | -0.56 | -0.21
        BSM at 6th layer | -0.18 | -0.61 | -1.38
        + checkerboard | -0.17 | -0.61 | -1.38
        + key refinement (w/o gradient stopping) | -1.70 | -0.61 | -1.41
        Ours | -0.05 | -0.62 | -1.41
        """,
    ),
    "4": _table(
        "Average training time across VTAB-1K datasets",
        "Method | AdaptFormer | FPET-AdaptFormer | LoRA | FPET-LoRA",
        """
        Training time (s/it) | 5.62 | 4.52 (-19.57%) | 6.24 | 5.03 (-19.39%)
        """,
    ),
    "5": _table(
        "Model performance on other backbones",
        "Model | Method | Acc (%) | Time (ms) | FLOPs (G) | Mem (GB)",
        """
        ViT-L | LoRA | 76.0 | 8.67 | 61.8 | 19.6
        ViT-L | FPET-LoRA | 76.0 | 6.60 (-23.9%) | 46.7 (-24.4%) | 15.5 (-21.0%)
        DeiT-S | AdaptFormer | 70.3 | 1.13 | 4.8 | 4.4
        DeiT-S | FPET-AdaptFormer | 70.3 | 0.94(-20.7%) | 3.7(-23.6%) | 3.8(-12.5%)
        """,
    ),
    "A1": _table(
        "Model performance on other backbones",
        "Model | Method | Acc (%) | Time (ms) | FLOPs (G) | Mem (GB)",
        """
        ViT-S | Bi-LoRA | 74.9 | 0.67 | 4.7 | 5.0
        ViT-S | FPET-Bi-LoRA | 74.9 | 0.59 (-15.8%) | 3.6 (-23.6%) | 4.3 (-13.8%)
        ViT-L | LoRA | 76.0 | 8.67 | 61.8 | 19.6
        ViT-L | FPET-LoRA | 76.0 | 6.60 (-23.9%) | 46.7 (-24.4%) | 15.5 (-21.0%)
        DeiT-S | LoRA | 70.1 | 1.08 | 4.8 | 5.0
        DeiT-S | FPET-LoRA | 70.0 | 0.93(-14.2%) | 3.6(-23.5%) | 4.3(-13.9%)
        DeiT-S | Bi-LoRA | 70.2 | 1.08 | 4.8 | 5.0
        DeiT-S | FPET-Bi-LoRA | 70.2 | 0.93 (-14.2%) | 3.6 (-23.5%) | 4.3 (-13.9%)
        DeiT-B | LoRA | 72.9 | 2.62 | 17.6 | 8.4
        DeiT-B | FPET-LoRA | 72.8 | 2.10 (-18.7%) | 13.3 (-24.4%) | 7.1 (-15.5%)
        DeiT-B | AdaptFormer | 72.7 | 2.73 | 17.7 | 7.7
        DeiT-B | FPET-AdaptFormer | 72.6 | 2.15(-21.9%) | 13.5(-21.9%) | 6.2(-21.9%)
        """,
    ),
    "A2": _table(
        "Comparison between reducing rank redundancy and token redundancy",
        "Method | Acc (%) | Time (ms) | FLOPs (G) | Mem (GB)",
        """
        AdaptFormer (dim=8) | 76.2 | 2.68 | 17.61 | 7.64
        AdaptFormer (dim=1) | 74.7 | 2.64 | 17.59 | 7.62
        FPET-AdaptFormer | 76.2 | 2.12 | 13.45 | 6.21
        """,
    ),
    "A3": _table(
        "Trade-off between inference time and accuracy",
        "Layer | Method | Acc (%) | Time (ms) | FLOPs (G)",
        """
        N/A | w/o merging | 76.22 | 2.68 | 17.6
        6 | Max Pool. | 75.68 | 2.06 | 13.5
        6 | Avg. Pool. | 75.87 | 2.08 | 13.5
        6 | Bipartite soft matching | 76.03 | 2.12 | 13.5
        6 | Bipartite differentiable matching | 76.22 | 2.12 | 13.5
        4 | Max Pool. | 75.03 | 1.89 | 12.0
        4 | Avg. Pool. | 75.13 | 1.89 | 12.0
        4 | Bipartite soft matching | 75.40 | 1.92 | 12.0
        4 | Bipartite differentiable matching | 75.65 | 1.92 | 12.0
        2 | Max Pool. | 73.41 | 1.67 | 10.5
        2 | Avg. Pool. | 73.43 | 1.68 | 10.5
        2 | Bipartite soft matching | 73.95 | 1.71 | 10.5
        2 | Bipartite differentiable matching | 74.29 | 1.71 | 10.5
        1 | Max Pool. | 71.46 | 1.56 | 9.8
        1 | Avg. Pool. | 71.45 | 1.57 | 9.8
        1 | Bipartite soft matching | 71.06 | 1.58 | 9.8
        1 | Bipartite differentiable matching | 72.21 | 1.59 | 9.8
        0 | Max Pool. | 68.95 | 1.40 | 9.0
        0 | Avg. Pool. | 69.33 | 1.42 | 9.0
        0 | Bipartite soft matching | 67.39 | 1.44 | 9.0
        0 | Bipartite differentiable matching | 69.09 | 1.45 | 9.0
        """,
    ),
    "A4": _table(
        "Trade-off between inference time and accuracy",
        "Layer | Method | Acc (%) | Time (ms) | FLOPs (G)",
        """
        N/A | w/o merging | 77.01 | 2.77 | 17.7
        6 | Max Pool. | 76.65 | 2.13 | 13.5
        6 | Avg. Pool. | 76.79 | 2.14 | 13.5
        6 | Bipartite soft matching | 76.83 | 2.17 | 13.5
        6 | Bipartite differentiable matching | 76.96 | 2.17 | 13.5
        4 | Max Pool. | 76.06 | 1.92 | 12.0
        4 | Avg. Pool. | 76.22 | 1.91 | 12.0
        4 | Bipartite soft matching | 76.50 | 1.94 | 12.0
        4 | Bipartite differentiable matching | 76.34 | 1.94 | 12.0
        2 | Max Pool. | 74.26 | 1.71 | 10.5
        2 | Avg. Pool. | 74.66 | 1.71 | 10.5
        2 | Bipartite soft matching | 74.96 | 1.72 | 10.5
        2 | Bipartite differentiable matching | 75.18 | 1.71 | 10.5
        1 | Max Pool. | 72.23 | 1.58 | 9.8
        1 | Avg. Pool. | 72.41 | 1.59 | 9.8
        1 | Bipartite soft matching | 72.02 | 1.60 | 9.8
        1 | Bipartite differentiable matching | 73.00 | 1.60 | 9.8
        0 | Max Pool. | 69.68 | 1.51 | 9.0
        0 | Avg. Pool. | 70.31 | 1.52 | 9.0
        0 | Bipartite soft matching | 67.98 | 1.54 | 9.0
        0 | Bipartite differentiable matching | 69.75 | 1.53 | 9.0
        """,
    ),
    "A5": _table(
        "Accuracy on full CIFAR-100 and SVHN dataset",
        "Method | CIFAR-100 | SVHN",
        """
        AdaptFormer | 92.14 | 97.21
        FPET-AdaptFormer | 92.18 | 97.18
        LoRA | 92.17 | 97.45
        FPET-LoRA | 92.29 | 97.48
        """,
    ),
    "A6": _table(
        "Accuracy drop on other token reduction methods",
        "Method | LTMP | ToMe | Ours",
        """
        RepAdapter | -0.32 | -0.33 | -0.05
        LoRA | -0.32 | -0.32 | -0.12
        AdaptFormer | -0.58 | -0.34 | 0.00
        Bi-LoRA | -0.34 | -0.34 | -0.17
        Bi-AdaptFormer | -0.38 | -0.27 | -0.05
        """,
    ),
    "A7": _table(
        "Performance on cross-modal retrieval evaluated on Flickr30K",
        "Method | I2T R@1 | I2T R@5 | I2T R@10 | T2I R@1 | T2I R@5 | T2I R@10 | Training time (hr/epoch) | Mem (GB)",
        """
        UniAdapter | 94.2 | 99.5 | 99.7 | 83.6 | 96.6 | 98.2 | 1.09 | 44.96
        FPET-UniAdapter | 94.1 | 99.4 | 99.9 | 83.0 | 96.0 | 98.0 | 0.78(-28.44%) | 34.79(-22.62%)
        """,
    ),
    "A8": _table(
        "Hyper-parameters for our experiments",
        "optimizer | batch size | learning rate | weight decay | # epochs | lr decay | # warm-up epochs",
        """
        AdamW | 64 | 1e-3 | 1e-4 | 100 | cosine | 10
        """,
    ),
    "A9": _table(
        "Statistics of datasets",
        "Group | Dataset | # Classes | Train | Val | Test",
        """
        > VTAB-1K
        Natural | CIFAR100 | 100 | 800/1,000 | 200 | 10,000
        Natural | Caltech101 | 102 | 800/1,000 | 200 | 6,084
        Natural | DTD | 47 | 800/1,000 | 200 | 1,880
        Natural | Oxford-Flowers102 | 102 | 800/1,000 | 200 | 6,149
        Natural | Oxford-Pets | 37 | 800/1,000 | 200 | 3,669
        Natural | SVHN | 10 | 800/1,000 | 200 | 26,032
        Natural | Sun397 | 397 | 800/1,000 | 200 | 21,750
        Specialized | Patch Camelyon | 2 | 800/1,000 | 200 | 32,768
        Specialized | EuroSAT | 10 | 800/1,000 | 200 | 5,400
        Specialized | Resisc45 | 45 | 800/1,000 | 200 | 6,300
        Specialized | Retinopathy | 5 | 800/1,000 | 200 | 42,670
        Structured | Clever/count | 8 | 800/1,000 | 200 | 15,000
        Structured | Clever/distance | 6 | 800/1,000 | 200 | 15,000
        Structured | DMLab | 6 | 800/1,000 | 200 | 22,735
        Structured | KITTI-Dist | 4 | 800/1,000 | 200 | 711
        Structured | dSprites/location | 16 | 800/1,000 | 200 | 73,728
        Structured | dSprites/orientation | 16 | 800/1,000 | 200 | 73,728
        Structured | SmallNORB/azimuth | 18 | 800/1,000 | 200 | 12,150
        Structured | SmallNORB/elevation | 18 | 800/1,000 | 200 | 12,150
        > Few-shot learning
         | Food-101 | 101 | 1/2/4/8/16 per class | 20,200 | 30,300
         | Stanford Cars | 196 | 1/2/4/8/16 per class | 1,635 | 8,041
         | Oxford-Flowers102 | 102 | 1/2/4/8/16 per class | 1,633 | 2,463
         | FGVC-Aircraft | 100 | 1/2/4/8/16 per class | 3,333 | 3,333
         | Oxford-Pets | 37 | 1/2/4/8/16 per class | 736 | 3,699
        > Full datasets
         | CIFAR100 | 100 | 60,000 | - | 10,000
         | SVHN | 10 | 73,257 | - | 26,032
        """,
    ),
}
"""By number. Accuracies in percent; FLOPs are multiply-adds, in 10⁹; memory in 10⁹ bytes; layers count from 0."""
