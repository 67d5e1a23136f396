"""One cell of a comparison: prune a copy of the dense model, measure it, write down what came of it.

A cell's file is named by a digest of everything that determines the result, so a finished cell is found again by any
comparison that asks for the same, and by no other.
"""

import copy
import gc
import json
import math
import random
import re
import statistics
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from prunelit.calibration import metrics
from prunelit.calibration.batches import TOKENS_PER_BATCH, split_into_batches
from prunelit.calibration.fingerprints import compute_digest, fingerprint_model
from prunelit.calibration.result_cache import ResultCache
from prunelit.compare.config import Calibration, Cell, Latency
from prunelit.data import text
from prunelit.model.decoder import Decoder
from prunelit.model.modes import move_to_device, use_eval_mode
from prunelit.pruning.callback import PruningCallback
from prunelit.runtime import timing
from prunelit.runtime.errors import NonFinite, OutputNotWritable, PrunelitError
from prunelit.runtime.text_files import write_json
from prunelit.runtime.versions import collect_versions

_FORMAT = "prunelit-cell/1"


@dataclass
class CellRunner:
    """A dense model, texts, and the folder in which finished cells are kept.

    Args:
        dense: the model, on the CPU; every cell cuts a copy of it.
        windows: what perplexity is measured on, {name: [N, S] token ids}.
        drawn: calibration windows [N, S] for each seed; empty where no method reads text.
        calibration: what they were drawn as.
        folder: holds cells/, plans/ and kept/.
        device: where a cell is computed.
        latency: how prefill is measured; None: it is not.
        plans: keep every cell's plan.
        again: scores that are kept may be of a method that has been changed; compute them.
    """

    dense: nn.Module
    windows: Mapping[str, Tensor]
    calibration_windows: Mapping[int, Tensor]
    calibration: Calibration
    folder: Path
    device: torch.device
    latency: Latency | None = None
    plans: bool = False
    again: bool = False

    def __post_init__(self) -> None:
        self._versions = collect_versions()
        self._common = {
            "format": _FORMAT,
            "model": fingerprint_model(self.dense),
            "dtype": str(next(self.dense.parameters()).dtype).removeprefix("torch."),
            "device": self.device.type,
        }

    # What is on disk ---------------------------------------------------------------------------------------------

    def compute_key(self, cell: Cell, method: PruningCallback) -> dict[str, Any]:
        """Everything that determines a cell's result."""
        # The fingerprint says the first three; a journal only saves time.
        elsewhere = ("calibration", "windows", "seqlen", "plan_file", "journal")
        key = self._common | {
            "method": cell.row.method,
            "options": {name: value for name, value in method.options.items() if name not in elsewhere},
            "calibration": _fingerprint_windows(self.calibration_windows[cell.seed]) if method.needs_text() else None,
            "texts": {name: _fingerprint_windows(ids) for name, ids in self.windows.items()},
            "latency": asdict(self.latency) if self.latency else None,
        }
        return dict(json.loads(json.dumps(key, default=str)))  # tuples become lists, as they are read back

    def load_result(self, cell: Cell, method: PruningCallback) -> dict[str, Any]:
        """What is known of a cell; its "status" is "finished", "failed" or "missing"."""
        key = self.compute_key(cell, method)
        found = _read_cell(self._build_path(cell, key), key)
        if found["status"] == "finished" and self.plans and not self._build_path(cell, key, "plans").is_file():
            return {"status": "missing"}
        return found

    def _build_path(self, cell: Cell, key: Mapping[str, Any], kind: str = "cells") -> Path:
        stem = re.sub(r"[^\w.-]", "_", f"{cell.row.method}-{cell.ratio:g}-{cell.seed}")
        return self.folder / kind / f"{stem}-{_digest_key(key)}.json"

    def _build_journal_path(self, cell: Cell, key: Mapping[str, Any]) -> Path:
        """One for all ratios of a row: a longer search goes on from a shorter one."""
        which = [key["model"], key["dtype"], key["device"], key["calibration"], cell.row.label]
        return self.folder / "kept" / f"{cell.row.method}-{compute_digest(json.dumps(which))}.jsonl"

    # Work --------------------------------------------------------------------------------------------------------

    def measure_dense(self) -> dict[str, Any]:
        """{"texts": {name: perplexity, nll, tokens}, "size"} of the dense model; each text is measured once."""
        found = {}
        for name, ids in self.windows.items():
            key = self._common | {"text": _fingerprint_windows(ids)}
            path = self.folder / "cells" / f"dense-{_digest_key(key)}.json"
            known = _read_cell(path, key)
            if known["status"] != "finished":
                with move_to_device(self.dense, self.device):
                    known = {"key": key, "found": _measure_perplexity(self.dense, ids, f"perplexity on {name}, dense")}
                _write_cell(path, known)
            found[name] = known["found"]
        return {"texts": found, "size": metrics.measure_model_size(self.dense)}

    def run_cell(self, cell: Cell) -> dict[str, Any]:
        """Prune, measure and write one cell; a failure is written down as one.

        What a method computed that its other ratios can use, scores or the journal of a search, stays in kept/.

        Returns:
            What `find` returns from now on.

        Raises:
            OutputNotWritable: the disk refused.
        """
        method = cell.row.build_method(cell.ratio, cell.seed, self.calibration)
        key = self.compute_key(cell, method)
        result: dict[str, Any]
        try:
            if "journal" in cell.row.accepts and "journal" not in cell.row.options:
                journal = self._build_journal_path(cell, key)
                _save_or_raise(lambda path: path.parent.mkdir(exist_ok=True), journal)
                method = cell.row.build_method(cell.ratio, cell.seed, self.calibration, journal=str(journal))
            method.cache = None if self.again else ResultCache(self.folder / "kept")
            result = self._prune_and_measure(cell, method, key)
        except PrunelitError as error:
            result = {"failed": str(error)}
        except torch.cuda.OutOfMemoryError:
            result = {
                "failed": "the GPU is out of memory; lower calibration.seqlen and the texts' seqlen, or use bfloat16"
            }
        except Exception as error:  # noqa: BLE001  (a bug in one method must not cost the others their night)
            said = " ".join(str(error).split())[:200]
            result = {"failed": f"{type(error).__name__}: {said}", "traceback": traceback.format_exc()}
        gc.collect()  # the copy, which the traceback of an error would have held until now
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        _write_cell(self._build_path(cell, key), {"key": key, **result, "versions": self._versions})
        return self.load_result(cell, method)

    def _prune_and_measure(self, cell: Cell, method: PruningCallback, key: Mapping[str, Any]) -> dict[str, Any]:
        record: dict[str, Any] = {}
        batches = []
        if method.needs_text():
            ids = self.calibration_windows[cell.seed]
            batches = split_into_batches(ids)
            record = {
                "source": [self.calibration.text] if isinstance(self.calibration.text, str) else self.calibration.text,
                "windows": len(ids),
                "seqlen": ids.shape[1],
                "fingerprint": text.fingerprint_token_ids(ids),
            }
        network = copy.deepcopy(self.dense).to(self.device)
        with isolate_rng():  # a method that forgets its seed still gives the same result in any order of cells
            torch.manual_seed(cell.seed)
            random.seed(cell.seed)
            start = time.perf_counter()
            plan = method.prune(network, batches)
            _synchronize_device(self.device)
            # What was recalled counts as if it had been computed, so that ratios compare.
            taken = time.perf_counter() - start + method.seconds.get("recalled", 0.0)
            seconds = {"prune": taken} | method.seconds
        options = {name: value for name, value in plan.options.items() if name != "journal"}
        plan = replace(plan, options=options, calibration=record | dict(plan.calibration))
        start = time.perf_counter()
        texts = {
            name: _measure_perplexity(network, ids, f"perplexity on {name}, {cell}")
            for name, ids in self.windows.items()
        }
        seconds["measure"] = time.perf_counter() - start
        shares = {name: value for name, value in plan.predicted.items() if name.startswith("ratio")}
        found = {
            "texts": texts,
            "size": metrics.measure_model_size(network),
            **shares,
            "plan": plan.digest,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        }
        if self.latency:
            with move_to_device(self.dense, self.device):
                dense, cut = measure_prefill_seconds((self.dense, network), self.latency.tokens, self.latency.repeats)
            found["latency"] = {"dense_seconds": dense, "seconds": cut, "speedup": dense / cut}
        if self.plans:
            _save_or_raise(plan.save, self._build_path(cell, key, "plans"))
        return found


