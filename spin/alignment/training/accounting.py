"""The account of a split: rows and tokens read = those trained on + those truncated or dropped, by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Account:
    """Counts of one split. Tokens are those of prompts and responses; a row that cannot be encoded has none.

    Attributes:
        rows: rows read.
        kept: rows that are trained on in every epoch (or evaluated).
        tokens: tokens read, before truncation.
        kept_tokens: tokens of the rows that are kept, after truncation.
        truncated: tokens removed from kept rows, by part (``prompts``, ``responses``).
        dropped: rows dropped, by reason.
        dropped_tokens: their tokens, by reason.
    """

    rows: int = 0
    kept: int = 0
    tokens: int = 0
    kept_tokens: int = 0
    truncated: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_tokens: Counter[str] = field(default_factory=Counter)

    @classmethod
    def from_record(cls, counts: Mapping[str, Any]) -> Account:
        """Return the account with these counts: its fields, with mappings for counters."""
        read: dict[str, Any] = {
            name: Counter(count) if isinstance(count, Mapping) else count for name, count in counts.items()
        }
        return cls(**read)

    def keep(self, tokens: int, truncated: tuple[int, int]) -> None:
        """Add a row of ``tokens`` tokens that remain after ``truncated`` ones were removed from prompt and responses."""
        self.rows += 1
        self.kept += 1
        self.tokens += tokens + sum(truncated)
        self.kept_tokens += tokens
        self.truncated["prompts"] += truncated[0]
        self.truncated["responses"] += truncated[1]

    def drop(self, reason: str, tokens: int) -> None:
        """Add a row of ``tokens`` tokens that is dropped."""
        self.rows += 1
        self.tokens += tokens
        self.dropped[reason] += 1
        self.dropped_tokens[reason] += tokens

    def check(self, rows: int, tokens: int) -> None:
        """Check that the encoded rows are those that were counted, and that everything read is accounted for.

        Raises:
            RuntimeError: rows or tokens were lost (an internal error).
        """
        rest = (self.rows - self.dropped.total(), self.tokens - self.truncated.total() - self.dropped_tokens.total())
        if (rows, tokens) != rest or (rows, tokens) != (self.kept, self.kept_tokens):
            raise RuntimeError(
                f"{self.rows} rows and {self.tokens} tokens were read, {rows} rows and {tokens} tokens remain, but "
                f"{rest[0]} rows and {rest[1]} tokens were neither dropped nor truncated"
            )

    def extend(self, other: Account) -> None:
        """Add the counts of further rows; unlike ``+``, a count of 0 stays."""
        for name, count in vars(other).items():
            if isinstance(count, Counter):
                getattr(self, name).update(count)
            else:
                setattr(self, name, getattr(self, name) + count)

    def __add__(self, other: Account) -> Account:
        """Return the account of both together."""
        mine, theirs = vars(self), vars(other)
        return Account(**{name: mine[name] + theirs[name] for name in mine})

    def record(self) -> dict[str, Any]:
        """Return the entry of ``metrics.json``."""
        return {
            "rows": {"read": self.rows, "dropped": dict(self.dropped), "kept": self.kept},
            "tokens": {
                "read": self.tokens,
                "truncated": {name: self.truncated[name] for name in ("prompts", "responses")},
                "dropped": dict(self.dropped_tokens),
                "kept": self.kept_tokens,
            },
        }


def accounting(accounts: Mapping[str, Account], sums: Mapping[str, float]) -> dict[str, Any]:
    """Return the accounts of all splits for ``metrics.json``, and the rows and tokens trained in all steps of the run."""
    trained = {name: int(sums[name]) for name in ("steps", "rows", "tokens")}
    return {**{split: account.record() for split, account in accounts.items()}, "trained": trained}
