"""FSDP2: parameters, gradients and optimiser shared out between processes; whole tensors wherever they are written or read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["assign", "distributed_optimizer_state", "full", "full_optimizer_state", "shard", "synchronize"]


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """:func:`torch.distributed.fsdp.fully_shard` of each block, then of the rest. Returns model.

    Raises:
        RuntimeError: this torch can't do it over this process group; found out on two small layers.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    _rehearse(mesh, device)
    blocks: Any = model.blocks
    for module in (*blocks, model):
        # The root too is shared out again after each forward, or it would compute with what it had before a copy_.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return model


def _rehearse(mesh: DeviceMesh, device: torch.device) -> None:
    with torch.random.fork_rng(devices=[]):
        layers = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).to(device)
    layers[0].requires_grad_(False)
    try:
        for module in (*layers, layers):
            fully_shard(module, mesh=mesh)
        layers(torch.ones(1, 3, device=device)).sum().backward()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        backend = dist.get_backend()
        raise RuntimeError(
            f"parallel: FSDP2 over {backend} does not run in torch {torch.__version__} ({error}); use 'ddp'"
        ) from error


def synchronize(model: nn.Module, on: bool) -> None:
    """Whether the next backward brings the processes' gradients together, of a sharded model."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, detached; every process has to ask for it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Writes the whole ``value`` into a parameter, sharded or not; every process has to."""
    parameter.copy_(_like(parameter, value))


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def full_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state_dict with whole tensors, as an optimiser over an unsharded model has it; every process has to ask for it."""
    found = optimizer.state_dict()
    states = {i: {k: full(v) if isinstance(v, Tensor) else v for k, v in s.items()} for i, s in found["state"].items()}
    return found | {"state": states}


def distributed_optimizer_state(state: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """What :func:`full_optimizer_state` gave, sharded as ``parameters`` are, which are in the optimiser's order."""
    states = {
        i: {k: _like(parameters[i], v) if isinstance(v, Tensor) else v for k, v in s.items()} for i, s in state["state"].items()
    }
    return state | {"state": states}
