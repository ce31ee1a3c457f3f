"""The power goes at any change of the disk: the device starts afterwards, answers, and goes on."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rollout_helpers import Device, publish
from runtime_helpers import encoder_bundle
from signature_helpers import make_keys

from edgetune.runtime import Runtime
from edgetune.runtime.signature.keys import read_private_key, read_public_key

TESTS = Path(__file__).parents[2]
LIFE = (
    "import sys; sys.path.insert(0, sys.argv[1]); from rollout_helpers import live_until_cut as l"
)


def live(*arguments: object) -> int:
    code = f"{LIFE}; l(*sys.argv[2:6], int(sys.argv[6]))"
    words = [sys.executable, "-c", code, str(TESTS), *map(str, arguments)]
    return subprocess.run(words, capture_output=True).returncode


@pytest.mark.parametrize(
    "cuts",
    [
        pytest.param(range(3, 100, 24), id="some"),
        pytest.param(range(1, 100), id="all", marks=pytest.mark.slow),
    ],
)
def test_no_power_cut_leaves_a_device_that_does_not_answer(
    tiny_encoder: Path, tmp_path: Path, cuts: range
) -> None:
    keys, bundle, place = make_keys(tmp_path), encoder_bundle(tiny_encoder), tmp_path / "source"
    adapter = bundle / "adapters" / "mood"
    publish(adapter, place, key=read_private_key(keys.private), version=2)
    killed = 0
    with Runtime.open(bundle, threads=1) as runtime:
        for at in cuts:
            disk = tmp_path / "disk"
            code = live(bundle, place, disk, keys.public, at)
            assert code in (0, -signal.SIGKILL)
            killed += code != 0
            device = Device(runtime, place, disk, signed_by=read_public_key(keys.public))
            assert device.answer() in ("mood", "mood@v2")
            device.rollout.step()
            device.serve(60)
            assert (device.answer(), device.rollout.state.phase) == ("mood@v2", "settled")
            shutil.rmtree(disk)
            if code == 0:  # the life has fewer changes
                break
    assert killed >= len(cuts) // 2
