from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mpqsearch.core import (
    BitMap,
    KeptParameter,
    LayerSpec,
    LayerTable,
    Policy,
    QuantFormat,
    SensitivityProfile,
    size_bits,
)
from mpqsearch.errors import InfeasibleBudgetError, UnknownNameError
from mpqsearch.export import ExportJob, get_exporter
from mpqsearch.export.allocation import (
    allocate_for,
    formats_of,
    probed_losses,
    resolve_job,
    shrunk_losses,
    target_errors,
    target_losses,
    target_squares,
    uniform_maps,
)
from mpqsearch.export.gguf import TYPES, GgufTarget
from mpqsearch.export.mlx import MlxTarget
from mpqsearch.quant.tables import row_errors
from mpqsearch.specs.targets import FULL

TARGET = GgufTarget()
TABLE = LayerTable(
    digest="d",
    layers=(
        LayerSpec(name="conv", kind="Conv2d", weight_shape=(8, 4, 3, 3)),
        LayerSpec(name="wide", kind="Linear", weight_shape=(8, 256), fuse="t"),
        LayerSpec(name="narrow", kind="Linear", weight_shape=(8, 64), fuse="t"),
        LayerSpec(name="alone", kind="Linear", weight_shape=(4, 96), role="last"),
    ),
    kept=(KeptParameter(name="norm", n_values=16, reason="norm"),),
)
FORMATS = formats_of(TARGET, TABLE)
GROUPS = {"fused": ("qkv",)}
TOGETHER = Policy(roles={}, groups=GROUPS)
"""The two layers in the middle share their format."""


def losses(seed: int) -> dict[str, list[float]]:
    rng = np.random.default_rng(seed)
    return {
        la.name: (rng.lognormal(size=len(FORMATS)) * 4.0 ** -np.array([TYPES[f][0] for f in FORMATS])).tolist()
        for la in TABLE
    }


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
        values = [
            sum(0.0 if n == FULL else table[la.name][FORMATS.index(n)] for la, n in zip(TABLE, p, strict=True))
            for p in maps
        ]
        best = min(v for v, s in zip(values, sizes, strict=True) if s <= limit)
        made = allocate_for(TARGET, TABLE, table, limit, TOGETHER)
        assert made.loss == pytest.approx(best)
        assert made.stored.total == size(tuple(made.choices.get(la.name, FULL) for la in TABLE)) <= limit
        assert made.choices.get("wide") == made.choices.get("narrow")


def test_the_plan_takes_the_formats_as_they_are() -> None:
    made = allocate_for(TARGET, TABLE, losses(0), size((FULL, "Q5_0", "Q5_0", "Q4_1")), TOGETHER)
    job = ExportJob(table=TABLE, bit_map=made.bit_map, choices=made.choices)
    plan = TARGET.plan(job)
    assert {e.layer: e.choice for e in plan if e.choice} == made.choices
    assert TARGET.promise(job, plan).total == made.stored.total


def test_budgets_that_do_not_fit() -> None:
    with pytest.raises(InfeasibleBudgetError, match="smallest file of gguf takes"):
        allocate_for(TARGET, TABLE, losses(0), 1000, TOGETHER)


def test_a_policy_fixes_the_width() -> None:
    made = allocate_for(TARGET, TABLE, losses(0), 10**6, Policy(roles={"last": 4}, groups=GROUPS))
    assert TYPES[made.choices["alone"]][0] == 4
    fixed = allocate_for(TARGET, TABLE, losses(0), 10**6, Policy(roles={"last": 7}, groups=GROUPS))
    assert "alone" not in fixed.choices, "no type of 7 bits: full precision"


def test_a_map_that_fits_nowhere_becomes_the_smallest_file() -> None:
    made = allocate_for(TARGET, TABLE, losses(0), 1000, TOGETHER, at_least_smallest=True)
    assert made.stored.total == min(size(p) for p in every_map()) == made.limit


def test_a_policy_ties_the_projections_that_are_fused() -> None:
    layers = tuple(LayerSpec(name=n, kind="Linear", weight_shape=(8, 64), fuse="qkv") for n in "qkv")
    table = LayerTable(digest="d", layers=layers, kept=())
    formats = formats_of(TARGET, table)
    one = {n: [10.0 ** (3 * i - TYPES[f][0]) for f in formats] for i, n in enumerate("qkv")}
    limit = 8 * 8 * 64 * 3 * 6 // 8
    free, tied = (
        allocate_for(TARGET, table, one, limit, Policy(roles={}, groups=groups)) for groups in ({}, {"fused": ("qkv",)})
    )
    assert len(set(free.choices.values())) > 1
    assert len(set(tied.choices.values())) == 1


