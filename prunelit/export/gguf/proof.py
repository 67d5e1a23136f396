"""The proof of a GGUF file: llama.cpp, in a process of its own, is compared with transformers on the model in memory.

Tokens    Both tokenizers read the same texts; the ids must be equal.
Exact     The same file with matrices, KV cache and attention in float32. The greedy text with the cache must be equal,
          except where two tokens tie within the limit, and so must the largest log-probabilities at each step.
As it is  The file in its own type, with llama.cpp's own settings. llama.cpp then rounds the inputs of a matrix product
          as it rounds the weights. The mean difference has a limit that depends on the type; the text and the largest
          difference are reported only.

The exact run shows a wrong head order, rope or epsilon: in an f16 file, llama.cpp's own rounding changes
log-probabilities by more than a wrong epsilon does. It needs disk space for a float32 copy beside the file.
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
from prunelit.export.gguf.layout import FLOAT16_MAX, GRAPHS, choose_graph
from prunelit.export.gguf.settings import compute_file_context
from prunelit.export.proof import new_process
from prunelit.export.proof.float32 import use_float32_model
from prunelit.model.decoder import Decoder
from prunelit.model.modes import use_generation_config
from prunelit.runtime.errors import DoesNotFit
from prunelit.runtime.versions import collect_versions

LOGPROB_LIMIT = 0.01
"""Largest allowed difference of a log-probability in float32, in nats."""
MEAN_LOGPROB_LIMITS = {"f32": 0.01, "f16": 0.01, "bf16": 0.1, "q8_0": 0.3, "q6_k": 0.5, "q5_k_m": 1.2, "q4_k_m": 1.2}
"""Largest allowed mean difference of a log-probability by type, in nats: three to five times that of SmolLM2-135M."""
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
"""Texts with combining marks. For some tokenizers llama.cpp splits them in another way: reported, not required."""
_NEW_TOKENS, _TOP_LOGPROBS = 64, 5
"""Tokens to generate for each prompt, and log-probabilities to compare for each token."""


def prove_gguf(write_file: Callable[[Any, Any, Path, str], object], job: ExportJob) -> dict[str, Any]:
    """Run the file `job.path` in llama.cpp, and compare it with the model in memory.

    Args:
        write_file: (model, tokenizer, file, type) -> None; writes the float32 copy for the exact run.
        job: the model, its tokenizer, and the file that was written.

    Returns:
        The verdict: {"passed", "why" (the reason if it failed, or None), "loader", "type", "exact", "as_it_is",
        "limit", "mean_limit", "tokens", "texts", "generated", ...}. "exact" and "as_it_is" are {"same_text",
        "largest_difference", "mean_difference"} of log-probabilities, the latter with "tokens_per_second".

    Raises:
        NotProved: llama.cpp does not load or run the file.
        DoesNotFit: the context is too short for the prompts.

    Example: see `prunelit.export.write_model` with format="gguf", which calls it.
    """
    prompts, new_tokens = _tokenize_prompts(job.model, job.tokenizer)
    chat = _render_chat(job.tokenizer)
    texts = [*TEXTS, LEADING_SPACE_TEXT, *chat, *COMBINING_MARK_TEXTS]
    # For a SentencePiece vocabulary, llama.cpp puts a space before every text and behind special tokens. SentencePiece
    # and old tokenizers do the same; those of transformers 5 do not.
    excused_texts: tuple[str, ...] = COMBINING_MARK_TEXTS
    if tokenizer.is_sentencepiece_bpe(job.tokenizer):
        excused_texts = (*COMBINING_MARK_TEXTS, LEADING_SPACE_TEXT, *chat)
    with tempfile.TemporaryDirectory(prefix=".exact-", dir=job.path.parent) as scratch:
        exact_file = job.path
        if job.kind != "f32":
            exact_file = Path(scratch, "f32.gguf")
            write_file(job.model, job.tokenizer, exact_file, "f32")
        question = {
            "runs": [{"file": str(exact_file), "exact": True}, {"file": str(job.path), "exact": False}],
            "prompts": prompts,
            "new_tokens": new_tokens,
            "top": _TOP_LOGPROBS,
            "readable": prompts[0][-1],
            "texts": texts,
            "threads": torch.get_num_threads(),
        }
        answer = new_process.run_proof_script(
            llama_cpp.__file__, question, job.path.parent, "format 'gguf': llama.cpp cannot run the file", "error"
        )
    exact_run, typed_run = json.loads(answer)
    with use_float32_model(job.model) as model, _track_largest_input(model) as largest_input:
        expected = _generate_greedily(model, prompts, new_tokens)
        exact, typed = (
            _compare_log_probabilities(model, prompts, expected, run["steps"]) for run in (exact_run, typed_run)
        )
    pairs = zip(texts, typed_run["tokens"], strict=True)
    misread = [text for text, ids in pairs if ids != _tokenize_text(job.tokenizer, text)]
    unexcused = [text for text in misread if text not in excused_texts]
    why = _explain_failure(job.kind, exact, typed, unexcused, largest_input[0])
    summary = f"in float32: {_describe_differences(exact)}, limit {LOGPROB_LIMIT:g}"
    summary += f"; as {job.kind}: {_describe_differences(typed)}"
    if misread:
        summary += f"; {len(misread)} of {len(texts)} texts are other tokens in llama.cpp"
    return {
        "passed": why is None,
        "why": why,
        "loader": "llama.cpp (xllamacpp) in a new process, KV cache on",
        "summary": summary,
        "type": job.kind,
        "exact": exact,
        "as_it_is": typed | {"tokens_per_second": typed_run["tokens_per_second"]},
        "limit": LOGPROB_LIMIT,
        "mean_limit": MEAN_LOGPROB_LIMITS[job.kind],
        "tokens": len(prompts) * new_tokens,
        "texts": len(texts),
        "texts_misread": misread,
        "largest_activation": largest_input[0],
        "generated": job.tokenizer.decode([step["id"] for step in typed_run["steps"][0]]),
        "versions": collect_versions(),
    }


def _describe_differences(differences: Mapping[str, Any]) -> str:
    return (
        f"{'the same' if differences['same_text'] else 'another'} greedy text, log-probabilities differ by "
        f"{differences['mean_difference']:.2g} in the mean and {differences['largest_difference']:.2g} at most"
    )


def _explain_failure(
    kind: str, exact: Mapping[str, Any], typed: Mapping[str, Any], misread: Sequence[str], largest_input: float
) -> str | None:
    """Explain why a file fails the proof.

    Args:
        kind: type of the file's matrices.
        exact: differences of the run in float32.
        typed: differences of the run in the file's own type.
        misread: texts that llama.cpp reads as other tokens, without excused ones.
        largest_input: the largest value that went into a linear.

    Returns:
        The first reason; None where the file passes.
    """
    if misread:
        return f"llama.cpp reads other tokens than the model's tokenizer in {misread[0]!r}"
    largest, behind_best, mean = exact["largest_difference"], exact["behind_best"], typed["mean_difference"]
    # "not <=" and no ">": NaN must fail.
    if not largest <= LOGPROB_LIMIT:
        return f"in float32, a log-probability differs by {largest:.3g}, expected at most {LOGPROB_LIMIT:g}"
    if not behind_best <= LOGPROB_LIMIT:
        return f"in float32, llama.cpp chose a token {behind_best:.3g} less probable than the best, expected a tie"
    if not mean <= MEAN_LOGPROB_LIMITS[kind]:
        why = f"in {kind}, log-probabilities differ by {mean:.3g} in the mean, expected {MEAN_LOGPROB_LIMITS[kind]:g}"
        if kind == "f16" and largest_input > FLOAT16_MAX:
            why += f"; an activation is {largest_input:.3g}, beyond float16: pass --type bf16"
        return why
    return None


def _tokenize_prompts(model: Any, tokenizer: Any) -> tuple[list[list[int]], int]:
    """Tokenise the prompts, with the tokens that start a text.

    Returns:
        Ids of each prompt, and the number of tokens to generate, which fits the context.

    Raises:
        DoesNotFit: the context is too short.
    """
    prompts = [list(map(int, tokenizer(prompt)["input_ids"])) for prompt in PROMPTS]
    decoder = Decoder(model)
    longest, context = max(map(len, prompts)), compute_file_context(decoder, GRAPHS[choose_graph(decoder)].settings)
    if context < longest + 2:
        raise DoesNotFit(
            f"format 'gguf': expected a context of more than {longest + 2} tokens for the proof, got {context} (the "
            "window of a sliding attention, if there is one); use format 'hetero'"
        )
    return prompts, min(_NEW_TOKENS, context - longest)


def _render_chat(tokenizer: Any) -> list[str]:
    """Render a short conversation with the chat template, special tokens included; [] without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    return [str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))]


