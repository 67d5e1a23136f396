#!/usr/bin/env bash
# The tests for .ci/lowest and .ci/newest: one family of each kind through reading, cutting, writing and reading back,
# methods and recovery in a Trainer, and every place that calls a private name. $1: a Python; the rest goes to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
shift
"$python" - << 'EOF'
import importlib, pkgutil, sys
from prunelit.runtime.versions import collect_versions
import prunelit

print(", ".join(f"{name} {version}" for name, version in collect_versions("huggingface_hub", "jsonargparse").items()))
for module in pkgutil.walk_packages(prunelit.__path__, "prunelit."):
    if module.name not in ("prunelit.__main__", "prunelit.export.proof.vllm_script", "prunelit.evaluation.engines.vllm_script"):
        importlib.import_module(module.name)
EOF
OMP_NUM_THREADS=1 "$python" -m pytest -m "not slow" "$@" \
    tests/test_private_names.py \
    tests/runtime/test_versions.py \
    tests/core/test_architectures.py \
    tests/core/test_mixtures.py \
    tests/callbacks/test_contract.py \
    tests/data/test_offloaded.py \
    tests/data/test_offloaded_mixtures.py \
    tests/evaluation/test_speed.py \
    tests/export/test_write.py \
    tests/planning/test_latency.py \
    tests/pruning/test_attach.py \
    tests/recovery/test_module.py \
    -k "${ONLY:-llama or gpt2 or phi3 or mixtral or test_attach or test_module or private or versions or speed or latency}"
