#!/usr/bin/env bash
# Makes .venv with winnow in it. Needs bash and Python 3.11 or newer; whatever else is missing is said in one line with the remedy.
#   scripts/setup.sh [demo|dev]      demo = what `make demo` needs (default); dev = tests and checks too
# Environment: PYTHON = interpreter to use (default python3); pip's own variables (index, proxy) are honoured.
# Running it again costs nothing until pyproject.toml changes.
set -euo pipefail
cd "$(dirname "$0")/.."

profile=${1:-demo}
case $profile in
  demo) extras='demo,batch' ;;
  dev) extras='dev' ;;
  *) echo "setup: unknown profile '$profile' (demo or dev)" >&2; exit 2 ;;
esac

torch_version=2.13.0 # the version winnow is measured with; any torch >= 2.11 already in .venv is kept
venv=.venv
py=$venv/bin/python
log=$venv/setup.log
child=

fail() { echo "setup: $1" >&2; exit 1; }
trap '[ -z "$child" ] || kill "$child" 2>/dev/null || true' INT TERM EXIT

hash=$(cksum pyproject.toml scripts/setup.sh | cksum | cut -d' ' -f1)
for done_profile in "$profile" dev; do # a dev environment serves the demo too
  if [ -e "$venv/.ready-$done_profile-$hash" ] && "$py" -c '' 2>/dev/null; then exit 0; fi
done

# --- what the machine must have ---
python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "no $python: install Python 3.11 or newer (Debian/Ubuntu: apt install python3 python3-venv), or set PYTHON"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$python is Python $version: winnow needs 3.11 or newer; set PYTHON to a newer interpreter"
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
  fail "Python $version cannot make virtual environments: apt install python3-venv (or python$version-venv)"
need_mb=4000
gpu=no
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then gpu=yes; need_mb=9000; fi
if [ ! -e "$venv/.torch" ]; then
  free_mb=$(df -Pm . | awk 'NR==2 {print $4}')
  [ "$free_mb" -ge "$need_mb" ] || fail "only $free_mb MB free in this folder: winnow with torch needs about $need_mb MB; free some space"
fi

# step TEXT COMMAND...: runs a program (not a function: it is killed by its id) with its output in the log; on a terminal shows the seconds and the download under way.
step() {
  local text=$1 status=0 started=$SECONDS line columns
  shift
  "$@" </dev/null >>"$log" 2>&1 &
  child=$!
  if [ -t 1 ]; then
    while kill -0 "$child" 2>/dev/null; do
      line=$(tail -c 4000 "$log" | awk '
        /^ *Downloading / {name=$2; sub(/.*\//, "", name); pct=""}
        /^Progress / && $4 > 0 {pct=sprintf(" %3d%% of %d MB", 100*$2/$4, $4/1e6)}
        END {printf "%.30s%s", name, pct}')
      columns=$(tput cols 2>/dev/null || echo 80)
      line=$(printf '  %s  %d s  %s' "$text" $((SECONDS - started)) "$line")
      printf '\r\033[K%s' "${line:0:columns-1}" # a longer one would wrap and could not be overwritten
      sleep 0.5
    done
    printf '\r\033[K'
  fi
  wait "$child" || status=$?
  child=
  if [ $status -eq 0 ]; then echo "  $text  ($((SECONDS - started)) s)"; fi
  return $status
}

pip=("$py" -m pip --disable-pip-version-check --no-input)
install=("${pip[@]}" install --progress-bar raw)

# True when the torch that pip would take is built for CPU: it needs no NVIDIA package here. Reads metadata only.
torch_is_cpu() {
  "${pip[@]}" install --dry-run --no-deps --ignore-installed --quiet --retries 0 --report "$venv/torch.json" "torch==$torch_version" || return 1
  "$py" - "$venv/torch.json" <<'PY'
import json, sys
from pip._vendor.packaging.requirements import Requirement

needs = json.load(open(sys.argv[1]))["install"][0]["metadata"].get("requires_dist", [])
parsed = [Requirement(text) for text in needs]
cuda = [r.name for r in parsed if r.name.startswith(("nvidia", "cuda")) and (r.marker is None or r.marker.evaluate({"extra": ""}))]
sys.exit(bool(cuda))
PY
}

have_torch() { "$py" -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' 2>/dev/null; }

install_torch() {
  local cpu_index=https://download.pytorch.org/whl/cpu
  if have_torch; then return 0; fi
  if [ "$gpu" = yes ]; then step "torch for the GPU of this machine" "${install[@]}" "torch>=2.11"; return; fi
  step "torch $torch_version, CPU build" "${install[@]}" --retries 0 --timeout 15 "torch==$torch_version+cpu" && return 0
  if torch_is_cpu >>"$log" 2>&1; then step "torch $torch_version" "${install[@]}" "torch==$torch_version" && return 0; fi
  step "torch $torch_version, CPU build from PyTorch" "${install[@]}" --retries 0 --timeout 15 --index-url "$cpu_index" "torch==$torch_version" && return 0
  echo "  no CPU build of torch within reach: taking the default one, which brings CUDA libraries (about 5 GB)"
  step "torch, default build" "${install[@]}" "torch>=2.11"
}

echo "setting up winnow in $venv (details in $log)"
if ! "$py" -c 'import pip' 2>/dev/null; then
  rm -rf "$venv"
  "$python" -m venv "$venv" || fail "could not make $venv with $python"
fi
: >"$log"
offline="cannot install packages: see $log; check the network, or point pip at an index you can reach (PIP_INDEX_URL, HTTPS_PROXY)"
step "pip and setuptools" "${pip[@]}" install --upgrade --retries 1 --timeout 20 "pip>=24.1" "setuptools>=77" || fail "$offline"
install_torch || fail "$offline"
touch "$venv/.torch"
step "winnow and its libraries ($extras)" "${install[@]}" --editable ".[$extras]" || fail "$offline"
"$py" -c 'import torch, winnow' 2>>"$log" || fail "installed, but torch or winnow cannot be imported: see $log"
rm -f "$venv"/.ready-*
touch "$venv/.ready-$profile-$hash"
