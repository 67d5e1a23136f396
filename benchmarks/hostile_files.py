"""Files of strangers, made hostile by chance: each is read or refused in one line, in ten seconds, and runs no code.

    PYTHONPATH=. python benchmarks/hostile_files.py [--tries 200] [--seed 0] [--kinds config plan]

A whole file of every kind is written once: model folders, GGUF, plans, adapters, checkpoints, YAML, texts, tokenizers.
A try changes it at random places: values of JSON and YAML become others (long, deep, negative, huge, of another type,
code, paths that lead away, control characters), names are removed or doubled, bytes are flipped, cut off, repeated.
Then prunelit's own reader reads it, in a process that a parent forks for this try, with its time and memory limited. A
file named canary, which all hostile values try to write, says whether code was run.
"""

import argparse
import contextlib
import copy
import gzip
import importlib
import io
import json
import os
import pickle
import platform
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch

import prunelit
from prunelit.cli.console import condense_errors
from prunelit.cli.main import main as run_command
from prunelit.core.plan import PruningPlan
from prunelit.data import loading, sources, text
from prunelit.model import surgery
from prunelit.model.copies import copy_to_meta_device
from prunelit.recovery.adapter_files import check_adapter
from prunelit.runtime.errors import PrunelitError
from prunelit.runtime.text_files import write_json
from prunelit.runtime.torch_files import read_lightning_file
from prunelit.runtime.versions import collect_versions

ROOT = Path(__file__).parents[1]
SECONDS = 10.0
"""Of the processor, most for one file."""
MEMORY = 6 * 2**30
"""Bytes of address space on top of what the process has when it is forked."""
CANARY = "canary"


# What is attacked ----------------------------------------------------------------------------------------------------


