"""Script that runs GGUF files in llama.cpp (wheel `xllamacpp`): `python -P llama_cpp.py QUESTION ANSWER`.

It runs in a process of its own and imports nothing of prunelit: it reads nothing but the GGUF file, and a graph that
aborts ends this process only. Both arguments are JSON files:

QUESTION  {"runs": [{"file", "exact"}], "prompts": [[id]], "new_tokens", "top", "readable": id, "texts": [str],
          "threads"}
ANSWER    a list with one entry per run: {"steps": per prompt [{"id", "logprobs": {id: logprob}}], "tokens": ids per
          text, "tokens_per_second"}

An "exact" run keeps the KV cache in float32 and does without flash attention, which rounds to float16 inside. Any other
run has llama.cpp's own settings.
"""

import json
import math
import statistics
import sys
import urllib.request
from pathlib import Path
from typing import Any


def start_llama_server(file: str, exact: bool, context: int, threads: int) -> Any:
    """Start llama.cpp's server on one file, on the CPU.

    It listens on the loopback interface, which `tokenize_on_server` needs.

    Args:
        file: the GGUF file.
        exact: whether to compute in float32, see the module's docstring.
        context: tokens of the context.
        threads: CPU threads.

    Example: `start_llama_server` is used further down in this module.
    """
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.n_ctx = context
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.port = 0  # any free port
    parameters.ui = False
    parameters.warmup = False
    parameters.fit_params = False
    parameters.verbosity = 1  # errors only
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    if exact:
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(parameters)


def generate_greedily(
    server: Any, prompt: list[int], new_tokens: int, top: int, readable: int
) -> tuple[list[dict[str, Any]], list[float]]:
    """Generate the most probable token at each step; the KV cache is kept between steps.

    The server holds back tokens that are part of a character. So it is asked for one token at a time, and a logit bias
    makes it return `readable`. The log-probabilities it returns are those without the bias; their largest one is that
    of the step's token.

    Args:
        server: from `start_llama_server`.
        prompt: token ids.
        new_tokens: steps to generate.
        top: log-probabilities to return for each step.
        readable: id of a token that is whole characters.

    Returns:
        Steps {"id", "logprobs": {id: logprob}}, and the milliseconds of each step but the first, which reads the
        prompt.

    Example: `generate_greedily` is used further down in this module.
    """
    steps: list[dict[str, Any]] = []
    milliseconds = []
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
        candidates = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        # JSON has no NaN: the server writes null for it.
        logprobs = {token["id"]: math.nan if token["logprob"] is None else token["logprob"] for token in candidates}
        steps.append({"id": max(logprobs, key=lambda token: logprobs[token]), "logprobs": logprobs})
        milliseconds.append(answer["timings"]["prompt_ms"])
    return steps, milliseconds[1:]


def tokenize_on_server(server: Any, text: str) -> list[int]:
    """Tokenise a text; special tokens in it are recognised, and none are added.

    Example: `tokenize_on_server` is used further down in this module.
    """
    body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    # Without proxies: HTTP_PROXY of the environment must not apply to the loopback interface.
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
        return [int(number) for number in json.load(response)["tokens"]]


def run_gguf_file(question: dict[str, Any], file: str, exact: bool) -> dict[str, Any]:
    """Run one GGUF file on all prompts and texts.

    Args:
        question: see the module's docstring.
        file: the GGUF file.
        exact: whether to compute in float32.

    Returns:
        One entry of the answer, see the module's docstring.

    Example: `run_gguf_file` is used further down in this module.
    """
    context = max(map(len, question["prompts"])) + question["new_tokens"] + 8
    server = start_llama_server(file, exact, context, question["threads"])
    runs = [
        generate_greedily(server, prompt, question["new_tokens"], question["top"], question["readable"])
        for prompt in question["prompts"]
    ]
    milliseconds = [time for _, run_times in runs for time in run_times]
    return {
        "steps": [steps for steps, _ in runs],
        "tokens": [tokenize_on_server(server, text) for text in question["texts"]],
        "tokens_per_second": 1000 / statistics.median(milliseconds),
    }


def _answer_question(question_file: str, answer_file: str) -> None:
    question = json.loads(Path(question_file).read_text(encoding="utf-8"))
    answers = [run_gguf_file(question, run["file"], run["exact"]) for run in question["runs"]]
    Path(answer_file).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    _answer_question(*sys.argv[1:])
