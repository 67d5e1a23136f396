#!/usr/bin/env bash
# Builds the source archive, the wheel from that archive, and uses the wheel as somebody would who has nothing else: a
# new environment, an empty folder, a tiny model that transformers makes. $1: a Python with `build`.
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
import sys, tarfile, zipfile
from pathlib import Path

root, dist = map(Path, sys.argv[1:])
(wheel,), (archive,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
wanted = {
    str(path.relative_to(root))
    for path in (root / "prunelit").rglob("*")
    if path.suffix in (".py", ".pyi", ".jinja") or path.name == "py.typed"
}
names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
if names != wanted:
    sys.exit(f"{wheel.name}: lacks {sorted(wanted - names)}, should not hold {sorted(names - wanted)}")
inside = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
rest = {"LICENSE", "README.md", "constraints.txt", "Makefile", ".ci/run"} | {
    str(path.relative_to(root))
    for folder in ("tests", "configs", "callbacks", "docs", "notebooks")
    for path in (root / folder).rglob("*")
    if path.suffix in (".py", ".md", ".yaml", ".ipynb") and not {"_build", "made"} & set(path.parts)
}
if lacks := sorted((wanted | rest) - inside):
    sys.exit(f"{archive.name}: lacks {lacks}")
EOF

"$python" -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt "$wheel"
say "installed into a new environment"

mkdir "$work/empty"
cd "$work/empty"
export PATH="$work/env/bin:$PATH" HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
python -c 'import prunelit, sys; sys.exit(not prunelit.__file__.startswith(sys.prefix) and prunelit.__file__)'
# Into a file first: grep -q ends at the first hit, which would break the pipe.
prunelit methods > "$work/methods"
grep -q '^ *llm_bip' "$work/methods"
say "prunelit methods"

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
cat > fit.yaml << 'EOF'
model: {model: tiny, lora_rank: 2}
data: {train: "builtin:python-docs", seqlen: 32, calibration_windows: 8, validation_windows: 4, train_windows: 32}
trainer:
  default_root_dir: run
  accelerator: cpu
  max_steps: 2
  val_check_interval: 1
  logger: false
  callbacks:
    - class_path: prunelit.callbacks.LLMBIP
      init_args: {ratio: 0.2, align: 8}
EOF
timeout 600 prunelit fit --config fit.yaml > "$work/fit.log" 2>&1 || { tail -n 30 "$work/fit.log" >&2; exit 1; }
for name in model/model.safetensors model/proof.json plan.json report.json report.html config.yaml; do
    test -s "run/$name" || { echo "check_wheel: fit left no run/$name" >&2; exit 1; }
done
python -c 'from transformers import AutoModelForCausalLM as M; M.from_pretrained("run/model")' 2> "$work/load.log" \
    || { cat "$work/load.log" >&2; exit 1; }
say "prunelit fit"
