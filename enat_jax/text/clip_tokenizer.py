"""CLIP's tokenizer of captions: byte pairs of lower-cased words, cut at spaces and punctuation.

Its two implementations differ in what they do to a caption beforehand. For printable ASCII without
HTML's entities their ids are the same, so that either serves English captions; for anything else
features are only those of an original where the rule is the original's.

* `hugging_face` (U-ViT, AdaNAT, open-muse, Stable Diffusion): Unicode's NFC; entities stay.
* `open_clip_ftfy` (MUSE): mojibake and typographic characters mended by `ftfy`, entities resolved
  twice. `open_clip` is the same without ftfy, for where that is not installed: accents that stand
  alone, curly quotes, ligatures, full-width letters and control characters stay as they are.
"""

import hashlib
import html
import importlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32

from enat_jax.config_file import limited
from enat_jax.errors import UserError

Rule = Literal["hugging_face", "open_clip", "open_clip_ftfy"]

_START, _END = "<|startoftext|>", "<|endoftext|>"
_OPEN_CLIP = {_START: "<start_of_text>", _END: "<end_of_text>"}  # as captions can hold them
_PARTS = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class CLIPTokenizerConfig:
    """All that decides the ids of captions.

    Attributes:
        rule: what is done to a caption beforehand.
        padding: the id behind a caption's end: that of CLIP's own users is the end's, for which -1
            stands, MUSE's and AdaNAT's is 0.
        length: ids per caption, start and end among them.
        vocab: the text of `vocab.json`, token to id.
        merges: the text of `merges.txt`, pairs of tokens in the order in which they are joined.
    """

    rule: Rule = "hugging_face"
    padding: int = limited(-1, at_least=-1)
    length: int = limited(77, at_least=2)
    vocab: str = field(default="{}", repr=False)
    merges: str = field(default="", repr=False)


def open_clip_rule() -> Rule:
    """Open_clip's rule as it can be followed here: with ftfy where that is installed."""
    return "open_clip_ftfy" if importlib.util.find_spec("ftfy") else "open_clip"


class CLIPTokenizer:
    """Captions as ids: start, byte pairs, end, then padding; attributes as `TextTokenizer`'s.

    Args:
        cfg: the rule and the two files.
        warn: told once that captions are cut.

    Raises:
        UserError: files that are none of CLIP's or do not fit each other; a package is missing.
    """

    name = "clip"

    def __init__(self, cfg: CLIPTokenizerConfig, *, warn: Callable[[str], object] = print):
        ids = _read_vocab(cfg.vocab)
        self.cfg, self.length, self.vocabulary = cfg, cfg.length, max(ids.values()) + 1
        self._start, self._end = ids[_START], ids[_END]
        self._padding = self._end if cfg.padding == -1 else cfg.padding
        if self._padding >= self.vocabulary:
            raise UserError(f"padding = {cfg.padding} must be below {self.vocabulary}")
        self._fix = _package("ftfy").fix_text if cfg.rule == "open_clip_ftfy" else str
        self._byte_pairs = _byte_pairs(ids, cfg.merges, cfg.rule)
        self._warn, self._warned = warn, False
        text = json.dumps([self.name, asdict(cfg)], sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def __call__(self, captions: Sequence[str]) -> Int32[np.ndarray, "b t"]:
        """Ids of captions, as `TextTokenizer` says."""
        rows = np.full((len(captions), self.length), self._padding, np.int32)
        cut = 0
        for row, caption in zip(rows, captions, strict=True):
            ids = [self._start, *self._byte_pairs.encode(self._cleaned(caption)).ids]
            kept = [*ids[: self.length - 1], self._end]
            row[: len(kept)] = kept
            cut += len(ids) >= self.length
        if cut and not self._warned:
            self._warned = True
            self._warn(f"captions of more than {self.length} ids are cut: {cut} of {len(rows)}")
        return rows

    def _cleaned(self, caption: str) -> str:
        if self.cfg.rule == "hugging_face":
            return caption
        return " ".join(html.unescape(html.unescape(self._fix(caption))).split()).lower()


def _read_vocab(text: str) -> dict[str, int]:
    """Token to id, all bytes and both ends of a caption among the tokens."""
    try:
        ids = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"vocab.json is no JSON: {error}") from error
    numbers = ids.values() if isinstance(ids, dict) else [None]
    if not all(type(number) is int and 0 <= number < 2**31 for number in numbers):
        raise UserError("vocab.json is no CLIP vocabulary: not of tokens and their ids")
    alphabet = _package("tokenizers").pre_tokenizers.ByteLevel.alphabet()
    needed = {_START, _END, *alphabet, *(f"{byte}</w>" for byte in alphabet)}
    if lacking := sorted(needed - set(ids)):
        raise UserError(f"vocab.json is no CLIP vocabulary: it lacks {len(lacking)} of"
                        f" {len(needed)} tokens that all have, {lacking[0]!r} first")  # fmt: skip
    return ids


def _byte_pairs(ids: dict[str, int], merges: str, rule: Rule) -> Any:
    """The tokenizer of what was cleaned, without start, end and padding."""
    library = _package("tokenizers")
    ends = [_START, _END]
    if rule != "hugging_face":
        ids = {_OPEN_CLIP.get(token, token): number for token, number in ids.items()}
        ends = [_OPEN_CLIP[token] for token in ends]
    lines = [line for line in merges.splitlines() if line and not line.startswith("#version")]
    pairs = [tuple(line.split(" ")) for line in lines]
    if odd := [line for line, pair in zip(lines, pairs, strict=True) if len(pair) != 2]:
        raise UserError(f"merges.txt is no list of pairs: {odd[0]!r:.80}")
    try:
        model = library.models.BPE(
            vocab=ids, merges=pairs, continuing_subword_prefix="", end_of_word_suffix="</w>"
        )
    except Exception as error:  # the library has no class of its own for them
        raise UserError(f"merges.txt does not fit vocab.json: {error}") from error
    tokenizer = library.Tokenizer(model)
    expression = library.Regex
    if rule == "hugging_face":
        steps = library.normalizers
        one_space = steps.Replace(expression(r"\s+"), " ")
        tokenizer.normalizer = steps.Sequence([steps.NFC(), one_space, steps.Lowercase()])
    parts = library.pre_tokenizers
    split = parts.Split(expression(_PARTS), behavior="removed", invert=True)
    to_bytes = parts.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = parts.Sequence([split, to_bytes])
    tokenizer.add_special_tokens(ends)
    return tokenizer


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        wanted = "-e '.[text]'" if name == "tokenizers" else name
        raise UserError(
            f"CLIP's tokenizer needs the package {name}: pip install {wanted}"
        ) from error
