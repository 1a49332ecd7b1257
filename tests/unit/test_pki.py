"""The one-shot that makes the PKI: what it makes, renews, and leaves as the user brought it."""

import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedfog.messages.topics import Topics
from fedfog_enrolment import pki
from fedfog_enrolment.acl import acl
from fedfog_enrolment.ca import (
    CA,
    CAError,
    common_name,
    key_pem,
    load_certificate,
    names_of,
    new_key,
    pem,
)

REGIONS = ["r0", "r1"]
SERVERS = {"broker": "mosquitto", "enrolment": "enrolment", "superlink": "central-server"}
CLIENTS = ["central-server", "monitor", "probe", "probe-revoked"]
CLIENTS += [f"{service}.{region}" for service in ("aggregator", "bridge") for region in REGIONS]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def serials(folder: Path) -> dict[str, int]:
    found = folder.glob("*/tls.crt")
    return {path.parent.name: load_certificate(path).serial_number for path in found}


def test_each_reader_gets_its_own_folder(tmp_path: Path) -> None:
    ca = pki.ensure(tmp_path, REGIONS, server_names=["localhost", "10.0.0.1"])
    for reader in [*SERVERS, *CLIENTS]:
        certificate = load_certificate(tmp_path / reader / "tls.crt")
        assert common_name(certificate) == reader
        assert ca.issued(certificate)
        names = {SERVERS[reader], "localhost", "10.0.0.1"} if reader in SERVERS else set()
        assert names_of(certificate) == names
        assert (tmp_path / reader / "ca.crt").read_bytes() == pem(ca.certificate)
    revoked = ca.revoked(tmp_path / "broker" / "ca.crl")
    assert revoked == {serials(tmp_path)["probe-revoked"]}
    access = (tmp_path / "broker" / "acl").read_text()
    assert access == acl(REGIONS, Topics(), {})
    tokens = [(tmp_path / "join" / f"{region}.token").read_bytes() for region in REGIONS]
    assert tokens == [(tmp_path / f"client.{region}" / "token").read_bytes() for region in REGIONS]
    assert len(set(tokens)) == 2
    assert min(len(token) for token in tokens) >= 43  # 256 bits
    secret = ["acl", "ca.key", "r0.token", "r1.token", "signals", "supernode.key", "tls.key"]
    secret.append("token")
    for path in tmp_path.glob("*/*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o600 if path.name in secret else 0o644), path


def test_only_the_folder_of_the_ca_has_its_key(tmp_path: Path) -> None:
    pki.ensure(tmp_path, REGIONS)
    key = (tmp_path / "ca" / "ca.key").read_bytes()
    assert [name for name, data in contents(tmp_path).items() if data == key] == ["ca/ca.key"]
    keys = [data for name, data in contents(tmp_path).items() if name.endswith(".key")]
    assert len(set(keys)) == len(keys)


def test_a_second_start_changes_nothing(tmp_path: Path) -> None:
    pki.ensure(tmp_path, REGIONS)
    before = contents(tmp_path)
    pki.ensure(tmp_path, REGIONS)
    assert contents(tmp_path) == before


def test_what_is_near_its_end_is_renewed(tmp_path: Path) -> None:
    ca = pki.ensure(tmp_path, REGIONS, days=100 / 86400)  # of 400 s, 100 s are left
    before, keys = serials(tmp_path), (tmp_path / "monitor" / "tls.key").read_bytes()
    assert pki.ensure(tmp_path, REGIONS).certificate == ca.certificate
    after = serials(tmp_path)
    assert after.keys() == before.keys()
    assert not set(after.values()) & set(before.values())
    assert (tmp_path / "monitor" / "tls.key").read_bytes() != keys
    # The guard would not take a list that lets somebody in again.
    revoked = ca.revoked(tmp_path / "broker" / "ca.crl")
    assert revoked == {before["probe-revoked"], after["probe-revoked"]}


def test_what_has_more_than_a_third_left_is_not(tmp_path: Path) -> None:
    pki.ensure(tmp_path, REGIONS, days=200 / 86400)  # of 500 s, 200 s are left
    before = serials(tmp_path)
    pki.ensure(tmp_path, REGIONS)
    assert serials(tmp_path) == before


def test_a_lost_key_or_another_address_gets_a_new_certificate(tmp_path: Path) -> None:
    pki.ensure(tmp_path, REGIONS)
    before = serials(tmp_path)
    (tmp_path / "monitor" / "tls.key").unlink()
    pki.ensure(tmp_path, REGIONS, server_names=["localhost", "fog.example"])
    after = serials(tmp_path)
    changed = {reader for reader in before if after[reader] != before[reader]}
    assert changed == {*SERVERS, "nginx", "monitor"}
    assert "fog.example" in names_of(load_certificate(tmp_path / "broker" / "tls.crt"))


def test_a_new_region_leaves_the_others_alone(tmp_path: Path) -> None:
    pki.ensure(tmp_path, REGIONS)
    before = contents(tmp_path)
    pki.ensure(tmp_path, [*REGIONS, "r2"], parents={"r2": "r1"})
    after = contents(tmp_path)
    assert {name for name in before if after[name] != before[name]} == {"broker/acl"}
    assert {name.partition("/")[0] for name in after.keys() - before.keys()} == {
        "aggregator.r2",
        "bridge.r2",
        "ca",
        "client.r2",
        "join",
        "superlink",
    }


def test_a_join_token_is_replaced_in_time(tmp_path: Path) -> None:
    pki.ensure(tmp_path, REGIONS, token_hours=3)
    before = contents(tmp_path)
    old = time.time() - 2 * 3600 - 1
    os.utime(tmp_path / "join" / "r0.token", (old, old))
    pki.ensure(tmp_path, REGIONS, token_hours=3)
    after = contents(tmp_path)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"join/r0.token", "client.r0/token"}
    assert after["join/r0.token"] == after["client.r0/token"]


