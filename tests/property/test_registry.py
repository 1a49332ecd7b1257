"""Enrolment's tables under any sequence of joins, renewals, revocations and lost answers."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import time

from cryptography import x509
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedfog_enrolment.ca import CA, new_key
from fedfog_enrolment.registry import Issued, RefusedError, Registry

FOLDER = tempfile.TemporaryDirectory()
AUTHORITY = CA.create(Path(FOLDER.name))
PUBLIC = new_key().public_key()
HOUR, OVER = 3600.0, -1.0
KEYS = st.sampled_from([f"k{number}" for number in range(6)])
LIVES = st.sampled_from([HOUR, HOUR, OVER])  # OVER: it has expired before the next question


@dataclass(frozen=True)
class Given:
    """A certificate that somebody got."""

    serial: int
    key: str
    device: tuple[str, int]  # its name, and how often that had been revoked before
    valid: bool


class Devices(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.registry = Registry(Path(self.folder.name) / "enrolment.db")
        self.uses: dict[str, int] = {}
        self.admitted: dict[str, set[tuple[str, int]]] = {}  # devices, by tokens
        self.given: list[Given] = []
        self.revocations: dict[str, int] = {}

    def teardown(self) -> None:
        self.registry.close()
        self.folder.cleanup()

    def is_out(self, given: Given) -> bool:
        name, before = given.device
        return self.revocations.get(name, 0) > before

    def note(self, issued: Issued, key: str) -> Given:
        certificate = x509.load_pem_x509_certificate(issued.pem)
        device = issued.name, self.revocations.get(issued.name, 0)
        valid = certificate.not_valid_after_utc.timestamp() > time()
        self.given.append(Given(certificate.serial_number, key, device, valid))
        return self.given[-1]

    @rule(region=st.sampled_from(["r0", "r1"]), uses=st.integers(1, 2))
    def create_token(self, region: str, uses: int) -> None:
        token = self.registry.create_token(region, uses, time() + HOUR)
        self.uses[token], self.admitted[token] = uses, set()

    @precondition(lambda self: self.uses)
    @rule(data=st.data(), key=KEYS, name=st.sampled_from(["", "c0", "c1"]), life=LIVES)
    def join(self, data: st.DataObject, key: str, name: str, life: float) -> None:
        token = data.draw(st.sampled_from(list(self.uses)), label="token")
        before = [given for given in self.given if given.key == key]
        try:
            issued = self.registry.join(token, key, name, signs(life))
        except RefusedError:
            return
        assert not any(self.is_out(given) for given in before)
        others = {one.device for one in self.given} - {one.device for one in before}
        given = self.note(issued, key)
        assert given.device not in others
        assert {one.device for one in before} <= {given.device}
        self.admitted[token].add(given.device)
        if given.valid:  # the answer is lost
            assert self.registry.join(token, key, name, signs(HOUR)) == issued

    @precondition(lambda self: any(given.valid for given in self.given))
    @rule(data=st.data(), key=KEYS, life=LIVES)
    def renew(self, data: st.DataObject, key: str, life: float) -> None:
        shown = data.draw(st.sampled_from([one for one in self.given if one.valid]), label="shown")
        before = [given for given in self.given if given.key == key]
        try:
            issued = self.registry.renew(shown.serial, key, signs(life))
        except RefusedError:
            return
        assert not any(self.is_out(given) for given in [shown, *before])
        given = self.note(issued, key)
        assert {one.device for one in [shown, *before]} == {given.device}
        assert self.registry.renew(shown.serial, key, signs(HOUR)) == issued

    @precondition(lambda self: self.given)
    @rule(data=st.data())
    def revoke(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([given.device[0] for given in self.given]), label="name")
        assert self.registry.revoke_client(name)
        self.revocations[name] = self.revocations.get(name, 0) + 1

    @invariant()
    def a_token_admits_no_more_than_its_uses(self) -> None:
        left = [row[2] for row in self.registry.tokens()]
        for (token, uses), unused in zip(self.uses.items(), left, strict=True):
            assert len(self.admitted[token]) <= uses - unused <= uses

    @invariant()
    def a_name_has_one_holder(self) -> None:
        names = [name for name, _, _, revoked in self.registry.clients() if not revoked]
        assert len(set(names)) == len(names)

    @invariant()
    def all_valid_certificates_of_revoked_devices_are_listed(self) -> None:
        out = {given.serial for given in self.given if given.valid and self.is_out(given)}
        assert self.registry.revoked() == out


def signs(life: float) -> Callable[[str], x509.Certificate]:
    return lambda name: AUTHORITY.sign(PUBLIC, name, life)


TestDevices = Devices.TestCase
TestDevices.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
