"""Whether other engines compute what transformers computes from folders of prunelit.

    .venv/bin/python benchmarks/other_engines.py --engine openvino --python ENV/bin/python

Tiny random models of Llama and Qwen3, and SmolLM2-135M cut by 20%, are saved as `uniform`, `hetero` and `padded`;
transformers says what they answer to three prompts, greedily and in float32. Then one engine, in an environment of its
own, converts each folder as its own documentation says, and answers the same prompts. Text and log-probabilities are
compared as `export --prove vllm` compares them. Every folder has a process of its own. What to install:

    openvino      openvino-genai, optimum-intel; converted by `optimum-cli export openvino --weight-format fp32`
    openvino_direct  openvino-genai, transformers; converted by OpenVINO's own front end, see `write_openvino_model`
    onnxruntime   onnxruntime-genai, onnx, onnx-ir, transformers; by `python -m onnxruntime_genai.models.builder`
    executorch    executorch, transformers; by transformers' own recipe for torch.export, lowered to XNNPACK
    sglang        sglang; reads the folder as it is

The tiny models' cuts: "alike" leaves all layers one shape; in "mixed" the first layer has no attention, the second
fewer KV groups, the third fewer query heads and no FFN; "kv_group" and "attention" do one of these. SmolLM2 is cut by
`llm_bip` (layers alike) and by `flap` (they differ), on the text that ships with Python.

ExecuTorch's static cache takes the shapes of its layers from the config, where a removed attention still has one. Where
that fails, the shapes are taken from the attentions of the model instead, and the result says so ("by").
The results are added to benchmarks/results/other_engines.json, and the table of docs/howto/serve.md is printed.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NEW_TOKENS = 8
PACKAGES = {
    "openvino": ("openvino-genai", "optimum-intel", "transformers"),
    "openvino_direct": ("openvino-genai", "openvino", "transformers"),
    "onnxruntime": ("onnxruntime-genai", "onnxruntime", "transformers"),
    "executorch": ("executorch", "torch", "transformers"),
    "sglang": ("sglang", "sglang-kernel", "transformers"),
}
"""Of each engine, the packages whose versions are written down; torch's always is."""
TITLES = {
    "openvino": "OpenVINO GenAI",
    "openvino_direct": "OpenVINO GenAI, without optimum-intel",
    "onnxruntime": "ONNX Runtime GenAI",
    "executorch": "ExecuTorch",
    "sglang": "SGLang",
}
TINY_CUTS = (
    ("uniform", "alike"),
    ("hetero", "mixed"),
    ("hetero", "kv_group"),
    ("hetero", "attention"),
    ("padded", "mixed"),
)
REAL = "smollm2-135m"
REAL_CUTS = (("uniform", "llm_bip"), ("hetero", "flap"), ("padded", "flap"))
CASES = (
    *((family, format, kind) for family in ("llama", "qwen3") for format, kind in TINY_CUTS),
    *((REAL, format, method) for format, method in REAL_CUTS),
)
CACHE_SHAPES = "shapes of the cache taken from the attentions"
"""The second way for ExecuTorch."""
_TINY = {"hidden_size": 288, "head_dim": 32, "vocab_size": 264, "max_position_embeddings": 256}
_TINY |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}


