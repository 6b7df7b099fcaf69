"""A member of a shard is read only as far as the shard goes."""

import pytest

from lavis_svp.datasets.shards.member import BrokenShardError, ShardMember


@pytest.mark.parametrize(("offset", "size"), [(0, 10**17), (2**70, 3), (8, 3)])
def test_a_place_beyond_the_shard_takes_no_memory(tmp_path, offset, size):
    (tmp_path / "a.tar").write_bytes(b"x" * 10)
    with pytest.raises(BrokenShardError, match="cut off"):
        ShardMember(tmp_path / "a.tar", "a.json", offset, size, 0).read_bytes()
