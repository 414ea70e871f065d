"""`deploy/kubernetes.yaml`: its objects fit together, and aioserver takes the configuration in
it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from aioserver.config import Configuration
from tests.support.tools import DEPLOY

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.server import MakeServer

TEXT = (DEPLOY / "kubernetes.yaml").read_text()
OBJECTS: dict[str, dict[str, Any]] = {
    document["kind"]: document for document in yaml.safe_load_all(TEXT)
}
DEPLOYMENT = OBJECTS["Deployment"]["spec"]
POD = DEPLOYMENT["template"]["spec"]
(CONTAINER,) = POD["containers"]
MEBIBYTES = {"Mi": 2**20, "Gi": 2**30}


def volume(name: str) -> tuple[dict[str, Any], str]:
    """The volume *name*, and where it is mounted."""
    (source,) = (volume for volume in POD["volumes"] if volume["name"] == name)
    (mount,) = (mount for mount in CONTAINER["volumeMounts"] if mount["name"] == name)
    assert "subPath" not in mount, "such a file never changes"
    return source, mount["mountPath"]


def image() -> dict[str, str]:
    """The variables of the image."""
    recipe = (DEPLOY / "Dockerfile").read_text()
    return dict(re.findall(r"^(?:ENV|   ) (\w+)=(\S+)", recipe, re.MULTILINE))


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """The folder of the Secret, with the keys that the head of the file names."""
    folder = tmp_path / "keys"
    folder.mkdir()
    for name in re.findall(r"--from-literal=(\S+\.key)=", TEXT):
        (folder / name).write_text(f"aio-{name}-0123456789abcdef0123456789abcdef")
    return folder


def configured(keys: Path, **environ: str) -> Configuration:
    """The configuration in the ConfigMap, as a pod reads it."""
    file = keys.parent / "config.yaml"
    file.write_text(OBJECTS["ConfigMap"]["data"]["config.yaml"])
    configuration = Configuration.load(
        file, environ={"CREDENTIALS_DIRECTORY": str(keys), **environ}
    )
    configuration.check_usable()
    return configuration


def test_the_configuration_is_one_and_its_keys_are_those_of_the_secret(keys: Path) -> None:
    configuration = configured(keys)

    assert configuration.warnings == ()
    assert configuration.settings.auth is not None
    assert not configuration.settings.auth.open
    named = set(re.findall(r"_?key_file: ([\w.]+)", OBJECTS["ConfigMap"]["data"]["config.yaml"]))
    assert named == {path.name for path in keys.iterdir()}


def test_a_redis_server_is_one_key_of_the_secret(keys: Path) -> None:
    (variable,) = CONTAINER["env"]
    reference = variable["valueFrom"]["secretKeyRef"]

    assert reference["optional"] is True
    assert f"--from-literal={reference['key']}=redis://" in TEXT
    assert configured(keys).settings.cluster.redis_url is None
    assert configured(keys, **{variable["name"]: "redis://r:6379"}).settings.cluster.redis_url


def test_the_pod_finds_its_configuration_and_its_keys_where_the_image_looks() -> None:
    config, config_path = volume("config")
    secret, secret_path = volume("keys")
    environ = image()

    assert config["configMap"]["name"] == OBJECTS["ConfigMap"]["metadata"]["name"]
    (file,) = OBJECTS["ConfigMap"]["data"]
    assert environ["AIOSERVER_CONFIG"] == f"{config_path}/{file}"
    assert environ["CREDENTIALS_DIRECTORY"] == secret_path
    assert f"kubectl create secret generic {secret['secret']['secretName']} " in TEXT
    # Readable for the group of the container, and for nobody else.
    assert secret["secret"]["defaultMode"] == 0o440
    assert POD["securityContext"]["fsGroup"] == POD["securityContext"]["runAsGroup"]
    assert volume("tmp")[1] == "/tmp"


def test_the_pod_has_time_to_end_and_the_balancer_to_notice(keys: Path) -> None:
    websocket = configured(keys).settings.chat.websocket
    probe = CONTAINER["readinessProbe"]

    assert POD["terminationGracePeriodSeconds"] > (
        websocket.drain_delay + websocket.shutdown_timeout + 5
    )
    assert websocket.drain_delay > probe["periodSeconds"] * probe["failureThreshold"]
    # A pod is killed for being stuck, never for being full or slow at its start.
    assert CONTAINER["livenessProbe"]["httpGet"]["path"] == "/health"
    assert CONTAINER["startupProbe"]["httpGet"]["path"] == "/health"
    assert probe["httpGet"]["path"] == "/ready"


async def test_every_probe_asks_a_path_that_needs_no_key(
    keys: Path, make_server: MakeServer
) -> None:
    probes = [CONTAINER[name] for name in ("startupProbe", "livenessProbe", "readinessProbe")]
    auth = configured(keys).settings.auth
    assert auth is not None
    server = await make_server(**{"auth.keys": [{"name": "web", "sha256": "0" * 64}]})

    for probe in probes:
        assert probe["httpGet"]["port"] == "http"
        # The kubelet names the address of the pod.
        async with server.session.get(
            server.base + probe["httpGet"]["path"], headers={"Host": "10.1.2.3:8000"}
        ) as response:
            assert response.status == 200


def test_ports_and_labels_lead_from_the_service_to_the_server(keys: Path) -> None:
    labels = DEPLOYMENT["template"]["metadata"]["labels"]
    (port,) = OBJECTS["Service"]["spec"]["ports"]
    exposed, peers = CONTAINER["ports"]
    annotations = DEPLOYMENT["template"]["metadata"]["annotations"]

    assert OBJECTS["Service"]["spec"]["selector"] == labels
    assert DEPLOYMENT["selector"]["matchLabels"] == labels
    assert OBJECTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert port["targetPort"] == exposed["name"]
    assert exposed["containerPort"] == configured(keys).settings.chat.websocket.port
    assert annotations["prometheus.io/port"] == str(exposed["containerPort"])
    assert annotations["prometheus.io/path"] == "/metrics"
    listen = configured(keys).settings.cluster.listen
    assert listen is not None
    assert listen.endswith(f":{peers['containerPort']}")


def test_only_pods_of_aioserver_reach_the_port_on_which_they_ask_each_other() -> None:
    policy = OBJECTS["NetworkPolicy"]["spec"]
    labels = {"matchLabels": DEPLOYMENT["template"]["metadata"]["labels"]}
    clients, peers = policy["ingress"]

    assert policy["podSelector"] == labels
    assert (clients["ports"], "from" in clients) == ([{"port": "http"}], False)
    assert (peers["ports"], peers["from"]) == ([{"port": "peers"}], [{"podSelector": labels}])


def test_one_pod_may_be_away_and_one_stays() -> None:
    assert DEPLOYMENT["replicas"] > OBJECTS["PodDisruptionBudget"]["spec"]["minAvailable"] >= 1
    assert DEPLOYMENT["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}


def test_the_container_may_do_nothing_but_serve(keys: Path) -> None:
    context, pod = CONTAINER["securityContext"], POD["securityContext"]
    limits = CONTAINER["resources"]["limits"]
    settings = configured(keys).settings.chat
    kept = settings.streams.max_kept_bytes + settings.websocket.concurrency.max_body_bytes

    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert pod["runAsNonRoot"] is True
    assert f"USER {pod['runAsUser']}:{pod['runAsGroup']}\n" in (DEPLOY / "Dockerfile").read_text()
    assert POD["automountServiceAccountToken"] is False
    memory = limits["memory"]
    assert int(memory[:-2]) * MEBIBYTES[memory[-2:]] > 2 * kept
    assert "cpu" not in limits
