"""Imports go down only, secrets stay out, documents stay true."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest

from builder.export_schema import with_schema
from core.errors import RequestError, WorkerError, error_reply
from core.request import ALIASES, S3Config, VideoRequest
from core.settings import Settings, SettingsError

ROOT = Path(__file__).parents[1]
HTTP_SERVERS = {"fastapi", "uvicorn", "flask", "starlette", "aiohttp"}
SPECS = ["docs/in_out_spec.md", "docs/in_out_spec.ja.md"]
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


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


def prose(name: str) -> str:
    """A document without its code blocks, the schema among them."""
    return FENCED.sub("", (ROOT / name).read_text(encoding="utf-8"))


def rows(name: str) -> list[str]:
    """Of all its tables."""
    return re.findall(r"^\|.*", prose(name), re.MULTILINE)


def tokens(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def headings(name: str) -> list[str]:
    """Their levels: ## and ###."""
    return re.findall(r"^###? ", prose(name), re.MULTILINE)


def make_commands(name: str) -> list[str]:
    blocks = FENCED.findall((ROOT / name).read_text(encoding="utf-8"))
    return re.findall(r"^make \S+", "\n".join(blocks), re.MULTILINE)


@pytest.mark.parametrize("path", sorted((ROOT / "core").rglob("*.py")), ids=str)
def test_core_knows_no_platform(path):
    assert not tops(imported(path)) & ({"runpod", "handler", "serverless_handler", "builder"} | HTTP_SERVERS)


@pytest.mark.parametrize("path", sorted((ROOT / "diffusers_helper").glob("*.py")), ids=str)
def test_helpers_know_no_request_and_no_environment(path):
    assert not tops(imported(path)) & {"core", "runpod", "handler", "os", "pydantic", "builder"}


@pytest.mark.parametrize("name", ["pipeline/sections", "weights/profiles"])
def test_planning_needs_no_torch(name):
    names = imported(ROOT / "core" / f"{name}.py")
    assert not tops(names) & {"torch", "diffusers", "diffusers_helper"}


@pytest.mark.parametrize("path", sorted((ROOT / "client").glob("*.py")), ids=str)
def test_the_client_needs_only_httpx_and_rich(path):
    assert tops(imported(path)) <= {"client", "httpx", "rich"} | sys.stdlib_module_names


def test_lambda_does_not_need_runpod():
    assert "runpod" not in tops(imported(ROOT / "serverless_handler.py"))


def test_the_documented_schema_is_the_current_one():
    text = (ROOT / "docs" / "in_out_spec.md").read_text(encoding="utf-8")
    assert with_schema(text) == text, "run `make docs`"


@pytest.mark.parametrize("spec", SPECS)
def test_every_error_code_is_documented(spec):
    text = (ROOT / spec).read_text(encoding="utf-8")

    def codes(error):
        yield error.code
        for child in error.__subclasses__():
            yield from codes(child)

    for code in codes(WorkerError):
        assert f"`{code}`" in text


@pytest.mark.parametrize("spec", SPECS)
def test_every_field_of_the_request_is_in_the_tables(spec):
    told = set().union(*map(tokens, rows(spec)))
    assert told >= {*VideoRequest.model_fields, *ALIASES, *S3Config.model_fields}


def test_every_setting_is_documented():
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    for field in Settings.__dataclass_fields__:
        assert f"`{field.upper()}`" in text


def test_the_japanese_specification_names_what_the_english_one_does():
    english, japanese = map(rows, SPECS)
    assert [tokens(row) for row in japanese] == [tokens(row) for row in english]
    for ours, theirs in zip(japanese, english, strict=True):
        assert {*re.findall(r"\d+", ours)} >= {*re.findall(r"\d+", theirs)}, ours
    assert tokens(prose(SPECS[1])) == tokens(prose(SPECS[0]))
    assert headings(SPECS[1]) == headings(SPECS[0])


def test_the_japanese_readme_has_the_sections_and_commands_of_the_english_one():
    assert headings("README.ja.md") == headings("README.md")
    assert make_commands("README.ja.md") == make_commands("README.md") == ["make demo", "make test"]


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


@pytest.mark.parametrize(
    "env",
    [
        {"MODEL_PROFILE": "wan"},
        {"MEMORY_MODE": "maybe"},
        {"PRECISION": "fp4"},
        {"COMPILE": "yes"},
        {"ATTENTION": "sage"},
    ],
)
def test_a_wrong_setting_is_named(env):
    (name,) = env
    with pytest.raises(SettingsError, match=f"{name} must be one of"):
        Settings.from_env(env)
