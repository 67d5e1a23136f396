"""The proof of a GGUF file: llama.cpp itself, in a process of its own, against transformers on the model in memory.

Tokens    both tokenizers read the same texts; ids must be equal.
Exact     the same file with float32 matrices, KV cache and attention: greedy text with the cache must be equal, but
          where two tokens tie within the limit, and so must llama.cpp's largest log-probabilities at each step.
As it is  the file in its own type with llama.cpp's own settings. Then llama.cpp rounds what goes into a matrix product
          as the weights are rounded; the mean difference has a limit by type, and text and largest one are reported.

The exact run is what shows a wrong head order, rope or epsilon: llama.cpp's own rounding moves log-probabilities of a
right f16 file by more than a wrong epsilon does. It needs room for a float32 copy beside the file while it lasts.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunelit.export.formats import ExportJob
from prunelit.export.gguf import llama_cpp, tokenizer
from prunelit.export.gguf.layout import FLOAT16_MAX
from prunelit.export.llama_layers import compute_context_limit
from prunelit.export.proof import new_process
from prunelit.export.proof.float32 import use_float32_model
from prunelit.model.decoder import Decoder
from prunelit.model.modes import use_generation_config
from prunelit.runtime.errors import DoesNotFit
from prunelit.runtime.versions import collect_versions

LOGPROB_LIMIT = 0.01
"""Largest difference of a log-probability in float32."""
MEAN_LOGPROB_LIMITS = {"f32": 0.01, "f16": 0.01, "bf16": 0.1, "q8_0": 0.3}
"""Mean difference of a log-probability in a type: three to five times what SmolLM2-135M shows."""
PROMPTS = (
    "The capital of France is",
    "Once upon a time, a small robot",
    "def add(a, b):\n    ",
)
TEXTS = (
    "Hello, world!  It's 12345.67 o'clock, isn't it?",
    "two  spaces, a tab\tand\n\n\nthree lines \n",
    "naïve café, Größe, Ελληνικά, русский, 日本語, العربية",
    "x = {'a': [1, 22, 333]}  # C++ && f(x) != 0; https://example.org/?q=1",
    "🙂👍🏽 ½ ² ™ … “quoted” — dash",
    "WE'LL we'Ve I'M don't camelCaseHTTPServer",
)
LEADING_SPACE_TEXT = "  two spaces first"
COMBINING_MARK_TEXTS = ("हिन्दी में लिखा", "cafe\N{COMBINING ACUTE ACCENT}")
"""With combining marks, which llama.cpp splits otherwise for some tokenizers whose model is right: reported only."""
_NEW_TOKENS, _TOP_LOGPROBS = 64, 5


def prove_gguf(write_file: Callable[[Any, Any, Path, str], object], job: ExportJob) -> dict[str, Any]:
    """Run the file `job.place` in llama.cpp, and compare it with the model in memory.

    Args:
        write_file: (model, tokenizer, file, type) writes the float32 twin.
        job: with the file.

    Returns:
        The verdict: {"passed", "why" (it did not), "loader", "type", "exact", "as_it_is", "limit", "mean_limit",
        "tokens", "texts", "generated", ...}; "exact" and "as_it_is" are {"same_text", "largest_difference",
        "mean_difference"} of log-probabilities, the latter with "tokens_per_second".

    Raises:
        NotProved: llama.cpp does not load or run the file.
        DoesNotFit: the context is too short for the prompts.
    """
    prompts, new_tokens = _tokenize_prompts(job.model, job.tokenizer)
    chat = _render_chat(job.tokenizer)
    texts = [*TEXTS, LEADING_SPACE_TEXT, *chat, *COMBINING_MARK_TEXTS]
    # llama.cpp puts a space before a text of pieces, whatever it begins with, and behind special tokens. So do
    # SentencePiece and old tokenizers; those of transformers 5 do not.
    excused = (
        (*COMBINING_MARK_TEXTS, LEADING_SPACE_TEXT, *chat)
        if tokenizer.is_sentencepiece_bpe(job.tokenizer)
        else COMBINING_MARK_TEXTS
    )
    with tempfile.TemporaryDirectory(prefix=".exact-", dir=job.path.parent) as beside:
        twin = job.path
        if job.kind != "f32":
            twin = Path(beside, "f32.gguf")
            write_file(job.model, job.tokenizer, twin, "f32")
        question = {
            "runs": [{"file": str(twin), "exact": True}, {"file": str(job.path), "exact": False}],
            "prompts": prompts,
            "new_tokens": new_tokens,
            "top": _TOP_LOGPROBS,
            "readable": prompts[0][-1],
            "texts": texts,
            "threads": torch.get_num_threads(),
        }
        answer = new_process.run_proof_script(
            llama_cpp.__file__, question, job.path.parent, "format 'gguf': llama.cpp can not run the file", "error"
        )
    exact, served = json.loads(answer)
    with use_float32_model(job.model) as model, _track_largest_input(model) as largest:
        expected = _generate_greedily(model, prompts, new_tokens)
        exactly, found = (_compare_log_probabilities(model, prompts, expected, run["steps"]) for run in (exact, served))
    pairs = zip(texts, served["tokens"], strict=True)
    misread = [text for text, ids in pairs if ids != _tokenize_text(job.tokenizer, text)]
    why = _explain_failure(job.kind, exactly, found, [text for text in misread if text not in excused], largest[0])
    return {
        "passed": why is None,
        "why": why,
        "loader": "llama.cpp (xllamacpp) in a new process, KV cache on",
        "summary": f"in float32: {_describe_differences(exactly)}, limit {LOGPROB_LIMIT:g}; as {job.kind}: {_describe_differences(found)}"
        + (f"; {len(misread)} of {len(texts)} texts are other tokens in llama.cpp" if misread else ""),
        "type": job.kind,
        "exact": exactly,
        "as_it_is": found | {"tokens_per_second": served["tokens_per_second"]},
        "limit": LOGPROB_LIMIT,
        "mean_limit": MEAN_LOGPROB_LIMITS[job.kind],
        "tokens": len(prompts) * new_tokens,
        "texts": len(texts),
        "texts_misread": misread,
        "largest_activation": largest[0],
        "generated": job.tokenizer.decode([step["id"] for step in served["steps"][0]]),
        "versions": collect_versions(),
    }


def _describe_differences(found: Mapping[str, Any]) -> str:
    return (
        f"{'the same' if found['same_text'] else 'another'} greedy text, log-probabilities differ by "
        f"{found['mean_difference']:.2g} in the mean and {found['largest_difference']:.2g} at most"
    )


def _explain_failure(
    kind: str, exactly: Mapping[str, Any], found: Mapping[str, Any], misread: Sequence[str], activation: float
) -> str | None:
    """What fails; None where nothing does."""
    if misread:
        return f"llama.cpp reads other tokens than the model's tokenizer in {misread[0]!r}"
    apart, behind, mean = exactly["largest_difference"], exactly["behind_best"], found["mean_difference"]
    if not apart <= LOGPROB_LIMIT:
        return f"in float32, a log-probability differs by {apart:.3g}, expected at most {LOGPROB_LIMIT:g}"
    if not behind <= LOGPROB_LIMIT:
        return f"in float32, llama.cpp chose a token {behind:.3g} less probable than the best, expected a tie"
    if not mean <= MEAN_LOGPROB_LIMITS[kind]:
        why = f"in {kind}, log-probabilities differ by {mean:.3g} in the mean, expected {MEAN_LOGPROB_LIMITS[kind]:g}"
        if kind == "f16" and activation > FLOAT16_MAX:
            why += f"; an activation is {activation:.3g}, beyond float16: pass --type bf16"
        return why
    return None


def _tokenize_prompts(model: Any, tokenizer: Any) -> tuple[list[list[int]], int]:
    """Token ids of the prompts, with the tokens that start a text, and how many tokens to add within the context."""
    prompts = [list(map(int, tokenizer(prompt)["input_ids"])) for prompt in PROMPTS]
    longest, context = max(map(len, prompts)), compute_context_limit(Decoder(model))
    if context < longest + 2:
        raise DoesNotFit(
            f"format 'gguf': expected a context of more than {longest + 2} tokens for the proof, got {context} (the "
            "window of a sliding attention, if there is one); use format 'hetero'"
        )
    return prompts, min(_NEW_TOKENS, context - longest)


def _render_chat(tokenizer: Any) -> list[str]:
    """A conversation as the chat template writes it, special tokens and all; none where there is no template."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    return [str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))]


