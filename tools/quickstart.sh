#!/usr/bin/env bash
# From a fresh clone to a sampled video: .venv, install, shards from a real clip, train on 2 ranks, stop, resume, sample.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3.11}
if [ ! -x .venv/bin/cuboid ]; then
    command -v "$PYTHON" >/dev/null || { echo "error: no $PYTHON; set PYTHON to a Python of version 3.11 or later" >&2; exit 2; }
    "$PYTHON" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable .
fi
cuboid=.venv/bin/cuboid
data=data/bigbuckbunny
run=runs/quickstart

say() { printf '\n== %s\n' "$*"; }

say "1. mp4 files and captions -> shards of videos -> shards of latents"
$cuboid prepare tests/assets --captions tests/assets/captions.jsonl --out $data/videos
$cuboid encode recipes/quickstart.yaml --videos $data/videos --out $data/latents

say "2. train on 2 ranks, and stop it on the way, as a cluster would"
$cuboid train recipes/quickstart.yaml run=$run &
train=$!
trap 'kill $train 2>/dev/null || true' EXIT
while kill -0 $train 2>/dev/null && ! grep -q '"step": 60,' $run/metrics.jsonl 2>/dev/null; do sleep 0.2; done
kill -TERM $train 2>/dev/null || true
wait $train || true
trap - EXIT

say "3. the same command resumes"
$cuboid train recipes/quickstart.yaml run=$run

say "4. sample"
caption="A big grey rabbit crawls out of its burrow, stands up on the green meadow and stretches its arms."
$cuboid sample $run --prompt "$caption" --out $run/samples/quickstart.mp4 --seed 1
ls -l $run/samples/*.mp4
