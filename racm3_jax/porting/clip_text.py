"""Builds a `TextTokenizer` with OpenAI's ids from CLIP's merges.

0 .. 255         the bytes, in the order of `byte_symbols`
256 .. 511       the bytes that end a word, `a</w>`
512 ..           one id per merge
the two highest  <|startoftext|> <|endoftext|>: not in the tokenizer, as a text
                 could otherwise produce them; `CLIPTokenizer` adds them
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from racm3_jax.porting.files import read_json
from racm3_jax.porting.tensors import PortingError, foreign_settings
from racm3_jax.tokenizers.bpe import TextTokenizer

END_OF_WORD = "</w>"
CONTROL = ("<|startoftext|>", "<|endoftext|>")
# Contractions, runs of letters, single digits, runs of anything else. CLIP's pattern
# ignores case, by which the long s opens a contraction too, and the iota subscript
# U+0345 is neither a letter nor anything else.
_WORDS = r"'[s\x{17F}]|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}\x{345}]+"
OPENAI_MERGES = "bpe_simple_vocab_16e6.txt.gz"
_MERGE_FILES = (OPENAI_MERGES, "bpe_simple_vocab_16e6.txt", "merges.txt")

_MAX_MERGES_BYTES = 20_000_000

Merge = tuple[str, str]


def byte_symbols() -> list[str]:
    """The character for each byte, in the order of CLIP's first ids.

    Printable bytes of Latin-1 represent themselves and come first; the others follow as
    the characters from U+0100.
    """
    ranges = (range(33, 127), range(161, 173), range(174, 256))
    own = [chr(byte) for part in ranges for byte in part]
    return own + [chr(256 + i) for i in range(256 - len(own))]


def find_merges(folder: Path, merges: str | Path | None) -> list[Merge]:
    """Reads the merges that were given, or those in `folder`.

    Raises:
      PortingError: there are none.
    """
    if merges is not None:
        return read_merges(Path(merges))
    for name in _MERGE_FILES:
        if (folder / name).exists():
            return read_merges(folder / name)
    if (folder / "tokenizer.json").exists():
        return read_merges(folder / "tokenizer.json")
    raise PortingError(
        f"{folder} has no merges of a BPE: put {OPENAI_MERGES} of OpenAI's CLIP "
        "repository there (or Hugging Face's merges.txt), or give it with --merges"
    )


def read_merges(path: Path) -> list[Merge]:
    """Merges of a `tokenizer.json`, or of a text file with a header and one per line.

    Raises:
      PortingError: no such file, or not of that form.
    """
    if path.suffix == ".json":
        with foreign_settings(path):
            found = read_json(path)["model"]["merges"]
            if not isinstance(found, list):
                raise PortingError(f"{path} is not a tokenizer.json of a BPE")
            lines = [m if isinstance(m, str) else " ".join(m) for m in found]
    else:
        try:
            with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
                content = file.read(_MAX_MERGES_BYTES + 1)
            if len(content) > _MAX_MERGES_BYTES:
                raise PortingError(
                    f"{path} holds more than {_MAX_MERGES_BYTES:,} bytes, more than the "
                    "merges of any CLIP: see --merges"
                )
            lines = content.decode("utf-8").split("\n")[1:]
        except FileNotFoundError:
            raise PortingError(f"{path} does not exist: see --merges") from None
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise PortingError(f"{path} is damaged ({error}): see --merges") from None
    merges = []
    for line in lines:
        if not line:
            break
        first, _, second = line.partition(" ")
        if not first or not second or " " in second:
            raise PortingError(f"{path} holds {line!r}, which is not a merge of two")
        merges.append((first, second))
    return merges


def build_clip_tokenizer(merges: list[Merge], vocab_size: int) -> TextTokenizer:
    """The tokenizer whose ids are those of a CLIP with `vocab_size` ids.

    Args:
      merges: best first; OpenAI's file has more than its models use.
      vocab_size: of the CLIP, including its two control tokens.

    Raises:
      PortingError: too few merges, or inconsistent ones.
    """
    symbols = byte_symbols()
    vocab = symbols + [symbol + END_OF_WORD for symbol in symbols]
    needed = vocab_size - len(CONTROL) - len(vocab)
    if not 0 <= needed <= len(merges):
        raise PortingError(
            f"{len(merges)} merges give at most {len(vocab) + len(merges) + 2} ids, but "
            f"the CLIP has {vocab_size}: these are the merges of another model"
        )
    merges = merges[:needed]
    vocab += ["".join(merge) for merge in merges]
    ids = {token: i for i, token in enumerate(vocab)}
    if len(ids) != len(vocab):
        raise PortingError("two merges give the same token: the merges are damaged")
    try:
        model = BPE(vocab=ids, merges=merges, end_of_word_suffix=END_OF_WORD)
    # The library raises plain Exception for merges of unknown tokens.
    except Exception as error:  # noqa: BLE001
        raise PortingError(f"the merges are damaged: {error}") from None
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Sequence(
        [
            Split(Regex(_WORDS), behavior="removed", invert=True),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = ByteLevelDecoder()
    return TextTokenizer(tokenizer)
