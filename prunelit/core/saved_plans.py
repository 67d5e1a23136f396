"""The plans of a cut model in the checkpoints of whoever holds the model, so that a checkpoint says how it was cut.

They are one more entry of a checkpoint's state dict, and of no other state dict: jobs calculate with those. Its name is
a sentence, because torch prints the names of entries that it does not expect: whoever loads a cut checkpoint into a
dense model, in a process that knows nothing of prunelit, reads what happened and what to do.
"""

import json
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from prunelit.core.plan import PruningPlan
from prunelit.runtime.errors import BadPlan

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


def mark_checkpoints(module: Any, plans: Mapping[str, PruningPlan]) -> None:
    """Let the checkpoints of a module hold the plans by which a model in it was cut; loading one skips them again.

    Lightning calls a module's `on_save_checkpoint` last, and for every checkpoint: also for one of weights alone, where
    it leaves callbacks out. Copies of the module do the same.

    Args:
        module: a LightningModule; nothing happens the second time.
        plans: the live ones of a model in it, see `prunelit.core.plan.get_applied_plans`.

    Example:
        >>> from lightning.pytorch import LightningModule
        >>> module = LightningModule()
        >>> mark_checkpoints(module, {})
        >>> module.on_save_checkpoint(checkpoint := {"state_dict": {}})
        >>> checkpoint
        {'state_dict': {}}
    """
    attributes = vars(module)
    if "_prunelit_saved_plans" not in attributes:
        module.register_load_state_dict_pre_hook(_remove_mark)
        # A partial is copied and pickled with the module; a closure would go on with the module that it was made for.
        attributes["on_save_checkpoint"] = partial(_save_marked, module, attributes.get("on_save_checkpoint"))
    attributes["_prunelit_saved_plans"] = plans


def refuse_missing_weights(checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of adapters alone that sit on weights which a repair has changed: those are not in it.

    Args:
        checkpoint: its content, known to hold no weights of the decoder itself.

    Raises:
        BadPlan: one of its pruning callbacks has repaired weights.

    Example:
        >>> refuse_missing_weights({"callbacks": {"LLMBIP": {"cut_weights": None}}})
    """
    states = [state for state in checkpoint.get("callbacks", {}).values() if isinstance(state, dict)]
    if any(state.get("cut_weights") for state in states):
        raise BadPlan(
            "checkpoint: its adapters sit on repaired weights, which it does not hold; load it with a Trainer that has "
            "the pruning callback and the default_root_dir of that run, or load the model that fit has saved"
        )


def _save_marked(module: Any, own_hook: Any, checkpoint: dict[str, Any]) -> None:
    if own_hook is None:
        type(module).on_save_checkpoint(module, checkpoint)
    else:
        own_hook(checkpoint)
    attributes = vars(module)
    plans, state = list(attributes["_prunelit_saved_plans"].values()), checkpoint.get("state_dict")
    if plans and isinstance(state, dict):
        written_plans, content = attributes.get("_prunelit_mark", ([], None))
        if [id(plan) for plan in written_plans] != [id(plan) for plan in plans]:
            content = _write_mark(plans)
            attributes["_prunelit_mark"] = plans, content
        state[CUT_MARK] = content


def _write_mark(plans: Iterable[PruningPlan]) -> Any:
    """A tensor, because that is what other programs expect of a state dict."""
    import torch

    text = json.dumps([plan.to_json() for plan in plans])
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _remove_mark(module: Any, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    for name in [name for name in state_dict if name.startswith(prefix) and is_cut_mark(name.removeprefix(prefix))]:
        del state_dict[name]


def list_saved_plans(checkpoint: Mapping[str, Any]) -> list[PruningPlan]:
    """List the plans by which the model of a checkpoint was cut, the first cut first; empty where there was none.

    Args:
        checkpoint: of Lightning, or its state dict alone.

    Raises:
        BadPlan: what stands there is no plan.

    Example:
        >>> list_saved_plans({"state_dict": {}, "callbacks": {}})
        []
    """
    try:
        return _parse_plans(_list_plan_texts(checkpoint))
    except BadPlan:
        raise
    except Exception as error:  # anything may stand there
        raise BadPlan(
            f"checkpoint: expected plans of prunelit in it, got something else ({type(error).__name__}); it was not "
            "written by a pruning callback, or was changed since: give another one"
        ) from error


def _list_plan_texts(checkpoint: Mapping[str, Any]) -> Iterable[str]:
    state = checkpoint.get("state_dict", checkpoint)
    for name, value in state.items():
        if isinstance(name, str) and is_cut_mark(name):
            texts = json.loads(bytes(map(int, value.tolist())).decode())  # of floats, if all became such
            if not isinstance(texts, list) or not texts:
                raise TypeError("no list of plans")
            return texts
    for saved in checkpoint.get("callbacks", {}).values():
        if is_pruner_state(saved):
            return [*(saved.get("earlier_plans") or ()), saved["plan"]]
    return []


def is_pruner_state(state: Any) -> bool:
    """Whether a callback's state in a checkpoint is that of a pruning callback which has cut.

    Others may hold something else that they call a plan.

    Example:
        >>> is_pruner_state({"plan": "weekly"}), is_pruner_state({"plan": "{}", "repaired": None, "cut_weights": None})
        (False, True)
    """
    return isinstance(state, Mapping) and bool(state.get("plan")) and {"repaired", "cut_weights"} <= state.keys()


def get_pruner_state(checkpoint: Mapping[str, Any], state_key: str) -> dict[str, Any]:
    """Get what a pruning callback has stored in a checkpoint; empty where there is nothing of it.

    Args:
        checkpoint: of Lightning.
        state_key: of the callback.

    Raises:
        BadPlan: something else stands there.

    Example:
        >>> get_pruner_state({"callbacks": {"LLMBIP": {"plan": None}}}, "LLMBIP")
        {'plan': None}
    """
    state = checkpoint.get("callbacks", {}).get(state_key, {})
    if not isinstance(state, dict) or not all(
        isinstance(value, str | None) for name, value in state.items() if name != "earlier_plans"
    ):
        raise BadPlan(
            f"checkpoint: expected the plan and fingerprints of {state_key} as text, got something else; it was "
            "changed since it was written: give another one"
        )
    return state


def _parse_plans(texts: Iterable[str]) -> list[PruningPlan]:
    return [PruningPlan.from_json(text) for text in texts]
