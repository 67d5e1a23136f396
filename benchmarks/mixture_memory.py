"""What it takes to prune a mixture of experts from disk: a folder of random weights in the shape of Qwen3-30B-A3B.

    python benchmarks/mixture_memory.py [--layers 8] [--memory_gib 8] [--windows 4] [--seqlen 128] [--method reap]

The folder is written layer by layer and removed afterwards, as is the result. `python -m prunelit prune --stream true`
runs in a process of its own, which is watched: resident memory, of which pages of mapped files are a part that the
system takes back when it needs them, and anonymous memory, which it cannot take back. The time for 48 layers
is extrapolated in proportion to the layers. The result is written to benchmarks/results/.
"""

import argparse
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

from prunelit.export.safetensors_parts import TensorParts, write_tensor_parts
from prunelit.runtime.text_files import write_json
from prunelit.runtime.versions import collect_versions

ROOT = Path(__file__).parents[1]
FULL_LAYERS = 48
WORDS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--memory_gib", type=float, default=8.0)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--method", default="reap")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--folder", help="keep the random model here, and use the one that is there")
    parser.add_argument("--name", default="", help="of the result: mixture_memory.NAME.json")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="mixture-memory.") as scratch:
        source = Path(options.folder or Path(scratch) / "dense")
        started = time.monotonic()
        made = not source.exists()
        if made:
            write_random_model(source, options.layers)
        seconds_to_make = time.monotonic() - started
        result = prune(options, source, Path(scratch)) | {
            "command": "python " + " ".join([f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]),
            "layers": options.layers,
            "size_of_model_gib": sum(file.stat().st_size for file in source.glob("*.safetensors")) / 2**30,
            "seconds_to_make_the_model": round(seconds_to_make, 1) if made else None,
            "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "versions": collect_versions(),
        }
    name = options.name or f"{options.memory_gib:g}gib"
    write_json(ROOT / "benchmarks" / "results" / f"mixture_memory.{name}.json", result)
    print(json.dumps(result, indent=2))


def write_random_model(folder: Path, layers: int) -> None:
    """Write config, tokenizer and random bfloat16 weights under the names of the family; one tensor is in memory."""
    config = Qwen3MoeConfig(
        hidden_size=2048,
        num_hidden_layers=layers,
        num_experts=128,
        moe_intermediate_size=768,
        num_experts_per_tok=8,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=6144,
        vocab_size=151936,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=40960,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    vocabulary = {f"w{number}": number for number in range(WORDS)} | {"<unk>": WORDS}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(folder)
    rest = {"model.embed_tokens.weight": (151936, 2048), "lm_head.weight": (151936, 2048), "model.norm.weight": (2048,)}
    groups: list[dict[str, tuple[int, ...]]] = [rest]
    for index in range(layers):
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (2048,),
            "post_attention_layernorm.weight": (2048,),
            "self_attn.q_proj.weight": (4096, 2048),
            "self_attn.k_proj.weight": (512, 2048),
            "self_attn.v_proj.weight": (512, 2048),
            "self_attn.o_proj.weight": (2048, 4096),
            "self_attn.q_norm.weight": (128,),
            "self_attn.k_norm.weight": (128,),
            "mlp.gate.weight": (128, 2048),
        }
        for expert in range(128):
            shapes |= {f"mlp.experts.{expert}.{name}_proj.weight": (768, 2048) for name in ("gate", "up")}
            shapes[f"mlp.experts.{expert}.down_proj.weight"] = (2048, 768)
        groups.append({f"model.layers.{index}.{name}": shape for name, shape in shapes.items()})
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        parts = [
            TensorParts(name, torch.bfloat16, shape, lambda name=name, shape=shape: [make_tensor(name, shape)])  # type: ignore[misc]
            for name, shape in group.items()
        ]
        write_tensor_parts(folder / file, parts)
        weight_map |= dict.fromkeys(group, file)
    index_file = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file), encoding="utf-8")


def make_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Make a random weight, the same for the same name; norms are ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(random.Random(name).randrange(2**31))
    # Uniform integers are the fastest to draw; the standard deviation is about 0.02.
    values = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    return values.bfloat16() * (0.02 / 73)


def prune(options: argparse.Namespace, source: Path, scratch: Path) -> dict[str, Any]:
    """Prune the folder in a process of its own, and watch it."""
    words, out = scratch / "words.txt", scratch / "pruned"
    chance = random.Random(0)
    words.write_text(" ".join(f"w{chance.randrange(WORDS)}" for _ in range(20 * options.windows * options.seqlen)))
    command = [sys.executable, "-m", "prunelit", "prune", "--model", str(source), "--method", options.method]
    command += ["--ratio", str(options.ratio), "--text", str(words), "--windows", str(options.windows)]
    command += ["--seqlen", str(options.seqlen), "--stream", "true", "--memory_gib", str(options.memory_gib)]
    started = time.monotonic()
    log = scratch / "log.txt"
    peaks: dict[str, int] = {}
    with log.open("w") as output:
        child = subprocess.Popen([*command, "--out", str(out)], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
        while child.poll() is None:
            for name, size in read_memory(child.pid).items():
                peaks[name] = max(peaks.get(name, 0), size)
            time.sleep(0.5)
    seconds = time.monotonic() - started
    result: dict[str, Any] = {
        "prune": [part.replace(str(source), "DIR").replace(str(scratch), "TMP") for part in command[1:]],
        "exit_status": child.returncode,
        "seconds": round(seconds, 1),
        "seconds_per_layer": round(seconds / options.layers, 2),
        "peak_resident_gib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 3),
        "peak_anonymous_gib": round(peaks.get("Anonymous", 0) / 2**20, 3),
        "peak_resident_polled_gib": round(peaks.get("Rss", 0) / 2**20, 3),
    }
    if child.returncode:
        return result | {"message": log.read_text(errors="replace")[-2000:]}
    report = json.loads((out / "report.json").read_text())
    proof = json.loads((out / "proof.json").read_text())
    stages = report["seconds"]
    result |= {
        "stages_in_seconds": stages,
        # The start, the text, embeddings and head count as if they grew with the layers: from above.
        "seconds_for_48_layers_extrapolated": round(seconds / options.layers * FULL_LAYERS),
        "size_of_result_gib": sum(file.stat().st_size for file in out.glob("*.safetensors")) / 2**30,
        "experts_left_in_each_layer": AutoConfig.from_pretrained(out).num_experts,
        "proof_passed": proof["passed"],
        "format": report["format"],
    }
    shutil.rmtree(out)
    return result


def read_memory(process: int) -> dict[str, int]:
    """Resident and anonymous memory of a process now, KiB; nothing when it has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except (OSError, ProcessLookupError):
        return {}
    fields = dict(line.split(":", 1) for line in lines[1:])
    return {name: int(fields[name].split()[0]) for name in ("Rss", "Anonymous") if name in fields}


if __name__ == "__main__":
    main()
