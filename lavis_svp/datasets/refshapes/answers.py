"""RefShapes' questions and captions on disk, in the formats of VQAv2 and of COCO's captions."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lavis_svp.datasets.refshapes.build import NAME
from lavis_svp.datasets.refshapes.captions import CAPTIONS, captions
from lavis_svp.datasets.refshapes.config import SPLITS
from lavis_svp.datasets.refshapes.facts import Facts, read_facts
from lavis_svp.datasets.refshapes.questions import ANSWER_TYPES, Question, QuestionWriter
from lavis_svp.datasets.refshapes.refcoco_format import instances_path, write_json

ANSWERS_VERSION = 1
"""Raised by hand whenever the same images would get other questions or captions; old files are then made anew."""

ANSWERS_OF_A_QUESTION = 10  # VQAv2 asked ten people; here all say the same
_QUESTIONS_PER_IMAGE = 32


def questions_path(root: Path, split: str) -> Path:
    """Where the questions of a split are."""
    return _folder(root) / f"vqa_{split}_questions.json"


def annotations_path(root: Path, split: str) -> Path:
    """Where their answers are."""
    return _folder(root) / f"vqa_{split}_annotations.json"


def captions_path(root: Path, split: str) -> Path:
    """Where the captions of a split are."""
    return _folder(root) / f"captions_{split}.json"


def build_answers(root: Path, seed: int = 0) -> Path:
    """Write questions, answers and captions of every split, or return at once if they are there.

    Args:
        root: data folder, in which RefShapes has been made.
        seed: of the questions, 0 or more.

    Returns:
        the folder of the files.

    Raises:
        FileNotFoundError: RefShapes is not there.
        ValueError: a seed below 0.
    """
    if seed < 0:
        raise ValueError(f"The seed of RefShapes' questions must be 0 or more, got {seed}.")
    made_from = {"version": ANSWERS_VERSION, "seed": seed, "instances": _digest(instances_path(root, NAME))}
    manifest = _folder(root) / "manifest.json"
    paths = [path(root, split) for split in SPLITS for path in (questions_path, annotations_path, captions_path)]
    if _read(manifest) == made_from and all(path.is_file() for path in paths):
        return _folder(root)
    manifest.unlink(missing_ok=True)
    facts = read_facts(root)
    for split in SPLITS:
        own = [one for one in facts if one.split == split]
        questions, annotations = vqa_content(own, QuestionWriter(seed), split)
        write_json(questions_path(root, split), questions)
        write_json(annotations_path(root, split), annotations)
        write_json(captions_path(root, split), caption_content(own))
    write_json(manifest, made_from)
    return _folder(root)


def vqa_content(facts: list[Facts], writer: QuestionWriter, split: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """VQAv2's two files: questions and annotations; a question also names its image's file and size."""
    questions, annotations = [], []
    for image in facts:
        shown = {"image": image.file_name, "height": image.size[0], "width": image.size[1]}
        for number, question in enumerate(writer.ask(image)):
            question_id = image.image_id * _QUESTIONS_PER_IMAGE + number
            ids = {"image_id": image.image_id, "question_id": question_id}
            questions.append({**ids, "question": question.text, **shown})
            annotations.append({**ids, **_annotation(question)})
    shared = {
        "info": {"description": f"Questions about {NAME}, written by lavis_svp", "version": str(ANSWERS_VERSION)},
        "data_type": NAME,
        "data_subtype": split,
        "license": {"name": "as lavis_svp's", "url": ""},  # the official evaluation reads the key
    }
    return (
        {**shared, "task_type": "Open-Ended", "questions": questions},
        {**shared, "annotations": annotations},
    )


def caption_content(facts: list[Facts]) -> dict[str, Any]:
    """COCO's captions file."""
    images = [
        {"id": one.image_id, "file_name": one.file_name, "height": one.size[0], "width": one.size[1]} for one in facts
    ]
    annotations = [
        {"id": one.image_id * CAPTIONS + number, "image_id": one.image_id, "caption": text}
        for one in facts
        for number, text in enumerate(captions(one))
    ]
    info = {"description": f"Captions of {NAME}, written by lavis_svp", "version": str(ANSWERS_VERSION)}
    return {"info": info, "images": images, "annotations": annotations}


def _annotation(question: Question) -> dict[str, Any]:
    answers = [
        {"answer_id": number, "answer": question.answer, "answer_confidence": "yes"}
        for number in range(1, ANSWERS_OF_A_QUESTION + 1)
    ]
    return {
        "question_type": question.kind,
        "answer_type": ANSWER_TYPES[question.kind],
        "multiple_choice_answer": question.answer,
        "answers": answers,
    }


def _folder(root: Path) -> Path:
    return root / NAME / "answers"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read(manifest: Path) -> Any:
    try:
        return json.loads(manifest.read_text())
    except (OSError, ValueError):
        return None
