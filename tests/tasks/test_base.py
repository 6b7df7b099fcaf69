"""The base task: facts of a run in the summary, and LAVIS's own loop is refused."""

import json

import pytest

from lavis_svp.tasks.base import digest, run_facts
from lavis_svp.tasks.referring_segmentation import ReferringSegmentationTask


def test_digest_is_of_the_content():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


def test_facts_are_json_and_say_how_it_was_run():
    facts = json.loads(json.dumps(run_facts()))
    assert set(facts) == {"date", "command", "machine"}
    assert facts["command"].startswith("python")


def test_lavis_epoch_based_loop_is_refused():
    with pytest.raises(ValueError, match="runner_svp"):
        ReferringSegmentationTask().train_epoch(0, None, [], None, None)
