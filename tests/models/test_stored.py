"""What came with the data is used if the model would have made it, and refused by name if not."""

import types

import numpy as np
import pytest
from PIL import Image

from lavis_svp.models.frozen_cache import FrozenCache
from lavis_svp.models.prepare import precompute_features
from lavis_svp.models.stored import attach_precomputed, check_precomputed


@pytest.fixture
def split(tmp_path):
    """split(**more): a training split of two images, one of them damaged."""
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])

    def make(**more):
        return types.SimpleNamespace(
            image_file=lambda name: tmp_path / name,
            annotation=["a.png", "b.png"],
            train=True,
            options=types.SimpleNamespace(skip_broken=True),
            superpixel_cache=None,
            frozen_cache=None,
            **more,
        )

    return make


class Stored:
    """Superpixels or features that came with the data."""

    def __init__(self, settings):
        self.settings = settings

    def __len__(self):
        return 0  # nothing may take it for absent


def test_what_the_model_would_make_is_used(make_model, split, own_cache, monkeypatch):
    frozen = make_model().frozen
    superpixels, features = Stored(frozen.generator.settings()), Stored(frozen.settings())
    given = split(stored_superpixels=superpixels, stored_features=features)
    monkeypatch.setattr(frozen, "encode", lambda *_: pytest.fail("computed"))
    precompute_features(frozen, {"any": {"train": given}})
    assert given.superpixel_cache is superpixels and given.frozen_cache is features
    other = split(stored_superpixels=None, stored_features=features)
    attach_precomputed(frozen, {"any": {"train": other}})
    assert other.frozen_cache is features


@pytest.mark.parametrize("kind", ["superpixels", "features"])
def test_what_it_would_not_make_is_refused(make_model, split, kind):
    frozen = make_model().frozen
    settings = dict(frozen.generator.settings() if kind == "superpixels" else frozen.settings())
    given = split(**{f"stored_{kind}": Stored(settings | {"other": 1})})
    with pytest.raises(ValueError, match=rf"data set mine holds {kind} made with other settings \(other: 1 there"):
        check_precomputed(frozen, {"mine": {"train": given}})
    with pytest.raises(ValueError, match=r"datasets.mine.build_info.use_stored=false"):
        attach_precomputed(frozen, {"mine": {"train": given}})


@pytest.mark.parametrize("superpixels", [{"name": "grid", "rows": 2, "cols": 2}, {"name": "sam", "points_per_side": 2}])
def test_a_broken_training_image_is_named_and_the_rest_computed(make_model, split, own_cache, caplog, superpixels):
    frozen = make_model(superpixels=superpixels).frozen
    given = split()
    precompute_features(frozen, {"any": {"train": given}})
    assert "b.png, which training will skip: BadImageError" in caplog.text
    assert isinstance(given.frozen_cache, FrozenCache)
    assert len(list(given.frozen_cache.folder.rglob("*.safetensors"))) == 1 == len(given.superpixel_cache.keys())
    given.options.skip_broken = False
    with pytest.raises(ValueError, match=r"b.png is not a readable image"):
        precompute_features(frozen, {"any": {"train": given}})
    given.annotation = ["a.png", "gone.png"]
    with pytest.raises(FileNotFoundError):
        precompute_features(frozen, {"any": {"train": given}})
    given.options.skip_broken = True
    precompute_features(frozen, {"any": {"train": given}})
    assert "gone.png, which training will skip" in caplog.text
