"""Commands that are killed at random moments and run again: is the result that of a run which nothing stopped?

    PYTHONPATH=. python benchmarks/kills.py [--commands prune fit] [--times 20] [--seed 0] [--signals KILL TERM INT2]

A tiny random model with its text is written once. Every command is run undisturbed twice: what differs between the two
tells time, and is compared without its times. Then, for each try, it is started in a fresh folder, struck by a signal,
and run again. Of the tries, every second one is struck at a random time, the others at a random change of a file
(open for writing, rename, make, remove), where most of what can go wrong goes wrong. INT2 strikes twice.

Checkpoints of `fit` are counted apart. Lightning saves the newest, copies it to last.ckpt and removes the one before in
three steps, and a run that is struck between them and has no step left to train does not take the others again.

A parent that has imported everything forks the runs, so that a try costs no import. What exports prove in a new process
is proved in the same one; `--new_process` starts real processes with real proofs instead.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
}

import torch
import yaml

from prunelit.runtime.text_files import write_json
from prunelit.runtime.versions import collect_versions

ROOT = Path(__file__).parents[1]
SIZES = "--windows 8 --seqlen 16 --seed 3"
PRUNE = f"prune --model model --ratio 0.3 --text words.txt {SIZES} --align 8 --out out --overwrite true"
COMMANDS = {
    "plan": f"plan{PRUNE.removeprefix('prune')} --method llm_bip".replace("--out out", "--out plan.json"),
    "prune": f"{PRUNE} --method llm_bip --repair least_squares",
    "prune_stream": f"{PRUNE} --method llm_bip --stream true --memory_gib 1",
    "evaluate": "evaluate --model model --text words.txt --seqlen 16 --windows 8 --json result.json",
    "compare": "compare --config compare.yaml",
    "fit": "fit --config fit.yaml",
    **{
        f"export_{name}": f"export --model {source} --format {name} --out out --overwrite true"
        for name, source in (("uniform", "model"), ("hetero", "pruned"), ("padded", "model"), ("gguf", "model"))
    },
    **{
        f"export_{name}": f"export --model model --format {name} --out out --overwrite true"
        for name in ("deci", "int4", "w4a16")
    },
}
FIT: dict[str, Any] = {
    "seed_everything": 3,
    "model": {"model": "model", "lora_rank": 4, "lora_dropout": 0.2, "learning_rate": 1e-2},
    "data": {
        **{"train": "words.txt", "seqlen": 16, "batch_size": 2},
        **{"calibration_windows": 8, "validation_windows": 4, "train_windows": 9},
    },
    "trainer": {
        **{"default_root_dir": "run", "accelerator": "cpu", "max_steps": 8, "val_check_interval": 2},
        **{"logger": False, "enable_progress_bar": False},
        "callbacks": [
            {
                "class_path": "prunelit.callbacks.LLMBIP",
                "init_args": {"ratio": 0.3, "align": 8, "repair": "least_squares"},
            },
            {"class_path": "ModelCheckpoint", "init_args": {"save_last": True, "save_on_train_epoch_end": False}},
        ],
    },
    "ckpt_path": "last",
}
COMPARE = {
    **{"model": "model", "out": "out", "ratios": [0.2, 0.3], "seeds": [0], "options": {"align": 8}},
    "calibration": {"text": "words.txt", "windows": 8, "seqlen": 16},
    "texts": {"words": {"text": "words.txt", "seqlen": 16, "windows": 4}},
    "methods": ["random", "llm_bip"],
    "plans": True,
}
TIMES = {
    *("seconds", "seconds_saved", "peak_memory_mib", "memory_mib", "stages", "start", "time", "started", "finished"),
    *("commit", "when", "date", "total_seconds", "machine", "milliseconds", "tokens_per_second"),
}
"""Entries of JSON files and checkpoints that tell time or memory, or which stages were run."""
_IMPORTED = ("prunelit", "matplotlib", "jinja2", "PIL", "kiwisolver", "safetensors", "gguf", "peft", "accelerate")
_LIMIT = 300  # seconds of a run, after which it hangs
_WRITING_EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", nargs="*", default=list(COMMANDS), choices=list(COMMANDS))
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", nargs="*", default=["KILL"], choices=["KILL", "TERM", "INT", "INT2", "HUP"])
    parser.add_argument("--new_process", action="store_true", help="real processes with real proofs")
    parser.add_argument("--keep", type=Path, help="folder in which what failed stays")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "kills.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="kills-") as scratch:
        template = Path(scratch) / "template"
        if not (writer := os.fork()):  # a run starts threads, which a fork does not bear
            write_template(template)
            os._exit(0)
        assert _wait_for(writer) == 0
        start: Callable[..., Run] = start_process if options.new_process else fork_run
        if not options.new_process:
            import_everything()
        for command in options.commands:
            attack = Attack(command, template, Path(scratch), start, options.keep)
            for name in options.signals:
                rows = [attack.strike(name, options.times, options.seed)]
                print(json.dumps(rows), flush=True)
                write_result(rows, options)


def write_result(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Put rows into the result file, in place of earlier ones of the same kind."""
    earlier = json.loads(options.out.read_text())["rows"] if options.out.is_file() else []
    kind = "real processes" if options.new_process else "forked runs"
    rows = [row | {"runs": kind} for row in rows]
    names = {(row["command"], row["signal"], row["runs"]) for row in rows}
    kept = [row for row in earlier if (row["command"], row["signal"], row["runs"]) not in names]
    result = {
        "command": "PYTHONPATH=. python benchmarks/kills.py --times N --signals ...",
        "rows": sorted(kept + rows, key=lambda row: (row["runs"], row["signal"], row["command"])),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": collect_versions(),
    }
    write_json(options.out, result)


