# Sourced by run_example.sh and tests/run.sh. Makes `python` the one in an environment with the requirements.
# Usage, from the root of the repository: . data/environment.sh REQUIREMENTS_FILE...
if [ -z "${VIRTUAL_ENV:-}" ] && { [ -z "${CONDA_PREFIX:-}" ] || [ "${CONDA_DEFAULT_ENV:-base}" = base ]; }; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    . .venv/bin/activate
fi
for requirements in "$@"; do
    python -m pip install --quiet --disable-pip-version-check -r "$requirements"
done
