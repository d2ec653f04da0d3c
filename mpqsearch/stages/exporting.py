"""Maps for other quantizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mpqsearch import artifacts
from mpqsearch.core import BitMap, Budget, StudyRecord, size_bits
from mpqsearch.errors import ArtifactError, ConfigError, InfeasibleBudgetError, MpqsearchError
from mpqsearch.methods import MethodSpec
from mpqsearch.specs.distill import TRAINED
from mpqsearch.stages.allocating import allocation
from mpqsearch.stages.base import Run, log, slug
from mpqsearch.stages.card import write_card
from mpqsearch.stages.delivering import OVER, deliver
from mpqsearch.stages.distilling import CODES, trained_data, trained_model
from mpqsearch.stages.preflight import require_parts
from mpqsearch.stages.profiling import profile_inputs
from mpqsearch.stages.references import file_key, quantized_module
from mpqsearch.stages.reporting import SIZE_COLUMNS, chosen_method, export_budget, size_rows
from mpqsearch.stages.reuse import EXPORT, current
from mpqsearch.stages.statistics import statistics_for
from mpqsearch.stages.targeting import losses_for, target_allocation

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mpqsearch.export import ExportJob, Target
    from mpqsearch.models import Call
    from mpqsearch.quant import QuantizedModel

Verify = Literal["no", "once", "now"]
"""Whether consumers read exports back: not at all, unless they have done it before, or in any case."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """One target's export: its files, what ``export/<target>@<budget>.json`` says of it and what the consumer said,
    when it was asked; or the error that ended it."""

    target: str
    paths: tuple[Path, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    error: MpqsearchError | None = None

    @property
    def differs(self) -> bool:
        """True when the consumer was asked and did not find what was planned."""
        verification = self.data.get("verification")
        return verification is not None and not verification["ok"]

    @property
    def faults(self) -> tuple[str, ...]:
        """What a user must know before taking the file, see `mpqsearch.stages.delivering.deliver`."""
        return tuple((self.data.get("delivered") or {}).get("faults", ()))


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One target with the map that it gets: ``choices`` names its own formats where the map was made for it; any other
    is that of ``method``, ``trained`` where that is better. ``limit``: the stored bits that the budget allowed the map,
    of which ``names_bits`` are for names and shapes in the file."""

    target: Target
    budget: Budget
    limit: int | None
    bit_map: BitMap
    bias_correction: bool
    method: MethodSpec | None
    trained: bool
    label: str
    choices: Mapping[str, str]
    names_bits: int
    provenance: Mapping[str, Any]
    folder: Path
    stamp: Path
    inputs: Mapping[str, str]


def export(
    run: Run,
    records: list[StudyRecord],
    *,
    verify: Verify = "once",
    budgets: Sequence[Budget] = (),
    own_maps: bool = True,
) -> list[Exported]:
    """Write a map for every configured target at every budget (default: that of ``[export]``), measure what the file
    delivers, and let the consumers read it back, each in a process of its own.

    A target that rounds by itself gets a map over its own formats at the budget (see `_own_map`), any other, and all
    without ``own_maps``, that of the chosen method. What was written from the same inputs is reused.
    ``export/<target>@<budget>.json`` holds what was promised, found and measured, ``export/sizes.csv`` the sizes of all
    targets. A target that fails does not stop the others, and a difference does not raise: see `require_good`.
    """
    wanted = budgets or [export_budget(run)]
    attempts = [
        _attempt(run, records, n, b, verify, own_maps=own_maps) for b in wanted for n in run.config.export.targets
    ]
    exports = [one for one in attempts if one is not None]
    for one in exports:
        if one.error is not None:
            run.say(f"export: {one.target} FAILED: {one.error}")
    rows = [row for row in size_rows(run) if row["accounted_bytes"] != ""]  # the neutral map is no file of weights
    if rows and not run.dry_run:
        artifacts.write_text(run.path("export", "sizes.csv"), artifacts.csv_text(SIZE_COLUMNS, rows))
    return exports


def _attempt(
    run: Run, records: list[StudyRecord], name: str, budget: Budget, verify: Verify, *, own_maps: bool
) -> Exported | None:
    """One target's export, or the error that ended it; None for a target that a dry run would write."""
    try:
        return _export_one(run, _task(run, records, name, budget, own_maps=own_maps), verify)
    except MpqsearchError as error:
        return Exported(target=name, error=error)
    except Exception as error:  # noqa: BLE001 - consumers raise many kinds; none of them may stop the other targets
        log.debug("export for %s", name, exc_info=True)
        text = f"{name} could not be written: {type(error).__name__}: {error}"
        return Exported(target=name, error=ArtifactError(text))


def require_good(exports: Sequence[Exported]) -> None:
    """Raise the error of a single target, or `ArtifactError` that names all targets that failed or that were not read
    back as planned."""
    bad = [one for one in exports if one.error is not None or one.differs]
    if len(bad) == 1 and bad[0].error is not None:
        raise bad[0].error
    if bad:
        names = ", ".join(one.target for one in bad)
        raise ArtifactError(
            f"{len(bad)} of {len(exports)} exports failed or were not read back as planned ({names}): "
            "see the lines above"
        )


