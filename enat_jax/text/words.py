"""A tokenizer of captions for small data: a table of the words that training captions have."""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Int32

from enat_jax.errors import UserError, printable

_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")  # letters and digits; ' and - stand inside
_NAMED = 8  # unknown words in a warning


class Words:
    """Captions as numbers of their words: from 1 on as `words` stand, 0 behind the last.

    Words are lower-cased. What is neither a letter nor a digit, nor an apostrophe or a hyphen
    inside a word, parts them and is lost. Words that are not in the table are left out, and each
    is named in a warning once.

    Attributes:
        words: the table, in sorted order.
        length: ids per caption.
    """

    name = "words"

    def __init__(self, words: Sequence[str], length: int, *, warn: Callable[[str], object] = print):
        self.words, self.length = tuple(sorted(words)), length
        text = "\n".join([self.name, str(length), *self.words])
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        self._ids = {word: number for number, word in enumerate(self.words, 1)}
        self._warn, self._unknown, self._warned_of_cut = warn, set[str](), False

    @property
    def vocabulary(self) -> int:
        """The ids lie below: the words and the padding."""
        return len(self.words) + 1

    def __call__(self, captions: Sequence[str]) -> Int32[np.ndarray, "b t"]:
        """Ids of captions, as `TextTokenizer` says."""
        ids, cut = np.zeros((len(captions), self.length), np.int32), 0
        unknown: dict[str, None] = {}
        for row, caption in zip(ids, captions, strict=True):
            words = split_words(caption)
            known = [self._ids[word] for word in words if word in self._ids]
            unknown.update(dict.fromkeys(word for word in words if word not in self._ids))
            row[: len(known)] = known[: self.length]
            cut += len(known) > self.length
        if cut and not self._warned_of_cut:
            self._warned_of_cut = True
            self._warn(f"captions of more than {self.length} words are cut: {cut} of {len(ids)}")
        if new := [word for word in unknown if word not in self._unknown]:
            self._unknown.update(new)
            more = f" and {len(new) - _NAMED} more" if len(new) > _NAMED else ""
            named = ", ".join(map(printable, new[:_NAMED]))
            self._warn(f"words that no training caption has are left out: {named}{more}")
        return ids


def words_of(
    captions: Iterable[str], length: int = 0, *, warn: Callable[[str], object] = print
) -> Words:
    """The table of all words in some captions; `length` 0 takes the longest caption's.

    Raises:
        UserError: the captions hold no words.
    """
    words, longest = set[str](), 0
    for caption in captions:
        parts = split_words(caption)
        words.update(parts)
        longest = max(longest, len(parts))
    if not words:
        raise UserError("the captions hold no words")
    return Words(sorted(words), length or longest, warn=warn)


def split_words(caption: str) -> list[str]:
    """The words of a caption, lower-cased, in their order."""
    plain = unicodedata.normalize("NFC", caption).replace("\u2019", "'")  # the typographic one
    return _WORD.findall(plain.lower())
