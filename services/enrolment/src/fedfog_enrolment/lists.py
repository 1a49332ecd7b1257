"""What the broker and nginx have to know of revocations, and how a revoked session is cut."""

import time
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

from fedfog.files import write_atomically
from fedfog.settings import EnrolmentSettings
from fedfog.transport import tls
from fedfog_enrolment import guard
from fedfog_enrolment.acl import acl
from fedfog_enrolment.ca import CA, key_pem, new_key, pem
from fedfog_enrolment.registry import Registry

VISIT_SECONDS = 5.0
LOOP_SECONDS = 0.02


class Lists:
    """The lists, made of the registry. The broker's are put into force by its guard; nginx looks
    for its own."""

    def __init__(self, settings: EnrolmentSettings, ca: CA, registry: Registry) -> None:
        self._settings, self._ca, self._registry = settings, ca, registry
        self._in_force: frozenset[int] | None = None
        self._to_cut = registry.shut_out()

    def put_in_force(self, to_cut: Iterable[str] = ()) -> None:
        """Have it known who is revoked, and the first time, which regions there are. Then end the
        sessions of `to_cut`, and those that could not be ended before.

        Raises:
            GuardError, CAError, RegistryError: they are not in force.
            OSError: the list for nginx cannot be written, or the broker is not reached.
        """
        self._to_cut.update(to_cut)
        settings, first = self._settings, self._in_force is None
        listed = self._ca.revoked(settings.pki_dir / "broker" / "ca.crl")
        revoked = listed | self._registry.revoked()
        if not revoked == listed == self._in_force:
            access = acl(settings.region_list, settings.topics, settings.parents) if first else None
            crl = self._ca.crl(revoked)
            write_atomically(settings.pki_dir / "crl" / "ca.crl", crl, mode=0o644)
            guard.install(settings.guard_socket, crl, access)
            self._in_force = revoked
        for name in sorted(self._to_cut):
            self._cut(name)
            self._to_cut.remove(name)

    def _cut(self, name: str) -> None:
        """End a revoked session: the broker looks at its list when somebody connects, and
        gives the session to whoever connects last under a name. Here that is us, once.

        Raises:
            OSError: the broker is not reached.
        """
        key = new_key()
        certificate = self._ca.sign(key.public_key(), name, VISIT_SECONDS)
        client = paho.Client(CallbackAPIVersion.VERSION2, name, protocol=paho.MQTTv5)
        with TemporaryDirectory() as folder:
            paths = Path(folder, "tls.crt"), Path(folder, "tls.key")
            write_atomically(paths[0], pem(certificate))
            write_atomically(paths[1], key_pem(key), mode=0o600)
            client.tls_set_context(tls.context(self._settings.pki_dir / "enrolment", *paths))
        deadline = time.monotonic() + VISIT_SECONDS
        client.connect(self._settings.mqtt_broker, self._settings.mqtt_port)
        while not client.is_connected():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the broker has not answered for {VISIT_SECONDS:.0f} s")
            if (rc := client.loop(LOOP_SECONDS)) != MQTTErrorCode.MQTT_ERR_SUCCESS:
                raise ConnectionError(paho.error_string(rc))
        client.disconnect()
