"""A whole small study is killed at random points, again and again, until it ends; its results must be those of one that
ran through.

``make kill`` does that 200 times, the tests a few; the number of a study is its seed. Half of the kills come after a
random processor time, half just before a random operation on a file. Of four, two are SIGKILL, one SIGTERM and one
SIGINT, which must end with 143 and 130. A finding is another exit code, a value that differs, a file that is missing or
too many, a temporary file or a lock that is left, a folder of a process that still runs.

    python -m tests.e2e.kill 200 0     # kills, and the first seed

Each run is forked from a process that has imported everything and has run the study once; pictures are blank, since
drawing them takes nine tenths of the time and no value comes from them.
"""

from __future__ import annotations

import csv
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from mpqsearch import artifacts
from tests.e2e.forked import PRELOADED

STUDY = """
[model]
source = "tiny"
[policy]
widths = [2, 4, 8]
[quantizer]
n_candidates = 4
[sampler]
steps = 2
guidance = 1.0
batch = 2
[calibration]
samples = 2
probe_inputs = 2
probes = 1
sampler_seeds = 2
sampler_probes = 1
schemes = ["asymmetric"]
[allocate]
budgets = ["uniform:4"]
[[methods]]
name = "uniform"
allocator = "uniform"
[[methods]]
name = "ilp-channel"
allocator = "ilp-channel"
rounding = "gptq"
bias_correction = true
[search]
trials = 2
samples = 2
chunk = 1
final_samples = 2
[evaluate]
samples = 4
extractor = "random-conv"
[distill]
methods = ["ilp-channel"]
steps = 3
batch = 2
checkpoint_every = 1
[export]
targets = ["neutral"]
"""

CODES = {signal.SIGKILL: (-signal.SIGKILL, -signal.SIGPROF), signal.SIGTERM: (143,), signal.SIGINT: (130,)}
"""What a run ends with after a signal; a timer kills by SIGPROF, which nothing handles, in the place of SIGKILL."""

SHARE = 0.4
"""Kills come within this share of the time, or of the operations, of a whole run."""

OPERATIONS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
"""What Python audits before it does it, beside ``open`` for writing; ``os.rename`` is that of `os.replace`, too."""

HANGS_S = 900
"""Seconds after which a run is killed, however busy the machine is."""


def write_study(folder: Path) -> None:
    """The study with its model, a transformer of one block."""
    import torch
    from diffusers import DiTTransformer2DModel

    from tests.support.tiny import DDPM

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=8,
        in_channels=1,
        out_channels=1,
        num_layers=1,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=2,
        norm_num_groups=1,
    )
    model.save_pretrained(folder / "tiny", safe_serialization=True)
    (folder / "tiny" / "scheduler_config.json").write_text(json.dumps(DDPM))
    (folder / "study.toml").write_text(STUDY)


def blank_pictures() -> None:
    """From now on reports of this process have blank figures."""
    from matplotlib.figure import Figure

    from mpqsearch.report import figures, html

    def render(_draw: Callable[[], Any]) -> Figure:
        figure = Figure(figsize=(1, 1))
        figure.add_subplot().set_axis_off()
        return figure

    figures.render = html.render = render  # type: ignore[attr-defined]


def run(folder: Path, name: str, before: Callable[[], None] = lambda: None) -> tuple[int, float, str]:
    """The study in the run folder ``name``, in a process of its own: its exit code (minus the signal that killed it),
    its processor time and what it said."""
    said = folder / f"{name}.said"
    process = os.fork()
    if process == 0:
        _child(folder, name, said, before)
    _, status, usage = os.wait4(process, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, said.read_text(errors="replace")


def _child(folder: Path, name: str, said: Path, before: Callable[[], None]) -> None:
    code = 99
    try:
        os.chdir(folder)
        signal.alarm(HANGS_S)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell in the background ignores
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(descriptor, number)
        sys.argv = ["mpqsearch", "run", "study.toml", "--run-dir", name]
        from mpqsearch.cli.app import main

        before()
        main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 98
    finally:
        sys.stderr.flush()
        os._exit(code)


def after(seconds: float, number: signal.Signals) -> Callable[[], None]:
    """Send a signal to this process after so much of its own processor time."""

    def send(*_: Any) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.kill(os.getpid(), number)

    def begin() -> None:
        if number != signal.SIGKILL:
            signal.signal(signal.SIGPROF, send)
        signal.setitimer(signal.ITIMER_PROF, seconds)

    return begin


def counted(name: str, left: Any, number: signal.Signals) -> Callable[[], None]:
    """Send a signal to this process just before operation ``left.value`` on what is in the folder ``name``."""

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in OPERATIONS) and name in str(arguments[0]):
            left.value -= 1
            if left.value == 0:
                os.kill(os.getpid(), number)

    return lambda: sys.addaudithook(audit)


