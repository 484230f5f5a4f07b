"""The routing table against a dict, and against processes that die in the middle of a change."""

from __future__ import annotations

import os
import random
import select
import signal
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import forked

from gateway._routing import AWAY_INDEX, RoutingTable, TableFullError

SMALLEST_CAPACITY = 1024


def did(number: int) -> bytes:
    """A text of the right length; whether it is a DID was checked at registration."""
    return b"did:key:z6Mk" + b"%044d" % number


def assert_sound(table: RoutingTable, used: int) -> None:
    found = table.check()
    longest = found.pop("longest")
    assert found == {"torn": 0, "lost": 0, "used": used}
    assert longest < 200


DIDS = st.integers(0, 60).map(did)

Operation = st.one_of(
    st.tuples(st.just("bind"), DIDS, st.integers(0, AWAY_INDEX - 1), st.integers(0, 63)),
    st.tuples(st.sampled_from(["remove", "away", "stale"]), DIDS, st.just(0), st.just(0)),
    st.tuples(st.just("purge"), DIDS, st.just(0), st.integers(0, 63)),
)


@given(st.lists(Operation, max_size=300))
@settings(deadline=None)
def test_it_behaves_like_a_dict_with_epochs(operations):
    table = RoutingTable(60)
    model: dict[bytes, tuple[int, int, int]] = {}
    latest = 0
    for name, key, connection, worker in operations:
        before = model.get(key)
        epoch = before[2] if before else latest + 1
        if name == "bind":
            new, replaced = table.bind(key, worker, connection)
            assert new > latest
            assert replaced == before
            latest = new
            model[key] = (worker, connection, new)
        elif name == "away":
            assert table.set_away(key, epoch) is (before is not None)
            if before:
                model[key] = (before[0], AWAY_INDEX, epoch)
        elif name == "stale":
            assert not table.set_away(key, epoch + 1)
            assert not table.remove(key, epoch + 1)
        elif name == "remove":
            assert table.remove(key, epoch) is (before is not None)
            model.pop(key, None)
        else:
            gone = [each for each, route in model.items() if route[0] == worker]
            assert table.purge(worker) == len(gone)
            for each in gone:
                del model[each]
        assert table.get(key) == model.get(key)
        assert len(table) == len(model)
    for number in range(61):
        assert table.get(did(number)) == model.get(did(number))
    assert_sound(table, len(model))


