"""Every fault of a service is found by the check that is meant for it, and a service without faults passes."""

import pytest

from tests.certify.conftest import caught_of, engine_of
from tests.certify.faults import FAULTS


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.asyncio
async def test_a_fault_is_found_by_the_check_that_is_meant_for_it(embedded, pytestconfig, name):
    fault = FAULTS[name]
    async with embedded(fault.inject) as service:
        certificate = await service.certify_gradients(rank=4, surrogates=[fault.surrogate])
    (measurement,) = certificate.measurements
    checks = {check.name: check for check in measurement.checks}
    found = checks[fault.check]
    assert found.state == fault.state, measurement
    others = [check.name for check in measurement.checks if check.state in ("fail", "note") and check is not found]
    assert others == []
    if fault.state == "fail":
        assert certificate.surrogate is None
        assert list(checks)[-1] == fault.check  # what follows is not measured
    numbers = "" if found.error is None else f"{found.error:.2g} (bound {found.bound:.2g})" if found.bound else ""
    caught_of(pytestconfig).append((name, fault.check, f"{found.state}: {found.detail or numbers}"))


@pytest.mark.asyncio
async def test_a_service_without_faults_passes_with_errors_near_its_noise(embedded):
    async with embedded() as service:
        costs = []
        certificate = await service.certify_gradients(on_cost=costs.append)
        core = service._embedded.core
        assert core.sequencers == {}
        assert engine_of(service)._models == {}
        assert [checkpoint async for checkpoint in service.create_rest_client().checkpoints()] == []
        numbers = service._session.model_numbers
        created = next(numbers)
    assert certificate.surrogate == "cross_entropy"
    assert certificate.notes == ()
    assert certificate.drift is None
    (measurement,) = certificate.measurements
    assert {check.state for check in measurement.checks} == {"pass"}
    assert measurement.noise == 0.0  # torch on one thread is deterministic
    for check in measurement.checks:
        if check.name not in ("noise", "optimizer"):  # these compare one-sided responses, which have curvature
            assert (check.error or 0.0) < 5e-4, check
    (cost,) = costs
    assert created <= cost.models
    assert cost.at_once == 2
