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


def _checks(saved: Saved) -> Iterator[tuple[str, str]]:
    """What is checked, and what contradicts it, one after another."""
    data, bit_map = saved.data, saved.bit_map
    yield (
        "bitmap.json has the digest that the file names",
        _differs("the digest of bitmap.json", bit_map.digest, data["bit_map_digest"]),
    )
    bit_map.validate(saved.table)
    yield (
        f"the map stores {data['size_bits']} bits, everything counted",
        _differs("the stored size in bits", size_bits(saved.table, bit_map), data["size_bits"]),
    )
    yield (
        f"a forward pass takes {data['bops']} bit operations",
        _differs("the number of bit operations", bops(saved.table, bit_map), data["bops"]),
    )
    yield from _budgets(saved)
    predicted = predicted_loss(
        saved.table, saved.programs.profile, bit_map, bias_correction=saved.method.bias_correction
    )
    yield (
        f"the profile predicts the loss {data['predicted_loss']}",
        _far("the predicted loss", predicted, data["predicted_loss"]),
    )
    if data["certificate"] is None:
        alone = f"no program was solved ({saved.method.allocator})"
        yield (
            f"{'each part was solved by itself' if saved.programs.apart else alone}, so there is no bound to check",
            "",
        )
        return
    yield from _certificate(saved)


def _budgets(saved: Saved) -> Iterator[tuple[str, str]]:
    task = saved.programs.task(saved.method, saved.budgets[0], saved.budgets[1:])
    for limit, claim in zip(task.limits, saved.data["totals"], strict=True):
        label, unit = claim["budget"], limit.budget.unit
        yield f"{label} allows {limit.limit} {unit}", _differs(f"the limit of {label}", limit.limit, claim["limit"])
        cost = task.cost(limit.budget, saved.bit_map)
        yield f"the map takes {cost} of them", _differs(f"the cost under {label}", cost, claim["cost"])
    yield from _parts(saved)
    over = any(t["cost"] > t["limit"] for t in saved.data["totals"])
    yield (
        "it keeps to its budgets" if not over else "it exceeds a budget, and says so",
        _differs("within_budget", not over, saved.data["within_budget"]),
    )


def _certificate(saved: Saved) -> Iterator[tuple[str, str]]:
    data, result = saved.data["certificate"], saved.data["result"]
    certificate = build(Certificate, data, str(saved.path))
    program = saved.programs.program(
        saved.method,
        saved.budgets[0],
        saved.budgets[1:],
        by_layer=result["program"] == "layers",
        inputs=saved.bit_map.activations,
    )
    problem = program.problem
    yield (
        f"the tables of {problem.n_items} {result['program']} are those that were solved",
        _differs("the digests of the tables", dict(table_digests(problem)), dict(certificate.digests)),
    )
    check = check_certificate(certificate, problem, program.choice(saved.bit_map).tolist())
    costs = ", ".join(f"{b.name} {c}" for b, c in zip(problem.budgets, check.costs, strict=False))
    yield f"costed again, the choice loses {check.loss!r} and takes {costs} of the searched layers", check.problem
    yield f"its multipliers prove that no map loses less than {check.bound!r}: a gap of {check.gap:.2g}", ""
    for name in ("loss", "status"):
        yield (
            f"result and certificate agree on the {name}",
            _differs(f"the {name} of the result", getattr(certificate, name), result[name]),
        )
    if result["status"] == "optimal" and check.gap > 0:
        word = {"search": "the exact core's search", "solver": "the solver's word"}.get(certificate.proof, "the solver")
        yield (
            f"that it is optimal within that gap rests on {word} ({certificate.solver}), which is not checked here",
            "",
        )


def _parts(saved: Saved) -> Iterator[tuple[str, str]]:
    """Where each part keeps to the budgets by itself, what it takes of them."""
    may_exceed = any("(over)" in note for note in saved.data["notes"])
    for name in saved.programs.apart:
        part = saved.programs.of_part(name)
        task, own = part.task(saved.method, saved.budgets[0], saved.budgets[1:]), saved.bit_map.only(part.table.by_name)
        for limit in task.limits:
            cost = task.cost(limit.budget, own)
            line = f"{name} takes {cost} of {limit.limit} {limit.budget.unit}"
            yield line, line if cost > limit.limit and not may_exceed else ""


def _differs(what: str, computed: object, claimed: object) -> str:
    return "" if computed == claimed else f"{what} is {computed}, the file says {claimed}"


def _far(what: str, computed: float, claimed: float | None) -> str:
    """As `_differs`, up to rounding; NaN is written as null."""
    same = math.isnan(computed) if claimed is None else abs(computed - claimed) <= SAME * abs(computed)
    return "" if same else _differs(what, computed, claimed)
