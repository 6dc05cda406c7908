"""Distances between blocks, and partitions against an exhaustive search."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator

import pytest
import torch

from foldgpt.errors import UsageError
from foldgpt.families import decoder_of
from foldgpt.folding import fold_, source_model_of
from foldgpt.plan import FoldPlan, Group
from foldgpt.replay import Replay
from foldgpt.sharing.best_donor import with_best_donors
from foldgpt.sharing.distance import SharingCost, weight_distances
from foldgpt.sharing.partition import best_donor, contiguous, contiguous_apart, merged
from models import tiny_model, token_ids

INFINITE = float("inf")


def spans(blocks: list[int], largest: int) -> Iterator[list[tuple[int, ...]]]:
    """All partitions into runs."""
    if not blocks:
        yield []
    for length in range(1, min(largest, len(blocks)) + 1):
        for rest in spans(blocks[length:], largest):
            yield [tuple(blocks[:length]), *rest]


def random_costs(num_blocks: int, seed: int) -> torch.Tensor:
    costs = torch.rand(num_blocks, num_blocks, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return costs.fill_diagonal_(0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("target", [0, 3, 7, 12, 16])
def test_the_best_partition_into_runs_is_found(seed: int, target: int) -> None:
    blocks, costs = [0, 2, 3, 4, 6, 7, 8], random_costs(9, seed)
    sizes = [3, 3, 3, 2, 2, 9, 5, 5, 5]
    found = contiguous(blocks, costs, sizes, target, largest=4)

    def measure(partition: list[tuple[int, ...]]) -> tuple[float, int]:
        chosen = [(group, *best_donor(group, costs)) for group in partition]
        saved = sum(sum(sizes[m] for m in group if m != donor) for group, donor, _ in chosen)
        return sum(cost for _, _, cost in chosen), saved

    possible = [measure(partition) for partition in spans(blocks, 4)]
    assert found.saved >= target
    assert found.cost == pytest.approx(min(cost for cost, saved in possible if saved >= target))
    assert measure(list(found.groups)) == (pytest.approx(found.cost), found.saved)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("target", [0, 4, 8, 11])
def test_the_best_partitions_of_two_parts_are_found(seed: int, target: int) -> None:
    blocks = [0, 1, 2, 4, 5]
    costs = [random_costs(6, seed), 3 * random_costs(6, seed + 100)]
    sizes = [[1, 1, 1, 1, 1, 2], [3, 3, 2, 3, 3, 4]]
    found = contiguous_apart(blocks, costs, sizes, target)

    def measure(part: int, partition: Iterable[tuple[int, ...]]) -> tuple[float, int]:
        chosen = [(group, *best_donor(group, costs[part])) for group in partition]
        saved = sum(sum(sizes[part][m] for m in group if m != donor) for group, donor, _ in chosen)
        return sum(cost for _, _, cost in chosen), saved

    ways = [[measure(part, partition) for partition in spans(blocks, 4)] for part in (0, 1)]
    possible = [one[0] + other[0] for one in ways[0] for other in ways[1] if one[1] + other[1] >= target]
    assert sum(part.cost for part in found) == pytest.approx(min(possible))
    assert sum(part.saved for part in found) >= target
    for part, partition in enumerate(found):
        assert measure(part, partition.groups) == (pytest.approx(partition.cost), partition.saved)
    with pytest.raises(UsageError, match="the most is 14"):
        contiguous_apart(blocks, [torch.ones(6, 6)] * 2, sizes, 100)


def test_nothing_is_shared_without_need() -> None:
    assert contiguous(range(5), random_costs(5, 0), [1] * 5, 0).groups == ()
    assert merged(range(5), random_costs(5, 0), [1] * 5, 0).groups == ()


def test_like_blocks_merge_also_when_they_are_apart() -> None:
    costs = torch.ones(6, 6, dtype=torch.float64).fill_diagonal_(0)
    for one, other in itertools.permutations((0, 2, 5), 2):
        costs[one, other] = 0.01
    found = merged(range(6), costs, [1] * 6, 2)
    assert found.groups == ((0, 2, 5),)
    assert found.cost == pytest.approx(0.02)
    assert contiguous(range(6), costs, [1] * 6, 2).cost > 1


def test_blocks_that_cannot_share_never_do_and_too_much_is_refused() -> None:
    costs = torch.full((6, 6), INFINITE, dtype=torch.float64).fill_diagonal_(0)
    costs[:3, :3] = 1
    costs[3:, 3:] = 1
    costs.fill_diagonal_(0)
    for search in (contiguous, merged):
        assert set(search(range(6), costs, [1] * 6, 4).groups) == {(0, 1, 2), (3, 4, 5)}
        with pytest.raises(UsageError, match="the most is 4"):
            search(range(6), costs, [1] * 6, 5)


def test_the_best_donor_is_the_one_the_others_can_do_with() -> None:
    costs = torch.tensor([[0.0, 5, 5], [1, 0, 1], [4, 4, 0]])
    assert best_donor([0, 1, 2], costs) == (1, 2.0)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen2"])
@torch.no_grad()
def test_a_measured_pair_is_that_of_the_folded_model(family: str) -> None:
    model = tiny_model(family)
    ids = token_ids(model, (4, 16))
    cost = SharingCost(Replay(model, ids, batch_size=2))
    last = {"gemma3": 1, "qwen2": 1}.get(family, 3)
    plan = FoldPlan.create(source_model_of(model), groups=[Group(blocks=(last - 1, last), donor="first")])
    folded = copy.deepcopy(model)
    fold_(folded, plan)
    theirs = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    ours = folded(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    expected = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert cost.pair(last - 1, last) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert cost.pair(last, last) == 0
    costs = cost.pairs(range(6), reach=1)
    assert costs[last - 1, last] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert costs[0, 2] == INFINITE


def test_kinds_are_infinitely_far_apart() -> None:
    model = tiny_model("gemma3")  # block 2 attends to everything, 1 and 3 to a window
    replay = Replay(model, token_ids(model, (3, 16)))
    costs = SharingCost(replay).pairs(range(6), reach=1)
    assert costs[1, 2] == costs[2, 1] == costs[3, 2] == INFINITE
    far = weight_distances(replay)
    assert far["attention"][1, 2] == far["both"][1, 2] == INFINITE
    assert far["mlp"][1, 2] < INFINITE


@torch.no_grad()
def test_distances_are_errors_of_the_outputs() -> None:
    model = tiny_model("llama").double()
    ids = token_ids(model, (3, 16))
    decoder = decoder_of(model)
    decoder.blocks[2].self_attn.load_state_dict(decoder.blocks[4].self_attn.state_dict())
    replay = Replay(model, ids)
    far = weight_distances(replay, reach=3)
    assert far["attention"][2, 4] == far["attention"][4, 2] == 0
    assert far["both"][0, 4] == INFINITE
    inputs: list[torch.Tensor] = []
    handle = decoder.blocks[3].mlp.gate_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    inner: list[torch.Tensor] = []
    down = decoder.blocks[3].mlp.down_proj.register_forward_pre_hook(lambda _, args: inner.append(args[0]))
    model(input_ids=ids, use_cache=False)
    handle.remove()
    down.remove()
    weight = 1 / replay.states[4].square().mean(-1, keepdim=True)
    errors = []
    for part, given, w in (("gate_proj", inputs[0], 1.0), ("up_proj", inputs[0], 1.0), ("down_proj", inner[0], weight)):
        own, other = (decoder.blocks[index].mlp.get_submodule(part)(given) for index in (3, 1))
        errors.append(float(((other - own).square() * w).sum() / (own.square() * w).sum()))
    assert float(far["mlp"][1, 3]) == pytest.approx(sum(errors) / 3, rel=1e-4)


@torch.no_grad()
def test_the_best_member_gives_its_weights() -> None:
    """Blocks 1 and 3 are alike, so block 2 is never the one to give."""
    model = tiny_model("llama")
    blocks = decoder_of(model).blocks
    blocks[3].load_state_dict(blocks[1].state_dict())
    replay = Replay(model, token_ids(model, (4, 16)))
    (group,) = with_best_donors(replay, [Group(blocks=(1, 2, 3), private=("norms", "scales"))])
    assert group.donor == "owner" and group.owner in (1, 3) and group.private == ("norms", "scales")
    cost = SharingCost(replay)
    other = 4 - group.owner
    assert cost.pair(group.owner, 2) <= cost.pair(other, 2)
