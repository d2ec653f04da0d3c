"""The loop on tiny models: it learns, resumes bit for bit, saves on a signal and stops when it diverges."""

import copy
import gc
import itertools
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mpqsearch.core import Policy, QuantFormat, uniform_map
from mpqsearch.distill import DistillSpec, TeacherCall, Trajectories, TRDSpec, distill
from mpqsearch.distill.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mpqsearch.errors import ArtifactError, ConfigError, NumericsError, StaleArtifactError, UnknownNameError
from mpqsearch.models import Denoiser, discover
from mpqsearch.quant import build_student, param_groups
from mpqsearch.sampling import prediction_gains
from tests.support import tiny_denoiser


def teacher(kind: str = "unet", steps: int = 5) -> Denoiser:
    return tiny_denoiser(kind, steps=steps, guidance=2.0)


def student_of(denoiser: Denoiser, scale: float = 1.2) -> tuple[torch.nn.Module, list[dict]]:
    """A copy whose weights are off, all of them trainable."""
    student = copy.deepcopy(denoiser.module)
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(scale)
    student.requires_grad_(True)
    return student, [{"name": "all", "params": list(student.parameters()), "lr": 2e-3}]


def trajectories(denoiser: Denoiser, **kwargs: int) -> Trajectories:
    return Trajectories(denoiser, batch=3, **kwargs)


def spec(**kwargs: object) -> DistillSpec:
    relation = TRDSpec(**{"pooled_size": 4, **kwargs.pop("relation", {})})  # type: ignore[arg-type, dict-item]
    return DistillSpec(**{"steps": 10, "checkpoint_every": 5, "relation": relation, **kwargs})  # type: ignore[arg-type]


