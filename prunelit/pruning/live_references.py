"""Who in a job still holds weights that a cut has replaced: they would be trained, averaged or read in vain.

A cut puts new parameters in place of old ones, and takes whole modules away. The job goes on without an error if an
optimiser holds the old ones. So they are watched through weak references, and looked for when all of the job is built.

Only *shared* weights are outdated. A copy of the dense model, such as a teacher or a target network, is a model of its
own, which a job may want dense. One that follows the cut model is refused by torch itself at its first update, because
its shapes are others; where its name or type says that it is an average, it is refused here, before training.
"""

import gc
import itertools
import re
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from prunelit.runtime.errors import StaleReference

_DEPTH = 4  # of containers and objects in an attribute
_MOST_VISITED = 100_000  # objects in an attribute; a job's data may be among them
_FIRST_ITEMS = 8  # of a sequence: where all of them are of these types, it holds data
_TYPES_OF_DATA = (int, float, complex, str, bytes, type(None))
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)
_NOT_SEARCHED = (type, types.ModuleType, types.FunctionType, str, bytes, Trainer, LightningModule, LightningDataModule)
_NAME_OF_AVERAGE = re.compile(r"ema(?![a-z])|averag|avg|swa(?![a-z])|shadow", re.IGNORECASE)


class WatchedModel:
    """The parameters and modules of a model as it is now; later it tells which of them were replaced.

    Args:
        model: about to be cut.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> watched, old = WatchedModel(model), model[0].weight
        >>> model[0].weight = nn.Parameter(torch.zeros(1, 2))
        >>> [name for name, _ in watched.list_replaced()]
        ['0.weight']
    """

    def __init__(self, model: nn.Module):
        self.model = weakref.ref(model)
        self.parameter_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._references: list[tuple[str, weakref.ref[Any]]] = [
            (name, weakref.ref(value)) for name, value in (*model.named_parameters(), *model.named_modules())
        ]

    def list_replaced(self) -> list[tuple[str, Any]]:
        """List the parameters and modules that are no longer part of the model but still held by somebody."""
        model = self.model()
        if model is None:
            return []
        live = {id(value) for value in (*model.parameters(), *model.modules())}
        values = ((name, reference()) for name, reference in self._references)
        return [(name, value) for name, value in values if value is not None and id(value) not in live]


def check_references(trainer: Trainer, pl_module: LightningModule, watched: WatchedModel) -> None:
    """Check that optimisers, averaged models and attributes of a job hold the parameters of the cut model.

    Args:
        trainer: with its optimisers built.
        pl_module: holds the cut model.
        watched: the model before the cut.

    Raises:
        StaleReference: something holds what the cut has replaced; says what, and what to do.

    Example:
        See `PruningCallback.on_fit_start`, which calls it.
    """
    replaced = _list_replaced_by_id(watched)
    owners = list(_list_owners(trainer, pl_module))
    _check_attributes(owners, replaced, registered=True)  # first, because optimisers are made of them
    for optimizer in trainer.optimizers:
        names = [replaced[id(p)][0] for p in _list_optimizer_parameters(optimizer) if id(p) in replaced]
        if names:
            raise StaleReference(
                f"optimizer {type(optimizer).__name__}: expected the parameters of the cut model, got {len(names)} "
                f"that the cut has replaced, such as {names[0]}, so that the cut layers would never learn; build it in "
                "configure_optimizers, which is called after the cut"
            )
    _check_averages(trainer, pl_module, watched)
    _check_attributes(owners, replaced, registered=False)


def check_attributes(watched: WatchedModel, pl_module: LightningModule, trainer: Trainer | None = None) -> None:
    """Check that the attributes of a job hold parameters and modules of the cut model; a part of `check_references`.

    Args:
        watched: the model before the cut.
        pl_module: holds the cut model.
        trainer: of the job, where there is one.

    Raises:
        StaleReference: something holds what the cut has replaced; says what, and what to do.

    Example:
        See `prunelit.pruning.restore`, which calls it.
    """
    replaced = _list_replaced_by_id(watched)
    for registered in (True, False):
        _check_attributes(list(_list_owners(trainer, pl_module)), replaced, registered)


def _list_replaced_by_id(watched: WatchedModel) -> dict[int, tuple[str, Any]]:
    return {id(value): (name, value) for name, value in watched.list_replaced()}


def _check_attributes(
    owners: Sequence[tuple[str, Any]], replaced: Mapping[int, tuple[str, Any]], registered: bool
) -> None:
    """Check attributes: either those that are registered as parameters and modules, or the others.

    Raises:
        StaleReference: one holds what was replaced.
    """
    for owner_name, owner in owners if replaced else ():
        for attribute, value in vars(owner).items():
            if registered != (attribute in ("_modules", "_parameters")):
                continue
            for key, item in value.items() if registered else ((attribute, value),):
                if (name := _find_replaced(item, replaced, _DEPTH, set())) is not None:
                    raise StaleReference(
                        f"{owner_name}.{key}: expected parameters or modules of the cut model, got {name} of before "
                        "the cut; take it from the model when it is used, or set it in the module's setup"
                    )


def list_averaging_callbacks(callbacks: Iterable[Callback]) -> list[Callback]:
    """List the callbacks that copy the whole model in their `setup`.

    Example:
        >>> list_averaging_callbacks([Callback()])
        []
    """
    return [callback for callback in callbacks if isinstance(callback, WeightAveraging | StochasticWeightAveraging)]


