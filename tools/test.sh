#!/usr/bin/env bash
# All tests that need no GPU, with everything they need: .venv, the package, style and types. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3.11}
if [ ! -x .venv/bin/cuboid ] || ! .venv/bin/python -c 'import pytest, xdist, diffusers, scipy, pyarrow, google.cloud.storage, submitit' 2>/dev/null; then
    command -v "$PYTHON" >/dev/null || { echo "error: no $PYTHON; set PYTHON to a Python of version 3.11 or later" >&2; exit 2; }
    "$PYTHON" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
fi

export OMP_NUM_THREADS=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
if [ $# -gt 0 ]; then
    exec .venv/bin/python -m pytest "$@"
fi
# Every test is in one of the two: those that may share the machine, two at a time, and then those that must be alone.
status=0
.venv/bin/python -m pytest -m "not alone" -n 2 --dist loadfile tests/unit || status=$?
.venv/bin/python -m pytest -m alone || status=$?
exit "$status"