def _tokenize_text(tokenizer: Any, text: str) -> list[int]:
    return list(map(int, tokenizer(text, add_special_tokens=False)["input_ids"]))


@contextmanager
def _track_largest_input(model: nn.Module) -> Iterator[list[float]]:
    """A list of one number: the largest value that goes into a linear inside."""
    largest = [0.0]

    def look(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        largest[0] = max(largest[0], float(arguments[0].detach().abs().max()))

    hooks = [x.register_forward_pre_hook(look) for x in model.modules() if isinstance(x, nn.Linear)]
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _generate_greedily(model: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy continuations with the KV cache, on behind tokens that end a text."""
    made = []
    with use_generation_config(model, pad_token_id=0):
        for prompt in prompts:
            ids = torch.tensor([prompt], device=next(model.parameters()).device)
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, use_cache=True
            )
            made.append(found[0, len(prompt) :].tolist())
    return made


@torch.no_grad()
def _compare_log_probabilities(
    model: Any, prompts: list[list[int]], expected: list[list[int]], runs: list[list[dict[str, Any]]]
) -> dict[str, Any]:
    """llama.cpp's steps against the model's log-probabilities behind the same tokens, and its text against `expected`.

    Returns:
        {"same_text", "largest_difference", "mean_difference", "behind_best"}: the last says how much less probable than
        the best token a chosen one is, at most.
    """
    differences, behind = [], 0.0
    for prompt, steps in zip(prompts, runs, strict=True):
        ids = torch.tensor([prompt + [step["id"] for step in steps]], device=next(model.parameters()).device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        for row, step in zip(torch.log_softmax(logits.float(), -1).cpu(), steps, strict=True):
            behind = max(behind, float(row.max() - row[step["id"]]))
            differences += [abs(float(row[int(token)]) - one) for token, one in step["logprobs"].items()]
    apart = torch.tensor(differences, dtype=torch.float64)
    return {
        "same_text": [[step["id"] for step in steps] for steps in runs] == expected,
        "largest_difference": apart.max().item(),  # NaN stays NaN, and passes no limit
        "mean_difference": apart.mean().item(),
        "behind_best": behind,
    }
