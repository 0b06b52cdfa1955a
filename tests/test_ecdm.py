"""Expected channel damage against the published values, Monte-Carlo activities and scans over single channels."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ecdm import REACH, activity, crowded, deallocate, ecdm, prefix, rank, reallocate, shares


def test_activity_has_the_values_of_the_published_form() -> None:
    scale, shift = torch.tensor([1, 0.5, 0.01, 1, 0.02, 0.8]), torch.tensor([0, 0.1, -0.5, 0.2, -0.3, 0])
    wanted = torch.tensor([0.398942, 0.253447, 0, 0.506895, 0, 0.319154])
    torch.testing.assert_close(activity(scale, shift), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(activity(-scale, shift), wanted, rtol=0, atol=1e-6)
    flat = activity(torch.zeros(3), torch.tensor([-1.0, 0.0, 2.0]))
    assert flat.tolist() == [0.0, 0.0, 2.0] and flat.dtype == torch.float32


def test_activity_is_the_mean_of_a_rectified_normal() -> None:
    draws = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for scale, shift in ((1.0, 0.3), (0.7, -0.9), (-2.0, 0.5), (0.1, 1.0)):
        samples = (scale * draws + shift).relu()
        error = 4 * float(samples.std()) / len(draws) ** 0.5
        assert float(activity(torch.tensor(scale), torch.tensor(shift))) == pytest.approx(float(samples.mean()), abs=error)


@pytest.mark.parametrize("ratio", [-9.0, -6.0, -3.0, 4.0])
def test_activity_is_precise_where_almost_nothing_gets_through(ratio: float) -> None:
    y = torch.linspace(0, 12, 400_001, dtype=torch.float64)
    density = torch.exp(-((y - ratio) ** 2) / 2) / (2 * torch.pi) ** 0.5
    for scale in (1.0, 1e-3):
        found = activity(torch.tensor(scale), torch.tensor(scale * ratio))
        assert float(found) == pytest.approx(scale * float(torch.trapezoid(y * density, y)), rel=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-8, 1e30])
def test_activity_is_a_number_at_every_scale(scale: float) -> None:
    found = activity(torch.full((5,), scale), torch.tensor([-1e30, -1.0, 0.0, 1.0, 1e30]))
    assert found.isfinite().all() and (found >= 0).all() and (found.diff() >= 0).all()


def test_the_damage_matrix_sums_each_kernel_with_its_sign_activity_and_gate() -> None:
    torch.manual_seed(0)
    weight, mean, gate = torch.randn(4, 5, 3, 2), torch.rand(5), torch.tensor([1.0, 0, 1, 1, 0])
    matrix = ecdm(weight.bfloat16(), mean, gate)
    assert matrix.shape == (4, 5) and matrix.dtype == torch.float32
    for o in range(4):
        for i in range(5):
            wanted = float(mean[i]) * float(gate[i]) * sum(weight.bfloat16()[o, i].flatten().tolist())
            assert float(matrix[o, i]) == pytest.approx(wanted, abs=1e-5)


def test_shares_of_an_output_sum_to_1() -> None:
    matrix = torch.randn(6, 9) * torch.logspace(-3, 3, 6)[:, None]
    matrix[4] = 0
    torch.testing.assert_close(shares(matrix).sum(1), torch.tensor([1.0, 1, 1, 1, 0, 1]), rtol=0, atol=1e-4)
    assert (shares(matrix) >= 0).all()


@st.composite
def damages(draw: st.DrawFn) -> Tensor:
    """Damage matrices (O, I) of very unequal channels, some of them closed."""
    outputs, inputs, closed = draw(st.integers(1, 8)), draw(st.integers(1, 19)), draw(st.sampled_from([0.0, 0.2, 0.6]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    matrix = torch.randn(outputs, inputs, generator=generator) * torch.rand(inputs, generator=generator) ** 8
    return matrix * (torch.rand(inputs, generator=generator) >= closed)


def scan(matrix: Tensor, gamma: float) -> set[int]:
    """The prefix that the authors' loop closes, channel by channel."""
    parts = [[abs(v) / (sum(map(abs, row)) + 1e-8) for v in row] for row in matrix.double().tolist()]
    order = sorted(range(matrix.shape[1]), key=lambda i: max(row[i] for row in parts))
    closed: list[int] = []
    for i in order:
        if max(sum(row[j] for j in [*closed, i]) for row in parts) > gamma:
            return set(closed)
        closed.append(i)
    return set()  # all of it could go: nothing does


@given(damages(), st.sampled_from([0.001, 0.05, 0.3, 0.9]))
def test_deallocation_closes_the_longest_prefix_whose_damage_stays_within_gamma(matrix: Tensor, gamma: float) -> None:
    closed = deallocate(matrix, gamma)
    assert set(closed.nonzero().flatten().tolist()) == scan(matrix, gamma)
    parts = matrix.abs() / matrix.abs().sum(1, keepdim=True).clamp(min=1e-30)
    if closed.any():
        assert parts[:, closed].sum(1).max() <= gamma + 1e-6
        following = parts.amax(0).masked_fill(closed, 2.0).argmin()
        assert parts[:, closed].sum(1).add(parts[:, following]).max() > gamma - 1e-6


