"""The things of nine icon sets, joined by name.

    emojibase: code point -> "cactus"      icon set: code point or name -> SVG body

A *thing* is a label of emojibase ("cactus"); an *icon set* is a package of a vendor (the
key `house`). Fluent and Fluent Flat are two sets of one vendor, with similar images.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tarfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
NAMES_PACKAGE = "emojibase-data@17.0.0"
# Of emojibase, what is a thing: no faces, people, flags or symbols.
GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")


class IconSet(NamedTuple):
    """One package of images.

    Attributes:
      name: of the set, and in ids.
      package: of npm, with its version: other versions have other images.
      house: the vendor.
      title: what captions call it.
      licence: SPDX names, of the images.
      url: of the source.
    """

    name: str
    package: str
    house: str
    title: str
    licence: str
    url: str


_NOTO = "https://github.com/googlefonts/noto-emoji"
_FLUENT = "https://github.com/microsoft/fluentui-emoji"
SETS = (
    IconSet("noto", "noto@1.2.9", "noto", "Noto", "Apache-2.0", _NOTO),
    IconSet("noto-v1", "noto-v1@1.2.5", "noto-v1", "Noto v1", "Apache-2.0", _NOTO),
    IconSet(
        *("twemoji", "twemoji@1.2.5", "twemoji", "Twemoji", "CC-BY-4.0"),
        "https://github.com/jdecked/twemoji",
    ),
    IconSet(
        *("openmoji", "openmoji@1.2.29", "openmoji", "OpenMoji", "CC-BY-SA-4.0"),
        "https://github.com/hfg-gmuend/openmoji",
    ),
    IconSet("fluent-emoji", "fluent-emoji@1.2.7", "fluent", "Fluent", "MIT", _FLUENT),
    IconSet(
        *("fluent-emoji-flat", "fluent-emoji-flat@1.2.6", "fluent", "Fluent Flat"),
        *("MIT", _FLUENT),
    ),
    IconSet(
        *("emojione", "emojione@1.2.3", "emojione", "EmojiOne", "CC-BY-4.0"),
        "https://github.com/EmojiTwo/emojitwo",
    ),
    IconSet(
        *("emojione-v1", "emojione-v1@1.2.3", "emojione-v1", "EmojiOne v1"),
        *("CC-BY-SA-4.0", "https://github.com/joypixels/emojione-legacy"),
    ),
    IconSet(
        *("fxemoji", "fxemoji@1.2.2", "fxemoji", "FxEmoji", "Apache-2.0"),
        "https://github.com/mozilla/fxemoji",
    ),
)
BY_NAME = {icon_set.name: icon_set for icon_set in SETS}
SPLITS = ("train", "held_out")


class Thing(NamedTuple):
    """A thing in emojibase: its label, its code points without variants."""

    label: str
    hexcode: str


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One thing by one vendor, as SVG.

    Attributes:
      thing: its label.
      icon_set: that contains it.
      split: "train" or "held_out".
      svg: a complete SVG file.
    """

    thing: str
    icon_set: IconSet
    split: str
    svg: str

    @property
    def key(self) -> str:
        """Its name in a webdataset, without dots."""
        return f"{self.icon_set.name}-{slug(self.thing)}"

    @property
    def source(self) -> str:
        """Equal for images that must not be retrieved for one another."""
        return f"emojiworld:{self.icon_set.house}/{slug(self.thing)}"


def read_split(folder: Path = HERE) -> dict[str, str]:
    """The split of every thing, from `train.txt` and `held_out.txt`."""
    return {
        label: split
        for split in SPLITS
        for label in (folder / f"{split}.txt").read_text("utf-8").splitlines()
    }


def slug(text: str) -> str:
    """Mount Fuji -> mount-fuji."""
    plain = unicodedata.normalize("NFKD", text.lower()).encode("ascii", "ignore")
    return re.sub(r"[^a-z0-9]+", "-", plain.decode()).strip("-")


