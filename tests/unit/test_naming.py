"""Which pod and container a create call is for, under each engine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from architect.decisions import naming
from architect.decisions.naming import Identity, Nameless, resolve

# What Podman 4.3 writes into config.json.
LONE = {"io.container.manager": "libpod"}
MEMBER = {
    **LONE,
    "io.kubernetes.cri-o.ContainerType": "container",
    "io.kubernetes.cri-o.SandboxID": "226d13c67ef0",
}


def cri(kind: str, **names: str) -> dict[str, str]:
    keys = {
        "container": naming.CRI_CONTAINER_NAME,
        "pod": naming.CRI_SANDBOX_NAME,
        "namespace": naming.CRI_SANDBOX_NAMESPACE,
    }
    return {naming.CRI_CONTAINER_TYPE: kind, **{keys[key]: name for key, name in names.items()}}


@pytest.mark.parametrize(
    ("annotations", "engine_name", "managed", "expected"),
    [
        # podman run --name web
        (LONE, "web", ["web"], Identity("default", "web", "web")),
        (LONE, "web", ["other"], Nameless.NOT_LISTED),
        (LONE, "my-web", ["web"], Nameless.NOT_LISTED),  # alone: nobody's prefix
        (LONE, "web", [], Nameless.NOT_LISTED),
        # podman kube play
        (MEMBER, "my-pod-app", ["app"], Identity("default", "my-pod", "app")),
        (MEMBER, "my-pod-sidecar", ["app"], Nameless.NOT_LISTED),
        (MEMBER, "my-user-db", ["db", "user-db"], Identity("default", "my", "user-db")),
        (MEMBER, "my-user-db", ["user-db", "db"], Identity("default", "my", "user-db")),
        (MEMBER, "my-user-db", ["db"], Identity("default", "my-user", "db")),
        (MEMBER, "podapp", ["app"], Nameless.NOT_LISTED),
        (MEMBER, "-app", ["app"], Nameless.NOT_LISTED),
        (MEMBER, "app-", ["", "app"], Nameless.NOT_LISTED),
        # podman run --pod
        (MEMBER, "app", ["app"], Identity("default", "app", "app")),
        # Podman's infra container, of kube play and of pod create --infra-name
        (LONE, "d725dd110224-infra", ["app"], Nameless.SANDBOX),
        (LONE, "my-pod-infra", ["app"], Nameless.SANDBOX),
        (LONE, "my-infra", ["my-infra"], Identity("default", "my-infra", "my-infra")),
        (MEMBER, "my-pod-infra", ["infra"], Identity("default", "my-pod", "infra")),
        # containerd
        (
            cri("container", container="app", pod="p-1", namespace="prod"),
            None,
            ["app"],
            Identity("prod", "p-1", "app"),
        ),
        (
            cri("container", container="app", pod="p-1"),
            "ignored-app",
            ["app"],
            Identity("default", "p-1", "app"),
        ),
        (
            cri("container", container="x", pod="p", namespace="n"),
            None,
            ["app"],
            Nameless.NOT_LISTED,
        ),
        (cri("sandbox", pod="p", namespace="n"), None, ["app"], Nameless.SANDBOX),
        (cri("container", pod="p"), None, ["app"], Nameless.NO_NAME),
        (cri("container", container="app"), None, ["app"], Nameless.NO_NAME),
        # an engine that keeps the name to itself
        ({}, None, ["app"], Nameless.NO_NAME),
        ({}, "", ["app"], Nameless.NO_NAME),
        ({}, "pod-app", ["app"], Identity("default", "pod", "app")),
    ],
)
def test_resolves(
    annotations: dict[str, str],
    engine_name: str | None,
    managed: list[str],
    expected: Identity | Nameless,
) -> None:
    assert resolve(annotations, engine_name, managed) == expected


names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)


@given(names, names, st.lists(names, max_size=4))
def test_pod_and_container_make_up_the_engines_name(
    pod: str, container: str, others: list[str]
) -> None:
    found = resolve(MEMBER, f"{pod}-{container}", [*others, container])
    assert isinstance(found, Identity)
    assert found.container in [*others, container]
    assert f"{found.pod}-{found.container}" == f"{pod}-{container}" or (
        found.pod == found.container == f"{pod}-{container}"
    )
    if not others:
        assert found == Identity("default", pod, container)


def test_a_lone_container_is_told_from_a_member_and_an_infra_container() -> None:
    assert naming.lone_container(LONE, "web") == "web"
    assert naming.lone_container(MEMBER, "pod-web") is None
    assert naming.lone_container(LONE, "d725dd110224-infra") is None
    assert naming.lone_container({}, "web") is None
    assert naming.lone_container(LONE, None) is None


def test_reads_as_a_path() -> None:
    assert str(Identity("default", "pod", "app")) == "default/pod/app"


@pytest.mark.parametrize(
    ("annotations", "expected"),
    [
        ({}, None),
        ({"io.kubernetes.cri.container-type": "container"}, None),
        ({naming.KUBELET_RESTARTS: "0"}, []),
        (
            {naming.KUBELET_PORTS: '[{"name":"a","containerPort":80,"protocol":"TCP"}]'},
            [("tcp", 80)],
        ),
        (
            {
                naming.KUBELET_RESTARTS: "3",
                naming.KUBELET_PORTS: '[{"containerPort":53,"protocol":"UDP"},'
                '{"containerPort":53},{"containerPort":9,"protocol":"SCTP"}]',
            },
            [("tcp", 53), ("udp", 53)],
        ),
    ],
)
def test_ports_that_the_kubelet_tells(
    annotations: dict[str, str], expected: list[tuple[str, int]] | None
) -> None:
    assert naming.kubelet_ports(annotations) == expected
