"""Malformed command lines and configs: one clear line that names the culprit, exit code 2, and nothing left behind.

A row is a command line, what its one line has to hold, and the YAML that `{yaml}` stands for. `{model}`, `{words}`,
`{out}` and the names of `things` stand for paths.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prunelit.cli.main import main
from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.model.decoder import Decoder
from tests.tiny import tiny, tiny_tokenizer

ROOT = Path(__file__).parents[1]
PRUNE = "prune --model {model} --text {words} --windows 8 --seqlen 16 --align 8 --ratio 0.3 --out {out}"
REPLAY = "prune --model {model} --out {out}"
PLAN = "plan --model {model} --text {words} --windows 8 --seqlen 16 --align 8 --ratio 0.3 --out {out}"
EVALUATE = "evaluate --model {model} --text {words} --seqlen 16 --windows 4 --json {out}"
EXPORT = "export --model {model} --out {out}"
FIT = (
    "fit --model {model} --data.train {words} --data.seqlen 16 --data.calibration_windows 4 --data.batch_size 2 "
    "--data.validation_windows 4 --trainer.default_root_dir {out} --trainer.accelerator cpu --trainer.logger false "
    "--trainer.max_steps 1 --trainer.enable_checkpointing false --config {yaml}"
)
COMPARE = "compare --model {model} --out {out} --config {yaml}"
TABLE = "methods: [magnitude]\nratios: [0.3]\ntexts: {t: {text: words.txt, seqlen: 16}}\n"

BOMB = "a0: &a0 x\n" + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(9))

Row = tuple[str, list[str]] | tuple[str, list[str], str]


def cuts(method: str, options: str) -> str:
    """YAML of a run with one callback."""
    return f"trainer: {{callbacks: [{{class_path: {method}, init_args: {{{options}}}}}]}}"


WORDS: list[Row] = [  # of the command line itself
    ("prun", ["'prun'", "did you mean 'prune'"]),
    ("--modle x", ["'--modle'", "expected one of"]),
    ("methods llm_bop", ["llm_bop", "did you mean 'llm_bip'"]),
    ("methods llm_bip flap", ["methods", "flap"]),
    ("prune", ["model"]),
    ("prune --model {model}", ["out"]),
    (PRUNE + " --method ../../x", ["../../x", "expected one of", "flap"]),
    ("plan --model {model} --ratio 0.2 --method ..", ["method '..'", "expected one of"]),
    (PRUNE + " --ratoi 0.2", ["--ratoi", "did you mean 'ratio'"]),
    (PRUNE + " stray", ["stray"]),
    (PRUNE + " --text", ["text"]),
    ("evaluate --modle x", ["--modle", "did you mean 'model'"]),
    ("export --model {model} --out {out} --fromat gguf", ["--fromat", "did you mean 'format'"]),
    ("compare --model {model} --out {out} --ratois [0.2]", ["--ratois", "did you mean 'ratios'"]),
    (PLAN + " --latencey true", ["--latencey", "did you mean 'latency'"]),
    ("plan show", ["plan show", "one plan file", "nothing"]),
    ("plan show a b", ["plan show", "one plan file", "a b"]),
    ("plan show nowhere.json", ["nowhere.json"]),
    ("plan diff {nonsense_plan}", ["plan diff", "two plan files"]),
    ("plan diff {nonsense_plan} {nonsense_plan}", ["nonsense"]),
    ("plan shwo x.json", ["shwo", "did you mean 'show'"]),
    ("fit --modle x", ["--modle", "did you mean 'model'"]),
    ("fit --model {model} --data.trian x", ["--data.trian", "did you mean 'data.train'"]),
    ("fit --model {model} --model.lora_rnk 4", ["--model.lora_rnk", "did you mean 'model.lora_rank'"]),
    ("fit --model {model} --trainer.max_stepz 4", ["--trainer.max_stepz", "did you mean 'trainer.max_steps'"]),
    ("fit --model {model} --report.fromat auto", ["--report.fromat", "did you mean 'report.format'"]),
    ("validate --model {model} --datas.train x", ["--datas.train", "did you mean 'data.train'"]),
    ("fit", ["model"]),
]

YAML: list[Row] = [
    ("fit --config nowhere.yaml", ["nowhere.yaml"]),
    ("fit --config {folder}", ["folder"]),
    ("fit --config {yaml}", ["yaml"], "model: [1, 2\ntrainer: }"),
    ("fit --config {yaml}", ["yaml"], "trainer:\n\tmax_steps: 3\n"),
    ("fit --config {yaml}", ["yaml"], "- model\n- data\n"),
    ("fit --config {yaml}", ["c.yaml", "empty file"], ""),
    ("fit --config {binary}", ["binary"]),
    *(
        (f"{command} --config {{yaml}}", ["c.yaml", "in line", said], content)
        for command in ("fit", "prune", "plan")
        for content, said in (
            (BOMB, "more than 100,000 of them, aliases included"),
            ("protect: &a [*a]\n", "an alias inside of what it stands for"),
            (f"protect: {'[' * 2000}{']' * 2000}\n", "more than 64 levels"),
        )
    ),
    ("fit --config {yaml}", ["model", "expected"], "model: [a, b]"),
    ("fit --config {yaml}", ["trainer"], "trainer: 5"),
    ("fit --config {yaml}", ["trainer.max_steps", "lots"], "trainer: {max_steps: lots}\nmodel: {model: x}"),
    ("fit --config {yaml}", ["modle", "did you mean 'model'"], "modle: {model: x}"),
    (FIT, ["max_stepz", "did you mean 'max_steps'"], "trainer: {max_stepz: 3}"),
    (FIT, ["trian", "did you mean 'train'"], "data: {trian: x}"),
    (FIT, ["lora_rnk", "did you mean 'lora_rank'"], "model: {lora_rnk: 4}"),
    (FIT, ["save_bse", "did you mean 'save_base'"], "report: {save_bse: false}"),
    (FIT, ["LLMBOP", "did you mean 'prunelit.callbacks.LLMBIP'"], cuts("prunelit.callbacks.LLMBOP", "ratio: 0.2")),
    (FIT, ["ModelCheckpiont", "did you mean 'ModelCheckpoint'"], cuts("ModelCheckpiont", "")),
    (FIT, ["ratoi", "did you mean 'ratio'"], cuts("prunelit.callbacks.LLMBIP", "ratoi: 0.2")),
    (FIT, ["ratio", "2.0"], cuts("prunelit.callbacks.LLMBIP", "ratio: 2.0")),
    (FIT, ["ratio", "lots"], cuts("prunelit.callbacks.LLMBIP", "ratio: lots")),
    (FIT, ["ratio"], cuts("prunelit.callbacks.LLMBIP", "")),
    (FIT, ["scope", "galaxy"], cuts("prunelit.callbacks.LLMBIP", "ratio: 0.2, scope: galaxy")),
    (FIT, ["class_pth"], "trainer: {callbacks: [{class_pth: prunelit.callbacks.LLMBIP}]}"),
    (FIT, ["CSVLoger", "did you mean 'CSVLogger'"], "trainer: {logger: {class_path: CSVLoger}}"),
    (FIT, ["CSVLoger", "did you mean 'CSVLogger'"], "trainer: {logger: CSVLoger}"),
    (FIT + " --trainer.logger CSVLoger", ["--trainer.logger", "did you mean 'CSVLogger'"], "{}"),
    (FIT, ["save_top_k", "-5"], cuts("ModelCheckpoint", "save_top_k: -5")),
    (FIT, ["ModelCheckpoint", "save_top_kk", "did you mean 'save_top_k'"], cuts("ModelCheckpoint", "save_top_kk: 1")),
    ("plan --config {yaml}", ["max_stepz", "did you mean 'max_steps'"], "trainer: {max_stepz: 3}\nmodel: {model: x}"),
    ("plan --config {yaml} --modle x", ["--modle", "did you mean 'model'"], "trainer: {max_steps: 3}"),
    ("plan --config {yaml}", ["./nowhere"], "model: {model: ./nowhere}\ntrainer: {max_steps: 3}"),
    ("fit --config {yaml}", ["model", "expected"], "model: SmolLM"),
    (FIT, ["no.such.Thing"], cuts("no.such.Thing", "")),
    ("prune --config nowhere.yaml", ["nowhere.yaml"]),
    ("prune --config {folder}", ["folder"]),
    ("prune --config {yaml}", ["yaml"], "model: [1, 2\nratio: }"),
    ("prune --config {yaml}", ["yaml"], "model:\n\tx: 3\n"),
    ("prune --config {yaml}", ["yaml"], "- model\n- ratio\n"),
    ("prune --config {yaml}", ["c.yaml", "empty file"], ""),
    ("prune --config {binary}", ["binary"]),
    ("prune --config {yaml}", ["modle", "did you mean 'model'"], "modle: x"),
    ("evaluate --config {yaml}", ["modle", "did you mean 'model'"], "modle: x"),
    ("export --config {yaml}", ["fromat", "did you mean 'format'"], "fromat: x"),
    ("compare --config {yaml}", ["ratois", "did you mean 'ratios'"], "ratois: [0.2]"),
    (PRUNE + " --config {yaml}", ["protect", "a whole number", "'a'"], "protect: [a]"),
    (
        "evaluate --model {model} --config {yaml}",
        ["reqlen", "did you mean 'seqlen'"],
        "texts: {t: {text: x, reqlen: 3}}",
    ),
    ("evaluate --model {model} --config {yaml}", ["texts.t", "expected"], "texts: {t: 3}"),
    ("evaluate --model {model} --config {yaml}", ["texts"], "texts: [a, b]"),
    ("evaluate --model {model} --config {yaml}", ["promt", "did you mean 'prompt'"], "speed: {promt: 3}"),
    (COMPARE, ["methods"], TABLE.replace("[magnitude]", "[]")),
    (COMPARE, ["magnitud", "did you mean 'magnitude'"], TABLE.replace("[magnitude]", "[magnitud]")),
    (COMPARE, ["'magnitude' twice"], TABLE.replace("[magnitude]", "[magnitude, magnitude]")),
    (COMPARE, ["ratios"], TABLE.replace("[0.3]", "[]")),
    (COMPARE, ["ratios", "0.3"], TABLE.replace("[0.3]", "[0.3, 0.3]")),
    (COMPARE, ["ratio", "1.5"], TABLE.replace("[0.3]", "[1.5]")),
    (COMPARE, ["allign", "did you mean 'align'"], TABLE + "options: {allign: 8}"),
    (COMPARE, ["lable", "did you mean 'label'"], TABLE.replace("[magnitude]", "[{method: flap, lable: x}]")),
    (COMPARE, ["sed", "did you mean 'seeds'"], TABLE + "sed: [0]"),
    (COMPARE, ["words.txt", "--data"], TABLE),
    (COMPARE, ["repeets", "did you mean 'repeats'"], TABLE + "latency: {repeets: 3}"),
    (COMPARE + " --only flop", ["flop", "magnitude"], TABLE),
]

VALUES: list[Row] = [
    *((f"{PRUNE} --ratio={ratio}", ["ratio", ratio]) for ratio in ("0", "1", "1.5", "-0.2", "nan", "inf", "lots")),
    (PRUNE + " --ratio 0.99", ["ratio 0.99", "at most"]),
    (PRUNE + " --windows=-3", ["windows", "-3"]),
    (PRUNE + " --windows 0", ["windows", "0"]),
    (PRUNE + " --windows 2.5", ["windows", "2.5"]),
    (PRUNE + " --seqlen 1", ["seqlen", "1"]),
    (PRUNE + " --seqlen 100000", ["at least one window of 100000 tokens"]),
    (PRUNE + " --align 0", ["align", "0"]),
    (PRUNE + " --protect [99]", ["protect", "99"]),
    (PRUNE + " --min_kept 2", ["min_kept", "2"]),
    (PRUNE + " --scope galaxy", ["scope", "galaxy"]),
    (PRUNE + " --scope globl", ["scope", "globl", "did you mean 'global'"]),
    (PRUNE + " --budget parameter", ["budget", "did you mean 'parameters'"]),
    (PRUNE + " --repair biass", ["repair", "did you mean 'bias'"]),
    (PRUNE + " --unit head", ["unit", "head"]),
    (PRUNE + " --method llm_bop", ["did you mean 'llm_bip'"]),
    (PRUNE + " --method no.such.Method", ["cannot be imported"]),
    (PRUNE + " --method pathlib.Path", ["pathlib.Path", "PruningCallback"]),
    (PRUNE + " --device toaster", ["toaster"]),
    (PRUNE + " --device cuda:x", ["cuda:x"]),
    (PRUNE + " --dtype float4", ["dtype", "float4"]),
    (PRUNE + " --dtype flot32", ["dtype", "did you mean 'float32'"]),
    (PRUNE + " --seed x", ["seed", "x"]),
    (PRUNE + " --overwrite maybe", ["overwrite", "maybe"]),
    (PRUNE + " --format gguff", ["gguff", "did you mean 'gguf'"]),
    (PRUNE + " --format int4", ["int4", "export"]),
    (PRUNE + " --format gguf --out {out}.gguf", ["expected a folder", "plan.json"]),
    (PRUNE + " --format padded --stream true", ["format 'padded'", "in memory"]),
    (PRUNE + " --stream true --memory_gib 0.0000001", ["memory_gib"]),
    (PRUNE + " --memory_gib 3", ["memory_gib", "--stream"]),
    (PRUNE + " --stream true --method taylor", ["stream", "leave out --stream"]),
    (PRUNE + " --max_shard_size big", ["max_shard_size", "big"]),
    (EXPORT + " --format gguff", ["gguff", "did you mean 'gguf'"]),
    (EXPORT + " --format gguf --type q9_9", ["q9_9"]),
    (EXPORT + " --format uniform --type f16", ["type", "f16"]),
    (EXPORT + " --group_size 7", ["group_size", "7"]),
    (EXPORT + " --adapter {folder}", ["adapter", "folder"]),
    (EXPORT + " --adapter nowhere", ["adapter", "nowhere"]),
    (EVALUATE + " --seqlen 1", ["seqlen", "1"]),
    (EVALUATE + " --windows 0", ["windows", "0"]),
    (EVALUATE + " --stride 99", ["stride", "99"]),
    ("evaluate --model {model} --tasks piqqa", ["piqqa", "did you mean 'piqa'"]),
    ("evaluate --model {model} --tasks piqa --tasks_folder {folder}", ["piqa", "folder"]),
    ("evaluate --model {model} --tasks piqa --limit 0 --tasks_folder {folder}", ["limit", "0"]),
    ("evaluate --model {model} --against nowhere/x/y --speed true", ["nowhere/x/y"]),
    (
        FIT + " --trainer.strategy ddp_spawn --trainer.devices 2",
        ["ddp_spawn", "ddp"],
        cuts("prunelit.callbacks.Magnitude", "ratio: 0.3"),
    ),
    (FIT + " --trainer.strategy ddpp", ["ddpp", "did you mean 'ddp'"], "{}"),
    (FIT + " --trainer.precision nonsense", ["precision", "nonsense"], "{}"),
    (FIT + " --trainer.accelerator toaster", ["toaster"], "{}"),
    (FIT + " --trainer.devices 0", ["devices"], "{}"),
    (FIT + " --trainer.max_steps lots", ["max_steps", "lots"], "{}"),
    (FIT + " --ckpt_path nowhere.ckpt", ["nowhere.ckpt"], "{}"),
    (FIT + " --ckpt_path {binary}", ["binary"], "{}"),
    (FIT + " --model.lora_rank=-1", ["lora_rank", "-1"], "{}"),
    (FIT + " --model.loss crossentropy", ["loss", "did you mean 'cross_entropy'"], "{}"),
    (FIT + " --model.base nf5", ["base", "did you mean 'nf4'"], "{}"),
    (FIT + " --model.optimizer adam", ["optimizer", "did you mean 'adamw'"], "{}"),
    (FIT + " --model.learning_rate=-1", ["learning_rate", "-1"], "{}"),
    (FIT + " --data.batch_size 0", ["batch_size", "0"], "{}"),
    (FIT + " --data.batch_size 4000", ["batch_size", "4000"], "{}"),
    (FIT + " --data.validation_windows 0", ["validation_windows", "0"], "{}"),
    (FIT + " --data.calibration_windows=-4", ["calibration_windows", "-4"], "{}"),
    (FIT + " --report.format gguff", ["gguff", "did you mean 'gguf'"], "{}"),
    (FIT + " --report.format int4", ["int4", "base"], "{}"),
    (FIT + " --seed_everything x", ["seed_everything", "x"], "{}"),
    (FIT + " --plan {nonsense_plan}", ["nonsense"], cuts("prunelit.callbacks.Magnitude", "ratio: 0.3")),
    (FIT + " --plan {other_plan}", ["2 layers", "3"], cuts("prunelit.callbacks.Magnitude", "ratio: 0.3")),
    (FIT + " --plan {other_plan}", ["plan", "one pruning callback", "got 0"], "{}"),
]

FILES: list[Row] = [
    *(
        (f"{command} --model {name}", [said] if name == "{nan}" else [name.strip("{}"), said])
        for command in (PRUNE, EVALUATE)
        for name, said in (
            ("./nowhere", "no such"),
            ("{folder}", "config.json"),
            ("{words}", "another file"),
            ("{no_json}", "config.json"),
            ("{empty_config}", "model_type"),
            ("{truncated}", "cannot be loaded"),
            ("{no_weights}", "cannot be loaded"),
            ("{no_tokenizer}", "tokenizer"),
            ("{nan}", "NaN"),
            ("{broken_gguf}", "GGUF"),
        )
    ),
    (PRUNE + " --model {odd_type}", ["odd_type", "'frobnicator'"]),
    (EVALUATE + " --model {odd_type}", ["odd_type", "'frobnicator'"]),
    (PRUNE + " --model {mpt}", ["'mpt'"]),
    (PRUNE + " --model org/name-that-is-nowhere", ["org/name-that-is-nowhere", "local folder", ".gguf", "pypi:"]),
    (PRUNE + " --model pypi:x", ["pypi:x", "pypi:NAME==VERSION"]),
    (PRUNE + " --model {near}", ["tiny-lama", "no such", "did you mean"]),
    (EXPORT + " --model {truncated}", ["truncated", "cannot be loaded"]),
    (EXPORT + " --model {nan}", ["NaN"]),
    (EVALUATE + " --against {truncated}", ["truncated"]),
    (FIT + " --model {truncated}", ["truncated"], "{}"),
    (FIT + " --model {no_tokenizer}", ["tokenizer"], "{}"),
    (FIT + " --model {nan}", ["NaN"], cuts("prunelit.callbacks.Magnitude", "ratio: 0.3")),
    (FIT + " --model ./nowhere", ["./nowhere"], "{}"),
    *(
        (f"{command} {option} {name}", [said] if "near" in name else [name.strip("{}"), said], "{}")
        for command, option in ((PRUNE, "--text"), (EVALUATE, "--text"), (FIT, "--data.train"))
        for name, said in (
            ("nowhere.parquet", "no such file"),
            ("{near_text}", "did you mean"),
            ("{folder}", "got a folder without"),
            ("{empty_txt}", "expected text"),
            ("{blank_txt}", "empty"),
            ("{short_txt}", "at least one window"),
            ("{no_column}", "expected a column"),
            ("{numbers}", "rows of text"),
            ("{broken_gz}", "cannot be read"),
            ("{broken_parquet}", "cannot be read"),
            ("{broken_jsonl}", "cannot be read"),
            ("{odd_pdf}", ".parquet"),
            ("builtin:poems", "builtin:python-docs"),
            ("org/text-that-is-nowhere", ".parquet"),
        )
    ),
    (PRUNE + " --plan_file nowhere.json", ["nowhere.json"]),
    (PRUNE + " --method flap --form exact", ["--form exact", "an option of prune or of method 'flap'"]),
    (
        "plan --config {yaml}",
        ["'form'", "an option of plan or of method 'flap'"],
        "model: x\nmethod: flap\nform: exact",
    ),
    ("prune --config {yaml}", ["protect: expected a list, as [0], got 0"], "model: x\nratio: 0.2\nprotect: 0"),
    (PRUNE + " --plan {other_plan}", ["plan: expected no options", "got align, ratio; the plan names these units"]),
    (REPLAY + " --plan {other_plan} --scope global --protect=0", ["got scope, protect;"]),
    (REPLAY + " --plan {other_plan} --method flap --metric IFV", ["got metric;"]),
    (REPLAY + " --plan {other_plan} --method llm_bip --form exact", ["got form;"]),
    (REPLAY + " --plan {other_plan} --method best --epochs 0 --scope layer", ["got scope;"]),
    (REPLAY + " --plan {other_plan}", ["2 layers", "3"]),
    (REPLAY + " --plan {nonsense_plan}", ["nonsense"]),
    (REPLAY + " --plan {list_plan}", ["list_plan"]),
    (REPLAY + " --plan {binary}", ["binary"]),
    (REPLAY + " --plan {folder}", ["folder"]),
    ("plan --model {model} --plan {other_plan}", ["num_hidden_layers", "2", "3"]),
    (PRUNE + " --out {words}", ["expected a folder, got a file"]),
    (PRUNE + " --out {words}/below", ["cannot be written", "is a file"]),
    (PRUNE + " --out {full}", ["full", "--overwrite"]),
    (PRUNE + " --out /proc/nowhere", ["/proc/nowhere", "cannot be written"]),
    (EXPORT + " --out {full}", ["full", "--overwrite"]),
    (EXPORT + " --out {words}", ["expected a folder, got a file"]),
    (EVALUATE + " --json {folder}", ["expected a file, got a folder"]),
    (EVALUATE + " --speed true --out {words}", ["expected a folder, got a file"]),
    (FIT + " --trainer.default_root_dir {words}", ["expected a folder, got a file"], "{}"),
    (FIT + " --trainer.default_root_dir /proc/nowhere", ["/proc/nowhere", "cannot be written"], "{}"),
    (COMPARE + " --out {words}", ["expected a folder, got a file"], TABLE.replace("words.txt", "builtin:python-docs")),
]
ROWS = [*WORDS, *YAML, *VALUES, *FILES]


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory, source: str) -> dict[str, str]:
    """Broken files and models, by the names that rows call them."""
    from transformers import MptConfig, MptForCausalLM

    root = tmp_path_factory.mktemp("things")
    tokenizer = tiny_tokenizer()
    words = " ".join(f"w{n * 7 % 101}" for n in range(3000))
    files: dict[str, tuple[str, str | bytes]] = {
        "words": ("words.txt", words),
        "empty_txt": ("empty_txt.txt", ""),
        "blank_txt": ("blank_txt.txt", " \n \n"),
        "short_txt": ("short_txt.txt", "one two"),
        "no_column": ("no_column.jsonl", '{"title": "x", "author": "y"}\n'),
        "numbers": ("numbers.jsonl", '{"text": 3}\n'),
        "broken_gz": ("broken_gz.txt.gz", b"\x1f\x8b\x08not gzip at all"),
        "broken_parquet": ("broken_parquet.parquet", b"PAR1 nothing"),
        "broken_jsonl": ("broken_jsonl.jsonl", '{"text": '),
        "odd_pdf": ("odd_pdf.pdf", "text\nx\n"),
        "binary": ("binary", bytes(range(256)) * 4),
        "broken_gguf": ("broken_gguf.gguf", b"GGUF" + bytes(40)),
        "nonsense_plan": ("nonsense_plan.json", '{"a": 1}'),
        "list_plan": ("list_plan.json", "[1, 2]"),
    }
    found = {}
    for name, (file, content) in files.items():
        (root / file).write_bytes(content.encode() if isinstance(content, str) else content)
        found[name] = str(root / file)
    for name in ("folder", "full", "no_json", "empty_config", "odd_type", "no_weights"):
        (root / name).mkdir()
        found[name] = str(root / name)
    (root / "full" / "thesis.txt").write_text("x")
    (root / "no_json" / "config.json").write_text("{")
    (root / "empty_config" / "config.json").write_text("{}")
    (root / "odd_type" / "config.json").write_text('{"model_type": "frobnicator"}')
    for name in ("truncated", "no_tokenizer", "nan", "mpt"):
        found[name] = str(root / name)
        model: Any = tiny("llama", vocab_size=len(tokenizer))
        if name == "nan":
            model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
        if name == "mpt":
            sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 32}
            model = MptForCausalLM(MptConfig(**sizes, vocab_size=len(tokenizer)))
        model.save_pretrained(root / name)
        if name != "no_tokenizer":
            tokenizer.save_pretrained(root / name)
    weights = root / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (root / "no_weights" / "config.json").write_text((root / "truncated" / "config.json").read_text())
    tokenizer.save_pretrained(root / "no_weights")
    shape = Decoder(tiny("llama", vocab_size=len(tokenizer), num_hidden_layers=2)).shape
    PruningPlan("random", shape, tuple(LayerPlan.dense(layer) for layer in shape.layers)).save(root / "other_plan.json")
    found["other_plan"] = str(root / "other_plan.json")
    found["near"] = str(Path(source).with_name("tiny-lama"))
    found["near_text"] = str(root / "wrods.txt")
    return found


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prunelit", *arguments])  # Lightning reads it, as from a shell
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, capsys.readouterr().err


def check(code: int, err: str, wanted: list[str]) -> None:
    # Which column of a text is read, and that the built-in text was taken, is said before.
    lines = [line for line in err.splitlines() if line.strip() and not line.startswith("text '")]
    assert code == 2, (code, err)
    assert len(lines) == 1, err
    assert lines[0].startswith("prunelit: error: ")
    assert [word for word in wanted if word not in lines[0]] == [], lines[0]


# What it was told to run, and what it measured before it met the error.
_OF_FIT = {"out", *(f"out/{name}" for name in ("config.yaml", "report.json", "report.html", "record.json"))}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].split()[0] if row else "")
def test_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    things: dict[str, str],
    tmp_path: Path,
    row: Row,
) -> None:
    command, wanted, content = row if len(row) == 3 else (*row, "")
    (tmp_path / "c.yaml").write_text(content)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    named = {"model": source, "out": str(tmp_path / "out"), "yaml": str(tmp_path / "c.yaml"), **things}
    before = sorted(Path(things["words"]).parent.rglob("*"))
    code, err = run([word.format(**named) for word in command.split()], capsys)
    check(code, err, wanted)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} - {"c.yaml", "work"}
    assert left <= (_OF_FIT if command.startswith("fit") else set()), left
    assert sorted(Path(things["words"]).parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("prune --model ./nowhere --ratio 0.2 --out x", ["./nowhere"]),
        ("fit --modle x", ["--modle"]),
        ("methods llm_bop", ["llm_bip"]),
    ],
)
def test_from_the_shell(tmp_path: Path, command: str, wanted: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prunelit", *command.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    check(done.returncode, done.stderr, wanted)
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_there_are_a_hundred() -> None:
    assert len(ROWS) >= 100
