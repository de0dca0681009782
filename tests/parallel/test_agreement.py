import pytest

from enat_jax.errors import UserError
from enat_jax.parallel import agreement as host_agreement
from enat_jax.parallel.agreement import FailedOnAHost, agreed, from_all


class Refusal(UserError):
    pass


def run(work):
    return agreed(work, Refusal, lambda error: f"{type(error).__name__}: {error}")


def raises(error):
    def work():
        raise error

    return work


def others_say(monkeypatch, *texts):
    """Makes this process 0 of several, of which the others say what is given."""
    monkeypatch.setattr(host_agreement, "from_all", lambda text: [text, *texts])


def test_one_host_alone_gets_what_its_work_returns_or_raises():
    assert from_all("text") == ["text"]
    assert run(lambda: {"a": 1}) == {"a": 1}
    with pytest.raises(Refusal, match=r"^no$"):
        run(raises(Refusal("no")))
    with pytest.raises(FailedOnAHost, match=r"^OSError: cable$"):
        run(raises(OSError("cable")))


def test_what_failed_elsewhere_fails_here(monkeypatch):
    others_say(monkeypatch, "", "OSError: cable")
    with pytest.raises(FailedOnAHost, match=r"^process 2: OSError: cable$"):
        run(lambda: 1)


def test_what_is_refused_elsewhere_is_refused_here(monkeypatch):
    others_say(monkeypatch, "", "\0no")
    with pytest.raises(Refusal, match=r"^no$"):
        run(lambda: 1)


def test_a_failure_goes_before_a_refusal(monkeypatch):
    others_say(monkeypatch, "OSError: cable")
    with pytest.raises(FailedOnAHost, match=r"^process 1: OSError: cable$"):
        run(raises(Refusal("no")))


def test_an_error_without_words_is_a_failure_too():
    with pytest.raises(FailedOnAHost, match=r"^ValueError: $"):
        run(raises(ValueError()))
