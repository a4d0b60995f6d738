"""All guards, by subject. A new one is one more `guard(...)` in the list of its subject."""

from tests.guards import client, codecs, faults, security, service
from tests.guards.entry import Guard

GUARDS: tuple[Guard, ...] = (*client.GUARDS, *faults.GUARDS, *service.GUARDS, *security.GUARDS, *codecs.GUARDS)
