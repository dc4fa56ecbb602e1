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
from core.extension import check_extension
from core.file_format import check_file
from core.frame import NOTHING_TO_START_WITH, check_frame
from core.one_frame import with_its_format
from core.timeline import MAX_ENTRIES, MAX_SECONDS, read_timeline

MAX_SEED = 2**32 - 1
MAX_PROMPT = 4000
MAX_LISTED_ERRORS = 3
MAX_FIELDS = 10_000  # 20 MB of JSON hold two million; refused one by one they would take 2 GB
MIN_SHIFT = 0.1  # below it all steps but the first are at nearly no noise
MAX_INDEX = 100  # musubi-tuner's users found pictures sound up to about 40
MAX_SHOWN = 40  # characters of what the caller wrote


def _whole_number(value: Any) -> Any:
    """25.0 is how some clients write 25; true and "25" are mistakes."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


Whole = Annotated[int, BeforeValidator(_whole_number)]


def _field(default: Any, description: str, *, aliases: tuple[str, ...] = (), **bounds: Any) -> Any:
    extra = {"aliases": list(aliases)} if aliases else None
    return Field(default, description=description, json_schema_extra=extra, **bounds)


STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class S3Config(BaseModel):
    """The caller's own bucket, under RunPod's names."""

    model_config = STRICT

    accessId: str = Field(description="Access key id.", min_length=1, max_length=256, repr=False)
    accessSecret: str = Field(description="Secret access key.", min_length=1, max_length=256, repr=False)
    bucketName: str = Field(description="Name of the bucket.", pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]{1,254}$")
    endpointUrl: str = Field(
        description="https address of the S3-compatible service, on the public internet.",
        pattern=r"^https://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]+)?/?$",  # as botocore takes it
        max_length=512,
    )
    region: str | None = Field(
        None, description="Region, where the service wants one.", pattern=r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$"
    )
    sessionToken: str | None = Field(
        None, description="For temporary credentials.", max_length=4096, repr=False
    )
    prefix: str = Field("", description="Put before the video's key.", max_length=512)


class LoraChoice(BaseModel):
    """One LoRA: a file that the worker has, or a URL."""

    model_config = STRICT

    name: str | None = Field(
        None,
        description="File in the worker's folder of LoRAs; a plain name.",
        pattern=r"^\w[\w .()+,&@=~'!-]*\.safetensors$",
        max_length=255,
    )
    url: str | None = Field(
        None,
        description="https URL of a .safetensors file, from the hosts that the worker allows.",
        pattern=r"^https://",
        max_length=4096,
        repr=False,
    )
    weight: float = Field(1.0, description="Strength; below 0 for the opposite.", ge=-4, le=4)


class TimedSection(BaseModel):
    """A prompt, a keyframe image, or both, for a part of the video."""

    model_config = STRICT

    start_s: float = Field(description="Second at which it begins.", ge=0, le=MAX_SECONDS)
    end_s: float | None = Field(
        None,
        description="Second at which it ends; null: when the next one begins, or at the end.",
        ge=0,
        le=MAX_SECONDS,
    )
    prompt: str | None = Field(
        None,
        description="What happens there, in place of the request's prompt.",
        min_length=1,
        max_length=MAX_PROMPT,
    )
    image: str | None = Field(
        None,
        description="What those sections see in place of the input image, given like that.",
        min_length=1,
        repr=False,
    )


class OneFrame(BaseModel):
    """A single picture, at a position of the model's time axis: in latent frames, a section having W."""

    model_config = STRICT

    target_index: Whole | None = Field(
        None,
        description="Position of the picture; null is latent_window_size. A higher one may change more.",
        ge=0,
        le=MAX_INDEX,
    )
    control_index: Whole = Field(0, description="Position of the input image.", ge=0, le=MAX_INDEX)
    end_index: Whole | None = Field(
        None,
        description="Position of `end_image`, a second image to go by; null is latent_window_size + 1.",
        ge=0,
        le=MAX_INDEX,
    )
    no_post: bool = Field(False, description="Without the empty frame at latent_window_size + 1.")
    no_2x: bool = Field(False, description="Without the empty history at half resolution.")
    no_4x: bool = Field(False, description="Without the empty history at a quarter of the resolution.")


