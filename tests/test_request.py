"""The JSON input: defaults, aliases, bounds, and refusals that are one plain sentence."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from core.errors import RequestError
from core.request import ALIASES, VideoRequest, input_of, parse_request

ROOT = Path(__file__).parents[1]
REQUIRED = {"input_image": "aGVsbG8=", "prompt": "A cat turns its head."}

DEFAULTS = {
    "n_prompt": "",
    "seed": 31337,
    "total_second_length": 5.0,
    "latent_window_size": 9,
    "steps": 25,
    "cfg": 1.0,
    "gs": 10.0,
    "rs": 0.0,
    "gpu_memory_preservation": 6.0,
    "use_teacache": True,
    "mp4_crf": 16,
    "output": "auto",
    "s3_config": None,
    "timeout_s": None,
    "partial": False,
    "preview": False,
    "model": None,
    "resolution": None,
    "sampler": "unipc_bh1",
    "shift": 0.0,
    "cache": None,
    "cache_threshold": None,
    "cache_order": 0,
    "format": "mp4",
    "codec": None,
    "fps": 30,
    "poster": False,
    "embed_parameters": True,
    "exact_length": False,
    "num_outputs": 1,
    "return_latents": False,
    "resume_latents": None,
    "end_image": None,
    "end_image_strength": 1.0,
    "end_image_mode": "history",
    "start": None,
    "width": None,
    "height": None,
    "aspect_ratio": None,
    "loras": [],
    "sections": [],
    "blend_sections": 0,
    "one_frame": None,
    "input_video": None,
    "include_source": True,
}

BUCKET = {
    "accessId": "an-id",
    "accessSecret": "a-secret",
    "bucketName": "videos",
    "endpointUrl": "https://s3.example.com",
}

# alias: its field, and a value other than the default
EXPECTED_ALIASES = {
    "image": ("input_image", "aW1hZ2U="),
    "image_b64": ("input_image", "aW1hZ2U="),
    "image_base64": ("input_image", "aW1hZ2U="),
    "input_image_b64": ("input_image", "aW1hZ2U="),
    "image_url": ("input_image", "https://example.com/cat.png"),
    "negative_prompt": ("n_prompt", "blurry"),
    "duration": ("total_second_length", 3.0),
    "duration_s": ("total_second_length", 3.0),
    "video_length": ("total_second_length", 3.0),
    "total_video_length_seconds": ("total_second_length", 3.0),
    "num_inference_steps": ("steps", 7),
    "cfg_scale": ("cfg", 2.0),
    "guidance_scale": ("gs", 2.0),
    "distilled_cfg_scale": ("gs", 2.0),
    "cfg_rescale": ("rs", 0.5),
    "s3Config": ("s3_config", BUCKET),
}

WHOLE_BOUNDS = {
    "seed": (-1, 2**32 - 1),
    "latent_window_size": (1, 33),
    "steps": (1, 100),
    "mp4_crf": (0, 51),
    "resolution": (256, 960),
    "cache_order": (0, 2),
    "fps": (1, 120),
    "num_outputs": (1, 4),
    "blend_sections": (0, 10),
}
REAL_BOUNDS = {
    "total_second_length": (1, 120),
    "cfg": (1, 32),
    "gs": (1, 32),
    "rs": (0, 1),
    "gpu_memory_preservation": (0, 128),
    "timeout_s": (1, 86_400),
    "shift": (0, 20),
    "cache_threshold": (0, 1),
    "end_image_strength": (0, 1),
}
NUMBERS = [*WHOLE_BOUNDS, *REAL_BOUNDS]
TEXTS = ["input_image", "prompt", "n_prompt", "resume_latents", "end_image", "input_video"]


def accepted(**fields) -> VideoRequest:
    return parse_request(REQUIRED | fields)


def refusal(data) -> str:
    """The sentence `data` is refused with; every refusal has to read as one."""
    with pytest.raises(RequestError) as caught:
        parse_request(data)
    error = caught.value
    assert error.code == "invalid_request"
    assert error.__suppress_context__ or error.__context__ is None  # no second error in the worker's log
    sentence = str(error)
    assert sentence.isprintable()  # on one line, and as it stands: no control characters, no turned text
    assert sentence.endswith(".")
    assert len(sentence) < 400
    assert sentence.encode("utf-8").decode("utf-8") == sentence
    for foreign in (
        "Input should",
        "validation error",
        "Value error",
        "pydantic",
        "Traceback",
    ):
        assert foreign not in sentence
    return sentence


def refused(**fields) -> str:
    return refusal(REQUIRED | fields)


def test_defaults():
    assert accepted().model_dump() == REQUIRED | DEFAULTS


def test_the_callers_object_is_left_alone():
    data = REQUIRED | {"num_inference_steps": 7}
    parse_request(data)
    assert data == REQUIRED | {"num_inference_steps": 7}


def test_parsing_needs_no_torch():
    code = "import sys, core.images, core.request; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_aliases_are_the_documented_ones():
    assert {alias: name for alias, (name, _) in EXPECTED_ALIASES.items()} == ALIASES


@pytest.mark.parametrize("alias", EXPECTED_ALIASES)
def test_alias(alias):
    name, value = EXPECTED_ALIASES[alias]
    data = {key: other for key, other in REQUIRED.items() if key != name} | {alias: value}
    request = parse_request(data)
    assert request.model_dump(exclude_unset=True)[name] == value
    assert name in request.model_fields_set


@pytest.mark.parametrize("alias", EXPECTED_ALIASES)
def test_alias_and_canonical_name_together(alias):
    name, value = EXPECTED_ALIASES[alias]
    both = [{name: value, alias: value}, {alias: value, name: value}]
    for fields in both:
        others = {key: other for key, other in REQUIRED.items() if key != name}
        sentence = refusal(others | fields)
        assert f"`{name}`" in sentence
        assert "twice" in sentence


def test_two_aliases_of_one_field():
    assert "`gs` is given twice" in refused(guidance_scale=3.0, distilled_cfg_scale=3.0)


def test_errors_of_an_alias_name_the_field():
    assert "`steps` must be at most 100 (got 101)." in refused(num_inference_steps=101)


@pytest.mark.parametrize("name", WHOLE_BOUNDS)
def test_bounds_of_whole_numbers(name):
    low, high = WHOLE_BOUNDS[name]
    assert getattr(accepted(**{name: low}), name) == low
    assert getattr(accepted(**{name: high}), name) == high
    assert f"`{name}` must be at least {low} (got {low - 1})" in refused(**{name: low - 1})
    assert f"`{name}` must be at most {high} (got {high + 1})" in refused(**{name: high + 1})


@pytest.mark.parametrize("name", REAL_BOUNDS)
def test_bounds_of_real_numbers(name):
    low, high = REAL_BOUNDS[name]
    assert getattr(accepted(**{name: low}), name) == low
    assert getattr(accepted(**{name: high}), name) == high
    assert getattr(accepted(**{name: float(high)}), name) == high
    assert f"`{name}` must be at least {low} (got" in refused(**{name: math.nextafter(low, -math.inf)})
    assert f"`{name}` must be at most {high} (got" in refused(**{name: math.nextafter(high, math.inf)})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_must_be_finite(name, value):
    assert refused(**{name: value}).startswith(f"`{name}` must be")


@pytest.mark.parametrize("name", NUMBERS)
def test_minus_zero_counts_as_zero(name):
    low, _ = (WHOLE_BOUNDS | REAL_BOUNDS)[name]
    if low > 0:
        assert f"`{name}` must be at least {low}" in refused(**{name: -0.0})
    else:
        assert getattr(accepted(**{name: -0.0}), name) == 0


@pytest.mark.parametrize("value", [10**30, -(10**30), 10**400, 1e300, -1e300], ids=lambda v: f"{str(v)[:6]}")
@pytest.mark.parametrize("name", NUMBERS)
def test_gigantic_numbers(name, value):
    assert refused(**{name: value}).startswith(f"`{name}` must be")


@pytest.mark.parametrize("value", ["5", "", "1e3", "NaN", "five"])
@pytest.mark.parametrize("name", NUMBERS)
def test_strings_are_not_numbers(name, value):
    assert f'number (got the string "{value}")' in refused(**{name: value})


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("name", NUMBERS)
def test_true_and_false_are_not_numbers(name, value):
    assert f"number (got {str(value).lower()})" in refused(**{name: value})


@pytest.mark.parametrize("value", [[], [1], {}, {"value": 1}], ids=str)
@pytest.mark.parametrize("name", [*NUMBERS, *TEXTS, "use_teacache", "model"])
def test_lists_and_objects_are_no_values(name, value):
    kind = "a list" if isinstance(value, list) else "an object"
    assert f"(got {kind})" in refused(**{name: value})


@pytest.mark.parametrize("name", ["seed", "latent_window_size", "steps", "mp4_crf"])
def test_whole_numbers_may_be_written_with_a_point(name):
    value = getattr(accepted(**{name: 25.0}), name)
    assert value == 25
    assert type(value) is int


def test_resolution_may_be_written_with_a_point():
    value = accepted(resolution=640.0).resolution
    assert value == 640
    assert type(value) is int


@pytest.mark.parametrize("name", WHOLE_BOUNDS)
def test_fractions_are_not_whole_numbers(name):
    assert refused(**{name: 1.5}) == f"`{name}` must be a whole number (got 1.5)."


@pytest.mark.parametrize("name", REAL_BOUNDS)
def test_whole_values_of_real_numbers(name):
    assert getattr(accepted(**{name: 1}), name) == 1.0


@pytest.mark.parametrize("seed", [None, -1, 0])
def test_seeds_that_ask_for_a_draw_and_zero(seed):
    assert accepted(seed=seed).seed == seed


def test_seed_minus_two():
    assert refused(seed=-2) == "`seed` must be at least -1 (got -2)."


def test_seed_of_33_bits():
    assert refused(seed=2**32) == "`seed` must be at most 4294967295 (got 4294967296)."


@pytest.mark.parametrize("resolution", [256, 288, 512, 640, 960, None])
def test_resolution(resolution):
    assert accepted(resolution=resolution).resolution == resolution


@pytest.mark.parametrize("resolution", [257, 300, 639, 959])
def test_resolution_must_be_a_multiple_of_32(resolution):
    assert refused(resolution=resolution) == f"`resolution` must be a multiple of 32 (got {resolution})."


@pytest.mark.parametrize("model", ["i2v", "f1", None])
def test_model(model):
    assert accepted(model=model).model == model


@pytest.mark.parametrize("model", ["F1", "", "hunyuan", 1, True])
def test_unknown_model(model):
    assert refused(model=model).startswith("`model` must be 'i2v' or 'f1'")


@pytest.mark.parametrize("value", [0, 1, 1.0, "true", "", None], ids=repr)
def test_use_teacache_must_be_a_boolean(value):
    assert refused(use_teacache=value).startswith("`use_teacache` must be true or false (got ")


@pytest.mark.parametrize("sampler", ["", "UniPC", "dpm", 1, True, None], ids=repr)
def test_unknown_sampler(sampler):
    assert refused(sampler=sampler).startswith("`sampler` must be 'unipc_bh1', 'unipc_bh2' or 'euler' (got ")


@pytest.mark.parametrize("cache", ["", "TeaCache", "taylor", 1, True, []], ids=repr)
def test_unknown_cache(cache):
    sentence = refused(cache=cache)
    assert sentence.startswith("`cache` must be 'none', 'teacache', 'magcache' or 'firstblock' (got ")


@pytest.mark.parametrize("shift", [5e-324, 0.05, math.nextafter(0.1, 0)])
def test_too_small_a_shift(shift):
    assert refused(shift=shift).startswith("`shift` must be 0 (automatic) or at least 0.1 (got ")
    assert accepted(shift=0.1).shift == 0.1


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, "teacache"),
        ({"use_teacache": True}, "teacache"),
        ({"use_teacache": False}, "none"),
        ({"use_teacache": True, "cache": None}, "teacache"),
        ({"use_teacache": False, "cache": None}, "none"),
        ({"use_teacache": True, "cache": "teacache"}, "teacache"),
        ({"use_teacache": False, "cache": "none"}, "none"),
        ({"use_teacache": False, "cache": "magcache"}, "magcache"),
        ({"cache": "none"}, "none"),
        ({"cache": "teacache"}, "teacache"),
        ({"cache": "firstblock"}, "firstblock"),
    ],
)
def test_one_cache(fields, kind):
    request = accepted(**fields)
    assert request.cache_kind == kind and request.use_teacache == (kind == "teacache")
    assert parse_request(request.model_dump()) == request


@pytest.mark.parametrize(
    ("use_teacache", "cache"),
    [(True, "none"), (True, "magcache"), (True, "firstblock"), (False, "teacache")],
)
def test_two_caches_at_once(use_teacache, cache):
    assert refused(use_teacache=use_teacache, cache=cache) == (
        f"`use_teacache` {str(use_teacache).lower()} and `cache` {cache} contradict each other; give one of "
        "them."
    )


NULLABLE = (
    "seed",
    "model",
    "resolution",
    "timeout_s",
    "s3_config",
    "cache",
    "cache_threshold",
    "codec",
    "resume_latents",
    "end_image",
    "start",
    "width",
    "height",
    "aspect_ratio",
    "one_frame",
    "input_video",
)


@pytest.mark.parametrize("name", [name for name in DEFAULTS if name not in NULLABLE])
def test_null_is_no_value_elsewhere(name):
    assert refused(**{name: None}).endswith("(got null).")


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("value", [5, 1.5, True, math.nan], ids=str)
def test_text_must_be_a_string(name, value):
    assert refused(**{name: value}).startswith(f"`{name}` must be a string (got ")


def test_required_fields():
    assert refusal({"input_image": "aGVsbG8="}) == "`prompt` is required."
    assert refusal({"prompt": "x"}) == "`input_image`, `start` or `input_video` is required."
    assert refused(prompt=None) == "`prompt` must be a string (got null)."
    assert refused(input_image=None) == "`input_image`, `start` or `input_video` is required."


@pytest.mark.parametrize("name", ["input_image", "prompt", "end_image"])
def test_texts_that_must_not_be_empty(name):
    assert refused(**{name: ""}) == f"`{name}` must not be empty."


def test_both_required_fields_missing():
    assert refusal({}) == "`input_image`, `start` or `input_video` is required; `prompt` is required."


@pytest.mark.parametrize(
    "text",
    ["🐈‍⬛ dances 💃", "Кошка", "猫が踊る", "مرحبا", "line one\nline two", "\0", " ", "\u2028", "{x} %s"],
)
@pytest.mark.parametrize("name", ["prompt", "n_prompt"])
def test_any_unicode_text(name, text):
    assert getattr(accepted(**{name: text}), name) == text


@pytest.mark.parametrize("character", ["x", "é", "🐈"])
@pytest.mark.parametrize("name", ["prompt", "n_prompt"])
def test_length_of_a_text_in_characters(name, character):
    assert getattr(accepted(**{name: character * 4000}), name) == character * 4000
    assert refused(**{name: character * 4001}) == f"`{name}` must have at most 4000 characters (got 4001)."


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "ok \ud83d"], ids=ascii)
@pytest.mark.parametrize("name", [*TEXTS, "model"])
def test_lone_surrogate(name, text):
    """`"\\ud800"` is legal JSON and no legal text."""
    assert refused(**{name: text}).startswith(f"`{name}` must be ")


def test_lone_surrogate_in_a_field_name():
    assert "is not a known field" in refused(**{"\ud800": 1})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("stepz", "steps"),
        ("Prompt", "prompt"),
        ("seeds", "seed"),
        ("num_inference_step", "num_inference_steps"),
        ("use_teacach", "use_teacache"),
        ("latent_window", "latent_window_size"),
    ],
)
def test_unknown_field_with_a_suggestion(name, meant):
    sentence = refused(**{name: 1})
    assert f"`{name}` is not a known field" in sentence
    assert f"did you mean `{meant}`?" in sentence


@pytest.mark.parametrize("name", ["", "zzzz", "🐈", "model_config", "self", "x" * 10_000])
def test_unknown_field_without_a_suggestion(name):
    sentence = refused(**{name: 1})
    assert "is not a known field" in sentence
    assert len(sentence) < 100


@pytest.mark.parametrize("name", ["line\nbreak", "carriage\rreturn", "\u2028"], ids=ascii)
def test_unknown_field_with_a_line_break(name):
    assert "is not a known field" in refused(**{name: 1})


@pytest.mark.parametrize("name", [" steps", "steps ", "steps\n", "\tsteps", "st\teps"], ids=ascii)
def test_white_space_makes_another_field(name):
    assert "is not a known field (did you mean `steps`?)" in refused(**{name: 5})
    assert "is not a known field" in refused(**{"steps": 5, name: 5})


@pytest.mark.parametrize("text", ["\0", "\x1b[31m", "\x7f", "\u202esteps", "\u200b", "\ue000"], ids=ascii)
def test_what_cannot_be_printed_is_not_shown(text):
    refused(**{text: 1})
    refused(seed=text, model=text, s3Config=BUCKET | {text: 1})
    assert "twice" in refused(**{text + "\ud800": 1, text + "?": 2})


def test_a_million_fields_are_refused_unread():
    many = {str(number): number for number in range(1_000_000)}
    assert refusal(many) == "The input has too many fields (1000000)."
    assert refused(s3Config=many) == "`s3_config` has too many fields (1000000)."


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ([], "a list"),
        ([REQUIRED], "a list"),
        ("text", "a string"),
        ("", "a string"),
        (None, "null"),
        (5, "a number"),
        (1.5, "a number"),
        (math.nan, "a number"),
        (True, "true or false"),
    ],
    ids=repr,
)
def test_input_must_be_an_object(data, kind):
    assert refusal(data) == f"The input must be a JSON object, not {kind}."


def test_two_faults_in_one_sentence():
    sentence = refused(steps=0, cfg="high")
    assert sentence == ('`steps` must be at least 1 (got 0); `cfg` must be a number (got the string "high").')


def test_many_faults_are_counted():
    sentence = refusal({"steps": 0, "cfg": 0, "gs": 0, "zzzz": 1, "prompt": "ok"})
    assert sentence.count("; ") == 3
    assert sentence.endswith("; and 2 more.")


def test_a_thousand_faults_stay_one_short_sentence():
    sentence = refusal({f"{number}{'x' * 1000}": number for number in range(1000)})
    assert sentence.endswith("; and 999 more.")


@pytest.mark.parametrize("name", [*NUMBERS, "use_teacache", "model"])
def test_a_long_value_is_not_echoed(name):
    sentence = refused(**{name: "A" * 10_000})
    assert "A" * 50 not in sentence
    assert len(sentence) < 200


@pytest.mark.parametrize("value", ["a\nb", "a\r\nb", "\u2028"], ids=ascii)
@pytest.mark.parametrize("name", ["seed", "cfg", "use_teacache", "model"])
def test_a_value_with_line_breaks_stays_on_one_line(name, value):
    assert refused(**{name: value}).startswith(f"`{name}` must be ")


def test_long_values_in_every_field_at_once():
    data = {name: "A" * 10_000 for name in [*NUMBERS, "use_teacache", "model", "n_prompt"]}
    assert "A" * 50 not in refused(**data)


class TestBucket:
    """`s3Config`, with RunPod's names inside; whatever is wrong with it, no value of it is shown."""

    @pytest.mark.parametrize("name", BUCKET)
    def test_each_part_is_required(self, name):
        rest = {key: value for key, value in BUCKET.items() if key != name}
        assert refused(s3Config=rest) == f"`s3_config.{name}` is required."

    def test_the_rest_is_optional(self):
        request = accepted(s3Config=BUCKET | {"region": "eu-1", "sessionToken": "token", "prefix": "a/b"})
        assert request.s3_config.region == "eu-1"
        assert accepted(s3Config=BUCKET).s3_config.prefix == ""

    @pytest.mark.parametrize(
        "endpoint",
        [
            "http://s3.example.com",
            "s3.example.com",
            "https://",
            "https://user:secret@s3.example.com",
            "https://s3.example.com/path",
            "https://s3.example.com?x=1",
            "https://s3.example.com#x",
            "https://s3.example.com\n",
            "https://a b",
            "ftp://s3.example.com",
            "https://evil\\@s3.example.com",
            "https://s3.exämple.com",
            "https://my_storage",
            "https://s3.example.com:",
            "https://s3.example.com:port",
            "https://[s3.example.com]",
            "https://s3.example.com\0",
        ],
    )
    def test_an_endpoint_is_https_and_a_host(self, endpoint):
        assert refused(s3Config=BUCKET | {"endpointUrl": endpoint}).startswith("`s3_config.endpointUrl` must")

    @pytest.mark.parametrize(
        "endpoint", ["https://s3.example.com:9000/", "https://S3-1.example", "https://[2606:2800::1]:9000"]
    )
    def test_endpoints(self, endpoint):
        assert accepted(s3Config=BUCKET | {"endpointUrl": endpoint}).s3_config.endpointUrl == endpoint

    @pytest.mark.parametrize("region", ["", "-", "-a", "a-", "7", "a" * 64, "EU", "a b", "a\n"])
    def test_a_region_is_one_that_botocore_takes(self, region):
        sentence = refused(s3Config=BUCKET | {"region": region})
        assert sentence == "`s3_config.region` is not the name of a region."

    @pytest.mark.parametrize("bucket", ["../other", "a/b", "", "x", "-x", "a" * 300, "bucket\n", "b cket"])
    def test_a_bucket_is_a_name(self, bucket):
        assert refused(s3Config=BUCKET | {"bucketName": bucket}).startswith("`s3_config.bucketName`")

    @pytest.mark.parametrize(
        "wrong",
        [
            {"accessSecret": ["hidden"]},
            {"accessSecret": "hidden" * 100},
            {"accessSecret": "hidden\ud800"},
            {"accessId": 12345},
            {"region": "hidden region"},
            {"hidden": "hidden"},
        ],
    )
    def test_no_value_is_shown(self, wrong):
        sentence = refused(s3Config=BUCKET | wrong)
        assert "12345" not in sentence and "a-secret" not in sentence
        assert "hidden" not in sentence.replace("`s3_config.hidden`", "")

    @pytest.mark.parametrize("wrong", ["a-secret", ["a-secret"], 5, True])
    def test_it_is_an_object(self, wrong):
        assert refused(s3Config=wrong).startswith("`s3_config` must be an object (got ")
        assert "a-secret" not in refused(s3Config=wrong)

    def test_null_is_none(self):
        assert accepted(s3Config=None).s3_config is None

    def test_it_is_not_printed(self):
        assert "a-secret" not in repr(accepted(s3Config=BUCKET))
        assert "a-secret" not in repr(accepted(s3Config=BUCKET).s3_config)


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ({"input": {"prompt": "x"}, "s3Config": {"a": 1}}, {"prompt": "x", "s3Config": {"a": 1}}),
        ({"input": {"s3_config": {"b": 2}}, "s3Config": {"a": 1}}, {"s3_config": {"b": 2}}),
        ({"input": {"s3Config": {"b": 2}}, "s3Config": {"a": 1}}, {"s3Config": {"b": 2}}),
        ({"input": {"prompt": "x"}, "s3Config": None}, {"prompt": "x"}),
        ({"input": ["x"], "s3Config": {"a": 1}}, ["x"]),
        ({}, None),
    ],
)
def test_the_bucket_beside_the_input_is_used(job, expected):
    assert input_of(job) == expected
