"""The files of a source's pattern, and the ids of its documents.

train-*.tar            hidden files and __MACOSX never match
s-{00000..00099}.tar   a hundred names, all of which must exist
set [v1]/0.tar         an existing name is that file
*/*.tar                cc3m/00000.tar gives the ids cc3m/00000/…
gs://me/*.tar          files in a bucket, see `remote`
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from racm3_jax.buckets import BucketPath, is_url
from racm3_jax.documents.readers.files import Folder, is_hidden
from racm3_jax.documents.readers.records import BadRecord, RawRecord, Shard
from racm3_jax.documents.readers.remote import BucketFolder, match_urls

_MAX_NAMES = 1_000_000
_RANGE = re.compile(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?")


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file of a source.

    Attributes:
      path: of the file, which may be in a bucket.
      name: prefix of the ids of its documents: its path below the fixed part of the
        pattern, `cc3m/00000` for `cc3m/00000.tar` and `*/*.tar`.
    """

    path: pathlib.Path | BucketPath
    name: str

    def name_record(self, given: object, number: int) -> str:
        """The id of a record: its given id, or its number in the file.

        Given ids are unique at most in their corpus, so they are prefixed with its
        folder if the pattern spans several.
        """
        if given is None:
            return f"{self.name}/{number:08d}"
        folder, slash, _ = self.name.rpartition("/")
        return f"{folder}{slash}{given}"


def open_folder(
    images: str | None, file: SourceFile, follow_links: bool
) -> Folder | BucketFolder:
    """Base folder of a file's image paths: `images`, or its own folder."""
    if isinstance(file.path, BucketPath):
        place = images or file.path.url.rpartition("/")[0]
    else:
        place = images or file.path.parent
    return BucketFolder(str(place)) if is_url(place) else Folder(place, follow_links)


def cut_files(
    pattern: str,
    usual: str,
    follow_links: bool,
    cut: Callable[[SourceFile], Iterable[Shard]],
) -> list[Shard]:
    """The shards of the files that a pattern matches.

    Args:
      pattern: see the module's docstring.
      usual: usual file names ("*.tar"), for the error message.
      follow_links: also follow matching links to outside the folder.
      cut: the shards of one file.

    Raises:
      FileNotFoundError: nothing matches, or a name in braces does not exist.
      ValueError: a folder.
    """
    if is_url(pattern):
        place, found = match_urls(pattern, expand_braces(pattern), usual)
        names = _shorten([path.url.removeprefix(f"{place}/") for path in found])
        named = zip(found, names, strict=True)
        return [shard for path, name in named for shard in cut(SourceFile(path, name))]
    fixed, paths = _match(pattern, usual)
    folder = Folder(fixed, follow_links)
    alone = pathlib.Path(pattern).is_file()
    shards: list[Shard] = []
    for path, name in zip(paths, _name_files(fixed, paths), strict=True):
        try:
            # A link named by the user is intended.
            if not alone:
                folder.check(path)
        except BadRecord as error:
            shards.append(_refused(path, error))
        else:
            shards += cut(SourceFile(path, name))
    return shards


def _refused(path: pathlib.Path, error: BadRecord) -> Shard:
    def open_refused() -> Iterator[RawRecord]:
        raise error

    return Shard(path.as_posix(), 0, open_refused)


def _name_files(fixed: pathlib.Path, paths: list[pathlib.Path]) -> list[str]:
    return _shorten([path.relative_to(fixed).as_posix() for path in paths])


def _shorten(whole: list[str]) -> list[str]:
    """Paths below a folder, without suffixes if these are not needed."""
    short = [pathlib.PurePath(name).with_suffix("").as_posix() for name in whole]
    return short if max(Counter(short).values()) == 1 else whole


def _match(pattern: str, usual: str) -> tuple[pathlib.Path, list[pathlib.Path]]:
    """The fixed part of a pattern, and the files that match it, sorted."""
    path = pathlib.Path(pattern)
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        raise ValueError(
            f"{pattern!r} is a folder; name its files, as {(path / usual).as_posix()!r}"
        )
    fixed = pathlib.Path(path.anchor)
    parts = list(path.relative_to(path.anchor).parts if path.anchor else path.parts)
    while len(parts) > 1 and (fixed / parts[0]).is_dir():
        fixed /= parts.pop(0)
    found: set[pathlib.Path] = set()
    missing = []
    for rest in expand_braces("/".join(parts)):
        if (fixed / rest).is_file():
            matches = [rest]
        else:
            matches = glob.glob(rest, root_dir=fixed, recursive=True)
        # `._0.tar` never matches `*.tar`, but a hidden file may be given by name.
        hidden = is_hidden(rest)
        own = {
            fixed / match
            for match in matches
            if (hidden or not is_hidden(match)) and (fixed / match).is_file()
        }
        if not own:
            missing.append(rest)
        found |= own
    if found and missing:
        raise FileNotFoundError(
            f"{len(missing)} of the names in {pattern} do not exist; the first is "
            f"{fixed / missing[0]}"
        )
    if not found:
        raise FileNotFoundError(f"no file matches {pattern}")
    return fixed, sorted(found)


def expand_braces(pattern: str) -> list[str]:
    """`"{a,b}-{08..10}"` -> `["a-08", "a-09", "a-10", "b-08", "b-09", "b-10"]`.

    Braces without a comma or a range are part of the name.

    Raises:
      ValueError: more than a million names.
    """
    depth, start, commas = 0, 0, []
    for place, letter in enumerate(pattern):
        if letter == "{":
            depth += 1
            if depth == 1:
                start, commas = place, []
        elif letter == "," and depth == 1:
            commas.append(place)
        elif letter == "}" and depth:
            depth -= 1
            choices = None if depth else _choices(pattern, start, commas, place)
            if choices is not None:
                inner = [name for choice in choices for name in expand_braces(choice)]
                rests = expand_braces(pattern[place + 1 :])
                _check_count(len(inner) * len(rests), pattern)
                return [pattern[:start] + a + b for a in inner for b in rests]
    return [pattern]


def _choices(
    pattern: str, start: int, commas: list[int], stop: int
) -> list[str] | None:
    """The alternatives in braces; None if there are none."""
    if commas:
        edges = [start, *commas, stop]
        return [pattern[a + 1 : b] for a, b in itertools.pairwise(edges)]
    numbers = _RANGE.fullmatch(pattern[start + 1 : stop])
    if not numbers:
        return None
    first, last = int(numbers[1]), int(numbers[2])
    step = max(1, int(numbers[3] or 1)) * (1 if first <= last else -1)
    _check_count(abs(last - first) // abs(step), pattern)
    padded = numbers[1].startswith("0") or numbers[2].startswith("0")
    width = max(len(numbers[1]), len(numbers[2])) if padded else 0
    edge = last + (1 if step > 0 else -1)
    return [f"{n:0{width}d}" for n in range(first, edge, step)]


def _check_count(count: int, pattern: str) -> None:
    if count > _MAX_NAMES:
        raise ValueError(
            f"the braces of {pattern} expand to more than {_MAX_NAMES} names; use *"
        )
