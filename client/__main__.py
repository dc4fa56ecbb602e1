"""`python -m client IMAGE "PROMPT" -o out.mp4`: submit, follow, save. `--help` tells flags and exit codes."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from client.api import Endpoint, Job, LocalServer
from client.display import Display
from client.errors import CancelledError, ClientError, JobError, SaveError, TimedOutError
from client.files import named_after
from client.interrupt import HeldInterrupt
from client.options import check_options, default_output, parse_options
from client.request import build_request
from client.saving import (
    Download,
    check_destination,
    places,
    save_jpeg,
    save_latents,
    save_video,
    videos_of,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    options = parse_options(arguments)
    display = Display(options.quiet)
    try:
        check_options(options)
        with display:
            document, code = run(options, display), 0
    except (ClientError, KeyboardInterrupt) as caught:
        error = caught if isinstance(caught, ClientError) else CancelledError("Interrupted.")
        display.failed(error)
        document, code = error.as_dict(), error.exit_code
    if options.json:
        sys.stdout.write(json.dumps(document) + "\n")
    elif options.detach and not code:
        sys.stdout.write(document["id"] + "\n")
    return code


def run(options: argparse.Namespace, display: Display) -> dict:
    """A job from the command line to its saved video; the reply without the video. Raises ClientError."""
    path = options.output or default_output(options)
    if not options.detach:
        for file in filter(None, (path, options.latents_file)):
            for place in places(file, options.num_outputs or 1):
                check_destination(place, options.force)
    if options.preview_file is not None:
        check_destination(options.preview_file, options.force)
    if options.local is not None:
        return deliver(run_locally(options, display), path, options, display)

    endpoint = Endpoint(
        options.api_url, options.endpoint, options.api_key, options.poll_interval, display.note
    )
    job_id = options.resume
    try:
        if job_id is None:
            request = build_request(options)
            with HeldInterrupt(display.note) as held:
                job_id = endpoint.submit(request, held.sleep)
        if options.detach:
            return {"id": job_id, "status": "IN_QUEUE"}
        display.note(f"Job {job_id}")
        job = follow(endpoint, job_id, options, display)
        return deliver(job, path, options, display)
    except KeyboardInterrupt as interrupt:
        if job_id is None:
            raise CancelledError(str(interrupt) or "Interrupted before there was a job.") from None
        raise cancelled(endpoint, job_id, display) from None
    except ClientError as error:
        error.job_id = job_id
        raise


def run_locally(options: argparse.Namespace, display: Display) -> Job:
    request = build_request(options)
    display.stage("running on the local server, which tells no progress")
    try:
        job = LocalServer(options.local).run(request, options.wait)
    except KeyboardInterrupt:
        raise CancelledError("Interrupted; the local server cannot cancel and finishes the job.") from None
    display.job(job)
    return job


def follow(endpoint: Endpoint, job_id: str, options: argparse.Namespace, display: Display) -> Job:
    """The job's final state; on the way there its progress and previews are shown. Raises ClientError."""
    for job in endpoint.follow(job_id, options.wait):
        display.job(job)
        preview = job.output.get("preview") if isinstance(job.output, dict) else None
        if options.preview_file is not None and isinstance(preview, str):
            try:
                save_jpeg(preview, options.preview_file, "The preview", overwrite=True)
            except SaveError as error:  # no reason to leave the job
                display.note(str(error))
    return job


def deliver(job: Job, path: Path, options: argparse.Namespace, display: Display) -> dict:
    """Save a finished job's video. Raises JobError, TimedOutError, SaveError or CancelledError."""
    try:
        check_completed(job)
    except JobError:
        try:
            deliver_latents(job, options, display)
        except SaveError as error:  # the job's own is the one to end with
            display.note(str(error))
        raise
    content_type = job.output.get("content_type") if isinstance(job.output, dict) else None
    if options.output is None:
        path = named_after(path, content_type)
    videos = videos_of(job.output, path)
    download = downloading("video", options, display)
    try:
        for reply, place in videos:
            save_video(reply, content_type, place, options.force, download)
            if isinstance(poster := reply.get("poster_base64"), str):
                beside = place.with_name(f"{place.stem}-poster.jpg")
                save_jpeg(poster, beside, "The poster", options.force)
        latents = deliver_latents(job, options, display)
    except KeyboardInterrupt:
        raise CancelledError("Interrupted; the job is done.", resumable=True) from None
    display.saved(videos, job)
    saved = [str(place) for _, place in videos]
    several = isinstance(job.output.get("outputs"), list)
    told = {"output": without_files(job.output), "saved": saved if several else saved[0]}
    if latents:
        told["saved_latents"] = latents if several else latents[0]
    return job.reply | told


def deliver_latents(job: Job, options: argparse.Namespace, display: Display) -> list[str]:
    """Save what a job, finished or not, returned for --latents. Raises SaveError."""
    saved = []
    if options.latents_file is None:
        return saved
    download = downloading("latents", options, display)
    for reply, place in videos_of(job.output, options.latents_file):
        if save_latents(reply, place, options.force, download):
            saved.append(str(place))
            display.note(f"Saved the latents {place}: {place.stat().st_size / 1e6:.2f} MB.")
        elif isinstance(handle := reply.get("latents_handle"), str):
            display.note(f"The latents are on the worker's volume: --resume-latents {handle}")
        else:
            display.note("The reply holds no latents.")
    return saved


def downloading(what: str, options: argparse.Namespace, display: Display) -> Download:
    return Download(
        what, options.poll_interval, display.note, display.received, allow_http=options.local is not None
    )


def without_files(output: dict) -> dict:
    """A reply without what would fill a screen."""
    told = {
        name: value for name, value in output.items() if name != "preview" and not name.endswith("_base64")
    }
    if isinstance(told.get("outputs"), list):
        told["outputs"] = [without_files(entry) for entry in told["outputs"] if isinstance(entry, dict)]
    return told


def check_completed(job: Job) -> None:
    """Raises JobError or TimedOutError with what the worker or RunPod says."""
    output = job.output if isinstance(job.output, dict) else {}
    if job.status == "COMPLETED" and "error" not in output:
        return
    if job.status == "TIMED_OUT":
        raise TimedOutError(
            "RunPod ended the job: it ran over its execution time-out, which --execution-timeout raises, "
            "or waited too long for a worker."
        )
    error = (
        job.reply.get("error") or output.get("error") or f"RunPod shows it as {job.status} and says no more."
    )
    code = output.get("code")
    raise JobError(
        error if isinstance(error, str) else json.dumps(error),
        code if isinstance(code, str) else job.status.lower(),
        without_files(output),
    )


def cancelled(endpoint: Endpoint, job_id: str, display: Display) -> CancelledError:
    """Cancel the remote job, and what became of it; a second Ctrl-C leaves that open."""
    display.note("Cancelling the job; Ctrl-C again quits at once.")
    try:
        job = endpoint.cancel(job_id)
    except (ClientError, KeyboardInterrupt):
        job = None
    if job is None:
        error = CancelledError("Whether the job is cancelled is not known: it may still run.", resumable=True)
    elif job.status == "CANCELLED":
        error = CancelledError("The job is cancelled.")
    else:
        error = CancelledError(f"The job had already ended ({job.status}).", resumable=True)
    error.job_id = job_id
    return error


if __name__ == "__main__":
    sys.exit(main())
