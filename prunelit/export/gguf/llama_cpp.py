"""Runs GGUF files in llama.cpp (wheel `xllamacpp`), in a process of its own: python -P llama_cpp.py ASKED ANSWER.

It is run as a file, and imports nothing of prunelit: what is read is the GGUF file and nothing else, and a graph that
aborts ends this process only. Both arguments are JSON files:

ASKED   {"runs": [{"file", "exact"}], "prompts": [[id]], "new_tokens", "top", "readable": id, "texts": [str],
        "threads"}
ANSWER  a list with one entry per run: {"steps": per prompt [{"id", "logprobs": {id: logprob}}], "tokens": ids per text,
        "tokens_per_second"}

An "exact" run keeps the KV cache in float32 and has no flash attention, which rounds to float16 inside; another one has
llama.cpp's own settings.
"""

import json
import math
import statistics
import sys
import urllib.request
from pathlib import Path
from typing import Any


def start_llama_server(file: str, exact: bool, context: int, threads: int) -> Any:
    """llama.cpp's server on one file, on the CPU; it listens on the loopback interface, for `tokenize_on_server`."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.n_ctx = context
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.port = 0  # any free one
    parameters.ui = False
    parameters.warmup = False
    parameters.fit_params = False
    parameters.verbosity = 1  # errors
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    if exact:
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(parameters)


def generate_greedily(
    server: Any, prompt: list[int], new_tokens: int, top: int, readable: int
) -> tuple[list[dict[str, Any]], list[float]]:
    """The most probable token at each step, with the `top` log-probabilities; the KV cache is kept between steps.

    The server keeps back tokens that are half a character. So it is asked for one token at a time, and made to take
    `readable`; the log-probabilities beside it are those from before that, and their first is the step's token.

    Returns:
        Steps, and milliseconds of each but the first, which reads the prompt.
    """
    steps: list[dict[str, Any]] = []
    times = []
    while len(steps) < new_tokens:
        answer = server.handle_completions(
            {
                "prompt": prompt + [step["id"] for step in steps],
                "max_tokens": 1,
                "temperature": 0,
                "logprobs": top,
                "logit_bias": [[readable, 1e6]],
                "cache_prompt": True,
            }
        )
        found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        logprobs = {one["id"]: math.nan if one["logprob"] is None else one["logprob"] for one in found}
        steps.append({"id": max(logprobs, key=lambda token: logprobs[token]), "logprobs": logprobs})
        times.append(answer["timings"]["prompt_ms"])
    return steps, times[1:]


def tokenize_on_server(server: Any, text: str) -> list[int]:
    """Ids of a text, special tokens in it read as such, none added."""
    body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
    question = urllib.request.Request(
        f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(question, timeout=60) as answer:
        return [int(number) for number in json.load(answer)["tokens"]]


def run_gguf_file(asked: dict[str, Any], file: str, exact: bool) -> dict[str, Any]:
    """All that is asked of one file."""
    context = max(map(len, asked["prompts"])) + asked["new_tokens"] + 8
    server = start_llama_server(file, exact, context, asked["threads"])
    runs = [
        generate_greedily(server, prompt, asked["new_tokens"], asked["top"], asked["readable"])
        for prompt in asked["prompts"]
    ]
    times = [time for _, found in runs for time in found]
    return {
        "steps": [steps for steps, _ in runs],
        "tokens": [tokenize_on_server(server, text) for text in asked["texts"]],
        "tokens_per_second": 1000 / statistics.median(times),
    }


def _answer_question(asked: str, answer: str) -> None:
    question = json.loads(Path(asked).read_text(encoding="utf-8"))
    answers = [run_gguf_file(question, one["file"], one["exact"]) for one in question["runs"]]
    Path(answer).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    _answer_question(*sys.argv[1:])
