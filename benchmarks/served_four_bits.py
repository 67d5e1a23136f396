"""Whether vLLM reads folders of format w4a16, and answers as transformers does from them.

    .venv/bin/python benchmarks/served_four_bits.py --vllm_python ENV/bin/python

Tiny random models are rounded to 4 bits and saved: with layers alike, with layers of different FFN widths, and of
another family. transformers, through compressed-tensors, says what they answer to five prompts, greedily and in
float32; then vLLM, in an environment of its own, reads each folder and answers the same prompts.

vLLM's wheel for CPUs has its 4-bit product for AVX-512 only. Where it is missing, or cannot run in float32, a plain
product with the unpacked weight takes its place (--product plain, the default), so that vLLM's reading of the files is
tried: names, shapes, joined queries, keys and values, zero points. --product own leaves vLLM as it is, and both sides
compute in bfloat16, in which log-probabilities differ by more than the limit for float32, so texts are what counts.
The result is written to benchmarks/results/served_four_bits.json.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NEW_TOKENS = 8
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 128}
CASES = {"llama, layers alike": ("llama", False), "llama, layers differ": ("llama", True), "qwen2": ("qwen2", False)}
QUESTION_SCRIPT = ROOT / "prunelit/export/proof/vllm_script.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm_python", required=True, help="Python of an environment that has vLLM")
    parser.add_argument("--product", choices=["plain", "own"], default="plain")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/served_four_bits.json")
    arguments = parser.parse_args()

    import torch

    from prunelit.export.proof import new_process
    from prunelit.export.proof.served import compare_served_answers, list_serve_folders
    from prunelit.runtime.versions import collect_versions

    dtype = "float32" if arguments.product == "plain" else "bfloat16"
    prompts = torch.randint(3, 128, (5, 12), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / str(index) for index in range(len(CASES))]
        expected = [
            write_model(*case, folder, prompts, dtype) for case, folder in zip(CASES.values(), folders, strict=True)
        ]
        shapes = ["hetero" if differ else "uniform" for _, differ in CASES.values()]
        items = list_serve_folders(list(zip(folders, shapes, strict=True)))
        question: dict[str, Any] = {"folders": [item | {"dtype": dtype} for item in items]}
        question |= {"prompts": prompts.tolist(), "new_tokens": NEW_TOKENS, "product": arguments.product}
        options = {"python": arguments.vllm_python}
        reply = json.loads(new_process.run_proof_script(__file__, question, Path(scratch), "vLLM's process", **options))
    cases: dict[str, Any] = {}
    for name, own, answer in zip(CASES, expected, reply["answers"], strict=True):
        verdict = {"error": answer["error"]} if "error" in answer else compare_served_answers(own, answer)
        cases[name] = {key: answer[key] for key in ("model_impl", "model_class") if key in answer} | verdict
        print(name, cases[name], flush=True)
    results = {
        "command": "benchmarks/served_four_bits.py --vllm_python ENV/bin/python",
        "product": arguments.product,
        "dtype": dtype,
        "cases": cases,
        "vllm": reply["versions"],
        "versions": collect_versions("compressed_tensors"),
    }
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def write_model(family: str, layers_differ: bool, path: Path, prompts: Any, dtype: str) -> dict[str, Any]:
    """Round a tiny random model to 4 bits, save it, and return its greedy answers as transformers reads it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from prunelit.core.plan import LayerPlan, PruningPlan
    from prunelit.export import write_model as write
    from prunelit.export.proof.served import compute_greedy_answers
    from prunelit.model import surgery
    from prunelit.model.decoder import Decoder
    from prunelit.quantization import quantize

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    if layers_differ:
        shape = Decoder(model).shape
        dense = [LayerPlan.dense(layer) for layer in shape.layers]
        layers = tuple(replace(each, ffn_channels=tuple(range(70 + 60 * i))) for i, each in enumerate(dense))
        surgery.apply(model, PruningPlan("by hand", shape, layers))
    quantize.quantize_model(model, "int4", 32, zeros="integer")
    write(model, path, format="w4a16")
    stored = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), trust_remote_code=True)
    return compute_greedy_answers(stored, prompts, NEW_TOKENS)


def answer_in_vllm(question_file: str, answer_file: str) -> None:
    """Run prunelit's script for vLLM in vLLM's environment, with a plain product in place of that in 4 bits."""
    import importlib.util
    import os

    specification = importlib.util.spec_from_file_location("vllm_script", QUESTION_SCRIPT)
    assert specification is not None and specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    os.environ.update({name: os.environ.get(name, value) for name, value in script._SETTINGS.items()})
    question = json.loads(Path(question_file).read_text(encoding="utf-8"))
    if question["product"] == "plain":
        replace_product()
    Path(answer_file).write_text(json.dumps(script.answer_question(question)), encoding="utf-8")


def replace_product() -> None:
    """Let vLLM's linears in 4 bits unpack their weight once, and multiply with it."""
    import torch
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel

    shifts = 4 * torch.arange(8, dtype=torch.int32)

    def unpack_weight(self: Any, layer: Any) -> None:
        packed, scale, points = (getattr(layer, name) for name in (self.w_q_name, self.w_s_name, self.w_zp_name))
        rows, groups = scale.shape
        codes = (packed.data[..., None] >> shifts & 15).view(rows, groups, -1)
        zeros = (points.data[:, None] >> shifts[:, None] & 15).reshape(-1, groups)[:rows]
        layer.plain_weight = ((codes - zeros[..., None]) * scale.data[..., None]).view(rows, -1)

    def multiply(self: Any, layer: Any, x: Any, bias: Any = None) -> Any:
        return torch.nn.functional.linear(x, layer.plain_weight, bias)

    CPUWNA16LinearKernel.process_weights_after_loading = unpack_weight
    CPUWNA16LinearKernel.apply_weights = multiply


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].endswith(".json"):  # in vLLM's environment
        answer_in_vllm(*sys.argv[1:])
    else:
        main()