def write_template(folder: Path) -> Path:
    """A model, a pruned one with layers of different shapes, a text and the configs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from prunelit.callbacks import LLMBIP
    from prunelit.export.write import save
    from tests.tiny import tiny_byte_tokenizer

    folder.mkdir(parents=True)
    tokenizer = tiny_byte_tokenizer()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "words.txt").write_text(" ".join(f"w{number * 7 % 101}" for number in range(3000)))
    method = LLMBIP(ratio=0.3, align=8, scope="global", windows=8, seqlen=16)
    plan = method.prune(model, method.make_batches(str(folder / "words.txt"), tokenizer))
    save(model, folder / "pruned", tokenizer, plan)
    (folder / "fit.yaml").write_text(yaml.safe_dump(FIT))
    (folder / "compare.yaml").write_text(yaml.safe_dump(COMPARE))
    return folder


def import_everything() -> None:
    """What the forked runs need, and proofs in the same process."""
    import prunelit.cli.compare
    import prunelit.cli.evaluate
    import prunelit.cli.export
    import prunelit.cli.fit
    import prunelit.cli.plan
    import prunelit.cli.prune  # noqa: F401
    from prunelit.export.proof import compare, reload

    compare.run_reload_script = reload.reload_and_run


def import_what_was_imported(names: Path) -> None:
    """Import what a forked run had to import, so that the next one is forked with it; nothing that starts threads."""
    for name in names.read_text().split() if names.is_file() else ():
        if name not in sys.modules and name.partition(".")[0] in _IMPORTED:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork copies locks that other threads hold"


class Run(NamedTuple):
    """A command that runs in a process of its own.

    Attributes:
        pid: of the process.
        wait: waits for its end and returns the exit status, negative for a signal.
    """

    pid: int
    wait: Callable[[], int]


def fork_run(arguments: list[str], folder: Path, output_file: Path, at_change: int = 0, strike: str = "KILL") -> Run:
    """Fork a run of the command line; it strikes itself at a change of files, and counts them beside `output_file`."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return Run(pid, functools.partial(_wait_for, pid))
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        output = os.open(output_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        count = _watch_changes(folder, at_change, strike)
        sys.argv = ["prunelit", *arguments]
        from prunelit.cli.main import main as run_command

        try:
            code = run_command()
        except SystemExit as stop:
            code = int(stop.code or 0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # the command has ended; what follows is ours
        count(-1)
        output_file.with_suffix(".count").write_text(str(count(0)))
        output_file.with_suffix(".modules").write_text("\n".join(sys.modules))
    except BaseException:  # noqa: BLE001  (as Python's own end of a process)
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise AssertionError


def start_process(
    arguments: list[str], folder: Path, output_file: Path, at_change: int = 0, strike: str = "KILL"
) -> Run:
    """Start a real process; it can be struck at a time only."""
    with output_file.open("w") as output:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "prunelit", *arguments]
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    return Run(process.pid, functools.partial(process.wait, _LIMIT))


def _wait_for(pid: int) -> int:
    deadline = time.monotonic() + _LIMIT
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return 124
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])