class VideoRequest(BaseModel):
    """One job: a prompt and an image, or what stands in for it, in; a video out."""

    model_config = STRICT

    input_image: str | None = _field(
        None,
        "The first frame: base64, a data URI or an https URL of a PNG, JPEG or WebP of at most 20 MB and 50 "
        "megapixels. Required unless there is `start`, `input_video` or `resume_latents`.",
        aliases=("image", "image_b64", "image_base64", "input_image_b64", "image_url"),
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
    mp4_crf: Whole = _field(
        16, "The codec's CRF: lower is better and larger; 0 is lossless in H.264.", ge=0, le=51
    )
    output: Literal["auto", "base64", "url"] = _field(
        "auto", "How the video is returned; auto inlines what fits and uploads the rest."
    )
    s3_config: S3Config | None = _field(
        None, "Bucket for this job's video, in place of the worker's.", aliases=("s3Config",), repr=False
    )
    timeout_s: float | None = _field(
        None, "Seconds the job may take from its start; null is the worker's own limit.", ge=1, le=86_400
    )
    partial: bool = _field(
        False, "When the time is up, return the sections that are finished instead of an error."
    )
    preview: bool = _field(False, "Put a small JPEG of the section being sampled into the progress.")
    model: Literal["i2v", "f1"] | None = _field(None, "FramePack model; null is the worker's own.")
    resolution: Whole | None = _field(
        None,
        "Side of the square whose area the frame has, a multiple of 32; null is the profile's (640).",
        ge=256,
        le=960,
        multiple_of=32,
    )

    sampler: Literal["unipc_bh1", "unipc_bh2", "euler"] = _field(
        "unipc_bh1", "How the steps are taken: UniPC with B(h) = h (the official one) or e^h − 1, or Euler."
    )
    shift: float = _field(
        0.0,
        "Shift of the noise schedule, 0.1 to 20: higher spends more of the steps on strong noise; 0 takes it "
        "from the sequence length (7 at the official sizes).",
        ge=0,
        le=20,
    )
    cache: Literal["none", "teacache", "magcache", "firstblock"] | None = _field(
        None, "What skips steps; null is teacache where use_teacache is true, else none."
    )
    cache_threshold: float | None = _field(
        None,
        "Estimated error up to which a step is skipped: higher is faster and further off, 0 skips none; "
        "null is the cache's own (teacache 0.15, magcache 0.1, firstblock 0.06).",
        ge=0,
        le=1,
    )
    cache_order: Whole = _field(
        0,
        "How a skipped step's residual is estimated: 0 takes the last one, 1 and 2 extrapolate the last "
        "two or three (TaylorSeer).",
        ge=0,
        le=2,
    )
    sections: list[TimedSection] = _field(
        [],
        "Prompts and keyframe images by time, none of which overlap; 8 images at most.",
        max_length=MAX_ENTRIES,
    )
    blend_sections: Whole = _field(
        0, "Sections around a change of prompt over which one prompt becomes the other.", ge=0, le=10
    )

    format: Literal["mp4", "webm", "gif", "png_sequence", "png"] = _field(
        "mp4", "Kind of file; png_sequence is a zip of PNGs, png goes with `one_frame` and follows from it."
    )
    codec: Literal["h264", "h265", "vp9", "av1"] | None = _field(
        None, "h264, h265 or av1 in an mp4, vp9 or av1 in a webm; null is the first of them."
    )
    fps: Whole = _field(
        30,
        "Frames per second that the file is played at. The model makes 30 per second of motion whatever it "
        "is: another value changes pace and duration.",
        ge=1,
        le=120,
    )
    poster: bool = _field(False, "Return the first frame as a JPEG, too.")
    embed_parameters: bool = _field(
        True, "Write the request, without its image, into the file (`python -m core.reproduce` reads it)."
    )
    exact_length: bool = _field(
        False, "Cut the end off at round(30 · total_second_length) frames, instead of whole sections."
    )
    num_outputs: Whole = _field(1, "Videos to make, with the seeds seed, seed + 1 and so on.", ge=1, le=4)

    return_latents: bool = _field(
        False, "Return the latents so far as a safetensors file, which another job can go on from."
    )
    resume_latents: str | None = _field(
        None,
        "Go on from such a file: its handle on the volume, an https URL, or base64. The fields that the "
        "latents depend on must be as they were.",
        min_length=1,
        repr=False,
    )

    end_image: str | None = _field(
        None, "What the video leads up to, given as `input_image` is; only for i2v.", min_length=1, repr=False
    )
    end_image_strength: float = _field(
        1.0, "The end image's latent is multiplied by this; 0 is as without.", ge=0, le=1
    )
    end_image_mode: Literal["history", "embedding"] = _field(
        "history",
        "history: the end image stays behind the video for all sections; embedding: it is there for the "
        "first one sampled, and its image embedding is averaged with the first frame's.",
    )
    start: str | None = _field(
        None,
        "A first frame in place of `input_image`: black, white, noise from the seed, or a colour as #rrggbb.",
        pattern=r"^(black|white|noise|#[0-9A-Fa-f]{6})$",
    )
    width: Whole | None = _field(
        None, "Of the frame, in pixels, with `height`: a multiple of 16.", ge=64, le=2048, multiple_of=16
    )
    height: Whole | None = _field(
        None, "Of the frame, in pixels, with `width`: a multiple of 16.", ge=64, le=2048, multiple_of=16
    )
    aspect_ratio: str | None = _field(
        None,
        "Of the frame, as 16:9, between 1:4 and 4:1; auto and null: nearest to the image, else square.",
        pattern=r"^(auto|[1-9][0-9]{0,3}:[1-9][0-9]{0,3})$",
    )

    input_video: str | None = _field(
        None,
        "A video to go on from, in place of `input_image`: base64, a data URI or an https URL of an MP4, "
        "MOV, WebM, MKV or GIF of at most 100 MB, 60 seconds and 9.4 megapixels a frame. f1 makes what "
        "follows it, i2v what comes before it.",
        min_length=1,
        repr=False,
    )
    include_source: bool = _field(
        True, "Return the given video and the new part as one; false returns the new part alone."
    )

    loras: list[LoraChoice] = _field(
        [], "LoRAs added to the transformer's weights for this job, all at once.", max_length=8, repr=False
    )

    one_frame: OneFrame | None = _field(
        None, "Make a single picture in place of a video, and return it as a PNG; {} for all defaults."
    )

    @property
    def cache_kind(self) -> str:
        """`cache`, or what `use_teacache` says in its place."""
        return self.cache or ("teacache" if self.use_teacache else "none")


SECRETS = ("input_image", "input_video", "end_image", "s3_config", "resume_latents")  # never shown or echoed
BEGINNINGS = ("input_image", "start", "input_video", "resume_latents")
NESTED: dict[str, type[BaseModel]] = {
    "s3_config": S3Config,
    "loras": LoraChoice,
    "sections": TimedSection,
    "one_frame": OneFrame,
}
LISTS = ("loras", "sections")

FORMS = {
    "start": "black, white, noise or a colour such as #1a2b3c",
    "aspect_ratio": "auto or two whole numbers such as 16:9",
}

ALIASES = {
    alias: name
    for name, info in VideoRequest.model_fields.items()
    for alias in (info.json_schema_extra or {}).get("aliases", [])
}


def echo_of(request: VideoRequest) -> dict:
    """All of the request that may be shown to whoever gets the reply."""
    return request.model_dump(exclude={**dict.fromkeys(SECRETS, True), "sections": {"__all__": {"image"}}})


def input_of(job: dict) -> Any:
    """A job's `input`, with the bucket that RunPod passes on beside it (`s3Config`) inside."""
    data = job.get("input")
    if job.get("s3Config") is not None and isinstance(data, dict) and "s3_config" not in data:
        return {"s3Config": job["s3Config"]} | data
    return data


def parse_request(data: Any) -> VideoRequest:
    """Validate one job's input. Raises RequestError with one sentence that says what is wrong."""
    if not isinstance(data, dict):
        raise RequestError(f"The input must be a JSON object, not {_kind(data)}.")
    _check_size("The input", data)
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = ALIASES.get(key, _unicode(key))
        if name in values:
            raise RequestError(f"`{_short(name)}` is given twice, the second time as `{_short(key)}`.")
        _check_size(f"`{_short(name)}`", value)
        values[name] = value
    faults = _absent(values)
    try:
        request = VideoRequest.model_validate(values)
    except ValidationError as error:
        faults += error.errors(include_url=False)
    if faults:
        raise RequestError(_sentence(faults))
    check_extension(request)
    check_frame(request)
    check_loras(request)
    _check_shift(request)
    _check_resumed(request)
    request = with_its_format(request, read_timeline(request.prompt, request.sections))
    check_file(request.format, request.codec, request.fps)
    return _with_one_cache(request)


def check_loras(request: VideoRequest) -> None:
    """Each LoRA is named once: by its file or by its URL."""
    for number, lora in enumerate(request.loras):
        if (lora.name is None) == (lora.url is None):
            raise RequestError(f"`loras.{number}` must have a `name` or a `url`, and not both.")


def _check_shift(request: VideoRequest) -> None:
    if 0 < request.shift < MIN_SHIFT:
        raise RequestError(
            f"`shift` must be 0 (automatic) or at least {MIN_SHIFT:g} (got {_show(request.shift)})."
        )


def _check_resumed(request: VideoRequest) -> None:
    if request.resume_latents and request.num_outputs > 1:
        raise RequestError(
            f"`num_outputs` must be 1 with `resume_latents` (got {request.num_outputs}): they have one seed."
        )


def _with_one_cache(request: VideoRequest) -> VideoRequest:
    """With `use_teacache` as `cache` has it. Raises RequestError where both were given and differ."""
    if request.cache is None or request.use_teacache == (request.cache == "teacache"):
        return request
    if "use_teacache" in request.model_fields_set:
        raise RequestError(
            f"`use_teacache` {_show(request.use_teacache)} and `cache` {request.cache} contradict each "
            "other; give one of them."
        )
    return request.model_copy(update={"use_teacache": not request.use_teacache})


def _absent(values: dict[str, Any]) -> list[dict]:
    """The fault of having nothing to begin with, in pydantic's form."""
    if any(values.get(name) is not None for name in BEGINNINGS):
        return []
    return [{"type": NOTHING_TO_START_WITH, "loc": ("input_image",), "input": None}]


def _check_size(what: str, value: Any) -> None:
    parts = value if isinstance(value, list) else [value]
    fields = sum(len(part) for part in parts if isinstance(part, dict))
    if fields > MAX_FIELDS:
        raise RequestError(f"{what} has too many fields ({fields}).")


def _sentence(found: list[dict]) -> str:
    faults: dict[str, dict] = {}  # a union of types reports each member; the first is enough
    for fault in found:
        faults.setdefault(_path(fault), fault)
    shown = [_fault(fault) for fault in [*faults.values()][:MAX_LISTED_ERRORS]]
    more = len(faults) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "") + "."


