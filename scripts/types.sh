#!/usr/bin/env bash
# mypy, strict, on the core (src/winnow: errors, types, configuration, client, command); `scripts/types.sh all` reads the other
# parts too. Type checkers do not follow the import hook of an editable install, so the packages are put together as links in
# the layout an install would have.
set -euo pipefail
cd "$(dirname "$0")/.."
tree=.cache/typed
rm -rf "$tree"
mkdir -p "$tree/winnow"
for entry in src/winnow/*; do ln -s "$PWD/$entry" "$tree/winnow/"; done
for part in index workers services orchestration; do ln -s "$PWD/$part" "$tree/winnow/$part"; done
what=(-p winnow.cli -p winnow.orchestration.demo)
for file in src/winnow/*.py; do
  name=$(basename "$file" .py)
  what+=(-m "winnow${name:+.$name}")
done
what=("${what[@]/winnow.__init__/winnow}")
if [ "${1:-core}" = all ]; then what=(-p winnow); fi
# torch's own functions and packages without stubs are not ours to annotate; which ignores are needed depends on the stubs installed
MYPYPATH=$tree exec .venv/bin/python -m mypy --follow-imports=silent --untyped-calls-exclude torch \
  --disable-error-code import-untyped --no-warn-unused-ignores "${what[@]}"
