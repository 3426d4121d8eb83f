"""What a user is told of a machine that cannot translate ports, or not those of IPv6."""

from __future__ import annotations

import pytest

from architect.adapters import probes, shadowports
from architect.adapters.netfilter import Backend, Family
from architect.adapters.probes import Verdict
from architect.contract.errors import ContainerRefused
from architect.decisions.naming import Identity
from architect.processes import door

IDENTITY = Identity("shop", "web", "app")
WHY_NOT = "no way to translate ports (nft: no, no)"
BOTH = {Family.IPV4: Backend.NFT, Family.IPV6: Backend.IPTABLES_NFT}


def machine(
    monkeypatch: pytest.MonkeyPatch, ways: dict[Family, Backend], lacks: Family | None = None
) -> None:
    def support(family: Family) -> shadowports._Support:
        way = ways.get(family)
        return shadowports._Support(way, "" if way or family is lacks else WHY_NOT)

    monkeypatch.setattr(shadowports, "_support", support)


def told() -> tuple[Verdict, str, str]:
    found = probes._shadow_ports()
    assert found.name == "shadow ports"
    return found.verdict, found.found, found.without


def test_where_both_families_can_be_translated_nobody_is_warned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, BOTH)
    assert door._check_translation(IDENTITY) == ()
    assert told() == (Verdict.OK, "IPv4 by nft, IPv6 by iptables-nft", "")
    assert {family: shadowports.backend(family) for family in Family} == BOTH


def test_without_ipv6_translation_one_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, {Family.IPV4: Backend.NFT})
    assert door._check_translation(IDENTITY) == (
        f"shop/web/app: its shadow ports are of IPv4 only: {WHY_NOT}",
    )
    assert told() == (Verdict.LESS, f"IPv4 by nft; IPv6: {WHY_NOT}", "none of IPv6")
    assert shadowports.backend(Family.IPV6) is None


@pytest.mark.parametrize("lacks", Family)
def test_a_family_that_the_machine_lacks_is_not_missed(
    monkeypatch: pytest.MonkeyPatch, lacks: Family
) -> None:
    (has,) = set(Family) - {lacks}
    machine(monkeypatch, {has: Backend.NFT}, lacks)
    assert door._check_translation(IDENTITY) == ()
    assert told() == (Verdict.OK, f"{has.value} by nft", "")


@pytest.mark.parametrize(
    ("ways", "lacks"),
    [({}, None), ({Family.IPV6: Backend.NFT}, None), ({}, Family.IPV6), ({}, Family.IPV4)],
    ids=["neither", "only IPv6", "no IPv6 at all", "no IPv4 at all"],
)
def test_without_translation_of_the_main_family_the_create_is_refused(
    monkeypatch: pytest.MonkeyPatch, ways: dict[Family, Backend], lacks: Family | None
) -> None:
    machine(monkeypatch, ways, lacks)
    with pytest.raises(ContainerRefused, match=r"cannot have shadow ports: no way .*nft: no, no"):
        door._check_translation(IDENTITY)
    assert told() == (Verdict.LESS, WHY_NOT, "containers with `shadow-ports` are refused")
