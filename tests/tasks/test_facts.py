"""Facts of a run."""

import json

from lavis_svp.tasks.facts import digest, run_facts


def test_digest_is_of_the_content():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


def test_facts_are_json_and_say_how_it_was_run():
    facts = json.loads(json.dumps(run_facts()))
    assert set(facts) == {"date", "command", "machine"}
    assert facts["command"].startswith("python")
