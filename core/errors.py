"""What can go wrong, as the caller sees it.

WorkerError                        internal_error
├── RequestError                   invalid_request
│   ├── ImageError                 invalid_image
│   │   └── ImageTooLargeError     image_too_large
│   ├── VideoError                 invalid_video
│   │   └── VideoTooLargeError     video_too_large
│   ├── LatentsError               invalid_latents
│   │   ├── LatentsMismatchError   latents_mismatch
│   │   └── LatentsNotFoundError   latents_not_found
│   ├── TooLargeForMemoryError     too_large_for_memory
│   ├── LoraError                  invalid_lora
│   │   └── LoraNotApplicableError lora_not_applicable
│   ├── UrlRefusedError            url_refused
│   └── DownloadError              download_failed
│       └── DownloadTooLargeError  download_too_large
├── SettingsError                  invalid_settings
├── FitnessError                   unfit_worker
├── ModelError                     model_unavailable
├── OutOfMemoryError               out_of_memory       (asks for a fresh worker)
├── GpuError                       gpu_failed          (asks for a fresh worker)
├── VideoEncodingError             video_encoding_failed
├── ResultTooLargeError            result_too_large
├── UploadError                    upload_failed
├── TimeLimitError                 timed_out
└── CancelledError                 cancelled

Each carries one sentence for the caller; `code` is stable and may be relied on.
"""


class WorkerError(Exception):
    """Base of all; `str(error)` is the sentence for the caller."""

    code = "internal_error"
    refresh_worker = False

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.details: dict = {}

    def with_details(self, **details: str) -> "WorkerError":
        """More for the reply than the sentence, such as where the video was kept."""
        self.details |= details
        return self


class RequestError(WorkerError):
    """The caller's input is at fault."""

    code = "invalid_request"


class ImageError(RequestError):
    code = "invalid_image"


class ImageTooLargeError(ImageError):
    code = "image_too_large"


class VideoError(RequestError):
    """`input_video` is not a video that can be decoded, or too short to go on from."""

    code = "invalid_video"


class VideoTooLargeError(VideoError):
    """Too many bytes, pixels or seconds, or too slow to decode."""

    code = "video_too_large"


class LatentsError(RequestError):
    """`resume_latents` is not what a worker of this version wrote."""

    code = "invalid_latents"


class LatentsMismatchError(LatentsError):
    """The latents are sound, but of another job than the one asked for."""

    code = "latents_mismatch"


class LatentsNotFoundError(LatentsError):
    code = "latents_not_found"


class TooLargeForMemoryError(RequestError):
    """A frame, section or length that this worker's memory cannot hold in any mode."""

    code = "too_large_for_memory"


class LoraError(RequestError):
    """A LoRA that is not there, or that cannot be read or fitted to the model."""

    code = "invalid_lora"


class LoraNotApplicableError(LoraError):
    """No layer of it is one of the model's."""

    code = "lora_not_applicable"


class UrlRefusedError(RequestError):
    """A URL that the worker will not connect to, whatever is there."""

    code = "url_refused"


class DownloadError(RequestError):
    """A URL that does not give its file."""

    code = "download_failed"


class DownloadTooLargeError(DownloadError):
    code = "download_too_large"


class SettingsError(WorkerError):
    """The worker's environment is at fault."""

    code = "invalid_settings"


class FitnessError(WorkerError):
    """The machine is at fault: its GPU, ffmpeg or disk."""

    code = "unfit_worker"


class ModelError(WorkerError):
    """A model's files are missing or broken."""

    code = "model_unavailable"


class OutOfMemoryError(WorkerError):
    code = "out_of_memory"
    refresh_worker = True


class GpuError(WorkerError):
    """A CUDA error that no later call on this process's GPU context would survive."""

    code = "gpu_failed"
    refresh_worker = True


class VideoEncodingError(WorkerError):
    code = "video_encoding_failed"


class ResultTooLargeError(WorkerError):
    """The video fits no reply, and there is nowhere else to put it."""

    code = "result_too_large"


class UploadError(WorkerError):
    """The object storage is missing, refuses or does not answer."""

    code = "upload_failed"


class TimeLimitError(WorkerError):
    """The job used up its `timeout_s`, or the worker's JOB_TIMEOUT_S."""

    code = "timed_out"


class CancelledError(WorkerError):
    code = "cancelled"


def error_reply(error: WorkerError) -> dict:
    """The reply of a failed job. `error` is a string: RunPod shows a dict there as COMPLETED."""
    reply = {"error": str(error), "code": error.code} | error.details
    if error.refresh_worker:
        reply["refresh_worker"] = True
    return reply
