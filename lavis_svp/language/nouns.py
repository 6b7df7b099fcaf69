"""Find the known nouns of a text, whatever their number: "two traffic lights" holds the noun "traffic light".

The nouns are those of a table, say of an image classifier's classes (:mod:`lavis_svp.vision.classifier`). Nothing is
learned here, and no tokenizer is involved: places are characters of the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

WORD = re.compile(r"\d*[^\W\d_][^\W_]*(?:['’][^\W_]+)?")
"""A word of any script, with its digits: "dog's", "2nd", "café"; a number alone is none."""
_POSSESSIVE = re.compile("['’]s$")
IRREGULAR_PLURALS = {
    "children": "child",
    "dice": "die",
    "feet": "foot",
    "geese": "goose",
    "loaves": "loaf",
    "men": "man",
    "mice": "mouse",
    "oxen": "ox",
    "people": "person",
    "shelves": "shelf",
    "teeth": "tooth",
    "women": "woman",
}
GENERIC = frozenset({"thing"})
"""Nouns that are never found: they name everything, so they tell nothing."""
COLOUR_NOUNS = frozenset({"orange"})
"""Nouns that are colours as well: before another word they are the colour, "the orange jacket"."""
AFTER_NOUNS = frozenset(
    (
        "above",
        "and",
        "at",
        "behind",
        "below",
        "beside",
        "between",
        "by",
        "closest",
        "cut",
        "from",
        "furthest",
        "in",
        "is",
    )
    + ("left", "near", "nearest", "next", "of", "on", "or", "over", "right", "that", "to", "under", "which", "with")
)
"""Words that may follow a noun, and not a colour, as those in "-ing" may: "the orange on the left"."""
PLURAL_ENDINGS = (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", ""))


@dataclass(frozen=True)
class FoundNoun:
    """A noun in a text.

    Args:
        start: first character.
        end: the character after its last.
        index: of the noun in the table.
    """

    start: int
    end: int
    index: int


def without_possessive(word: str) -> str:
    """A word without the "'s" of its end, if it has one."""
    return _POSSESSIVE.sub("", word)


def singulars(word: str) -> list[str]:
    """What a word may be the plural of, the word itself first; most of them are no words."""
    found = [word]
    if word in IRREGULAR_PLURALS:
        found.append(IRREGULAR_PLURALS[word])
    for prefix, stem in (("women", "woman"), ("men", "man"), ("people", "person")):
        if word.endswith(prefix) and word != prefix:  # firemen, salespeople
            found.append(word.removesuffix(prefix) + stem)
    found += [word.removesuffix(plural) + ending for plural, ending in PLURAL_ENDINGS if word.endswith(plural)]
    return found


class NounFinder:
    """Finds the nouns of a table in texts.

    Args:
        nouns: V nouns in lower case, each of one or more words; a noun's index is its place here.
    """

    def __init__(self, nouns: Iterable[str]) -> None:
        self.nouns = list(nouns)
        self.index = {
            tuple(WORD.findall(noun)): number for number, noun in enumerate(self.nouns) if noun not in GENERIC
        }
        self.longest = max(map(len, self.index), default=0)

    def find(self, text: str) -> list[FoundNoun]:
        """The nouns of a text in its order; of overlapping ones the longest, and of these the first.

        The possessor is not what is meant: "the dog's bed" holds the bed alone. A noun that is a colour as well
        (``COLOUR_NOUNS``) is not found where it stands before what it colours.

        Args:
            text: in any case; plural forms count as their singular.
        """
        lowered = text.lower()
        words = list(WORD.finditer(lowered))
        found, place = [], 0
        while place < len(words):
            for length in range(min(self.longest, len(words) - place), 0, -1):
                spelled = [match.group() for match in words[place : place + length]]
                index = self._index_of(spelled)
                if index is not None and not self._is_colour(spelled, lowered[words[place + length - 1].end() :]):
                    found.append(FoundNoun(words[place].start(), words[place + length - 1].end(), index))
                    place += length
                    break
            else:
                place += 1
        return found

    @staticmethod
    def _is_colour(spelled: list[str], after: str) -> bool:
        """Whether a noun that is also a colour stands before what it colours; ``after`` is the rest of the text."""
        if len(spelled) > 1 or spelled[0] not in COLOUR_NOUNS:
            return False
        following = WORD.match(after.lstrip())  # None behind a comma
        return following is not None and following.group() not in AFTER_NOUNS and not following.group().endswith("ing")

    def _index_of(self, words: list[str]) -> int | None:
        """Index of the noun that these words are, in the singular or the plural."""
        for last in singulars(words[-1]):
            index = self.index.get((*words[:-1], last))
            if index is not None:
                return index
        return None
