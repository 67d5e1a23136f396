"""Convert a GGUF file into a folder: config, weights and tokenizer, with the heads and channels that each layer has.

transformers reads GGUF files too. It knows no file whose layers differ, takes the head size to be hidden size / heads,
and leaves out biases, scaled ropes and Mixtral's experts without a word, so the graphs of `GRAPHS` are read here.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from prunelit.core.architectures import PRUNED
from prunelit.data.gguf.graphs import (
    EXPERT_LINEARS,
    GRAPHS,
    LAYER_MODULES,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    MIXTRAL_NAMES,
    MODEL_TENSORS,
    QWEN2,
    SCALED_BY_HEADS,
    FileGraph,
)
from prunelit.data.gguf.layer_shapes import LayerTensors, describe_layers, measure_layer
from prunelit.data.gguf.rope import describe_rope
from prunelit.data.gguf.tokenizer import list_special_ids, read_tokenizer
from prunelit.model.stored.folder_facts import SINGLE
from prunelit.runtime.progress import track_progress

_FACTORS = "rope_freqs.weight"
_ATTENTION_INPUTS, _FFN_INPUTS = frozenset({"attn_q", "attn_k", "attn_v"}), frozenset({"ffn_gate", "ffn_up"})
_OUTPUTS = ("attn_output", "ffn_down")


def can_convert_gguf(path: Path) -> bool:
    """Whether a GGUF file is for a graph that is read here.

    Args:
        path: the file.

    Raises:
        ValueError, OSError: it is no GGUF file, or damaged.

    Example: see `prunelit.data.sources`, which leaves other files to transformers.
    """
    import gguf

    with path.open("rb") as file:  # nearly always it is the first entry; reading all of them takes seconds
        start = file.read(256)
    key = b"general.architecture"
    if start[:4] == b"GGUF" and start[32 : 32 + len(key)] == key:
        length = int.from_bytes(start[56:64], "little")
        return start[64 : 64 + length].decode(errors="replace") in GRAPHS
    field = gguf.GGUFReader(path).get_field("general.architecture")
    return field is not None and field.contents() in GRAPHS


def convert_gguf_file(path: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to a folder.

    Weights are in float32 where the file's matrices are, in bfloat16 where one is, and in float16 otherwise.

    Args:
        path: the file, for one of `GRAPHS`.
        folder: an empty folder.

    Raises:
        ValueError: the file holds a tensor or a setting that no family of transformers has, or it is damaged.
        KeyError, OSError: it is damaged.

    Example: see `tests/data/gguf/test_convert.py`.
    """
    file = _GgufFile(path)
    config = file.describe_config()
    dtype = getattr(torch, config["dtype"])
    weights = {name: x.to(dtype).contiguous() for name, x in file.read_weights(config)}
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})
    for name, content in (("config.json", config), ("generation_config.json", list_special_ids(file.metadata))):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    read_tokenizer(path, file.metadata).save_pretrained(folder)


