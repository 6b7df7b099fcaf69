"""Members of wheels, tarballs and Debian packages, of sound and of hostile ones."""

import io
import lzma
import tarfile
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavis_svp.common.files import BadFileError
from lavis_svp.zoo.archives import read_members

FILES = {"share/a.jpg": b"first", "share/b.jpg": b"the second" * 50, "share/c/d.jpg": b""}
ENDINGS = ("whl", "tgz", "deb")


def tarball(files, mode="w:gz", prefix=""):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as opened:
        for name, content in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def ar(members):
    parts = [b"!<arch>\n"]
    for name, content in members.items():
        parts += [f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode(), content]
        parts += [b"\n"] * (len(content) % 2)
    return b"".join(parts)


def deb(files, compression="xz"):
    suffix = f".{compression}" if compression else ""
    control = tarball({"control": b"x" * 7}, "w:xz")
    return ar(
        {
            "debian-binary": b"2.0",
            "control.tar.xz": control,
            f"data.tar{suffix}": tarball(files, f"w:{compression}", "./"),
        }
    )


def archive(folder, ending, files=FILES):
    path = folder / f"archive.{ending}"
    if ending == "whl":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
            for name, content in files.items():
                wheel.writestr(name, content)
    else:
        path.write_bytes(tarball(files) if ending == "tgz" else deb(files))
    return path


@pytest.mark.parametrize("ending", ENDINGS)
def test_members_come_in_the_order_asked(tmp_path, ending):
    path = archive(tmp_path, ending)
    wanted = ["share/c/d.jpg", "share/a.jpg"]
    assert list(read_members(path, wanted).items()) == [(name, FILES[name]) for name in wanted]
    assert read_members(path, []) == {}


@pytest.mark.parametrize("compression", ["xz", "gz", "bz2", ""])
def test_every_compression_of_a_deb(tmp_path, compression):
    path = tmp_path / "x.deb"
    path.write_bytes(deb(FILES, compression))
    assert read_members(path, list(FILES)) == FILES


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_missing_member_is_named(tmp_path, ending):
    path = archive(tmp_path, ending)
    with pytest.raises(BadFileError, match=rf"{path} holds no file 'share/z.jpg' \(1 of 2 lack\)"):
        read_members(path, ["share/a.jpg", "share/z.jpg"])


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_member_is_bounded(tmp_path, ending):
    path = archive(tmp_path, ending, {"bomb": bytes(5000)})
    with pytest.raises(BadFileError, match="bomb has 5,000 bytes; what is read out of an archive has at most 4,999"):
        read_members(path, ["bomb"], max_bytes=4999)
    assert read_members(path, ["bomb"], max_bytes=5000) == {"bomb": bytes(5000)}


@pytest.mark.parametrize("ending", ["tgz", "deb"])
def test_links_and_devices_are_no_members(tmp_path, ending):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as opened:
        for name, kind in (("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("null", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            opened.addfile(info)
    path = tmp_path / f"x.{ending}"
    path.write_bytes(packed.getvalue() if ending == "tgz" else ar({"data.tar.gz": packed.getvalue()}))
    for name in ("link", "hard", "null"):
        with pytest.raises(BadFileError, match="holds no file"):
            read_members(path, [name])


def test_what_is_beside_the_files_of_a_deb_is_not_read(tmp_path):
    with pytest.raises(BadFileError, match="holds no file"):
        read_members(archive(tmp_path, "deb"), ["control"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin as an ar archive"),
        (b"PK", "does not begin as an ar archive"),
        (b"!<arch>\n", "holds none of data.tar.xz"),
        (b"!<arch>\nshort", "is damaged"),
        (ar({"data.tar.zst": b"x"}), "holds none of data.tar.xz"),
        (ar({"a": b"x"}).replace(b"1         `", b"-1        `"), "is damaged"),
        (ar({"data.tar.xz": b"no archive"}), "is damaged or of another kind"),
        (ar({str(number): b"" for number in range(40)} | {"data.tar": tarball(FILES, "w")}), "holds none of"),
        (ar({"data.tar.xz": lzma.compress(b"\0" * 1024)[:-9]}), "holds no file|is damaged"),
    ],
)
def test_damaged_debs_are_one_line(tmp_path, content, message):
    path = tmp_path / "x.deb"
    path.write_bytes(content)
    with pytest.raises(BadFileError, match=message) as error:
        read_members(path, ["share/a.jpg"])
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), ending=st.sampled_from(ENDINGS))
def test_a_damaged_archive_gives_the_content_or_one_error(tmp_path, data, ending):
    path = archive(tmp_path, ending)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        found = read_members(path, list(FILES), max_bytes=1000)
    except BadFileError as error:
        assert "\n" not in str(error)
    else:
        assert set(found) == set(FILES) and all(len(one) <= 1000 for one in found.values())
