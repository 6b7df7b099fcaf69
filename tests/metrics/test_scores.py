"""gRefCOCO's conventions case by case, and the group scores against loops."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_svp.metrics import scores
from lavis_svp.metrics.bootstrap import Bootstrap
from lavis_svp.metrics.scores import PRECISION_THRESHOLDS, group_scores


def test_four_cases_one_by_one(four_cases):
    both_empty, false_alarm, missed, found = four_cases
    assert scores.ious(four_cases).tolist() == [1.0, 0.0, 0.0, 0.4]
    assert scores.ciou([both_empty]) is None  # nothing added above or below
    assert scores.ciou([both_empty, found]) == 0.4
    assert scores.ciou([false_alarm, found]) == 40 / (100 + 30)  # the predicted area joins the union
    assert scores.ciou([missed, found]) == 40 / (100 + 50)  # so does the missed target


def test_group_of_the_four_cases(four_cases):
    group = group_scores(four_cases)
    assert (group["n"], group["n_target"], group["n_images"]) == (4, 2, 4)
    assert group["giou"] == pytest.approx((1 + 0 + 0 + 0.4) / 4)
    assert group["ciou"] == pytest.approx(40 / (30 + 50 + 100))
    assert group["pr@0.5"] == 0.0
    assert group["n_acc"] == group["t_acc"] == 0.5
    assert group["seg_miss_rate"] == 0.5  # the right silence of "both empty" is no miss


def test_precision_counts_the_threshold_itself_and_targets_only(make_record):
    for threshold in PRECISION_THRESHOLDS:
        exact = make_record("a", intersection=round(10 * threshold), pred_area=round(10 * threshold), gt_area=10)
        assert scores.precision_at([exact, make_record("none")], threshold) == 1.0
        below = {**exact, "intersection": exact["intersection"] - 1}
        assert scores.precision_at([below], threshold) == 0.0


def test_scores_given_the_ceiling_allows_it(make_record):
    rows = [
        make_record("a", 60, 60, 100, ceiling_single=0.5),
        make_record("b", 30, 30, 100, ceiling_single=0.9),
        make_record("c", 90, 90, 100, ceiling_single=0.49),
        make_record("no target", ceiling_single=1.0),
    ]
    group = group_scores(rows)
    assert (group["reachable_n"], group["reachable_share"]) == (2, pytest.approx(2 / 3))
    assert group["reachable_giou"] == pytest.approx(0.45)
    assert group["reachable_pr@0.5"] == 0.5


def test_picks_and_baselines_are_means_of_what_is_there(make_record):
    rows = [
        make_record("a", 1, 1, 2, pick_correct=True, baseline_random=0.2),
        make_record("b", 1, 1, 2, pick_correct=False, baseline_random=0.4),
        make_record("c", 1, 1, 2),
    ]
    group = group_scores(rows)
    assert (group["pick_accuracy"], group["n_picks"]) == (0.5, 2)
    assert group["baseline_random"] == pytest.approx(0.3)
    assert group["baseline_attribute"] is None


def test_tokens_are_averaged_over_images(make_record):
    rows = [make_record(str(i), image_id=0, tokens=10) for i in range(3)] + [make_record("z", image_id=1, tokens=20)]
    assert group_scores(rows)["tokens_per_image"] == 15


def test_nothing_gives_none_not_a_crash():
    group = group_scores([])
    assert group["n"] == 0
    assert group["giou"] is None and group["ciou"] is None and group["giou_ci"] is None


CASES = st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))


@settings(deadline=None)
@given(st.lists(CASES, min_size=1, max_size=12))
def test_group_equals_obvious_loops_and_stays_in_bounds(cases):
    rows = []
    for number, (inside, wrong, left) in enumerate(cases):
        gt_area, pred_area = inside + left, inside + wrong
        rows.append(
            {
                "image_id": number // 2,
                "file_name": "",
                "has_target": gt_area > 0,
                "answered": pred_area > 0,
                "intersection": inside,
                "union": inside + wrong + left,
                "pred_area": pred_area,
                "gt_area": gt_area,
            }
        )
    group = group_scores(rows, Bootstrap(resamples=2))
    each = [1.0 if not row["union"] else row["intersection"] / row["union"] for row in rows]
    assert group["giou"] == pytest.approx(sum(each) / len(each))
    targets = [value for value, row in zip(each, rows, strict=True) if row["has_target"]]
    for threshold in PRECISION_THRESHOLDS:
        expected = sum(value >= threshold for value in targets) / len(targets) if targets else None
        assert group[f"pr@{threshold}"] == expected
    precisions = [group[f"pr@{threshold}"] for threshold in PRECISION_THRESHOLDS]
    assert precisions[0] is None or precisions == sorted(precisions, reverse=True)
    for key in ("giou", "ciou", "n_acc", "t_acc", "seg_miss_rate"):
        assert group[key] is None or 0 <= group[key] <= 1
