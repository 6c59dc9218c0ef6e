"""Two processes that share a CLMR batch must compute the loss and the gradient of one process that holds all of it."""
import socket
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "workers"))
import two_ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path_factory.mktemp("two_ranks") / "found.pt"
    torch.multiprocessing.spawn(two_ranks.run, args=(port, str(out)), nprocs=two_ranks.RANKS)
    return torch.load(out, weights_only=True)


def alone(encoder):
    return two_ranks.step(two_ranks.objective(encoder), two_ranks.batch(), torch.Tensor.backward)


def largest_difference(one, two):
    return max((a - b).abs().max().item() for a, b in zip(one["gradient"], two["gradient"], strict=True))


def flat(result):
    return torch.cat([g.flatten() for g in result["gradient"]])


@pytest.mark.parametrize("encoder", ["frames", "samplecnn, norms at rest"])
def test_two_processes_equal_one(found, encoder):
    one = alone(encoder)
    assert max(g.abs().max() for g in one["gradient"]) > 1e-3, "a gradient this small would prove nothing"
    assert abs(one["loss"] - found[encoder]["loss"]) <= 1e-6
    assert largest_difference(one, found[encoder]) <= 1e-6


def test_batch_norm_breaks_the_equality_unless_synchronised(found):
    assert largest_difference(alone("samplecnn"), found["samplecnn"]) > 1e-4


def test_synchronised_batch_norm_needs_a_gpu(found):
    assert "GPU" in found["SyncBatchNorm"], "SyncBatchNorm runs on the CPU now: test SampleCNN in training mode with it"


def test_a_gather_without_gradients_trains_nothing(found):
    assert all(g is None for g in found["sync_grads=False"]["gradient"])


def test_a_gather_of_the_local_slice_halves_the_gradient(found):
    one = alone("frames")
    assert abs(one["loss"] - found["local slice"]["loss"]) <= 1e-6, "the loss does not betray this mistake"
    assert largest_difference(one, found["local slice"]) > 1e-4
    torch.testing.assert_close(flat(found["local slice"]), flat(one) / two_ranks.RANKS, atol=1e-6, rtol=0)


def test_views_joined_before_the_gather_find_wrong_partners(found):
    one = alone("frames")
    assert abs(one["loss"] - found["joined first"]["loss"]) > 1e-3
    assert torch.nn.functional.cosine_similarity(flat(one), flat(found["joined first"]), dim=0) < .9


def test_without_a_gather_there_are_fewer_wrong_answers(found):
    one = alone("frames")
    assert found["no gather"]["loss"] < one["loss"] - .1
    assert largest_difference(one, found["no gather"]) > 1e-4
