"""The images and the compose stack, on a real Docker engine."""

import json
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator

import pytest

from conftest import Peer
from fedfog.messages.codec import decode_meta
from fedfog.messages.schemas import ModelMeta, RunState
from stacks import SECONDS, Project, Stack, projects

pytestmark = pytest.mark.compose

RUN = ("up", "--exit-code-from", "central-server")
LEARNED = 0.9  # test accuracy; guessing the more frequent class gives 0.58


@pytest.mark.parametrize("clients", [3, 5])
def test_scaled_clients_train_on_disjoint_slots_and_the_stack_ends_with_exit_code_0(
    stack: Stack, clients: int
) -> None:
    project = stack(
        EXIT_WHEN_FINISHED="true", CLIENTS_EXPECTED=str(clients), VALIDATION_FRACTION="0"
    )
    code, _, said = project.command(*RUN, "--scale", f"client={clients}")
    assert code == 0, said
    summary = project.result("summary.json")
    assert summary["status"] == "completed"
    assert summary["rounds"] == 3
    assert summary["clients"] == [clients] * 3
    assert summary["test_accuracy"] > LEARNED
    assert summary["test_auroc"] > LEARNED
    for record in project.result("history.json")["rounds"]:
        members = record["regions"]["region_0"]["members"]
        assert len(members) == clients
        assert sum(members.values()) == 500, "the slots do not add up to the training set"


def test_failed_run_ends_the_stack_with_the_exit_code_of_the_server(stack: Stack) -> None:
    project = stack(EXIT_WHEN_FINISHED="true", REGIONS_TIMEOUT="2")
    code, _, said = project.command(*RUN, "central-server", "mosquitto")
    assert code == 1, said
    assert "MIN_AVAILABLE_CLIENTS" in said


def test_second_region_is_a_second_compose_project(stack: Stack) -> None:
    both = {"REGIONS": "region_0,region_1", "CLIENTS_EXPECTED": "2"}
    both |= {"MIN_AVAILABLE_CLIENTS": "2", "MIN_FIT_CLIENTS": "2"}
    first = stack(EXIT_WHEN_FINISHED="true", **both)
    second = stack(
        "compose.region.yaml", "-1", REGION="region_1", FEDFOG_PROJECT=first.name, **both
    )
    with first.popen(*RUN, "--scale", "client=2") as up:
        assert up.stdout is not None
        assert any("run_begins" in line for line in up.stdout), "the server did not start"
        second.ok("up", "--detach", "--scale", "client=2")
        said = up.stdout.read()
    assert up.returncode == 0, said[-4000:]
    summary = first.result("summary.json")
    assert summary["regions"] == ["region_0", "region_1"]
    assert summary["clients"] == [4, 4, 4]
    assert summary["test_accuracy"] > LEARNED


