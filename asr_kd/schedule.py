"""Learning rate of every member by its own held-out frame accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PATIENCE = 2
"""Evaluations without growth before a rate is halved: on a few minutes of held-out speech a single one falls by chance, again and again."""


@dataclass(frozen=True)
class ScheduleSettings:
    """Learning rate = base x warm-up x decay x halvings.

    Attributes:
        learning_rate: the base.
        max_epochs: training ends here at the latest.
        warmup_epochs: rises linearly from 0 over this many epochs.
        decay_share: falls linearly to 0 over this last share of `max_epochs` (1: from the start; 0: never).
        halve_below: halve a member's rate when at `PATIENCE` evaluations in a row its held-out accuracy (a fraction) had grown by less than
            this since its best; -1 never does.
        max_halvings: a member stops after more halvings than this.
    """

    learning_rate: float = 1e-3
    max_epochs: float = 6.0
    warmup_epochs: float = 0.05
    decay_share: float = 1.0
    halve_below: float = 0.0
    max_halvings: int = 4


class Schedule:
    """State of the decisions for K members.

    Attributes:
        best: best held-out accuracy of each member so far.
        halvings: how often each member's rate was halved.
        stopped: members that train no further.
        waited: evaluations without growth since each member's best or last halving.
    """

    def __init__(self, settings: ScheduleSettings, num_members: int) -> None:
        self.settings = settings
        self.best = [-1.0] * num_members
        self.halvings = [0] * num_members
        self.stopped = [False] * num_members
        self.waited = [0] * num_members

    def learning_rate(self, member: int, epochs: float) -> float:
        """Rate of a member after `epochs` epochs (a part of one counts)."""
        settings = self.settings
        warmup = min(1.0, (epochs + 1e-4) / settings.warmup_epochs) if settings.warmup_epochs > 0 else 1.0
        decay_epochs = settings.decay_share * settings.max_epochs
        decay = min(1.0, max(0.0, settings.max_epochs - epochs) / decay_epochs) if decay_epochs > 0 else 1.0
        return float(settings.learning_rate * warmup * decay * 0.5 ** self.halvings[member])

    def observe(self, accuracies: Sequence[float]) -> list[bool]:
        """Take in one held-out accuracy per member; tell which members are better than ever."""
        improved = []
        for member, accuracy in enumerate(accuracies):
            better = not self.stopped[member] and accuracy > self.best[member]
            has_grown = accuracy >= self.best[member] + self.settings.halve_below
            self.waited[member] = 0 if has_grown else self.waited[member] + 1
            if not self.stopped[member] and self.waited[member] == PATIENCE:
                self.halvings[member] += 1
                self.waited[member] = 0
                self.stopped[member] = self.halvings[member] > self.settings.max_halvings
            if better:
                self.best[member] = accuracy
            improved.append(better)
        return improved

    def stop(self, member: int) -> None:
        """Train this member no further."""
        self.stopped[member] = True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"best": list(self.best), "halvings": list(self.halvings), "stopped": list(self.stopped), "waited": list(self.waited)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.best, self.halvings, self.stopped, self.waited = (list(state[name]) for name in ("best", "halvings", "stopped", "waited"))


def finite_or_none(values: Sequence[float]) -> list[float | None]:
    """Values as JSON allows them: what is not finite becomes None."""
    return [value if math.isfinite(value) else None for value in values]
