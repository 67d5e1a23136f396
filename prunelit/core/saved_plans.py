"""The plans of a cut model in the state dict of whoever holds the model, so that a checkpoint says how it was cut.

They are one more entry of the state dict. Its name is a sentence, because torch prints the names of entries that it
does not expect: whoever loads a cut checkpoint into a dense model, in a process that knows nothing of prunelit, reads
what happened and what to do.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from prunelit.core.plan import PruningPlan

_MARK_START = "this checkpoint was cut by prunelit: "
CUT_MARK = _MARK_START + (
    "bring its shapes back with prunelit.restore(module, checkpoint), or add its pruning callback to trainer.callbacks"
)
"""Name of the entry that holds the plans."""


def is_cut_mark(name: str) -> bool:
    """Whether an entry of a state dict is that of the plans, also as an earlier version named it.

    Example:
        >>> is_cut_mark(CUT_MARK), is_cut_mark("model.layers.0.mlp.weight")
        (True, False)
    """
    return name.startswith(_MARK_START)


def mark_state_dicts(module: Any, plans: Mapping[str, PruningPlan]) -> None:
    """Let the state dicts of a module hold the plans by which a model in it was cut; loading one skips them again.

    Copies of the module do the same, such as the averaged model of a callback.

    Args:
        module: an `nn.Module` that checkpoints are made of; nothing happens the second time.
        plans: the live ones of a model in it, see `prunelit.core.plan.get_applied_plans`.

    Example:
        >>> import torch
        >>> module = torch.nn.Linear(2, 2)
        >>> mark_state_dicts(module, {})
        >>> list(module.state_dict())
        ['weight', 'bias']
    """
    if "_prunelit_saved_plans" not in vars(module):
        module.register_state_dict_post_hook(_add_mark)
        module.register_load_state_dict_pre_hook(_remove_mark)
    vars(module)["_prunelit_saved_plans"] = plans


def _add_mark(module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    import torch

    if plans := vars(module)["_prunelit_saved_plans"]:
        text = json.dumps([plan.to_json() for plan in plans.values()])
        # A tensor, because that is what other programs expect of a state dict.
        state_dict[prefix + CUT_MARK] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _remove_mark(module: Any, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    for name in [name for name in state_dict if name.startswith(prefix) and is_cut_mark(name.removeprefix(prefix))]:
        del state_dict[name]


def list_saved_plans(checkpoint: Mapping[str, Any]) -> list[PruningPlan]:
    """List the plans by which the model of a checkpoint was cut, the first cut first; empty where there was none.

    Args:
        checkpoint: of Lightning, or a state dict alone.

    Raises:
        BadPlan: what stands there is no plan.

    Example:
        >>> list_saved_plans({"state_dict": {}, "callbacks": {}})
        []
    """
    state = checkpoint.get("state_dict", checkpoint)
    for name, value in state.items() if isinstance(state, Mapping) else ():
        if isinstance(name, str) and is_cut_mark(name):
            return _parse_plans(json.loads(bytes(value.tolist()).decode()))
    states = checkpoint.get("callbacks")
    for saved in states.values() if isinstance(states, Mapping) else ():
        if isinstance(saved, Mapping) and isinstance(saved.get("plan"), str):
            return _parse_plans([*(saved.get("earlier_plans") or ()), saved["plan"]])
    return []


def _parse_plans(texts: Iterable[str]) -> list[PruningPlan]:
    return [PruningPlan.from_json(text) for text in texts]