def _fault(fault: dict[str, Any]) -> str:
    name, kind = _path(fault), fault["type"]
    context = fault.get("ctx", {})
    field, _, part = name.partition(".")
    part = part.lstrip("0123456789.") if field in LISTS else part
    secret = field in SECRETS or (field == "sections" and part == "image")
    got = f"(got {_kind(fault['input']) if secret else _show(fault['input'])})"
    if kind == "extra_forbidden":
        nested = part and field in NESTED  # a stranger's name may have dots of its own
        known = NESTED[field].model_fields if nested else [*VideoRequest.model_fields, *ALIASES]
        near = difflib.get_close_matches(part or field, known, n=1)
        return f"`{_short(name)}` is not a known field" + (f" (did you mean `{near[0]}`?)" if near else "")
    match kind:
        case _ if kind == NOTHING_TO_START_WITH:
            return kind
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
        case "too_long":
            return f"`{name}` must have at most {context['max_length']} entries (got {len(fault['input'])})"
        case "list_type":
            return f"`{name}` must be a list {got}"
        case "finite_number":
            return f"`{name}` must be a finite number {got}"
        case "literal_error":
            return f"`{name}` must be {context['expected']} {got}"
        case "string_unicode":
            return f"`{name}` must be valid Unicode text"
        case "string_pattern_mismatch" if field in FORMS:
            return f"`{name}` must be {FORMS[field]} {got}"
        case "string_pattern_mismatch" if field == "loras":
            return f"`{name}` must " + (
                "start with https://" if part == "url" else "be a plain file name that ends in .safetensors"
            )
        case "string_pattern_mismatch" if part == "endpointUrl":
            return f"`{name}` must be of the form https://host"
        case "string_pattern_mismatch":
            return f"`{name}` is not the name of a {'region' if part == 'region' else 'bucket'}"
        case "model_type":
            return f"`{name}` must be an object {got}"
    wanted = {"int": "a whole number", "float": "a number", "string": "a string", "bool": "true or false"}
    noun = wanted.get(kind.removesuffix("_type").removesuffix("_from_float").removesuffix("_parsing"))
    return f"`{name}` must be {noun} {got}" if noun else f"`{name}`: {fault['msg']} {got}"


def _path(fault: dict[str, Any]) -> str:
    """`field`, `one_frame.part` or `loras.0.part`; what pydantic adds for a union's members is left out."""
    field, *parts = map(str, fault["loc"])
    depth = 2 if field in LISTS else 1 if field in NESTED else 0
    return ".".join([field, *parts[:depth]])


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


def _unicode(name: str) -> str:
    """Without lone surrogates, which JSON may hold and pydantic has no field for."""
    return name.encode("utf-8", "replace").decode("utf-8")


def _short(text: str) -> str:
    """What can be shown of `text` on one line: no control characters, no change of direction."""
    shown = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text[:MAX_SHOWN])
    return shown if len(text) <= MAX_SHOWN else f"{shown[:-3]}..."
