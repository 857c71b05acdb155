"""When a trial is killed, and who dies: drawn from a seed."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Victims: TypeAlias = Literal["itself", "others", "all"]
Launcher: TypeAlias = Literal["hetegen", "torchrun"]

VICTIMS: tuple[Victims, ...] = ("itself", "others", "all")

MOMENTS = {
    "step": "anywhere in a training step",
    "backward": "in the backward pass, which changes the tables",
    "staging": "while the state is copied, some tensors done",
    "writing": "while a shard is written in the background, some blocks done",
    "marker": "between all shards of a checkpoint and the marker that makes it complete",
    "pruning": "while an old checkpoint is removed, some files gone",
    "evaluation": "in an evaluation between two parts of the training",
    "finish": "between the last step and the results of the final evaluation",
    "start-up": "killed in a step, and again while it resumes",
}
"""Kinds of trials, with what they mean."""

RESUME_POINTS = 4
"""Passes of `start-up` in an attempt that resumes, see `rank.put_probes`."""

_SKIPPED_SHARE = 0.15
"""Of the occurrences of a moment; most kills shall find a checkpoint."""

_LAST_SHARE = 0.25
"""Of the kills, at the last occurrence: nothing comes after it that could make up for what it breaks."""


@dataclass(frozen=True)
class Kill:
    """One SIGKILL, or several at once."""

    moment: str
    rank: int
    """The rank that has to come to the moment."""
    occurrence: int
    """Which time it does, from 1, counted from the start of its process."""
    fraction: float
    """How far into the moment, where it takes time: in [0, 1)."""
    victims: Victims
    """Seen from that rank. `all` takes the launcher too, as when a machine is lost."""

    def __str__(self) -> str:
        return f"{self.moment} {self.occurrence} of rank {self.rank} kills {self.victims}"


@dataclass(frozen=True)
class Trial:
    """One training that is killed."""

    index: int
    moment: str
    """The kind of trial: the moment of its last kill."""
    launcher: Launcher
    """What starts the ranks, and starts them again when one of them died."""
    kills: tuple[Kill, ...]
    """In order; each belongs to an attempt of its own."""


def draw_trial(seed: int, index: int, passes: Sequence[Mapping[str, int]]) -> Trial:
    """One trial, a function of the arguments. Kinds come in turn, and from round to round other victims.

    Args:
        seed: of the campaign.
        index: of the trial, from 0.
        passes: by rank, how often the reference came to each moment.
    """
    generator = random.Random(f"{seed}/{index}")
    round_, kind = divmod(index, len(MOMENTS))
    moment = list(MOMENTS)[kind]
    victims = VICTIMS[(round_ + kind) % len(VICTIMS)]
    launcher: Launcher = generator.choice(("hetegen", "torchrun"))
    kills = [_draw_kill(generator, "step" if moment == "start-up" else moment, victims, passes)]
    if moment == "start-up":
        rank, occurrence = generator.randrange(len(passes)), generator.randint(1, RESUME_POINTS)
        kills.append(Kill(moment, rank, occurrence, generator.random(), victims))
    return Trial(index, moment, launcher, tuple(kills))


def _draw_kill(
    generator: random.Random, moment: str, victims: Victims, passes: Sequence[Mapping[str, int]]
) -> Kill:
    """A random pass of a moment by a random rank of those that come to it; some are for rank 0 only."""
    rank = generator.choice([rank for rank, counts in enumerate(passes) if counts.get(moment)])
    last = passes[rank][moment]
    first = last if generator.random() < _LAST_SHARE else 1 + int(_SKIPPED_SHARE * last)
    return Kill(moment, rank, generator.randint(first, last), generator.random(), victims)
