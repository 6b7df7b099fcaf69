"""References' pickles are read as plain data; whatever asks for code is refused unrun."""

import collections
import os
import pickle

import numpy as np
import pytest

from lavis_svp.datasets.unpickling import UnsafePickleError, load_plain_pickle


class Runs:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def save(path, content, protocol):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data(tmp_path, protocol):
    content = [{"a": 1, "b": (2.5, None, True), "c": "ü", "d": b"\xff\x00", "e": {1, 2}, "f": 2**70, 3: frozenset("x")}]
    assert load_plain_pickle(save(tmp_path / "refs.p", content, protocol)) == content


def test_python_2_text(tmp_path):
    """A list of one dict, as Python 2's cPickle writes it with protocol 0: byte strings, unicode, long."""
    path = tmp_path / "refs(unc).p"
    path.write_bytes(
        b"(lp1\n(dp2\nS'sent'\np3\nS'caf\\xe9'\np4\nsS'raw'\np5\nVcaf\\u00e9\np6\nsS'ref_id'\np7\nL12L\nsa."
    )
    assert load_plain_pickle(path) == [{"sent": "café", "raw": "café", "ref_id": 12}]


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ("touch {}",), "posix.system|nt.system"),
        (eval, ("open('{}', 'w')",), "builtins.eval"),
        (exec, ("open('{}', 'w')",), "builtins.exec"),
        (getattr, ("", "upper"), "builtins.getattr"),
        (os.mkdir, ("{}",), "posix.mkdir|nt.mkdir"),
    ],
)
def test_code_is_not_run(tmp_path, protocol, function, arguments, named):
    trace = tmp_path / "it_ran"
    bomb = Runs(function, *(argument.format(trace) for argument in arguments))
    path = save(tmp_path / "refs.p", [{"ref_id": bomb}], protocol)
    with pytest.raises(UnsafePickleError, match=f"({named})") as caught:
        load_plain_pickle(path)
    assert str(path) in str(caught.value) and not trace.exists()


@pytest.mark.parametrize("content", [np.float64(1.0), np.arange(3), collections.OrderedDict(a=1), Runs])
def test_other_classes_are_refused(tmp_path, content):
    with pytest.raises(UnsafePickleError, match="wants to import"):
        load_plain_pickle(save(tmp_path / "refs.p", content, 2))


def test_encodings_other_than_latin1_are_refused(tmp_path):
    import codecs

    with pytest.raises(UnsafePickleError, match="rot13"):
        load_plain_pickle(save(tmp_path / "refs.p", Runs(codecs.encode, "a", "rot13"), 2))


def test_outside_objects_are_refused(tmp_path):
    path = tmp_path / "refs.p"
    path.write_bytes(b"Psomewhere\n.")
    with pytest.raises(UnsafePickleError, match="somewhere"):
        load_plain_pickle(path)


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x04", pickle.dumps([1, 2, "three"])[:-4]])
def test_damaged_files_are_named(tmp_path, content):
    path = tmp_path / "refs.p"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="refs.p is truncated or not a pickle"):
        load_plain_pickle(path)
