"""Every request to sglang is checked against what its servers accept.

tests/sglang/openapi-0.5.23.json is the OpenAPI document of a server of that version; fields.json
has, for more versions, the names of the fields that the request classes declare. A server silently
ignores an unknown top-level field.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import jsonschema
import pytest

from verippo.core.sampling import sglang_requests as client
from verippo.core.sampling.sampler import SamplingParams
from verippo.core.sampling.sglang_client import ServerError, SglangServer

FOLDER = Path(__file__).resolve().parents[2] / "sglang"
DOCUMENT = json.loads((FOLDER / "openapi-0.5.23.json").read_text())
VERSIONS = json.loads((FOLDER / "fields.json").read_text())
WEIGHTS = [
    ("model.embed_tokens.weight", "float32", [320, 32]),
    ("model.norm.weight", "bfloat16", (32,)),
]
# every constant request, and the result of every function that makes one
REQUESTS = {
    "generate_request": client.generate_request(
        (1, 5, 7),
        SamplingParams(temperature=0.7, max_new_tokens=9),
        seed=2**62 + 1,
        stop_token_ids=(2,),
        rid="r",
    ),
    "score_request": client.score_request([1, 5, 7]),
    "abort_request": client.abort_request("r"),
    "flush_request": client.flush_request(30.0),
    "version_request": client.version_request("7"),
    "disk_request": client.disk_request("/folder", "7"),
    "join_request": client.join_request(
        address="node", port=4321, rank_offset=1, world_size=3, backend="nccl"
    ),
    "LEAVE": client.LEAVE,
    "BEGIN": client.BEGIN,
    "END": client.END,
    "broadcast_request": client.broadcast_request(WEIGHTS, "7"),
    "tensor_request": client.tensor_request("AAAA", "7", tp=2),
    "RELEASE": client.RELEASE,
    "RESUME": client.RESUME,
}
# newer routes, which the sampler does not need on older servers
NEWER = {
    "0.5.5": {"/begin_weight_update", "/end_weight_update"},
    "0.5.9": {"/begin_weight_update", "/end_weight_update"},
}


@pytest.fixture(params=REQUESTS)
def request_sent(request):
    return REQUESTS[request.param]


def test_every_kind_of_request_is_checked():
    makers = {
        name
        for name, function in inspect.getmembers(client, inspect.isfunction)
        if inspect.signature(function).return_annotation == "Request" and not name.startswith("_")
    }
    constants = {name for name, value in vars(client).items() if isinstance(value, client.Request)}
    assert makers | constants == set(REQUESTS)


def test_a_request_matches_the_openapi_document(request_sent):
    path, query = urlsplit(request_sent.path)[2:4]
    operation = DOCUMENT["paths"][path]["get" if request_sent.body is None else "post"]
    parameters = {
        parameter["name"]: parameter["schema"] for parameter in operation.get("parameters", [])
    }
    for name, value in parse_qsl(query, strict_parsing=bool(query)):
        jsonschema.validate(json.loads(value), parameters[name])
    if "requestBody" not in operation:
        assert not request_sent.body
        return
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    body = json.loads(json.dumps(request_sent.body))
    jsonschema.validate(body, schema | {"components": DOCUMENT["components"]})
    properties = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"]
    assert set(body) <= set(properties)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_request_has_all_required_and_no_unknown_fields(version, request_sent):
    path = urlsplit(request_sent.path).path
    if path in NEWER.get(version, ()):
        assert path not in VERSIONS[version]["routes"]
        return
    fields = VERSIONS[version]["routes"][path]
    body = request_sent.body or {}
    assert set(fields["required"]) <= set(body) <= {*fields["required"], *fields["optional"]}
    assert set(body.get("sampling_params", ())) <= set(VERSIONS[version]["sampling_params"])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("question", ["info", "version"])
def test_facts_are_requested_by_a_route_that_the_version_has(version, question, monkeypatch):
    asked = []

    def ask(server, request, **_):
        if request.path not in VERSIONS[version]["routes"]:
            raise ServerError(server.url, "no such route", kind="refused", status=404)
        asked.append(request.path)
        return {"weight_version": "7", "tp_size": 1}

    monkeypatch.setattr(SglangServer, "ask", ask)
    assert getattr(SglangServer("http://127.0.0.1:1"), question)() in (
        "7",
        {"weight_version": "7", "tp_size": 1},
    )
    assert len(asked) == 1


def test_the_check_detects_wrong_fields():
    good = REQUESTS["disk_request"].body
    schema = {
        "$ref": "#/components/schemas/UpdateWeightFromDiskReqInput",
        "components": DOCUMENT["components"],
    }
    jsonschema.validate(good, schema)
    for bad in ({**good, "model_path": 7}, {"weight_version": "7"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)
    assert (
        "modelpath"
        not in DOCUMENT["components"]["schemas"]["UpdateWeightFromDiskReqInput"]["properties"]
    )
