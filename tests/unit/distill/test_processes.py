"""Two processes on CPUs: gradients are averaged, students stay equal, one process writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = """
import copy, sys
from pathlib import Path
import torch
from mpqsearch.distill import DistillSpec, TRDSpec, Trajectories, distill, processes
from tests.support import tiny_denoiser

team = processes()
denoiser = tiny_denoiser("unet", steps=4)
student = copy.deepcopy(denoiser.module).requires_grad_(True)
with torch.no_grad():
    for p in student.parameters():
        p.mul_(1.2)
groups = [{"params": list(student.parameters()), "lr": 1e-3}]
batch = int(sys.argv[2])
source = Trajectories(denoiser, batch=batch, rank=team.rank, world=team.world)
spec = DistillSpec(steps=3, relation=TRDSpec(pooled_size=4), checkpoint_every=2, clip_norm=0.0)
folder = Path(sys.argv[1])
losses = [s.loss for s in distill(student, groups, source, spec, folder=folder, processes=team)]
torch.save({"losses": losses, "weights": dict(student.named_parameters())},
           folder / f"rank{team.rank}-of-{team.world}.pt")
"""


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path: Path) -> None:
    import torch

    pytest.importorskip("accelerate")
    (tmp_path / "train.py").write_text(SCRIPT)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command in ([*launch, "train.py", "two", "2"], [sys.executable, "train.py", "one", "4"]):
        (tmp_path / command[-2]).mkdir()
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    first, second, alone = (
        torch.load(tmp_path / name, weights_only=True)
        for name in ("two/rank0-of-2.pt", "two/rank1-of-2.pt", "one/rank0-of-1.pt")
    )
    assert first["losses"] == second["losses"]
    assert all(torch.equal(first["weights"][n], second["weights"][n]) for n in first["weights"])
    # One process of four samples and two of two have the same seeds, and the same losses up to rounding in float32.
    assert first["losses"][0] == pytest.approx(alone["losses"][0], rel=1e-4)
    assert [p.name for p in sorted((tmp_path / "two").glob("ckpt-*"))] == ["ckpt-000002", "ckpt-000003"]
