"""Calibration on drawn evidence whose best answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from lavis_svp.probes.no_target import (
    Evidence,
    fit_calibration,
    format_no_target,
    no_target_table,
    score_calibration,
)
from lavis_svp.segmentation.no_target import NoTargetOptions

REFUSED = 0.1
WEIGHT = 4.0


def drawn(seed, count=4000):
    """The log-odds are margin + 4 * evidence + 2 for ``attribute``; ``relation`` is never refused."""
    rng = np.random.default_rng(seed)
    evidence, margin = -rng.exponential(0.5, count), rng.normal(0, 0.3, count)
    present = rng.random(count) < 1 / (1 + np.exp(-(margin + WEIGHT * evidence + 2)))
    kinds = np.where(present, "attribute", "no_target")
    sure = np.full(count // 4, 8.0), -rng.exponential(0.5, count // 4), np.full(count // 4, "relation")
    return Evidence(*(np.concatenate(pair) for pair in zip((margin, evidence, kinds), sure, strict=True)))


def test_evidence_is_used_and_no_kind_is_refused_more_often_than_allowed():
    chosen = fit_calibration(drawn(0), REFUSED)
    assert WEIGHT / 2 <= chosen.evidence <= WEIGHT * 2
    fitted, other = score_calibration(drawn(0), chosen), score_calibration(drawn(1), chosen)
    assert fitted["refused"]["attribute"] == pytest.approx(REFUSED, abs=0.005)
    assert max(fitted["refused"].values()) <= REFUSED + 0.005
    assert other["refused"]["attribute"] == pytest.approx(REFUSED, abs=0.02)
    assert other["n_acc"] > score_calibration(drawn(1), fit_calibration(blind(drawn(0)), REFUSED))["n_acc"] + 0.1


def blind(found):
    return Evidence(found.margin, np.zeros_like(found.evidence), found.kinds)


def test_evidence_against_itself_gets_no_weight():
    found = drawn(0)
    turned = Evidence(found.margin, -found.evidence, found.kinds)
    assert fit_calibration(turned, REFUSED).evidence == 0


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_is_a_share(share):
    with pytest.raises(ValueError, match=str(share)):
        fit_calibration(drawn(0), share)


def test_both_sorts_are_needed():
    found = drawn(0)
    with pytest.raises(ValueError, match="with and without"):
        fit_calibration(Evidence(found.margin, found.evidence, np.full(len(found.kinds), "attribute")), REFUSED)


def test_the_auc_counts_pairs():
    split = Evidence(np.array([2.0, 1.0, 1.0, 0.0]), np.zeros(4), np.array(["a", "a", "no_target", "no_target"]))
    assert score_calibration(split, NoTargetOptions())["auc"]["a"] == (3 + 0.5) / 4


def test_the_table_is_of_the_test_split():
    table = no_target_table(drawn(0), drawn(1), REFUSED)
    assert table["language model alone"]["auc"]["attribute"] < table["calibrated"]["auc"]["attribute"]
    text = format_no_target(table)
    assert f"model.no_target.bias={table['presence']['bias']}" in text and "N-acc" in text
