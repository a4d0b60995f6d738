"""Every fault of a service is found by the check that is meant for it, and a service without faults passes."""

import pytest

from tests.certify.conftest import caught_of, engine_of
from tests.certify.faults import FAULTS, changing, half_precision, limited_settings
from tests.client.data import datum, nll
from tinkex_py.local import wire_format


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


@pytest.mark.asyncio
async def test_sparse_targets_are_compared_too(embedded, monkeypatch):
    """A service that reads the columns of sparse targets in reverse."""
    dense = wire_format._dense

    def reversed_columns(where, values, rows, columns, shape, room):
        return dense(where, values, rows, columns, shape, room)[:, ::-1].copy()

    monkeypatch.setattr(wire_format, "_dense", reversed_columns)
    async with embedded() as service:
        certificate = await service.certify_gradients(rank=4, surrogates=["cross_entropy"])
    found = certificate.measurements[0].checks[-1]
    assert (found.name, found.state) == ("[T, K]", "fail")
    dense_error, sparse_error = (float(part.split()[1]) for part in found.detail.split(", "))
    assert dense_error < found.bound < sparse_error == pytest.approx(found.error, rel=0.1)


@pytest.mark.asyncio
async def test_low_precision_is_neither_a_pass_nor_a_failure(embedded):
    async with embedded(half_precision) as service:
        certificate = await service.certify_gradients(rank=4, surrogates=["cross_entropy", "importance_sampling"])
        assert "not measurable" in {one.verdict for one in certificate.measurements}
        assert {one.verdict for one in certificate.measurements} <= {"not measurable", "fail"}
        assert certificate.surrogate is None
        assert not certificate.decides
        training = await service.create_lora_training_client("tiny", rank=4)
        await training.forward_backward_custom([datum(4)], nll)  # chosen as without the certificate
        assert training.certificate is None


@pytest.mark.asyncio
async def test_a_service_that_limits_eps_is_measured_as_far_as_it_allows(embedded):
    def both(engine):
        changing(lambda numbers: [part / max(sum(other.sum() for other in numbers), 1.0) for part in numbers])(engine)
        limited_settings(engine)

    async with embedded(limited_settings) as service:
        certificate = await service.certify_gradients(rank=4, surrogates=["cross_entropy"])
    checks = {check.name: check for check in certificate.measurements[0].checks}
    assert {check.state for name, check in checks.items() if name != "clipping"} == {"pass"}
    assert checks["clipping"].state == "not measurable"
    assert "the service refused the eps" in checks["weights are weights"].detail
    async with embedded(both) as service:
        certificate = await service.certify_gradients(rank=4, surrogates=["cross_entropy"])
    (*_, last) = certificate.measurements[0].checks
    assert (last.name, last.state) == ("weights are weights", "fail")
    assert "above 1 are scaled" in last.detail