def _tokenize_text(tokenizer: Any, text: str) -> list[int]:
    return list(map(int, tokenizer(text, add_special_tokens=False)["input_ids"]))


@contextmanager
def _track_largest_input(model: nn.Module) -> Iterator[list[float]]:
    """Track the largest absolute value that goes into a linear; yield a list that holds this one number."""
    largest = [0.0]

    def update_largest(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        largest[0] = max(largest[0], float(arguments[0].detach().abs().max()))

    hooks = [x.register_forward_pre_hook(update_largest) for x in model.modules() if isinstance(x, nn.Linear)]
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _generate_greedily(model: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Generate greedy continuations with the KV cache; tokens that end a text do not stop it."""
    continuations = []
    with use_generation_config(model, pad_token_id=0):
        for prompt in prompts:
            ids = torch.tensor([prompt], device=next(model.parameters()).device)
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, use_cache=True
            )
            continuations.append(output[0, len(prompt) :].tolist())
    return continuations


@torch.no_grad()
def _compare_log_probabilities(
    model: Any, prompts: list[list[int]], expected: list[list[int]], runs: list[list[dict[str, Any]]]
) -> dict[str, Any]:
    """Compare llama.cpp's steps with the model's log-probabilities after the same tokens.

    Args:
        model: the model in float32.
        prompts: token ids.
        expected: the model's own greedy continuations.
        runs: llama.cpp's steps for each prompt.

    Returns:
        {"same_text", "largest_difference", "mean_difference", "behind_best"} in nats. "behind_best" is how far the
        log-probability of a chosen token is below that of the best one, at most.
    """
    differences, behind_best = [], 0.0
    for prompt, steps in zip(prompts, runs, strict=True):
        ids = torch.tensor([prompt + [step["id"] for step in steps]], device=next(model.parameters()).device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        for row, step in zip(torch.log_softmax(logits.float(), -1).cpu(), steps, strict=True):
            behind_best = max(behind_best, float(row.max() - row[step["id"]]))
            differences += [abs(float(row[int(token)]) - logprob) for token, logprob in step["logprobs"].items()]
    # Python's max() could drop a NaN; torch's max() keeps it, and NaN is within no limit.
    distances = torch.tensor(differences, dtype=torch.float64)
    return {
        "same_text": [[step["id"] for step in steps] for steps in runs] == expected,
        "largest_difference": distances.max().item(),
        "mean_difference": distances.mean().item(),
        "behind_best": behind_best,
    }
