"""The relation loss against direct formulas, finite differences and its own limits."""

import pytest
import torch
from torch import nn

from mpqsearch.distill import TRDSpec, find_feature_module, relation_loss, window_relation_loss
from mpqsearch.distill.trd import FeatureTap, pool_positions
from mpqsearch.errors import ConfigError, ModelError, UnknownNameError
from tests.support import tiny_dit, tiny_unet


def positions(seed: int, n: int = 2, p: int = 6, c: int = 5) -> torch.Tensor:
    return torch.randn(n, p, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loops(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> float:
    """The same number, one pair of positions at a time."""
    total = 0.0
    n, p, _ = student.shape
    for sample in range(n):
        for i in range(p):
            rows = []
            for side in (teacher[sample], student[sample]):
                cosines = torch.tensor(
                    [torch.cosine_similarity(side[i], side[j], dim=0) for j in range(p)], dtype=torch.float64
                )
                rows.append(torch.softmax(cosines / temperature, 0))
            total += float((rows[0] * (rows[0] / rows[1]).log()).sum())
    return total / (n * p)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_loss_is_the_mean_kl_of_rows_of_cosines(temperature: float) -> None:
    student, teacher = positions(0), positions(1)
    # Squared norms carry an epsilon of 1e-8, so cosines differ by about as much.
    assert float(relation_loss(student, teacher, temperature)) == pytest.approx(
        by_loops(student, teacher, temperature), rel=1e-6
    )


def test_gradient_agrees_with_finite_differences() -> None:
    teacher = positions(1)
    student = positions(0).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: relation_loss(s, teacher, 0.3), (student,))


def test_equal_sides_have_zero_loss_and_zero_gradient() -> None:
    student = positions(0).requires_grad_()
    loss = relation_loss(student, student.detach().clone(), 0.1)
    loss.backward()
    assert float(loss.detach()) == 0.0
    # Both sides run the same operations, so q - p is zero but for the rounding of exp and sum.
    assert float(student.grad.abs().max()) < 1e-14


def test_only_relations_count_neither_scale_nor_rotation_of_features() -> None:
    student = positions(0)
    rotation, _ = torch.linalg.qr(positions(9, 1, 5, 5)[0])
    assert float(relation_loss(3 * student @ rotation, student, 0.1)) < 1e-7


def test_a_window_of_one_is_plain_relation_distillation() -> None:
    window = window_relation_loss([positions(0)], [positions(1)], 0.2)
    assert torch.equal(window, relation_loss(positions(0), positions(1), 0.2))


def test_a_window_compares_means_and_reaches_every_step() -> None:
    students = [positions(i).requires_grad_() for i in range(3)]
    teachers = [positions(10 + i) for i in range(3)]
    loss = window_relation_loss(students, teachers, 0.2)
    expected = relation_loss(torch.stack(students).mean(0), torch.stack(teachers).mean(0), 0.2)
    assert torch.equal(loss, expected)
    loss.backward()
    grads = [s.grad for s in students]
    assert all(float(g.abs().max()) > 1e-4 for g in grads)
    assert torch.equal(grads[0], grads[2])  # the mean treats its members alike


def test_pooling_bounds_positions_and_keeps_means() -> None:
    maps = torch.randn(2, 3, 28, 28)
    pooled = pool_positions(maps, 14)
    assert pooled.shape == (2, 196, 3)
    direct = maps.reshape(2, 3, 14, 2, 14, 2).mean((3, 5)).flatten(2).transpose(1, 2)
    assert float((pooled - direct).abs().max()) < 1e-6
    assert pool_positions(maps, 64).shape == (2, 784, 3)
    tokens = maps.flatten(2).transpose(1, 2)
    assert torch.equal(pool_positions(tokens, 14), pooled)  # a square number of tokens is a grid
    assert pool_positions(torch.randn(2, 300, 3), 16).shape == (2, 256, 3)
    assert pool_positions(torch.randn(2, 9, 3), 16).shape == (2, 9, 3)
    with pytest.raises(ModelError, match=r"\(2, 3\)"):
        pool_positions(torch.randn(2, 3), 16)


def test_features_are_found_in_unets_and_transformers() -> None:
    assert find_feature_module(tiny_unet()) == "up_blocks.1"
    assert find_feature_module(tiny_dit()) == "transformer_blocks.1"

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_unet()

    assert find_feature_module(Holder()) == "inner.up_blocks.1"
    with pytest.raises(ModelError, match=r"distill.relation.feature"):
        find_feature_module(nn.Linear(2, 2))


def test_tap_reads_a_module_by_name_and_leaves_no_hook() -> None:
    model = tiny_unet()
    x, t, c = torch.randn(2, 1, 8, 8), torch.tensor([3, 4]), torch.tensor([0, 1])
    with FeatureTap(model, "up_blocks.1", 4) as tap:
        model(x, t, class_labels=c)
        first = tap.take()
        assert first.shape == (2, 16, 8)
        model(x[:1], t[:1], class_labels=c[:1])
        model(x[1:], t[1:], class_labels=c[1:])
        # Two calls of one sample each round differently from one call of two.
        assert float((tap.take() - first).abs().max()) < 1e-5
        with pytest.raises(ModelError, match="did not run"):
            tap.take()
    assert not model.up_blocks[1]._forward_hooks
    with pytest.raises(UnknownNameError, match=r"up_blocks\.1"):
        FeatureTap(model, "up_blocks.11", 4)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"window": 0}, "window"),
        ({"temperature": 0.0}, "temperature"),
        ({"weight": -1.0}, "weight"),
        ({"pooled_size": 65}, "pooled_size"),
    ],
)
def test_bad_options_are_refused(bad: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TRDSpec(**bad)


def test_sides_of_different_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(2, 6, 5\).*\(2, 4, 5\)"):
        window_relation_loss([positions(0)], [positions(1, p=4)], 0.1)


def test_the_image_tokens_of_a_joint_block_are_read() -> None:
    class Joint(nn.Module):
        def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> tuple:
            return encoder_hidden_states, 2 * hidden_states

    model = nn.ModuleDict({"blocks": nn.ModuleList([Joint()])})
    image, text = torch.randn(2, 4, 3), torch.randn(2, 9, 3)
    with FeatureTap(model, "", 4) as tap:
        model["blocks"][0](hidden_states=image, encoder_hidden_states=text)  # type: ignore[index]
        assert torch.equal(tap.take(), 2 * image)
        model["blocks"][0](image, text)  # type: ignore[index]
        assert torch.equal(tap.take(), 2 * image)
