import numpy as np
import pytest

from enat_jax.errors import UserError
from enat_jax.text.protocol import TextTokenizer
from enat_jax.text.words import Words, split_words, words_of

CAPTIONS = ["A red dog", "a Cat's red-brown hat, on blue", ""]


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("", []),
        ("woman firefighter: dark skin tone", ["woman", "firefighter", "dark", "skin", "tone"]),
        ("The cook's -- well-known_ 'Pie' 7!", ["the", "cook's", "well-known", "pie", "7"]),
        ("cook\u2019s ja\u0308ger \u72ac", ["cook's", "j\xe4ger", "\u72ac"]),
    ],
)  # fmt: skip
def test_words_are_letters_and_digits_and_what_joins_them_inside(caption, words):
    assert split_words(caption) == words


def test_the_table_is_the_sorted_words_of_its_captions_and_padding_is_0():
    words = words_of(CAPTIONS)
    assert isinstance(words, TextTokenizer)
    assert words.words == ("a", "blue", "cat's", "dog", "hat", "on", "red", "red-brown")
    assert (words.length, words.vocabulary) == (6, 9)
    assert words(CAPTIONS).tolist() == [[1, 7, 4, 0, 0, 0], [1, 3, 8, 5, 6, 2], [0] * 6]
    assert words(CAPTIONS).dtype == np.int32


def test_the_digest_tells_another_table_and_another_length_but_no_other_order():
    here = Words(("a", "b"), 3).digest
    assert here == Words(("b", "a"), 3).digest == words_of(["b a", "a b a"]).digest
    assert len({here, Words(("a", "c"), 3).digest, Words(("a", "b"), 4).digest}) == 3


def test_captions_that_are_too_long_are_cut_and_counted_once():
    warnings = []
    words = words_of(CAPTIONS, 2, warn=warnings.append)
    assert words(["red dog on blue", "dog", "a red hat"]).tolist() == [[7, 4], [4, 0], [1, 7]]
    words(["red dog on blue"])
    assert warnings == ["captions of more than 2 words are cut: 2 of 3"]


def test_unknown_words_are_left_out_and_each_is_named_once():
    warnings = []
    words = words_of(CAPTIONS, warn=warnings.append)
    assert words(["a green dog", "green\u202e pink"])[:, :3].tolist() == [[1, 4, 0], [0, 0, 0]]
    words(["pink"])
    words([" ".join(f"w{number}" for number in range(10))])
    first, second = (warning.rpartition(": ")[2] for warning in warnings)
    assert (first, second) == ("green, pink", "w0, w1, w2, w3, w4, w5, w6, w7 and 2 more")


def test_captions_without_words_make_no_table():
    with pytest.raises(UserError, match="the captions hold no words"):
        words_of(["", "..."])
