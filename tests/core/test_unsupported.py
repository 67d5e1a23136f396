"""What is not cut is named from its config alone: what it is, what of it is cut, where a declaration would go."""

import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from transformers import CONFIG_MAPPING, AutoModelForMaskedLM

from prunelit.core import unsupported
from prunelit.core.architectures import ARCHITECTURES, Architecture, get_architecture, register
from prunelit.core.unsupported import describe_model_kind, describe_other_head, describe_quantized_weights
from prunelit.runtime.errors import UnknownArchitecture

ENCODER_DECODER, ENCODER, STATE_SPACE = "an encoder-decoder;", "an encoder, which", "a state-space model or RNN;"
KINDS = [
    ({"model_type": "t5", "is_encoder_decoder": True}, ENCODER_DECODER),
    ({"model_type": "t5"}, ENCODER_DECODER),
    ({"model_type": "bart"}, ENCODER_DECODER),
    ({"model_type": "whisper"}, ENCODER_DECODER),
    ({"model_type": "a_new_one", "is_encoder_decoder": True}, ENCODER_DECODER),
    ({"model_type": "nllb-moe", "is_encoder_decoder": True, "num_experts": 128}, ENCODER_DECODER),
    ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, ENCODER),
    ({"model_type": "roberta"}, ENCODER),
    ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, ENCODER),
    ({"model_type": "bloom"}, "ALiBi"),
    ({"model_type": "mpt"}, "ALiBi"),
    ({"model_type": "mpt", "attn_config": {"alibi": True}}, "ALiBi"),
    ({"model_type": "jais", "position_embedding_type": "alibi"}, "ALiBi"),
    ({"model_type": "jetmoe", "num_local_experts": 128}, "a mixture of 128 experts that no declaration names;"),
    (
        {"model_type": "glm_moe_dsa", "n_routed_experts": 256, "kv_lora_rank": 512},
        "a mixture of 256 experts that no declaration names;",
    ),
    (
        {"model_type": "dbrx", "ffn_config": {"moe_num_experts": 16}},
        "a mixture of 16 experts that no declaration names;",
    ),
    (
        {"model_type": "ernie4_5_vl_moe_text", "moe_num_experts": [64, 32]},
        "a mixture of 64 experts that no declaration names;",
    ),
    ({"model_type": "mamba2"}, STATE_SPACE),
    ({"model_type": "rwkv7"}, STATE_SPACE),
    ({"model_type": "falcon_mamba"}, STATE_SPACE),
    ({"model_type": "LLaDA"}, "a diffusion LM,"),
    ({"model_type": "diffusion_gemma"}, "a diffusion LM,"),
    ({"model_type": "a_latent_one", "kv_lora_rank": 256}, "latent attention"),
    ({"model_type": "internvl_chat", "llm_config": {"model_type": "qwen2"}}, "one in llm_config,"),
    ({"model_type": "a_new_one", "architectures": ["NewForTokenClassification"]}, "NewForTokenClassification,"),
    ({"model_type": "llava", "text_config": {"model_type": "bloom"}}, "'llava' with text_config of type 'bloom'"),
    ({"model_type": "llava", "text_config": {"model_type": "bloom"}}, "ALiBi"),
    (
        {"model_type": "qwen3_vl_moe", "text_config": {"model_type": "x", "num_experts": 4}},
        "a mixture of 4 experts that no declaration names;",
    ),
    ({"model_type": "a_pair", "text_config": {"model_type": "lama"}}, "with text_config of type 'lama'"),
    ({"model_type": "a_pair", "text_config": {"model_type": "lama"}}, "nearest: 'llama'"),
    ({"model_type": "falcon", "alibi": True}, "expected alibi = False in its config, got True, a decoder with ALiBi"),
    ({"model_type": "opt", "do_layer_norm_before": False}, "expected do_layer_norm_before = True in its config"),
    ({"model_type": "lama"}, "add 'lama' to ARCHITECTURES"),
]


@pytest.fixture
def undone() -> Iterator[None]:
    before = dict(ARCHITECTURES)
    yield
    ARCHITECTURES.clear()
    ARCHITECTURES.update(before)


