"""How far a text is from the one that was expected, word by word."""

import re

_WORD = re.compile(r"[a-z0-9]+")


def words_off(said: str, truth: str) -> float:
    """Return 1 - ROUGE-L: 0 for the same words in the same order, 1 where none is shared.

    ROUGE-L is the harmonic mean of the shares that the longest common subsequence of words has in either text; case
    and punctuation do not count. Source: Lin, ROUGE, 2004, section 3.
    """
    ours, theirs = _WORD.findall(said.lower()), _WORD.findall(truth.lower())
    if not ours or not theirs:
        return float(ours != theirs)
    return 1 - 2 * _common(ours, theirs) / (len(ours) + len(theirs))


def _common(one: list[str], other: list[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        above = row
        row = [0]
        for column, candidate in enumerate(other):
            row.append(above[column] + 1 if word == candidate else max(row[-1], above[column + 1]))
    return row[-1]
