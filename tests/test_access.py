"""The form of a key, and the keys that are valid now."""

from __future__ import annotations

import re
import threading
from ipaddress import ip_network

import pytest

from appliance.access.keyring import Entry, KeyRing
from appliance.access.keys import bearer, digest, display, generate, looks_like_key
from appliance.access.plans import Plans
from appliance.messages import Caller

HERE = "192.0.2.1"
ADA = Caller("acc_1", "ada", "community", "key_1", "llm")


def test_a_key_has_the_seeds_form_and_is_never_the_same() -> None:
    made = {generate() for _ in range(200)}
    assert len(made) == 200
    assert all(re.fullmatch(r"oai_[A-Za-z0-9]{32}", key) for key in made)
    assert all(map(looks_like_key, made))


@pytest.mark.parametrize(
    "text",
    ["", "oai_", "oai_" + "a" * 31, "oai_" + "a" * 33, "OAI_" + "a" * 32, "oai_" + "é" * 32, "oai_" + "a" * 31 + "\n"],
)
def test_whatever_is_not_of_the_form_is_not_hashed(text: str) -> None:
    assert not looks_like_key(text)
    assert KeyRing([Entry(digest(text), ADA)]).find(text, 0, HERE) is None


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([b"Bearer oai_x"], "oai_x"),
        ([b"bEARER   oai_x "], "oai_x"),
        ([], None),
        ([b"oai_x"], None),
        ([b"Basic oai_x"], None),
        ([b"Bearer"], None),
        ([b"Bearer a b"], None),
        ([b"Bearer \xff"], None),
        ([b"Bearer a", b"Bearer a"], None),
    ],
)
def test_exactly_one_bearer_is_read(values: list[bytes], found: str | None) -> None:
    assert bearer(values) == found


def test_a_key_is_found_by_the_hash_of_all_of_it_until_it_ends() -> None:
    key, other = generate(), generate()
    ring = KeyRing([Entry(digest(key), ADA, expires=100)])
    assert ring.find(key, 99.9, HERE) == ADA
    assert ring.find(key, 100, HERE) is None
    assert ring.find(other, 0, HERE) is None
    assert ring.find(key[:-1] + ("a" if key[-1] != "a" else "b"), 0, HERE) is None
    assert ring.find(digest(key).hex(), 0, HERE) is None, "the hash is no credential"
    ring.replace([])
    assert (ring.find(key, 0, HERE), len(ring)) == (None, 0)


@pytest.mark.parametrize(
    ("ip", "known"),
    [
        ("10.1.2.3", True),
        ("11.1.2.3", False),
        ("::ffff:10.1.2.3", True),
        ("2001:db8::1", True),
        ("2001:db9::1", False),
        ("", False),
        ("nonsense", False),
    ],
)
def test_a_key_with_networks_is_known_only_from_there(ip: str, known: bool) -> None:
    key = generate()
    ring = KeyRing([Entry(digest(key), ADA, networks=(ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")))])
    assert (ring.find(key, 0, ip) == ADA) == known
    assert KeyRing([Entry(digest(key), ADA)]).find(key, 0, ip) == ADA, "one without networks is known from everywhere"


def test_what_was_read_first_never_comes_last() -> None:
    """A key that is revoked while another is made: whoever read the store before must not put it back."""
    key = generate()
    ring, reading, go_on = KeyRing(), threading.Event(), threading.Event()

    def before() -> list[Entry]:
        reading.set()
        go_on.wait(10)
        return [Entry(digest(key), ADA)]

    slow = threading.Thread(target=ring.reload, args=(before,))
    slow.start()
    assert reading.wait(10)
    after = threading.Thread(target=ring.reload, args=(lambda: [],))
    after.start()
    after.join(0.1)
    assert after.is_alive(), "the control: it has to wait for the first"
    go_on.set()
    for thread in (slow, after):
        thread.join(10)
    assert ring.find(key, 0, HERE) is None


def test_what_is_shown_of_a_key_tells_keys_apart_and_no_more() -> None:
    key = generate()
    prefix, last = display(key)
    assert key.startswith(prefix) and key.endswith(last)
    assert len(prefix) + len(last) == 12


def test_the_plans_are_the_seeds() -> None:
    rows = {p.name: (p.per_minute, p.per_hour, p.per_month, p.concurrent, p.weight) for p in Plans().values()}
    assert rows == {
        "community": (20, 200, 1_000, 2, 1.0),
        "professional": (60, 1_000, 10_000, 10, 2.0),
        "enterprise": (300, 10_000, None, 50, 4.0),
    }
