"""Requests that cannot be answered: what the peers' tests ask of errors.

Elsewhere in tests/serving:

- not_json, not_an_object, empty_body, deep_nesting: `test_openai_protocol.test_invalid_bodies`
- wrong_content_type: `test_openai_protocol.test_headers_that_clients_send`
- huge_body: `test_openai_protocol.test_limits`
- wrong_key: `test_openai_api.test_wrong_credentials_are_rejected`
"""

import json

import httpx
import openai
import pytest

from tests.support.server_process import ServerProcess

HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "messages",
    [None, "hi", {}, [], [1], [{}], [{"role": "user", "content": 1}], [{"role": "nobody", "content": "hi"}]],
)
def test_bad_messages(server: ServerProcess, messages: object) -> None:
    response = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": messages})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("messages")


def test_errors_for_the_client(server: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="temperature: should be") as caught:
            client.chat.completions.create(model="Qwen", messages=HI, temperature=3)
        assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
        with pytest.raises(openai.NotFoundError, match="Unknown model"):
            client.models.retrieve("gpt-4o")


@pytest.mark.parametrize("escape", [r"\ud83d", r"\ude00", r"\ud83d\ud83d"])
def test_half_characters(server: ServerProcess, escape: str) -> None:
    """Half of a surrogate pair is no text."""
    body = json.dumps({"messages": [{"role": "user", "content": "HALF"}]}).replace("HALF", escape)
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"


def test_connection_outlives_an_error(server: ServerProcess) -> None:
    with httpx.Client(base_url=server.url, limits=httpx.Limits(max_connections=1), timeout=60) as client:
        streams = []
        for body, status in (({"messages": []}, 400), ({"messages": HI, "max_tokens": 1}, 200)):
            response = client.post("/v1/chat/completions", json=body)
            assert response.status_code == status
            streams.append(response.extensions["network_stream"].get_extra_info("client_addr"))
        assert streams[0] == streams[1]  # the same port
