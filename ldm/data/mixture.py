"""Which subject, and which size of picture, each row of a run has: a function of the row's index alone.

Turns are given out by weight and not drawn at random, so that a small batch too has its share of each subject.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Place(NamedTuple):
    """The bucket and the subject of a row, and how many rows of both there were before it."""

    bucket: int
    subject: int
    turn: int


@dataclass(frozen=True)
class Mixture:
    """Gives each row its place. All rows of a step share a bucket, over all its batches and processes.

    shares: shares[bucket][subject] from 0, in any unit: how often rows of the run have both. rows: those of one step.
    """

    shares: tuple[tuple[float, ...], ...] = ((1.0,),)
    rows: int = 1

    def at(self, index: int) -> Place:
        """The place of the row with this index. A bucket's rows are shared out among its own subjects."""
        step, row = divmod(index, self.rows)
        bucket, before = turn_of([sum(subjects) for subjects in self.shares], step)
        return Place(bucket, *turn_of(self.shares[bucket], before * self.rows + row))


def turn_of(weights: list[float] | tuple[float, ...], turn: int) -> tuple[int, int]:
    """The item that has this turn, 0, 1, ..., and how many turns it had before.

    Webster's (Sainte-Lague's) rule for seats of a parliament: the next turn is for the item whose weight / (2 n + 1) is
    the largest, n being its turns so far. After any turn each item has its share, up to about one turn.
    weights: one an item, not negative, and not all 0; an item of weight 0 has no turn.
    """
    # An item of share s has its turn n at the time (n + 1/2) / s. The turns up to this early time are counted at once.
    early = max(0, turn - len(weights))
    counts = [int(early * weight / sum(weights) + 0.5) if weight else 0 for weight in weights]
    item = 0
    for _ in range(turn + 1 - sum(counts)):
        item = max(range(len(weights)), key=lambda i: weights[i] / (2 * counts[i] + 1))
        counts[item] += 1
    return item, counts[item] - 1
