"""Parts that do not fit refuse each other at Hello, before anything is sent (R17)."""

from __future__ import annotations

import dataclasses
import os

import grpc
import pytest

from winnow.errors import Skewed
from winnow.proto.v1 import internal_pb2, internal_pb2_grpc
from winnow.services.common.links import error_of
from winnow.services.worker import first_difference
from winnow.types import Fingerprint
from winnow.wire import fingerprint_to_proto, worker_from_proto

from .conftest import Deployment

pytestmark = pytest.mark.slow

OURS = Fingerprint(1, "m0", "l0", "fp32", 1, ("dense@1", "flexprefill@2"))
MISMATCHES = {
    "protocol": {"protocol": 2},
    "protocol missing": {"protocol": 0},
    "model": {"model": "m1"},
    "kv_layout": {"kv_layout": "l1"},
    "dtype": {"dtype": "bf16"},
    "tensor_parallel": {"tensor_parallel": 2},
    "method flexprefill": {"methods": ("dense@1", "flexprefill@1")},
}


@pytest.mark.promise("R17")
@pytest.mark.parametrize("case", MISMATCHES)
def test_one_field_that_differs_is_named(case: str) -> None:
    problem = first_difference(dataclasses.replace(OURS, **MISMATCHES[case]), OURS)

    assert problem.startswith(f"{case.removesuffix(' missing')} differs: expected")


@pytest.mark.parametrize(
    "expect",
    [
        OURS,
        dataclasses.replace(OURS, model="", kv_layout="", dtype="", tensor_parallel=0),
        dataclasses.replace(OURS, methods=("x@9",)),
    ],
    ids=["equal", "draft with another model", "method only one side knows"],
)
def test_parts_that_fit_are_not_refused(expect: Fingerprint) -> None:
    assert first_difference(expect, OURS) == ""


@pytest.mark.promise("R17")
@pytest.mark.parametrize("role", ["prefill", "retrieval"])
async def test_hello_refuses_each_mismatch_with_failed_precondition(deployment: Deployment, role: str) -> None:
    await deployment.start({role: (role,)})
    info = deployment.of(role).info
    assert info is not None
    stub = deployment.stub(internal_pb2_grpc.WorkerStub, role)
    name, _, version = info.fingerprint.methods[0].partition("@")
    cases = {**MISMATCHES, "method": {"methods": (f"{name}@{int(version) + 1}",)}}
    del cases["method flexprefill"]

    for case, change in cases.items():
        expect = dataclasses.replace(info.fingerprint, **change)
        with pytest.raises(grpc.RpcError) as refused:
            await stub.Hello(internal_pb2.HelloRequest(expect=fingerprint_to_proto(expect)), **deployment.links.options())
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert isinstance(error_of(refused.value), Skewed)
        assert f"{case.removesuffix(' missing')} " in str(error_of(refused.value))


async def test_hello_answers_who_it_is_and_load_what_it_holds(deployment: Deployment) -> None:
    await deployment.start({"all": ("prefill", "decode", "retrieval")})
    process = deployment.processes["all"]
    assert process.info is not None
    stub = deployment.stub(internal_pb2_grpc.WorkerStub, "prefill")
    expect = fingerprint_to_proto(process.info.fingerprint)

    reply = await stub.Hello(internal_pb2.HelloRequest(expect=expect), **deployment.links.options())
    result = await deployment.prefill()
    load = await stub.Load(internal_pb2.LoadRequest(), **deployment.links.options())

    assert worker_from_proto(reply.info) == process.info
    assert (process.info.roles, process.info.pid) == (("prefill", "retrieval", "decode"), os.getpid())
    assert (load.running, load.waiting, load.segments) == (0, 0, 1)
    assert 0 < load.kv_bytes < load.kv_budget_bytes
    await deployment.release(result.segment)


async def test_all_roles_of_one_model_agree_whether_they_load_it_or_not(deployment: Deployment) -> None:
    await deployment.start({r: (r,) for r in ("prefill", "retrieval", "draft", "decode")})

    prints = {p.info.fingerprint for p in deployment.processes.values() if p.info is not None}
    hosts = {p.info.host_id for p in deployment.processes.values() if p.info is not None}

    assert len(prints) == 1
    assert len(hosts) == 1