class Refused(Exception):
    """What an engine's own program printed when it did not take a folder."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=PACKAGES, required=True)
    parser.add_argument("--python", required=True, help="Python of an environment that has the engine")
    parser.add_argument("--only", nargs="*", default=[], help="models: llama, qwen3, smollm2-135m")
    parser.add_argument("--keep", type=Path, help="folder for the cut models, which the next engine takes from there")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/other_engines.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(ROOT))
    from prunelit.runtime.versions import collect_versions

    report: dict[str, Any] = {"engines": {}}
    if arguments.out.exists():
        report = json.loads(arguments.out.read_text(encoding="utf-8"))
    report |= {
        "command": "benchmarks/other_engines.py --engine ENGINE --python ENV/bin/python",
        "versions": collect_versions(),
    }
    own = report["engines"].setdefault(arguments.engine, {"versions": {}, "results": {}})
    for case in CASES:
        if arguments.only and case[0] not in arguments.only:
            continue
        name = " ".join(case)
        with tempfile.TemporaryDirectory() as scratch:
            folder = (arguments.keep or Path(scratch)) / name.replace(" ", "-")
            versions, own["results"][name] = run_case(arguments, case, folder, Path(scratch))
        own["versions"] |= versions
        own["results"] = {" ".join(c): own["results"][" ".join(c)] for c in CASES if " ".join(c) in own["results"]}
        print(name, own["results"][name], flush=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(format_table(report))


def format_table(report: dict[str, Any]) -> str:
    """Format the table of the guide from the results: engines by formats."""
    lines = ["| engine | `uniform` | `hetero` | `padded` |", "|---|---|---|---|"]
    for engine, title in TITLES.items():
        if engine in report["engines"]:
            own = report["engines"][engine]
            versions = [f"{name} {own['versions'][name]}" for name in PACKAGES[engine] if name in own["versions"]]
            cells = [format_cell(own["results"], format) for format in ("uniform", "hetero", "padded")]
            lines.append(f"| {title} ({', '.join(versions)}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def format_cell(results: dict[str, Any], format: str) -> str:
    """Format what an engine did with all folders of one format."""
    own = {name: result for name, result in results.items() if name.split()[1] == format and "runs" in result}
    ran = [result for result in own.values() if result["runs"]]
    parts = []
    if ran and all(result["passed"] for result in ran):
        parts.append(f"ran, {max(result['largest_logprob_difference'] for result in ran):.0e}")
        kinds = sorted({name.split()[2] for name, result in own.items() if "by" in result})
        if kinds:
            parts.append(f"cuts of kind {', '.join(kinds)} with the {CACHE_SHAPES}")
    elif ran:
        parts.append("another text")
    parts += sorted({f"no: `{result['message']}`" for result in own.values() if not result["runs"]})
    return "; ".join(parts) or "not tried"


def run_case(
    arguments: argparse.Namespace, case: tuple[str, str, str], folder: Path, scratch: Path
) -> tuple[dict[str, str], Any]:
    """Write one folder and let an engine answer from it; returns the versions of its packages, and the result."""
    from prunelit.export.proof import new_process
    from prunelit.export.proof.served import compare_served_answers
    from prunelit.runtime.errors import NotProved, PrunelitError

    known = folder.with_name(f"{folder.name}.json")
    try:
        if not known.is_file():
            question = write_real(case, folder) if case[0] == REAL else write_tiny(case, folder)
            known.write_text(json.dumps(question), encoding="utf-8")
    except PrunelitError as error:
        return {}, {"not_written": shorten_message(str(error), folder)}
    question = json.loads(known.read_text(encoding="utf-8"))
    expected = question.pop("expected")
    question |= {"engine": arguments.engine, "folder": str(folder), "scratch": str(scratch), "new_tokens": NEW_TOKENS}
    try:
        options = {"python": arguments.python}
        answer = json.loads(new_process.run_proof_script(__file__, question, scratch, "its process ended", **options))
    except NotProved as error:
        return {}, {"runs": False, "message": shorten_message(str(error), folder)}
    facts = {key: answer[key] for key in ("message", "by") if key in answer}
    if "tokens" not in answer:
        return answer["versions"], {"runs": False, **facts}
    verdict = compare_served_answers(expected, answer)
    return answer["versions"], {"runs": True, **verdict, **facts}


def shorten_message(text: str, folder: Path) -> str:
    """Take the paths of this machine out of a message."""
    text = re.sub(r"(/[\w.+-]+)+/site-packages/", "", text.replace(str(folder), "FOLDER"))
    return " ".join(text.split())[:300]


def write_tiny(case: tuple[str, str, str], folder: Path) -> dict[str, Any]:
    """Cut a tiny random model and save it; returns prompts and the expected answers."""
    import torch

    import prunelit
    from prunelit.export.proof.served import compute_greedy_answers
    from prunelit.model import surgery
    from tests.export.alike import uniform
    from tests.tiny import cut, tiny, tiny_byte_tokenizer, tokens

    family, format, kind = case
    model = tiny(family, **_TINY)
    with torch.no_grad():
        model.lm_head.weight[model.config.eos_token_id] = 0  # engines stop at this token, so it never comes
    surgery.apply(model, uniform(model, groups=2) if kind == "alike" else cut(model, kind))
    prunelit.save(model, folder, tiny_byte_tokenizer(), format=format)
    prompts = tokens(3, 10)
    return {"prompts": prompts.tolist(), "expected": compute_greedy_answers(model, prompts, NEW_TOKENS)}


def write_real(case: tuple[str, str, str], folder: Path) -> dict[str, Any]:
    """Cut SmolLM2-135M by a method and save it; returns prompts and the expected answers."""
    import torch

    import prunelit
    from prunelit.export.proof.served import compute_greedy_answers

    _, format, method = case
    source = f"builtin:{REAL}"
    model, tokenizer = prunelit.load(source, "float32"), prunelit.load_tokenizer(source)
    text = "builtin:python-docs"
    plan = prunelit.prune(model, method, ratio=0.2, text=text, tokenizer=tokenizer)
    prunelit.save(model, folder, tokenizer, plan, format=format)
    texts = ("The capital of France is the city of", "A list in Python is", "def add(a, b):\n    return")
    rows = [tokenizer(text)["input_ids"] for text in texts]
    prompts = torch.tensor([row[: min(map(len, rows))] for row in rows])
    return {"prompts": prompts.tolist(), "expected": compute_greedy_answers(model, prompts, NEW_TOKENS)}


# What follows runs in the environment of the engine and imports nothing of prunelit.


def answer_question(question: dict[str, Any]) -> dict[str, Any]:
    """Let an engine answer from one folder: {"versions", "tokens", "logprobs"}, or {"versions", "message"}."""
    versions = {}
    for name in (*PACKAGES[question["engine"]], "torch"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    scratch, folder = Path(question["scratch"]), Path(question["folder"])
    ask = {
        "openvino": ask_openvino,
        "openvino_direct": ask_openvino,
        "onnxruntime": ask_onnxruntime,
        "sglang": ask_sglang,
        "executorch": ask_executorch,
    }
    try:
        answer = ask[question["engine"]](question, scratch)
    except Exception as error:  # noqa: BLE001  # whatever the engine raises is the answer
        reason = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
        answer = {"message": shorten_message(reason, folder)}
    return {"versions": versions, **answer}


def convert_by_command(*command: str) -> None:
    """Run an engine's converter; its last line is the message where it fails."""
    process = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if process.returncode:
        lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
        # The last line that names an error; a longer message goes on after it.
        named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Refused)\b", line)]
        raise Refused((named or lines or [f"it ended with {process.returncode}"])[-1])