def tensors_of(module: torch.nn.Module) -> list[torch.Tensor]:
    return [v.detach().clone() for v in module.state_dict().values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", ["unet", "dit"])
@pytest.mark.parametrize("relation", [{}, {"weight": 0.0}])
def test_training_lowers_the_loss(kind: str, relation: dict) -> None:
    denoiser = teacher(kind)
    student, groups = student_of(denoiser)
    source = trajectories(denoiser)
    states = list(distill(student, groups, source, spec(steps=18, relation=relation)))
    assert [s.step for s in states] == list(range(1, 19))
    # A trajectory has three windows; whole trajectories are compared, since the loss depends on the timestep.
    assert sum(s.task for s in states[-3:]) < 0.7 * sum(s.task for s in states[:3])
    assert states[0].rate == 1.0
    assert states[-1].rate == pytest.approx(1 / 18)
    assert not denoiser.module.conv_in.weight.requires_grad if kind == "unet" else True


def test_equal_student_has_no_loss_and_no_gradient() -> None:
    denoiser = teacher()
    student, groups = student_of(denoiser, scale=1.0)
    state = next(distill(student, groups, trajectories(denoiser), spec()))
    assert state.loss == 0.0
    # Rounding of the softmax; gradients of the student with weights off by a fifth are of order 1.
    assert state.gradient_norm < 1e-7


def test_memory_does_not_grow_with_the_steps() -> None:
    """Whatever the functions of a student keep for their gradients is let go after each step."""
    denoiser = teacher()
    table = discover(denoiser)
    bit_map = uniform_map(table, Policy(), 3, QuantFormat())
    student = build_student(denoiser.module, table, bit_map, rank=2)
    groups = param_groups(student)
    held = []
    for _ in distill(student, groups, trajectories(denoiser), spec(steps=6)):
        gc.collect()
        held.append(sum(isinstance(o, torch.Tensor) and o.grad_fn is not None for o in gc.get_objects()))
    assert max(held[1:]) <= held[0] + 5


def first_gradient(relation: dict) -> tuple[torch.Tensor, float]:
    denoiser = teacher()
    student, groups = student_of(denoiser)
    state = next(distill(student, groups, trajectories(denoiser), spec(clip_norm=0.0, relation=relation)))
    return torch.cat([p.grad.flatten() for p in student.parameters()]), state.relation


def test_relation_loss_trains() -> None:
    without, _ = first_gradient({"weight": 0.0})
    alive, value = first_gradient({"weight": 1.0})
    assert value > 0
    assert float((alive - without).norm() / without.norm()) > 0.01


def test_timestep_weights_are_the_sensitivities_of_the_sampler() -> None:
    denoiser = teacher()
    tasks: dict[str, list[float]] = {}
    grads: dict[str, torch.Tensor] = {}
    for kind in ("uniform", "sampler"):
        student, groups = student_of(denoiser)
        groups[0]["lr"] = 0.0
        options = spec(
            steps=5, clip_norm=0.0, weight_decay=0.0, timestep_weights=kind, relation={"window": 1, "weight": 0.0}
        )
        tasks[kind] = []
        for state in distill(student, groups, trajectories(denoiser), options):
            tasks[kind].append(state.task)
        grads[kind] = torch.cat([p.grad.flatten() for p in student.parameters()])  # of the last timestep
    # The rows of the asked classes, whose errors guidance 2 doubles, tell what an error of the guided prediction does.
    gains = [
        prediction_gains(denoiser, seeds)
        for seeds in (range(2_999_992 + i, min(2_999_995 + i, 3_000_000)) for i in (0, 3, 6))
    ]
    values = [sum(float(batch[i].chunk(2)[1].mean()) / 4 for batch in gains) for i in range(5)]
    weights = [v * 5 / sum(values) for v in values]
    assert max(weights) > 10 * min(weights)
    assert tasks["sampler"] == pytest.approx([w * t for w, t in zip(weights, tasks["uniform"], strict=True)], rel=1e-4)
    assert float((grads["sampler"] - weights[-1] * grads["uniform"]).norm() / grads["sampler"].norm()) < 1e-4


def test_timestep_weights_are_part_of_the_identity() -> None:
    assert spec().identity()["distill.timestep_weights"] == "uniform"
    assert spec(timestep_weights="sampler").identity() != spec().identity()
    with pytest.raises(UnknownNameError, match="uniform"):
        spec(timestep_weights="snr")


@pytest.mark.parametrize(("ema", "weights"), [(0.0, "uniform"), (0.9, "sampler")])
def test_ten_steps_equal_five_a_stop_and_five_bit_for_bit(tmp_path: Path, ema: float, weights: str) -> None:
    denoiser = teacher()
    options = spec(ema=ema, timestep_weights=weights)
    whole, groups = student_of(denoiser)
    expected = [s.loss for s in distill(whole, groups, trajectories(denoiser), options, folder=tmp_path / "whole")]
    half, groups = student_of(denoiser)
    first = []
    for state in distill(half, groups, trajectories(denoiser), options, folder=tmp_path / "halves"):
        first.append(state.loss)
        if state.step == 7:  # killed two steps after the last checkpoint
            break
    torch.manual_seed(99)
    again, groups = student_of(denoiser)
    states = list(distill(again, groups, trajectories(denoiser), options, folder=tmp_path / "halves"))
    assert [s.step for s in states] == [6, 7, 8, 9, 10]
    assert first[:5] + [s.loss for s in states] == expected
    assert same(tensors_of(again), tensors_of(whole))
    lines = [json.loads(line) for line in (tmp_path / "halves/train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["loss"] for line in lines] == expected
    # A finished training has nothing to do, and still gives the trained student.
    finished, groups = student_of(denoiser)
    assert list(distill(finished, groups, trajectories(denoiser), options, folder=tmp_path / "halves")) == []
    assert same(tensors_of(finished), tensors_of(whole))


def checked(
    folder: Path, values: dict[int, float], **kwargs: object
) -> tuple[list[torch.Tensor], dict[int, list[torch.Tensor]], list[int]]:
    """The trained student, the student at each check, and the steps checked; a check after ``n`` steps is worth
    ``values[n]``."""
    denoiser = teacher()
    student, groups = student_of(denoiser)
    seen: dict[int, list[torch.Tensor]] = {}
    order: list[int] = []
    steps = iter(sorted(values))

    def measure(module: torch.nn.Module) -> float:
        order.append(next(steps))
        seen[order[-1]] = tensors_of(module)
        return values[order[-1]]

    options = spec(check_every=5, **kwargs)
    for _ in distill(student, groups, trajectories(denoiser), options, folder=folder, measure=measure):
        pass
    return tensors_of(student), seen, order


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize(
    ("values", "best"),
    [({0: 3.0, 5: 1.0, 10: 2.0}, 5), ({0: 1.0, 5: 1.0, 10: 2.0}, 0), ({0: float("nan"), 5: float("inf"), 10: 7.0}, 10)],
)
def test_a_checked_student_ends_as_at_its_best_check(
    tmp_path: Path, values: dict[int, float], best: int, ema: float
) -> None:
    end, seen, order = checked(tmp_path, values, ema=ema)
    assert order == [0, 5, 10]
    assert not same(seen[0], seen[5])
    assert not same(seen[5], seen[10])
    assert same(end, seen[best])
    logged = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [d["step"] for d in logged if "check" in d] == [0, 5, 10]


def test_a_training_that_begins_anew_begins_its_log_anew(tmp_path: Path) -> None:
    for _ in range(2):
        checked(tmp_path, {0: 1.0, 5: 2.0, 10: 3.0})
        (tmp_path / "latest.json").unlink()
    logged = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [d["step"] for d in logged if "check" in d] == [0, 5, 10]


def test_checks_do_not_touch_the_training(tmp_path: Path) -> None:
    denoiser = teacher()
    plain, groups = student_of(denoiser)
    losses = [s.loss for s in distill(plain, groups, trajectories(denoiser), spec(ema=0.9))]
    student, groups = student_of(denoiser)
    options = spec(ema=0.9, check_every=3)
    states = list(
        distill(student, groups, trajectories(denoiser), options, measure=lambda m: -float(m.conv_in.weight.std()))
    )
    assert [s.loss for s in states] == losses
    assert [s.step for s in states if s.check is not None] == [3, 6, 9, 10]
    assert all(s.best is not None and s.best[1] <= (s.check or 0) for s in states if s.check is not None)


@pytest.mark.parametrize("stop", [4, 5, 7])
def test_checks_go_on_after_a_stop(tmp_path: Path, stop: int) -> None:
    """By a signal, which saves after the running step; at step 5 the check that was due is made when the training goes
    on."""
    denoiser = teacher()

    def run(folder: Path, signal_at: int = 0) -> tuple[list[torch.Tensor], list[float]]:
        student, groups = student_of(denoiser)
        found: list[float] = []

        def measure(module: torch.nn.Module) -> float:
            found.append(abs(float(module.conv_in.weight.detach().std()) - middle))
            return found[-1]

        loop = distill(student, groups, trajectories(denoiser), spec(check_every=5), folder=folder, measure=measure)
        for state in loop:
            if state.step == signal_at - 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return tensors_of(student), found

    middle = 0.0
    _, stds = run(tmp_path / "look")
    middle = stds[1]  # so that the check after five steps is the best
    whole, values = run(tmp_path / "whole")
    _, first = run(tmp_path / "parts", signal_at=stop)
    end, second = run(tmp_path / "parts")
    assert min(values) == values[1]
    assert first + second == values
    assert same(end, whole)


def test_checks_need_a_measure() -> None:
    denoiser = teacher()
    student, groups = student_of(denoiser)
    with pytest.raises(ConfigError, match="measure"):
        next(distill(student, groups, trajectories(denoiser), spec(check_every=2)))
    with pytest.raises(ConfigError, match="check_every"):
        spec(check_every=-1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_and_the_same_call_continues(tmp_path: Path, number: signal.Signals) -> None:
    denoiser = teacher()
    before = signal.getsignal(number)
    student, groups = student_of(denoiser)
    seen = []
    states = distill(student, groups, trajectories(denoiser), spec(), folder=tmp_path)
    for state in states:
        seen.append(state)
        if state.step == 2:
            os.kill(os.getpid(), number)
        if state.interrupted:
            break
    states.close()  # type: ignore[attr-defined] # as a caller's exit does, without the signal again
    assert [s.step for s in seen] == [1, 2, 3]
    assert seen[-1].interrupted
    assert seen[-1].checkpoint == tmp_path / "ckpt-000003"
    assert signal.getsignal(number) == before
    again, groups = student_of(denoiser)
    rest = list(distill(again, groups, trajectories(denoiser), spec(), folder=tmp_path))
    assert [s.step for s in rest] == [4, 5, 6, 7, 8, 9, 10]
    assert sorted(p.name for p in tmp_path.glob("ckpt-*")) == ["ckpt-000005", "ckpt-000010"]


def test_a_signal_after_the_last_step_has_its_usual_effect(tmp_path: Path) -> None:
    denoiser, measured = teacher(), []
    student, groups = student_of(denoiser)

    def measure(_student: object) -> float:
        measured.append(len(measured))
        if len(measured) == 3:  # before the first step, and after both
            signal.raise_signal(signal.SIGINT)
        return 1.0

    states = distill(
        student,
        groups,
        trajectories(denoiser),
        spec(steps=2, check_every=1),
        folder=tmp_path,
        measure=measure,
    )
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of the test suite ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            list(states)
    finally:
        signal.signal(signal.SIGINT, before)
    assert measured == [0, 1, 2]
    assert (tmp_path / "ckpt-000002").is_dir()


def test_another_training_is_refused_with_both_values_and_replaced_on_demand(tmp_path: Path) -> None:
    denoiser = teacher()
    student, groups = student_of(denoiser)
    list(
        distill(
            student,
            groups,
            trajectories(denoiser),
            spec(steps=2),
            folder=tmp_path,
            inputs={"bit_map": "aaaa"},
        )
    )
    student, groups = student_of(denoiser)
    with pytest.raises(StaleArtifactError, match=r"distill\.temperature \(0\.1 on disk, 0\.3 now\)"):
        list(
            distill(
                student,
                groups,
                trajectories(denoiser),
                spec(steps=2, relation={"temperature": 0.3}),
                folder=tmp_path,
                inputs={"bit_map": "aaaa"},
            )
        )
    with pytest.raises(StaleArtifactError, match=r"bit_map \(aaaa on disk, bbbb now\)"):
        list(
            distill(
                student,
                groups,
                trajectories(denoiser),
                spec(steps=2),
                folder=tmp_path,
                inputs={"bit_map": "bbbb"},
            )
        )
    with pytest.raises(StaleArtifactError, match=r"teacher\.steps \(5 on disk, 4 now\)"):
        other = trajectories(teacher(steps=4))
        list(distill(student, groups, other, spec(steps=2), folder=tmp_path, inputs={"bit_map": "aaaa"}))
    made = list(
        distill(
            student,
            groups,
            trajectories(denoiser),
            spec(steps=3),
            folder=tmp_path,
            inputs={"bit_map": "aaaa"},
            overwrite=True,
        )
    )
    assert [s.step for s in made] == [1, 2, 3]


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    denoiser = teacher()
    student, groups = student_of(denoiser)
    list(distill(student, groups, trajectories(denoiser), spec(), folder=tmp_path))
    side = tmp_path / "ckpt-000010" / "state.safetensors"
    side.write_bytes(side.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match=r"ckpt-000010.*'ckpt-000005'"):
        list(distill(student, groups, trajectories(denoiser), spec(), folder=tmp_path))


def test_divergence_stops_with_step_and_advice_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    denoiser = teacher()
    student, groups = student_of(denoiser)
    with pytest.raises(NumericsError, match=r"step 7 of 10: the loss is nan.*distill\.lr_factor"):
        for state in distill(student, groups, trajectories(denoiser), spec(), folder=tmp_path):
            if state.step == 6:
                with torch.no_grad():
                    student.conv_in.weight[0] = torch.nan
    assert json.loads((tmp_path / "latest.json").read_text())["data"]["folder"] == "ckpt-000005"
    student, groups = student_of(denoiser)
    groups[0]["lr"] = 3.0
    with pytest.raises(NumericsError, match=r"more than 20 times what it was at first .*steepest gradient in"):
        list(distill(student, groups, trajectories(denoiser), spec(steps=40, clip_norm=0.0)))


def test_losses_that_differ_between_timesteps_are_no_explosion() -> None:
    denoiser = teacher()
    student, groups = student_of(denoiser, scale=1.0)
    groups[0]["lr"] = 0.0

    class Uneven(Trajectories):
        """Loss 0 at all steps but the last, where it is 9."""

        def run(self, index: int, relation: TRDSpec | None = None) -> list[TeacherCall]:
            *calls, last = super().run(index, relation)
            return [*calls, replace(last, prediction=last.prediction + 3.0)]

    states = list(distill(student, groups, Uneven(denoiser, batch=3), spec(steps=6, weight_decay=0.0)))
    assert states[2].task > 8
    assert max(s.task for s in states if s.step % 3) < 1e-6


def test_trajectories_are_those_of_the_sampler() -> None:
    denoiser = teacher()
    calls = trajectories(denoiser).run(0, TRDSpec(pooled_size=4))
    assert [c.call.timestep for c in calls] == [800, 600, 400, 200, 0]
    with torch.no_grad():
        assert all(torch.equal(c.prediction, c.call.replay(denoiser.module)) for c in calls)
    assert calls[0].features is not None
    assert calls[0].features.shape == (6, 16, 8)
    assert trajectories(denoiser).run(0)[0].features is None


def test_no_two_trajectories_have_a_seed_in_common_nor_leave_their_band() -> None:
    denoiser = teacher()
    seeds = [trajectories(denoiser, rank=r, world=2).seeds(k) for k in range(2) for r in range(2)]
    assert len({s for part in seeds for s in part}) == 12
    for n in (3, 10, 100):
        starts = sorted(trajectories(denoiser, seed=s).seeds(0)[0] for s in range(n))
        assert min(b - a for a, b in itertools.pairwise(starts)) > 380_000 / n
    probes = {s for batch in trajectories(denoiser).probe_seeds for s in batch}
    for seed in (0, 1, 999):
        for index in (0, 10_000, 320_000):
            found = trajectories(denoiser, seed=seed).seeds(index)
            assert len(set(found)) == 3
            assert 2_000_000 <= min(found) <= max(found) < 3_000_000
            assert not probes & set(found)


def test_bad_options_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="bfloat16"):
        DistillSpec(precision="bfloat")
    with pytest.raises(ConfigError, match="ema"):
        DistillSpec(ema=1.0)
    denoiser = teacher()
    student, _ = student_of(denoiser)
    with pytest.raises(ConfigError, match="make the parameter groups from this student"):
        list(distill(student, student_of(denoiser)[1], trajectories(denoiser), spec()))


def test_bfloat16_trains() -> None:
    denoiser = teacher()
    student, groups = student_of(denoiser)
    states = list(distill(student, groups, trajectories(denoiser), spec(steps=12, precision="bfloat16")))
    assert states[9].task < states[0].task


def test_the_checkpoint_that_was_just_written_is_kept(tmp_path: Path) -> None:
    """Also when later ones are there from a training that went on from an earlier one, and beyond six digits."""
    for start in (0, 999_990):
        folder = tmp_path / str(start)
        for step in (2, 4, 12, 6):
            checkpoint = Checkpoint(step=start + step, tensors={"x": torch.zeros(1)}, data={})
            path = save_checkpoint(folder, checkpoint, {})
            assert path.is_dir()
        assert {int(p.name.removeprefix("ckpt-")) - start for p in folder.glob("ckpt-*")} == {4, 6}
        found = load_checkpoint(folder, {})
        assert found is not None
        assert found.step == start + 6
