"""Mistakes put into the code one by one: does a test notice each?

    PYTHONPATH=. python benchmarks/mutations.py [--modules planning.budget] [--mutants 12] [--seed 0] [--again]

For every module below, some places are drawn at random and changed: a comparison, an operator, a number, a condition, a
flag; or a statement is left out. The tests named beside the module then run in a process that a parent with torch and
transformers imported forks for this mutant. A mutant that no test notices survives and is listed with its line. Texts
of messages, docstrings and annotations are left as they are. With --again those that survived are tried once more, with
all quick tests of the packages that use the module; what is noticed then is taken from the list.

mutmut and cosmic-ray run every mutant, thousands here, and start a process that imports torch for each, or rewrite each
function into a dispatcher, which is no longer the source that prunelit's own caches take digests of.
"""

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import lightning.pytorch
import peft
import pytest
import torch
import transformers

ROOT = Path(__file__).parents[1]
TARGETS = {
    "planning.amounts": ["tests/planning/test_targets.py"],
    "planning.budget": ["tests/planning/test_budget.py", "tests/planning/test_budget_of_mixtures.py"],
    "planning.overshoot": ["tests/planning/test_overshoot.py"],
    "planning.removal_steps": ["tests/planning"],
    "model.surgery": ["tests/core/test_architectures.py", "tests/core/test_mixtures.py"],
    "model.unit_indices": ["tests/model", "tests/core/test_architectures.py"],
    "calibration.observe": ["tests/calibration/test_observe.py", "tests/callbacks/test_ean.py"],
    "calibration.paired_streams": ["tests/repair", "tests/callbacks/greedy_output/test_callback.py"],
    "calibration.per_sample_gradients": [
        "tests/calibration",
        "tests/callbacks/test_taylor.py",
        "tests/callbacks/test_scores_of_experts.py",
    ],
    "callbacks.llm_bip": ["tests/callbacks/test_llm_bip.py"],
    "callbacks.flap": ["tests/callbacks/test_flap.py"],
    "callbacks.wanda_sp": ["tests/callbacks/test_wanda_sp.py", "tests/callbacks/test_scores_of_experts.py"],
    "callbacks.shortgpt": ["tests/callbacks/test_shortgpt.py"],
    "callbacks.best.callback": ["tests/callbacks/best/test_callback.py"],
    "callbacks.best.denoise": ["tests/callbacks/best/test_denoise.py", "tests/callbacks/best/test_callback.py"],
    "callbacks.best.distill": ["tests/callbacks/best/test_distill.py", "tests/callbacks/best/test_callback.py"],
    "callbacks.best.fisher": [
        "tests/callbacks/best/test_fisher.py",
        "tests/callbacks/best/test_expert_fisher.py",
        "tests/callbacks/best/test_callback.py",
    ],
    "callbacks.best.generated_text": ["tests/callbacks/best/test_generated_text.py"],
    "callbacks.block_pruner.search": ["tests/callbacks/block_pruner", "tests/report/test_record.py"],
    "callbacks.greedy_output.attention_similarity": ["tests/callbacks/greedy_output"],
    "callbacks.greedy_output.two_step": ["tests/callbacks/greedy_output"],
    "callbacks.saap.callback": ["tests/callbacks/saap"],
    "repair.bias": ["tests/repair/test_bias.py"],
    "repair.least_squares": ["tests/repair"],
    "repair.reconstruct": ["tests/repair/test_reconstruct.py", "tests/repair/test_expert_refit.py"],
    "quantization.int4": ["tests/quantization/test_int4.py"],
    "quantization.int4_layouts": ["tests/quantization/test_int4_layouts.py", "tests/export/test_w4a16.py"],
    "quantization.integer_zeros": ["tests/quantization/test_integer_zeros.py", "tests/export/test_w4a16.py"],
    "data.gguf.convert": ["tests/data/gguf"],
    "data.gguf.layer_shapes": ["tests/data/gguf"],
    "recovery.lora": ["tests/recovery/test_lora.py", "tests/recovery/test_lora_experts.py"],
    "recovery.merge": [
        "tests/recovery/test_adapter_files.py",
        "tests/recovery/test_lora.py",
        "tests/recovery/test_lora_experts.py",
    ],
    "recovery.losses": ["tests/recovery/test_losses.py"],
    "monitoring.checkpoints": [
        "tests/monitoring/test_checkpoints.py",
        "tests/monitoring/test_untrusted_checkpoints.py",
    ],
    "pruning.resume": ["tests/pruning/test_resume.py", "tests/pruning/test_restore.py"],
    "core.plan": ["tests/core/test_plan.py", "tests/core/test_plan_edits.py", "tests/core/test_mixtures.py"],
    "core.plan_json": ["tests/core/test_plan.py", "tests/core/test_plan_json.py"],
    "core.saved_plans": ["tests/core/test_saved_plans.py", "tests/pruning/test_restore.py"],
    "export.uniform": [
        "tests/export/test_write.py",
        "tests/export/test_mixtures.py",
        "tests/export/test_padded.py",
        "tests/test_multimodal.py",
    ],
    "export.hetero": [
        "tests/export/test_write.py",
        "tests/export/test_mixtures.py",
        "tests/export/test_vllm_base.py",
        "tests/test_multimodal.py",
    ],
    "export.gguf.quantize": ["tests/export/gguf/test_quantize.py"],
    "export.padded": ["tests/export/test_padded.py", "tests/export/test_mixtures.py"],
    "export.deci.writer": ["tests/export/deci"],
    "export.gguf.writer": ["tests/export/gguf"],
    "export.safetensors_parts": ["tests/export/test_safetensors_parts.py"],
}
"""Modules, and the tests that answer for them, beside the examples in their docstrings."""

