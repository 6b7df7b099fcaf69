"""Views of a marked photograph: parts of it, with the expressions that hold of them."""

import numpy as np
import pytest

from lavis_svp.cli.data import main
from lavis_svp.common.files import BadFileError
from lavis_svp.common.images import read_image
from lavis_svp.datasets.mirroring import mirror_text
from lavis_svp.datasets.refcoco import RefCOCO
from lavis_svp.datasets.refcoco_writer import NewExpression
from lavis_svp.datasets.refphotos import build
from lavis_svp.datasets.refphotos.marks import NO_TARGET, TRAIN, Marks, load_marks, load_photos, read_marks, size_word
from lavis_svp.datasets.refphotos.views import make_views
from lavis_svp.datasets.trainphotos import TRAINPHOTOS, build_trainphotos

SIZE = (300, 400)
SIDE = 60
PLACES = ((20, 20), (20, 320), (220, 170))  # (top, left) of two dogs and a ball


def marked_photo():
    """Three squares of their own colours on black; two dogs, one ball."""
    pixels, masks = np.zeros((*SIZE, 3), np.uint8), np.zeros((3, *SIZE), bool)
    for index, (top, left) in enumerate(PLACES):
        pixels[top : top + SIDE, left : left + SIDE, index] = 255
        masks[index, top : top + SIDE, left : left + SIDE] = True
    tags = (("group", "animals"), ("clutter", "few"), ("size", "medium"), ("what", "thing"))
    expressions = (
        NewExpression("ball", "name", "name", 2, (2,), tags),
        NewExpression("spotted dog", "attribute", "attribute", 0, (0,), tags),
        NewExpression("black dog in the corner", "attribute", "attribute", 0, (0,), tags),
        NewExpression("dog on the left", "relation", "relation", 0, (0, 1), tags),
        NewExpression("the toy at the bottom", "relation", "relation", 2, (2,), tags),
        NewExpression("the cat", NO_TARGET, NO_TARGET, None, (), (("clutter", "few"),)),
        NewExpression("ball on the left", NO_TARGET, NO_TARGET, None, (), (("clutter", "few"),)),
    )
    synonyms = (("pet", "puppy"), ("pet",), ("toy", "football"))
    return pixels, Marks(("dog", "dog", "ball"), ("animals",) * 3, synonyms, masks, expressions)


@pytest.fixture(scope="module")
def views():
    return make_views("a photograph", *marked_photo(), 60)


def test_masks_lie_where_the_pixels_are(views):
    assert len(views) == 60
    for view in views:
        for noun, mask in zip(view.marks.nouns, view.marks.masks, strict=True):
            channel = view.pixels[mask].mean(axis=0).argmax()
            assert (channel == 2) == (noun == "ball")
            assert (view.pixels[mask].max(axis=1) > 100).mean() > 0.9


def test_a_target_is_at_least_half_visible_and_its_name_is_as_before(views):
    for view in views:
        for one in view.marks.expressions:
            if one.target is None:
                assert one.candidates == ()
                continue
            mask = view.marks.masks[one.target]
            assert mask.sum() >= 0.5 * SIDE * SIDE
            assert one.target in one.candidates
            assert dict(one.tags)["size"] == size_word(mask.mean())
            noun = view.marks.nouns[one.target]
            assert noun == ("ball" if one.text in ("ball", "toy", "football") else "dog")


def test_choices_are_kept_only_where_all_that_they_choose_from_is_there(views):
    lefts = 0
    for view in views:
        texts = {one.text: one for one in view.marks.expressions}
        assert "the toy at the bottom" not in texts  # a place alone: another part has another bottom
        assert "black dog in the corner" not in texts
        for side in ("left", "right"):
            if f"dog on the {side}" in texts and texts[f"dog on the {side}"].target is not None:
                lefts += 1
                columns = [
                    np.argwhere(view.marks.masks[i])[:, 1].mean() for i, n in enumerate(view.marks.nouns) if n == "dog"
                ]
                assert len(columns) == 2
                dogs = [noun == "dog" for noun in view.marks.nouns]
                assert view.marks.masks[dogs].sum(axis=(1, 2)).min() >= 0.5 * SIDE * SIDE
                chosen = np.argwhere(view.marks.masks[texts[f"dog on the {side}"].target])[:, 1].mean()
                assert chosen == (min if side == "left" else max)(columns)
    assert lefts > 5


def test_what_is_gone_may_be_asked_for_and_absent_places_are_left_out(views):
    gone = 0
    for view in views:
        texts = {one.text: one for one in view.marks.expressions}
        assert texts["the cat"].target is None
        assert not {"ball on the left", "ball on the right"} & set(texts)
        if "ball" in texts and texts["ball"].target is None:
            gone += 1
            assert "ball" not in view.marks.nouns
            assert dict(texts["ball"].tags) == {"clutter": "few"}
    assert gone > 3


def test_every_second_view_is_mirrored_with_its_words(views):
    mirrored = [view for view in views[1::2] if any(e.text == "dog on the right" for e in view.marks.expressions)]
    straight = [view for view in views[::2] if any(e.text == "dog on the left" for e in view.marks.expressions)]
    assert mirrored
    assert straight
    assert not any(e.text == "dog on the right" for view in views[::2] for e in view.marks.expressions)


def test_further_names_are_those_of_no_other_object(views):
    texts = {one.text for view in views for one in view.marks.expressions}
    assert {"toy", "football"} <= texts
    assert not {"pet", "puppy"} & texts  # both dogs are pets, and the puppy is not asked for by name


def test_views_of_a_photograph_are_always_the_same():
    one, again = (make_views("a", *marked_photo(), 3) for _ in range(2))
    other = make_views("b", *marked_photo(), 3)
    assert all(
        np.array_equal(a.pixels, b.pixels) and a.marks.expressions == b.marks.expressions
        for a, b in zip(one, again, strict=True)
    )
    assert any(not np.array_equal(a.pixels, b.pixels) for a, b in zip(one, other, strict=True))