def _plain_hexcode(hexcode: str) -> str:
    """Without variant selectors, which only some sets have."""
    parts = hexcode.lower().split("-")
    return "-".join(p for p in parts if p not in ("fe0e", "fe0f"))


def read_member(package: Path, name: str) -> Any:
    """A JSON file of an npm package, without unpacking it."""
    with tarfile.open(package, "r:gz") as archive:
        stream = archive.extractfile(f"package/{name}")
        if stream is None:
            raise ValueError(f"{package} has no {name}: remove it and fetch it again")
        return json.load(stream)


def read_things(package: Path, labels: Mapping[str, str]) -> list[Thing]:
    """The things of these labels, in emojibase's order.

    Raises:
      ValueError: one of them is missing or repeated.
    """
    groups = read_member(package, "meta/groups.json")["groups"]
    things = [
        Thing(entry["label"], _plain_hexcode(entry["hexcode"]))
        for entry in read_member(package, "en/data.json")
        if groups.get(str(entry.get("group"))) in GROUPS and entry["label"] in labels
    ]
    found = [thing.label for thing in things]
    missing = sorted(set(labels) - set(found))
    if missing or len(set(found)) != len(found):
        raise ValueError(
            f"{package.name} has {len(found)} of {len(labels)} things; missing: "
            f"{', '.join(missing[:5]) or 'none'}: fetch {NAMES_PACKAGE}"
        )
    return things


class Icons:
    """The images of one package.

    Args:
      icons: its icons.json.
      chars: its chars.json; empty where it has no code points.
    """

    def __init__(self, icons: Mapping[str, Any], chars: Mapping[str, str]) -> None:
        self._icons, self._aliases = icons["icons"], icons.get("aliases", {})
        self._defaults = icons
        self.chars = {_plain_hexcode(code): name for code, name in chars.items()}
        names = [*self._aliases, *self._icons]
        self._flat = {name.replace("-", ""): name for name in names}
        self._names = set(names)

    def find(self, thing: Thing, others: Sequence[Icons]) -> str | None:
        """The name of its icon: by code point, else by label and names in other sets."""
        if self.chars:
            return self.chars.get(thing.hexcode)
        names = [slug(thing.label)]
        names += [
            other.chars[thing.hexcode]
            for other in others
            if thing.hexcode in other.chars
        ]
        if "-" not in thing.hexcode:
            names.append(slug(unicodedata.name(chr(int(thing.hexcode, 16)), "")))
        for name in names:
            if name in self._names:
                return name
        for name in names:
            if name and name.replace("-", "") in self._flat:
                return self._flat[name.replace("-", "")]
        return None

    def svg(self, name: str) -> str | None:
        """The icon as a file; aliases are followed."""
        while name in self._aliases:
            name = self._aliases[name]["parent"]
        if name not in self._icons:
            return None
        icon = self._icons[name]

        def size(key: str, default: int) -> Any:
            return icon.get(key, self._defaults.get(key, default))

        width, height = size("width", 16), size("height", 16)
        box = f"{size('left', 0)} {size('top', 0)} {width} {height}"
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" '
            'xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )


def read_drawings(
    packages: Mapping[str, Path], splits: Mapping[str, str]
) -> Iterator[Drawing]:
    """Every image, by split and thing.

    Args:
      packages: files of the icon sets by their names, and of emojibase as "names".
      splits: of every thing, by label.
    """
    things = read_things(packages["names"], splits)
    opened = {
        icon_set.name: Icons(
            read_member(packages[icon_set.name], "icons.json"),
            read_member(packages[icon_set.name], "chars.json"),
        )
        for icon_set in SETS
    }
    with_chars = [icons for icons in opened.values() if icons.chars]
    for split in SPLITS:
        for thing in things:
            if splits[thing.label] != split:
                continue
            for icon_set in SETS:
                icons = opened[icon_set.name]
                name = icons.find(thing, with_chars)
                svg = None if name is None else icons.svg(name)
                if svg is not None:
                    yield Drawing(thing.label, icon_set, split, svg)
