"""Optimizers: fused into the backward pass for tables, AdamW for the rest, as one object."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec import optim as fused
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper, OptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.run import StageConfig, TableOptimizer

_FUSED: dict[TableOptimizer, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": fused.RowWiseAdagrad,
    "adagrad": fused.Adagrad,
    "sgd": fused.SGD,
    "adam": fused.Adam,
    "partial_rowwise_adam": fused.PartialRowWiseAdam,
    "lamb": fused.LAMB,
}
# What updates a data-parallel table by the same rule, on dense gradients.
_DENSE: dict[TableOptimizer, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": fused.RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
}
ON_CPU: tuple[TableOptimizer, ...] = ("rowwise_adagrad", "adagrad", "sgd")
"""Those that CPU kernels know."""
_MATRICES = ("weight", "interaction", "decoder", "query", "kernels", "V_kernels", "W_kernels")
"""How parameters that multiply vectors are called; a list's members by the name of the list."""


def attach_table_optimizer(
    tables: EmbeddingBagCollection,
    name: TableOptimizer,
    stage: StageConfig,
    device_type: str,
) -> None:
    """Makes the backward pass update the tables. Call before planning and sharding.

    Row-wise Adagrad keeps one accumulator per row *of a shard*, so a column-wise table trains slightly
    differently than a table that is not cut into columns.

    Args:
        tables: on `meta`.
        name: which optimizer.
        stage: learning rate, epsilon, and `max_grad_norm`, to which every component of a looked-up
            vector's gradient is clamped before the rows' gradients are summed.
        device_type: `cpu` or `cuda`.

    Raises:
        ConfigError: the device's kernels lack this optimizer.
    """
    if device_type == "cpu" and name not in ON_CPU:
        raise ConfigError(
            f"train.table_optimizer: {name} has no CPU kernel; use one of {', '.join(ON_CPU)}, or "
            "distributed.device: cuda"
        )
    settings = _settings(name, stage)
    if stage.max_grad_norm is not None:
        settings.update(gradient_clipping=True, max_gradient=stage.max_grad_norm)
    apply_optimizer_in_backward(_FUSED[name], tables.parameters(), settings)


def _settings(name: TableOptimizer, stage: StageConfig) -> dict[str, Any]:
    """What fused and data-parallel optimizers are both given, so that both do the same."""
    settings: dict[str, Any] = {"lr": stage.table_lr}
    if name != "sgd":
        settings["eps"] = stage.table_eps
    return settings


def make_optimizer(
    model: DistributedModelParallel,
    stage: StageConfig,
    table_optimizer: TableOptimizer,
    difficulty_lr: float,
) -> CombinedOptimizer:
    """One optimizer over all parameters that train, its state allocated.

    Tables are updated by their fused optimizer in the backward pass (data-parallel tables here, by the
    same rule, but clamped after summation), difficulty scalars by plain SGD at a rate that no schedule
    touches, the rest by AdamW with decoupled decay on `matrices` only.

    Args:
        model: the sharded model.
        stage: learning rates, decay and clipping.
        table_optimizer: what `attach_table_optimizer` attached.
        difficulty_lr: step size of parameters whose name ends in `difficulty`.

    Raises:
        ConfigError: a data-parallel table with an optimizer that exists fused only.
    """
    replicated, difficulty, dense = _split(model)
    parts: list[KeyedOptimizer] = [model.fused_optimizer]
    if replicated:
        parts.append(_replicated_tables_optimizer(replicated, stage, table_optimizer))
    if difficulty:
        parts.append(
            KeyedOptimizerWrapper(difficulty, lambda values: _difficulty_optimizer(values, difficulty_lr))
        )
    if dense:
        parts.append(_dense_optimizer(dense, matrices(model, dense), stage))
    return CombinedOptimizer(parts)


