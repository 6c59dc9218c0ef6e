"""Two processes that share a CLMR batch must compute the loss, the gradient and the running statistics of one process that holds all of it."""
import functools

import pytest
import torch
from lightning_fabric import Fabric

from musicssl.augment import draw_seeds
from musicssl.devices import share

import two_ranks


@pytest.fixture(scope="module")
def ranks(as_pair): return as_pair(two_ranks.run)


@pytest.fixture(scope="module")
def found(ranks): return ranks[0]


@functools.cache
def alone(encoder, batches=1):
    fabric = Fabric(accelerator="cpu", devices=1)
    model = fabric.setup_module(two_ranks.objective(encoder))
    return two_ranks.step(fabric, model, [two_ranks.batch(number) for number in range(batches)])


def largest_difference(one, two, what="gradient"):
    return max((a - b).abs().max().item() for a, b in zip(one[what], two[what], strict=True))


def flat(result):
    return torch.cat([g.flatten() for g in result["gradient"]])


@pytest.mark.parametrize("encoder", ["frames", "samplecnn"])
@pytest.mark.parametrize("batches", [1, two_ranks.MICRO])
def test_two_processes_equal_one(found, encoder, batches):
    one, two = alone(encoder, batches), found[encoder if batches == 1 else f"{encoder}, micro-batches"]
    assert max(g.abs().max() for g in one["gradient"]) > 1e-3, "a gradient this small would prove nothing"
    assert abs(one["loss"] - two["loss"]) <= 1e-6
    assert largest_difference(one, two) <= 1e-6
    if encoder == "samplecnn":
        assert max((s - s.round()).abs().max() for s in one["statistics"]) > 1e-3, "nothing was followed"
        assert largest_difference(one, two, "statistics") <= 1e-6


def test_both_processes_agree(ranks):
    for name in ("frames", "samplecnn", "samplecnn, micro-batches"):
        assert ranks[0][name]["loss"] == ranks[1][name]["loss"] and largest_difference(*(r[name] for r in ranks)) == 0


def test_mutation_statistics_apart(found):
    one = alone("samplecnn")
    assert abs(one["loss"] - found["statistics apart"]["loss"]) > 1e-4
    assert largest_difference(one, found["statistics apart"]) > 1e-4
    assert largest_difference(one, found["statistics apart"], "statistics") > 1e-4


def test_mutation_statistics_without_gradient(found):
    one = alone("samplecnn")
    assert abs(one["loss"] - found["statistics without gradient"]["loss"]) <= 1e-6, "the loss does not betray this mistake"
    assert largest_difference(one, found["statistics without gradient"]) > 1e-4


def test_mutation_seeds_of_its_own(found):
    one = alone("samplecnn")
    assert abs(one["loss"] - found["seeds of its own"]["loss"]) > 1e-4


def test_mutation_never_synchronised(ranks):
    one, names = alone("samplecnn", two_ranks.MICRO), [r["never synchronised"] for r in ranks]
    assert largest_difference(one, names[0]) > 1e-4 and largest_difference(*names) > 1e-4


def test_mutation_a_gather_without_gradients_trains_nothing(found):
    assert all(g is None for g in found["sync_grads=False"]["gradient"])


def test_mutation_a_gather_of_the_local_slice_halves_the_gradient(found):
    one = alone("frames")
    assert abs(one["loss"] - found["local slice"]["loss"]) <= 1e-6, "the loss does not betray this mistake"
    assert largest_difference(one, found["local slice"]) > 1e-4
    torch.testing.assert_close(flat(found["local slice"]), flat(one) / two_ranks.RANKS, atol=1e-6, rtol=0)


def test_mutation_views_joined_before_the_gather_find_wrong_partners(found):
    one = alone("frames")
    assert abs(one["loss"] - found["joined first"]["loss"]) > 1e-3
    assert torch.nn.functional.cosine_similarity(flat(one), flat(found["joined first"]), dim=0) < .9


def test_mutation_without_a_gather_there_are_fewer_wrong_answers(found):
    one = alone("frames")
    assert found["no gather"]["loss"] < one["loss"] - .1
    assert largest_difference(one, found["no gather"]) > 1e-4


def test_one_process_draws_what_it_drew_without_row_seeds():
    """Seeds drawn first from the batch's generator are what the objective would have drawn from it."""
    clmr, losses = two_ranks.objective("frames"), []
    for seeds in (lambda generator: None, lambda generator: draw_seeds(two_ranks.SONGS, generator)):
        whole, generator = two_ranks.batch(), torch.Generator().manual_seed(6)
        whole.seeds, whole.generator = seeds(generator), generator
        losses.append(clmr(whole)["loss"].item())
    assert losses[0] == losses[1]


def test_row_seeds_reach_the_views():
    """A row's views do not depend on the rows beside it, on the generator, or on how many devices share the batch."""
    whole = two_ranks.batch()
    views = two_ranks.clmr_views(whole.wave, two_ranks.objective("frames").chain, seeds=whole.seeds)
    for world in (2, 4, 8):
        mine = share(whole, 1, world)
        shared = two_ranks.clmr_views(mine.wave, two_ranks.objective("frames").chain, seeds=mine.seeds)
        for one, two in zip(views, shared): torch.testing.assert_close(two, one[1::world], atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", two_ranks.NORMS)
def test_batch_normalisation_of_unequal_shares_equals_one_process(ranks, kind):
    assert norm_difference(kind, [r[kind] for r in ranks]) <= 1e-6


@pytest.mark.parametrize("mutation", ["without gradient", "apart", "not followed"])
def test_mutations_of_batch_normalisation(ranks, mutation):
    assert norm_difference("waves", [r[f"waves, {mutation}"] for r in ranks]) > 1e-3


def norm_difference(kind, two):
    """Largest relative difference to one process: rows joined, gradients of parameters summed, statistics of both."""
    one = two_ranks.norm_case(kind)
    pairs = [(one[name], torch.cat([r[name] for r in two])) for name in ("out", "input")]
    pairs += [(one[name], sum(r[name] for r in two)) for name in ("weight", "bias")]
    pairs += [(one[name], r[name]) for name in ("running_mean", "running_var", "num_batches_tracked") for r in two]
    return max(((a - b).abs().max() / a.abs().max().clamp_min(1)).item() for a, b in pairs)


def test_one_row_in_all_is_refused_everywhere(ranks):
    assert [r["one row in all"] for r in ranks] == [("ValueError", "got 1 value per channel on all devices together, wanted at least 2")] * 2


def test_an_error_on_the_first_process_is_raised_on_all(ranks):
    first, second = (r["errors"] for r in ranks)
    assert first["held"] == second["held"] and first["held"][0] == "Locked" and "is held by" in first["held"][1]
    assert first["own text"] == second["own text"] == ("OutOfMemory", "ran out of memory at batch 64; the largest that fits is 48")
    assert first["unsendable error"] == second["unsendable error"] == ("RuntimeError", "Local: of a class nobody else knows")
    assert first["unsendable value"] == second["unsendable value"] and "pickle" in first["unsendable value"][1]


def test_a_value_of_the_first_process_reaches_all(ranks):
    assert [r["errors"]["value"] for r in ranks] == [("value", {"rank": 0})] * 2
    assert [r["errors"]["free"] for r in ranks] == [("value", None)] * 2


def test_mutation_an_error_that_is_not_passed_on(ranks):
    assert [r["nothing passed on"][0] for r in ranks][0] == "Local" != ranks[1]["nothing passed on"][0]
