"""Training all weights in several processes that each keep a shard of them: FSDP
(`torch.distributed.fsdp.fully_shard`).

Weights, gradients and AdamW's moments are spread over the processes; a layer's weights are whole
only while it computes. The model of the run itself stays as it is, without its weights' memory:
they come back for what the leader alone does (validation, checkpoints) and at the end of the stage,
so nothing else in the package meets a shard.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import MethodType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from edgetune.data.batching import Batch
from edgetune.objectives.language import Objective
from edgetune.training.parallel.distributed import Group


class Stateful(Protocol):
    """An optimizer, or what stands for one where its state is written down."""

    def state_dict(self) -> dict[str, Any]:
        """As of `torch.optim.Optimizer`."""


class Whole:
    """An optimizer's state with every tensor whole, as a single process has it."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        """The state."""
        return self._state


class Shards:
    """A stage's model in shards: `model` is what learns, `whole` the run's own, which is empty
    meanwhile.

    Every method but `loss` must be called by all processes.
    """

    def __init__(self, whole: nn.Module, group: Group, device: torch.device) -> None:
        self.whole, self._group = whole, group
        self._mesh = init_device_mesh(device.type, (group.size,))
        self.model = cast(Any, copy.deepcopy(whole))
        for layer in layers_of(self.model):
            fully_shard(layer, mesh=self._mesh, reshard_after_forward=True)
        fully_shard(self.model, mesh=self._mesh)
        for module in self.model.modules():
            if isinstance(
                module, FSDPModule
            ):  # gradients are sums, as in `Group.add_gradients`; gloo scales none itself
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)
        # An objective may use the model's parts instead of calling it: weights must be whole for
        # all of it.
        self.model.loss_of = MethodType(_loss_of, self.model)
        register_fsdp_forward_method(self.model, "loss_of")
        self._empty()

    def loss(self, objective: Objective, batch: Batch) -> tuple[Tensor, int]:
        """`objective` of the sharded model; as often in every process, or the others wait for ever
        (see `even`).
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
            result: tuple[Tensor, int] = self.model.loss_of(objective, batch)
        return result

    def even(self, parts: Sequence[Batch], spare: Batch) -> list[Batch]:
        """The parts of a step, as many as the process with the most has: filled up with parts that
        count nothing.
        """
        most = max(self._group.gathered(len(parts)))
        filling = (
            replace(parts[0] if parts else spare, targets=0, weight=None)
            if len(parts) < most
            else None
        )
        return [*parts, *([filling] if filling is not None else []) * (most - len(parts))]

    def give_back(self, *, to_all: bool = False) -> None:
        """Put the weights as they are now into `whole`, in the leader or in all processes."""
        for ours, theirs in self._pairs():
            full = _whole(ours.detach())
            if to_all or self._group.leads:
                theirs.data = full

    def take_back(self) -> None:
        """After `give_back`: free that memory again."""
        self._empty()

    def state_of(self, optimizer: torch.optim.Optimizer) -> Whole:
        """The optimizer's state with whole tensors."""
        found = optimizer.state_dict()
        state = {
            key: {name: _whole(value) for name, value in entry.items()}
            for key, entry in found["state"].items()
        }
        return Whole({**found, "state": state})

    def spread(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """What `state_of` made, with this process's shard of each tensor, for
        `optimizer.load_state_dict`.
        """
        places = [parameter for group in optimizer.param_groups for parameter in group["params"]]

        def mine(value: Any, parameter: Any) -> Any:
            if (
                not isinstance(value, Tensor)
                or value.shape != parameter.shape
                or not isinstance(parameter, DTensor)
            ):
                return value
            return distribute_tensor(
                value.to(parameter.device), self._mesh, parameter.placements, src_data_rank=None
            )

        spread = {
            key: {name: mine(value, places[key]) for name, value in entry.items()}
            for key, entry in state["state"].items()
        }
        return {**state, "state": spread}

    def _empty(self) -> None:
        for _, theirs in self._pairs():
            theirs.data = torch.empty(0, device=theirs.device, dtype=theirs.dtype)

    def _pairs(self) -> Iterator[tuple[Any, nn.Parameter]]:
        yield from zip(self.model.parameters(), self.whole.parameters(), strict=True)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The transformer's layers: the longest list of modules of one class that has weights; none
    where there is no list.
    """
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    fitting = [
        layers
        for layers in lists
        if len({type(layer) for layer in layers}) == 1 and any(True for _ in layers[0].parameters())
    ]
    return max(fitting, key=len, default=[])


def norm_of(parameters: Sequence[nn.Parameter], *, at_most: float) -> float:
    """Clip the gradients' norm over all weights, sharded ones too; the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, at_most)
    return float(_whole(norm))


def _loss_of(model: Any, objective: Objective, batch: Batch) -> tuple[Tensor, int]:
    return objective(model, batch)


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value
