#!/usr/bin/env bash
# Create an environment with one version of TensorFlow in .compatibility/VERSION, and run the tests in it.
#
#     bash tests/compatibility.sh VERSION [arguments of pytest]
#
# PYTHON sets the interpreter (default: python3). TensorFlow up to 2.15 needs Python 3.11 or older. The tests exchange
# models and checkpoints with the TensorFlow of the project's own environment (.venv, unless another one is active).
set -euo pipefail
if [ $# -lt 1 ]; then
    echo "usage: bash tests/compatibility.sh VERSION [arguments of pytest], for example 2.12.1" >&2
    exit 2
fi
version=$1
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. data/environment.sh requirements.txt
environment=.compatibility/$version
[ -x "$environment/bin/python" ] || "${PYTHON:-python3}" -m venv "$environment"
"$environment/bin/python" -m pip install --quiet --disable-pip-version-check "tensorflow==$version" -r requirements.txt -r tests/requirements.txt
export OTHER_PYTHON VIRTUAL_ENV=$PWD/$environment
OTHER_PYTHON=$(command -v python)
PATH=$VIRTUAL_ENV/bin:$PATH python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"
