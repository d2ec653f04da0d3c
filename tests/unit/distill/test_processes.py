"""Two processes on CPUs: gradients are averaged, students stay equal, one process writes."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.e2e import forked

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
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = {}
    for folder, batch, world in (("two", "2", 2), ("one", "4", 1)):
        (tmp_path / folder).mkdir()
        for rank in map(str, range(world)):  # with the environment that torchrun and `accelerate launch` give
            team = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
            said = tmp_path / f"{folder}-{rank}.err"
            started[said] = forked.start(
                [folder, batch],
                tmp_path,
                tmp_path / f"{folder}-{rank}.out",
                said,
                script=str(script),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                **team,
            )
    for said, process in started.items():
        process.join(300)
        assert process.exitcode == 0, said.read_text()[-2000:]
    first, second, alone = (
        torch.load(tmp_path / name, weights_only=True)
        for name in ("two/rank0-of-2.pt", "two/rank1-of-2.pt", "one/rank0-of-1.pt")
    )
    assert first["losses"] == second["losses"]
    assert all(torch.equal(first["weights"][n], second["weights"][n]) for n in first["weights"])
    # One process of four samples and two of two have the same seeds, and the same losses up to rounding in float32.
    assert first["losses"][0] == pytest.approx(alone["losses"][0], rel=1e-4)
    assert [p.name for p in sorted((tmp_path / "two").glob("ckpt-*"))] == ["ckpt-000002", "ckpt-000003"]
