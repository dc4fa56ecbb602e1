"""Hypothesis strategies for what strangers send: a job's JSON, URLs, and the answers of their servers.

The inputs follow `VideoRequest`, its fields with their types, bounds and aliases: what is added there is
fuzzed without a word here.
"""

import hashlib
import math
import types
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from core.request import ALIASES, SECRETS, LoraChoice, TimedSection, VideoRequest

# in every text that is nobody's business; computed, as hypothesis takes ideas from constants in the source
SECRET = hashlib.sha256(b"a stranger's secret").hexdigest()[:16]

ODD_CHARACTERS = st.characters(categories=("Cc", "Cf", "Cn", "Co", "Cs", "Mn", "So", "Zl", "Zp", "Zs"))
ODD_TEXTS = (
    *(
        "",
        " ",
        "\0",
        "\ud800",
        "\r\n",
        "\u202e",
        "5",
        "-1",
        "1e3",
        "NaN",
        "null",
        "true",
        "{}",
        "[]",
        "%s%n",
        "{0}",
    ),
    *("auto", "i2v", "../../etc/passwd", "<|eot_id|>", "${jndi:x}", "https://127.0.0.1/"),
)
LENGTHS = (40, 41, 256, 512, 4000, 4001, 4097, 50_000)
TEXTS = st.one_of(
    st.text(max_size=50),
    st.text(ODD_CHARACTERS, max_size=20),
    st.builds(str.__mul__, st.text(min_size=1, max_size=2), st.sampled_from(LENGTHS)),
    st.sampled_from(ODD_TEXTS),
)
NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -0.0, 5e-324, 1e19, 1e20, 1e300, math.nan, math.inf, -math.inf]),
    st.sampled_from([2**31, 2**32, 2**53 + 1, 2**63, -(2**63) - 1, 2**64, 10**30, -(10**400), 10**4299]),
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=6,
)


def _nested(depth: int, as_list: bool) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value] if as_list else {"a": value}
    return value


ONE_OF = ("input_image", "resume_latents")  # what a job can begin with

DEEP = st.builds(_nested, st.sampled_from([2, 50, 400]), st.booleans())


@cache  # here and below: a strategy is checked anew, and slowly, each time that it is built
def good_values(model: type[BaseModel], name: str) -> SearchStrategy:
    """What the field `name` of `model` should take, by its annotation."""
    field = model.model_fields[name]
    members = (
        get_args(field.annotation)
        if get_origin(field.annotation) in (Union, types.UnionType)
        else (field.annotation,)
    )
    return st.one_of(*(_of_type(member, field) for member in members))


