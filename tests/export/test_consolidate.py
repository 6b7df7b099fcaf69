"""``consolidate``: the command, on a hand-made DeepSpeed folder of somebody else's."""

from __future__ import annotations

import pytest
import torch

from lavis_svp.common.checkpoints import read_checkpoint
from lavis_svp.export.__main__ import main
from lavis_svp.export.consolidate import consolidate


@pytest.fixture
def folder(tmp_path):
    """One parameter, ZeRO-2 in two processes."""
    tag = tmp_path / "ckpt_model/global_step3"
    tag.mkdir(parents=True)
    (tag.parent / "latest").write_text("global_step3")
    head = {"module": {"w": torch.zeros(3).bfloat16()}, "param_shapes": [{"w": torch.Size([3])}], "global_steps": 3}
    torch.save(head, tag / "mp_rank_00_model_states.pt")
    for rank, part in enumerate([[1.0, 2.0], [3.0, 0.0]]):
        state = {"single_partition_of_fp32_groups": [torch.tensor(part)], "partition_count": [2]}
        torch.save({"optimizer_state_dict": state}, tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return tag.parent


def test_the_command_writes_a_lavis_checkpoint(folder, tmp_path, capsys):
    out = tmp_path / "new/weights.pth"
    main(["consolidate", str(folder), "--out", str(out)])
    contents = read_checkpoint(out)
    assert contents["model"]["w"].tolist() == [1.0, 2.0, 3.0] and contents["iters"] == 3
    assert "1 tensors, 3 numbers, without AdamW's moments" in capsys.readouterr().out
    with pytest.raises(ValueError, match="exists already"):
        consolidate(folder, out)


def test_errors_end_the_command_without_a_traceback(folder, tmp_path, capsys):
    (folder / "global_step3/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    for given, words in ((folder, "lacks the parts of: bf16_zero_pp_rank_1"), (tmp_path / "no", "There is no folder")):
        with pytest.raises(SystemExit) as end:
            main(["consolidate", str(given), "--out", str(tmp_path / "out.pth")])
        assert end.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()
