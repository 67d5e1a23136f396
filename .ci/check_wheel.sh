#!/usr/bin/env bash
# Builds the source archive, the wheel from that archive, and uses the wheel as somebody would who has nothing else: a
# new environment, an empty folder, configs by their names, a tiny model that transformers makes. $1: a Python with `build`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${1:-.venv/bin/python}")
case $python in /*) ;; *) python=$PWD/$python ;; esac
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
say() { echo "check_wheel: $* (${SECONDS} s)"; }

"$python" -m build --outdir "$work/dist" . > "$work/build.log" 2>&1 || { tail -n 30 "$work/build.log" >&2; exit 1; }
wheel=$(ls "$work"/dist/*.whl)
say "built $(cd "$work/dist" && echo *)"

"$python" - "$root" "$work/dist" << 'EOF'
import re, sys, tarfile, zipfile
from pathlib import Path

root, dist = map(Path, sys.argv[1:])
(wheel,), (archive,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
wanted = {
    str(path.relative_to(root))
    for path in (root / "prunelit").rglob("*")
    if path.suffix in (".py", ".pyi", ".jinja") or path.name == "py.typed"
}
shipped = {
    str(path.relative_to(root))
    for folder in ("configs", "callbacks")
    for path in (root / folder).rglob("*")
    if path.suffix in (".yaml", ".md", ".py")
}
with zipfile.ZipFile(wheel) as files:
    names = {name for name in files.namelist() if ".dist-info/" not in name}
    (metadata,) = (files.read(name).decode() for name in files.namelist() if name.endswith(".dist-info/METADATA"))
expected = wanted | {f"prunelit/shipped/{name}" for name in shipped}
if names != expected:
    sys.exit(f"{wheel.name}: lacks {sorted(expected - names)}, should not hold {sorted(names - expected)}")
if links := re.findall(r"\]\((?!https?:|#)[^)]*\)", metadata.partition("\n\n")[2]):
    sys.exit(f"{wheel.name}: the page on the package index would have links that lead nowhere: {links}")
inside = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
rest = {"LICENSE", "README.md", "constraints.txt", "Makefile", ".ci/run"} | {
    str(path.relative_to(root))
    for folder in ("tests", "docs", "notebooks")
    for path in (root / folder).rglob("*")
    if path.suffix in (".py", ".md", ".yaml", ".ipynb") and not {"_build", "made"} & set(path.parts)
}
if lacks := sorted((wanted | shipped | rest) - inside):
    sys.exit(f"{archive.name}: lacks {lacks}")
EOF

# What a base install has, and no more: the wheel, what it requires without extras, as links to what is installed here,
# and no pip, as in the environments that uv makes.
"$python" -m venv --without-pip "$work/env"
"$python" -m pip --python "$work/env/bin/python" install --quiet --disable-pip-version-check --no-deps "$wheel"
"$python" - "$("$work/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" << 'EOF'
import sys
from importlib.metadata import distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement

folder = Path(sys.argv[1])
(wheel,) = distributions(name="prunelit", path=[str(folder)])
asked = [(Requirement(line), "") for line in wheel.requires or ()]
seen = set()
while asked:
    requirement, outer = asked.pop()
    if requirement.marker and not requirement.marker.evaluate({"extra": outer}):
        continue
    found = distribution(requirement.name)
    for extra in {"", *requirement.extras} - {extra for name, extra in seen if name == found.name}:
        seen.add((found.name, extra))
        asked += [(Requirement(line), extra) for line in found.requires or ()]
    for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
        if not (folder / top).exists():
            (folder / top).symlink_to(Path(found.locate_file(top)).resolve())
EOF
say "installed into a new environment, without extras and without pip"

mkdir "$work/empty"
cd "$work/empty"
export PATH="$work/env/bin:$PATH" HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
python -c 'import prunelit, sys; sys.exit(not prunelit.__file__.startswith(sys.prefix) and prunelit.__file__)'
# Into a file first: grep -q ends at the first hit, which would break the pipe.
prunelit methods > "$work/methods"
grep -q '^ *llm_bip' "$work/methods"
if prunelit fit --config quikstart 2> "$work/refused"; then echo "check_wheel: a misspelt name was taken" >&2; exit 1; fi
grep -q "did you mean 'quickstart'" "$work/refused"
prunelit init copied > "$work/copied"
test -s copied/configs/quickstart.yaml
test -s copied/callbacks/llm_bip.yaml
prunelit fit --config configs/recover-lora.yaml --config callbacks/flap --print_config > "$work/config"
grep -q 'prunelit.callbacks.FLAP' "$work/config"
python -c 'import gguf'  # the quickstart's model may come as a GGUF file
say "prunelit methods, init, and configs by name"

python - << 'EOF'
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

entries = ["<pad>", "<s>", "</s>", "<unk>", *(c for c in map(chr, range(32, 127)) if not c.isupper()), "\n"]
core = Tokenizer(models.WordLevel({entry: number for number, entry in enumerate(entries)}, unk_token="<unk>"))
core.normalizer = normalizers.Lowercase()
core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
core.decoder = decoders.Fuse()
special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained("tiny")
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
ids = {"vocab_size": len(entries), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
config = LlamaConfig(**sizes, **ids, num_key_value_heads=2, max_position_embeddings=64)
LlamaForCausalLM(config).save_pretrained("tiny")
EOF
timeout 600 prunelit fit --config quickstart --model tiny --model.lora_rank 2 --data.seqlen 32 --data.train_windows 32 \
    --data.calibration_windows 8 --data.validation_windows 4 --trainer.default_root_dir run --trainer.accelerator cpu \
    --trainer.max_steps 2 --trainer.val_check_interval 1 --trainer.logger false --trainer.callbacks.align 8 \
    > "$work/fit.log" 2>&1 || { tail -n 30 "$work/fit.log" >&2; exit 1; }
for name in model/model.safetensors model/proof.json plan.json report.json report.html config.yaml; do
    test -s "run/$name" || { echo "check_wheel: fit left no run/$name" >&2; exit 1; }
done
python -c 'from transformers import AutoModelForCausalLM as M; M.from_pretrained("run/model")' 2> "$work/load.log" \
    || { cat "$work/load.log" >&2; exit 1; }
say "prunelit fit --config quickstart"