def ask_openvino(question: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Convert with optimum-intel or by OpenVINO itself, and answer with OpenVINO GenAI, in float32."""
    import numpy
    import openvino
    import openvino_genai

    if question["engine"] == "openvino":
        command = (str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "--trust-remote-code")
        options = ("--weight-format", "fp32", "--task", "text-generation-with-past", "--model", question["folder"])
        convert_by_command(*command, *options, str(scratch / "converted"))
    else:
        write_openvino_model(question["folder"], scratch / "converted")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    pipeline = openvino_genai.LLMPipeline(str(scratch / "converted"), "CPU", **settings)
    config = pipeline.get_generation_config()
    config.do_sample, config.logprobs = False, 1  # without the latter it states no score
    answer: dict[str, Any] = {"tokens": [], "logprobs": []}
    for row in question["prompts"]:
        sums, tokens = [0.0], []
        # It states the sum of the log-probabilities of a text, so texts of 1, 2, ... tokens give them one by one.
        for length in range(1, question["new_tokens"] + 1):
            config.max_new_tokens = length
            reply = pipeline.generate(openvino.Tensor(numpy.array([row], dtype=numpy.int64)), config)
            tokens = list(reply.tokens[0])
            sums.append(float(reply.scores[0]))
        answer["tokens"].append(tokens)
        answer["logprobs"].append([later - earlier for earlier, later in itertools.pairwise(sums)])
    return answer


def write_openvino_model(source: str, target: Path) -> None:
    """Convert a folder by OpenVINO's front end for PyTorch: a model that holds its KV cache, and the tokenizer.

    Every attention that is there has a state of its own number of KV groups; one that was removed has none.
    """
    import openvino
    import openvino_tokenizers
    import torch
    from openvino import opset13
    from openvino._offline_transformations import apply_make_stateful_transformation
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, dtype=torch.float32).eval()
    attentions = [layer.self_attn for layer in model.model.layers if hasattr(layer.self_attn, "k_proj")]
    dim = attentions[0].head_dim
    groups = [attention.k_proj.out_features // dim for attention in attentions]

    class TracedCache(DynamicCache):
        """Past and new keys and values as plain tensors, which the tracer sees joined."""

        def __init__(self, past: tuple[Any, ...]):
            super().__init__()
            self.states = list(past)

        def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            for index, new in ((2 * layer_idx, key_states), (2 * layer_idx + 1, value_states)):
                self.states[index] = torch.cat([self.states[index], new], 2)
            return self.states[2 * layer_idx], self.states[2 * layer_idx + 1]

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return int(self.states[0].shape[2])

    class Traced(torch.nn.Module):
        """The model with its cache among inputs and outputs, and a mask that does not depend on traced sizes."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *past: Any) -> Any:
            before, new = past[0].shape[2], input_ids.shape[1]
            causal = torch.arange(before + new)[None] <= torch.arange(new)[:, None] + before
            seen = causal[None, None] & (attention_mask[:, None, None] > 0)
            mask = torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, torch.finfo(torch.float32).min)
            cache = TracedCache(past)
            inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}
            logits = self.model(**inputs, past_key_values=cache, use_cache=True).logits
            return (logits, *cache.states)

    ids = torch.zeros(2, 3, dtype=torch.long)
    example = (ids, torch.ones(2, 5, dtype=torch.long), torch.arange(2, 5).expand(2, 3))
    states = [(f"{index}.{name}", count) for index, count in enumerate(groups) for name in ("key", "value")]
    with torch.no_grad():
        past = tuple(torch.randn(2, count, 2, dim) for _, count in states)
        converted = openvino.convert_model(Traced(), example_input=(*example, *past))
    for tensor, name in zip(converted.inputs, ("input_ids", "attention_mask", "position_ids"), strict=False):
        tensor.get_tensor().set_names({name})
        tensor.get_node().set_partial_shape(openvino.PartialShape([-1, -1]))
    converted.outputs[0].get_tensor().set_names({"logits"})
    # Which row goes on from which: engines with beams say so in an input of this name.
    beams = opset13.parameter(openvino.PartialShape([-1]), openvino.Type.i32, name="beam_idx")
    beams.output(0).get_tensor().set_names({"beam_idx"})
    pairs = {}
    for (name, count), old, new in zip(states, converted.inputs[3:], converted.outputs[1:], strict=True):
        old.get_tensor().set_names({f"past_key_values.{name}"})
        new.get_tensor().set_names({f"present.{name}"})
        old.get_node().set_partial_shape(openvino.PartialShape([-1, count, -1, dim]))
        readers = old.get_node().output(0).get_target_inputs()
        chosen = opset13.gather(old.get_node(), beams, opset13.constant(0))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
        pairs[f"past_key_values.{name}"] = f"present.{name}"
    converted.add_parameters([beams])
    converted.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(converted, pairs)
    rows = opset13.gather(
        opset13.shape_of(converted.input("input_ids"), "i64"), opset13.constant([0]), opset13.constant(0)
    )
    for state in converted.get_ops():
        if state.get_type_name() == "ReadValue":
            count = state.get_output_partial_shape(0)[1].get_length()
            shape = opset13.concat([rows, opset13.constant([count, 0, dim], dtype=openvino.Type.i64)], 0)
            state.set_arguments([opset13.broadcast(opset13.constant(0.0, dtype=openvino.Type.f32), shape)])
    converted.validate_nodes_and_infer_types()
    openvino.save_model(converted, target / "openvino_model.xml", compress_to_fp16=False)
    tokenizer = openvino_tokenizers.convert_tokenizer(
        AutoTokenizer.from_pretrained(source, trust_remote_code=True), with_detokenizer=True
    )
    for written, name in zip(tokenizer, ("tokenizer", "detokenizer"), strict=True):
        openvino.save_model(written, target / f"openvino_{name}.xml")


