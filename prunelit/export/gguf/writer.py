"""gguf: one file that llama.cpp runs, written tensor by tensor from the model, through no converter script."""

import importlib.util
import math
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prunelit.export.formats import Format, Job
from prunelit.export.gguf import proof
from prunelit.export.gguf import tokenizer as gguf_tokenizer
from prunelit.export.gguf.layout import BLOCK, GRAPHS, LARGEST_HALF, Entry, Sizes, entries, graph_of, sizes
from prunelit.export.llama_layers import context_length
from prunelit.model.decoder import Decoder
from prunelit.runtime.errors import DoesNotFit, NotProved, PrunelitError
from prunelit.runtime.progress import track

KINDS = ("f16", "bf16", "f32", "q8_0")


def write(job: Job) -> dict[str, Any]:
    """Write a model and its tokenizer to the file `job.place`.

    `job.kind` is the type of the matrices; vectors are float32. With "q8_0", FFNs are padded with zeros to a multiple
    of 32, and a matrix whose rows are no multiple of 32 stays float16.

    Returns:
        {"note", "architecture", "type", "bytes", "matrices_left_f16"}.

    Raises:
        DoesNotFit: llama.cpp has no graph or tokenizer for it, or a weight is beyond float16.
    """
    check(job.model, job.tokenizer)
    graph, left = write_file(job.model, job.tokenizer, job.place, job.kind)
    size = job.place.stat().st_size
    note = f"gguf: graph {graph!r}, {job.kind}, {size / 2**20:.1f} MiB"
    if left:
        note += f"; {left} matrices are float16, their rows are no multiple of {BLOCK}"
    return {"note": note, "architecture": graph, "type": job.kind, "bytes": size, "matrices_left_f16": left}


def check(model: Any, tokenizer: Any) -> None:
    """As `write`, without writing, but for the size of weights."""
    if tokenizer is None:
        raise DoesNotFit("format 'gguf': expected a model with a tokenizer, got none; the file holds both")
    graph_of(Decoder(model))
    gguf_tokenizer.vocabulary(tokenizer, model)


def write_file(model: Any, tokenizer: Any, file: Path, kind: str) -> tuple[str, int]:
    """Write a model and its tokenizer.

    Returns:
        The graph, and how many matrices of a "q8_0" file are float16.
    """
    import gguf

    decoder = Decoder(model)
    graph = graph_of(decoder)
    vocabulary = gguf_tokenizer.vocabulary(tokenizer, model)
    layers = sizes(decoder, kind)
    tensors = list(entries(decoder, GRAPHS[graph], layers))
    wanted = _quantisations(tensors, kind)
    with closing(gguf.GGUFWriter(file, graph)) as writer:
        _metadata(writer, decoder, graph, layers, kind)
        gguf_tokenizer.write(writer, vocabulary)
        for entry in tensors:
            quantisation = wanted[entry.name]
            shape, dtype = _stored(entry.shape, quantisation)
            size = math.prod(shape) * dtype.itemsize
            writer.add_tensor_info(entry.name, shape, dtype, size, raw_dtype=quantisation)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in track(tensors, "writing gguf", unit="tensor"):
            values = entry.values().float().cpu().contiguous().numpy()
            _check_half(entry.name, values, wanted[entry.name])
            writer.write_tensor_data(gguf.quants.quantize(values, wanted[entry.name]))
    return graph, sum(found.name == "F16" for found in wanted.values()) if kind == "q8_0" else 0


def _metadata(writer: Any, decoder: Decoder, graph: str, layers: list[Sizes], kind: str) -> None:
    """Sizes and constants that the graph reads."""
    import gguf

    config, model = decoder.config, decoder.model
    heads, groups, dims, channels = (list(column) for column in zip(*layers, strict=True))
    per_layer = GRAPHS[graph].per_layer
    writer.add_type("model")
    writer.add_name(decoder.shape.name)
    writer.add_context_length(context_length(decoder))
    writer.add_embedding_length(int(config.hidden_size))
    writer.add_block_count(len(layers))
    writer.add_feed_forward_length(channels if per_layer else channels[0])
    writer.add_head_count(heads if per_layer else heads[0])
    writer.add_head_count_kv(groups if per_layer else groups[0])
    writer.add_key_length(dims[0])
    writer.add_value_length(dims[0])
    writer.add_rope_dimension_count(dims[0])
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_vocab_size(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    types = gguf.LlamaFileType
    names = {"f32": types.ALL_F32, "f16": types.MOSTLY_F16, "bf16": types.MOSTLY_BF16, "q8_0": types.MOSTLY_Q8_0}
    writer.add_file_type(names[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _quantisations(tensors: list[Entry], kind: str) -> dict[str, Any]:
    """GGML type of each tensor."""
    import gguf

    types = gguf.GGMLQuantizationType
    matrix = {"f32": types.F32, "f16": types.F16, "bf16": types.BF16, "q8_0": types.Q8_0}[kind]

    def one(shape: tuple[int, ...]) -> Any:
        if len(shape) == 1:
            return types.F32
        return types.F16 if kind == "q8_0" and shape[-1] % BLOCK else matrix

    return {entry.name: one(entry.shape) for entry in tensors}


def _stored(shape: tuple[int, ...], quantisation: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of the array that is written: bytes for the block types."""
    import gguf

    types = gguf.GGMLQuantizationType
    plain: dict[Any, np.dtype[Any]] = {types.F32: np.dtype(np.float32), types.F16: np.dtype(np.float16)}
    if quantisation in plain:
        return shape, plain[quantisation]
    return tuple(gguf.quant_shape_to_byte_shape(shape, quantisation)), np.dtype(np.uint8)


def _check_half(name: str, values: "np.ndarray[Any, Any]", quantisation: Any) -> None:
    """Raise where float16 can not hold the values.

    Raises:
        DoesNotFit: with the tensor's name.
    """
    if quantisation.name == "F16" and (largest := float(np.abs(values).max(initial=0.0))) > LARGEST_HALF:
        raise DoesNotFit(
            f"format 'gguf': {name}: expected weights up to {LARGEST_HALF:g} for f16, got {largest:.3g}; "
            "pass --type bf16"
        )


def _ready() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise PrunelitError("format 'gguf': expected the package gguf, got none; pip install 'prunelit[gguf]'")


def _provable() -> None:
    if importlib.util.find_spec("xllamacpp") is None:
        raise NotProved(
            "format 'gguf': not proved: llama.cpp is not installed; pip install 'prunelit[llamacpp]', "
            "or write it without proof: --unproved true"
        )


_LOADS = """\
import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path = "PATH"
server = xllamacpp.Server(parameters)  # or: llama-server -m PATH"""

FORMAT = Format(
    "gguf", _LOADS, write, partial(proof.prove, write_file), ".gguf", KINDS, "gguf", _ready, _provable, check
)