def _watch_changes(folder: Path, at_change: int, strike: str) -> Callable[[int], int]:
    """Count changes of files below a folder, and strike at one of them; returns what adds to the count and tells it."""
    state = {"count": 0, "on": 1}
    root = str(folder.resolve())

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in _WRITING_EVENTS:
            path = arguments[0]
        else:
            return
        if not state["on"] or not isinstance(path, str | bytes | os.PathLike):
            return
        if not os.path.abspath(os.fsdecode(path)).startswith(root):
            return
        state["count"] += 1
        if state["count"] == at_change:
            send_signal(os.getpid(), strike)

    def count(step: int) -> int:
        if step < 0:
            state["on"] = 0
        return state["count"]

    sys.addaudithook(listen)
    return count


def send_signal(pid: int, strike: str) -> None:
    """Send a signal; INT2 sends two, as an impatient hand does."""
    number = getattr(signal, f"SIG{strike.removesuffix('2')}")
    os.kill(pid, number)
    if strike.endswith("2"):
        time.sleep(0.05)
        os.kill(pid, number)


class Attack:
    """A command, what an undisturbed run of it leaves, and tries to break it."""

    def __init__(self, command: str, template: Path, scratch: Path, start: Callable[..., Run], keep: Path | None):
        self.command, self.template, self.start, self.keep = command, template, start, keep
        self.scratch = scratch / command
        self.scratch.mkdir()
        self.folder = self.scratch / "here"  # always the same path, which files may hold
        self.output_file = self.scratch / "output.txt"
        undisturbed = []
        for _ in range(2):
            self._begin_anew()
            begin = time.perf_counter()
            status = self._run().wait()
            self.seconds = time.perf_counter() - begin
            assert status == 0, (command, status, self.output_file.read_text())
            undisturbed.append(dict(self._digest()))
            import_what_was_imported(self.output_file.with_suffix(".modules"))
        if keep and undisturbed[0] != undisturbed[1]:
            shutil.copytree(self.folder, keep / f"{command}-second", dirs_exist_ok=True)
        assert undisturbed[0] == undisturbed[1], (
            command,
            sorted(set(undisturbed[0].items()) ^ set(undisturbed[1].items())),
        )
        self.expected = undisturbed[0]
        counted = self.output_file.with_suffix(".count")
        self.changes = int(counted.read_text()) if counted.is_file() else 0

    def strike(self, name: str, times: int, seed: int) -> dict[str, Any]:
        """Strike `times` times with a signal and run again after each."""
        chance = random.Random(f"{self.command} {name} {seed}")
        row: dict[str, Any] = {"command": self.command, "signal": name, "line": COMMANDS[self.command]}
        row |= {"seconds_of_a_run": round(self.seconds, 2), "changes_of_files": self.changes}
        row |= {"strikes": 0, "ended_by_it": 0, "equal": 0, "garbage": 0, "checkpoints_differ": 0, "failures": []}
        for number in range(times):
            at_change = chance.randint(1, self.changes) if self.changes and number % 2 else 0
            after = 0.0 if at_change else chance.uniform(0.0, self.seconds)
            moment = f"change {at_change} of {self.changes}" if at_change else f"{after:.2f} s"
            self._begin_anew()
            run = self._run(at_change, name)
            if not at_change:
                time.sleep(after)
                send_signal(run.pid, name)  # a zombie at the worst: nobody has waited for it yet
            status = run.wait()
            row["strikes"] += 1
            row["ended_by_it"] += status != 0
            problems = self._judge_end(name, status)
            left = self._list_hidden()
            status = self._run().wait()
            digests = dict(self._digest())
            garbage = set(digests) - set(self.expected)
            wrong = {path for path, digest in self.expected.items() if digests.get(path) != digest}
            checkpoints = {path for path in garbage | wrong if path.endswith(".ckpt")}
            garbage, wrong = garbage - checkpoints, wrong - checkpoints
            problems += [f"the second run ended with {status}: {self.output_file.read_text()[-500:]}"] if status else []
            problems += [f"garbage: {', '.join(sorted(garbage))}"] if garbage else []
            problems += [f"not equal: {', '.join(sorted(wrong))}"] if wrong else []
            row["equal"] += not wrong and not status
            row["garbage"] += bool(garbage)
            row["checkpoints_differ"] += bool(checkpoints)
            if name not in ("KILL", "INT2") and left:  # a second Ctrl-C may break off the removal
                problems.append(f"left at the signal: {', '.join(left)}")
            if problems:
                row["failures"].append({"moment": moment, "problems": problems})
                if self.keep:
                    shutil.copytree(self.scratch, self.keep / f"{self.command}-{name}-{number}", dirs_exist_ok=True)
        return row

    def _judge_end(self, name: str, status: int) -> list[str]:
        """What is wrong about how a struck run ended: a traceback, or an exit code of success with an error."""
        output = self.output_file.read_text()
        begin = output.find("Traceback")
        problems = [f"traceback: {output[max(0, begin - 300) : begin + 1500]}"] if begin >= 0 else []
        codes = {"KILL": (-9,), "TERM": (143,), "INT": (130,), "INT2": (130,), "HUP": (129,)}[name]
        # Before the command has set its handlers, and after its last line, a signal ends it as the system does.
        number = getattr(signal, f"SIG{name.removesuffix('2')}")
        return problems + ([f"exit code {status}: {output[-300:]}"] if status not in (0, *codes, -number) else [])

    def _run(self, at_change: int = 0, strike: str = "KILL") -> Run:
        return self.start(COMMANDS[self.command].split(), self.folder, self.output_file, at_change, strike)

    def _begin_anew(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.template, self.folder)

    def _list_hidden(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob(".*"))

    def _digest(self) -> Iterator[tuple[str, str]]:
        """Relative paths of all files and folders, and what they hold but for times."""
        for path in sorted(self.folder.rglob("*")):
            yield str(path.relative_to(self.folder)), "folder" if path.is_dir() else digest_file(path)


def digest_file(path: Path) -> str:
    """Digest of a file without what tells time."""
    data = path.read_bytes()
    if path.suffix == ".html" or path.name == "compare.md":  # its numbers are in compare.json
        return "a page"
    if path.suffix == ".json":
        data = json.dumps(drop_times(json.loads(data)), sort_keys=True).encode()
    elif path.suffix in (".pt", ".ckpt"):
        data = repr(drop_times(torch.load(path, map_location="cpu", weights_only=True))).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def drop_times(value: Any) -> Any:
    """A copy of plain data without entries that tell time; tensors become digests."""
    if isinstance(value, dict):
        items = sorted(value.items(), key=lambda item: str(item[0]))
        return {str(name): drop_times(item) for name, item in items if name not in TIMES}
    if isinstance(value, list | tuple):
        return [drop_times(item) for item in value]
    if isinstance(value, torch.Tensor):
        content = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return f"{value.dtype} {list(value.shape)} {hashlib.sha256(content).hexdigest()[:16]}"
    if isinstance(value, str) and value[:1] in "{[":
        try:
            return drop_times(json.loads(value))
        except ValueError:
            return value
    return value


if __name__ == "__main__":
    main()