@pytest.mark.parametrize("seed", range(5))
def test_no_route_is_lost_when_gaps_are_closed(seed):
    """Half full with linear probing, keys share runs of slots: removing one must not cut off the others."""
    rng = random.Random(seed)
    table = RoutingTable(SMALLEST_CAPACITY // 2)
    model: dict[bytes, tuple[int, int, int]] = {}
    for step in range(20_000):
        key = did(rng.randrange(3 * SMALLEST_CAPACITY))
        if len(model) < SMALLEST_CAPACITY // 2 and rng.random() < (0.7 if step < 10_000 else 0.4):
            connection = rng.randrange(2**31 - 1)
            model[key] = (1, connection, table.bind(key, 1, connection)[0])
        elif key in model:
            assert table.remove(key, model.pop(key)[2])
        if step % 1_000 == 0:
            assert all(table.get(key) == route for key, route in model.items())
    assert_sound(table, len(model))
    assert all(table.get(did(number)) == model.get(did(number)) for number in range(3 * SMALLEST_CAPACITY))
    for key, (_, _, epoch) in model.items():
        assert table.remove(key, epoch)
    assert len(table) == 0


def test_searches_stay_short_however_often_agents_come_and_go():
    """A full table in which every route is replaced two hundred times."""
    rng = random.Random(1)
    size = SMALLEST_CAPACITY // 2
    table = RoutingTable(size)
    present = [(did(number), table.bind(did(number), 0, number)[0]) for number in range(size)]
    for number in range(size, 200 * size):
        at = rng.randrange(size)
        key, epoch = present[at]
        assert table.remove(key, epoch)
        present[at] = (did(number), table.bind(did(number), 0, 1)[0])
    assert_sound(table, size)
    assert table.get(did(0)) is None


def test_a_hundred_thousand_routes():
    table = RoutingTable(100_000)
    epochs = [table.bind(did(number), number % 8, number)[0] for number in range(100_000)]
    assert len(table) == 100_000
    assert all(table.get(did(n)) == (n % 8, n, epochs[n]) for n in range(100_000))
    assert table.get(did(100_000)) is None
    assert table.purge(3) == 12_500
    assert_sound(table, 87_500)


def test_a_full_table_refuses_new_agents_and_keeps_the_others():
    table = RoutingTable(SMALLEST_CAPACITY // 2)
    epochs = [table.bind(did(number), 0, number)[0] for number in range(SMALLEST_CAPACITY // 2)]
    with pytest.raises(TableFullError):
        table.bind(did(9_999), 0, 1)
    assert table.get(did(9_999)) is None
    assert table.bind(did(5), 1, 7)[1] == (0, 5, epochs[5]), "who is in may still move"
    assert_sound(table, SMALLEST_CAPACITY // 2)


def test_late_close_of_a_replaced_session_keeps_the_new_route():
    table = RoutingTable()
    first, _ = table.bind(did(1), 0, 10)
    second, replaced = table.bind(did(1), 3, 20)
    assert replaced == (0, 10, first)
    assert not table.remove(did(1), first)
    assert not table.set_away(did(1), first)
    assert table.get(did(1)) == (3, 20, second)
    assert table.remove(did(1), second)
    assert table.get(did(1)) is None


def test_keys_that_differ_in_one_character_are_different_routes():
    table = RoutingTable()
    base = did(0)
    variants = [base[:at] + b"1" + base[at + 1 :] for at in range(12, 56)]
    epochs = [table.bind(variant, 0, number)[0] for number, variant in enumerate(variants)]
    assert [table.get(variant) for variant in variants] == [(0, n, epochs[n]) for n in range(44)]
    assert table.get(base) is None


@pytest.mark.parametrize("wrong", [b"", did(1)[:-1], did(1) + b"0"])
def test_a_text_of_another_length_is_no_key(wrong):
    table = RoutingTable()
    for call in (lambda: table.bind(wrong, 0, 0), lambda: table.get(wrong), lambda: table.remove(wrong, 1)):
        with pytest.raises(ValueError, match="56"):
            call()


def test_what_is_not_bytes_or_out_of_range_is_refused():
    table = RoutingTable()
    for wrong in (None, did(1).decode(), bytearray(did(1))):
        with pytest.raises(TypeError):
            table.get(wrong)
    with pytest.raises(OverflowError):
        table.bind(did(1), 2**16, 1)
    with pytest.raises(OverflowError):
        table.bind(did(1), 0, 2**32)
    assert len(table) == 0


def change_for_ever(table: RoutingTable, worker: int) -> None:
    rng = random.Random(os.getpid())
    while True:
        key = did(rng.randrange(300))
        epoch, _ = table.bind(key, worker, rng.randrange(1000))
        if rng.random() < 0.5:
            table.set_away(key, epoch)
        if rng.random() < 0.5:
            table.remove(key, epoch)


@pytest.mark.timeout(120)
def test_writers_killed_at_any_instant_leave_no_torn_slot_and_block_nobody():
    """Two processes write as fast as they can and are killed again and again; a third reads all the while."""
    table = RoutingTable(512)
    steady = [did(1_000 + number) for number in range(20)]
    routes = {key: (9, 5, table.bind(key, 9, 5)[0]) for key in steady}
    rng = random.Random(7)
    for _ in range(150):
        writers = [forked(lambda worker=worker: change_for_ever(table, worker)) for worker in (0, 1)]
        deadline = time.monotonic() + rng.uniform(0.001, 0.02)
        while time.monotonic() < deadline:
            for key in steady:
                assert table.get(key) == routes[key]
        for writer in writers:
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
        for worker in (0, 1):
            table.purge(worker)
        assert_sound(table, len(steady))
        assert len(table) == len(steady)


def test_a_reader_never_sees_half_of_a_change():
    """Worker and connection are always written alike, so a reader must always find them alike."""
    table = RoutingTable(16)
    key = did(1)
    table.bind(key, 0, 0)
    ready, started = os.pipe()

    def write() -> None:
        os.write(started, b"x")
        number = 0
        while True:
            number = (number + 1) % 64
            table.bind(key, number, number)

    writer = forked(write)
    select.select([ready], [], [], 10)
    seen = set()
    try:
        for _ in range(200_000):
            worker, connection, epoch = table.get(key)
            assert worker == connection
            seen.add(epoch)
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        os.close(ready)
        os.close(started)
    assert len(seen) > 1


# --- routes to other nodes ---------------------------------------------------------------------


def test_routes_to_other_nodes_have_room_of_their_own():
    table = RoutingTable(100, 10)
    for number in range(100):
        table.bind(did(number), 0, number)
    for number in range(100, 130):
        table.cache(did(number), 64 + number, 0, number)
    assert (len(table), table.cached) == (100, 10)
    assert table.get(did(129)) == (64 + 129, 0, 129), "the newest is there"
    assert all(table.get(did(number)) is not None for number in range(100))
    with pytest.raises(TableFullError):
        table.bind(did(200), 0, 0)
    assert_sound(table, 110)
    table.forget_others()
    assert (len(table), table.cached) == (100, 0)
    assert_sound(table, 100)


def test_who_is_here_is_not_overwritten_by_what_is_cached():
    table = RoutingTable(100, 10)
    epoch, _ = table.bind(did(1), 3, 7)
    table.cache(did(1), 64, 0, 1)
    assert table.get(did(1)) == (3, 7, epoch)


def test_an_agent_that_comes_takes_the_place_of_what_was_cached_of_it():
    table = RoutingTable(1, 10)
    table.cache(did(1), 64, 5, 99)
    epoch, replaced = table.bind(did(1), 0, 7)
    assert replaced == (64, 5, 99)
    assert (len(table), table.cached) == (1, 0)
    table.redirect(did(1), epoch, 128, 8, 100)
    assert table.get(did(1)) == (128, 8, 100)
    assert (len(table), table.cached) == (0, 1)
    table.redirect(did(1), epoch, 64, 9, 101)
    assert table.get(did(1)) == (128, 8, 100), "that epoch does not own it any more"
    assert table.remove(did(1), 100)
    assert table.purge(128) == table.cached == 0
