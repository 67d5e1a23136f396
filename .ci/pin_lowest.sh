#!/usr/bin/env bash
# Writes constraints-lowest.txt: the lowest versions that pyproject.toml allows of what prunelit itself asks for, and of
# the rest the newest that go with them. Needs uv, in the path or as $1.
set -euo pipefail
cd "$(dirname "$0")/.."
{
    echo "# The lowest versions that pyproject.toml allows, written by .ci/pin_lowest.sh; .ci/lowest installs with these."
    "${1:-uv}" pip compile --quiet --python-version 3.11 --resolution lowest-direct --no-annotate --no-header \
        pyproject.toml | grep -vE '^(nvidia-|cuda-|triton)'  # of torch's builds for GPUs; those for CPUs have none
    grep -E '^(gguf|hypothesis|pytest|pytest-timeout)==' constraints.txt  # what runs the tests
} > constraints-lowest.txt
