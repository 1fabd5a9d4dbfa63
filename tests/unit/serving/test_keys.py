"""Where the API keys come from, what they allow, and that they do not go where Ray shows them."""

import asyncio
import json
import time

import pytest
from starlette.testclient import TestClient

from cnnray.images import storage
from cnnray.serving import deploy
from cnnray.serving import keys as keys_module
from cnnray.serving.keys import ApiKeyError, Key, Keys, read_keys


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ("CNNRAY_API_KEY", "CNNRAY_API_KEY_FILE", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)


def test_it_is_a_variable_or_a_files_content(tmp_path, monkeypatch):
    assert read_keys() == []
    monkeypatch.setenv("CNNRAY_API_KEY", "from a variable")
    assert read_keys() == [Key(key="from a variable")]
    monkeypatch.setenv("CNNRAY_API_KEY", "")
    assert read_keys() == []
    monkeypatch.setenv("CNNRAY_API_KEY_FILE", str(tmp_path / "key"))
    for key in ("from-a-file", "-x4f"):
        (tmp_path / "key").write_text(f"{key}\n")
        assert read_keys() == [Key(key=key)]


def test_a_service_never_starts_without_the_key_that_was_meant(tmp_path, monkeypatch):
    monkeypatch.setenv("CNNRAY_API_KEY_FILE", str(tmp_path / "key"))
    with pytest.raises(storage.NotFoundError, match="key does not exist"):
        read_keys()
    (tmp_path / "key").write_text(" \n")
    with pytest.raises(ApiKeyError, match="is empty"):
        read_keys()
    (tmp_path / "key").write_text("x")
    monkeypatch.setenv("CNNRAY_API_KEY", "y")
    with pytest.raises(ApiKeyError, match="both set"):
        read_keys()


def test_replicas_get_the_name_of_the_file_and_not_the_key(tmp_path, monkeypatch, caplog):
    (tmp_path / "key").write_text("secret")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CNNRAY_API_KEY_FILE", "key")
    environment = deploy._runtime_environment()
    assert environment["env_vars"]["CNNRAY_API_KEY_FILE"] == str(tmp_path / "key")
    assert "secret" not in json.dumps(environment)
    assert not caplog.messages


def test_a_key_in_the_jobs_variables_is_refused(monkeypatch):
    submitted = {"runtime_env": {"env_vars": {"CNNRAY_API_KEY": "secret"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(submitted))
    with pytest.raises(ApiKeyError, match=r"give CNNRAY_API_KEY_FILE instead\.$") as raised:
        deploy._check_keys()
    assert "secret" not in str(raised.value)


KEYS = """
- {name: web, key: one, requests_per_second: 2}
- {name: operator, key: two, admin: true}
"""


def test_a_file_may_hold_several(tmp_path, monkeypatch):
    (tmp_path / "keys").write_text(KEYS)
    monkeypatch.setenv("CNNRAY_API_KEY_FILE", str(tmp_path / "keys"))
    web, operator = read_keys()
    assert (web.name, web.requests_per_second, web.admin) == ("web", 2, False)
    assert (operator.name, operator.requests_per_second, operator.admin) == ("operator", None, True)
    keys = Keys([web, operator])
    assert keys.find("one") == web
    assert keys.find("three") is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- {name: a, key: secret}\n- {name: b, key: secret}", "has a key twice"),
        ("- {name: a, key: secret}\n- {name: a, key: other}", "has a name twice"),
        ("- {name: a, key: secret, admins: true}", "Entry 1 of .* must be a mapping with key and name"),
        ("- secret", "Entry 1 of .* must be a mapping with key and name"),
        ("- {name: a, key: 12345}", "a key that is empty, or of the wrong type .quote one of digits alone."),
        ("- {name: a, key: 2026-13-45}", "neither a key, without blanks, nor a YAML list"),
        ("- {name: a, key: secret", "neither a key, without blanks, nor a YAML list"),
        ("name: a, key: secret", "neither a key, without blanks, nor a YAML list"),
        ("-{name: a, key: secret}", "neither a key, without blanks, nor a YAML list"),
        ("name: a\nkey: secret", "neither a key, without blanks, nor a YAML list"),
        ("- {name: a, key: secret, requests_per_second: -1}", "must have requests_per_second above 0"),
        ("[]", "is empty"),
    ],
)
def test_a_damaged_file_gets_a_sentence_that_tells_no_key(text, sentence, tmp_path, monkeypatch):
    (tmp_path / "keys").write_text(text)
    monkeypatch.setenv("CNNRAY_API_KEY_FILE", str(tmp_path / "keys"))
    with pytest.raises(ApiKeyError, match=sentence) as raised:
        read_keys()
    assert "secret" not in str(raised.value)
    assert "12345" not in str(raised.value)
    assert "2026" not in str(raised.value)


