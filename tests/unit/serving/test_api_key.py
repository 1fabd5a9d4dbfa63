"""Where the API key comes from, and that it does not go where Ray shows it."""

import json

import pytest

from cnnray.images import storage
from cnnray.serving import deploy
from cnnray.serving.settings import ApiKeyError, api_key


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ("CNNRAY_API_KEY", "CNNRAY_API_KEY_FILE", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)


def test_it_is_a_variable_or_a_files_content(tmp_path, monkeypatch):
    assert api_key() is None
    monkeypatch.setenv("CNNRAY_API_KEY", "from a variable")
    assert api_key() == "from a variable"
    monkeypatch.setenv("CNNRAY_API_KEY", "")
    assert api_key() is None
    (tmp_path / "key").write_text("from a file\n")
    monkeypatch.setenv("CNNRAY_API_KEY_FILE", str(tmp_path / "key"))
    assert api_key() == "from a file"


def test_a_service_never_starts_without_the_key_that_was_meant(tmp_path, monkeypatch):
    monkeypatch.setenv("CNNRAY_API_KEY_FILE", str(tmp_path / "key"))
    with pytest.raises(storage.NotFoundError, match="key does not exist"):
        api_key()
    (tmp_path / "key").write_text(" \n")
    with pytest.raises(ApiKeyError, match="is empty"):
        api_key()
    (tmp_path / "key").write_text("x")
    monkeypatch.setenv("CNNRAY_API_KEY", "y")
    with pytest.raises(ApiKeyError, match="both set"):
        api_key()


def test_replicas_get_the_name_of_the_file_and_not_the_key(tmp_path, monkeypatch, caplog):
    (tmp_path / "key").write_text("secret")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CNNRAY_API_KEY_FILE", "key")
    environment = deploy._runtime_environment()
    assert environment["env_vars"]["CNNRAY_API_KEY_FILE"] == str(tmp_path / "key")
    assert "secret" not in json.dumps(environment)
    assert not caplog.messages


def test_a_key_in_the_jobs_variables_is_warned_of(monkeypatch, caplog):
    submitted = {"runtime_env": {"env_vars": {"CNNRAY_API_KEY": "secret"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(submitted))
    deploy._runtime_environment()
    (message,) = caplog.messages
    assert "give CNNRAY_API_KEY_FILE instead" in message
    assert "secret" not in message
