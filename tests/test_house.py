"""Imports go down only, secrets stay out, documents stay true."""

import ast
import json
import sys
from pathlib import Path

import pytest

from builder.export_schema import with_schema
from core.errors import RequestError, WorkerError, error_reply
from core.settings import Settings, SettingsError

ROOT = Path(__file__).parents[1]
HTTP_SERVERS = {"fastapi", "uvicorn", "flask", "starlette", "aiohttp"}


def imported(path: Path) -> set[str]:
    """Top-level names of everything a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def tops(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", sorted((ROOT / "core").rglob("*.py")), ids=str)
def test_core_knows_no_platform(path):
    assert not tops(imported(path)) & ({"runpod", "handler", "serverless_handler", "builder"} | HTTP_SERVERS)


@pytest.mark.parametrize("path", sorted((ROOT / "diffusers_helper").glob("*.py")), ids=str)
def test_helpers_know_no_request_and_no_environment(path):
    assert not tops(imported(path)) & {"core", "runpod", "handler", "os", "pydantic", "builder"}


@pytest.mark.parametrize("name", ["sections", "profiles"])
def test_planning_needs_no_torch(name):
    names = imported(ROOT / "core" / "pipeline" / f"{name}.py")
    assert not tops(names) & {"torch", "diffusers", "diffusers_helper"}


@pytest.mark.parametrize("path", sorted((ROOT / "client").glob("*.py")), ids=str)
def test_the_client_needs_only_httpx_and_rich(path):
    assert tops(imported(path)) <= {"client", "httpx", "rich"} | sys.stdlib_module_names


def test_lambda_does_not_need_runpod():
    assert "runpod" not in tops(imported(ROOT / "serverless_handler.py"))


def test_the_documented_schema_is_the_current_one():
    text = (ROOT / "docs" / "in_out_spec.md").read_text(encoding="utf-8")
    assert with_schema(text) == text, "run `make docs`"


def test_every_error_code_is_documented():
    text = (ROOT / "docs" / "in_out_spec.md").read_text(encoding="utf-8")

    def codes(error):
        yield error.code
        for child in error.__subclasses__():
            yield from codes(child)

    for code in codes(WorkerError):
        assert f"`{code}`" in text


def test_every_setting_is_documented():
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    for field in Settings.__dataclass_fields__:
        assert f"`{field.upper()}`" in text


def test_the_test_input_is_valid():
    from core.images import decode_image
    from core.request import parse_request

    job = json.loads((ROOT / "test_input.json").read_text(encoding="utf-8"))
    assert decode_image(parse_request(job["input"]).input_image).shape == (256, 320, 3)


def test_error_reply_is_a_string_with_a_code():
    assert error_reply(RequestError("No.")) == {"error": "No.", "code": "invalid_request"}


def test_settings_come_from_the_environment():
    settings = Settings.from_env({"MODEL_PROFILE": "demo", "MEMORY_MODE": " swap ", "REDUX_MODEL": ""})
    assert settings == Settings(model_profile="demo", memory_mode="swap")


@pytest.mark.parametrize("env", [{"MODEL_PROFILE": "wan"}, {"MEMORY_MODE": "maybe"}])
def test_a_wrong_setting_is_named(env):
    (name,) = env
    with pytest.raises(SettingsError, match=f"{name} must be one of"):
        Settings.from_env(env)
