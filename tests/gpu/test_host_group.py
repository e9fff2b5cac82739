"""Collectives through host memory give the results of gloo's own."""

import pytest
import torch
from torch import distributed

from gpu import host_group


def results(backend: str) -> list[torch.Tensor]:
    if backend == host_group.NAME:
        host_group.register()
    distributed.init_process_group(backend)
    rank, size = distributed.get_rank(), distributed.get_world_size()
    mine = torch.arange(6.0).view(3, 2) + 10 * rank
    gathered, pieces = torch.empty(size * 3, 2), [torch.empty(3, 2) for _ in range(size)]
    summed, broadcast, scattered = mine.clone(), mine.clone(), torch.empty(3, 2)
    distributed.all_reduce(summed)
    distributed.broadcast(broadcast, 1)
    distributed.all_gather_into_tensor(gathered, mine)
    distributed.all_gather(pieces, mine)
    distributed.reduce_scatter_tensor(scattered, torch.cat([mine, 2 * mine]))
    exchanged = torch.empty(4 if rank else 2, 2)
    distributed.all_to_all_single(exchanged, mine, [2, 2] if rank else [1, 1], [1, 2])
    passed = mine.clone()
    if rank:
        distributed.recv(passed, 0)
    else:
        distributed.send(mine, 1)
    with distributed._coalescing_manager():
        distributed.all_reduce(coalesced := mine.clone())
        distributed.all_reduce(other := 2 * mine)
    received, collected = torch.empty(3, 2), [torch.empty(3, 2) for _ in range(size)] if rank else None
    distributed.scatter(received, [mine, 3 * mine] if rank else None, src=1)
    distributed.gather(mine, collected, dst=1)
    objects = [None] * size
    distributed.all_gather_object(objects, {"rank": rank})
    assert [found["rank"] for found in objects] == list(range(size))
    distributed.barrier()
    return [
        summed,
        broadcast,
        gathered,
        *pieces,
        scattered,
        exchanged,
        passed,
        received,
        *(collected or []),
        coalesced,
        other,
    ]


def test_the_results_are_those_of_gloo():
    from gpt_oss_vision.bridge.mcore import cpu

    for found, expected in zip(
        cpu.run_ranks(2, results, host_group.NAME), cpu.run_ranks(2, results, "gloo"), strict=True
    ):
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("operation", [distributed.ReduceOp.MAX, distributed.ReduceOp.AVG], ids=str)
def test_other_reductions(operation):
    from gpt_oss_vision.bridge.mcore import cpu

    expected = 1.0 if operation == distributed.ReduceOp.MAX else 0.5
    assert cpu.run_ranks(2, reduced, operation) == [expected, expected]


def reduced(operation) -> float:
    host_group.register()
    distributed.init_process_group(host_group.NAME)
    value = torch.tensor(float(distributed.get_rank()))
    distributed.all_reduce(value, operation)
    return float(value)