@pytest.fixture(scope="class")
def standing(images: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A stack of two clients, up and healthy."""
    with projects(tmp_path_factory.mktemp("standing")) as make:
        # A test below stops one of them, and the next run is not to wait for it for long.
        project = make(ROUNDS="2", CLIENTS_EXPECTED="2", COHORT_LIMIT="60")
        project.ok("up", "--detach", "--wait", "--wait-timeout", "240", "--scale", "client=2")
        yield project


@pytest.fixture
def peer(standing: Project) -> Iterator[Peer]:
    """Connected to the port that the stack publishes on the host."""
    address = standing.ok("port", "mosquitto", "8883").decode().strip()
    assert address.startswith("127.0.0.1:"), "the broker is open to other hosts"
    port = int(address.rpartition(":")[2])
    peer = Peer(port, "fl/global_model", tls=standing.observer())
    yield peer
    peer.close()


class TestStandingStack:
    """Without EXIT_WHEN_FINISHED the stack stands after the run, ready for the next."""

    def test_every_container_is_healthy(self, standing: Project) -> None:
        state = {
            name: container["State"]["Health"]["Status"]
            for name, container in standing.containers().items()
            if name != "pki-1"  # it has ended
        }
        assert len(state) == 8
        assert set(state.values()) == {"healthy"}, state

    def test_containers_run_without_rights(self, standing: Project) -> None:
        for name, container in standing.containers().items():
            assert container["HostConfig"]["ReadonlyRootfs"], name
            assert container["HostConfig"]["Privileged"] is False, name
            assert container["HostConfig"]["CapDrop"] == ["ALL"], name
            assert container["HostConfig"]["SecurityOpt"] == ["no-new-privileges:true"], name
            if name == "pki-1":  # has ended
                (right,) = container["HostConfig"]["CapAdd"]
                assert right.removeprefix("CAP_") == "CHOWN"
                assert container["HostConfig"]["NetworkMode"] == "none"
                continue
            assert container["Config"]["User"] in ("10001:10001", "1883:1883"), name
            service = name.rpartition("-")[0]
            status = standing.ok("exec", service, "cat", "/proc/1/status").decode()
            fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            assert int(fields["CapEff"], 16) == 0, name
            assert fields["NoNewPrivs"] == "1", name
            assert not fields["Uid"].startswith("0\t"), name

    def test_clients_do_not_reach_the_superlink(self, standing: Project) -> None:
        addresses = [
            network["IPAddress"]
            for network in standing.containers()["central-server-1"]["NetworkSettings"][
                "Networks"
            ].values()
        ]
        connect = "import socket, sys; socket.create_connection((sys.argv[1], 8080), 3)"
        for address in addresses:
            tries = {
                service: standing.command("exec", service, "python", "-c", connect, address)[0]
                for service in ("fog-bridge", "client")
            }
            assert tries == {"fog-bridge": 0, "client": 1}

    def test_monitor_shows_the_global_model(self, standing: Project) -> None:
        with standing.popen("run", "--rm", "--no-TTY", "monitor") as monitor:
            assert monitor.stdout is not None
            limit = threading.Timer(SECONDS, monitor.kill)
            limit.start()
            shown = any("fl/global_model" in line for line in monitor.stdout)
            limit.cancel()
            monitor.send_signal(signal.SIGINT)
        assert shown

    def test_a_run_with_other_settings_is_begun_by_a_command(
        self, standing: Project, peer: Peer
    ) -> None:
        def finished(_topic: str, payload: bytes) -> bool:
            return decode_meta(payload, ModelMeta).state is RunState.FINISHED

        first = decode_meta(peer.wait_for(finished, timeout=SECONDS), ModelMeta).run
        fedfog = ("exec", "--no-TTY", "central-server", "fedfog")
        options = ("--name", "by-command", "--rounds", "1", "--seed", "7", "--follow")
        said = standing.ok(*fedfog, "run", *options).decode()
        assert "Run by-command completed, 1 of 1 rounds done" in said
        summary = standing.result("summary.json")
        assert (summary["run"], summary["seed"]) == ("by-command", 7)
        assert summary["clients"] == [2]
        listed = standing.ok(*fedfog, "runs").decode()
        assert first in listed
        assert "by-command" in listed

    def test_restart_of_the_server_begins_the_next_run_with_the_clients_that_stand(
        self, standing: Project, peer: Peer
    ) -> None:
        def finished(run_is: Callable[[str], bool]) -> ModelMeta:
            def wanted(_topic: str, payload: bytes) -> bool:
                model = decode_meta(payload, ModelMeta)
                return model.state is RunState.FINISHED and run_is(model.run)

            return decode_meta(peer.wait_for(wanted, timeout=SECONDS), ModelMeta)

        before = finished(lambda _: True).run
        standing.ok("restart", "central-server")
        after = finished(lambda run: run != before)
        assert after.round == 2
        assert after.regions["region_0"].num_clients == 2

    def test_a_stolen_client_reads_and_writes_nothing_of_another(self, standing: Project) -> None:
        """Whoever is in a client's container has its certificate."""
        listed = standing.ok("exec", "--no-TTY", "enrolment", "fedfog", "client", "list").decode()
        names = set(re.findall(r"region_0/c-[0-9a-f]{12}", listed))
        assert len(names) == 2
        thief = standing.popen("exec", "--no-TTY", "client", "python", "-c", THIEF, *sorted(names))
        with thief:
            assert thief.stdout is not None
            victim = json.loads(thief.stdout.readline())["victim"]
            options = ("--name", "watched", "--rounds", "2", "--seed", "9", "--follow")
            standing.ok("exec", "--no-TTY", "central-server", "fedfog", "run", *options)
            seen = json.loads(thief.stdout.readline())
        assert thief.returncode == 0
        assert victim in names
        summary = standing.result("history.json")["rounds"]
        assert victim.partition("/")[2] in summary[0]["regions"]["region_0"]["members"]
        assert set(seen["refused"].values()) == {0x87}
        allowed = {"fl/global_model", "fl/status/region_0", "fl/receipts/region_0"}
        own = {f"fl/{kind}/{seen['name']}" for kind in ("receipts", "slots")}
        assert "fl/receipts/region_0" in seen["topics"], "it was not there when the round closed"
        assert set(seen["topics"]) <= allowed | own


# In the place of the client whose container it is: stops its process, and listens to everything.
THIEF = """
import json, os, pathlib, signal, ssl, sys
import paho.mqtt.client as paho
from cryptography import x509
from fedfog.messages.codec import decode_meta
from fedfog.messages.schemas import ModelMeta, RunState

own = pathlib.Path("/state/identity")
subject = x509.load_pem_x509_certificate((own / "tls.crt").read_bytes()).subject
name = subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value
[victim] = {*sys.argv[1:]} - {name}
for process in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        command = (process / "cmdline").read_bytes().split(b"\\0")
    except OSError:  # a health check that has just ended
        continue
    if len(command) > 1 and command[1].endswith(b"fedfog-client"):
        client = int(process.name)
tls = ssl.create_default_context(cafile="/pki/ca.crt")
tls.load_cert_chain(own / "tls.crt", own / "tls.key")
topics, refused, asked = set(), {}, {}
mqtt = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
mqtt.tls_set_context(tls)

def connected(mqtt, *_):
    mqtt.subscribe("#", qos=1)
    for topic in ("fl/global_model", "fl/cue", *(f"fl/{kind}/{victim}"
                  for kind in ("updates", "presence", "receipts", "slots"))):
        asked[mqtt.publish(topic, b"", qos=1, retain=True).mid] = topic
    print(json.dumps({"victim": victim}), flush=True)

def answered(_mqtt, _data, mid, reason, _properties):
    refused[asked[mid]] = reason.value

def received(mqtt, _data, message):
    topics.add(message.topic)
    if message.topic == "fl/global_model" and message.payload:
        model = decode_meta(message.payload, ModelMeta)
        if model.run == "watched" and model.state is RunState.FINISHED:
            mqtt.disconnect()

mqtt.on_connect, mqtt.on_publish, mqtt.on_message = connected, answered, received
os.kill(client, signal.SIGSTOP)
mqtt.connect("mosquitto", 8883)
mqtt.loop_forever(retry_first_connection=False)
os.kill(client, signal.SIGCONT)
print(json.dumps({"name": name, "topics": sorted(topics), "refused": refused}), flush=True)
"""


@pytest.mark.parametrize(
    ("image", "absent"),
    [
        ("client", "flwr"),
        ("fog-aggregator", "torch flwr"),
        ("fog-bridge", "torch"),
        ("monitor", "torch flwr"),
        ("enrolment", "torch flwr"),
        ("central-server", ""),
    ],
)
def test_image_is_lean_and_has_no_root(images: None, image: str, absent: str) -> None:
    look = (
        "import importlib.util, json, os, shutil, sys; print(json.dumps(["
        "[m for m in sys.argv[1:] if importlib.util.find_spec(m)], os.getuid(),"
        "[c for c in ('gcc', 'cc') if shutil.which(c)], importlib.util.find_spec('pip')]))"
    )
    run = ["docker", "run", "--rm", "--network", "none", "--entrypoint", "python"]
    output = subprocess.check_output(
        [*run, f"fedfog-{image}:0.1.0", "-c", look, *absent.split()], timeout=SECONDS
    )
    assert json.loads(output) == [[], 10001, [], None]


def test_images_with_pytorch_share_its_layer_and_have_the_cpu_build(images: None) -> None:
    layers = {}
    for image in ("client", "central-server"):
        name = f"fedfog-{image}:0.1.0"
        inspected = subprocess.check_output(["docker", "image", "inspect", name])
        layers[image] = json.loads(inspected)[0]["RootFS"]["Layers"]
        run = ["docker", "run", "--rm", "--entrypoint", "python", name]
        cuda = subprocess.check_output([*run, "-c", "import torch; print(torch.version.cuda)"])
        assert cuda.decode().strip() == "None"
    # Base image, user, PyTorch.
    assert layers["client"][:3] == layers["central-server"][:3]
