"""One cell of a comparison: prune a copy of the dense model, measure it, save the result.

A cell's file is named by a digest of everything that determines the result. A comparison therefore reuses a finished
cell exactly if it asks for the same thing.
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
from prunelit.calibration.result_cache import ResultCache
from prunelit.compare.config import Calibration, Cell, Latency
from prunelit.compare.report_content import CellResult, DenseResult, TextResult
from prunelit.model.decoder import Decoder
from prunelit.model.modes import move_to_device, use_eval_mode
from prunelit.pruning.callback import PruningCallback
from prunelit.runtime import fingerprints, timing
from prunelit.runtime.atomic_files import explain_refusal
from prunelit.runtime.errors import NonFinite, PrunelitError
from prunelit.runtime.fingerprints import compute_digest, fingerprint_model
from prunelit.runtime.text_files import JsonObject, write_json
from prunelit.runtime.versions import collect_versions

_FORMAT = "prunelit-cell/1"


@dataclass
class CellRunner:
    """Runs cells on one dense model and one set of texts, and caches finished cells in a folder.

    Args:
        dense: the model, on the CPU; every cell prunes a copy of it.
        windows: texts for perplexity, {name: [N, S] token ids}. Legend: N windows, S tokens per window.
        calibration_windows: {seed: [N, S] token ids}; empty where no method reads text.
        calibration: how the calibration windows were drawn.
        folder: holds cells/, plans/ and kept/.
        device: where a cell is computed.
        latency: how prefill is timed; None: not at all.
        plans: save every cell's plan.
        again: do not use cached scores, because the method may have changed.

    Example: see `prunelit.compare.run.compare_methods`.
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

    # Cache on disk ------------------------------------------------------------------------------------------------

    def compute_key(self, cell: Cell, method: PruningCallback) -> dict[str, object]:
        """Collect everything that determines a cell's result."""
        # The fingerprint of the windows covers the first three; a plan file is never set; a journal only saves time.
        ignored_options = ("calibration", "windows", "seqlen", "plan_file", "journal")
        key = self._common | {
            "method": cell.row.method,
            "options": {name: value for name, value in method.options.items() if name not in ignored_options},
            "calibration": _fingerprint_windows(self.calibration_windows[cell.seed]) if method.needs_text() else None,
            "texts": {name: _fingerprint_windows(windows) for name, windows in self.windows.items()},
            "latency": asdict(self.latency) if self.latency else None,
        }
        # Through JSON, so that tuples become lists as in the file with which the key is compared.
        return dict(json.loads(json.dumps(key, default=str)))

    def load_result(self, cell: Cell, method: PruningCallback) -> CellResult:
        """Load what is known of a cell; its "status" is "finished", "failed" or "missing"."""
        key = self.compute_key(cell, method)
        result: CellResult = _read_cell(self._build_path(cell, key), key)
        if result["status"] == "finished" and self.plans and not self._build_path(cell, key, "plans").is_file():
            return {"status": "missing"}
        return result

    def _build_path(self, cell: Cell, key: Mapping[str, object], kind: str = "cells") -> Path:
        stem = re.sub(r"[^\w.-]", "_", f"{cell.row.method}-{cell.ratio:g}-{cell.seed}")
        return self.folder / kind / f"{stem}-{_digest_key(key)}.json"

    def _build_journal_path(self, cell: Cell, key: Mapping[str, object]) -> Path:
        """Build the path of a search's journal; all ratios of a row share it, so a longer search continues it."""
        identity = [key["model"], key["dtype"], key["device"], key["calibration"], cell.row.label]
        return self.folder / "kept" / f"{cell.row.method}-{compute_digest(json.dumps(identity))}.jsonl"

    # Runs --------------------------------------------------------------------------------------------------------

    def measure_dense(self) -> DenseResult:
        """Measure each text on the dense model once: {"texts": {name: perplexity, nll, tokens}, "size"}."""
        result_by_text: dict[str, TextResult] = {}
        for name, windows in self.windows.items():
            key = self._common | {"text": _fingerprint_windows(windows)}
            path = self.folder / "cells" / f"dense-{_digest_key(key)}.json"
            entry: JsonObject = _read_cell(path, key)
            if entry["status"] != "finished":
                with move_to_device(self.dense, self.device):
                    entry = {
                        "key": key,
                        "found": _measure_perplexity(self.dense, windows, f"perplexity on {name}, dense"),
                    }
                _write_cell(path, entry)
            result_by_text[name] = entry["found"]
        return {"texts": result_by_text, "size": metrics.measure_model_size(self.dense)}

    def run_cell(self, cell: Cell) -> CellResult:
        """Prune, measure and save one cell; an error of the method is saved as a failed cell.

        Results of a method that its other ratios can use (scores, the journal of a search) are cached in kept/.

        Returns:
            What `load_result` returns from now on.

        Raises:
            OutputNotWritable: the disk refused.
        """
        method = cell.row.build_method(cell.ratio, cell.seed, self.calibration)
        key = self.compute_key(cell, method)
        result: dict[str, object]
        try:
            if "journal" in cell.row.accepts and "journal" not in cell.row.options:
                journal = self._build_journal_path(cell, key)
                with explain_refusal(journal):
                    journal.parent.mkdir(exist_ok=True)
                method = cell.row.build_method(cell.ratio, cell.seed, self.calibration, journal=str(journal))
            method.cache = None if self.again else ResultCache(self.folder / "kept")
            result = self._prune_and_measure(cell, method, key)
        except PrunelitError as error:
            result = {"failed": str(error)}
        except torch.cuda.OutOfMemoryError:
            result = {
                "failed": "the GPU is out of memory; lower calibration.seqlen and the texts' seqlen, or use bfloat16"
            }
        except Exception as error:  # noqa: BLE001  (a bug in one method must not stop a comparison that runs for hours)
            message = " ".join(str(error).split())[:200]
            result = {"failed": f"{type(error).__name__}: {message}", "traceback": traceback.format_exc()}
        gc.collect()  # frees the model's copy, which the traceback of an error holds in a reference cycle
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        _write_cell(self._build_path(cell, key), {"key": key, **result, "versions": self._versions})
        return self.load_result(cell, method)

    def _prune_and_measure(self, cell: Cell, method: PruningCallback, key: Mapping[str, object]) -> dict[str, object]:
        """Prune a copy of the dense model, then measure perplexity, size and, if asked for, latency."""
        calibration: dict[str, object] = {}
        batches = []
        if method.needs_text():
            windows = self.calibration_windows[cell.seed]
            batches = split_into_batches(windows)
            calibration = {
                "source": [self.calibration.text] if isinstance(self.calibration.text, str) else self.calibration.text,
                "windows": len(windows),
                "seqlen": windows.shape[1],
                "fingerprint": fingerprints.fingerprint_token_ids(windows),
            }
        network = copy.deepcopy(self.dense).to(self.device)
        with isolate_rng():  # a method that ignores its seed gives the same result in any order of cells
            torch.manual_seed(cell.seed)
            random.seed(cell.seed)
            start = time.perf_counter()
            plan = method.prune(network, batches)
            _synchronize_device(self.device)
            # Cached scores count with the time that they once took, so that the times of ratios compare.
            prune_seconds = time.perf_counter() - start + method.seconds.get("recalled", 0.0)
            seconds = {"prune": prune_seconds} | method.seconds
        options = {name: value for name, value in plan.options.items() if name != "journal"}
        plan = replace(plan, options=options, calibration=calibration | dict(plan.calibration))
        start = time.perf_counter()
        texts = {
            name: _measure_perplexity(network, windows, f"perplexity on {name}, {cell}")
            for name, windows in self.windows.items()
        }
        seconds["measure"] = time.perf_counter() - start
        removed_shares = {name: value for name, value in plan.predicted.items() if name.startswith("ratio")}
        result: dict[str, object] = {
            "texts": texts,
            "size": metrics.measure_model_size(network),
            **removed_shares,
            "plan": plan.digest,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        }
        if self.latency:
            with move_to_device(self.dense, self.device):
                dense_seconds, pruned_seconds = measure_prefill_seconds(
                    (self.dense, network), self.latency.tokens, self.latency.repeats
                )
            result["latency"] = {
                "dense_seconds": dense_seconds,
                "seconds": pruned_seconds,
                "speedup": dense_seconds / pruned_seconds,
            }
        if self.plans:
            plan.save(self._build_path(cell, key, "plans"))
        return result


