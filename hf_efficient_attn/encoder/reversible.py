"""Reversible residual layers: the backward pass computes a layer's inputs from its outputs instead of keeping them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from ..cpu import first_derivatives


Branch = Callable[[Tensor], Tensor]
"""f or g in `y1 = x1 + f(x2)`, `y2 = x2 + g(y1)`: `[batch, length, hidden]` -> the same shape."""

Inverse = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""A layer's inputs from its outputs."""


class ReversibleTape:
    """Passes what one layer's backward pass finds out on to that of the layer before it.

    A layer's outputs are kept until the next layer takes them as its inputs; that one will compute them again. So
    outputs that anything else takes (the last layer's, or any that a hook has changed) stay. Where the gradient comes
    from a layer's outputs alone, the layers after it have no backward pass, and are gone back through without one.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._kept: dict[int, tuple[Tensor, Tensor, tuple[int, int]]] = {}
        self._found: dict[int, tuple[Tensor, Tensor]] = {}
        self._inverses: dict[int, Inverse] = {}

    def take(self, x1: Tensor, x2: Tensor) -> None:
        """A layer's inputs: if they are the last outputs, these need not be kept."""
        last = self._kept.get(self._steps - 1)
        if last is not None and _is_same(x1, last[0], last[2][0]) and _is_same(x2, last[1], last[2][1]):
            del self._kept[self._steps - 1]

    def keep(self, y1: Tensor, y2: Tensor, inverse: Inverse) -> int:
        """A layer's outputs, and how its inputs follow from them; returns its number."""
        # Detached: the graph holds this tape, which must not hold the graph.
        self._kept[self._steps] = (y1.detach(), y2.detach(), (y1._version, y2._version))
        self._inverses[self._steps] = inverse
        self._steps += 1
        return self._steps - 1

    def outputs(self, step: int) -> tuple[Tensor, Tensor]:
        """The outputs of layer `step`, kept or found by the layer after it."""
        if step in self._found and step not in self._kept:
            return self._found.pop(step)
        if step not in self._kept:
            return self._inverses[step + 1](*self.outputs(step + 1))
        y1, y2, versions = self._kept[step]
        if (y1._version, y2._version) != versions:
            raise RuntimeError(
                "the output of a reversible layer was changed in place, but its backward pass needs it; use an "
                "operation that makes a new tensor, or reversible=False."
            )
        return y1, y2

    def find(self, step: int, x1: Tensor, x2: Tensor) -> None:
        """The inputs of layer `step`, which are the outputs of the one before."""
        if step > 0:
            self._found[step - 1] = (x1, x2)


def _is_same(given: Tensor, kept: Tensor, version: int) -> bool:
    """Whether it is the tensor itself, and still what it was."""
    same = given.data_ptr() == kept.data_ptr() and given.shape == kept.shape and given.stride() == kept.stride()
    return same and given._version == version


class _Conditions:
    """Random states and autocast as they are now, to compute the same again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.available = torch.amp.is_autocast_available(device.type)
        if self.available:
            self.enabled = torch.is_autocast_enabled(device.type)
            self.dtype = torch.get_autocast_dtype(device.type)
        self.cpu_state = torch.get_rng_state()
        self.devices: list[int] = []
        if device.type not in ("cpu", "meta"):
            self.devices, self.states = get_device_states(torch.empty(0, device=device))

    def autocast(self) -> AbstractContextManager:
        """Autocast as it was; without its cache, where weights cast without a graph would lose their gradient."""
        if not self.available:
            return nullcontext()
        return torch.autocast(self.device.type, enabled=self.enabled, dtype=self.dtype, cache_enabled=False)

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Random states as they were, until the end of the context."""
        kind = {"device_type": self.device.type} if self.devices else {}
        with torch.random.fork_rng(self.devices, **kind):
            torch.set_rng_state(self.cpu_state)
            if self.devices:
                set_device_states(self.devices, self.states, **kind)
            yield


