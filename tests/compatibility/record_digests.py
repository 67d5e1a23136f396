"""Records what every method does to tiny models, so that a change of the code that should change nothing can be shown.

    python -m tests.compatibility.record_digests            writes digests.json
    python -m tests.compatibility.record_digests --check    compares with it, prints every difference; exit status 1

For every method, family and repair the file holds

    plan          the digest of the plan
    kept          a hash of the kept units alone; the plan's digest covers the dense model too
    weights       a SHA-256 of all weights after the cut and its repair, names, shapes and bytes
    statistics    numbers that describe the same weights; see `statistics_of`
    files         a SHA-256 of the content of each file that `prunelit.save` writes, without versions

Another CPU may round differently, so the checksums hold for the machine that wrote them. Therefore `test_digests.py`
checks plans and statistics, and this script checks everything.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

import prunelit
from prunelit.callbacks import method_class, methods
from tests.tiny import EXPERT_METHODS, tiny, tokens

DIGESTS = Path(__file__).with_name("digests.json")
COMMAND = "python -m tests.compatibility.record_digests"
FAMILIES = ("llama", "gemma2", "gpt_neox")
DIGITS = 20  # of every SHA-256
OPTIONS: dict[str, Any] = {"ratio": 0.3, "align": 8}
# Options that make slow methods fast; then cases with other options than the rest.
SMALL: dict[str, dict[str, Any]] = {"best": {"epochs": 1, "own_text": 0.25}, "block_pruner": {"search_windows": 4}}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llm_bip exact": ("llm_bip", {"form": "exact"}),
    "llm_bip direct": ("llm_bip", {"propagate_ffn": False}),
    "llm_bip global": ("llm_bip", {"scope": "global"}),
    "llm_bip layer_mean": ("llm_bip", {"scope": "layer_mean", "min_kept": 0.25}),
    "llm_bip macs": ("llm_bip", {"scope": "global", "budget": "macs", "protect": [0]}),
    "llm_bip kv_bytes": ("llm_bip", {"budget": "kv_bytes"}),
    "llm_bip query_head": ("llm_bip", {"unit": "query_head", "align": 1}),
    "llm_bip uniform_heads": ("llm_bip", {"scope": "global", "uniform_heads": True}),
    "magnitude global": ("magnitude", {"scope": "global"}),
    "random seed": ("random", {"seed": 1}),
    "wanda_sp sequential": ("wanda_sp", {"sequential": True}),
    "flap IFV": ("flap", {"metric": "IFV"}),
    "flap WIFN layer": ("flap", {"metric": "WIFN", "scope": "layer"}),
    "taylor second": ("taylor", {"form": "second"}),
    "taylor vector": ("taylor", {"form": "vector", "checkpointing": True}),
    "saap geometric": ("saap", {"fusion": "geometric", "asi": "none"}),
    "saap literal": ("saap", {"asi": "literal"}),
    "greedy_output global": ("greedy_output", {"scope": "global"}),
    "greedy_output query_head": ("greedy_output", {"unit": "query_head"}),
    "shortgpt count": ("shortgpt", {"ratio": None, "count": 1}),
    "block_pruner beam": ("block_pruner", {"search": "beam", "beam_width": 2}),
    "block_pruner swap": ("block_pruner", {"search": "swap", "blocks": "attention", "ratio": None, "count": 2}),
    "best layer": ("best", {"scope": "layer", "epochs": 0, "own_text": 0.0}),
}


class Case(NamedTuple):
    """One model that one method cuts."""

    name: str
    method: str
    family: str
    options: Mapping[str, Any]


def cases() -> Iterator[Case]:
    """Every method on every family with every repair that it offers, then the variants on one family."""
    for method in methods():
        if method in EXPERT_METHODS:  # no such family here
            continue
        for family in FAMILIES:
            for repair in method_class(method).repair_choices:
                own = SMALL.get(method, {}) | ({"repair": repair} if method != "best" else {})
                yield Case(f"{method}, {family}, {repair}", method, family, own)
    for name, (method, options) in VARIANTS.items():
        yield Case(f"{name}, {FAMILIES[0]}", method, FAMILIES[0], SMALL.get(method, {}) | options)


def calibration() -> list[dict[str, Tensor]]:
    """The text that methods score on: fixed tokens in two batches, of which the second one is padded."""
    first, second = tokens(16, 24).split(8)
    mask = torch.ones_like(second)
    mask[6:, 20:] = 0
    return [{"input_ids": first}, {"input_ids": second, "attention_mask": mask}]


def carried_out(case: Case) -> tuple[Any, prunelit.PruningPlan]:
    """The model of a case after the cut and its repair, and the plan of the cut."""
    kind, model = method_class(case.method), tiny(case.family)
    options = {name: value for name, value in (OPTIONS | case.options).items() if name not in kind.ignored_options}
    torch.manual_seed(0)
    plan = kind(**options).prune(model, calibration())
    return model, plan


def row(model: Any, plan: prunelit.PruningPlan) -> dict[str, Any]:
    """What is recorded of a case, but for the files."""
    weights = model.state_dict()
    return {
        "plan": plan.digest,
        "kept": kept(plan),
        "weights": digest_of(weights),
        "statistics": statistics_of(weights),
    }


def kept(plan: prunelit.PruningPlan) -> str:
    """A hash of the units that a plan keeps."""
    units = [(layer.query_heads, layer.kv_groups, layer.ffn_channels) for layer in plan.layers]
    return _sha(units)


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """A SHA-256 of tensors: their names, dtypes, shapes and bytes, in the order of the names."""
    found = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:DIGITS]


def statistics_of(weights: Mapping[str, Tensor]) -> list[float]:
    """Five numbers that describe weights, with 8 digits.

    Returns:
        the number of weights; the norm of all of them; the sum of their magnitudes; their sum; and a sum in which every
        weight has another factor, so that weights that changed places show.
    """
    flat = [weights[name].detach().cpu().double().flatten() for name in sorted(weights)]
    count = sum(len(part) for part in flat)
    joined = torch.cat(flat)
    factors = torch.cos(torch.arange(count, dtype=torch.float64))
    norm, magnitude = joined.norm(), joined.abs().sum()
    return [count, *(float(f"{float(number):.8g}") for number in (norm, magnitude, joined.sum(), joined @ factors))]


def alike(found: Iterable[float], wanted: Iterable[float], tolerance: float = 1e-4) -> bool:
    """Whether statistics agree; sums of signed numbers may be near 0, so their tolerance is relative to the norm."""
    ours, theirs = list(found), list(wanted)
    scales = [0.0, theirs[1], theirs[2], theirs[1], theirs[1]]
    return all(abs(a - b) <= tolerance * scale for a, b, scale in zip(ours, theirs, scales, strict=True))


def files_of(model: Any, plan: prunelit.PruningPlan, folder: Path) -> dict[str, str]:
    """A SHA-256 for every file of the saved model whose content does not depend on versions or on the time."""
    prunelit.save(model, folder, plan=plan, unproved=True)
    readers: dict[str, Callable[[Path], str]] = {
        ".safetensors": lambda path: digest_of(load_file(path)),
        ".json": lambda path: _sha(_without_versions(json.loads(path.read_text()))),
        ".py": lambda path: _sha(path.read_text()),
    }
    found = sorted(path for path in folder.iterdir() if path.name not in ("README.md", "proof.json"))
    return {path.name: readers[path.suffix](path) for path in found}


def _without_versions(data: Any) -> Any:
    if not isinstance(data, dict):
        return data
    return {name: _without_versions(value) for name, value in data.items() if "version" not in name}


def _sha(content: Any) -> str:
    """The first digits of a SHA-256 of text, or of what can be written as JSON."""
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def read() -> dict[str, Any]:
    """The content of digests.json: {"command": how it was written, "cases": {name: row}}."""
    found: dict[str, Any] = json.loads(DIGESTS.read_text(encoding="utf-8"))
    return found


def record() -> dict[str, Any]:
    """Carry out all cases: {name: row, with the files}."""
    found = {}
    for case in cases():
        model, plan = carried_out(case)
        found[case.name] = row(model, plan)
        with tempfile.TemporaryDirectory() as folder:
            found[case.name]["files"] = files_of(model, plan, Path(folder) / "model")
    return found


def written(rows: Mapping[str, Any]) -> str:
    """JSON text with one case a line."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in rows.items())
    return f'{{\n "command": {json.dumps(COMMAND)},\n "cases": {{\n{lines}\n }}\n}}\n'


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """A line for every value that differs between two nested mappings."""
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        place = f"{where}: {name}" if where else name
        ours, theirs = found.get(name), wanted.get(name)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from differences(ours, theirs, place)
        elif ours != theirs:
            yield f"{place}: recorded {theirs}, found {ours}"


def main() -> int:
    """Write digests.json, or compare with it.

    Returns:
        the exit status: 1 where something differs.
    """
    parser = argparse.ArgumentParser(description="Record what every method does to tiny models, or check the record.")
    parser.add_argument("--check", action="store_true", help="compare with digests.json instead of writing it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = record()
    if not options.check:
        DIGESTS.write_text(written(rows), encoding="utf-8")
        return 0
    found = list(differences(rows, read()["cases"]))
    sys.stdout.write("".join(f"{line}\n" for line in found))
    sys.stdout.write(f"{len(rows)} cases, {len(found)} differences\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
