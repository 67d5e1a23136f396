"""Script that lets vLLM's engine answer prompts from saved folders: `python -P vllm_script.py QUESTION ANSWER`.

It runs in the environment that has vLLM, which need not have prunelit, so it imports nothing of it. QUESTION is a JSON
file (see `answer_question`), ANSWER becomes one.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process, so that its errors are seen here
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, without a GPU; a few short prompts need no more
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def answer_question(question: dict[str, Any]) -> dict[str, Any]:
    """Load folders one after the other, and let each answer the prompts greedily.

    Args:
        question: {"folders": [{"folder", "model_impl": those to try, the first that runs answers, "remote_code",
            "adapter": {"folder", "rank"} of a LoRA adapter, if any, "dtype": other than float32}], "prompts": token
            ids [B][S], the same length in all rows, "new_tokens"}.

    Returns:
        {"versions": of vLLM, transformers and torch, "answers": one for each folder: {"model_impl", "model_class",
        "tokens": [B][N], "logprobs": [B][N], "kv_bytes_per_token"}, or {"error": by model_impl}}.

    Example: see `prunelit.export.proof.served`.
    """
    import torch
    import transformers
    import vllm

    versions = {"vllm": vllm.__version__, "transformers": transformers.__version__, "torch": str(torch.__version__)}
    answers = []
    for item in question["folders"]:
        prompts = item.get("prompts", question.get("prompts"))
        errors: dict[str, str] = {}
        for model_impl in item["model_impl"]:
            try:
                answer = _ask_engine(item, model_impl, prompts, question["new_tokens"])
            except Exception as error:  # noqa: BLE001  # whatever vLLM raises is the answer
                errors[model_impl] = _find_reason(error)
            else:
                answers.append({"model_impl": model_impl, **answer, **({"refused": errors} if errors else {})})
                break
            finally:
                _clean_up()
        else:
            answers.append({"error": errors})
    return {"versions": versions, "answers": answers}


def _ask_engine(item: dict[str, Any], model_impl: str, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Load one folder, with its adapter if it has one, and let it answer."""
    from vllm import LLM, SamplingParams

    adapter, more = item.get("adapter"), dict[str, Any]()
    if adapter:
        from vllm.lora.request import LoRARequest

        more["lora_request"] = LoRARequest("adapter", 1, adapter["folder"])
    engine = LLM(
        item["folder"],
        dtype=item.get("dtype", "float32"),
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=len(prompts[0]) + new_tokens,
        max_num_seqs=len(prompts),
        max_num_batched_tokens=max(64, len(prompts) * (len(prompts[0]) + new_tokens)),
        num_gpu_blocks_override=64 * len(prompts),  # a small KV cache; by default it takes most of a GPU
        trust_remote_code=item["remote_code"],
        model_impl=model_impl,
        seed=0,
        **({"enable_lora": True, "max_lora_rank": adapter["rank"]} if adapter else {}),
    )
    # No min_tokens: until they are reached, vLLM would give no token that ends a text, as transformers may.
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, logprobs=1, detokenize=False, ignore_eos=True)
    # vLLM divides by what its progress bar has counted, which is nothing where TQDM_DISABLE is set, as -q does.
    more["use_tqdm"] = False
    answers = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, **more)
    outputs = [answer.outputs[0] for answer in answers]
    tokens = [list(output.token_ids) for output in outputs]
    logprobs = [
        [step[token].logprob for token, step in zip(output.token_ids, output.logprobs or (), strict=True)]
        for output in outputs
    ]
    return {"tokens": tokens, "logprobs": logprobs, **_describe_engine(engine)}


def _describe_engine(engine: Any) -> dict[str, Any]:
    """The class that vLLM took, and what it stores in its KV cache; nothing where its insides are elsewhere."""
    try:
        runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
        specifications = runner.get_kv_cache_spec().values()
        per_token = sum(int(item.page_size_bytes) // int(item.block_size) for item in specifications)
        return {"model_class": type(runner.model).__name__, "kv_bytes_per_token": per_token}
    except Exception:  # noqa: BLE001
        return {}


def _find_reason(error: BaseException) -> str:
    """The message of the error that began it, in one line."""
    while (cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = cause
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text}"[:400]


def _clean_up() -> None:
    """Free what an engine holds, so that the next one can start in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    os.environ.update({name: os.environ.get(name, value) for name, value in _SETTINGS.items()})
    # A None entry makes `import prunelit` fail, even where it is installed: a modelling file must not need it.
    sys.modules["prunelit"] = None  # type: ignore[assignment]
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(answer_question(asked)), encoding="utf-8")