@torch.no_grad()
def measure_prefill_seconds(networks: Sequence[nn.Module], tokens: int, repeats: int) -> list[float]:
    """Median seconds of a forward pass without output projection, for models that take turns.

    Taking turns, what else a machine does slows all of them alike. One pass of each is not counted.

    Args:
        networks: on the same device.
        tokens: of the one sequence that is read.
        repeats: passes counted.
    """
    decoders = [Decoder(network) for network in networks]
    limit = min(decoder.config.vocab_size for decoder in decoders)
    ids = torch.randint(limit, (1, tokens), generator=torch.Generator().manual_seed(0)).to(decoders[0].device)

    def one(decoder: Decoder) -> float:
        with use_eval_mode(decoder.model):
            return timing.measure_seconds(lambda: decoder.backbone(input_ids=ids, use_cache=False), decoder.device)

    taken = timing.run_in_rounds([partial(one, decoder) for decoder in decoders], repeats, "measuring prefill")
    return [statistics.median(each) for each in taken]


def _measure_perplexity(network: nn.Module, ids: Tensor, what: str) -> dict[str, Any]:
    """{"nll", "perplexity" (null where no float holds it), "tokens"}."""
    found: dict[str, Any] = metrics.perplexity(network, ids, max(1, TOKENS_PER_BATCH // ids.shape[1]), what)
    if not math.isfinite(found["nll"]):
        raise NonFinite(f"{what}: expected a finite loss, got {found['nll']}; the cut model's activations overflow")
    return found | {"perplexity": found["perplexity"] if math.isfinite(found["perplexity"]) else None}


def _fingerprint_windows(ids: Tensor) -> str:
    return f"{text.fingerprint_token_ids(ids)}-{ids.shape[1]}"


def _digest_key(key: Mapping[str, Any]) -> str:
    return compute_digest(json.dumps(key, sort_keys=True))


def _read_cell(path: Path, key: Mapping[str, Any]) -> dict[str, Any]:
    """A cell's file, if it is whole and of this key."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"status": "missing"}
    if not isinstance(found, dict) or found.get("key") != key:
        return {"status": "missing"}
    return found | {"status": "failed" if "failed" in found else "finished"}


def _write_cell(path: Path, content: Mapping[str, Any]) -> None:
    _save_or_raise(lambda target: write_json(target, content), path)


def _save_or_raise(write: Any, path: Path) -> None:
    try:
        write(path)
    except OSError as error:
        raise OutputNotWritable(f"output {str(path)!r}: can not be written: {error.strerror or error}") from error


def _synchronize_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