def test_formats_that_a_map_did_not_ask_for_are_called_resolved() -> None:
    weights = {"conv": 4, "wide": 3, "narrow": 5, "alone": 16}
    bit_map = BitMap(model_digest="d", weights={n: np.array(w, dtype=np.uint8) for n, w in weights.items()})
    choices = {"conv": FULL, "wide": "Q4_0", "narrow": "Q5_1", "alone": FULL}
    plan = {e.layer: e for e in TARGET.plan(ExportJob(table=TABLE, bit_map=bit_map, choices=choices))}
    assert {n: e.reason for n, e in plan.items()} == {
        "conv": "unsupported_kind",
        "wide": "resolved",
        "narrow": "exact",
        "alone": "kept_full_precision",
    }
    assert (plan["wide"].choice, plan["narrow"].choice, plan["alone"].choice) == ("Q4_0", "Q5_1", "")
    left = TARGET.plan(ExportJob(table=TABLE, bit_map=bit_map, choices=choices | {"narrow": FULL}))[2]
    assert (left.reason, left.will_get) == ("resolved", 16)
    with pytest.raises(UnknownNameError, match="gguf format of 'wide'"):
        TARGET.plan(ExportJob(table=TABLE, bit_map=bit_map, choices={"wide": "Q5_X"}))


def small_model() -> tuple[LayerTable, torch.nn.Module]:
    torch.manual_seed(0)
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(64, 8), "b": torch.nn.Linear(64, 4)})
    layers = tuple(LayerSpec(name=n, kind="Linear", weight_shape=tuple(module[n].weight.shape)) for n in "ab")
    return LayerTable(digest="d", layers=layers, kept=()), module


def profile_of(table: LayerTable, module: torch.nn.Module, unit: np.ndarray | None) -> SensitivityProfile:
    """A profile in which a unit of squared weight error costs ``unit`` ``[C, W]``; None: a profile of the weights
    alone."""
    widths = (2, 4, 8)
    rows = [
        row_errors(module[la.name].weight, la, b, QuantFormat(), None).square().sum(1) for la in table for b in widths
    ]
    weight = np.concatenate(
        [np.stack([r.detach().numpy() for r in rows[3 * i : 3 * i + 3]], axis=1) for i in range(len(table))]
    )
    arrays = {"weight_error/asymmetric": weight}
    if unit is not None:
        arrays |= {"output_error/asymmetric": weight * unit, "sensitivity": np.ones(len(weight))}
    return SensitivityProfile(
        model_digest="d",
        names=("a", "b"),
        channels=(8, 4),
        widths=widths,
        arrays={k: v.astype(np.float32) for k, v in arrays.items()},
    )


def test_losses_are_the_targets_own_errors_at_the_price_of_the_profile() -> None:
    table, module = small_model()
    weights = {n: m.weight for n, m in module.items()}
    formats = formats_of(TARGET, table)
    own = {n: e.double().square().sum(-1).numpy() for n, e in target_errors(TARGET, table, module).items()}  # [F, C]
    for name, choice in (("a", "Q4_0"), ("b", "Q8_0")):  # the oracle of the errors: the format itself
        decoded = TARGET.round_trip(
            weights[name], table[name], next(c for c in TARGET.choices(table[name]) if c.name == choice)
        )
        expected = (decoded - weights[name]).double().square().sum(1).detach().numpy()
        np.testing.assert_allclose(own[name][formats.index(choice)], expected, rtol=1e-6)
    squared = target_squares(TARGET, table, weights.__getitem__)
    alone = target_losses(squared, table, profile_of(table, module, None))
    unit = np.random.default_rng(0).lognormal(size=(12, 3))
    priced = target_losses(squared, table, profile_of(table, module, unit))
    column = {"Q4_0": 1, "Q8_0": 2}  # formats whose error is nearest to that of 4 and 8 bits
    for name, part in (("a", slice(0, 8)), ("b", slice(8, 12))):
        np.testing.assert_allclose(alone[name], own[name].sum(1), rtol=1e-6)
        for choice, w in column.items():
            row = own[name][formats.index(choice)]
            np.testing.assert_allclose(priced[name][formats.index(choice)], (row * unit[part, w]).sum(), rtol=1e-5)


def test_prices_are_shrunk_from_the_profiles_to_one_for_all() -> None:
    rng = np.random.default_rng(1)
    squared = {n: rng.lognormal(size=(2, 3)) for n in "ab"}
    losses = {"a": np.array([3.0, 1.0]), "b": np.array([0.0, 0.5])}
    kept = shrunk_losses(losses, squared, 0.0)
    np.testing.assert_allclose(kept["a"], losses["a"])
    np.testing.assert_allclose(kept["b"][1], 0.5)
    assert kept["b"][0] > 0, "no layer is free"
    level = {n: v / squared[n].sum(1) for n, v in shrunk_losses(losses, squared, 1.0).items()}
    np.testing.assert_allclose(np.concatenate(list(level.values())), level["a"][0])
    half = shrunk_losses(losses, squared, 0.5)["a"]
    np.testing.assert_allclose(half, np.sqrt(losses["a"] * level["a"] * squared["a"].sum(1)))


