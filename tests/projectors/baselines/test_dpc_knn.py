"""`dpc_knn` against the formula as loops over patches."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from projector_checks import make_batch, make_projector

from lavis_svp.projectors import PatchFeatures
from lavis_svp.projectors.baselines.dpc_knn import exact_products


def slow_clusters(patches, k, choose):
    """Lists of patch indices, one a cluster; ``choose`` picks the centres of a list of scores."""
    count, width = patches.shape
    x = patches.double()
    squared = [[float((x[i] - x[j]).square().sum()) / width for j in range(count)] for i in range(count)]
    density = []
    for i in range(count):
        near = sorted(squared[i][j] for j in range(count) if j != i)[:k]
        density.append(math.exp(-sum(near) / len(near)) if near else 1.0)
    scores = []
    for i in range(count):
        above = [math.sqrt(squared[i][j]) for j in range(count) if (density[j], -j) > (density[i], -i)]
        scores.append(density[i] * (min(above) if above else math.sqrt(max(squared[i]))))
    centres = sorted(choose(scores))
    clusters = {centre: [] for centre in centres}
    for i in range(count):
        clusters[i if i in clusters else min(centres, key=lambda c: (squared[i][c], c))].append(i)
    return list(clusters.values())


def best(count):
    return lambda scores: sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def above(threshold):
    return lambda scores: [i for i, s in enumerate(scores) if s > threshold or s == max(scores)]


def assert_clusters(result, image, expected, patches, head):
    assert int(result.valid[image].sum()) == len(expected)
    for t, members in enumerate(expected):
        even = torch.zeros(result.assignment.shape[2])
        even[members] = 1 / len(members)
        torch.testing.assert_close(result.assignment[image, t], even)
        torch.testing.assert_close(result.tokens[image, t], head(patches[members].mean(0)), atol=1e-5, rtol=1e-5)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), kind=st.sampled_from(["fixed", "threshold"]), k=st.integers(1, 5))
def test_clusters_are_those_of_loops(seed, kind, k):
    options = {"count": 5} if kind == "fixed" else {"threshold": 0.3}
    projector = make_projector("dpc_knn", kind=kind, neighbours=k, **options)
    features, _ = make_batch([(5, 4), (2, 3)], seed=seed)
    result = projector(features)
    choose = best(5) if kind == "fixed" else above(0.3)
    for b in range(2):
        patches = features.patches[b][features.valid[b]]  # the padding lies behind them
        assert_clusters(result, b, slow_clusters(patches, k, choose), patches, projector.head)


def test_alike_patches_are_told_apart_by_index():
    projector = make_projector("dpc_knn", count=3, neighbours=2)
    patches = torch.randn(1, 3, 16).bfloat16().float()[:, [0, 0, 0, 1, 1, 2, 2, 2, 2]]
    result = projector(PatchFeatures.whole(patches, (3, 3)))
    assert [row.nonzero().flatten().tolist() for row in result.assignment[0]] == [[0, 1, 2], [3, 4], [5, 6, 7, 8]]
    same = torch.ones(1, 9, 16)
    result = projector(PatchFeatures.whole(same, (3, 3)))
    assert [row.nonzero().flatten().tolist() for row in result.assignment[0]] == [[0, 3, 4, 5, 6, 7, 8], [1], [2]]


def test_groups_far_apart_are_found_by_the_threshold():
    torch.manual_seed(0)
    middle = 3.0 * torch.eye(4, 16)
    group = torch.arange(24) % 4
    patches = (middle[group] + 0.05 * torch.randn(24, 16))[None]
    projector = make_projector("dpc_knn", kind="threshold", threshold=0.5)
    result = projector(PatchFeatures.whole(patches, (4, 6)))
    assert result.valid.sum() == 4 and result.tokens.shape[1] == 4
    assert all(len(set(group[row > 0].tolist())) == 1 for row in result.assignment[0])
    assert projector.num_tokens((4, 6)) is None and projector.image_tokens((4, 6), 3) is None


def test_features_of_any_scale_keep_their_order_of_density():
    projector = make_projector("dpc_knn", count=4)
    features, _ = make_batch([(5, 4)])
    loud = PatchFeatures(features.patches * 1024, features.grids, features.valid)  # densities of exp(-1e6)
    assert projector(loud).assignment[0].gt(0).sum(1).max() < 16  # not one cluster with all that is left
    assert len({tuple(row) for row in projector(loud).assignment[0].tolist()}) == 4


def test_one_patch_and_fewer_patches_than_clusters():
    projector = make_projector("dpc_knn", count=7)
    features, _ = make_batch([(1, 1), (2, 3)], cut=[(0, 0), (0, 1)])
    result = projector(features)
    assert result.valid.sum(1).tolist() == [1, 4]
    assert result.assignment[1, :4].argmax(1).tolist() == [0, 1, 3, 4] and result.tokens.isfinite().all()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), scale=st.sampled_from([1.0, 1e-3, 300.0]))
def test_exact_products_need_no_float64_and_depend_on_their_two_patches_alone(seed, scale):
    patches = scale * torch.randn(2, 12, 384, generator=torch.Generator().manual_seed(seed))
    patches[:, 7] = patches[:, 3]
    found = exact_products(patches)
    exact = patches.double() @ patches.double().mT
    torch.testing.assert_close(found.double(), exact, atol=float(1e-6 * exact.amax()), rtol=1e-6)
    assert torch.equal(found, found.mT) and torch.equal(found[:, 7], found[:, 3])
    padded = torch.cat([patches, torch.zeros(2, 30, 384)], dim=1)
    assert torch.equal(exact_products(padded)[:, :12, :12], found)
    assert torch.equal(exact_products(patches[:, :, torch.randperm(384)]), found)  # the order of the sums is nothing