@given(damages(), st.sampled_from([0.01, 0.3, 0.7]), st.integers(1, 24))
def test_a_multiple_keeps_the_most_damaging_channels_up_to_it(matrix: Tensor, gamma: float, multiple: int) -> None:
    channels = matrix.shape[1]
    free, kept = deallocate(matrix, gamma), deallocate(matrix, gamma, multiple)
    left = channels - int(kept.sum())
    assert left == min(channels, -(-(channels - int(free.sum())) // multiple) * multiple)
    assert not (kept & ~free).any()
    parts = shares(matrix).amax(0)
    assert not kept.any() or parts[kept].max() <= parts[~kept].min()


@given(damages(), st.floats(0.001, 0.999), st.floats(0.001, 0.999), st.integers(1, 6))
def test_a_larger_gamma_closes_more_of_the_same_ranking(matrix: Tensor, one: float, other: float, multiple: int) -> None:
    assume(matrix.abs().sum(1).max() > 1e-3)  # rows near the 1e-8 beside which they are divided have shares of less than 1 in all
    less, more = (prefix(rank(matrix).lost, gamma, multiple) for gamma in sorted((one, other)))
    assert less <= more < matrix.shape[1] or not matrix.any()
    assert not (deallocate(matrix, min(one, other)) & ~deallocate(matrix, max(one, other))).any()


def test_closed_channels_stay_closed_and_without_any_damage_nothing_is_closed() -> None:
    matrix = torch.tensor([[0.0, 5.0, 0.0, 4.0, 0.001], [0.0, 4.0, 0.0, 5.0, 0.0]])
    assert deallocate(matrix, 0.05).tolist() == [True, False, True, False, True]
    assert not deallocate(torch.zeros(3, 4), 0.05).any()
    assert not deallocate(torch.eye(4), 0.5).any()  # each channel is all that one output has
    # Of channels that are worth nothing, those that are closed come first: the open ones are left at a multiple.
    idle = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    closed = torch.tensor([False, False, True, True, False, *[False] * 5])
    assert deallocate(idle, 0.01, 4, closed).tolist() == closed.tolist()
    assert int(deallocate(idle, 0.01, 3, closed).sum()) == 4


def refilled(gate: Tensor, pointer: Tensor, best: list[int], draws: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Sources and pointers slot by slot, as in the authors' loop."""
    free = [slot for slot, value in enumerate(gate.tolist()) if value == 0]
    sources, pointers = [], pointer.tolist()
    for slot, draw in zip(free, draws, strict=True):
        source = best[draw]
        sources.append(source)
        pointers[slot] = pointers[source] if pointers[source] >= 0 else source
    return free, sources, pointers


@given(damages(), st.integers(1, 25), st.sampled_from([None, 1, 3]), st.integers(0, 99))
def test_every_closed_slot_reads_what_a_drawn_one_of_the_best_reads(
    matrix: Tensor, count: int, most: int | None, seed: int
) -> None:
    channels, generator = matrix.shape[1], torch.Generator().manual_seed(seed)
    gate = (matrix != 0).any(0).float()
    pointer = torch.randint(-1, channels, (channels,), generator=generator).where(gate > 0, -1)
    found = reallocate(matrix, gate, pointer, count, most, torch.Generator().manual_seed(seed))
    free, living = int((gate == 0).sum()), int(gate.sum())
    if not free or not living:
        assert not len(found.slots) and found.shifts.shape == (0, 2)
        return
    score = [float(column.norm()) for column in shares(matrix).T]
    if most is not None:
        for source in range(channels):
            readers = [slot for slot, channel in enumerate(pointer.tolist()) if channel == source]
            if len(readers) > most:
                for slot in (source, *readers):
                    score[slot] = -0.5
    candidates = [slot for slot in range(channels) if gate[slot]]
    best = sorted(candidates, key=lambda slot: -score[slot])[: min(count, channels)]
    draw = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(best), (free,), generator=draw).tolist()
    slots, sources, pointers = refilled(gate, pointer, best, draws)
    assert (found.slots.tolist(), found.sources.tolist()) == (slots, sources)
    assert pointer.index_copy(0, found.slots, found.channels).tolist() == pointers
    assert found.shifts.shape == (free, 2) and found.shifts.abs().max() <= REACH


def test_shifts_are_uniform_and_sources_too() -> None:
    matrix = torch.cat([torch.zeros(2, 4000), torch.eye(2), torch.full((2, 1), 0.5)], 1)
    gate = torch.cat([torch.zeros(4000), torch.ones(3)])
    found = reallocate(matrix, gate, torch.full((4003,), -1), 3, None, torch.Generator().manual_seed(0))
    assert found.shifts.mean().abs() < 0.05 and float(found.shifts.var()) == pytest.approx(0.75, abs=0.03)
    assert torch.bincount(found.sources - 4000).sub(4000 / 3).abs().max() < 120
    assert float((found.shifts[:, 0] * found.shifts[:, 1]).mean().abs()) < 0.05


def test_nothing_is_opened_without_sources_or_without_a_closed_slot() -> None:
    matrix, generator = torch.rand(3, 4), torch.Generator()
    for gate, count in ((torch.tensor([1.0, 0, 1, 0]), 0), (torch.ones(4), 3), (torch.zeros(4), 3)):
        found = reallocate(matrix * gate, gate, torch.full((4,), -1), count, None, generator)
        assert [len(part) for part in found] == [0, 0, 0, 0]


def test_a_channel_with_more_slots_than_allowed_is_crowded_and_so_are_they() -> None:
    pointer = torch.tensor([-1, 0, 0, 0, -1, 4, 4])
    assert crowded(pointer, 2).tolist() == [True, True, True, True, False, False, False]
    assert not crowded(pointer, 3).any() and crowded(pointer, 1).sum() == 7
