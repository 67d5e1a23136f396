"""Format gguf: one file that llama.cpp runs, written tensor by tensor from the model without a converter script."""

import importlib.util
import math
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prunelit.export.formats import ExportJob, Format
from prunelit.export.gguf import proof, quantize
from prunelit.export.gguf import tokenizer as gguf_tokenizer
from prunelit.export.gguf.layout import (
    FLOAT16_MAX,
    GRAPHS,
    LayerSizes,
    TensorEntry,
    choose_graph,
    compute_layer_sizes,
    list_tensor_entries,
)
from prunelit.export.gguf.settings import compute_file_context, write_graph_settings
from prunelit.model.decoder import Decoder
from prunelit.runtime.errors import DoesNotFit, NotProved, PrunelitError
from prunelit.runtime.progress import track_progress

WEIGHT_TYPES = ("f16", "bf16", "f32", *quantize.ROUNDED_TYPES)
"""Types of the matrices, the default first."""


def write_gguf(job: ExportJob) -> dict[str, Any]:
    """Write a model and its tokenizer to the file `job.path`.

    `job.kind` is the type of the matrices; vectors are float32. With the types of few bits, FFNs are padded with zeros
    to a multiple of 32 channels. `prunelit.export.gguf.quantize` says what a matrix with other rows than the type has
    blocks for becomes.

    Returns:
        {"note", "architecture": the graph, "type", "bytes", "other_types": matrices in another type because of their
        rows, "matrices_left_f16"}.

    Raises:
        DoesNotFit: llama.cpp has no graph or tokenizer for the model, or a weight is beyond float16.
        PrunelitError: llama.cpp, which rounds to the type, is not installed.

    Example: `prunelit.export.write_model(model, "model.gguf", tokenizer, format="gguf")` calls it.
    """
    check_gguf(job.model, job.tokenizer)
    graph, matrices = write_gguf_file(job.model, job.tokenizer, job.path, job.kind)
    size = job.path.stat().st_size
    note = f"gguf: graph {graph!r}, {job.kind}, {size / 2**20:.1f} MiB"
    facts: dict[str, Any] = {"architecture": graph, "type": job.kind, "bytes": size, "matrices_left_f16": 0}
    if job.kind in quantize.ROUNDED_TYPES:
        float16_count = sum(tensor_type == "F16" for _, _, tensor_type in matrices)
        other_types = quantize.describe_other_types(job.kind, matrices)
        if float16_count:
            note += f"; {float16_count} matrices are float16, their rows are no multiple of {quantize.BLOCK_SIZE}"
        if job.kind in quantize.K_TYPES and other_types:
            described = "; ".join(f"{place}: {types}" for place, types in other_types.items())
            note += f"; in other types, as {quantize.K_BLOCK_SIZE} does not divide their rows: {described}"
        facts |= {"other_types": other_types, "matrices_left_f16": float16_count}
    return {"note": note} | facts


def check_gguf(model: Any, tokenizer: Any) -> None:
    """Check that `write_gguf` can write a model, from shapes and configs; the range of weights is not checked.

    Raises:
        DoesNotFit: llama.cpp has no graph or tokenizer for the model, or there is no tokenizer.

    Example: `check_gguf` is used further down in this module.
    """
    if tokenizer is None:
        raise DoesNotFit("format 'gguf': expected a model with a tokenizer, got none; the file holds both")
    choose_graph(Decoder(model))
    gguf_tokenizer.read_vocabulary(tokenizer, model)


