"""Several tuned tasks on one frozen backbone, in one batch: :class:`MultiTask`.

>>> model = MultiTask(timm.create_model("vit_base_patch16_224", pretrained=True), {"cifar": "cifar.safetensors", "svhn": ...})
>>> cifar, svhn = model(images, tasks=["cifar", "svhn"])     # scores of two images, each by its own task

The batch is sorted by task once. The backbone then runs over all of it, and every place where a task has modules of its own
hands each task its slice.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fpet_kernels import Merged

from .adapters.attaching import act, transformer_blocks
from .adapters.freezing import head_modules, parameter_roles
from .files import modelfile, saving
from .layers.modules import BottleneckAdapter, FacTFactors, PETModule, Prompts
from .vit.block import convert
from .vit.config import MergeConfig
from .vit.merging import MergeStep
from .vit.patch import apply, find_model

__all__ = ["MultiTask"]

_REFUSED = ("bitfit", "full")

# How many images of each task the batch at hand has, in the order of the tasks. A context variable: threads may share a model.
_counts: ContextVar[tuple[int, ...]] = ContextVar("counts")


class MultiTask(nn.Module):
    """A backbone with the adapters, refinements and heads of several tasks, chosen image by image.

    For inference: it starts in evaluation mode. The backbone's parameters are shared with ``model``, which stays as it is and
    must not be folded or changed afterwards. Methods may differ between tasks; merging has to be the same, since the
    tokens of a batch are as many for all of its images, and so has the number of prompts. Threads may share it.

    Args:
        model: the bare backbone, a timm vision transformer with one head. tasks: by name, each either a file that
            :func:`fpet.save` wrote or a tuned model of the same backbone, which is copied.
        backend: of :func:`fpet_kernels.bdm_merge`; None takes the best one available.

    Raises:
        ValueError: no tasks; one for another backbone, or with weights folded into it; one whose method tunes the backbone
            itself ("bitfit", "full"); tasks that merge differently. The message names the task.
        TypeError: a model of another kind. OSError: a file can't be read.
    """

    def __init__(
        self, model: nn.Module, tasks: Mapping[str, str | os.PathLike[str] | nn.Module], *, backend: str | None = None
    ) -> None:
        super().__init__()
        if not tasks:
            raise ValueError("tasks: expected at least one, got none")
        if getattr(model, "adapter_config", None) is not None or getattr(model, "fpet_config", None) is not None:
            raise ValueError("model: expected a bare backbone, got one with adapters or merging; its tasks go into tasks")
        _head(model)
        tuned = {name: _tuned(model, name, source) for name, source in tasks.items()}
        self.tasks = tuple(tuned)
        self.heads = nn.ModuleList([_head(twin)[1] for twin in tuned.values()])
        self.model = _twin(model)
        setattr(self.model, _head(self.model)[0], nn.Identity())
        self._merge(tuned, backend)
        self._gather(list(tuned.values()))
        self.eval()

    def forward(self, images: Tensor, tasks: Sequence[str]) -> list[Tensor]:
        """Scores of every image: (classes of its task,) each.

        Args:
            images: (B, 3, H, W). tasks: the name of each one's task.
        """
        if len(tasks) != len(images):
            raise ValueError(f"tasks: expected a name for each of {len(images)} images, got {len(tasks)}")
        if unknown := sorted(set(tasks) - set(self.tasks)):
            raise ValueError(f"tasks: expected some of {', '.join(self.tasks)}, got {', '.join(map(repr, unknown))}")
        if not len(images):
            return []
        index = [self.tasks.index(name) for name in tasks]
        order = sorted(range(len(index)), key=index.__getitem__)
        counts = tuple(index.count(i) for i in range(len(self.tasks)))
        if order != list(range(len(order))):
            images = images[torch.tensor(order, device=images.device)]
        token = _counts.set(counts)
        try:
            features = self.model(images)
        finally:
            _counts.reset(token)
        scores: list[Tensor] = [features] * len(order)
        done = 0
        for head, part in zip(self.heads, features.split(counts), strict=True):
            if len(part):
                for row in head(part):
                    scores[order[done]] = row
                    done += 1
        return scores

    def _merge(self, tuned: dict[str, Any], backend: str | None) -> None:
        """Switches merging on as the tasks have it, and gives each its refinement."""
        configs = {name: _merging(twin) for name, twin in tuned.items()}
        first = next(iter(configs))
        for name, config in configs.items():
            if config != configs[first]:
                raise ValueError(f"tasks: {first!r} and {name!r} merge differently: {configs[first]}, {config}")
        config = configs[first]
        apply(
            self.model,
            config.layers,
            proportional_attention=config.proportional_attention or False,
            similarity=config.similarity,
            backend=backend,
        )
        for i in config.layers:
            refinements = [getattr(twin.blocks[i], "refinement", None) for twin in tuned.values()]
            block: Any = transformer_blocks(self.model)[i]
            block.task_refinements = nn.ModuleList([_Absent() if r is None else r for r in refinements])
            block.register_forward_pre_hook(_merge_by_task, with_kwargs=True)

    def _gather(self, tuned: list[Any]) -> None:
        """Puts the tasks' modules, place by place, where a single task has its one."""
        found: list[dict[str, PETModule]] = [
            {
                path: m
                for path, m in twin.named_modules()
                if isinstance(m, PETModule) and path.rpartition(".")[2] != "refinement"
            }
            for twin in tuned
        ]
        if len({_prompts(modules) for modules in found}) > 1:
            raise ValueError("tasks: expected the same number of prompts, which are tokens, for all of them")
        for block in transformer_blocks(self.model):
            convert(block)
        factors: list[nn.Module] = []  # FacT's modules hold them without owning them
        for path in dict.fromkeys(path for modules in found for path in modules):
            here = [modules.get(path) for modules in found]
            first = next(module for module in here if module is not None)
            if isinstance(first, FacTFactors):
                factors += [module for module in here if module is not None]
                continue
            parent_path, _, name = path.rpartition(".")
            parent, child = self.model.get_submodule(parent_path), _ByTask(here, first)
            setattr(parent, name, child)
            act(parent, name, child, first.acts, self.model)
        self.factors = nn.ModuleList(factors)


