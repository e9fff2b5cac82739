"""A process group whose collectives go through host memory and gloo: several ranks on one GPU, which NCCL refuses."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed import PrefixStore, ProcessGroup, ProcessGroupGloo, Store, Work

NAME = "host"


class Done(Work):
    """The handle of a collective that is complete."""

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class HostGroup(ProcessGroup):
    """Copies inputs to the host, calls gloo, copies outputs back; each call returns when it is complete."""

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta):
        super().__init__(rank, size)
        self.gloo = ProcessGroupGloo(PrefixStore("host", store), rank, size, timeout)

    def getBackendName(self) -> str:
        return NAME

    def broadcast(self, tensors: list, opts: Any = None) -> Work:
        return self._through_host(self.gloo.broadcast, tensors, tensors, opts)

    def allreduce(self, tensors: list, opts: Any = None) -> Work:
        opts = opts or distributed.AllreduceOptions()
        is_mean = opts.reduceOp == distributed.ReduceOp.AVG
        if is_mean:
            opts.reduceOp = distributed.ReduceOp.SUM
        self._through_host(self.gloo.allreduce, tensors, tensors, opts)
        if is_mean:
            for tensor in tensors:
                tensor.div_(self.size())
        return Done()

    def allreduce_coalesced(self, tensors: list, opts: Any = None) -> Work:
        for tensor in tensors:
            self.allreduce([tensor], self._reduction(opts))
        return Done()

    def reduce(self, tensors: list, opts: Any = None) -> Work:
        return self._through_host(self.gloo.reduce, tensors, tensors, opts)

    def scatter(self, outputs: list, inputs: list, opts: Any = None) -> Work:
        """Every piece is broadcast; only the root has them, and the others receive into memory of the same size."""
        (output,), root = outputs, opts.rootRank
        for rank in range(self.size()):
            piece = inputs[0][rank] if self.rank() == root else torch.empty_like(output)
            self._broadcast_from(root, piece)
            if rank == self.rank():
                output.detach().copy_(piece)
        return Done()

    def gather(self, outputs: list, inputs: list, opts: Any = None) -> Work:
        (mine,), root = inputs, opts.rootRank
        pieces = [torch.empty_like(mine) for _ in range(self.size())]
        self.allgather([pieces], [mine])
        if self.rank() == root:
            for output, piece in zip(outputs[0], pieces, strict=True):
                output.detach().copy_(piece)
        return Done()

    def allgather(self, outputs: list, inputs: list, opts: Any = None) -> Work:
        for pieces, mine in zip(outputs, inputs, strict=True):
            for rank, piece in enumerate(pieces):
                if rank == self.rank():
                    piece.detach().copy_(mine)
                self._broadcast_from(rank, piece)
        return Done()

    def _allgather_base(self, output: torch.Tensor, mine: torch.Tensor, opts: Any = None) -> Work:
        return self.allgather([list(output.view(self.size(), *mine.shape).unbind())], [mine])

    def allgather_into_tensor_coalesced(self, outputs: list, inputs: list, opts: Any = None) -> Work:
        for output, mine in zip(outputs, inputs, strict=True):
            self._allgather_base(output, mine)
        return Done()

    def reduce_scatter(self, outputs: list, inputs: list, opts: Any = None) -> Work:
        for output, pieces in zip(outputs, inputs, strict=True):
            for rank, piece in enumerate(pieces):
                total = piece.detach().clone()
                self.allreduce([total], self._reduction(opts))
                if rank == self.rank():
                    output.detach().copy_(total)
        return Done()

    def _reduce_scatter_base(self, output: torch.Tensor, whole: torch.Tensor, opts: Any = None) -> Work:
        return self.reduce_scatter([output], [list(whole.view(self.size(), *output.shape).unbind())], opts)

    def reduce_scatter_tensor_coalesced(self, outputs: list, inputs: list, opts: Any = None) -> Work:
        for output, whole in zip(outputs, inputs, strict=True):
            self._reduce_scatter_base(output, whole, opts)
        return Done()

    def alltoall_base(
        self, output: torch.Tensor, mine: torch.Tensor, to_receive: list[int], to_send: list[int], opts: Any = None
    ) -> Work:
        host = [output.detach().cpu(), mine.detach().cpu()]
        self.gloo.alltoall_base(*host, list(map(int, to_receive)), list(map(int, to_send))).wait()
        output.detach().copy_(host[0])
        return Done()

    def alltoall(self, outputs: list, inputs: list, opts: Any = None) -> Work:
        for sender in range(self.size()):
            for receiver in range(self.size()):
                if self.rank() == sender == receiver:
                    outputs[sender].detach().copy_(inputs[receiver])
                elif self.rank() == sender:
                    self.gloo.send([inputs[receiver].detach().cpu().contiguous()], receiver, 0).wait()
                elif self.rank() == receiver:
                    host = outputs[sender].detach().cpu()
                    self.gloo.recv([host], sender, 0).wait()
                    outputs[sender].detach().copy_(host)
        return Done()

    def send(self, tensors: list, destination: int, tag: int) -> Work:
        self.gloo.send([tensors[0].detach().cpu().contiguous()], destination, tag).wait()
        return Done()

    def recv(self, tensors: list, source: int, tag: int) -> Work:
        host = tensors[0].detach().cpu().contiguous()
        self.gloo.recv([host], source, tag).wait()
        tensors[0].detach().copy_(host)
        return Done()

    def barrier(self, opts: Any = None) -> Work:
        self.gloo.barrier().wait()
        return Done()

    def _through_host(self, collective: Callable, inputs: list, outputs: list, opts: Any) -> Work:
        host = [tensor.detach().cpu().contiguous() for tensor in inputs]
        (collective(host, opts) if opts is not None else collective(host)).wait()
        for output, result in zip(outputs, host, strict=True):
            output.detach().copy_(result)
        return Done()

    def _broadcast_from(self, rank: int, tensor: torch.Tensor) -> None:
        opts = distributed.BroadcastOptions()
        opts.rootRank, opts.rootTensor = rank, 0
        self._through_host(self.gloo.broadcast, [tensor], [tensor], opts)

    @staticmethod
    def _reduction(opts: Any) -> Any:
        reduction = distributed.AllreduceOptions()
        if opts is not None:
            reduction.reduceOp = opts.reduceOp
        return reduction


def register() -> None:
    """Make the backend known to torch, once."""
    if NAME not in distributed.Backend.backend_list:
        distributed.Backend.register_backend(NAME, HostGroup, devices=["cpu", "cuda"])
