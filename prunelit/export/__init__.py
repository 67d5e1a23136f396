"""Writers: from a live (pruned) model to files that other programs load, with the proof that they hold the same model.

A format is one module of this package. It is named in `formats.FORMATS`, and its module ends with

    FORMAT = Format(name="...", load_snippet="code that loads it", write=write_..., prove=prove_..., ...)

- `write(job)` writes the weights to `job.path`. It returns facts for the log, the model card and the caller: {"note":
  one sentence, "size": as of `measure_model_size`}, or an empty dictionary. Where the format cannot hold the model it
  raises `DoesNotFit`, with the reason in one line.
- `check(model, tokenizer)` raises the same error before anything is trained or written.
- `prove(job)` reads the files again and returns the verdict, {"passed", "why", "loader", ...}, which is written to
  proof.json. `proof.compare.prove_folder` does so for every format that transformers loads.

`write.write_model` does what is common to all formats: the output appears as a whole or not at all, after the proof,
with tokenizer, plan, card and verdict.

A format with a `suffix` is one file (.gguf), and `job.path` is that file. If the target has this suffix, the file is
the target and the verdict is written beside it. Otherwise the target is a folder that holds the file, plan, card and
verdict.
"""

from prunelit.export.overwrite import check_output
from prunelit.export.write import ExportResult, check_export_request, check_format_fits, save, write_model

__all__ = ["ExportResult", "check_export_request", "check_format_fits", "check_output", "save", "write_model"]