def test_large_photographs_are_made_smaller_and_no_mask_is_lost():
    pixels, marks = marked_photo()
    large = np.repeat(np.repeat(pixels, 6, 0), 6, 1)
    masks = np.repeat(np.repeat(marks.masks, 6, 1), 6, 2)
    masks[0] = False
    masks[0, 600, 600] = True  # one pixel
    expressions = (marks.expressions[0],)
    for view in make_views("large", large, Marks(marks.nouns, marks.groups, marks.synonyms, masks, expressions), 6):
        assert max(view.pixels.shape[:2]) <= 800
        assert view.marks.masks.shape[1:] == view.pixels.shape[:2]
        assert view.marks.masks.any(axis=(1, 2)).all()
        for noun, mask in zip(view.marks.nouns, view.marks.masks, strict=True):
            if mask.sum() > 1:
                assert (view.pixels[mask].argmax(axis=1) == (2 if noun == "ball" else 1)).mean() > 0.9


def test_a_photograph_without_anything_to_ask_for_has_no_views():
    pixels, marks = marked_photo()
    absent = tuple(one for one in marks.expressions if one.target is None)
    assert make_views("a", pixels, Marks(marks.nouns, marks.groups, marks.synonyms, marks.masks, absent), 3) == []


def test_no_view_of_the_true_marks_contradicts_them():
    marked, photos = load_marks(TRAINPHOTOS), [one for one in load_photos(TRAINPHOTOS) if one.split == TRAIN][:4]
    for photo in photos:
        marks = read_marks(photo, marked[photo.name], photo.name)
        absent = {one.text for one in marks.expressions if one.target is None}
        for view in make_views(photo.name, np.zeros((*photo.size, 3), np.uint8), marks, 2):
            for one in view.marks.expressions:
                if one.target is not None:
                    assert not {one.text, mirror_text(one.text)} & absent, (photo.name, one.text)
            assert len({one.text for one in view.marks.expressions}) == len(view.marks.expressions)


def read(root):
    return RefCOCO(root / "trainphotos/instances.json", root / "trainphotos/refs(svp).p")


def test_the_data_set_with_views(train_photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "cache_root", lambda: train_photos.folder)
    build_trainphotos(tmp_path, progress=False)
    assert len(read(tmp_path).images("train")) == 2
    assert main(["trainphotos", "--root", str(tmp_path), "--views", "3"]) == 0
    images = read(tmp_path).images("train")
    names = [image.file_name for image in images if "_view" in image.file_name]
    assert len(names) == 6
    for image in images:
        assert read_image(tmp_path / "images/trainphotos" / image.file_name).pixels.shape[:2] == (
            image.size[0],
            image.size[1],
        )
    assert not any("_view" in image.file_name for image in read(tmp_path).images("val"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    build_trainphotos(tmp_path, progress=False)  # as many as are there
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "images/trainphotos" / names[0]).unlink()
    build_trainphotos(tmp_path, progress=False)  # one is lost: made again
    assert (tmp_path / "images/trainphotos" / names[0]).is_file()
    assert len(read(tmp_path).images("train")) == len(images)
    build_trainphotos(tmp_path, progress=False, views=0)
    assert len(read(tmp_path).images("train")) == 2


@pytest.mark.parametrize("views", [-1, 10])
def test_the_number_of_views_is_checked(train_photos, tmp_path, views):
    with pytest.raises(ValueError, match=f"trainphotos: views is {views}, but a photograph has 0 to 9 of them"):
        build_trainphotos(tmp_path, train_photos.downloads, views=views)
    assert not any(tmp_path.rglob("instances.json"))


def test_at_most_two_gone_names_are_asked_for_and_clocks_are_not_mirrored():
    pixels = np.zeros((100, 500, 3), np.uint8)
    masks = np.zeros((5, 100, 500), bool)
    for index in range(5):
        masks[index, 40:60, 20 + 100 * index : 40 + 100 * index] = True
    nouns = ("cup", "plate", "fork", "knife", "spoon")
    expressions = tuple(NewExpression(noun, "name", "name", n, (n,)) for n, noun in enumerate(nouns))
    marks = Marks(nouns, ("household",) * 5, ((),) * 5, masks, expressions)
    counts = [sum(one.target is None for one in view.marks.expressions) for view in make_views("a", pixels, marks, 40)]
    assert max(counts) == 2
    clock = (*expressions, NewExpression("cup at 3 o'clock", "attribute", "attribute", 0, (0,)))
    pixels[:, :, 0] = np.arange(500) // 2  # brighter to the right
    for view in make_views("a", pixels, Marks(nouns, marks.groups, marks.synonyms, masks, clock), 20)[1::2]:
        is_mirrored = int(view.pixels[0, 0, 0]) > int(view.pixels[0, -1, 0])
        assert is_mirrored != any("clock" in one.text for one in view.marks.expressions)


def test_masks_of_another_size_are_refused():
    pixels, marks = marked_photo()
    with pytest.raises(ValueError, match=r"a has \(299, 400\) pixels"):
        make_views("a", pixels[1:], marks, 1)


@pytest.mark.parametrize("views", ["null", '"x"', "2.7", "99"])
def test_a_damaged_manifest_is_told(train_photos, tmp_path, views):
    folder = tmp_path / "trainphotos"
    folder.mkdir()
    (folder / "manifest.json").write_text(f'{{"views": {views}}}')
    with pytest.raises(BadFileError, match=r"states views: .*Say how many by --views, 0 to 9"):
        build_trainphotos(tmp_path, train_photos.downloads)
