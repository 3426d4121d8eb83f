"""A wake's share of the CPU: raised at every level that counts, and back afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from architect.adapters import cpuweight
from architect.adapters.cgroup import Cgroup
from architect.adapters.cpuweight import Boosts, levels

V2 = {
    "kubelet, systemd": (
        "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podA.slice/cri-containerd-1.scope",
        3,
    ),
    "kubelet, cgroupfs": ("kubepods/besteffort/podA/1", 3),
    "kind": (
        "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-podA.slice/cri-containerd-1.scope",
        2,
    ),
    "podman": ("machine.slice/libpod-1.scope", 1),
    "podman in a pod": ("machine.slice/machine-libpod_pod_A.slice/libpod-1.scope", 2),
    "right below the root": ("own", 0),
}


def _group(root: Path, directory: str, *, unified: bool = True) -> Cgroup:
    cpu = root / directory if unified else root / "cpu" / directory
    cpu.mkdir(parents=True, exist_ok=True)
    top = root if unified else root / "cpu"
    for folder in (cpu, *cpu.parents):
        if folder == top:
            break
        file = folder / ("cpu.weight" if unified else "cpu.shares")
        if not file.exists():
            file.write_text("1\n" if unified else "2\n")
    return Cgroup(memory=cpu, cpu=cpu, freezer=cpu, unified=unified)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cpuweight, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize("unified", [True, False], ids=["v2", "v1"])
@pytest.mark.parametrize("name", V2)
def test_levels_end_below_all_pods_or_the_root(root: Path, name: str, unified: bool) -> None:
    directory, count = V2[name]
    group = _group(root, directory, unified=unified)
    found = levels(group)
    assert found == [group.cpu, *group.cpu.parents][:count]


def test_raised_while_needed_and_then_as_before(root: Path) -> None:
    group = _group(root, "kubepods/besteffort/podA/1")
    boosts = Boosts()
    taken = boosts.take(group)
    assert set(taken.values()) == {"1"}
    assert len(taken) == 3
    assert {Path(file).read_text() for file in taken} == {"10000"}
    assert (root / "kubepods/cpu.weight").read_text() == "1\n"
    boosts.give_back(taken)
    assert {Path(file).read_text() for file in taken} == {"1"}


def test_two_wakes_of_one_class_share_its_cgroup(root: Path) -> None:
    boosts = Boosts()
    one = boosts.take(_group(root, "kubepods/besteffort/podA/1"))
    two = boosts.take(_group(root, "kubepods/besteffort/podB/2"))
    shared = root / "kubepods/besteffort/cpu.weight"
    # A daemon that dies now leaves the true value to its successor, with either.
    assert one[str(shared)] == two[str(shared)] == "1"
    boosts.give_back(one)
    assert shared.read_text() == "10000"
    boosts.give_back(two)
    assert shared.read_text() == "1"


def test_what_a_neighbour_has_raised_is_not_taken_for_a_limit(root: Path) -> None:
    boosts = Boosts()
    waking, sleeping = _group(root, "kubepods/podA/1"), _group(root, "kubepods/podA/2")
    taken = boosts.take(waking)
    files = [folder / "cpu.weight" for folder in levels(sleeping)]
    seen = [(str(file), file.read_text().strip()) for file in files]
    assert [value for _, value in seen] == ["1", "10000"]
    assert [value for _, value in boosts.originals(seen)] == ["1", "1"]
    boosts.give_back(taken)
    assert boosts.originals(seen) == seen


def test_what_the_kubelet_has_set_meanwhile_stays(root: Path) -> None:
    boosts = Boosts()
    group = _group(root, "kubepods/podA/1")
    taken = boosts.take(group)
    (group.cpu / "cpu.weight").write_text("39\n")
    boosts.give_back(taken)
    assert (group.cpu / "cpu.weight").read_text() == "39\n"


def test_a_cgroup_without_the_controller_is_passed_over(root: Path) -> None:
    group = _group(root, "kubepods/podA/1")
    (group.cpu.parent / "cpu.weight").unlink()
    boosts = Boosts()
    taken = boosts.take(group)
    assert list(taken) == [str(group.cpu / "cpu.weight")]
    boosts.give_back(taken)
    assert (group.cpu / "cpu.weight").read_text() == "1"
