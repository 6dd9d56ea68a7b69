"""A model whose layers lie on several processes and that is called as if they did not.

    model = ShardedModel(backbone, bounds, chunks=4, ranks=ranks)
    logits = model(input_ids)           # every process calls it with the same batch
    (loss_of(logits) + model.auxiliary_loss()).backward()

A batch goes through the processes in chunks, so that they compute at the same time. The functions
of autograd below send hidden states forward, and in the backward pass gradients back; autograd
runs the chunks from the last to the first, on every process alike.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from danon.distributed.stages import BackboneStage
from danon.models import Backbone
from danon.training.ranks import Ranks

__all__ = ["ShardedModel"]


class Links:
    """Messages between neighbouring processes; sends wait for nobody.

    Args:
        ranks: all processes; process i has stage i.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.rank, self.last = ranks.rank, ranks.world_size - 1
        self._sent: list[tuple[Any, Tensor]] = []

    def send(self, to: int, *tensors: Tensor) -> None:
        """Send tensors to a process."""
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            self._sent.append((dist.isend(whole, to), whole))

    def receive(self, source: int, *like: Tensor) -> tuple[Tensor, ...]:
        """Return tensors of a process, in the order in which it sends them."""
        received = tuple(torch.empty_like(x) for x in like)
        for tensor in received:
            dist.recv(tensor, source)
        return received

    def settle(self) -> None:
        """Wait until all that was sent has arrived."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()


class _Arrive(torch.autograd.Function):
    """Hidden states and auxiliary losses of the process before; their gradients go back to it."""

    @staticmethod
    def forward(ctx: Any, links: Links, anchor: Tensor, x: Tensor, auxiliary: Tensor) -> Any:
        ctx.links = links
        return links.receive(links.rank - 1, x, auxiliary)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.links.send(ctx.links.rank - 1, *grads)
        return None, None, None, None


class _Depart(torch.autograd.Function):
    """Hidden states and auxiliary losses for the process behind, which returns their gradients."""

    @staticmethod
    def forward(ctx: Any, links: Links, x: Tensor, auxiliary: Tensor) -> Tensor:
        ctx.links = links
        ctx.like = torch.empty_like(x, memory_format=torch.contiguous_format, device="meta")
        ctx.like_auxiliary = torch.empty_like(auxiliary, device="meta")
        ctx.device = x.device
        links.send(links.rank + 1, x, auxiliary)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        like = (torch.empty_like(y, device=ctx.device) for y in (ctx.like, ctx.like_auxiliary))
        return None, *ctx.links.receive(ctx.links.rank + 1, *like)


class _Lend(torch.autograd.Function):
    """A weight of the first process for the last one, which returns its gradient."""

    @staticmethod
    def forward(ctx: Any, links: Links, weight: Tensor) -> Tensor:
        ctx.links = links
        ctx.save_for_backward(weight)
        links.send(links.last, weight)
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return None, *ctx.links.receive(ctx.links.last, *ctx.saved_tensors)


class _Borrow(torch.autograd.Function):
    """A weight of the first process, to which its gradient goes."""

    @staticmethod
    def forward(ctx: Any, links: Links, anchor: Tensor, like: Tensor) -> Tensor:
        ctx.links = links
        return links.receive(0, like)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.links.send(0, grad)
        return None, None, None


class _Publish(torch.autograd.Function):
    """The outputs of the last process on every process.

    Elsewhere than there their gradient is dropped: the last process has it, too.
    """

    @staticmethod
    def forward(ctx: Any, links: Links, out: Tensor, auxiliary: Tensor, *tokens: Tensor) -> Any:
        ctx.links, ctx.tokens = links, len(tokens)
        results = tuple(x.detach().clone().contiguous() for x in (out, auxiliary))
        for result in results:
            dist.broadcast(result, links.last)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        tokens = [grads[0].new_zeros(()) for _ in range(ctx.tokens)]
        if ctx.links.rank == ctx.links.last:
            return None, *grads, *tokens
        return None, None, None, *tokens


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Call a function of autograd."""
    return function.apply(*args)