def ask_onnxruntime(question: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Convert with the model builder of ONNX Runtime GenAI, and answer with it."""
    import numpy
    import onnxruntime_genai

    builder = (sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", question["folder"])
    options = ("-p", "fp32", "-e", "cpu", "-c", str(scratch / "cache"), "--extra_options", "hf_remote=true")
    convert_by_command(*builder, "-o", str(scratch / "converted"), *options)
    model = onnxruntime_genai.Model(str(scratch / "converted"))
    answer: dict[str, Any] = {"tokens": [], "logprobs": []}
    for row in question["prompts"]:
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(row) + question["new_tokens"], do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(row)
        tokens, logprobs = [], []
        for _ in range(question["new_tokens"]):
            logits = numpy.array(generator.get_logits())
            logits = logits.reshape(-1, logits.shape[-1])[-1].astype(numpy.float64)
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
            logprobs.append(float(logits[tokens[-1]] - numpy.logaddexp.reduce(logits)))
        answer["tokens"].append(tokens)
        answer["logprobs"].append(logprobs)
    return answer


def ask_executorch(question: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Export with transformers' recipe, lower to XNNPACK and answer with ExecuTorch's runtime, token by token."""
    import torch
    from executorch.runtime import Runtime

    file = scratch / "model.pte"
    facts = {}
    with torch.no_grad():
        try:
            export_for_executorch(question, file, False)
        except Exception as error:  # noqa: BLE001  # the message is kept beside what the second way gives
            facts = {"message": shorten_message(f"{type(error).__name__}: {error}", Path(question["folder"]))}
            if not (Path(question["folder"]) / "modeling_pruned.py").is_file():
                return facts
            export_for_executorch(question, file, True)
            facts["by"] = CACHE_SHAPES
        answer: dict[str, Any] = {"tokens": [], "logprobs": [], **facts}
        for row in question["prompts"]:
            method = Runtime.get().load_program(file).load_method("forward")  # with an empty cache
            text, logprobs = list(row), []
            for position in range(len(row) + question["new_tokens"] - 1):
                logits = method.execute((torch.tensor([[text[position]]]), torch.tensor([position])))[0]
                if position >= len(row) - 1:
                    last = logits[0, -1].double().log_softmax(-1)
                    text.append(int(last.argmax()))
                    logprobs.append(float(last.max()))
            answer["tokens"].append(text[len(row) :])
            answer["logprobs"].append(logprobs)
    return answer


def export_for_executorch(question: dict[str, Any], file: Path, with_own_shapes: bool) -> None:
    """Write a program for ExecuTorch; `with_own_shapes` takes the shapes of the cache from the model's attentions."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.integrations import executorch as recipe

    room = len(question["prompts"][0]) + question["new_tokens"]
    model = AutoModelForCausalLM.from_pretrained(question["folder"], trust_remote_code=True, dtype=torch.float32)
    model.generation_config = GenerationConfig(cache_implementation="static", use_cache=True)
    if with_own_shapes:
        attentions = [layer.self_attn for layer in model.model.layers if hasattr(layer.self_attn, "k_proj")]
        shapes = {own.layer_idx: own.k_proj.out_features // own.head_dim for own in attentions}
        heads = [shapes.get(number, 1) for number in range(len(model.model.layers))]
        recipe.get_head_shapes = lambda config: (heads, attentions[0].head_dim)
    module = recipe.TorchExportableModuleForDecoderOnlyLM(model.eval(), batch_size=1, max_cache_len=room)
    exported = module.export(input_ids=torch.tensor([[0]]), cache_position=torch.arange(1), strict=True)
    program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    file.write_bytes(program.buffer)


def ask_sglang(question: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Answer with SGLang's engine from the folder as it is, without a GPU."""
    import os

    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    import sglang

    try:
        import sgl_kernel  # noqa: F401  # the engine imports it too, in a process whose messages are not seen here
    except ImportError as error:  # a page of text; the line that says why begins so
        reasons = re.findall(r"- (ImportError: .*)", str(error))
        raise Refused(f"sgl_kernel: {(reasons or [str(error)])[0]}") from None
    engine = sglang.Engine(
        model_path=question["folder"],
        device="cpu",
        dtype="float32",
        attention_backend="torch_native",
        trust_remote_code=True,
        skip_tokenizer_init=True,
        disable_radix_cache=True,
        max_total_tokens=256,
        log_level="error",
    )
    answer: dict[str, Any] = {"tokens": [], "logprobs": []}
    try:
        for row in question["prompts"]:
            settings = {"temperature": 0, "max_new_tokens": question["new_tokens"], "ignore_eos": True}
            reply = engine.generate(input_ids=row, sampling_params=settings, return_logprob=True)
            stated = reply["meta_info"]["output_token_logprobs"]
            answer["tokens"].append([int(token) for _, token, *_ in stated])
            answer["logprobs"].append([float(logprob) for logprob, *_ in stated])
    finally:
        engine.shutdown()
    return answer


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].endswith(".json"):
        asked, replied = sys.argv[1:]
        reply = answer_question(json.loads(Path(asked).read_text(encoding="utf-8")))
        Path(replied).write_text(json.dumps(reply), encoding="utf-8")
    else:
        main()
