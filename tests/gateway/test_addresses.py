"""Connections by address: never too few, and too many only by rare chance."""

from __future__ import annotations

from gateway._addresses import Addresses


def test_connections_of_all_workers_count():
    addresses = Addresses(3)
    one, other = addresses.place("192.0.2.1"), addresses.place("2001:db8::1")
    for worker in range(3):
        addresses.add(worker, one, 1)
    addresses.add(0, other, 1)
    assert (addresses.count(one), addresses.count(other)) == (3, 1)
    addresses.add(1, one, -1)
    assert addresses.count(one) == 2


def test_an_ipv6_network_of_64_bits_counts_as_one_address():
    addresses = Addresses(1)
    place = addresses.place("2001:db8:0:1::1")
    assert addresses.place("2001:db8:0:1:ffff::2") == place
    assert addresses.place("2001:db8:0:2::1") != place
    assert addresses.place("fe80::1%eth0") == addresses.place("fe80::2%eth1")


def test_what_a_dead_worker_had_is_forgotten():
    addresses = Addresses(2)
    place = addresses.place("192.0.2.1")
    addresses.add(0, place, 1)
    addresses.add(1, place, 1)
    addresses.forget(1)
    assert addresses.count(place) == 1


def test_ten_thousand_addresses_hardly_disturb_each_other():
    addresses = Addresses(1)
    places = [addresses.place(f"10.0.{number >> 8}.{number & 255}") for number in range(10_000)]
    for place in places:
        addresses.add(0, place, 1)
    counts = [addresses.count(place) for place in places]
    assert min(counts) == 1
    assert sum(count > 1 for count in counts) < 500
    for place in places:
        addresses.add(0, place, -1)
    assert {addresses.count(place) for place in places} == {0}
