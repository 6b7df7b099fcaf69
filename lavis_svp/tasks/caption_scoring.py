"""Scores of captions by COCO's evaluation (pycocoevalcap): BLEU, ROUGE-L, CIDEr and, where there is Java, METEOR.

SPICE is left out: pycocoevalcap downloads Stanford CoreNLP for it. The official tokeniser (PTBTokenizer) needs Java,
too; without it, captions are cut by :func:`plain_tokens`, and the result says so: such scores are comparable with each
other, not with published ones.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

BLEU_ORDER = 4
OFFICIAL = "PTBTokenizer"
PLAIN = "words in lower case, without punctuation (no Java for PTBTokenizer)"

Tokens = dict[int, list[str]]
"""{image: captions, tokens apart by spaces}."""


def caption_scores(references: Mapping[int, Sequence[str]], captions: Mapping[int, str]) -> dict[str, Any]:
    """Score one caption an image.

    Args:
        references: captions by people, by image.
        captions: of the model; the images must be the same.

    Returns:
        "scores": by COCO's names (``CIDEr``, ``Bleu_4`` ..., as fractions, CIDEr up to 10); "tokeniser"; "left_out":
        the metrics that could not be computed, each with the reason.

    Raises:
        ValueError: the images differ, or one has no reference.
    """
    if set(references) != set(captions) or not captions:
        raise ValueError(f"{len(references)} images have references and {len(captions)} captions; not the same ones.")
    empty = [number for number, said in references.items() if not said]
    if empty:
        raise ValueError(f"Images {empty[:5]} have no reference.")
    truth = {number: list(said) for number, said in references.items()}
    given = {number: [said] for number, said in captions.items()}
    left_out = {"SPICE": "pycocoevalcap downloads Stanford CoreNLP for it"}
    tokenised = _official_tokens(truth, given) if shutil.which("java") else None
    if tokenised is None:
        tokenised = ({key: list(map(plain_tokens, said)) for key, said in one.items()} for one in (truth, given))
        left_out["METEOR"] = "it needs Java"
        tokeniser = PLAIN
    else:
        tokeniser = OFFICIAL
    wanted, said = tokenised
    with contextlib.redirect_stdout(io.StringIO()):  # the scorers print
        scores = _scores(wanted, said, with_meteor="METEOR" not in left_out)
    return {"scores": scores, "tokeniser": tokeniser, "left_out": left_out}


def plain_tokens(caption: str) -> str:
    """Words and numbers in lower case; apostrophes inside a word stay, all other punctuation goes."""
    return " ".join(re.findall(r"\w+(?:'\w+)*", caption.lower()))


def _scores(references: Tokens, captions: Tokens, with_meteor: bool) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    bleu = Bleu(BLEU_ORDER).compute_score(references, captions)[0]
    scores = {f"Bleu_{order}": float(value) for order, value in enumerate(bleu, start=1)}
    if with_meteor:
        from pycocoevalcap.meteor.meteor import Meteor

        scores["METEOR"] = float(Meteor().compute_score(references, captions)[0])
    scores["ROUGE_L"] = float(Rouge().compute_score(references, captions)[0])
    scores["CIDEr"] = float(Cider().compute_score(references, captions)[0])
    return scores


def _official_tokens(references: Mapping[int, list[str]], captions: Mapping[int, list[str]]) -> Any:
    """Both, tokenised; None where the tokeniser cannot work: it writes a file beside its own code."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokens(texts: Mapping[int, list[str]]) -> Tokens:
        found = PTBTokenizer().tokenize({key: [{"caption": one or "."} for one in said] for key, said in texts.items()})
        if set(found) != set(texts):
            raise OSError(f"it gave {len(found)} images for {len(texts)}")
        return found

    try:
        return tokens(references), tokens(captions)
    except OSError as error:
        logging.warning("PTBTokenizer does not work here (%s); captions are cut into plain words.", error)
        return None