WIDER = {
    "calibration": ["tests/calibration", "tests/callbacks", "tests/repair"],
    "callbacks": ["tests/callbacks", "tests/pruning"],
    "core": ["tests/core", "tests/cli/test_plan.py", "tests/pruning", "tests/export/test_write.py"],
    "data": ["tests/data"],
    "export": ["tests/export", "tests/test_multimodal.py", "tests/cli/test_once.py"],
    "model": ["tests/model", "tests/core", "tests/callbacks/test_taylor.py", "tests/callbacks/best"],
    "monitoring": ["tests/monitoring", "tests/pruning"],
    "planning": ["tests/planning", "tests/callbacks", "tests/cli"],
    "pruning": ["tests/pruning", "tests/monitoring"],
    "quantization": ["tests/quantization", "tests/export/test_int4.py", "tests/export/test_w4a16.py"],
    "recovery": ["tests/recovery", "tests/export/test_int4.py"],
    "repair": ["tests/repair", "tests/callbacks/test_contract.py", "tests/callbacks/best"],
}
"""Tests of the packages that use a package's modules."""
LIMIT_FACTOR, LIMIT_EXTRA = 5, 60
"""A mutant whose tests take longer than this many times the unchanged ones', and this many seconds, hangs."""
_PLAIN = "--assert=plain"  # pytest would import what is named on its command line itself, past `_ChangedModule`
_OTHER = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Add,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


class Mutant(NamedTuple):
    """One change.

    Attributes:
        line: of the source.
        change: what was done, with the new code.
        tree: the changed module.
    """

    line: int
    change: str
    tree: ast.Module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="*", default=list(TARGETS), choices=list(TARGETS), metavar="MODULE")
    parser.add_argument("--mutants", type=int, default=12, help="of each module, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="only those that survived, with more tests")
    parser.add_argument("--select", default="not slow", help="pytest's -m")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "mutations.json")
    options = parser.parse_args()
    assert lightning.pytorch and peft and transformers  # imported here, so that no fork has to
    torch.set_num_threads(1)
    os.chdir(ROOT)
    for module in options.modules:
        survivors = read_survivors(module, options.out) if options.again else None
        if survivors != []:
            row = try_module(module, options.mutants, options.seed, options.select, survivors)
            print(json.dumps(row), flush=True)
            write_row(row, options)


def read_survivors(module: str, path: Path) -> list[dict[str, Any]]:
    """Read which changes of a module survived earlier."""
    rows = json.loads(path.read_text())["modules"] if path.is_file() else []
    return [change for row in rows if row["module"] == module for change in row["survivors"]]


def write_row(row: dict[str, Any], options: argparse.Namespace) -> None:
    """Put a module's row into the result file, in place of an earlier one."""
    rows = json.loads(options.out.read_text())["modules"] if options.out.is_file() else []
    rows = sorted([*(x for x in rows if x["module"] != row["module"]), row], key=lambda x: x["module"])
    command = f"PYTHONPATH=. python benchmarks/mutations.py --mutants {options.mutants} --seed {options.seed}"
    options.out.write_text(json.dumps({"command": command, "modules": rows}, indent=2) + "\n")


