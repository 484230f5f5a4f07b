"""The routing table against a dict."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway._routing import AWAY_INDEX, RoutingTable

INITIAL_CAPACITY = 1024


def did(number: int) -> bytes:
    """A text of the right length; whether it is a DID was checked at registration."""
    return b"did:key:z6Mk" + b"%044d" % number


DIDS = st.integers(0, 60).map(did)
EPOCHS = st.integers(1, 5)

Operation = st.one_of(
    st.tuples(st.just("set"), DIDS, st.integers(0, AWAY_INDEX), EPOCHS),
    st.tuples(st.just("remove"), DIDS, st.just(0), EPOCHS),
    st.tuples(st.just("get"), DIDS, st.just(0), EPOCHS),
)


@given(st.lists(Operation, max_size=300))
@settings(deadline=None)
def test_it_behaves_like_a_dict_with_epochs(operations):
    table = RoutingTable()
    model: dict[bytes, tuple[int, int]] = {}
    for name, key, connection, epoch in operations:
        if name == "set":
            table.set(key, connection, epoch)
            model[key] = (connection, epoch)
        elif name == "remove":
            owned = key in model and model[key][1] == epoch
            assert table.remove(key, epoch) is owned
            if owned:
                del model[key]
        assert table.get(key) == model.get(key)
        assert len(table) == len(model)
    for number in range(61):
        assert table.get(did(number)) == model.get(did(number))


@pytest.mark.parametrize("seed", range(5))
def test_no_route_is_lost_when_it_grows_shrinks_and_closes_its_gaps(seed):
    """Half full with linear probing, keys share runs of slots: removing one must not cut off the others."""
    rng = random.Random(seed)
    table = RoutingTable()
    model: dict[bytes, tuple[int, int]] = {}
    for step in range(20_000):
        key = did(rng.randrange(3 * INITIAL_CAPACITY))
        if rng.random() < (0.7 if step < 10_000 else 0.4):
            model[key] = (rng.randrange(2**31), step + 1)
            table.set(key, *model[key])
        elif key in model:
            assert table.remove(key, model.pop(key)[1])
        if step % 1_000 == 0:
            assert all(table.get(key) == route for key, route in model.items())
    assert len(table) == len(model)
    assert all(table.get(did(number)) == model.get(did(number)) for number in range(3 * INITIAL_CAPACITY))
    for key, (_, epoch) in model.items():
        assert table.remove(key, epoch)
    assert len(table) == 0


def test_a_hundred_thousand_routes():
    table = RoutingTable()
    for number in range(100_000):
        table.set(did(number), number, number + 1)
    assert len(table) == 100_000
    assert all(table.get(did(number)) == (number, number + 1) for number in range(100_000))
    assert table.get(did(100_000)) is None


def test_late_close_of_a_replaced_session_keeps_the_new_route():
    table = RoutingTable()
    table.set(did(1), 10, 1)
    table.set(did(1), 20, 2)
    assert not table.remove(did(1), 1)
    assert table.get(did(1)) == (20, 2)
    assert table.remove(did(1), 2)
    assert table.get(did(1)) is None


def test_an_away_route_is_still_a_route():
    table = RoutingTable()
    table.set(did(1), AWAY_INDEX, 1)
    assert table.get(did(1)) == (AWAY_INDEX, 1)
    assert len(table) == 1


def test_keys_that_differ_in_one_character_are_different_routes():
    table = RoutingTable()
    base = did(0)
    variants = [base[:at] + b"1" + base[at + 1 :] for at in range(12, 56)]
    for number, variant in enumerate(variants):
        table.set(variant, number, 1)
    assert [table.get(variant) for variant in variants] == [(number, 1) for number in range(44)]
    assert table.get(base) is None


def test_remove_of_what_is_not_there_is_false():
    table = RoutingTable()
    assert not table.remove(did(1), 1)
    table.set(did(1), 0, 1)
    assert table.remove(did(1), 1)
    assert not table.remove(did(1), 1)


@pytest.mark.parametrize("wrong", [b"", did(1)[:-1], did(1) + b"0"])
def test_a_text_of_another_length_is_no_key(wrong):
    table = RoutingTable()
    for call in (lambda: table.set(wrong, 0, 1), lambda: table.get(wrong), lambda: table.remove(wrong, 1)):
        with pytest.raises(ValueError, match="56"):
            call()


def test_epoch_zero_and_what_is_not_bytes_are_refused():
    table = RoutingTable()
    with pytest.raises(ValueError, match="epoch 0"):
        table.set(did(1), 0, 0)
    for wrong in (None, did(1).decode(), bytearray(did(1))):
        with pytest.raises(TypeError):
            table.get(wrong)
    with pytest.raises(OverflowError):
        table.set(did(1), 2**32, 1)
    with pytest.raises(OverflowError):
        table.set(did(1), 0, -1)
    assert len(table) == 0
