"""helm as the chart's tests run it: render, lint, install, and who is who in what it installs.

Called by the tests of the chart. Helm keeps nothing outside the folder that it is given.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml  # type: ignore[import-untyped]  # it comes with lightkube, its stubs do not

from common import REPOSITORY
from tests.cluster.base import run
from tests.cluster.settings import Programs

CHART: Final = REPOSITORY / "charts" / "architect"
NAMESPACE: Final = "chart-test"
RELEASE: Final = "architect"
_HELM_S: Final = 120.0
_FIX: Final = "see what it says; `helm template` with the same values shows what it renders"

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Helm:
    """The real helm, with its files in `home`, and a cluster's kubeconfig where it needs one."""

    programs: Programs
    home: Path
    kubeconfig: Path | None = None

    def __call__(self, *words: str | Path) -> str:
        """Run helm; return what it printed. Raises ClusterError with what it said."""
        env = {"PATH": os.environ["PATH"], "HOME": str(self.home), "LC_ALL": "C.UTF-8"}
        if self.kubeconfig is not None:
            env["KUBECONFIG"] = str(self.kubeconfig)
        return run(self.programs.helm / "helm", *words, env=env, timeout_s=_HELM_S, fix=_FIX)

    def rendered(self, *settings: str, kubernetes: str = "1.33.0") -> list[Object]:
        """All objects, hooks included, of the chart with `--set` settings. Raises ClusterError."""
        words = [f"--set={one}" for one in settings]
        version = f"--kube-version={kubernetes}"
        text = self("template", RELEASE, CHART, f"--namespace={NAMESPACE}", version, *words)
        return [one for one in yaml.safe_load_all(text) if one]


def only(objects: list[Object], kind: str, name: str) -> Object:
    """The one object of that kind and name."""
    (found,) = (one for one in objects if one["kind"] == kind and one["metadata"]["name"] == name)
    return found


def pod_spec(objects: list[Object], kind: str, name: str) -> Object:
    """The spec of the pods of a workload."""
    found: Object = only(objects, kind, name)["spec"]["template"]["spec"]
    return found


def as_list(objects: list[Object]) -> str:
    """The objects as one for kubectl's standard input."""
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})


def settings(values: Mapping[str, Any]) -> list[str]:
    """`--set-json` words for values."""
    return [f"--set-json={name}={json.dumps(value)}" for name, value in values.items()]