def _of_type(kind: Any, field: FieldInfo) -> SearchStrategy:
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    low, high = _limit(field, "ge"), _limit(field, "le")
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if kind is int:
        step = _limit(field, "multiple_of") or 1
        return st.integers(low and math.ceil(low / step), high and high // step).map(lambda n: n * step)
    if kind is float:
        return st.floats(low, high, allow_nan=False, allow_infinity=False)
    if kind is str:
        if field is VideoRequest.model_fields["aspect_ratio"]:
            return st.sampled_from(["auto", "1:1", "16:9", "9:16", "21:9", "1000:4000"])
        if pattern := _limit(field, "pattern"):
            return st.from_regex(pattern, fullmatch=True)
        return st.text(min_size=_limit(field, "min_length") or 0, max_size=_limit(field, "max_length"))
    if get_origin(kind) is list:
        each = _of_type(get_args(kind)[0], field)
        if get_args(kind)[0] is TimedSection:
            return st.lists(each, max_size=3).map(_one_after_the_other)
        return st.lists(each, max_size=_limit(field, "max_length"))
    if kind is LoraChoice:
        return good_objects(LoraChoice).map(_named_once)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return good_objects(kind)
    return st.from_type(kind)


def _one_after_the_other(sections: list[dict]) -> list[dict]:
    """With something to show and with times of their own: 2 seconds for each."""
    return [
        {"prompt": "x"}
        | section
        | {"start_s": 2.0 * k}
        | ({"end_s": 2.0 * k + 1} if "end_s" in section else {})
        for k, section in enumerate(sections)
    ]


def _named_once(lora: dict) -> dict:
    """By its URL, if it has one, or by its name."""
    if lora.get("url") is None:
        return lora | {"name": lora.get("name") or "a.safetensors"}
    return lora | {"name": None}


@cache
def edge_values(model: type[BaseModel], name: str) -> SearchStrategy:
    """On both sides of the field's bounds."""
    field = model.model_fields[name]
    values: list[Any] = []
    for limit in ("ge", "le", "multiple_of"):
        if (bound := _limit(field, limit)) is not None:
            values += [bound - 1, bound, bound + 1, float(bound), bound + 0.5]
            values += [math.nextafter(bound, -math.inf), math.nextafter(bound, math.inf)]
    for limit in ("min_length", "max_length"):
        if (length := _limit(field, limit)) is not None:
            values += ["x" * (length - 1), "x" * length, "🐈" * length, "x" * (length + 1)]
    return st.sampled_from(values) if values else st.nothing()


def _limit(field: FieldInfo, name: str) -> Any:
    return next((getattr(limit, name) for limit in field.metadata if hasattr(limit, name)), None)


@cache
def _beginnings(name: str) -> SearchStrategy:
    """Of one of the fields in ONE_OF, which is not to be empty."""
    return good_values(VideoRequest, name).filter(lambda value: value is not None)


@st.composite
def good_objects(draw: Any, model: type[BaseModel] = VideoRequest) -> dict:
    """What is required and some of the rest, each under one of its names."""
    required = [name for name, field in model.model_fields.items() if field.is_required()]
    if model is VideoRequest:
        required.append(draw(st.sampled_from(ONE_OF)))
    optional = [name for name in model.model_fields if name not in required]
    chosen = draw(st.lists(st.sampled_from(optional), unique=True))
    if model is VideoRequest:
        chosen = draw(_going_together(chosen))
    data = {}
    for name in draw(st.permutations([*required, *chosen])):
        value = draw(_beginnings(name) if name in ONE_OF else good_values(model, name))
        secret = name in SECRETS or (model is TimedSection and name == "image")
        data[draw(st.sampled_from(_names_of(model, name)))] = planted(value) if secret else value
    return data


@st.composite
def _going_together(draw: Any, names: list[str]) -> list[str]:
    """Of a request's fields `names` those that do not contradict others, and what they need."""
    start = draw(st.sampled_from(["input_image", "input_image", "start"]))
    left_out = {"input_image", "start"} - {start}
    if {"width", "height"} & {*names}:
        names = [*names, "width", "height"]
        left_out |= {"resolution", "aspect_ratio"}
    if start == "start":
        left_out.add("aspect_ratio")  # may be auto
    if "end_image" in names:
        left_out.add("model")  # may be f1
    return [name for name in dict.fromkeys([start, *names]) if name not in left_out]


def _names_of(model: type[BaseModel], name: str) -> list[str]:
    aliases = [alias for alias, field in ALIASES.items() if field == name]
    return [name, *aliases] if model is VideoRequest else [name]


@cache
def _any_values(name: str) -> SearchStrategy:
    """For a request's field: good, nearly good or anything."""
    return st.one_of(edge_values(VideoRequest, name), good_values(VideoRequest, name), VALUES, DEEP)


@st.composite
def _faults(draw: Any) -> dict:
    """One field with anything as its value, or one that does not exist."""
    known = draw(st.sampled_from([*VideoRequest.model_fields, *ALIASES]))
    name = ALIASES.get(known, known)
    value = draw(_any_values(name))
    if isinstance(value, dict) and name in SECRETS and draw(st.booleans()):
        value |= draw(st.dictionaries(st.sampled_from([*value, "region"]) | TEXTS, VALUES | DEEP, max_size=2))
    key = known
    match draw(st.sampled_from(["right", "right", "before", "after", "unknown"])):
        case "before":
            key = draw(TEXTS) + known
        case "after":
            key = known + draw(TEXTS)
        case "unknown":
            key = draw(TEXTS)
    field_of_key = ALIASES.get(key, key)
    secret = field_of_key in SECRETS or (name in SECRETS and field_of_key not in VideoRequest.model_fields)
    return {key: planted(value) if secret else value}


@st.composite
def inputs(draw: Any) -> Any:
    """A job's input: good, or with up to three faults, or nothing like it."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(VALUES | DEEP)
    if kind == 1:
        return draw(st.dictionaries(TEXTS, VALUES, max_size=5))
    data = draw(good_objects())
    for fault in draw(st.lists(_faults(), max_size=3)) if kind > 3 else []:
        data |= fault
    if kind == 9:
        del data[draw(st.sampled_from([*data]))]
    return data


def planted(value: Any) -> Any:
    """`value` with SECRET in front of every text in it that need not have a certain form."""
    if isinstance(value, str):
        return SECRET + value
    if isinstance(value, list):
        return [planted(part) for part in value]
    if isinstance(value, dict):
        formed = ("bucketName", "endpointUrl", "region")
        return {key: part if key in formed else planted(part) for key, part in value.items()}
    return value


NAMES = ("images.test", "IMAGES.test.", "bücher.test", "xn--bcher-kva.test", "a_b.test")
ODD_HOSTS = (
    *(
        "127.1",
        "0x7f.1",
        "017700000001",
        "2130706433",
        "①②⑦.⓪.⓪.①",
        "127。0。0。1",
        "0",
        "localhost",
        "xn--",
        ".",
    ),
    *("[::]", "[::ffff:10.0.0.1]", "[fe80::1%25eth0]", "[v1.test]", "[1.2.3.4]", "[]", "[", "xn--a", ""),
)
HOSTS = st.one_of(
    st.sampled_from(NAMES),
    st.sampled_from(NAMES + ODD_HOSTS),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map("[{}]".format),
    st.text(st.characters(categories=("L", "M", "N", "P")), max_size=10).map("{}.test".format),
    st.lists(st.text("a0-_é。", min_size=1, max_size=64), min_size=1, max_size=130).map(".".join),
)
ODD_SCHEMES = ("HTTPS://", "http://", "https:", "//", "https:\\\\", "https:///", "file://", "s3://", "")
USERS = (f"{SECRET}@", f"{SECRET}:{SECRET}@", "@", "images.test:443@")
PORTS = (
    ":443",
    ":8443",
    ":9000",
    ":80",
    ":0",
    ":-1",
    ":65536",
    ":٤٤٣",
    ":",
    ":443:443",
    ":+443",
    f":{10**30}",
)
PATHS = ("", f"/{SECRET}", f"/?{SECRET}", f"?{SECRET}", f"#{SECRET}", f"//{SECRET}/..;/%00")
ODD_IN_URLS = ODD_CHARACTERS | st.sampled_from("\\@#?/%:;[]<>\"'\t\r\n\0。．／＠：")


def _rarely(*values: str) -> SearchStrategy:
    return st.sampled_from([*[""] * 3 * len(values), *values])


@st.composite
def urls(draw: Any) -> str:
    """A URL's parts, good and bad, in their order; what should stay between caller and host is SECRET."""
    if draw(st.integers(0, 9)) == 0:
        return draw(TEXTS)
    scheme = st.just("https://") | st.sampled_from(["https://", *ODD_SCHEMES])
    url = draw(scheme) + draw(_rarely(*USERS)) + draw(HOSTS) + draw(_rarely(*PORTS))
    url += draw(st.sampled_from(PATHS)) + draw(st.just("") | TEXTS)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        place = draw(st.integers(0, len(url)))
        url = url[:place] + draw(ODD_IN_URLS) + url[place:]
    return url


STATUS_LINES = st.builds(
    "{} {}".format,
    st.sampled_from(["HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/9", "ICY"]),
    st.sampled_from(
        ["200", "302 Found", "301", "404 No", "100 Continue", "204 None", "304 Same", "999", "-1", "x"]
    ),
)
HEADERS = st.one_of(
    urls().map("Location: {}".format),
    st.sampled_from(["", "0", "5", "1001", "-1", "1e3", "9" * 30, "٣", " 7 "]).map(
        "Content-Length: {}".format
    ),
    st.sampled_from(["chunked", "Chunked, gzip", "x"]).map("Transfer-Encoding: {}".format),
    st.sampled_from(["identity", "gzip", "br", ""]).map("Content-Encoding: {}".format),
    TEXTS,
)
BODIES = st.binary(max_size=2000) | st.sampled_from(
    [b"5\r\nhello\r\n0\r\n\r\n", b"FFFFFFFFF\r\nx", b"-1\r\n"]
)


@st.composite
def answers(draw: Any) -> bytes:
    """What a server says: HTTP, more or less."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    lines = [draw(st.just("HTTP/1.1 200 OK") | STATUS_LINES), *draw(st.lists(HEADERS, max_size=3))]
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "replace") + draw(BODIES)


def assert_sentence(sentence: str) -> None:
    """It can be shown to the caller and put into a log."""
    assert sentence.endswith(".")
    assert sentence.isprintable(), ascii(sentence)
    assert len(sentence) < 400
    assert SECRET not in sentence
    sentence.encode("utf-8")