def matrices(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """Names of the parameters that weight decay shrinks: the matrices of linear and bilinear maps.

    A shape does not tell them: biases, gains and mask vectors of all fields are [F, D], too. The last part
    of the name does. A new module calls its matrices `weight` or adds their name to `_MATRICES`; what has
    another name is not decayed. Nor is an `nn.Embedding`, whose rows are vectors.

    Args:
        model: holds the parameters.
        parameters: by name.
    """
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    rows = {id(embedding.weight) for embedding in embeddings}
    return {
        name
        for name, parameter in parameters.items()
        if parameter.ndim >= 2 and _own_name(name) in _MATRICES and id(parameter) not in rows
    }


def _own_name(name: str) -> str:
    """The last part of a parameter's name that is no index into a list."""
    return next((part for part in reversed(name.split(".")) if not part.isdigit()), name)


class GatedOptimizer(OptimizerWrapper):
    """An optimizer that sits out the steps for which the gate is closed: no weight and no state changes.

    Tables with a fused optimizer were updated in the backward pass and are not its business; who closes
    the gate sees to their gradients.
    """

    def __init__(self, optimizer: KeyedOptimizer, is_open: Callable[[], bool]) -> None:
        """Args:
        optimizer: takes the other steps; keys and groups stay its own.
        is_open: asked once a step, after the backward pass; must answer alike on every rank.
        """
        super().__init__(optimizer)
        self._is_open = is_open

    def step(self, closure: Any = None) -> None:
        """One step, or none."""
        if self._is_open():
            super().step(closure)


def _split(model: DistributedModelParallel) -> tuple[dict[str, nn.Parameter], ...]:
    """The trained parameters without a fused optimizer: replicated tables, difficulty, all others."""
    tables, difficulty, dense = {}, {}, {}
    for name, parameter in in_backward_optimizer_filter(model.named_parameters()):
        if not parameter.requires_grad:
            continue
        if ".embedding_bags." in f".{name}":
            tables[name] = parameter
        elif name.endswith("difficulty"):
            difficulty[name] = parameter
        else:
            dense[name] = parameter
    return tables, difficulty, dense


def _difficulty_optimizer(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": parameters, "name": "difficulty", "scheduled": False}], lr=lr)


def _replicated_tables_optimizer(
    tables: dict[str, nn.Parameter], stage: StageConfig, name: TableOptimizer
) -> KeyedOptimizer:
    if name not in _DENSE:
        raise ConfigError(
            f"train.table_optimizer: {name} cannot train data-parallel tables ({', '.join(sorted(tables))}); "
            f"take data_parallel off distributed.tables, or use one of {', '.join(_DENSE)}"
        )
    settings = _settings(name, stage)
    optimizer = KeyedOptimizerWrapper(tables, lambda values: _DENSE[name](values, **settings))
    _allocate_state(optimizer)
    if stage.max_grad_norm is None:
        return optimizer
    return GradientClippingOptimizer(optimizer, GradientClipping.VALUE, stage.max_grad_norm)


def _dense_optimizer(
    parameters: dict[str, nn.Parameter], decayed: set[str], stage: StageConfig
) -> KeyedOptimizer:
    def adamw(values: list[nn.Parameter]) -> torch.optim.Optimizer:
        named = list(zip(parameters, values, strict=True))
        groups = [
            {"params": [p for name, p in named if name in decayed], "weight_decay": stage.weight_decay},
            {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
        ]
        filled = [{**group, "name": "dense"} for group in groups if group["params"]]
        return torch.optim.AdamW(filled, lr=stage.dense_lr, fused=True)

    optimizer = KeyedOptimizerWrapper(parameters, adamw)
    _allocate_state(optimizer)
    if stage.max_grad_norm is None:
        return optimizer
    return GradientClippingOptimizer(optimizer, GradientClipping.NORM, stage.max_grad_norm)


def _allocate_state(optimizer: KeyedOptimizerWrapper) -> None:
    """Makes the state that a first step would make, without a step: a checkpoint loads into it."""
    groups: list[dict[str, Any]] = list(optimizer.param_groups)
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0  # else the zero-gradient step decays the weights
    optimizer.init_state()
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()
    optimizer.zero_grad(set_to_none=True)