def list_optimizers_of(model: nn.Module) -> list[tuple[Any, str]]:
    """List the live optimisers, whoever holds them, that were built on parameters of a model, with a name of these.

    Args:
        model: about to be cut.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD(model.parameters())
        >>> [(found is optimizer, name) for found, name in list_optimizers_of(model)]
        [(True, 'weight')]
    """
    return _list_optimizers_with({id(value): (name, value) for name, value in model.named_parameters()})


def list_stale_optimizers(watched: WatchedModel) -> list[tuple[Any, str]]:
    """List the live optimisers that hold parameters which a cut has replaced, with a name of these.

    Example: see `prunelit.pruning.one_call`, which uses it.
    """
    return _list_optimizers_with(_list_replaced_by_id(watched))


def _list_optimizers_with(names: Mapping[int, tuple[str, Any]]) -> list[tuple[Any, str]]:
    if not names:
        return []
    # By the type alone: asking isinstance would run the code of proxies among the objects.
    live = [each for each in gc.get_objects() if issubclass(type(each), torch.optim.Optimizer)]
    held = ((each, next((p for p in _list_optimizer_parameters(each) if id(p) in names), None)) for each in live)
    return [(each, names[id(parameter)][0]) for each, parameter in held if parameter is not None]


def _list_optimizer_parameters(optimizer: Any) -> list[Tensor]:
    return [parameter for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]]


def _list_owners(trainer: Trainer | None, pl_module: LightningModule) -> Iterator[tuple[str, Any]]:
    """The objects whose attributes are searched; not transformers models: a teacher may share the dense weights."""
    from transformers import PreTrainedModel

    models: list[str] = []
    for path, module in pl_module.named_modules():
        if any(path.startswith(f"{model}.") for model in models):
            continue
        if isinstance(module, PreTrainedModel):
            models.append(path)
        else:
            yield ".".join(filter(None, (type(pl_module).__name__, path))), module
    for callback in getattr(trainer, "callbacks", ()):
        yield type(callback).__name__, callback
    if (data := getattr(trainer, "datamodule", None)) is not None:
        yield type(data).__name__, data


def _find_replaced(value: Any, replaced: Mapping[int, tuple[str, Any]], depth: int, visited: set[int]) -> str | None:
    """Name of what `value` is or holds of the replaced; None where it holds nothing of them."""
    if id(value) in replaced:
        return replaced[id(value)][0]
    if isinstance(value, (*_NOT_SEARCHED, *_TYPES_OF_DATA)) or id(value) in visited or depth == 0:
        return None
    if len(visited) == _MOST_VISITED:
        return None
    visited.add(id(value))
    items: Iterable[Any] = ()
    if isinstance(value, dict):  # the items of other mappings may be read from files or the network
        items = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        first_items = list(itertools.islice(value, _FIRST_ITEMS))
        items = () if all(isinstance(item, _TYPES_OF_DATA) for item in first_items) else value
    elif isinstance(value, _CONTAINERS):
        items = [*value.children(), *value.parameters(recurse=False)]
    elif isinstance(value, torch.optim.Optimizer):
        items = _list_optimizer_parameters(value)
    elif isinstance(value, types.MethodType):
        items = (value.__self__,)
    elif not isinstance(value, nn.Module | Tensor) and not type(value).__module__.startswith("lightning."):
        items = list(getattr(value, "__dict__", {}).values())
    names = (_find_replaced(item, replaced, depth - 1, visited) for item in items)
    return next((name for name in names if name is not None), None)


def _check_averages(trainer: Trainer, pl_module: LightningModule, watched: WatchedModel) -> None:
    """Check the shapes of averaged models, in callbacks and in the module.

    Raises:
        StaleReference: one was copied before the cut.
    """
    model_path = next((path for path, module in pl_module.named_modules() if module is watched.model()), "")
    prefix = f"{model_path}." if model_path else ""
    live = {name: parameter.shape for name, parameter in pl_module.named_parameters(remove_duplicate=False)}
    dense_names = {prefix + name for name in watched.parameter_names}
    if dense_names.isdisjoint(live):  # adapters or a sharding strategy have given all of them other names
        return
    owners: list[Any] = [*trainer.callbacks, pl_module]  # type: ignore[attr-defined]
    for owner in owners:
        attributes = vars(owner) | vars(owner).get("_modules", {})
        for attribute, value in attributes.items():
            if not _is_average(attribute, value, pl_module):
                continue
            for name, shape in _list_shapes(value):
                names = (name, prefix + name)
                outdated = any(live[n] != shape if n in live else n in dense_names for n in names)
                if outdated:
                    raise StaleReference(
                        f"{type(owner).__name__}.{attribute}: expected a copy of the cut model, got {name} of shape "
                        f"{list(shape)}, copied before the cut; "
                        + (
                            "build it in setup"
                            if owner is pl_module
                            else f"put {type(owner).__name__} after the pruning callback in trainer.callbacks"
                        )
                    )


def _is_average(attribute: str, value: Any, pl_module: LightningModule) -> bool:
    """Whether an attribute holds an average, by type or name: other copies may be dense, such as a teacher."""
    if isinstance(value, AveragedModel):
        return True
    named = _NAME_OF_AVERAGE.search(attribute) is not None
    return named and isinstance(value, nn.Module | dict) and value is not pl_module


def _list_shapes(value: Any) -> Iterator[tuple[str, Any]]:
    """Names and shapes of the parameters of a copy, or of the tensors of a state dict."""
    named = value.named_parameters(remove_duplicate=False) if isinstance(value, nn.Module) else value.items()
    for name, tensor in named:
        if isinstance(name, str) and isinstance(tensor, Tensor):
            yield name.removeprefix("module."), tensor.shape
