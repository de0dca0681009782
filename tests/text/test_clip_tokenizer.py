"""CLIP's ids of captions: those of its two implementations, on 60 recorded captions.

The vocabulary is the published one's part that these captions need, under the published ids.
"""

import json
import pathlib
import sys
import types
import unicodedata
from dataclasses import replace

import numpy as np
import pytest

from enat_jax.errors import UserError
from enat_jax.text.clip_tokenizer import CLIPTokenizer, CLIPTokenizerConfig, open_clip_rule
from enat_jax.text.protocol import TextTokenizer
from tests.support.golden import GOLDEN

PART = pathlib.Path(__file__).parents[1] / "golden/clip_text"
VOCAB, MERGES = ((PART / name).read_text() for name in ("vocab.json", "merges.txt"))
HUGGING_FACE = CLIPTokenizerConfig(vocab=VOCAB, merges=MERGES)
OPEN_CLIP = replace(HUGGING_FACE, rule="open_clip", padding=0)
CAPTIONS = [
    caption["text"]
    for caption in json.loads((GOLDEN / "clip_text/captions.json").read_text())["captions"]
]
# what ftfy makes of the captions that it changes
MENDED = {
    "\xe2\u20ac\u0153mojibake\xe2\u20ac\x9d don\xe2\u20ac\u2122t": "\"mojibake\" don't",
    "sch\xc3\xb6n mojibake": "sch\xf6n mojibake",
    "\u201ccurly quotes\u201d \u2018single\u2019 \u2026 ellipsis":
        "\"curly quotes\" 'single' \u2026 ellipsis",
    "\ufb01ne \ufb02u\ufb00y ligatures": "fine fluffy ligatures",
    "\uff46\uff55\uff4c\uff4c\uff57\uff49\uff44\uff54\uff48 \uff21\uff22\uff23": "fullwidth ABC",
    "\u4e2d\u6587 \u6807\u9898\uff0c\u4e00\u53ea\u732b\u3002":
        "\u4e2d\u6587 \u6807\u9898,\u4e00\u53ea\u732b\u3002",
    "\x00null \x1b escape control": "null  escape control",
}  # fmt: skip


@pytest.fixture
def ftfy(monkeypatch):
    module = types.ModuleType("ftfy")
    module.fix_text = lambda text: MENDED.get(text, unicodedata.normalize("NFC", text))
    module.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "ftfy", module)


def differing(ours, theirs):
    return {CAPTIONS[row] for row in np.flatnonzero((ours != theirs).any(axis=1))}


def test_hugging_faces_ids_are_the_recorded_ones(golden):
    tokenizer = CLIPTokenizer(HUGGING_FACE)
    assert isinstance(tokenizer, TextTokenizer)
    assert (tokenizer.name, tokenizer.length, tokenizer.vocabulary) == ("clip", 77, 49408)
    ids = tokenizer(CAPTIONS)
    assert ids.dtype == np.int32
    assert differing(ids, golden("clip_text/tokens.npz")["hf_fast/ids"]) == set()


def test_open_clips_ids_are_the_recorded_ones(golden, ftfy):
    ids = CLIPTokenizer(replace(OPEN_CLIP, rule="open_clip_ftfy"))(CAPTIONS)
    assert differing(ids, golden("clip_text/tokens.npz")["open_clip/ids"]) == set()


def test_without_ftfy_only_what_it_mends_differs(golden):
    ids = CLIPTokenizer(OPEN_CLIP)(CAPTIONS)
    decomposed = {text for text in CAPTIONS if unicodedata.normalize("NFC", text) != text}
    assert differing(ids, golden("clip_text/tokens.npz")["open_clip/ids"]) == {*MENDED, *decomposed}
    assert all(not text.isascii() or "\x1b" in text for text in {*MENDED, *decomposed})


def test_ftfy_is_used_where_it_is_installed(ftfy, monkeypatch):
    assert open_clip_rule() == "open_clip_ftfy"
    monkeypatch.delitem(sys.modules, "ftfy")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert open_clip_rule() == "open_clip"


def test_the_empty_caption_is_start_end_and_padding():
    for cfg, padding in ((HUGGING_FACE, 49407), (OPEN_CLIP, 0)):
        (ids,) = CLIPTokenizer(replace(cfg, length=5))([""])
        assert ids.tolist() == [49406, 49407, padding, padding, padding]


def test_long_captions_are_cut_before_their_end_and_counted_once():
    warnings = []
    tokenizer = CLIPTokenizer(replace(HUGGING_FACE, length=5), warn=warnings.append)
    assert tokenizer(["a cat", "a a a"])[:, -1].tolist() == [49407, 49407]
    assert warnings == []
    assert (
        tokenizer(["a", "a a a a", "a a a a a a"])[1:].tolist()
        == [[49406, 320, 320, 320, 49407]] * 2
    )
    tokenizer(["a a a a a"])
    assert warnings == ["captions of more than 5 ids are cut: 2 of 3"]


def test_the_digest_is_that_of_all_that_decides_the_ids():
    other = [HUGGING_FACE, OPEN_CLIP, replace(HUGGING_FACE, padding=0),
             replace(HUGGING_FACE, length=9), replace(HUGGING_FACE, vocab=VOCAB + "\n"),
             replace(HUGGING_FACE, merges=MERGES + "\n")]  # fmt: skip
    digests = {CLIPTokenizer(cfg).digest for cfg in other}
    assert len(digests) == len(other)
    assert CLIPTokenizer(HUGGING_FACE).digest in digests
    assert all(len(digest) == 64 for digest in digests)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"vocab": "{"}, "vocab.json is no JSON"),
        ({"vocab": "[" * 10**5}, "vocab.json is no JSON"),
        ({"vocab": "[]"}, "not of tokens and their ids"),
        ({"vocab": '{"a": "b"}'}, "not of tokens and their ids"),
        ({"vocab": '{"a": 0}'}, "it lacks 513 of 514 tokens that all have, '!' first"),
        ({"merges": "a b c\n"}, "merges.txt is no list of pairs: 'a b c'"),
        ({"merges": "zq zq</w>\n"}, "merges.txt does not fit vocab.json: "),
        ({"padding": 49408}, "padding = 49408 must be below 49408"),
    ],
)
def test_what_is_no_tokenizer_of_clips_is_told_in_a_line(changes, part):
    with pytest.raises(UserError) as caught:
        CLIPTokenizer(replace(HUGGING_FACE, **changes))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("package", "how"), [("tokenizers", "-e '.[text]'"), ("ftfy", "ftfy")])
def test_a_package_that_is_missing_is_told_with_how_to_get_it(monkeypatch, package, how):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as caught:
        CLIPTokenizer(replace(OPEN_CLIP, rule="open_clip_ftfy"))
    message = f"CLIP's tokenizer needs the package {package}: pip install {how}"
    assert str(caught.value) == message
