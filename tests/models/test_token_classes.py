"""What a classifier sees in the region of each token, against a plain loop; and what is drawn in its place."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_svp.language.nouns import NounFinder
from lavis_svp.models.token_classes import TEMPERATURE, DrawnClasses, effective_patches, token_classes
from lavis_svp.projectors.types import VisualTokens
from lavis_svp.segmentation.targets import object_nouns
from lavis_svp.vision.classifier import ClassNouns

ENCODED, EXTRA, SEEN, CLASSES = 5, 2, 6, 4  # channels, and classes
TABLE = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]).bool()  # animal, pet, dog, cup


def images(counts, patches=7, seed=0):
    """Random features and tokens of images with these numbers of tokens."""
    torch.manual_seed(seed)
    valid = torch.arange(max(counts)) < torch.tensor(counts)[:, None]  # (B, T)
    assignment = torch.rand(len(counts), max(counts), patches).square() * valid[..., None]
    assignment = assignment / assignment.sum(-1, keepdim=True).clamp_min(1e-6)  # (B, T, N)
    encoded, seen = torch.randn(len(counts), patches, ENCODED + EXTRA), torch.randn(len(counts), patches, SEEN)
    return encoded, seen, assignment, valid


def last_layer():
    torch.manual_seed(1)
    return torch.nn.Linear(SEEN, CLASSES).requires_grad_(False)


LAST = last_layer()


def classes_of(encoded, seen, assignment, valid):
    """The code under test, with a last layer of its own."""
    extractor = SimpleNamespace(
        classifier=SimpleNamespace(class_log_probs=lambda features: LAST(features).log_softmax(-1)),
        classifier_on_patches=lambda vision: seen,
        vision_encoder=SimpleNamespace(dim=ENCODED),
    )
    vision = SimpleNamespace(patches=SimpleNamespace(patches=encoded))
    return token_classes(extractor, vision, VisualTokens(torch.zeros(*valid.shape, 3), valid, assignment))


def mean_of(weights, features):
    return sum(float(w) * f for w, f in zip(weights, features, strict=True))


def slow_cosine(features, t, u):
    units = [f / f.norm() for f in features]
    mean = sum(units) / len(units)
    a, b = units[t] - mean, units[u] - mean
    if len(units) == 1:
        return 0.0  # nothing is left of what all tokens share
    return float(a @ b / (a.norm() * b.norm()))


def slow_classes(encoded, seen, assignment, count, last):
    """Of one image, token by token: (count, K)."""
    own = [mean_of(assignment[t], seen) for t in range(count)]
    other = [mean_of(assignment[t], encoded[:, :ENCODED]) for t in range(count)]
    rows = []
    for t in range(count):
        scores = []
        for u in range(count):
            alike = (slow_cosine(other, t, u) + slow_cosine(own, t, u)) / 2
            area = 1 / sum(float(w) ** 2 for w in assignment[u])
            scores.append(alike / TEMPERATURE + float(torch.tensor(area).log()))
        shares = torch.tensor(scores).softmax(0)
        rows.append(last(mean_of(shares, own)).log_softmax(-1))
    return torch.stack(rows)


def test_classes_equal_a_plain_loop():
    encoded, seen, assignment, valid = images([4, 1, 3])
    found = classes_of(encoded, seen, assignment, valid)
    for index, count in enumerate((4, 1, 3)):
        expected = slow_classes(encoded[index], seen[index], assignment[index], count, LAST)
        torch.testing.assert_close(found[index, :count], expected, atol=1e-4, rtol=1e-4)
    assert found.isfinite().all()  # padding too


def test_an_only_token_gets_the_classes_of_its_own_patches():
    encoded, seen, assignment, valid = images([1])
    expected = LAST((assignment[0, 0, :, None] * seen[0]).sum(0)).log_softmax(-1)
    torch.testing.assert_close(classes_of(encoded, seen, assignment, valid)[0, 0], expected)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=3), st.integers(0, 99))
def test_neither_padding_nor_batch_mates_matter(counts, seed):
    encoded, seen, assignment, valid = images(counts, seed=seed)
    together = classes_of(encoded, seen, assignment, valid)
    for index, count in enumerate(counts):
        one = slice(index, index + 1)
        alone = classes_of(encoded[one], seen[one], assignment[one, :count], valid[one, :count])
        torch.testing.assert_close(together[one, :count], alone, atol=1e-5, rtol=1e-4)


def test_alike_regions_share_what_they_show_and_large_ones_count_more():
    """Two tokens with the same features agree; a region of few patches takes over what the larger one shows."""
    _, _, assignment, valid = images([3])
    assignment = torch.zeros(1, 3, 7)
    assignment[0, 0, :4], assignment[0, 1, 4], assignment[0, 2, 5:] = 0.25, 1.0, 0.5
    encoded, seen = torch.zeros(1, 7, ENCODED + EXTRA), torch.zeros(1, 7, SEEN)
    encoded[0, :5, 0] = encoded[0, 5:, 1] = 1
    seen[0, :4, 0], seen[0, 4, 0], seen[0, 5:, 1] = 4, 4, 4
    found = classes_of(encoded, seen, assignment, valid)[0]
    torch.testing.assert_close(found[0], found[1])
    assert (found[2] - found[0]).abs().max() > 0.1
    assert effective_patches(assignment[0]).tolist() == pytest.approx([4, 1, 2])


def test_a_projector_that_hides_its_patches_is_told():
    encoded, seen, _, valid = images([2])
    with pytest.raises(ValueError, match=r"pointer_nouns.*class_words off"):
        classes_of(encoded, seen, None, valid)


# ---------------------------------------------------------------- drawn classes


def seen_classes(tokens=6, seed=0):
    torch.manual_seed(seed)
    return torch.randn(1, tokens, CLASSES).log_softmax(-1)


OWNERS, NAMES = torch.tensor([[0, 0, 1, -1, 2, -1]]), torch.tensor([[0, 2], [3, -1], [-1, -1]])


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1), st.integers(0, 999))
def test_drawn_classes_are_distributions_and_only_named_objects_change(share, seed):
    seen = seen_classes()
    torch.manual_seed(seed)
    drawn = DrawnClasses(TABLE, share)(seen, OWNERS, NAMES)
    torch.testing.assert_close(drawn.exp().sum(-1), torch.ones(1, 6))
    assert drawn.isfinite().all()
    kept = [3, 4, 5]  # of no object, and of one without a known name
    torch.testing.assert_close(drawn[:, kept], seen[:, kept], atol=1e-5, rtol=1e-5)


def test_none_or_all_of_the_objects_are_drawn():
    seen = seen_classes()
    torch.testing.assert_close(DrawnClasses(TABLE, 0.0)(seen, OWNERS, NAMES), seen, atol=1e-5, rtol=1e-5)
    changed = (DrawnClasses(TABLE, 1.0)(seen, OWNERS, NAMES) - seen).abs().amax(-1)[0]
    assert (changed[:3] > 1e-3).all()
    nothing = torch.zeros(0, 1, dtype=torch.int64)
    assert DrawnClasses(TABLE, 1.0)(seen, torch.full_like(OWNERS, -1), nothing) is seen


def test_a_seed_decides_and_tokens_of_an_object_agree():
    seen, draw = torch.zeros(1, 6, CLASSES).log_softmax(-1), DrawnClasses(TABLE, 1.0)

    def drawn(seed):
        torch.manual_seed(seed)
        return draw(seen, OWNERS, NAMES)

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    first = drawn(0)[0]
    assert first[0].argsort().tolist() == first[1].argsort().tolist()  # of one object, in other strengths


def test_the_drawn_part_stays_in_its_range():
    seen = torch.full((1, 6, CLASSES), -30.0)
    seen[..., 3] = 0.0  # a cup, certainly
    names = torch.tensor([[2], [2], [2]])  # dogs
    parts = []
    for seed in range(200):
        torch.manual_seed(seed)
        parts.append(1 - DrawnClasses(TABLE, 1.0)(seen, OWNERS, names).exp()[0, :3, 3])
    parts = torch.cat(parts)
    assert parts.max() <= DrawnClasses.MOST + 1e-5
    assert (parts > DrawnClasses.LEAST / 2 - 1e-5).float().mean() > 0.7  # the others are taken for a cup as well


@pytest.mark.parametrize(
    ("words", "noun", "least"), [(["dog", "pet", "animal"], "dog", 0.75), (["giraffe", "wild animal"], "animal", 0.75)]
)
def test_with_the_real_table_a_things_classes_are_its_own_most_of_the_time(words, noun, least):
    nouns = ClassNouns.load()
    table = nouns.matrix.T.bool()  # (V, K)
    count = 300
    names = object_nouns([words], NounFinder(nouns.nouns)).expand(count, -1)
    torch.manual_seed(0)
    seen = torch.zeros(1, count, table.shape[1]).log_softmax(-1)
    drawn = DrawnClasses(table, 1.0)(seen, torch.arange(count)[None], names)
    right = table[nouns.index[noun]][drawn[0].argmax(-1)].float().mean()
    assert right > least and right < 1  # some are mistaken
