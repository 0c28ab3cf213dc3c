"""Strings of all kinds that occur in captions from the web; seeded."""

from __future__ import annotations

import unicodedata

import numpy as np

PIECES = [
    *[
        "a",
        "photo",
        "of",
        "the",
        "flag",
        "on",
        "moon",
        "beach",
        "red",
        "blue",
        "striped",
        "dog's",
        "can't",
        "we're",
        "I'll",
    ],
    *["Café", "naïve", "Ångström", "ÉCOLE", "straße", "İstanbul", "ΣΊΣΥΦΟΣ", "Москва"],
    *["北京", "東京タワー", "안녕하세요", "สวัสดี", "مرحبا", "שלום", "नमस्ते"],
    *[
        "😀",
        "👩\u200d👩\u200d👧\u200d👦",
        "🇫🇷",
        "❤️",
        "👍🏽",
        "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
        "✈",
        "©",
    ],
    *[
        "&amp;",
        "&lt;b&gt;",
        "&eacute;",
        "&#39;",
        "&#x1F600;",
        "&nbsp;",
        "&copy",
        "&notanentity;",
    ],
    *[
        "“quoted”",
        "‘single’",
        "ﬁne",
        "Ｆｕｌｌ",
        "ｶﾅ",
        "…",
        "—",
        "½",
        "x²",
        "3.14",
        "1,000,000",
        "#tag",
        "@user",
    ],
    *[
        "http://example.org/a?b=c&d=e",
        "name@mail.com",
        "<br/>",
        "C++",
        "a_b",
        "---",
        "!!!",
    ],
    *[
        "antidisestablishmentarianism",
        "zzzxqj",
        "IMG_20190412.JPG",
        "16:9",
        "'tis",
        "o'clock",
    ],
    *(
        "\u200b",
        "\u00a0",
        "\x07",
        "e\u0301",
        "\r\n",
        "\t",
        "\ufeff",
        "\u2028",
        "\U0010ffff",
    ),
]


def make_strings(number: int, seed: int = 0) -> list[str]:
    """Each 0 to 12 pieces; every 50th has hundreds."""
    rng = np.random.default_rng(seed)
    strings = []
    for i in range(number):
        length = int(rng.integers(100, 200) if i % 50 == 49 else rng.integers(0, 13))
        chosen = rng.integers(len(PIECES), size=length)
        glue = (" ", "  ", "")[int(rng.integers(3))]
        words = [PIECES[j] for j in chosen]
        if rng.random() < 0.1:
            words = [word.upper() for word in words]
        if rng.random() < 0.3:
            rare = map(chr, rng.integers(33, 0x2FFF, 5))
            # Which characters are unassigned depends on the library's version.
            words.append("".join(c for c in rare if unicodedata.category(c) != "Cn"))
        strings.append(glue.join(words))
    return strings