def test_a_certificate_that_the_user_brought_stays(tmp_path: Path) -> None:
    (tmp_path / "user").mkdir()
    (tmp_path / "pki" / "monitor").mkdir(parents=True)
    user = CA.create(tmp_path / "user")
    brought = user.sign(new_key().public_key(), "monitor", -1)  # whatever it is
    (tmp_path / "pki" / "monitor" / "tls.crt").write_bytes(pem(brought))
    pki.ensure(tmp_path / "pki", REGIONS)
    assert contents(tmp_path / "pki" / "monitor") == {"tls.crt": pem(brought)}


def test_a_ca_that_the_user_brought_is_used(tmp_path: Path) -> None:
    (tmp_path / "ca").mkdir()
    user = CA.create(tmp_path / "ca")
    before = contents(tmp_path / "ca")
    assert pki.ensure(tmp_path, REGIONS).certificate == user.certificate
    assert before.items() <= contents(tmp_path / "ca").items()
    assert user.issued(load_certificate(tmp_path / "broker" / "tls.crt"))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("ca/ca.key", None),
        ("ca/ca.key", b""),
        ("ca/ca.key", key_pem(new_key())),
        ("ca/ca.crt", b"x"),
        ("broker/ca.crl", b""),
        ("monitor/tls.crt", b"-----BEGIN CERTIFICATE-----"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, data: bytes | None) -> None:
    pki.ensure(tmp_path, REGIONS)
    (tmp_path / name).unlink()
    if data is not None:
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-m", "fedfog_enrolment.pki"]
    env = os.environ | {"PKI_DIR": str(tmp_path), "REGIONS": "r0,r1", "LOG_FORMAT": "json"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert str(tmp_path / name) in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_list_of_another_ca_is_not_taken(tmp_path: Path) -> None:
    for name in "one", "other":
        pki.ensure(tmp_path / name, REGIONS)
    shutil.copy(tmp_path / "other/broker/ca.crl", tmp_path / "one/broker/ca.crl")
    with pytest.raises(CAError, match=r"ca\.crl is not of this CA"):
        pki.ensure(tmp_path / "one", REGIONS)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("REGIONS", "r0,R1"),
        ("REGION_PARENTS", "r0"),
        ("REGION_PARENTS", "r0=m/0"),
        ("PKI_OWNERS", "broker=root"),
        ("CERT_SECONDS", "0"),
    ],
)
def test_an_impossible_setting_is_named(tmp_path: Path, setting: str, value: str) -> None:
    command = [sys.executable, "-m", "fedfog_enrolment.pki"]
    env = os.environ | {"PKI_DIR": str(tmp_path), setting: value}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"{setting}=" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv"
)
def test_root_needs_the_capability_chown_and_no_other(tmp_path: Path) -> None:
    """As in compose: each reader gets its files as its own user, also at a second start."""
    command = ["setpriv", "--bounding-set=-all,+chown", "--inh-caps=-all,+chown"]
    command += [sys.executable, "-m", "fedfog_enrolment.pki"]
    env = os.environ | {"PKI_DIR": str(tmp_path), "PKI_OWNERS": "broker=1883,*=10001"}
    for regions in "r0", "r0", "r0,r1":
        done = subprocess.run(
            command, env=env | {"REGIONS": regions}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        for path in tmp_path.rglob("*"):
            owner = 1883 if "broker" in path.relative_to(tmp_path).parts else 10001
            assert path.stat().st_uid == owner, path
