#!/usr/bin/env bash
# All tests that need no GPU, with everything they need: .venv, the package, style and types. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3.11}
if [ ! -x .venv/bin/cuboid ] || ! .venv/bin/python -c 'import pytest, diffusers, scipy, pyarrow, google.cloud.storage, submitit' 2>/dev/null; then
    command -v "$PYTHON" >/dev/null || { echo "error: no $PYTHON; set PYTHON to a Python of version 3.11 or later" >&2; exit 2; }
    "$PYTHON" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
fi

export OMP_NUM_THREADS=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec .venv/bin/python -m pytest "$@"
