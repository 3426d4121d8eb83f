"""What becomes of a container that an engine is about to create."""

import contextlib
import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from architect.contract import annotations as a
from architect.contract import oci
from architect.contract.errors import ContainerRefused, InvalidAnnotation
from architect.decisions import naming
from architect.decisions.admission import Admission, Managed, Reason, Unmanaged
from architect.decisions.admission import decide as decide_on
from architect.decisions.naming import Identity

LONE = {naming.CONTAINER_MANAGER: "libpod"}
MEMBER = {**LONE, naming.CRIO_CONTAINER_TYPE: "container", naming.CRIO_SANDBOX_ID: "1"}


def spec(annotations: dict[str, str], **process: object) -> dict[str, Any]:
    return {
        "ociVersion": "1.0.2-dev",
        "process": {"args": ["/app", "-v"], **process},
        "root": {"path": "/var/lib/x/merged"},
        "annotations": annotations,
        "linux": {
            "cgroupsPath": "/libpod_parent/libpod-1",
            "namespaces": [
                {"type": "pid"},
                {"type": "network", "path": "/proc/77/ns/net"},
                {"type": "mount"},
            ],
            "seccomp": {
                "defaultAction": "SCMP_ACT_ERRNO",
                "syscalls": [{"names": ["read", "socket"], "action": "SCMP_ACT_ALLOW"}],
            },
        },
    }


def pod(value: str = '["app"]', **more: str) -> dict[str, str]:
    return {**MEMBER, a.MANAGED_CONTAINERS: value, **more}


def decide(document: dict[str, Any], engine_name: str | None = "pod-app") -> Admission:
    return decide_on(document, engine_name, "x86_64")


def test_a_listed_container_is_managed_with_its_settings() -> None:
    found = decide(spec({**pod(), a.SCALEDOWN_DURATIONS: '{"app":"2s"}'}))
    assert isinstance(found, Managed)
    assert found.identity == Identity("default", "pod", "app")
    assert found.container.scaledown_ns == 2 * 10**9
    assert found.settings.managed_containers == ("app",)
    assert found.warnings == ()


def test_only_the_seccomp_profile_changes_and_the_input_does_not() -> None:
    document = spec(pod())
    before = copy.deepcopy(document)
    found = decide(document)
    assert document == before
    assert isinstance(found, Managed)
    profile = oci.seccomp(found.spec)
    assert profile is not None
    assert profile != before["linux"]["seccomp"]
    assert oci.with_seccomp(found.spec, before["linux"]["seccomp"]) == before


def test_an_unconfined_container_gets_a_profile() -> None:
    document = spec(pod())
    del document["linux"]["seccomp"]
    found = decide(document)
    assert isinstance(found, Managed)
    profile = oci.seccomp(found.spec)
    assert profile is not None
    assert profile["defaultAction"] == "SCMP_ACT_ALLOW"
    assert "SCMP_ARCH_X86_64" in profile["architectures"]


def test_a_profile_that_cannot_be_split_is_kept_with_a_warning() -> None:
    document = spec(pod())
    odd = {"names": ["socket"], "action": "SCMP_ACT_KILL", "args": [{"index": 0, "op": "what"}]}
    document["linux"]["seccomp"]["syscalls"].append(odd)
    found = decide(document)
    assert isinstance(found, Managed)
    assert found.spec == document
    assert len(found.warnings) == 1
    assert "for socket were left" in found.warnings[0]


@pytest.mark.parametrize(
    ("annotations", "engine_name", "reason", "warnings"),
    [
        ({}, "pod-app", Reason.NOT_ASKED, 0),
        ({"other/x": "["}, "pod-app", Reason.NOT_ASKED, 0),
        ({**MEMBER, a.SCALEDOWN_DURATIONS: '{"app":"2s"}'}, "pod-app", Reason.NOT_ASKED, 1),
        ({**MEMBER, a.MANAGED_POD: "true"}, "pod-app", Reason.NOT_ASKED, 1),
        (pod("[]"), "pod-app", Reason.NOT_LISTED, 0),
        (pod(), "pod-sidecar", Reason.NOT_LISTED, 0),
        (pod(), None, Reason.NO_NAME, 1),
        ({**LONE, a.MANAGED_CONTAINERS: '["app"]'}, "1a2b-infra", Reason.SANDBOX, 0),
        (
            {naming.CRI_CONTAINER_TYPE: "sandbox", a.MANAGED_CONTAINERS: "["},
            None,
            Reason.SANDBOX,
            0,
        ),
    ],
)
def test_all_others_are_left_to_runc(
    annotations: dict[str, str], engine_name: str | None, reason: Reason, warnings: int
) -> None:
    found = decide(spec(annotations), engine_name)
    assert isinstance(found, Unmanaged)
    assert found.reason is reason
    assert len(found.warnings) == warnings


