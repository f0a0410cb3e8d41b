#!/usr/bin/env bash
# Checks style and types and runs the tests, in .venv unless an environment is active already.
# Arguments go to pytest, for example: bash tests/run.sh -n 0 -k augment; --all adds interrupted runs and Slurm.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. data/environment.sh requirements.txt tests/requirements.txt
ruff check .
ruff format --check .
mypy
python -m numpydoc lint ./*.py
python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"