def test_uniform_maps_keep_to_a_policy_where_there_is_one() -> None:
    plain = uniform_maps(TARGET, TABLE)
    held = uniform_maps(TARGET, TABLE, Policy(roles={}, overrides={"wide": 8, "alone": 16}))
    assert set(plain["Q4_0"].choices.values()) == {"Q4_0"}
    assert held["Q4_0"].choices["wide"] == "Q8_0"
    assert "alone" not in held["Q4_0"].choices


def test_targets_that_keep_our_codes_are_priced_with_our_errors() -> None:
    table, module = small_model()
    target = MlxTarget()
    fmt = QuantFormat(n_candidates=8)
    errors = target_errors(target, table, module, fmt)
    for layer in table:
        for choice in target.choices(layer):
            found = errors[layer.name][formats_of(target, table).index(choice.name)]
            expected = row_errors(module[layer.name].weight.detach(), layer, choice.width, fmt, None)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("seed", range(6))
def test_with_interactions_it_is_near_the_best_map_of_all(seed: int) -> None:
    """Errors of different formats that may cancel, and half of that believed."""
    formats = (*FORMATS, FULL)
    rng = np.random.default_rng(seed)
    scale = 2.0 ** -np.array([TYPES[f][0] for f in FORMATS])
    sign = rng.choice([-1.0, 1.0], size=(len(TABLE), len(FORMATS)))
    effect = scale * (rng.normal(size=(64, 1, 1)) * sign + 0.3 * rng.normal(size=(64, len(TABLE), len(FORMATS))))
    maps = list(itertools.product(*[[*(c.name for c in TARGET.choices(la)), FULL] for la in TABLE]))
    sizes = np.array([size(p) for p in maps])
    limit = int(sizes.min() + 0.4 * (sizes.max() - sizes.min()))
    whole = np.concatenate([effect, np.zeros((64, len(TABLE), 1))], axis=2)
    columns = np.array([[formats.index(f) for f in p] for p in maps])
    picked = whole[:, np.arange(len(TABLE)), columns]
    expected = 0.5 * (np.square(picked.sum(-1)) + np.square(picked).sum(-1)).mean(0)
    losses_of, pairs = probed_losses(effect, TABLE, coupling=0.5)
    together, alone = (allocate_for(TARGET, TABLE, losses_of, limit, pairs=p) for p in (pairs, None))
    found, without = (tuple(made.choices.get(la.name, FULL) for la in TABLE) for made in (together, alone))
    assert size(found) <= limit
    assert expected[maps.index(found)] <= 1.05 * expected[sizes <= limit].min()
    assert expected[maps.index(found)] <= expected[maps.index(without)]
    assert together.loss == pytest.approx(
        sum(losses_of[la.name][FORMATS.index(f)] for la, f in zip(TABLE, found, strict=True) if f != FULL)
    )


def test_a_map_for_something_else_is_solved_again_at_its_size() -> None:
    bits = {"conv": 16, "wide": 3, "narrow": 3, "alone": 8}
    bit_map = BitMap(model_digest="d", weights={n: np.array(b, dtype=np.uint8) for n, b in bits.items()})
    job = ExportJob(table=TABLE, bit_map=bit_map)
    solved = resolve_job(TARGET, job, lambda: (losses(0), None), TOGETHER)
    plan = TARGET.plan(solved)
    limit = max(size_bits(TABLE, bit_map), min(size(p) for p in every_map()))
    assert TARGET.promise(solved, plan).total <= limit
    assert solved.choices["conv"] == FULL
    assert solved.choices["wide"] == solved.choices["narrow"], "tied layers share their format"
    held = BitMap(model_digest="d", weights=bit_map.weights | {"wide": np.array(4), "narrow": np.array(4)})
    as_it_is = ExportJob(table=TABLE, bit_map=held)
    assert resolve_job(TARGET, as_it_is, lambda: pytest.fail("nothing to solve"), Policy()) is as_it_is


def test_three_levels_are_not_taken_for_a_target_that_has_four() -> None:
    layer = LayerSpec(name="blocks.0.any", kind="Linear", weight_shape=(256, 256))
    table = LayerTable(digest="d", layers=(layer,))
    for scheme, reason in {"symmetric": "exact", "ternary": "rounded_up"}.items():
        fmt = QuantFormat(scheme=scheme)
        job = ExportJob(table=table, bit_map=BitMap(model_digest="d", weights={layer.name: np.array(2)}, format=fmt))
        (entry,) = get_exporter("quanto").plan(job)
        assert (entry.will_get, entry.reason) == (2, reason)
        assert ("no codes of three levels" in entry.detail) == (scheme == "ternary")