class ShardedModel(nn.Module):
    """A model in stages, one on each process. Its modules have the names of the model's.

    Parameters of other processes are empty. An optimizer over all parameters moves those that this
    process has.

    Args:
        model: whole model.
        chunks: parts that a batch goes through the processes in.
        ranks: processes, several.
    """

    stage: BackboneStage

    def __init__(self, model: Backbone, chunks: int, ranks: Ranks) -> None:
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        self.chunks, self.ranks = chunks, ranks
        # Not modules of this one: the children are.
        self.__dict__["whole"] = model
        self._links = Links(ranks)
        self._auxiliary: Tensor | None = None

    def use(self, stage: BackboneStage, final: BackboneStage) -> None:
        """Compute with other stages from now on.

        Args:
            stage: of this process.
            final: of the last process, for the shapes of its outputs.
        """
        self.__dict__["stage"], self.__dict__["final"] = stage, final

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the outputs of the model; every process calls it with the same batch.

        Args:
            input_ids: as the model takes it (B, N).
            attention_mask: as the model takes it (B, N).
        """
        whole: Backbone = self.__dict__["whole"]
        whole.check_inputs(input_ids, attention_mask)
        stage, final, links = self.stage, self.__dict__["final"], self._links
        links.settle()
        stage.train(self.training)
        stage.keep_draw_keys()
        chunks = math.gcd(len(input_ids), self.chunks)
        device = self.ranks.device
        anchor = torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())
        tokens, outs, losses = [], [], []
        weight: dict[str, Tensor] = {}
        if whole.task == "lm" and stage.enters:
            tokens.append(_apply(_Lend, links, stage.embed.weight))
        elif whole.task == "lm" and stage.leaves:
            shape = whole.config.vocab_size, whole.config.hidden_size
            like = torch.empty(shape, dtype=stage.embed.weight.dtype, device=device)
            weight["embed.weight"] = _apply(_Borrow, links, anchor, like)
        for rows in torch.arange(len(input_ids)).chunk(chunks):
            here = rows.to(device)
            given: dict[str, Tensor] = {"rows": rows}
            if attention_mask is not None:
                given["attention_mask"] = attention_mask[here]
            taken: tuple[Tensor, ...] = (input_ids[here],)
            if not stage.enters:
                shapes = stage.travelling({"input_ids": input_ids[here]})[0]
                like_taken = (torch.empty_like(x, device=device) for x in shapes)
                taken = _apply(_Arrive, links, anchor, *like_taken)
            x, auxiliary = torch.func.functional_call(stage, weight, taken, given)
            if stage.leaves:
                outs.append(x)
                losses.append(auxiliary)
            else:
                tokens.append(_apply(_Depart, links, x, auxiliary))
        stage.restore_draw_keys()
        results: tuple[Tensor, ...]
        if stage.leaves:
            results = torch.cat(outs), torch.cat(losses)
        else:
            shapes = final.travelling({"input_ids": input_ids})[1]
            results = tuple(torch.empty(x.shape, dtype=x.dtype, device=device) for x in shapes)
        out, auxiliary = _apply(_Publish, links, *results, *tokens)
        self._auxiliary = auxiliary.mean()
        return out  # type: ignore[no-any-return]

    def auxiliary_loss(self) -> Tensor:
        """Return the auxiliary loss of the last forward pass, of all layers.

        Raises:
            ValueError: there was none.
        """
        if self._auxiliary is None:
            raise ValueError("auxiliary_loss before a forward pass: call the model first")
        return self._auxiliary

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the gradient of the whole model and return its norm before.

        torch's function of that name would see the parameters of this process alone.

        Args:
            max_norm: largest norm.
        """
        square = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for parameter in self.parameters():
            if parameter.grad is not None:
                square += torch.linalg.vector_norm(parameter.grad).double().square()
        dist.all_reduce(square)
        norm = square.sqrt()
        nn.utils.clip_grads_with_norm_(self.parameters(), max_norm, norm)
        return norm
