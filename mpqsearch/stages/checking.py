"""Check a saved allocation as a stranger would: all that ``allocation.json`` claims, from the run's own files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from mpqsearch import artifacts
from mpqsearch.allocate import Certificate, check_certificate, table_digests
from mpqsearch.core import BitMap, Budget, LayerTable, Policy, QuantFormat, bops, size_bits
from mpqsearch.errors import ArtifactError, ConfigError, StaleArtifactError
from mpqsearch.methods import CostTable, MethodSpec, Programs, predicted_loss
from mpqsearch.untrusted import build, file_name

SAME = 1e-9
"""Relative difference of two sums of the same losses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """An allocation with the files of its run that it was made from."""

    path: Path
    data: Mapping[str, Any]
    bit_map: BitMap
    table: LayerTable
    programs: Programs
    method: MethodSpec
    budgets: tuple[Budget, ...]


def check_allocation(path: Path) -> list[str]:
    """Recompute what an ``allocations/<name>/allocation.json`` claims; what was checked, a line each.

    The tables are built again from the run's profile and compared with the digests in the certificate; loss, costs and
    the bound that the multipliers prove are recomputed by `mpqsearch.allocate.check_certificate`, which shares no
    arithmetic with the solvers.

    Raises `StaleArtifactError` with the first contradiction, `ConfigError` for a file without claims of this kind, and
    `ArtifactError` when a file that is needed is missing or damaged.
    """
    saved = _read(path)
    lines = []
    for line, contradiction in _checks(saved):
        if contradiction:
            raise StaleArtifactError(f"{path} does not hold: {contradiction}")
        lines.append(line)
    return lines


def _read(path: Path) -> Saved:
    data = artifacts.read_json(path, "mpqsearch/allocation").data
    if "made_from" not in data:
        raise ConfigError(
            f"{path} holds no claims to check: only maps of methods do that `mpqsearch allocate` made (not those for a "
            "target, from a search or from elsewhere)"
        )
    run = path.resolve().parent.parent.parent
    claims = build(_Claims, data, str(path))
    source = claims["made_from"]
    parts = [file_name(n, f"{path}: made_from.profile", ArtifactError) for n in source["profile"].split("/")]
    table, profile = artifacts.load_layers(run / "layers.json"), artifacts.load_profile(run.joinpath(*parts))
    return Saved(
        path=path,
        data=data,
        bit_map=artifacts.load_bit_map(path.with_name("bitmap.json")),
        table=table,
        programs=Programs(
            table=table,
            profile=profile,
            policy=source["policy"],
            format=QuantFormat.from_data(source["format"]),
            costs=_costs(source["costs"]),
            apart=source.get("apart", ()),
        ),
        method=claims["method"],
        budgets=tuple(Budget.parse(t["budget"]) for t in claims["totals"]),
    )


class _Total(TypedDict):
    budget: str
    cost: float
    limit: float


class _Source(TypedDict):
    profile: str
    policy: Policy
    format: Mapping[str, Any]
    costs: Mapping[str, str] | None
    apart: NotRequired[tuple[str, ...]]


class _Claims(TypedDict):
    """What ``allocation.json`` says that is checked here."""

    made_from: _Source
    method: MethodSpec
    totals: tuple[_Total, ...]
    bit_map_digest: str
    size_bits: int
    bops: int
    predicted_loss: float | None
    within_budget: bool
    certificate: Certificate | None
    result: Mapping[str, Any] | None


def _costs(source: Mapping[str, str] | None) -> CostTable | None:
    if source is None:
        return None
    file = Path(source["file"])
    if not file.is_file() or artifacts.digest_file(file) != source["sha256"]:
        raise ArtifactError(f"the latencies {file} are missing or are not those that the map was made with")
    return CostTable.read(file)


Checked = tuple[str, str]
"""What was checked, and what contradicts it."""


