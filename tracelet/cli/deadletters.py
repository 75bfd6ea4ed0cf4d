"""`tracelet ship --dead-letters`: what was refused goes out once more, and what is thought of it now is said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tracelet.cli.facts import Facts
from tracelet.cli.text import count, plain
from tracelet.shipper.deadletter import DeadLetters, Letter
from tracelet.shipper.reship import why_not

__all__ = ["Pile", "piles_of", "run"]


@dataclass(frozen=True, slots=True)
class Pile:
    """What one destination refused of a run, and has not taken since."""

    kind: str
    letters: DeadLetters
    ready: Sequence[Letter]  # can be sent again
    stays: Mapping[str, int]  # how many can't, by why

    @property
    def size(self) -> int:
        """How many lines."""
        return len(self.ready) + sum(self.stays.values())


def piles_of(facts: Facts) -> list[Pile]:
    """What still stands in the dead-letter files of a run. Cost: reads them."""
    piles = []
    for path in sorted(facts.folder.glob("rejected-*.jsonl")):
        identity = path.name.removeprefix("rejected-").removesuffix(".jsonl")
        letters = DeadLetters(facts.folder, identity)
        openings = letters.openings()
        ready, stays = [], Counter[str]()
        for letter in letters.waiting():
            why = why_not(letter, openings)
            if why is None:
                ready.append(letter)
            else:
                stays[why] += 1
        if ready or stays:
            kind = next((d.kind for d in facts.destinations if d.id == identity), identity)
            piles.append(Pile(kind, letters, ready, stays))
    return piles


def run(deliver: Callable[[Facts, str], bool], found: Sequence[Facts], ids: Mapping[str, str]) -> int:
    """Send again, run by run, with `deliver(facts, short id)`. 1 if something is left of one of them."""
    with_some = [(facts, piles) for facts in found if (piles := piles_of(facts))]
    if not with_some:
        print("No dead letters.")
        return 0
    left = False
    for facts, piles in reversed(with_some):  # the oldest run first
        short = ids[facts.run_id]
        if any(pile.ready for pile in piles):
            left = not deliver(facts, short) or left
        for pile in piles:
            left = not _tell(f"{short} {plain(facts.title, 40)}", pile) or left
    return 1 if left else 0


def _tell(title: str, pile: Pile) -> bool:
    """What became of a pile; whether nothing of it is left."""
    before = {letter.digest for letter in pile.ready}
    again = [letter for letter in pile.letters.waiting() if letter.digest in before]
    taken = len(before) - len({letter.digest for letter in again})
    if before:
        print(f"{title}: {count(taken, 'dead letter')} of {len(before):,} taken by {pile.kind}")
    if again:
        print(
            f"  {count(len(again), 'other')} not: refused again, or not reached. The first was a {again[0].what}:"
            f" {plain(again[0].line.get('reason'), 200)}"
        )
    for why, number in pile.stays.items():
        print(f"  {count(number, 'line')} of {pile.letters.path} can't be sent again: {why}")
    return not again and not pile.stays
