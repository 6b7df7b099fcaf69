from __future__ import annotations

import pytest

from lavis_svp.models.svp_ris import SvpRis
from lavis_svp.plan.estimate import Assumptions, with_mlp
from lavis_svp.plan.skeleton import parameters_by_part


def test_patterns_of_the_projectors_insides_do_not_reach_mlp(small_options):
    options = small_options(trainable=["projector.*", "!projector.sspe*", "readout.*"])
    counts = parameters_by_part(SvpRis.skeleton(with_mlp(options)))
    assert counts["projector"].trained == counts["projector"].total > 0
    assert counts["readout"].trained > 0 == counts["mask_decoder"].trained
    assert with_mlp(small_options()).trainable is None


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"many": 0}, {"prompts": -1}, {"utilisation": 1.5}])
def test_impossible_assumptions_are_told(wrong):
    with pytest.raises(ValueError, match="at least|share"):
        Assumptions(**wrong)
