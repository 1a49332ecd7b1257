"""What becomes of a client's identity. Apart from `identity`, which takes time to import and which
a plain client does not need."""

from dataclasses import dataclass

from fedfog.transport.tls import Identity


@dataclass(frozen=True)
class Ready:
    """The client has its certificate."""

    client: str
    identity: Identity


@dataclass(frozen=True)
class Failed:
    """The client cannot get a certificate."""

    client: str
    error: Exception