def _own_map(run: Run, target: Target, budget: Budget, chosen: MethodSpec) -> tuple[BitMap, dict[str, Any]] | None:
    """A map over the target's own formats at a budget, where such a map is what it should get.

    That is asked for by ``[allocate] targets``. It is also the default of a target that rounds by itself, whatever map
    it is given: codes and ranges of a method's map are lost on it, and prices are those of its own rounding here. None
    where the chosen map is one from elsewhere, and for budgets that are no size or below the target's smallest file.
    """
    c = run.config
    if target.name in c.allocate.targets:
        return target_allocation(run, target.name, budget)
    rounds = target.rerounds and not target.holds_any_map
    if not rounds or chosen.allocator == "map" or budget.unit != "bits stored" or c.allocate.within:
        return None
    try:
        return target_allocation(run, target.name, budget)
    except InfeasibleBudgetError:
        return None


def _task(run: Run, records: list[StudyRecord], name: str, budget: Budget, *, own_maps: bool) -> _Task:
    from mpqsearch.export import get_exporter

    target = get_exporter(name)
    require_parts(run, target)
    chosen = chosen_method(run, records)
    trained = name not in run.config.allocate.targets and _is_trained(run, chosen, budget)
    own = _own_map(run, target, budget, chosen) if own_maps and not trained else None
    if own is None:
        bit_map, solved = allocation(run, chosen, budget)
        label = f"{chosen.name}{TRAINED if trained else ''} at {budget.label()}"
        corrected = solved.get("bias_correction", chosen.bias_correction)
    else:
        bit_map, solved = own
        label, corrected = f"allocated for {name} at {budget.label()}", True
    choices: Mapping[str, str] = {} if own is None else solved["choices"]
    inputs = {
        "bit_map": bit_map.digest,
        "model": run.table.digest,
        "target": name,
        "bias_correction": str(corrected),
        "trained": _trained_digest(run, chosen, budget) if trained else "no",
        "choices": artifacts.digest_of(dict(choices)),
        "profile": artifacts.digest_of(profile_inputs(run)),
        "probes": artifacts.digest_of(run.config.allocate.target_probes),
    }
    return _Task(
        target=target,
        budget=budget,
        bit_map=bit_map,
        bias_correction=corrected,
        method=chosen if own is None else None,
        trained=trained,
        label=label,
        choices=choices,
        names_bits=solved.get("names_bits", 0),
        limit=solved.get("limit") if budget.unit == "bits stored" else None,
        provenance={"map": label, "budget": budget.label(), "predicted_loss": solved["predicted_loss"]},
        folder=run.path("export", slug(name, budget)),
        stamp=run.path("export", f"{slug(name, budget)}.json"),
        inputs=inputs,
    )


def _export_one(run: Run, task: _Task, verify: Verify) -> Exported | None:
    """Plan and write, unless that was done from the same inputs; measure what the file delivers, unless that was done
    as it would be now; then let the consumer read, as ``verify`` says."""
    target, data = task.target, current(EXPORT, task.stamp, task.inputs)
    verified = None if data is None else data["verification"]
    if data is None or (verified is not None and not verified["ok"] and verify != "now"):
        if run.dry_run:
            run.say(f"export: would write {task.label} for {target.name}")
            return None
        if other := target.untested():
            run.say(
                f"export: WARNING: {target.requires} {other} was never tried with {target.name}, only {target.tested}; "
                "go by what --verify finds"
            )
        data, verified = _write(run, task), None
        run.say(f"export: {task.folder} is written" + ("; not read back by its consumer" if verify == "no" else ""))
    elif verify == "no" or (verify == "once" and verified is not None):
        run.say(f"export: reused {task.folder}")
    if target.payload and not _is_measured(run, data["delivered"]):
        own, job = bool(task.choices), _job(run, task)
        found = deliver(run, target, job, task.folder, task.budget, task.limit, whole=own)
        if not own and found["header_bytes"] > OVER * found["stored_bytes"]:
            run.say(
                f"export: the file of {target.name} takes {found['stored_bytes']} bytes and {found['header_bytes']} of "
                "names and shapes, which budgets of maps do not count"
            )
        data = {**data, "delivered": found}
        write_card(run, target, data, task.folder)
        EXPORT.save(task.stamp, data, task.inputs)
    if verify == "now" or (verify == "once" and verified is None):
        target.require()  # an absent consumer can say nothing: that is an error, not a difference
        with run.timed("verify"):
            verification = target.verify(task.folder)
        run.say(f"export: {verification.summary()}")
        data = {**data, "verification": verification.to_data()}
        EXPORT.save(task.stamp, data, task.inputs)
    return Exported(target=target.name, paths=tuple(task.folder / name for name in data["files"]), data=data)


def _is_measured(run: Run, delivered: Mapping[str, Any] | None) -> bool:
    """Whether a file was measured as it would be now, or need not be."""
    if delivered is None:
        return False
    needed = run.config.export.measure and not delivered["metrics"] and not delivered["not_measured"]
    return delivered["measured_with"] == file_key(run, {}) and not needed