def write_gguf_file(model: Any, tokenizer: Any, file: Path, kind: str) -> tuple[str, list[tuple[str, int, str]]]:
    """Write a model and its tokenizer to a GGUF file.

    Args:
        model: causal LM of transformers.
        tokenizer: its fast tokenizer.
        file: the file to write.
        kind: type of the matrices, one of `WEIGHT_TYPES`.

    Returns:
        The name of the graph, and name, row length and type of each matrix that is rounded.

    Raises:
        DoesNotFit: llama.cpp has no graph or tokenizer for the model, or a weight is beyond float16.
        PrunelitError: the installed llama.cpp does not round to the type.

    Example: see `write_gguf`.
    """
    import gguf

    decoder = Decoder(model)
    graph = choose_graph(decoder)
    vocabulary = gguf_tokenizer.read_vocabulary(tokenizer, model)
    layers = compute_layer_sizes(decoder, kind)
    tensors = list(list_tensor_entries(decoder, GRAPHS[graph], layers))
    tensor_types = _choose_tensor_types(tensors, kind)
    with closing(gguf.GGUFWriter(file, graph)) as writer:
        _write_metadata(writer, decoder, graph, layers, kind)
        gguf_tokenizer.write_vocabulary(writer, vocabulary)
        # The file begins with names, shapes and offsets of all tensors, so these are declared before any is converted.
        for entry in tensors:
            tensor_type = tensor_types[entry.name]
            shape, dtype = _get_stored_layout(entry.shape, tensor_type)
            size = math.prod(shape) * dtype.itemsize
            writer.add_tensor_info(entry.name, shape, dtype, size, raw_dtype=tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in track_progress(tensors, "writing gguf", unit="tensor"):
            values = entry.values().float().cpu().contiguous().numpy()
            _check_float16_range(entry.name, values, tensor_types[entry.name])
            writer.write_tensor_data(quantize.quantize_rows(values, tensor_types[entry.name]))
    matrices = [(entry.name, entry.shape[-1], tensor_types[entry.name].name) for entry in tensors]
    return graph, [matrix for matrix in matrices if matrix[-1] != "F32"]


def _write_metadata(writer: Any, decoder: Decoder, graph: str, layers: list[LayerSizes], kind: str) -> None:
    """Write the sizes and constants that the graph reads."""
    import gguf

    config, model = decoder.config, decoder.model
    heads, groups, dims, channels, experts, shared = (list(column) for column in zip(*layers, strict=True))
    per_layer = GRAPHS[graph].per_layer
    writer.add_type("model")
    writer.add_name(decoder.shape.name)
    settings = GRAPHS[graph].settings
    writer.add_context_length(compute_file_context(decoder, settings))
    writer.add_embedding_length(int(config.hidden_size))
    writer.add_block_count(len(layers))
    writer.add_feed_forward_length(channels if per_layer else channels[0])
    if experts[0]:
        writer.add_expert_count(experts[0])
        writer.add_expert_used_count(decoder.layers[0].shape.experts_per_token)
        writer.add_expert_feed_forward_length(channels[0])
        if shared[0]:
            writer.add_expert_shared_feed_forward_length(shared[0])
    writer.add_head_count(heads if per_layer else heads[0])
    writer.add_head_count_kv(groups if per_layer else groups[0])
    writer.add_key_length(dims[0])
    writer.add_value_length(dims[0])
    writer.add_rope_dimension_count(dims[0])
    write_graph_settings(writer, decoder, settings)
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_vocab_size(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    types = gguf.LlamaFileType
    writer.add_file_type(types.ALL_F32 if kind == "f32" else types[f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _choose_tensor_types(tensors: list[TensorEntry], kind: str) -> dict[str, Any]:
    """Choose the GGML type of each tensor, by name."""
    import gguf

    types = gguf.GGMLQuantizationType
    head = "output.weight" if any(entry.name == "output.weight" for entry in tensors) else "token_embd.weight"
    places = quantize.list_places([entry.name for entry in tensors])

    def choose_type(name: str, shape: tuple[int, ...]) -> Any:
        if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):  # rounded router weights choose other experts
            return types.F32
        if kind not in quantize.ROUNDED_TYPES:
            return types[kind.upper()]
        return types[quantize.choose_quantized_type(name, shape[-1], kind, name == head, places[name])]

    return {entry.name: choose_type(entry.name, entry.shape) for entry in tensors}


def _get_stored_layout(shape: tuple[int, ...], tensor_type: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and dtype of the array that is written; bfloat16 and the block types are written as bytes."""
    import gguf

    types = gguf.GGMLQuantizationType
    numpy_dtypes: dict[Any, np.dtype[Any]] = {types.F32: np.dtype(np.float32), types.F16: np.dtype(np.float16)}
    if tensor_type in numpy_dtypes:
        return shape, numpy_dtypes[tensor_type]
    return tuple(gguf.quant_shape_to_byte_shape(shape, tensor_type)), np.dtype(np.uint8)


def _check_float16_range(name: str, values: "np.ndarray[Any, Any]", tensor_type: Any) -> None:
    """Check that float16 can hold the values of a tensor that is stored in it.

    Raises:
        DoesNotFit: a value is too large; the message names the tensor.
    """
    if tensor_type.name == "F16" and (largest := float(np.abs(values).max(initial=0.0))) > FLOAT16_MAX:
        raise DoesNotFit(
            f"format 'gguf': {name}: expected weights up to {FLOAT16_MAX:g} for f16, got {largest:.3g}; "
            "pass --type bf16"
        )


def _check_gguf_installed(kind: str) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise PrunelitError("format 'gguf': expected the package gguf, got none; pip install gguf")
    quantize.check_quantizer_installed(kind)


def _check_xllamacpp_installed() -> None:
    if importlib.util.find_spec("xllamacpp") is None:
        raise NotProved(
            "format 'gguf': not proved: llama.cpp is not installed; pip install 'prunelit[llamacpp]', "
            "or write it without proof: --unproved true"
        )


_LOAD_SNIPPET = """\
import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path = "PATH"
server = xllamacpp.Server(parameters)  # or: llama-server -m PATH"""

FORMAT = Format(
    "gguf",
    _LOAD_SNIPPET,
    write_gguf,
    partial(proof.prove_gguf, write_gguf_file),
    ".gguf",
    WEIGHT_TYPES,
    "gguf",
    _check_gguf_installed,
    _check_xllamacpp_installed,
    check_gguf,
    text_only=True,
)