class _Absent(nn.Module):
    """Where a task has no module of its own."""


class _Slice(NamedTuple):
    """Attributes: task, its number; start and stop of its images in the batch."""

    task: int
    start: int
    stop: int


def _slices() -> list[_Slice]:
    """Of the tasks that are in the batch."""
    slices, start = [], 0
    for task, count in enumerate(_counts.get()):
        if count:
            slices.append(_Slice(task, start, start + count))
        start += count
    return slices


class _ByTask(PETModule):
    """One place's modules of all tasks: each sees its own images, those without a module pass."""

    def __init__(self, modules: Sequence[nn.Module | None], first: PETModule) -> None:
        super().__init__()
        self.added = first.acts in (None, "beside")  # to what is there; others take its place
        self.prefix_tokens = first.prefix_tokens
        self.by_task = nn.ModuleList([_Absent() if module is None else module for module in modules])
        for module in modules:
            if isinstance(module, PETModule):
                module.handle = None  # that of the model it came with
        widths = [m.adapter_up.weight.shape[0] for m in modules if isinstance(m, BottleneckAdapter)]
        self.width = widths[0] if widths else 1  # of zeros to add, where no task in the batch has a module

    def forward(self, x: Tensor) -> Tensor:
        slices = _slices()
        parts = [None if isinstance(m := self.by_task[s.task], _Absent) else m(x[s.start : s.stop]) for s in slices]
        if not self.added:
            return torch.cat([x[s.start : s.stop] if p is None else p for s, p in zip(slices, parts, strict=True)])
        like = next((part for part in parts if part is not None), None)
        if like is None:
            return x.new_zeros(1).expand(*x.shape[:-1], self.width)
        zeros = [like.new_zeros(1).expand(s.stop - s.start, *like.shape[1:]) for s in slices]
        return torch.cat([z if p is None else p for z, p in zip(zeros, parts, strict=True)])


class _MergeByTask(NamedTuple):
    """Stands in for a :class:`MergeStep`: merges each task's images by its own refinement."""

    step: MergeStep
    refinements: nn.ModuleList

    def merge(self, x: Tensor, key: Tensor, refinement: Any) -> Merged:
        parts = []
        for task, a, b in _slices():
            own: Any = self.refinements[task]
            size = None if self.step.size is None else self.step.size[a:b]
            parts.append(self.step._replace(size=size).merge(x[a:b], key[a:b], None if isinstance(own, _Absent) else own))
        return parts[0] if len(parts) == 1 else Merged(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _merge_by_task(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if kwargs.get("merge") is None:
        return args, kwargs
    return args, kwargs | {"merge": _MergeByTask(kwargs["merge"], module.task_refinements)}  # type: ignore[arg-type]


def _twin(model: nn.Module) -> Any:
    """A model of its own around the same parameters and buffers; the head is copied."""
    head = {id(p) for module in head_modules(model) for p in module.parameters()}
    shared = [p for p in model.parameters() if id(p) not in head] + list(model.buffers())
    return copy.deepcopy(model, {id(t): t for t in shared})


def _tuned(model: nn.Module, name: str, source: str | os.PathLike[str] | nn.Module) -> Any:
    """A task's model around the shared backbone."""
    if isinstance(source, nn.Module):
        config = getattr(source, "adapter_config", None)
        method = "none" if config is None else config.method
    else:
        header, _ = modelfile.read_file(Path(source))
        method = header["adapter"]["method"]
    if method in _REFUSED:
        raise ValueError(f"tasks: {name!r} was tuned by {method!r}, which changes the backbone that the others share")
    if not isinstance(source, nn.Module):
        try:
            return saving.load(_twin(model), source)
        except ValueError as error:
            raise ValueError(f"tasks: {name!r} does not fit: {error}") from error
    inner: Any = find_model(source)
    if hasattr(inner, "fpet_reduction"):
        raise ValueError(f"tasks: {name!r} reduces its tokens by a comparator; expected fpet.apply or nothing")
    if saving.backbone_hash(source) != saving.backbone_hash(model):
        raise ValueError(f"tasks: {name!r} has another backbone, or weights folded into it")
    roles, own = parameter_roles(source), dict(model.named_parameters())
    shared = {id(p): own[name] for name, p in source.named_parameters() if roles[name] == "backbone"}
    return copy.deepcopy(source, shared)


def _head(model: Any) -> tuple[str, nn.Module]:
    """Name and module of the only head."""
    heads = head_modules(model)
    names = [name for name, module in model.named_children() if len(heads) == 1 and module is heads[0]]
    if len(names) != 1:
        raise TypeError(f"model: expected a vision transformer with one head, got {type(model).__name__} with {len(heads)}")
    return names[0], heads[0]


def _merging(model: Any) -> MergeConfig:
    config = getattr(model, "fpet_config", None)
    if config is None or not config.layers:
        return MergeConfig()
    return MergeConfig(config.layers, config.proportional_attention, config.similarity)


def _prompts(modules: dict[str, PETModule]) -> tuple[tuple[str, int], ...]:
    return tuple((path, m.tokens.shape[1]) for path, m in modules.items() if isinstance(m, Prompts))
