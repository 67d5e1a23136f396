"""`python -m prunelit evaluate`: perplexity of any model on any text."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunelit import export, measure, models, text
from prunelit.calibrate import TOKENS_PER_BATCH, on_device
from prunelit.commands.options import Dtype, Sources, listed, load_on, parse, parser_of, place
from prunelit.console import say
from prunelit.decoder import Decoder
from prunelit.errors import OutputNotWritable
from prunelit.report.run import versions, write_json


def evaluate(
    model: str,
    sources: Sequence[str],
    seqlen: int = 1024,
    windows: int | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
) -> dict[str, Any]:
    """Perplexity of any model on any text.

    Args:
        model: model source: folder, .gguf file, pypi:NAME==VERSION, or hub id.
        sources: text sources, mixed evenly.
        seqlen: tokens per window; windows do not overlap.
        windows: the first so many windows; null for all.
        dtype: of the computation; "auto" is the model's own, but float32 for float16 on a CPU.
        device: "cpu", "cuda", "cuda:1", ...; "auto" takes a GPU if there is one.

    Returns:
        {"perplexity", "nll", "tokens", "protocol", "model", size, "seconds", "versions"}.
    """
    models.check_source(model)
    for source in sources:
        text.check_source(source)
    ids = text.windows(list(sources), models.load_tokenizer(model), seqlen, windows)
    network = load_on(model, dtype, device)
    Decoder(network).check_finite()
    start = time.perf_counter()
    with on_device(network, place(device)):
        found = measure.perplexity(network, ids, max(1, TOKENS_PER_BATCH // seqlen))
    used = str(next(network.parameters()).dtype).removeprefix("torch.")
    return {
        **found,
        "protocol": measure.protocol(sources, ids, used),
        "model": model,
        **measure.size(network),
        "seconds": round(time.perf_counter() - start, 2),
        "versions": versions(),
    }


def run(command: str, arguments: list[str]) -> int:
    """`python -m prunelit evaluate`."""
    parser = parser_of(command, "perplexity of any model on any text")
    parser.add_argument("--text", type=Sources, default=[text.BUILTIN], help="text source(s)")
    parser.add_argument("--json", type=str | None, default=None, help="also write the result to this file")
    parser.add_function_arguments(evaluate, None, skip={"sources"}, sub_configs=False)
    options = parse(parser, arguments, lists=["text"])
    if options.json:
        export.check_output(Path(options.json).resolve().parent, overwrite=True)
        if Path(options.json).is_dir():
            raise OutputNotWritable(f"json {options.json!r}: expected a file, got a folder")
    sources = listed(options.text)
    result = evaluate(options.model, sources, options.seqlen, options.windows, options.dtype, options.device)
    if options.json:
        write_json(Path(options.json), result)
    say(json.dumps(result, indent=2))
    return 0