@torch.no_grad()
def measure_prefill_seconds(networks: Sequence[nn.Module], tokens: int, repeats: int) -> list[float]:
    """Measure the median time of a forward pass without output projection, for models that take turns.

    Because the models take turns, other load on the machine slows all of them alike. The first pass of each is a
    warm-up.

    Args:
        networks: causal LMs on the same device.
        tokens: length of the one sequence that is read.
        repeats: timed passes.

    Returns:
        Seconds for each model.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        >>> config = LlamaConfig(num_hidden_layers=1, **sizes)
        >>> model = LlamaForCausalLM(config)
        >>> len(measure_prefill_seconds([model, model], tokens=4, repeats=1))
        2
    """
    decoders = [Decoder(network) for network in networks]
    vocabulary = min(decoder.config.vocab_size for decoder in decoders)
    token_ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0)).to(
        decoders[0].device
    )

    def time_forward(decoder: Decoder) -> float:
        with use_eval_mode(decoder.model):
            return timing.measure_seconds(
                lambda: decoder.backbone(input_ids=token_ids, use_cache=False), decoder.device
            )

    seconds_by_model = timing.run_in_rounds(
        [partial(time_forward, decoder) for decoder in decoders], repeats, "measuring prefill"
    )
    return [statistics.median(seconds) for seconds in seconds_by_model]


def _measure_perplexity(network: nn.Module, windows: Tensor, title: str) -> TextResult:
    """Measure {"nll", "perplexity" (null where it exceeds a float), "tokens"} of one text."""
    result = metrics.perplexity(network, windows, max(1, TOKENS_PER_BATCH // windows.shape[1]), title)
    if not math.isfinite(result["nll"]):
        raise NonFinite(f"{title}: expected a finite loss, got {result['nll']}; the cut model's activations overflow")
    return {
        "perplexity": result["perplexity"] if math.isfinite(result["perplexity"]) else None,
        "nll": result["nll"],
        "tokens": int(result["tokens"]),
    }


def _fingerprint_windows(windows: Tensor) -> str:
    return f"{fingerprints.fingerprint_token_ids(windows)}-{windows.shape[1]}"


def _digest_key(key: Mapping[str, object]) -> str:
    return compute_digest(json.dumps(key, sort_keys=True))


def _read_cell(path: Path, key: Mapping[str, object]) -> Any:
    """Read a cell's file; its status is "missing" if it is damaged or has another key."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"status": "missing"}
    if not isinstance(content, dict) or content.get("key") != key:
        return {"status": "missing"}
    return content | {"status": "failed" if "failed" in content else "finished"}


def _write_cell(path: Path, content: Mapping[str, object]) -> None:
    write_json(path, content)


def _synchronize_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
