from __future__ import annotations

import itertools

import numpy as np
import pytest

from mpqsearch.core import KeptParameter, LayerSpec, LayerTable, Policy
from mpqsearch.errors import ConfigError, InfeasibleBudgetError
from mpqsearch.export import ExportJob
from mpqsearch.export.allocation import FULL, allocate_for, formats_of, uniform_for
from mpqsearch.export.gguf import TYPES, GgufExporter

TARGET = GgufExporter()
TABLE = LayerTable(
    digest="d",
    layers=(
        LayerSpec(name="conv", kind="Conv2d", weight_shape=(8, 4, 3, 3)),
        LayerSpec(name="wide", kind="Linear", weight_shape=(8, 256), tie="t"),
        LayerSpec(name="narrow", kind="Linear", weight_shape=(8, 64), tie="t"),
        LayerSpec(name="alone", kind="Linear", weight_shape=(4, 96), role="last"),
    ),
    kept=(KeptParameter(name="norm", n_values=16, reason="norm"),),
)
FORMATS = formats_of(TARGET, TABLE)


def losses(seed: int) -> dict[str, list[float]]:
    rng = np.random.default_rng(seed)
    return {la.name: (rng.lognormal(size=len(FORMATS)) * 4.0 ** -np.array([TYPES[f][0] for f in FORMATS])).tolist() for la in TABLE}


def size(picked: tuple[str, ...]) -> int:
    return 32 * 16 + sum(
        TARGET.cost(la, next((c for c in TARGET.choices(la) if c.name == name), None)).total
        for la, name in zip(TABLE, picked, strict=True)
    )


def every_map() -> list[tuple[str, ...]]:
    offered = [[*(c.name for c in TARGET.choices(la)), FULL] for la in TABLE]
    return [p for p in itertools.product(*offered) if p[1] == p[2]]


def test_it_is_the_best_of_all_maps_of_that_size() -> None:
    maps = every_map()
    for seed, share in itertools.product(range(3), (0.1, 0.3, 0.7)):
        table = losses(seed)
        sizes = [size(p) for p in maps]
        limit = int(min(sizes) + share * (max(sizes) - min(sizes)))
        values = [sum(0.0 if n == FULL else table[la.name][FORMATS.index(n)] for la, n in zip(TABLE, p, strict=True)) for p in maps]
        best = min(v for v, s in zip(values, sizes, strict=True) if s <= limit)
        made = allocate_for(TARGET, TABLE, table, limit)
        assert made.loss == pytest.approx(best)
        assert made.stored.total == size(tuple(made.choices.get(la.name, FULL) for la in TABLE)) <= limit
        assert made.choices.get("wide") == made.choices.get("narrow")


def test_the_plan_takes_the_formats_as_they_are() -> None:
    made = allocate_for(TARGET, TABLE, losses(0), size((FULL, "Q5_0", "Q5_0", "Q4_1")))
    job = ExportJob(table=TABLE, bit_map=made.bit_map, choices=made.choices, rounding="error")
    plan = TARGET.plan(job)
    assert {e.layer: e.choice for e in plan if e.choice} == made.choices
    assert TARGET.promise(job, plan).total == made.stored.total


def test_budgets_that_do_not_fit_and_formats_that_no_layer_has() -> None:
    with pytest.raises(InfeasibleBudgetError, match="smallest file of gguf takes"):
        allocate_for(TARGET, TABLE, losses(0), 1000)
    small = LayerTable(digest="d", layers=TABLE.layers[:1])
    with pytest.raises(ConfigError, match="no layer of the model can take 'Q4_0'"):
        uniform_for(TARGET, small, "Q4_0")


def test_a_policy_fixes_the_width() -> None:
    made = allocate_for(TARGET, TABLE, losses(0), 10**6, Policy(roles={"last": 4}))
    assert TYPES[made.choices["alone"]][0] == 4
    fixed = allocate_for(TARGET, TABLE, losses(0), 10**6, Policy(roles={"last": 7}))
    assert "alone" not in fixed.choices, "no type of 7 bits: full precision"


def test_uniform_is_the_type_where_it_fits() -> None:
    made = uniform_for(TARGET, TABLE, "Q4_K")
    assert made.choices == {"wide": "Q4_K"}
    assert made.stored.payload == 4 * 2048
    assert made.stored.metadata == 8 * 16 * 8
