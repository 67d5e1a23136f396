"""A cut model behind vLLM's OpenAI server, asked by the `openai` client as its users ask.

    .venv/bin/python benchmarks/served_openai.py --vllm_python ENV/bin/python NAME=DIR [NAME=DIR ...]

For each folder, in any format that vLLM reads, a server is started as the folder's card says, in float32. The client
asks for plain and streamed completions, log-probabilities, several samples of one prompt, a chat, a prompt that fills
most of the context, and 30 completions at once. Greedy texts must be those of transformers, which computes them here;
of two tokens that are equally likely, either is right, so a text that parts from it at such a tie is counted apart. The
results go to benchmarks/results/served_openai.json.
"""

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
NEW_TOKENS, LONG, AT_ONCE, TIE = 16, 960, 30, 1e-3
SUBJECTS = (
    *("The capital of France is", "Water boils at", "Once upon a time", "The largest planet", "A recipe for bread"),
    *("In 1969", "The opposite of hot", "Two plus two", "My favourite colour", "The river"),
)

_CLIENT = """
import asyncio, json, sys
from openai import AsyncOpenAI, OpenAI

asked = json.load(open(sys.argv[1]))
options = {"base_url": asked["url"], "api_key": "none", "max_retries": 0}
client = OpenAI(**options)
common = {"model": "cut", "max_tokens": asked["new_tokens"], "temperature": 0, "extra_body": {"ignore_eos": True}}
def text(prompt, **more):
    return client.completions.create(prompt=prompt, **common, **more).choices[0].text
prompts = asked["prompts"]
found = {"plain": [text(prompt) for prompt in prompts[:5]]}
chunks = client.completions.create(prompt=prompts[0], stream=True, **common)
found["streamed"] = [chunk.choices[0].text for chunk in chunks if chunk.choices]
choice = client.completions.create(prompt=prompts[0], logprobs=2, **common).choices[0]
found["logprobs"] = choice.logprobs.token_logprobs
several = client.completions.create(prompt=prompts[0], n=3, **{**common, "temperature": 0.9}, seed=1)
found["several"] = [choice.text for choice in several.choices]
message = [{"role": "user", "content": "What is the capital of France?"}]
try:
    chat = client.chat.completions.create(messages=message, **common)
    found["chat"] = chat.choices[0].message.content
except Exception as error:
    found["chat_error"] = str(error)[:200]
found["long"] = text(asked["long"])
async def ask_all():
    many = AsyncOpenAI(**options)
    answers = await asyncio.gather(*(many.completions.create(prompt=prompt, **common) for prompt in prompts))
    return [answer.choices[0].text for answer in answers]
found["at_once"] = asyncio.run(ask_all())
json.dump(found, open(sys.argv[2], "w"))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--vllm_python", required=True, help="Python of an environment that has vLLM")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/served_openai.json")
    arguments = parser.parse_args()
    from prunelit.runtime.versions import collect_versions

    report = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"results": {}}
    report |= {"command": "benchmarks/served_openai.py --vllm_python ENV/bin/python NAME=DIR ..."}
    report |= {"versions": collect_versions(), "vllm": ask_version(arguments.vllm_python)}
    for item in arguments.folders:
        name, _, folder = item.partition("=")
        report["results"][name] = try_folder(arguments.vllm_python, Path(folder).resolve())
        print(name, report["results"][name], flush=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def ask_version(python: str) -> str:
    """The version of vLLM in an environment."""
    code = "import vllm; print(vllm.__version__)"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1]


def try_folder(python: str, folder: Path) -> dict[str, Any]:
    """Serve one folder, ask it everything, and compare."""
    import prunelit

    model, tokenizer = prunelit.load(folder), prunelit.load_tokenizer(folder)
    model = model.float().eval()
    prompts = [f"{subject} ({number})" if number else subject for number in range(3) for subject in SUBJECTS]
    ids = tokenizer(" ".join(SUBJECTS * 40)).input_ids[:LONG]
    long = tokenizer.decode(ids, skip_special_tokens=True)
    expected = {prompt: continue_greedily(model, tokenizer, prompt) for prompt in [*prompts, long]}
    config = json.loads((folder / "config.json").read_text())
    with tempfile.TemporaryDirectory() as scratch, serve(python, folder, "auto_map" in config, Path(scratch)) as url:
        question, answer = Path(scratch, "question.json"), Path(scratch, "answer.json")
        question.write_text(json.dumps({"url": url, "prompts": prompts, "long": long, "new_tokens": NEW_TOKENS}))
        start = time.perf_counter()
        subprocess.run([python, "-c", _CLIENT, str(question), str(answer)], check=True)
        seconds = time.perf_counter() - start
        got = json.loads(answer.read_text())
    first = expected[prompts[0]]
    return {
        "model_type": config["model_type"],
        "plain": count_right(got["plain"], [expected[prompt] for prompt in prompts[:5]]),
        "streamed_is_plain": "".join(got["streamed"]) == got["plain"][0],
        "chunks": len(got["streamed"]),
        "largest_logprob_difference": max(
            abs(ours - theirs) for ours, theirs in zip(first["logprobs"], got["logprobs"], strict=True)
        )
        if got["plain"][0] == first["text"]
        else None,
        "different_samples": len(set(got["several"])),
        "chat": got.get("chat_error") or bool(got["chat"].strip()),
        "long_prompt": {"tokens": len(tokenizer(long).input_ids), **count_right([got["long"]], [expected[long]])},
        "at_once": count_right(got["at_once"], [expected[prompt] for prompt in prompts]),
        "seconds": round(seconds, 1),
    }


def count_right(texts: list[str], expected: list[dict[str, Any]]) -> dict[str, int]:
    """Count texts that are as expected, and those that part from it where two tokens are equally likely."""
    counts = {"asked": len(texts), "same": 0, "ties": 0}
    for text, right in zip(texts, expected, strict=True):
        pieces = right["pieces"]
        shared = next((n for n in range(len(pieces), 0, -1) if text.startswith("".join(pieces[:n]))), 0)
        counts["same"] += text == right["text"]
        counts["ties"] += text != right["text"] and shared < len(pieces) and right["leads"][shared] <= TIE
    return counts


def continue_greedily(model: Any, tokenizer: Any, prompt: str) -> dict[str, Any]:
    """What transformers adds to a prompt: text, pieces, log-probabilities, and leads over the next likely token."""
    import torch

    from prunelit.model.modes import get_cache_name

    name = get_cache_name(model)
    ids, cache = torch.tensor([tokenizer(prompt).input_ids]), None
    tokens, logprobs, leads = [], [], []
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            output = model(input_ids=ids, **{name: cache}, use_cache=True)
            best = output.logits[0, -1].log_softmax(-1).topk(2)
            tokens.append(int(best.indices[0]))
            logprobs.append(float(best.values[0]))
            leads.append(float(best.values[0] - best.values[1]))
            ids, cache = best.indices[:1][None], getattr(output, name)
    texts = [tokenizer.decode(tokens[:n], skip_special_tokens=True) for n in range(len(tokens) + 1)]
    pieces = [after[len(before) :] for before, after in itertools.pairwise(texts)]
    return {"text": texts[-1], "pieces": pieces, "logprobs": logprobs, "leads": leads}


@contextmanager
def serve(python: str, folder: Path, has_code: bool, scratch: Path) -> Iterator[str]:
    """Start vLLM's server on a free port, and stop it at the end; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "cut", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "1024"] + ["--trust-remote-code"] * has_code
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    settings |= {"VLLM_NO_USAGE_STATS": "1", "HF_MODULES_CACHE": str(scratch / "modules")}
    with (scratch / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=settings | os.environ, stdout=log, stderr=log, start_new_session=True)
    try:
        while server.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        assert server.poll() is None, (scratch / "server.log").read_text()[-2000:]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, 15)
        server.wait()


if __name__ == "__main__":
    main()