@pytest.mark.parametrize(("config", "part"), KINDS, ids=str)
def test_what_is_not_declared_is_named_in_one_short_line(config: dict[str, Any], part: str) -> None:
    with pytest.raises(UnknownArchitecture) as error:
        get_architecture(SimpleNamespace(**config))
    message = str(error.value)
    assert part in message and repr(config["model_type"]) in message
    assert "expected" in message and "got" in message and "prunelit/core/architectures.py" in message
    assert ("methods --families" in message) == (config["model_type"] not in ARCHITECTURES)
    assert "\n" not in message and len(message) <= 310


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mpt", "attn_config": {"alibi": False}},
        {"model_type": "a_dense_one", "num_local_experts": 1},
        {"model_type": "doge", "num_experts": 16384, "is_moe": False},
        {"model_type": "bert", "is_decoder": True},
        {"model_type": "zamba_like_mamba", "num_attention_heads": 32},
        {"model_type": "a_new_moe", "num_experts": 0},
        {"model_type": "llama", "architectures": None, "attn_config": None},
    ],
    ids=str,
)
def test_what_has_no_such_marks_is_of_no_kind(config: dict[str, Any]) -> None:
    assert describe_model_kind(SimpleNamespace(**config)) == ""


@pytest.mark.parametrize(
    "model_type", ["t5", "bart", "whisper", "bert", "bloom", "mpt", "mixtral", "gpt_oss", "dbrx", "mamba", "rwkv"]
)
def test_configs_of_transformers_have_the_same_marks(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type]()
    assert describe_model_kind(config) and describe_model_kind(SimpleNamespace(**config.to_dict()))


def test_most_encoders_of_transformers_are_known() -> None:
    kinds = {kind.model_type: describe_model_kind(kind()) for kind in AutoModelForMaskedLM._model_mapping}
    assert sum(map(bool, kinds.values())) > 0.8 * len(kinds)


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_no_declared_family_is_listed_as_unsupported(family: str) -> None:
    for names in (unsupported._ENCODERS, unsupported._ENCODER_DECODERS, unsupported._STATE_SPACES):
        assert family not in names


@pytest.mark.usefixtures("undone")
@pytest.mark.parametrize(
    "config", [row for row, part in KINDS if "text_config" not in row and row["model_type"] not in ARCHITECTURES]
)
def test_a_registered_family_is_never_refused(config: dict[str, Any]) -> None:
    register(config["model_type"], Architecture())
    assert get_architecture(SimpleNamespace(**config)) == Architecture()


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"quant_method": "gptq", "bits": 4}, ("got gptq in 4 bits;", "the model that it was made from")),
        ({"quant_method": "awq", "bits": 4}, ("got awq in 4 bits;", "the model that it was made from")),
        ({"quant_method": "fp8"}, ("got fp8;", "FineGrainedFP8Config(dequantize=True)")),
        ({"quant_method": "mxfp4"}, ("got mxfp4;", "Mxfp4Config(dequantize=True)")),
        ({"quant_method": "compressed-tensors"}, ("compressed-tensors;", "CompressedTensorsConfig(dequantize=True)")),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ("bitsandbytes in 4 bits;", "model.dequantize()")),
        ({"load_in_8bit": True}, ("bitsandbytes in 8 bits;", "model.dequantize()")),
        ({"some": "thing"}, ("another format;",)),
    ],
    ids=str,
)
def test_weights_in_few_bits_are_named_with_the_way_back(settings: dict[str, Any], parts: tuple[str, ...]) -> None:
    for config in ({"quantization_config": settings}, {"text_config": {"quantization_config": settings}}):
        message = describe_quantized_weights(SimpleNamespace(**config))
        assert all(part in message for part in parts) and len(message) <= 250
    assert not describe_quantized_weights(SimpleNamespace(quantization_config={**settings, "dequantize": True}))


def test_classes_with_a_way_back_are_those_of_transformers() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    for method, name in unsupported._CONFIG_DEQUANTIZES.items():
        assert AUTO_QUANTIZATION_CONFIG_MAPPING[method].__name__ == name
        assert "dequantize" in inspect.signature(getattr(transformers, name)).parameters
    for method in unsupported._MODEL_DEQUANTIZES:
        quantizers = [kind for key, kind in AUTO_QUANTIZER_MAPPING.items() if key.startswith(method)]
        assert quantizers and all("_dequantize" in vars(kind) for kind in quantizers)


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {}}])
def test_plain_weights_are_not_refused(config: dict[str, Any]) -> None:
    assert describe_quantized_weights(SimpleNamespace(**config)) == ""


@pytest.mark.parametrize(
    ("name", "is_refused"),
    [
        ("LlamaForSequenceClassification", True),
        ("Qwen2ForTokenClassification", True),
        ("GPT2ForQuestionAnswering", True),
        ("Qwen2ForRewardModel", True),
        ("LlamaForCausalLM", False),
        ("PrunedLlamaForCausalLM", False),
        ("GPT2LMHeadModel", False),
        ("Gemma3ForConditionalGeneration", False),
        ("LlamaModel", False),
    ],
)
def test_other_heads_are_refused(name: str, is_refused: bool) -> None:
    message = describe_other_head(SimpleNamespace(architectures=[name]))
    assert (name in message) == is_refused and len(message) <= 260
