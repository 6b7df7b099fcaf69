"""Which words a trained model has met, so that it can say which of a question's it has not.

A model answers an expression with an unknown word as well as any other: it looks for what the other words say. The
user should know. The words are those of the expressions that the model was trained on, which released weights hold in
their metadata, and the nouns of the image classifier's table where the model reads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lavis_svp.common.checkpoints import read_metadata
from lavis_svp.language.nouns import WORD, singulars, without_possessive

VOCABULARY_KEY = "vocabulary"
"""The entry of released weights' metadata: words in the order of the alphabet, with spaces between them."""


class Vocabulary:
    """The words that a model knows.

    Args:
        texts: words, or texts whose words are known.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.words = frozenset(word for text in texts for word in _words(text))
        self._forms = frozenset(form for word in self.words for form in singulars(word))

    @classmethod
    def stored(cls, path: Path) -> Vocabulary | None:
        """The vocabulary in the metadata of weights; None where there is none, as in every checkpoint of a training.

        Args:
            path: the weights; only a ``.safetensors`` file can have metadata.
        """
        text = read_metadata(path).get(VOCABULARY_KEY) if path.suffix == ".safetensors" else None
        return None if text is None else cls([text])

    def __or__(self, texts: Iterable[str]) -> Vocabulary:
        """This vocabulary with the words of further texts."""
        return Vocabulary([*self.words, *texts])

    @property
    def text(self) -> str:
        """The words as the metadata holds them."""
        return " ".join(sorted(self.words))

    def unknown(self, text: str) -> list[str]:
        """The unknown words of a text, each once, in its order.

        A word is known if it is, or its plural or singular; the possessive "'s" does not count.

        Args:
            text: in any case and any script; numbers alone are not looked at.
        """
        return [word for word in dict.fromkeys(_words(text)) if self._forms.isdisjoint(singulars(word))]

    def note(self, text: str) -> str:
        """What to tell the user of a text: "I do not know the word …", or nothing."""
        unknown = [f'"{word}"' for word in self.unknown(text)]
        if not unknown:
            return ""
        if len(unknown) == 1:
            return f"I do not know the word {unknown[0]}."
        return f"I do not know the words {', '.join(unknown[:-1])} and {unknown[-1]}."


def _words(text: str) -> list[str]:
    """The words of a text in its order, without the possessive "'s"."""
    return [without_possessive(word) for word in WORD.findall(text.lower())]
