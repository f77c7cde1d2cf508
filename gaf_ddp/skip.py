"""Leaving out the optimizer step, exactly, when nothing agreed: zero gradients would still decay and coast."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gaf_ddp.given import require_state
from gaf_ddp.monitor.records import Decision
from gaf_ddp.state import GAFState

_MOST = 63  # backwards before a step that are looked at, of an optimizer that does not step


def skip_on_disagreement(optimizer: Optimizer, state: GAFState) -> Callable[[], None]:
    """Make `optimizer.step()` leave out what the ranks did not agree on: no momentum, no decay, no step count.

    Model scope leaves out the whole step, bucket scope the parameters of each bucket that disagreed. Works for
    every optimizer, with a closure, under GradScaler, and from the very first step. Every rank decides alike. After
    several backwards a parameter is left out if none that made its gradient agreed.

    Cost: one host sync a step; none in model scope for a fused optimizer (its kernels read the veto on the
    device, as they read GradScaler's), save the steps before SGD's momentum exists.

    The gradients left out become None. To drive `optimizer.step()` by hand instead, in model scope:
    `if state.agreement.agreed: optimizer.step()`, at one host sync.

    Args:
        optimizer: steps over parameters of the model that state filters.
        state: the hook's state.

    Returns:
        A function that undoes this.

    Raises:
        TypeError: optimizer or state is not what its name says.
    """
    optimizer = unwrapped(optimizer)
    require_state(state)
    veto = _Veto(state)
    handles: list[RemovableHandle] = [
        optimizer.register_step_pre_hook(veto.before_step),
        optimizer.register_step_post_hook(veto.after_step),
    ]

    followers = state._records.followers
    followers.append(veto.follow)

    def undo() -> None:
        if handles:
            followers.remove(veto.follow)
        while handles:
            handles.pop().remove()

    return undo


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside of what Accelerate, Fabric and Lightning wrap around one.

    Their wrappers are Optimizers without an Optimizer's hooks, around one that has them.

    Raises:
        TypeError: it is no optimizer.
    """
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, found {type(optimizer).__name__}")
    return optimizer


class _Veto:
    """The two step hooks and what the second must put back."""

    def __init__(self, state: GAFState) -> None:
        self._state = state
        self.steps: list[list[Decision]] = []  # what backwards decided on the gradients that there are
        self._stepped = False  # the optimizer, by these
        self._borrowed: dict[str, Any] | None = None  # the optimizer's own found_inf and grad_scale

    def follow(self, decided: list[Decision]) -> None:
        """Take in what another backward decided."""
        before = [] if self._stepped else self.steps[-_MOST:]
        self.steps, self._stepped = [*before, decided], False

    def before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Veto now, or after the closure if there is one: the decision is taken in its backward."""
        this, *given = args
        closure = kwargs.get("closure", given[0] if given else None)
        if closure is None:
            self._veto(optimizer)
            return None

        def closure_then_veto() -> Any:
            loss = closure()
            if not self._state.watch:
                self._drop_gradients(optimizer)
            return loss

        return (this, closure_then_veto, *given[1:]), {k: v for k, v in kwargs.items() if k != "closure"}

    def after_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Put back what was borrowed for the veto; what is decided next is another step's."""
        self._stepped = True
        if self._borrowed is None:
            return
        for name in ("found_inf", "grad_scale"):
            if name in self._borrowed:
                setattr(optimizer, name, self._borrowed[name])
            else:
                delattr(optimizer, name)
        self._borrowed = None

    def _veto(self, optimizer: Any) -> None:
        if self._state.watch:
            return
        steps = self.steps
        if self._state.scope == "model" and len(steps) == 1 and self._reads_found_inf(optimizer, steps[0]):
            disagreed = (~steps[0][0].agreement.agreed).float()
            self._borrowed = {k: v for k, v in vars(optimizer).items() if k in ("found_inf", "grad_scale")}
            found_inf: Tensor | None = self._borrowed.get("found_inf")
            optimizer.found_inf = disagreed if found_inf is None else torch.maximum(found_inf, disagreed)
            optimizer.grad_scale = self._borrowed.get("grad_scale")
        else:
            self._drop_gradients(optimizer)

    def _drop_gradients(self, optimizer: Any) -> None:
        """Set the gradients that nothing agreed on to None, which every optimizer passes over."""
        decisions = [decision for step in self.steps for decision in step]
        if not decisions:
            return
        agreed = torch.stack([decision.agreement.agreed for decision in decisions]).tolist()  # one host sync
        self._state._catch_up()  # raises what is wrong with them, now that the host has waited
        refused = {
            id(parameter): parameter
            for decision, fine in zip(decisions, agreed, strict=True)
            if not fine
            for parameter in decision.parameters
        }
        for parameter in refused.values():
            # After several backwards it may be the sum of one that agreed and one that did not.
            if len(self.steps) == 1 or (parameter.grad is not None and not parameter.grad.any()):
                parameter.grad = None
        _even_out_momentum(optimizer)

    def _reads_found_inf(self, optimizer: Any, decisions: list[Decision]) -> bool:
        """Return whether the step can be vetoed on the device, for all of the optimizer's parameters at once."""
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            return False
        filtered = {id(parameter) for parameter in decisions[0].parameters}
        stepped = [(p, g) for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        return all(
            id(p) in filtered
            # Fused SGD whose first step is vetoed keeps an uninitialised momentum buffer: wait until it exists.
            and (not g.get("momentum") or optimizer.state[p].get("momentum_buffer") is not None)
            for p, g in stepped
        )


def _even_out_momentum(optimizer: Any) -> None:
    """Give fused SGD zero momentum where it has none yet: it takes first steps for all parameters or for none."""
    for group in optimizer.param_groups:
        if group.get("fused") and group.get("momentum"):
            states = [(p, optimizer.state[p]) for p in group["params"] if p.grad is not None]
            if any(state.get("momentum_buffer") is not None for _, state in states):
                for p, state in states:
                    if state.get("momentum_buffer") is None:
                        state["momentum_buffer"] = torch.zeros_like(p)
