#!/usr/bin/env bash
# Check style and types and run the tests, in .venv unless another environment is active.
# Arguments go to pytest, for example: bash tests/run.sh -n 0 -k augment
# --all adds the tests of interrupted runs, full disks and Slurm.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. data/environment.sh requirements.txt tests/requirements.txt
ruff check .
ruff format --check .
mypy
python -m numpydoc lint ./*.py
python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"