VARIES = {"seconds", "started", "ended", "worker", "memory_bytes", "identity", "digest", "files", "records", "search"}
VARIES |= {"number", "trial"}
"""Keys and columns that differ between any two runs: times, memory, names, and the digests of what holds these; and the
numbers of trials, of which a killed one has one, too."""


def _plain(value: Any) -> Any:
    """JSON, or a row of CSV, without what varies."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if k not in VARIES}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def values(folder: Path) -> dict[str, Any]:
    """What a run folder holds, by file: all that is compared."""
    found: dict[str, Any] = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = file.relative_to(folder).as_posix()
        if file.suffix == ".json":
            found[name] = _plain(json.loads(file.read_text()))
        elif file.suffix == ".jsonl":
            found[name] = [_plain(json.loads(line)) for line in file.read_text().splitlines()]
        elif file.suffix == ".npz":
            found[name] = {k: (a.dtype.str, a.shape, a.tobytes()) for k, a in artifacts.read_arrays(file).items()}
        elif file.suffix == ".safetensors":
            found[name] = {k: (a.dtype.str, a.shape, a.tobytes()) for k, a in load_file(file).items()}
        elif file.suffix == ".csv":
            rows = list(csv.DictReader(file.read_text().splitlines()))
            found[name] = [_plain(row) for row in rows if row.get("state") not in ("FAIL", "WAITING")]
        elif file.suffix == ".toml":
            found[name] = file.read_text()
        else:
            found[name] = file.stat().st_size > 0
    return found


def differences(found: Any, expected: Any, where: str = "") -> Iterator[str]:
    """The places where two values differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted({*found, *expected}):
            if key not in found or key not in expected:
                yield f"{where}/{key} is {'missing' if key not in found else 'too many'}"
            else:
                yield from differences(found[key], expected[key], f"{where}/{key}")
    elif found != expected:
        yield f"{where}: {str(found)[:80]} instead of {str(expected)[:80]}"


def study(folder: Path, seed: int, expected: dict[str, Any], whole: tuple[float, int]) -> tuple[int, list[str]]:
    """Kill one study until it ends: the number of kills, and what is wrong; ``whole`` is the time of a whole run and
    the number of its operations."""
    draw, name, kills = random.Random(seed), f"run-{seed}", 0
    wrong = []
    while True:
        number = draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        if draw.random() < 0.5:
            before = after(draw.uniform(0.001, SHARE * whole[0]), number)
        else:
            left = multiprocessing.Value("q", draw.randint(1, int(SHARE * whole[1])))
            before = counted(name, left, number)
        code, _, said = run(folder, name, before)
        if code == 0:
            break
        kills += 1
        if code not in CODES[number] or "Traceback" in said:
            wrong.append(f"study {seed}, kill {kills} by {number.name}: exit code {code}: {said[-300:]}")
        if code not in sum(CODES.values(), ()):
            break
    wrong += [f"study {seed}: {text}" for text in differences(values(folder / name), expected)]
    left = [
        p.name for p in (folder / name).rglob("*") if p.name.startswith(".") or ".lock" in p.name or ".tmp" in p.name
    ]
    return kills, wrong + [f"study {seed}: {name} is left" for name in left]


def kill(least: int, folder: Path, first: int = 0) -> tuple[int, list[str]]:
    """At least so many kills in ``folder``, of studies from the seed ``first`` on: their number, and the findings."""
    for module in PRELOADED:
        __import__(module)
    write_study(folder)
    blank_pictures()
    operations, kills, wrong = multiprocessing.Value("q", 0), 0, list[str]()
    code, seconds, said = run(folder, "whole", counted("whole", operations, signal.SIGKILL))
    assert code == 0, said
    expected = values(folder / "whole")
    for seed in itertools.count(first):
        if kills >= least:
            break
        more, found = study(folder, seed, expected, (seconds, -operations.value))
        kills, wrong = kills + more, wrong + found
        if not found:
            shutil.rmtree(folder / f"run-{seed}")
    return kills, wrong


def main(arguments: list[str]) -> None:
    """Print every finding; the exit code is 1 when there are any."""
    asked = [int(number) for number in arguments]
    with tempfile.TemporaryDirectory() as temporary:
        kills, wrong = kill(asked[0] if asked else 200, Path(temporary), *asked[1:2])
    print("\n".join(wrong))
    spent = sum(os.times()[:4])
    print(f"{kills} kills, {len(wrong)} findings, {spent:.0f} s of processor time")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main(sys.argv[1:])