def _write(run: Run, task: _Task) -> dict[str, Any]:
    """Write the export and ``export/<target>@<budget>.json``, before any consumer has looked."""
    from mpqsearch.export import plan_table
    from mpqsearch.export.contract import AS_PLANNED

    target, job = task.target, _job(run, task)
    task.stamp.unlink(missing_ok=True)
    with run.timed("export"):
        paths = target.write(task.folder, job)
    plan, lost = target.plan(job), target.lost_inputs(job.bit_map)
    promised = target.promise(job, plan).total if target.name != "neutral" else None
    names = task.names_bits or target.names_bits(job, plan)
    if target.payload and not names:  # widths hardly change them: those of the file
        names = 8 * target.sizes(task.folder)["header_bytes"]
    ideal = size_bits(run.table, job.bit_map)
    data = {
        "target": target.name,
        "budget": task.budget.label(),
        "map": task.label,
        "rounded_layers": sum(e.reason not in AS_PLANNED for e in plan),
        "payload": target.payload,
        "n_parameters": run.table.n_parameters,
        "ideal_bits": ideal,
        "accounted_bits": promised,
        "promised_bytes": None if promised is None else -(-(promised + names) // 8),
        "lost_inputs": len(lost),
        "plan": plan_table(plan, lost),
        "granularity": target.granularity,
        "file_digest": artifacts.digest_of({p.name: artifacts.digest_file(p) for p in paths}),
        "verification": None,
        "delivered": None,
        "files": [p.relative_to(task.folder).as_posix() for p in paths],
    }
    EXPORT.save(task.stamp, data, task.inputs)
    if lost:
        run.say(
            f"export: {target.name} says nothing of inputs: the map quantizes those of {len(lost)} layers, what is "
            "written none"
        )
    if promised is not None and promised > ideal:
        run.say(size_note(target.name, promised, ideal, 16 * run.table.n_parameters))
    return data


def _is_trained(run: Run, method: MethodSpec, budget: Budget) -> bool:
    """Whether the trained model of a method is what is exported: it was asked for by name, or training made it better.

    Raises `ConfigError` when it was asked for and there is none.
    """
    asked, found = run.config.report.chosen.endswith(TRAINED), trained_data(run, method, budget)
    if found is None:
        if asked:
            raise ConfigError(
                f"{method.name} was not trained at {budget.label()} with these settings: run `mpqsearch distill "
                f"--method {method.name} --budget {budget.label()}` first, or leave out {TRAINED!r}"
            )
        return False
    before, after = (found[when]["paired_mse"]["value"] for when in ("before", "after"))
    if not asked and after >= before:
        run.say(
            f"export: {method.name} at {budget.label()} is exported as it was before training, which did not lower its "
            f"error ({before:.4g}, after it {after:.4g}); --method {method.name}{TRAINED} takes the trained one"
        )
    return asked or bool(after < before)


def _trained_digest(run: Run, method: MethodSpec, budget: Budget) -> str:
    return artifacts.digest_file(run.path("distilled", slug(method.name, budget), CODES))


def _trained(run: Run, task: _Task) -> QuantizedModel | None:
    if not task.trained or task.method is None:
        return None
    method, budget = task.method, task.budget
    return run.once(("trained", method.name, budget.label()), lambda: trained_model(run, method, budget))


def _evaluated(run: Run, task: _Task) -> Callable[[Call], Tensor] | None:
    """Predictions of the model that was evaluated, which is made when it is asked; None where nothing runs."""
    still = task.trained or run.config.calibration.captured  # their quantizers of inputs are not made again here
    if run.config.calibration.weights_only or (task.bit_map.activations and still):
        return None

    @cache
    def module() -> nn.Module:
        if (trained := _trained(run, task)) is not None:
            return trained.module
        return quantized_module(run, task.bit_map, bias_correction=task.bias_correction)

    return lambda call: call.replay(module())


def size_note(target: str, promised: int, ideal: int, half: int) -> str:
    """What is said of an export of ``promised`` bits that is larger than the map packed densely (``ideal``), and
    perhaps than the model in half precision (``half``)."""
    size, planned, plain = (-(-bits // 8) for bits in (promised, ideal, half))
    text = (
        f"export: the map takes {planned} bytes when it is packed densely; the file of {target} takes {size}, and that "
        "is what is written"
    )
    if promised > half:
        text += f": MORE than the model in half precision ({plain})"
    return text


def _job(run: Run, task: _Task) -> ExportJob:
    """What is exported: the map as it is where the target holds it, else solved for anew over the target's formats."""
    from mpqsearch.export import ExportJob
    from mpqsearch.export.allocation import resolve_job

    job = ExportJob(
        table=run.table,
        bit_map=task.bit_map,
        denoiser=run.denoiser,
        choices=task.choices,
        statistics=statistics_for(run, task.bit_map),
        bias_correction=task.bias_correction,
        trained=_trained(run, task),
        evaluated=_evaluated(run, task),
        inputs={"model": run.table.digest},
        provenance=task.provenance,
    )
    fmt = run.config.quantizer.format()
    return resolve_job(task.target, job, lambda: losses_for(run, task.target), run.config.policy, fmt)