def write_originals(folder: Path) -> Path:
    """Whole files of every kind, from a tiny random model."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from prunelit.callbacks import Magnitude
    from prunelit.export.write import save
    from tests.tiny import tiny_byte_tokenizer

    folder.mkdir(parents=True)
    tokenizer = tiny_byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    model.save_pretrained(folder / "model")
    model.save_pretrained(folder / "sharded", max_shard_size="20KB")
    for name in ("model", "sharded"):
        tokenizer.save_pretrained(folder / name)
    words = [f"w{number * 7 % 101}" for number in range(400)]
    (folder / "words.txt").write_text(" ".join(words))
    rows = [{"text": " ".join(words[n : n + 9]), "n": n} for n in range(60)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chat = {"messages": [{"role": "user", "content": "how"}, {"role": "assistant", "content": "so and so"}]}
    (folder / "chats.jsonl").write_text("\n".join([json.dumps(chat)] * 30))
    (folder / "rows.csv").write_text("text,n\n" + "\n".join(f"{row['text']},{row['n']}" for row in rows))
    (folder / "packed.txt.gz").write_bytes(gzip.compress(" ".join(words).encode()))
    _write_parquet(rows, folder / "rows.parquet")
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    adapted.save_pretrained(str(folder / "adapter"))
    method = Magnitude(ratio=0.3, align=8)
    pruned = copy.deepcopy(model)
    plan = method.prune(pruned)
    plan.save(folder / "plan.json")
    save(pruned, folder / "hetero", tokenizer, plan, format="hetero")
    save(model, folder / "model.gguf", tokenizer, format="gguf", unproved=True)
    torch.save(
        {
            "epoch": 1,
            "global_step": 3,
            "pytorch-lightning_version": "2.6.0",
            "state_dict": {"weight": torch.zeros(4, 4)},
            "callbacks": {"Magnitude": {"plan": plan.to_json(), "earlier_plans": []}},
            "loops": {},
            "optimizer_states": [],
        },
        folder / "last.ckpt",
    )
    options = {"model": str(folder / "nowhere"), "method": "llm_bip", "ratio": 0.2, "text": str(folder / "words.txt")}
    (folder / "run.yaml").write_text(json.dumps(options | {"windows": 8, "seqlen": 16, "out": "out", "protect": [0]}))
    return folder


def _write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    """In a process of its own: pyarrow starts threads, which a fork does not bear."""
    import subprocess

    code = "import json,sys,pyarrow as a,pyarrow.parquet as p; p.write_table(a.Table.from_pylist(json.load(sys.stdin))"
    subprocess.run([sys.executable, "-c", f"{code}, {str(path)!r})"], input=json.dumps(rows), text=True, check=True)


def _load_model(folder: Path) -> None:
    sources.check_model_source(str(folder))
    sources.check_prunable_source(str(folder))
    model = prunelit.load(folder)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))


def _read_text(path: Path) -> None:
    tokenizer = loading.load_tokenizer(str(path.parent / "model"))
    text.draw_windows(str(path), tokenizer, seqlen=8, count=4, seed=0)


def _read_tokenizer(folder: Path) -> None:
    tokenizer = loading.load_tokenizer(str(folder))
    tokenizer("so and so", verbose=False)
    text.draw_windows(str(folder.parent / "chats.jsonl"), tokenizer, seqlen=8, count=2)


def _read_plan(path: Path) -> None:
    plan = PruningPlan.load(path)
    model = copy_to_meta_device(prunelit.load(path.parent / "model"))
    surgery.apply(model, plan)


def _read_adapter(folder: Path) -> None:
    from prunelit.recovery.prepare import prepare_export_model

    check_adapter(folder, str(folder.parent / "model"))
    prepare_export_model(str(folder.parent / "model"), "float32", "uniform", None, str(folder), lambda said: None)


def _read_yaml(path: Path) -> None:
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = run_command(["prune", "--config", str(path)])
        except SystemExit as stop:
            code = int(stop.code or 0)
    lines = [line for line in error.getvalue().splitlines() if line.strip()]
    if code != 2 or not lines or not lines[-1].startswith("prunelit: error: "):
        raise AssertionError(f"exit code {code}: {error.getvalue()[-300:]}")
    raise PrunelitError(lines[-1])


# Kind: the file that is changed, the folder or file that is read, how it is changed, who reads it.
KINDS: dict[str, tuple[str, str, str, Callable[[Path], object]]] = {
    "config": ("model/config.json", "model", "json", _load_model),
    "config of layers": ("hetero/config.json", "hetero", "json", _load_model),
    "generation config": ("model/generation_config.json", "model", "json", _load_model),
    "safetensors header": ("model/model.safetensors", "model", "header", _load_model),
    "safetensors bytes": ("hetero/model.safetensors", "hetero", "bytes", _load_model),
    "index": ("sharded/model.safetensors.index.json", "sharded", "json", _load_model),
    "gguf": ("model.gguf", "model.gguf", "front", _load_model),
    "tokenizer": ("model/tokenizer.json", "model", "json", _read_tokenizer),
    "tokenizer config": ("model/tokenizer_config.json", "model", "json", _read_tokenizer),
    "chat template": ("model/chat_template.jinja", "model", "template", _read_tokenizer),
    "plan": ("plan.json", "plan.json", "json", _read_plan),
    "adapter config": ("adapter/adapter_config.json", "adapter", "json", _read_adapter),
    "adapter weights": ("adapter/adapter_model.safetensors", "adapter", "header", _read_adapter),
    "checkpoint": ("last.ckpt", "last.ckpt", "archive", read_lightning_file),
    "yaml": ("run.yaml", "run.yaml", "yaml", _read_yaml),
    "text jsonl": ("rows.jsonl", "rows.jsonl", "lines", _read_text),
    "text chats": ("chats.jsonl", "chats.jsonl", "lines", _read_text),
    "text csv": ("rows.csv", "rows.csv", "bytes", _read_text),
    "text parquet": ("rows.parquet", "rows.parquet", "bytes", _read_text),
    "text packed": ("packed.txt.gz", "packed.txt.gz", "bytes", _read_text),
    "text plain": ("words.txt", "words.txt", "bytes", _read_text),
}


# How a file is changed ------------------------------------------------------------------------------------------------


class Reduced:
    """A pickle of it writes the canary."""

    def __init__(self, canary: str):
        self.canary = canary

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.canary}",))


def list_hostile_values(canary: str) -> list[Any]:
    deep: Any = 0
    for _ in range(150):
        deep = [deep]
    return [
        *(
            None,
            True,
            False,
            -1,
            0,
            1,
            7,
            2**31,
            2**63,
            2**70,
            -(2**70),
            1e308,
            0.5,
            float("nan"),
            float("inf"),
            10**400,
        ),
        *(
            "",
            " ",
            "x" * 100_000,
            "\x00",
            "\x1b[2J\x1b]0;x\x07",
            "\u202eabc",
            "\ud800",
            "a\nb\nc",
            "../../../../etc/passwd",
        ),
        *(
            "/etc/passwd",
            "/dev/zero",
            "/dev/stdin",
            "http://127.0.0.1:9/x",
            "file:///etc/passwd",
            "-1",
            "NaN",
            "%s%n{0}{x}",
        ),
        *([], {}, [[]], {"": None}, [None] * 1000, deep, {"a": {"a": {"a": {}}}}, list(range(5000))),
        *(
            f"__import__('os').system('touch {canary}')",
            f"$(touch {canary})",
            f"`touch {canary}`",
            f"; touch {canary};",
        ),
        *(f"!!python/object/apply:os.system ['touch {canary}']", f"modeling_x--{canary}", "os.system", "builtins.eval"),
        *({"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}, {"class_path": "os.system"}),
        *("quantization_config", "mamba", "llama", "bloom", "float4", "torch.float32", "auto", "<s>", "cuda"),
    ]


def list_hostile_templates(canary: str) -> list[str]:
    return [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        f"{{{{ cycler.__init__.__globals__.os.system('touch {canary}') }}}}",
        f"{{{{ messages.__class__.__init__.__globals__['os'].system('touch {canary}') }}}}",
        f"{{{{ lipsum.__globals__['os'].popen('touch {canary}').read() }}}}",
        "{% for x in range(10**9) %}{% endfor %}",
        "{{ 'x' * 10**6 }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.system('x') }}",
        "{{ raise_exception('no') }}",
        "{% if",
        "{{ undefined.attribute }}",
        "{{ messages[10**20] }}",
        "{{ 1 / 0 }}",
        "",
        "\x00",
        "{{ 9**9**9 }}",
    ]


HOSTILE_NAMES = (
    "auto_map",
    "trust_remote_code",
    "_name_or_path",
    "tokenizer_class",
    "custom_pipelines",
    "dtype",
    "quantization_config",
)


def mutate_json(value: Any, chance: random.Random, hostile: list[Any]) -> Any:
    """Change one place of plain data."""
    places: list[tuple[Any, Any]] = []

    def collect(part: Any) -> None:
        items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
        for name, item in list(items)[:400]:
            places.append((part, name))
            collect(item)

    collect(value)
    if not places:
        return chance.choice(hostile)
    owner, name = chance.choice(places)
    what = chance.random()
    if what < 0.6:
        owner[name] = copy.deepcopy(chance.choice(hostile))
    elif what < 0.75:
        del owner[name]
    elif what < 0.9 and isinstance(owner, dict):
        owner[chance.choice([*HOSTILE_NAMES, *map(str, owner)])] = copy.deepcopy(chance.choice(hostile))
    elif isinstance(owner, list):
        owner.extend(copy.deepcopy(owner) * chance.choice([1, 100]))
    else:
        return chance.choice([hostile[0], [value], chance.choice(hostile)])
    return value


def mutate_bytes(data: bytes, chance: random.Random, front: int | None = None) -> bytes:
    """Flip, cut, repeat or insert bytes, in all of the data or its front."""
    changed = bytearray(data)
    end = min(front or len(data), len(data)) or 1
    for _ in range(chance.choice([1, 1, 2, 8, 64])):
        place, what = chance.randrange(end), chance.random()
        if what < 0.4:
            changed[place : place + 1] = bytes([chance.randrange(256)])
        elif what < 0.55:
            size = chance.choice([1, 2, 4, 8])
            changed[place : place + size] = chance.choice([b"\xff", b"\x00", b"\x7f"]) * size
        elif what < 0.7:
            changed[place : place + 8] = struct.pack("<Q", chance.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1]))
        elif what < 0.8:
            del changed[place : place + chance.choice([1, 8, 1000])]
        elif what < 0.9:
            changed[place:place] = changed[place : place + chance.choice([1, 100, 5000])]
        elif what < 0.95:
            del changed[place:]
        else:
            changed[place:place] = chance.choice(["\x00" * 50, "\u202e\x1b[2J", "x" * 2**21, "[" * 5000]).encode()
    return bytes(changed)


def mutate_header(data: bytes, chance: random.Random, hostile: list[Any]) -> bytes:
    """Change the JSON header of a safetensors file, or its length."""
    size = int.from_bytes(data[:8], "little")
    if chance.random() < 0.2:
        return mutate_bytes(data, chance, 8 + size)
    header = mutate_json(json.loads(data[8 : 8 + size]), chance, hostile)
    encoded = dump_json(header, chance)
    length = len(encoded) if chance.random() < 0.9 else chance.choice([0, 2**40, 2**63, len(encoded) + 1])
    return length.to_bytes(8, "little") + encoded + data[8 + size :]


def mutate_archive(data: bytes, chance: random.Random, canary: str) -> bytes:
    """Change bytes of an archive of torch, or put a hostile pickle into it."""
    if chance.random() < 0.6:
        return mutate_bytes(data, chance)
    target = io.BytesIO()
    payload = pickle.dumps({"global_step": 1, "state_dict": {}, "x": Reduced(canary)})
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w") as changed:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                content = payload if chance.random() < 0.5 else mutate_bytes(content, chance)
            changed.writestr(name if chance.random() < 0.95 else f"../../{name}", content)
    return payload if chance.random() < 0.1 else target.getvalue()


def dump_json(value: Any, chance: random.Random) -> bytes:
    """JSON, now and then with a name twice, cut off, or in another encoding."""
    dumped = json.dumps(value)
    what = chance.random()
    if what < 0.05 and dumped.startswith("{"):
        dumped = "{" + dumped[1:-1] + "," + dumped[1:]
    elif what < 0.08:
        dumped = dumped.replace(": ", ": " + "[" * 3000 + "]" * 3000 + ', "x": ', 1)
    elif what < 0.12:
        dumped = dumped[: chance.randrange(len(dumped) + 1)]
    return dumped.encode("utf-16" if what > 0.97 else "utf-8", errors="surrogatepass")


def write_hostile(kind: str, seed: int, folder: Path) -> Path:
    """Change a copy of the originals by a seed, and return what is to be read."""
    changed, read, how, _ = KINDS[kind]
    chance = random.Random(f"{kind} {seed}")
    canary = str(folder / CANARY)
    hostile, path = list_hostile_values(canary), folder / changed
    data = path.read_bytes()
    (path.parent / "evil.py").write_text(f"open({canary!r}, 'w')\nclass Evil:\n    pass\n")
    if how in ("json", "yaml"):
        value = json.loads(data)
        for _ in range(chance.choice([1, 1, 2, 5])):
            value = mutate_json(value, chance, hostile)
        data = dump_json(value, chance)
        if how == "yaml" and chance.random() < 0.4:
            data = mutate_bytes(data, chance)
        elif how == "yaml" and chance.random() < 0.3:
            data = f"model: !!python/object/apply:os.system ['touch {canary}']\n".encode() + data
    elif how == "header":
        data = mutate_header(data, chance, hostile)
    elif how == "archive":
        data = mutate_archive(data, chance, canary)
    elif how == "template":
        template = chance.choice([*list_hostile_templates(canary), data.decode()])
        data = template.encode() if chance.random() < 0.7 else mutate_bytes(data, chance)
    elif how == "lines":
        lines = data.split(b"\n")
        for _ in range(chance.choice([1, 3, 30])):
            number = chance.randrange(len(lines))
            with contextlib.suppress(ValueError, RecursionError):
                lines[number] = dump_json(mutate_json(json.loads(lines[number]), chance, hostile), chance)
        data = b"\n".join(lines)
    else:
        data = mutate_bytes(data, chance, 4096 if how == "front" else None)
    path.write_bytes(data)
    return folder / read


# One try --------------------------------------------------------------------------------------------------------------


def judge(kind: str, path: Path) -> tuple[str, str]:
    """Read a hostile file: "read", "refused", or what is wrong, and the message."""
    canary = path.parent / CANARY
    begin = time.process_time()
    verdict, message = "read", ""
    try:
        with warnings.catch_warnings(), condense_errors("evaluate"):
            warnings.simplefilter("ignore")
            KINDS[kind][3](path)
    except PrunelitError as error:
        verdict, message = "refused", str(error)
        if "\n" in message.strip() or not message.strip():
            verdict = "several lines"
    except Exception as error:  # noqa: BLE001  (a traceback is what is looked for)
        last = traceback.extract_tb(error.__traceback__)
        own = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in last if "prunelit" in frame.filename][-2:]
        verdict, message = "traceback", f"{type(error).__name__}: {str(error)[:300]} at {', '.join(own)}"
    seconds = time.process_time() - begin
    if canary.exists():
        verdict = "ran code"
    elif seconds > SECONDS:
        verdict, message = "too long", f"{seconds:.1f} s; {message}"
    return verdict, message


def attempt(kind: str, seed: int, originals: Path, scratch: Path, in_memory: bool = False) -> tuple[str, str]:
    """One try in a new folder; in a forked process with limits unless `in_memory`."""
    folder = scratch / "here"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(originals, folder)
    os.environ["PRUNELIT_CACHE"] = str(folder / "cache")
    path = write_hostile(kind, seed, folder)
    if in_memory:
        return judge(kind, path)
    answer = scratch / "answer.json"
    answer.unlink(missing_ok=True)
    if not (pid := os.fork()):
        with contextlib.suppress(BaseException):
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            resource.setrlimit(resource.RLIMIT_CPU, (int(SECONDS) + 5, int(SECONDS) + 6))
            answer.write_text(json.dumps(judge(kind, path)))
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if answer.is_file():
        verdict, message = json.loads(answer.read_text())
        return verdict, message
    code = os.waitstatus_to_exitcode(status)
    if (folder / CANARY).exists():
        return "ran code", ""
    return ("too long", "stopped by its limit") if code == -24 else ("ended", f"exit status {code}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=200, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "hostile_files.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("prunelit.cli.prune", "peft", "gguf", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)  # so that no try has to; nothing that starts threads, which a fork does not bear
    assert len(os.listdir("/proc/self/task")) == 1
    rows: dict[str, Counter[str]] = {kind: Counter() for kind in options.kinds}
    failures = []
    with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
        originals = Path(scratch) / "originals"
        if not (writer := os.fork()):  # it starts threads
            write_originals(originals)
            os._exit(0)
        assert os.waitpid(writer, 0)[1] == 0
        for number in range(options.tries):
            kind = options.kinds[number % len(options.kinds)]
            seed = options.seed + number // len(options.kinds)
            verdict, message = attempt(kind, seed, originals, Path(scratch))
            rows[kind][verdict] += 1
            if verdict not in ("read", "refused"):
                failures.append({"kind": kind, "seed": seed, "verdict": verdict, "message": message})
                print(json.dumps(failures[-1]), flush=True)
            if (number + 1) % len(options.kinds) == 0 or number + 1 == options.tries:
                write_result(rows, failures, options)


def write_result(rows: dict[str, Counter[str]], failures: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write what is known by now: a run may take long on a busy machine."""
    tries = sum(sum(counts.values()) for counts in rows.values())
    result = {
        "command": "python " + " ".join([f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]),
        "tries": tries,
        "read_or_refused_in_one_line": tries - len(failures),
        "kinds": {kind: dict(sorted(counts.items())) for kind, counts in rows.items()},
        "failures": failures,
        "limits": {"processor_seconds": SECONDS, "bytes_of_memory": MEMORY},
        "machine": {"processor": platform.processor() or platform.machine()},
        "versions": collect_versions(),
    }
    write_json(options.out, result)
    print(json.dumps({name: result[name] for name in ("tries", "read_or_refused_in_one_line")}), flush=True)


if __name__ == "__main__":
    main()