def _checks(saved: Saved) -> Iterator[Checked]:
    """One after another."""
    data, bit_map, method = saved.data, saved.bit_map, saved.method
    yield _same("the digest of bitmap.json", bit_map.digest, data["bit_map_digest"])
    bit_map.validate(saved.table)
    yield _same("the stored size in bits", size_bits(saved.table, bit_map), data["size_bits"])
    yield _same("the number of bit operations", bops(saved.table, bit_map), data["bops"])
    yield from _budgets(saved)
    claim = data["predicted_loss"]  # up to rounding; NaN is written as null
    loss = predicted_loss(saved.table, saved.programs.profile, bit_map, bias_correction=method.bias_correction)
    same = math.isnan(loss) if claim is None else abs(loss - claim) <= SAME * abs(loss)
    yield _same("the predicted loss", claim if same else loss, claim)
    if data["certificate"] is not None:
        yield from _certificate(saved)
        return
    alone = "each part was solved by itself" if saved.programs.apart else f"no program was solved ({method.allocator})"
    yield f"{alone}, so there is no bound to check", ""


def _budgets(saved: Saved) -> Iterator[Checked]:
    task = saved.programs.task(saved.method, saved.budgets[0], saved.budgets[1:])
    for limit, claim in zip(task.limits, saved.data["totals"], strict=True):
        yield _same(f"the limit of {claim['budget']}", limit.limit, claim["limit"])
        yield _same(f"the cost under {claim['budget']}", task.cost(limit.budget, saved.bit_map), claim["cost"])
    yield from _parts(saved)
    over = any(t["cost"] > t["limit"] for t in saved.data["totals"])
    _, wrong = _same("within_budget", not over, saved.data["within_budget"])
    yield "it exceeds a budget, and says so" if over else "it keeps to its budgets", wrong


def _certificate(saved: Saved) -> Iterator[Checked]:
    result, certificate = saved.data["result"], build(Certificate, saved.data["certificate"], str(saved.path))
    program = saved.programs.program(
        saved.method,
        saved.budgets[0],
        saved.budgets[1:],
        by_layer=result["program"] == "layers",
        like=saved.bit_map,
    )
    problem = program.problem
    _, wrong = _same("the digests of the tables", dict(table_digests(problem)), dict(certificate.digests))
    yield f"the tables of {problem.n_items} {result['program']} are those that were solved", wrong
    check = check_certificate(certificate, problem, program.choice(saved.bit_map).tolist())
    costs = ", ".join(f"{b.name} {c}" for b, c in zip(problem.budgets, check.costs, strict=False))
    yield f"costed again, the choice loses {check.loss!r} and takes {costs} of the searched layers", check.problem
    given = "" if program.by_layer or not saved.method.formats else " with these formats of layers"
    yield f"its multipliers prove that no map{given} loses less than {check.bound!r}: a gap of {check.gap:.2g}", ""
    for name in ("loss", "status"):
        yield _same(f"the {name} of the result", getattr(certificate, name), result[name])
    if result["status"] == "optimal" and check.gap > 0:
        word = {"search": "the exact core's search", "solver": "the solver's word"}.get(certificate.proof, "the solver")
        yield f"that it is optimal within that gap rests on {word} ({certificate.solver}), which is not checked", ""


def _parts(saved: Saved) -> Iterator[Checked]:
    """Where each part keeps to the budgets by itself, what it takes of them."""
    may_exceed = any("(over)" in note for note in saved.data["notes"])
    for name in saved.programs.apart:
        part = saved.programs.of_part(name)
        task, own = part.task(saved.method, saved.budgets[0], saved.budgets[1:]), saved.bit_map.only(part.table.by_name)
        for limit in task.limits:
            cost = task.cost(limit.budget, own)
            line = f"{name} takes {cost} of {limit.limit} {limit.budget.unit}"
            yield line, line if cost > limit.limit and not may_exceed else ""


def _same(what: str, computed: object, claimed: object) -> Checked:
    wrong = "" if computed == claimed else f"{what} is {computed}, the file says {claimed}"
    return f"{what} is {computed}", wrong