class _GgufFile:
    """A GGUF file: metadata by name, tensors by name, and its layers.

    Raises:
        ValueError: a tensor has no place in the family.
    """

    def __init__(self, path: Path):
        import gguf

        reader = gguf.GGUFReader(path)
        self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        architecture = self.metadata["general.architecture"]
        self.settings = {
            name.removeprefix(f"{architecture}."): value
            for name, value in self.metadata.items()
            if name.startswith(f"{architecture}.")
        }
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.graph: FileGraph = GRAPHS[architecture]
        self.modules = LAYER_MODULES | dict(self.graph.names)
        if architecture == "llama" and self.settings.get("expert_count"):
            self.graph = MIXTRAL
        self._check_names()
        self.layer_count = int(self.settings["block_count"])
        self.head_dim = self._find_head_dim()
        self.layers = [self._measure_layer(index) for index in range(self.layer_count)]

    def _check_names(self) -> None:
        """Check that every tensor has a place in the family."""
        for name in self.tensors:
            middle = name.split(".")[2:3] if name.startswith("blk.") else []
            is_known = name in MODEL_TENSORS or name == _FACTORS or (middle and middle[0] in self.modules)
            if not is_known and not (middle and middle[0] in EXPERT_LINEARS and self.graph.config_experts):
                raise ValueError(f"expected tensors of {self.graph.family}, got {name!r}")

    def _find_head_dim(self) -> int:
        """Find the head size: stated, or hidden size / heads of the first layer that has any."""
        if stated := self.settings.get("attention.key_length"):
            return int(stated)
        heads = self.settings["attention.head_count"]
        first = next(count for count in (heads if isinstance(heads, list) else [heads]) if count)
        return int(self.settings["embedding_length"]) // int(first)

    def _measure_layer(self, index: int) -> LayerTensors:
        prefix = f"blk.{index}."
        # The sizes of a tensor stand in the file with those of a row first.
        own = {name.removeprefix(prefix): x for name, x in self.tensors.items() if name.startswith(prefix)}
        rows = {name.removesuffix(".weight"): int(x.shape[-1]) for name, x in own.items() if name.endswith(".weight")}
        biases = frozenset(name.removesuffix(".bias") for name in own if name.endswith(".bias"))
        if self.graph.config_experts:
            rows |= {"ffn_up": rows.get("ffn_up_shexp", 1)}
            return measure_layer(rows, biases, self.head_dim)
        attention = {"attn_q", "attn_k", "attn_v", "attn_output"}
        if attention & rows.keys() and not attention <= rows.keys():
            missing = ", ".join(sorted(attention - rows.keys()))
            raise ValueError(f"expected queries, keys, values and output in layer {index}, got no {missing}")
        empty = [
            name
            for name in _OUTPUTS
            if self.metadata["general.architecture"] == "deci"
            and name in rows
            and name not in biases
            and not self._read_tensor(f"{prefix}{name}.weight").any()
        ]
        return measure_layer(rows, biases, self.head_dim, empty)

    def describe_config(self) -> dict[str, Any]:
        """Describe the model as its config.json; `per_layer_config` says where layers differ."""
        graph, settings = self.graph, self.settings
        table = self.tensors["token_embd.weight"]
        factors = self._read_tensor(_FACTORS) if _FACTORS in self.tensors else None
        biases = frozenset[str]().union(*(layer.biases for layer in self.layers))
        config: dict[str, Any] = {
            "dtype": self._find_dtype(),
            "vocab_size": int(table.shape[-1]),
            "hidden_size": int(settings["embedding_length"]),
            "num_hidden_layers": self.layer_count,
            "head_dim": self.head_dim,
            "max_position_embeddings": int(settings["context_length"]),
            "rms_norm_eps": _shorten_float32(settings["attention.layer_norm_rms_epsilon"]),
            "rope_parameters": describe_rope(settings, factors, self.head_dim),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            **list_special_ids(self.metadata),
            **dict(graph.settings),
        }
        if graph.config_experts:
            widths = describe_layers(self.layers, biases)
            return config | self._describe_mixtures(widths) | _name_class(graph)
        graph = self._choose_family(biases)
        config_biases = self._find_config_biases(biases)
        widths = describe_layers(self.layers, config_biases)
        config |= dict(graph.settings) | widths | self._describe_scales(widths)
        if graph.family in ("llama", "mistral", "granite"):
            config |= {"attention_bias": "attn_q" in config_biases, "mlp_bias": "ffn_up" in config_biases}
        if (
            graph is LLAMA
            and "per_layer_config" not in widths
            and config["hidden_size"] % widths["num_attention_heads"]
        ):
            if not config_biases:
                graph = MISTRAL  # whose config takes any number of heads
                config = {k: v for k, v in config.items() if not k.endswith("_bias")} | dict(graph.settings)
            else:
                config["per_layer_config"] = {"0": {"num_attention_heads": widths["num_attention_heads"]}}
        return config | _name_class(graph, is_per_layer="per_layer_config" in config)

    def _choose_family(self, biases: frozenset[str]) -> FileGraph:
        """Choose the family by the biases: Qwen2 has them on queries, keys and values alone."""
        if self.graph is LLAMA and biases & _ATTENTION_INPUTS and not biases & (_FFN_INPUTS | set(_OUTPUTS)):
            return QWEN2._replace(rotates_neighbours=True)
        return self.graph

    def _find_config_biases(self, biases: frozenset[str]) -> frozenset[str]:
        """Find the biases that every layer of the class has; zeros stand for those that the file lacks."""
        if self.graph.family not in ("llama", "granite"):
            return _ATTENTION_INPUTS if self.graph.family == "qwen2" else frozenset()
        attention = _ATTENTION_INPUTS | {"attn_output"} if biases & _ATTENTION_INPUTS else frozenset()
        if self._choose_family(biases).family == "qwen2":
            return _ATTENTION_INPUTS
        return attention | (_FFN_INPUTS | {"ffn_down"} if biases & _FFN_INPUTS else frozenset())

    def _describe_scales(self, widths: Mapping[str, Any]) -> dict[str, Any]:
        """Describe what single families have beside Llama's settings, from metadata and from what the graph fixes."""
        described = {name: self.settings[key] for key, name in self.graph.metadata if key in self.settings}
        if self.metadata["general.architecture"] in SCALED_BY_HEADS:
            by_heads = self.layer_count == SCALED_BY_HEADS[self.metadata["general.architecture"]]
            hidden = int(self.settings["embedding_length"])
            described["query_pre_attn_scalar"] = hidden / widths["num_attention_heads"] if by_heads else self.head_dim
        if self.graph.family == "gemma3_text":
            rope = describe_rope(self.settings, None, self.head_dim)
            local = {"rope_type": "default", "rope_theta": 10000.0}
            described["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
        return described

    def _describe_mixtures(self, widths: Mapping[str, Any]) -> dict[str, Any]:
        """Describe mixtures, which are the same in all layers."""
        graph, settings = self.graph, self.settings
        described = {name: widths[name] for name in ("num_attention_heads", "num_key_value_heads")}
        described |= {
            graph.config_experts: int(settings["expert_count"]),
            graph.config_expert_channels: int(self.tensors["blk.0.ffn_up_exps.weight"].shape[1]),
            "num_experts_per_tok": int(settings["expert_used_count"]),
        }
        if graph.family == "qwen2_moe":
            described["shared_expert_intermediate_size"] = widths["intermediate_size"]
        return described

    def _find_dtype(self) -> str:
        """Find the dtype of the folder from the types of the matrices."""
        types = {x.tensor_type.name for x in self.tensors.values() if len(x.shape) > 1}
        return "float32" if types <= {"F32"} else "bfloat16" if "BF16" in types else "float16"

    def read_weights(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Read the weights of the model that a config describes, by their names in transformers."""
        names = MIXTRAL_NAMES if self.graph is MIXTRAL else {}
        for name in track_progress(list(self.tensors), "reading gguf", unit="tensor"):
            if name in MODEL_TENSORS:
                offset = self.graph.norm_offset if name == "output_norm.weight" else 0.0
                yield MODEL_TENSORS[name], self._read_tensor(name) - offset
            if not name.startswith("blk."):
                continue
            _, index, module, last = name.split(".")
            layer, prefix = self.layers[int(index)], f"model.layers.{index}."
            removed = layer.removed if not self.graph.config_experts else ()
            if ("attention" if module.startswith("attn") else "mlp") in removed:
                continue
            value = self._read_tensor(name)
            if module in EXPERT_LINEARS:
                block, linear = names.get("mlp.experts", "mlp.experts"), EXPERT_LINEARS[module]
                for expert, weight in enumerate(value):
                    yield f"{prefix}{block}.{expert}.{names.get(linear, linear)}.{last}", weight
                continue
            heads = {"attn_q": layer.query_heads, "attn_k": layer.kv_groups}.get(module, 0)
            if heads and self.graph.rotates_neighbours:
                value = _separate_rotary_rows(value, heads)
            if module == "ffn_gate_inp_shexp":
                value = value.reshape(1, -1)
            if module.endswith("norm"):
                value -= self.graph.norm_offset
            path = self.modules[module]
            yield f"{prefix}{names.get(path, path)}.{last}", value
        yield from self._make_missing_biases()

    def _make_missing_biases(self) -> Iterator[tuple[str, Tensor]]:
        """Make the biases of zeros that the class has in every layer and the file lacks."""
        biases = frozenset[str]().union(*(layer.biases for layer in self.layers))
        expected = frozenset() if self.graph.config_experts else self._find_config_biases(biases)
        for index, layer in enumerate(self.layers):
            absent = {"attn": not layer.query_heads, "ffn": not layer.channels}
            for module in sorted(expected - layer.biases):
                if not absent[module.partition("_")[0]]:
                    rows = int(self.tensors[f"blk.{index}.{module}.weight"].shape[-1])
                    yield f"model.layers.{index}.{LAYER_MODULES[module]}.bias", torch.zeros(rows)

    def _read_tensor(self, name: str) -> Tensor:
        """Read a tensor in float32, its rows first."""
        import gguf

        tensor = self.tensors[name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(np.array(values, dtype=np.float32))


def _name_class(graph: FileGraph, is_per_layer: bool = False) -> dict[str, Any]:
    """Name the class of a folder as config.json does; `prunelit.load` knows those whose layers differ by the prefix."""
    family, model_class = graph.family, graph.model_class
    if is_per_layer:
        family, model_class = f"{PRUNED}{family}", f"Pruned{model_class}"
    return {"model_type": family, "architectures": [model_class]}


def _separate_rotary_rows(x: Tensor, heads: int) -> Tensor:
    """Bring the dimensions of every head, of which neighbours rotate together, into the order of two halves.

    Args:
        x: [heads * D, ...].
        heads: number of heads.

    Example:
        >>> _separate_rotary_rows(torch.tensor([0, 2, 1, 3, 4, 6, 5, 7]), heads=2)
        tensor([0, 1, 2, 3, 4, 5, 6, 7])
    """
    return x.reshape(heads, -1, 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def _shorten_float32(value: float) -> float:
    """The shortest decimal number that is the same in float32, as configs have it.

    Example:
        >>> _shorten_float32(9.999999747378752e-06)
        1e-05
    """
    return float(str(np.float32(value)))
