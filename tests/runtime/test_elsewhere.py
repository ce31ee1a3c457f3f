"""A system that is not Linux: no /proc, no /sys, no affinity, no sysconf, no advice on pages."""

from __future__ import annotations

from pathlib import Path

import pytest
from process_helpers import python
from runtime_helpers import decoder_bundle, encoder_bundle

ELSEWHERE = """
import errno, mmap, os, sys

def hidden(path):
    return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(("/proc", "/sys"))

def no_file(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and hidden(arguments[0]):
        raise FileNotFoundError(errno.ENOENT, "hidden", arguments[0])

def stat(path, *rest, real=os.stat, **named):
    if hidden(path):
        raise FileNotFoundError(errno.ENOENT, "hidden", path)
    return real(path, *rest, **named)

sys.addaudithook(no_file)
os.stat = stat
for name in ("sched_getaffinity", "sched_setaffinity", "sysconf"):
    delattr(os, name)
for name in [name for name in vars(mmap) if name.startswith(("MADV_", "MAP_"))]:
    delattr(mmap, name)
"""


@pytest.mark.parametrize("engine", ["onnxruntime", "auto"])
def test_a_decoder_answers_elsewhere(tiny_decoder: Path, engine: str) -> None:
    bundle = decoder_bundle(tiny_decoder)
    code = f"""
from edgetune.runtime import Runtime
from edgetune.runtime.scheduler.scheduler import Scheduler
with Runtime.open({str(bundle)!r}, engine={engine!r}) as rt:
    (answer,) = rt.generate(["hello"], max_new_tokens=4)
    with Scheduler(rt) as scheduler:
        pass
print(answer.completion_tokens)
"""
    here, elsewhere = python(code), python(ELSEWHERE + code)
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert elsewhere.stdout == here.stdout


def test_what_a_machine_does_not_say_is_none_or_counted_otherwise(tiny_encoder: Path) -> None:
    done = python(
        f"""{ELSEWHERE}
from edgetune.core.memory import peak_rss_mb, reset_peak_rss
from edgetune.devices import load_device, probe_host
from edgetune.devices.paging import large_page_bytes, use_large_pages
from edgetune.runtime import Runtime
from edgetune.runtime.check.machine import Conditions, EnergyMeter, Yardstick, conditions
from edgetune.runtime.server.http.metrics import resident_bytes
reset_peak_rss()
assert peak_rss_mb() > 0 and resident_bytes() > 0
host = probe_host()
assert host["cores"] >= 1 and host["memory_mb"] is None and load_device("host").threads >= 1
assert large_page_bytes() is None and use_large_pages() is None
assert EnergyMeter().joules() is None
yardstick = Yardstick(1)
found = conditions(yardstick)
yardstick.close()
assert (found.clock_mhz, found.throttled, found.celsius) == (None, None, None)
with Runtime.open({str(encoder_bundle(tiny_encoder))!r}) as rt:
    assert rt.embed(["hello"]).shape[0] == 1
"""
    )
    assert done.returncode == 0, done.stderr
