from __future__ import annotations

import pytest
import torch

from lavis_svp.export.language_folder import with_row


def test_a_row_is_set_or_appended_and_the_table_is_not_touched():
    table, row = torch.zeros(3, 2), torch.ones(1, 2)
    assert with_row(table, 1, row).tolist() == [[0, 0], [1, 1], [0, 0]]
    assert with_row(table, 3, row).tolist() == [[0, 0], [0, 0], [0, 0], [1, 1]]
    assert table.sum() == 0
    with pytest.raises(ValueError, match="only 3 rows"):
        with_row(table, 4, row)
