"""Script that times one model in vLLM's engine, a round for each line of stdin: `python -P vllm_script.py QUESTION`.

It runs in the environment that has vLLM, which need not have prunelit, so it imports nothing of it. Its answers are
JSON, one a line, on the stdout that it was started with; what vLLM prints goes to stderr.
"""

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process, so that its errors are seen here
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class EngineTimer:
    """An engine with one model, and prompts of random tokens.

    Args:
        question: {"folder", "model_impl", "remote_code", "dtype", "vocabulary", "prompt", "context", "new_tokens",
            "batch", "share": of a GPU's memory}; lengths in tokens.

    Example: see `prunelit.evaluation.engines.vllm_speed`.
    """

    def __init__(self, question: dict[str, Any]):
        from vllm import LLM

        self.question = question
        longest = max(question["prompt"], question["context"] + question["new_tokens"] + 1)
        self.engine = LLM(
            question["folder"],
            dtype=question["dtype"],
            skip_tokenizer_init=True,
            max_model_len=longest,
            max_num_seqs=question["batch"],
            max_num_batched_tokens=max(2048, question["batch"] * longest),  # a prompt is read in one step
            gpu_memory_utilization=question["share"],
            enable_prefix_caching=False,  # every round reads the same prompts
            trust_remote_code=question["remote_code"],
            model_impl=question["model_impl"],
            seed=0,
        )

    def time_round(self) -> dict[str, float]:
        """Time a prompt up to its first token, and new tokens after a context, in seconds."""
        question = self.question
        prefill = self._time_tokens(question["prompt"], 1)
        is_same = question["context"] == question["prompt"]
        context = prefill if is_same else self._time_tokens(question["context"], 1)
        decode = self._time_tokens(question["context"], 1 + question["new_tokens"]) - context
        return {"prefill": prefill, "decode": max(decode, 1e-9)}

    def _time_tokens(self, length: int, new_tokens: int) -> float:
        from vllm import SamplingParams

        draw = random.Random(0)
        prompts = [
            {"prompt_token_ids": [draw.randrange(self.question["vocabulary"]) for _ in range(length)]}
            for _ in range(self.question["batch"])
        ]
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, detokenize=False, ignore_eos=True)
        start = time.perf_counter()
        self.engine.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start


def answer_lines() -> None:
    """Load the model, say by which versions, and answer lines until stdin ends.

    Example: see `prunelit.evaluation.engines.vllm_speed`.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.update({name: os.environ.get(name, value) for name, value in _SETTINGS.items()})
    # A None entry makes `import prunelit` fail, even where it is installed: a modelling file must not need it.
    sys.modules["prunelit"] = None  # type: ignore[assignment]
    import torch
    import transformers
    import vllm

    timer = EngineTimer(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    versions = {"vllm": vllm.__version__, "transformers": transformers.__version__, "torch": str(torch.__version__)}
    print(json.dumps(versions), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(timer.time_round()), file=answers, flush=True)


if __name__ == "__main__":
    answer_lines()
