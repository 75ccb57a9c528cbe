"""The public CIFAR archives: fetched once, resumed where a download broke off, checked, and read in place."""

import gzip
import stat
import tarfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pooch
import requests

from fedtalos.errors import InputError, shown
from fedtalos.files import in_turn, naming, opened
from fedtalos.progress import Bar, silent

HOME = "https://www.cs.toronto.edu/~kriz/"
CHECKSUMS = {
    "cifar-100-python.tar.gz": "sha256:85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    "cifar-10-python.tar.gz": "sha256:6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
}
"""The checksums that Keras uses; the publisher's page has MD5 only."""
RETRIES = 3
TIMEOUT = (10, 60)  # seconds to connect, seconds without a byte
CHUNK = 2**18  # bytes
LARGEST = 2**28  # bytes unpacked; the archives hold 187 million
TIMES, MORE = 100, 2**24  # bytes unpacked of one, and beyond that; images hardly shrink when they are packed
MOST_MEMBERS = 1000  # files in an archive; ours hold nine


def fetch_archive(
    name: str, folder: Path, bar: Bar = silent, *, base_url: str = HOME, checksums: Mapping[str, str] = CHECKSUMS
) -> Path:
    """Download the archive ``name`` into ``folder`` and return its path.

    A download that broke off leaves NAME.part, which the retries here or the next call continue. Of several processes
    that want it at once, one downloads, and the others wait for it.

    Raises InputError where the archive cannot be had, or its checksum is not the published one.

    >>> archive = fetch_archive("cifar-100-python.tar.gz", Path("data"))
    """
    is_new = not folder.exists()
    pooch.get_logger().setLevel("ERROR")  # its retries speak for themselves in our one sentence
    archives = pooch.create(path=folder, base_url=base_url, registry=dict(checksums), retry_if_failed=RETRIES)
    try:
        with in_turn(folder / f".{name}.lock", bar, f"waiting for a run that downloads {name}"):
            return Path(archives.fetch(name, downloader=partial(_download, bar=bar)))
    except (requests.RequestException, OSError, ValueError) as error:
        if is_new and folder.is_dir() and not any(folder.iterdir()):  # pooch makes it before it asks
            folder.rmdir()
        raise InputError(
            f"{name} could not be fetched from {base_url} ({_reason(error)}): try again where there is a network, "
            f"or put the file into {folder} by hand (another folder: data_dir)"
        ) from error


def _reason(error: Exception) -> str:
    match error:
        case requests.HTTPError():
            return f"the server answered {error.response.status_code}"
        case requests.Timeout():
            return "the server did not answer in time"
        case requests.RequestException():
            return "no connection, or it broke off"
        case OSError():
            return str(error)
        case _:  # pooch's ValueError
            return "its checksum is not the published one"


def _download(url: str, output: str, archives: pooch.Pooch, *, bar: Bar) -> None:
    """Continue NAME.part and hand it over as ``output`` when it is complete (a downloader for pooch).

    A part that does not belong to the file (the server's copy changed, the part is too long) ends in a wrong
    checksum. Then pooch drops it, and its next try starts afresh.
    """
    part = archives.abspath / f"{Path(url).name}.part"
    start = part.stat().st_size if part.exists() else 0
    # identity: lengths and ranges then count the file's own bytes
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code != requests.codes.requested_range_not_satisfiable:  # else nothing is missing
            response.raise_for_status()
            _append(response, part, bar)
    part.replace(output)


def _append(response: requests.Response, part: Path, bar: Bar) -> None:
    continues = response.status_code == requests.codes.partial_content  # a plain 200 sends the whole file again
    with opened(part, "ab" if continues else "wb") as file:
        length = response.headers.get("Content-Length")
        total = None if length is None else file.tell() + int(length)
        with bar(part.stem, total, "bytes") as advance:
            advance(file.tell())
            for chunk in response.iter_content(CHUNK):
                with naming(part):
                    file.write(chunk)
                advance(len(chunk))
        if total is not None and file.tell() < total:  # older urllib3 ends a cut stream without an error
            raise requests.ConnectionError(f"{file.tell()} of {total} bytes")


class _Unpacked:
    """Unpacked bytes of an archive, as a stream: LARGEST at most, and not out of proportion to its size."""

    def __init__(self, archive: Path, stream: gzip.GzipFile) -> None:
        self._archive, self._stream = archive, stream
        self._most = self._left = min(LARGEST, TIMES * archive.stat().st_size + MORE)

    def read(self, size: int) -> bytes:
        content = self._stream.read(min(size, self._left + 1))
        self._left -= len(content)
        if self._left < 0:
            raise InputError(f"{self._archive} holds more than {self._most} bytes: replace it by the original")
        return content


class _Member(tarfile.TarInfo):
    """A member of an archive, whose size is no less than nothing: a negative one would be read again for ever.

    That is how Python itself mends CVE-2025-8194, in versions later than some that this runs on.
    """

    def _block(self, count: int) -> int:
        if count < 0:
            raise tarfile.ReadError("a member of negative size")
        return super()._block(count)  # type: ignore[misc, no-any-return]


def read_members(archive: Path, names: set[str]) -> dict[str, bytes]:
    """Read the named files out of a .tar.gz, by name; nothing is written to disk, and no more kept than these.

    Raises InputError where one is missing, the archive is damaged, or it is far larger than it should be.

    >>> members = read_members(Path("data/cifar-100-python.tar.gz"), {"cifar-100-python/meta"})
    """
    if not stat.S_ISREG(archive.stat().st_mode):
        raise InputError(f"{archive} is no plain file: move it away, and it is downloaded again")
    found: dict[str, bytes] = {}
    try:
        with gzip.open(archive) as packed:
            stream = _Unpacked(archive, packed)
            with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member) as tar:  # type: ignore[call-overload]
                for number, member in enumerate(tar, start=1):
                    if number > MOST_MEMBERS:
                        raise tarfile.ReadError(f"more than {MOST_MEMBERS} members")
                    # Neither links nor sparse files, which may claim to be as large as they like.
                    plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
                    if plain and member.name in names and (content := tar.extractfile(member)):
                        found[member.name] = content.read()
            while stream.read(CHUNK):  # to the end, where gzip's own checksum is
                pass
    except InputError:
        raise
    except Exception as error:  # headers of strangers make tarfile raise nearly anything
        raise InputError(f"{archive} is damaged ({shown(error)}): move it away, and it is downloaded again") from error
    if missing := sorted(names - found.keys()):
        raise InputError(f"{archive} lacks {missing[0]}: move it away, and it is downloaded again")
    return found