def reversible_step(
    attend: Branch,
    feed: Branch,
    x1: Tensor,
    x2: Tensor,
    tape: ReversibleTape,
    modules: tuple[nn.Module, nn.Module],
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """`y1 = x1 + attend(x2)`, `y2 = x2 + feed(y1)` without keeping anything of the size of the text for backward.

    Args:
        attend, feed: the branches. Called again in the backward pass, under the same autocast and random state; what
            they hash or draw in another way they have to repeat themselves.
        x1, x2: `[batch, length, hidden]` each.
        tape: one for all layers of a call.
        modules: what the parameters of `attend` and of `feed` are in.
        chunk: `feed` works on each token alone, and does so for this many at a time; 0 for all at once.

    Returns:
        `y1` and `y2`. Inputs are computed from them with a rounding error; gradients are those of the same steps.

    Gomez et al. 2017, arXiv 1707.04585; Kitaev, Kaiser & Levskaya 2020, arXiv 2001.04451. Time twice the forward pass
    and the backward pass of the branches; memory of a layer, whatever their number.
    """
    weights = [[p for p in module.parameters() if p.requires_grad] for module in modules]
    tape.take(x1, x2)
    return _Step.apply(attend, feed, tape, chunk, modules, len(weights[0]), x1, x2, *weights[0], *weights[1])


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        attend: Branch,
        feed: Branch,
        tape: ReversibleTape,
        chunk: int,
        modules: tuple[nn.Module, nn.Module],
        split: int,
        x1: Tensor,
        x2: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.attend, ctx.feed, ctx.tape, ctx.chunk, ctx.split = attend, feed, tape, chunk, split
        ctx.modules, ctx.weights, ctx.training = modules, weights, _modes(modules)
        ctx.for_attention = for_attention = _Conditions(x1.device)
        with for_attention.autocast():
            y1 = x1 + attend(x2)
        ctx.for_feed = for_feed = _Conditions(x1.device)
        y2 = torch.empty_like(x2, memory_format=torch.contiguous_format)
        with for_feed.autocast():
            for part, given, into in zip(*(_parts(x, chunk) for x in (x2, y1, y2)), strict=True):
                torch.add(part, feed(given), out=into)

        # Of its own arguments only: the tape keeps it.
        def inverse(y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad(), for_feed.replay(), for_feed.autocast():
                fed = torch.cat([feed(given) for given in _parts(y1, chunk)], dim=1)
            with torch.no_grad(), for_attention.replay(), for_attention.autocast():
                x2 = y2 - fed
                return y1 - attend(x2), x2

        ctx.step = tape.keep(y1, y2, inverse)
        ctx.save_for_backward(*weights)
        return y1, y2

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, y1_grad: Tensor, y2_grad: Tensor) -> tuple[Tensor | None, ...]:
        # Looked at, because that fails where one was changed in place; hooks may hand out copies.
        weights, _ = ctx.weights, ctx.saved_tensors
        if _modes(ctx.modules) != ctx.training:
            raise RuntimeError(
                "a reversible layer was switched between train() and eval() after its forward pass, which the backward "
                "pass computes again; switch after backward(), or use reversible=False."
            )
        now = {id(p) for module in ctx.modules for p in module.parameters()}
        if any(id(p) not in now for p in ctx.weights):
            # The branches would use the new ones, and the old ones' gradients be 0.
            raise RuntimeError(
                "a reversible layer has other parameters than in its forward pass, for which it cannot be computed "
                "again; take gradients while torch.func.functional_call has them in place, or use reversible=False."
            )
        y1, y2 = ctx.tape.outputs(ctx.step)
        x2 = torch.empty_like(y2, memory_format=torch.contiguous_format)
        y1_total = torch.empty_like(y1_grad, memory_format=torch.contiguous_format)
        feed_grads: list[Tensor | None] = [None] * (len(weights) - ctx.split)
        whole = (y1, y2, y2_grad, x2, y1_grad, y1_total)
        with ctx.for_feed.replay(), ctx.for_feed.autocast():
            for given, after, above, into, beside, total in zip(*(_parts(x, ctx.chunk) for x in whole), strict=True):
                result, grad, grads = _with_grads(ctx.feed, given, above, weights[ctx.split :])
                torch.sub(after, result, out=into)
                torch.add(beside, grad, out=total)
                for number, found in enumerate(grads):
                    feed_grads[number] = found if feed_grads[number] is None else feed_grads[number].add_(found)
        with ctx.for_attention.replay(), ctx.for_attention.autocast():
            result, grad, attention_grads = _with_grads(ctx.attend, x2, y1_total, weights[: ctx.split])
        x1 = y1 - result
        ctx.tape.find(ctx.step, x1, x2)
        return None, None, None, None, None, None, y1_total, y2_grad + grad, *attention_grads, *feed_grads


def _modes(modules: tuple[nn.Module, ...]) -> list[bool]:
    return [part.training for module in modules for part in module.modules()]


def _refuse_others(result: Tensor, known: tuple[Tensor, ...]) -> None:
    """Raises `RuntimeError` where the result depends on another leaf: its gradient would be lost."""
    known_ids = {id(x) for x in known}
    nodes, seen = [result.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known_ids:
            raise RuntimeError(
                f"a reversible layer uses a tensor of shape {list(leaf.shape)} that wants a gradient, but is no "
                "parameter of the layer (a hook's, perhaps); make it one, or use reversible=False."
            )
        nodes.extend(parent for parent, _ in node.next_functions)


def _parts(tensor: Tensor, chunk: int) -> tuple[Tensor, ...]:
    return tensor.split(chunk, dim=1) if chunk > 0 else (tensor,)


def _with_grads(
    branch: Branch, given: Tensor, above: Tensor, weights: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The branch's result, the gradient of what it was given, and those of its weights; zeros where it used none."""
    with torch.enable_grad():
        given = given.detach().requires_grad_()
        result = branch(given)
        _refuse_others(result, (given, *weights))
        grad, *grads = torch.autograd.grad(
            result, (given, *weights), above.to(result.dtype), allow_unused=True, materialize_grads=True
        )
    return result.detach(), grad, tuple(grads)
