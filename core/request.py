"""The JSON input: every field with its default, bounds, aliases and meaning.

Official FramePack names are canonical. Values are strict (no strings for numbers, no true for 1), unknown
fields are refused, and every refusal is one sentence that names the field.
"""

import difflib
import math
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from core.errors import RequestError

MAX_SEED = 2**32 - 1
MAX_PROMPT = 4000
MAX_LISTED_ERRORS = 3


def _whole_number(value: Any) -> Any:
    """25.0 is how some clients write 25; true and "25" are mistakes."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


Whole = Annotated[int, BeforeValidator(_whole_number)]


def _field(default: Any, description: str, *, aliases: tuple[str, ...] = (), **bounds: Any) -> Any:
    extra = {"aliases": list(aliases)} if aliases else None
    return Field(default, description=description, json_schema_extra=extra, **bounds)


class VideoRequest(BaseModel):
    """One job: an image and a prompt in, a video out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    input_image: str = _field(
        ...,
        "The first frame: base64 or a data URI of a PNG, JPEG or WebP of at most 20 MB and 50 megapixels.",
        aliases=("image", "image_b64", "image_base64", "input_image_b64"),
        min_length=1,
        repr=False,
    )
    prompt: str = _field(..., "What happens in the video.", min_length=1, max_length=MAX_PROMPT)
    n_prompt: str = _field(
        "", "What to avoid; acts only where cfg > 1.", aliases=("negative_prompt",), max_length=MAX_PROMPT
    )
    seed: Whole | None = _field(
        31337, "Same seed, same video. -1 or null draws one, echoed in the reply.", ge=-1, le=MAX_SEED
    )
    total_second_length: float = _field(
        5.0,
        "Length in seconds at 30 fps, rounded to whole sections.",
        aliases=("duration", "duration_s", "video_length", "total_video_length_seconds"),
        ge=1,
        le=120,
    )
    latent_window_size: Whole = _field(9, "Latent frames per section (4 video frames each).", ge=1, le=33)
    steps: Whole = _field(25, "Sampling steps per section.", aliases=("num_inference_steps",), ge=1, le=100)
    cfg: float = _field(
        1.0,
        "Classifier-free guidance; above 1 each step costs two evaluations.",
        aliases=("cfg_scale",),
        ge=1,
        le=32,
    )
    gs: float = _field(
        10.0, "Distilled guidance scale.", aliases=("guidance_scale", "distilled_cfg_scale"), ge=1, le=32
    )
    rs: float = _field(
        0.0, "Guidance rescale; acts only where cfg > 1.", aliases=("cfg_rescale",), ge=0, le=1
    )
    gpu_memory_preservation: float = _field(
        6.0, "GB of GPU memory kept free of weights while sampling; acts only in swap mode.", ge=0, le=128
    )
    use_teacache: bool = _field(True, "Skip steps that would hardly change the result (about 2× faster).")
    mp4_crf: Whole = _field(16, "H.264 quality: 0 is lossless, lower is better and larger.", ge=0, le=51)
    output: Literal["auto", "base64", "url"] = _field(
        "auto", "How the video is returned; auto inlines what fits and uploads the rest."
    )
    model: Literal["i2v", "f1"] | None = _field(None, "FramePack model; null is the worker's own.")
    resolution: Whole | None = _field(
        None,
        "Side of the square whose area the frame has, a multiple of 32; null is the profile's (640).",
        ge=256,
        le=960,
        multiple_of=32,
    )


ALIASES = {
    alias: name
    for name, info in VideoRequest.model_fields.items()
    for alias in (info.json_schema_extra or {}).get("aliases", [])
}


def parse_request(data: Any) -> VideoRequest:
    """Validate one job's input. Raises RequestError with one sentence that says what is wrong."""
    if not isinstance(data, dict):
        raise RequestError(f"The input must be a JSON object, not {_kind(data)}.")
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = ALIASES.get(key, _printable(key))
        if name in values:
            raise RequestError(f"`{name}` is given twice, the second time as `{_short(key)}`.")
        values[name] = value
    try:
        return VideoRequest.model_validate(values)
    except ValidationError as error:
        raise RequestError(_sentence(error)) from None


def _sentence(error: ValidationError) -> str:
    faults: dict[str, dict] = {}  # a union of types reports each member; the first is enough
    for fault in error.errors(include_url=False):
        faults.setdefault(str(fault["loc"][0]), fault)
    shown = [_fault(fault) for fault in [*faults.values()][:MAX_LISTED_ERRORS]]
    more = len(faults) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "") + "."


def _fault(fault: dict[str, Any]) -> str:
    name, kind = str(fault["loc"][0]), fault["type"]
    context = fault.get("ctx", {})
    got = f"(got {_show(fault['input'])})"
    if kind == "extra_forbidden":
        known = [*VideoRequest.model_fields, *ALIASES]
        near = difflib.get_close_matches(name, known, n=1)
        return f"`{_short(name)}` is not a known field" + (f" (did you mean `{near[0]}`?)" if near else "")
    match kind:
        case "missing":
            return f"`{name}` is required"
        case "greater_than_equal":
            return f"`{name}` must be at least {context['ge']:g} {got}"
        case "less_than_equal":
            return f"`{name}` must be at most {context['le']:.10g} {got}"
        case "multiple_of":
            return f"`{name}` must be a multiple of {context['multiple_of']:g} {got}"
        case "string_too_short":
            return f"`{name}` must not be empty"
        case "string_too_long":
            return (
                f"`{name}` must have at most {context['max_length']} characters (got {len(fault['input'])})"
            )
        case "finite_number":
            return f"`{name}` must be a finite number {got}"
        case "literal_error":
            return f"`{name}` must be {context['expected']} {got}"
        case "string_unicode":
            return f"`{name}` must be valid Unicode text"
    wanted = {"int": "a whole number", "float": "a number", "string": "a string", "bool": "true or false"}
    noun = wanted.get(kind.removesuffix("_type").removesuffix("_from_float").removesuffix("_parsing"))
    return f"`{name}` must be {noun} {got}" if noun else f"`{name}`: {fault['msg']} {got}"


def _show(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{'-' if value < 0 else ''}infinity"
    if isinstance(value, int | float):
        return f"{value:.10g}" if abs(value) < 1e20 else "a huge number"
    if isinstance(value, str):
        return f'the string "{_short(value)}"'
    return _kind(value)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _printable(text: Any) -> str:
    """`text` on one line, lone surrogates replaced: JSON may hold both, in names as in values."""
    return " ".join(str(text).encode("utf-8", "replace").decode("utf-8").split())


def _short(text: str) -> str:
    text = _printable(text)
    return text if len(text) <= 40 else f"{text[:37]}..."