def test_a_key_has_its_requests_of_a_second(monkeypatch):
    moment = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: moment)
    web, other = Key(key="one", name="web", requests_per_second=2), Key(key="two", name="other")
    keys = Keys([web, other])
    assert [keys.take_request(web) for _ in range(3)] == [0, 0, 0.5]
    assert keys.take_request(other) == 0
    moment = 0.5
    assert [keys.take_request(web) for _ in range(2)] == [0, 0.5]
    moment = 100.0
    assert [keys.take_request(web) for _ in range(3)] == [0, 0, 0.5]


def test_the_file_is_read_again(tmp_path, monkeypatch, caplog):
    (tmp_path / "keys").write_text(KEYS)
    monkeypatch.setenv("CNNRAY_API_KEY_FILE", str(tmp_path / "keys"))
    monkeypatch.setattr(keys_module, "_READ_AGAIN_SECONDS", 0.01)

    async def change():
        keys = Keys(read_keys())
        reading = asyncio.create_task(keys.read_again())
        for damaged in ("", KEYS[:-5], "- {name: a, key: 2026-13-45}"):
            (tmp_path / "keys").write_text(damaged)
            caplog.clear()
            while not caplog.messages:
                await asyncio.sleep(0.01)
        assert keys.find("one") is not None  # what it was stays
        (tmp_path / "keys").write_text("- {name: web, key: new}")
        while keys.find("new") is None:
            await asyncio.sleep(0.01)
        reading.cancel()
        return keys.find("one")

    assert asyncio.run(asyncio.wait_for(change(), 30)) is None
    assert "stay as they are" in caplog.messages[0]


def test_the_gate_checks_them(start_client):
    keys = Key(key="one", name="web", requests_per_second=2), Key(key="two", name="operator", admin=True)
    client = start_client(keys=keys)

    def ask(key, method="GET", path="/metadata"):
        return client.request(method, path, headers={"X-API-Key": key})

    answers = [ask("one") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[-1].headers["Retry-After"] == "1"
    assert "2 requests a second" in answers[-1].json()["error"]
    assert ask("three").status_code == 401
    assert ask("two").status_code == 200
    time.sleep(1)
    refused = ask("one", "POST", "/v2/repository/models/colours/unload")
    assert (refused.status_code, "key of an admin" in refused.json()["error"]) == (403, True)


@pytest.mark.parametrize("prefix", ["", "/pics"])
def test_paths_under_a_prefix_need_the_same_keys(prefix, start_client):
    gate = start_client(keys=[Key(key="one", name="web"), Key(key="two", name="operator", admin=True)]).app
    client = TestClient(gate, root_path=prefix)
    key = {"X-API-Key": "one"}
    assert client.get(f"{prefix}/health/ready").status_code == 200
    assert client.get(f"{prefix}/metadata").status_code == 401
    assert client.get(f"{prefix}/metadata", headers=key).status_code == 200
    assert client.post(f"{prefix}/v2/repository/models/colours/unload", headers=key).status_code == 403


def test_without_keys_nobody_is_an_admin(start_client):
    response = start_client().post("/v2/repository/models/colours/unload")
    assert response.status_code == 403
