"""Writers: a live (cut) model -> what other programs load, with the proof that it is the same model.

A format is one module of this package, named in `formats.FORMATS`, that ends with

    FORMAT = Format(name="...", loads="how to load it, as a snippet", write=write, prove=prove, ...)

`write(job)` puts the weights at `job.place` and returns facts for the log, the model card and the caller: {"note": one
sentence, "size": as `measure.size`}, or nothing. Where the format can not hold the model it raises `DoesNotFit`, whose
one line says why; `check(model, tokenizer)` does so before anything is trained or written. `prove(job)` reads them
again and returns the verdict, {"passed", "why", "loader", ...}, which is written to proof.json; `proof.prove_gguf` does so
for all that transformers loads. Everything else is common to all formats (`write.write_model`): the target appears
whole or not at all, after the proof, with tokenizer, plan, card and verdict.

A format with a `suffix` is one file (.gguf), and `place` that file. Where the target ends so it is the target, with the
verdict beside it; otherwise it is a file in a folder that has plan, card and verdict too.
"""

from prunelit.export.overwrite import check_output
from prunelit.export.write import ExportResult, check_export_request, check_format_fits, save, write_model

__all__ = ["ExportResult", "check_format_fits", "check_output", "check_export_request", "save", "write_model"]