def test_a_terminal_is_left_to_runc_with_a_warning() -> None:
    found = decide(spec(pod(), terminal=True))
    assert isinstance(found, Unmanaged)
    assert found.reason is Reason.TERMINAL
    assert "default/pod/app" in found.warnings[0]
    assert isinstance(decide(spec(pod(), terminal=False)), Managed)


@pytest.mark.parametrize(
    ("namespaces", "words"),
    [
        ([{"type": "network"}], "host's pid namespace"),
        ([{"type": "pid", "path": "/proc/1/ns/pid"}, {"type": "network"}], "shares its pid"),
        ([{"type": "pid"}], "host's network namespace"),
        (None, "host's pid namespace"),
    ],
)
def test_namespaces_of_others_are_refused(namespaces: object, words: str) -> None:
    document = spec(pod())
    document["linux"]["namespaces"] = namespaces
    with pytest.raises(ContainerRefused, match=words) as caught:
        decide(document)
    assert a.MANAGED_CONTAINERS in caught.value.fix
    # A neighbour that nobody asked to manage may have them.
    assert isinstance(decide(document, "pod-sidecar"), Unmanaged)


def test_a_bad_value_is_refused_even_for_a_neighbour() -> None:
    with pytest.raises(InvalidAnnotation):
        decide(spec({**pod(), a.NETWORK_MONITOR: '{"app":"x"}'}), "pod-sidecar")


def test_a_lone_containers_pod_has_no_other_container() -> None:
    with pytest.raises(InvalidAnnotation, match="it has: web"):
        decide(spec({**LONE, a.MANAGED_CONTAINERS: '["app"]'}), "web")
    found = decide(spec({**LONE, a.MANAGED_CONTAINERS: '["web"]'}), "web")
    assert isinstance(found, Managed)
    assert found.identity == Identity("default", "web", "web")


def test_the_specification_is_read_tolerantly() -> None:
    document = spec({})
    assert oci.args(document) == ("/app", "-v")
    assert oci.root_path(document) == "/var/lib/x/merged"
    assert oci.cgroups_path(document) == "/libpod_parent/libpod-1"
    assert oci.namespaces(document) == {"pid": None, "network": "/proc/77/ns/net", "mount": None}
    document["mounts"] = [
        {"destination": "/data", "type": "bind", "source": "/host", "options": ["rbind", "ro"]},
        {"destination": "/tmp", "type": "tmpfs"},
        {"source": "/nowhere"},
    ]
    data, tmp = oci.mounts(document)
    assert (data.destination, data.source, data.options, data.bind) == (
        "/data", "/host", ("rbind", "ro"), True,
    )  # fmt: skip
    assert (tmp.type, tmp.source, tmp.bind) == ("tmpfs", "", False)


# fmt: off
MEMBERS = [
    "process", "terminal", "root", "path", "annotations", "linux", "namespaces", "type", "seccomp",
    "syscalls", "names", "args", "index", "value", "op", "action", "mounts", "destination",
]
# fmt: on
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["socket", "SCMP_ACT_ALLOW", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(MEMBERS), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from(["process", "root", "linux", "mounts"]), json_values))
def test_any_specification_is_answered(document: dict[str, Any]) -> None:
    document["annotations"] = pod()
    for read in (oci.terminal, oci.args, oci.root_path, oci.namespaces, oci.cgroups_path):
        read(document)
    oci.mounts(document)
    text = json.dumps(document)
    with contextlib.suppress(ContainerRefused):
        decide(document)
    assert json.dumps(document) == text


@given(json_values)
def test_any_seccomp_profile_is_answered(profile: object) -> None:
    document = spec(pod())
    document["linux"]["seccomp"] = profile
    assert isinstance(decide(document), Managed)
