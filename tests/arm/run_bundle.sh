#!/usr/bin/env bash
# A decoder's bundle by the native engine on Arm, from another processor: an arm64 Debian root out of
# packages, in it this repository's wheel for aarch64 under qemu, and its answers token for token
# beside this machine's.
#
#   tests/arm/run_bundle.sh BUNDLE ADAPTER FOLDER     FOLDER: for the root, about 400 MB, kept
#
# Nothing outside of FOLDER is changed. On Debian: apt install g++-aarch64-linux-gnu qemu-user.
# PYTHON: one that has edgetune and pip (default: .venv's); MIRROR: of Debian 12; NEW: tokens of an
# answer (default 16). ONNX Runtime 1.32 crashes under qemu 7.2, so it is not asked.
set -euo pipefail
here=$(cd "$(dirname "$0")/../.." && pwd)
bundle=$(realpath "$1") adapter=$2 folder=$(realpath -m "$3")
python=${PYTHON:-$here/.venv/bin/python}
mirror=${MIRROR:-http://deb.debian.org/debian}
root=$folder/root site=$folder/root/site
tag=311
export NEW=${NEW:-16}

if [ ! -e "$folder/whole" ]; then
    rm -rf "$root" "$folder/apt" "$folder/wheels"
    mkdir -p "$site" "$folder/wheels" "$folder"/apt/{state/lists/partial,cache/archives/partial}
    cd "$folder/apt"
    echo "deb [arch=arm64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror bookworm main" >sources.list
    : >status
    options=(-o "Dir::State=$PWD/state" -o "Dir::Cache=$PWD/cache" -o "Dir::State::status=$PWD/status"
        -o "Dir::Etc::sourcelist=$PWD/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o APT::Architecture=arm64 -o APT::Architectures::=arm64)
    apt-get "${options[@]}" update -qq
    apt-get "${options[@]}" install -y -qq --no-install-recommends --download-only \
        python3.11-minimal libpython3.11-stdlib libstdc++6 libgomp1 zlib1g
    for package in cache/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
    cd "$here"
    "$python" -m pip download -q --only-binary=:all: --python-version $tag --implementation cp \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
        --platform manylinux2014_aarch64 --platform manylinux_2_17_aarch64 \
        -d "$folder/wheels" numpy onnxruntime safetensors tokenizers jinja2 click
    EDGETUNE_NATIVE=required CXX=aarch64-linux-gnu-g++ _PYTHON_HOST_PLATFORM=linux-aarch64 \
        "$python" -m pip wheel -q . --no-deps -w "$folder/wheels"
    for wheel in "$folder"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$site"; done
    touch "$folder/whole"
fi

cat >"$folder/ask.py" <<'ASK'
import json, os, platform, sys
from edgetune.runtime import Runtime

bundle, adapter, out = sys.argv[1:]
answers = {}
with Runtime.open(bundle, engine="native", threads=1) as runtime:
    prompts = ["turn on the kitchen light", "close the window", "21 degrees in the hallway"]
    for name in (adapter, None):
        found = runtime.generate(prompts, adapters=[name] * 3, max_new_tokens=int(os.environ["NEW"]))
        answers[str(name)] = [one.token_ids for one in found]
json.dump(answers, open(out, "w"))
print(platform.machine(), {name: sum(map(len, rows)) for name, rows in answers.items()})
ASK

PYTHONPATH=$here "$python" "$folder/ask.py" "$bundle" "$adapter" "$folder/here.json"
QEMU_LD_PREFIX=$root PYTHONPATH=$site PYTHONHOME=$root/usr qemu-aarch64 -cpu "${CPU:-cortex-a76}" \
    "$root/usr/bin/python3.11" "$folder/ask.py" "$bundle" "$adapter" "$folder/arm.json"
"$python" - "$folder/here.json" "$folder/arm.json" <<'COMPARE'
import json, sys

here, arm = (json.load(open(path)) for path in sys.argv[1:])
rows = [(name, a, b) for name in here for a, b in zip(here[name], arm[name], strict=True)]
wrong = [name for name, a, b in rows if a != b]
print(f"{len(rows) - len(wrong)} of {len(rows)} answers are the same on arm64, token for token")
sys.exit(f"different: {', '.join(wrong)}" if wrong else 0)
COMPARE
