"""What the broker has to know of revocations, and how a revoked client's session is cut."""

import time
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
    """The broker's lists, made of the registry and put into force by the guard."""

    def __init__(self, settings: EnrolmentSettings, ca: CA, registry: Registry) -> None:
        self._settings, self._ca, self._registry = settings, ca, registry
        self._in_force: frozenset[int] | None = None

    def put_in_force(self) -> None:
        """Have the broker know all revocations; the first time, also all regions.

        Raises:
            GuardError, CAError, RegistryError: they are not in force.
        """
        settings, first = self._settings, self._in_force is None
        listed = self._ca.revoked(settings.pki_dir / "broker" / "ca.crl")
        revoked = listed | self._registry.revoked()
        if revoked == listed == self._in_force:
            return
        access = acl(settings.region_list, settings.topics, settings.parents) if first else None
        guard.install(settings.guard_socket, self._ca.crl(revoked), access)
        self._in_force = revoked

    def cut(self, name: str) -> None:
        """End a revoked client's session: the broker looks at its list when somebody connects, and
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