def try_module(module: str, mutants: int, seed: int, select: str, only: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Try a module's mutants, and first the module as it is; of the mutants `only` some, with more tests."""
    name, path = f"prunelit.{module}", ROOT / "prunelit" / f"{module.replace('.', '/')}.py"
    tests = TARGETS[module] if only is None else WIDER[module.partition(".")[0]]
    source, chance = path.read_text(encoding="utf-8"), random.Random(f"{module} {seed}")
    arguments = ["-x", "-q", "-m", select, "-p", "no:cacheprovider", _PLAIN, *tests, str(path)]
    begin = time.monotonic()
    ended, output = run_tests(name, path, ast.parse(source), arguments, limit=900)
    seconds = time.monotonic() - begin
    assert ended == 0, f"{module}: its tests fail without a change\n{output[-2000:]}"
    drawn = {mutant: {"line": mutant.line, "change": mutant.change} for mutant in draw_mutants(source, mutants, chance)}
    tried = drawn if only is None else {mutant: told for mutant, told in drawn.items() if told in only}
    assert all(told in tried.values() for told in only or ()), (
        f"{module} has changed, or --mutants or --seed is another"
    )
    limit = LIMIT_FACTOR * seconds + LIMIT_EXTRA
    survivors = [told for mutant, told in tried.items() if run_tests(name, path, mutant.tree, arguments, limit)[0] == 0]
    commit = subprocess.run(
        ["git", "rev-parse", "--short=8", "HEAD"], capture_output=True, text=True, check=True
    ).stdout
    row = {"module": module, "commit": commit.strip(), "tests": tests, "seconds_unchanged": round(seconds, 1)}
    return row | {"mutants": len(drawn), "noticed": len(drawn) - len(survivors), "survivors": survivors}


# Running -------------------------------------------------------------------------------------------------------------


class _ChangedModule(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import one module from a tree in place of its file."""

    def __init__(self, name: str, path: Path, tree: ast.Module):
        self.name, self.path, self.tree = name, path, tree

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.tree, str(self.path), "exec"), module.__dict__)


def run_tests(name: str, path: Path, tree: ast.Module, arguments: list[str], limit: float) -> tuple[int, str]:
    """Run pytest in a fork in which a module is another; returns its exit code (-1: it hung) and its output."""
    assert not any(loaded.startswith("prunelit") for loaded in sys.modules), "the parent must not import prunelit"
    with tempfile.TemporaryFile("w+") as output:
        if not (pid := os.fork()):
            code = 70
            try:
                os.setsid()
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                sys.meta_path.insert(0, _ChangedModule(name, path, tree))
                code = int(pytest.main(arguments))
            except BaseException:  # noqa: BLE001  (a child must not go on as its parent)
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        deadline = time.monotonic() + limit
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        if ended[0] == 0:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -1, ""
        output.seek(0)
        return os.waitstatus_to_exitcode(ended[1]), output.read()


# Changing ------------------------------------------------------------------------------------------------------------


def draw_mutants(source: str, number: int, chance: random.Random) -> list[Mutant]:
    """Draw changes of a module at distinct places, in the order of its lines."""
    tree = ast.parse(source)
    places = list(list_places(tree))
    drawn = sorted(chance.sample(range(len(places)), min(number, len(places))))
    mutants = []
    for index in drawn:
        changed = copy.deepcopy(tree)
        place = list(list_places(changed))[index]
        before = ast.unparse(place.node)
        place.change()
        ast.fix_missing_locations(changed)
        after = place.after or ast.unparse(place.node)
        mutants.append(Mutant(place.node.lineno, f"{_shorten(before)}  ->  {_shorten(after)}", changed))
    return mutants


class Place(NamedTuple):
    """Where a module can be changed.

    Attributes:
        node: that shows the change.
        change: makes it.
        after: how it is told; empty: by the node's new code.
    """

    node: ast.stmt | ast.expr
    change: Callable[[], None]
    after: str = ""


def list_places(tree: ast.Module) -> Iterator[Place]:
    """All places of a module that can be changed."""
    guards: set[ast.AST] = set()
    for node in _walk(tree):
        for field in ("body", "orelse"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                yield from _list_left_out(statements)
        if isinstance(node, ast.Compare) and type(node.ops[0]) in _OTHER:
            yield Place(node, _set_item(node.ops, 0, _OTHER[type(node.ops[0])]()))
        if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in _OTHER:
            yield Place(node, _set_field(node, "op", _OTHER[type(node.op)]()))
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            yield Place(node.test, _set_field(node, "test", ast.UnaryOp(ast.Not(), node.test)), "not that")
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield Place(node, _set_field(node, "op", ast.UAdd()))
        if isinstance(node, ast.keyword) and node.arg == "strict":  # a guard: the lengths are equal by construction
            guards.add(node.value)
        if isinstance(node, ast.Constant) and node not in guards and type(node.value) in (int, float, bool):
            other = not node.value if isinstance(node.value, bool) else node.value + 1
            yield Place(node, _set_field(node, "value", other))


def _list_left_out(statements: list[ast.stmt]) -> Iterator[Place]:
    for index, statement in enumerate(statements):
        is_call = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
        if is_call or isinstance(statement, ast.AugAssign | ast.Raise | ast.Delete):
            yield Place(statement, _set_item(statements, index, ast.copy_location(ast.Pass(), statement)), "left out")


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes of running code: no annotations, messages, docstrings, or imports for type checkers."""
    if isinstance(node, ast.JoinedStr | ast.Import | ast.ImportFrom):
        return
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    yield node
    if isinstance(node, ast.Raise):  # it may be left out; its words may be others
        return
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _walk(child)


def _set_field(node: ast.AST, field: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(node, field, value)


def _set_item(items: list[Any], index: int, value: Any) -> Callable[[], None]:
    def change() -> None:
        items[index] = value

    return change


def _shorten(code: str) -> str:
    first = " ".join(code.split())
    return first if len(first) <= 120 else f"{first[:117]}..."


if __name__ == "__main__":
    main()
