"""What can go wrong, and the exit code it ends with.

ClientError
├── JobError              1  the job's own code
├── UsageError            2  usage
├── AuthorizationError    3  unauthorized
├── UnreachableError      4  unreachable
├── TimedOutError         5  timed_out
│   └── WaitOverError     5  wait_over
├── SaveError             6  not_saved
└── CancelledError      130  cancelled
"""


class ClientError(Exception):
    """Base of all; `str(error)` is the sentence for the person at the terminal."""

    exit_code: int
    code: str
    resumable = False  # whether the job, if there is one, goes on or has its result kept

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.job_id: str | None = None
        self.details: dict = {}

    def as_dict(self) -> dict:
        """For `--json`."""
        named = {"id": self.job_id, "error": str(self), "code": self.code, "exit_code": self.exit_code}
        return self.details | named


class JobError(ClientError):
    """The job failed, or somebody else cancelled it; `code` and `details` are the worker's."""

    exit_code = 1
    code = "job_failed"

    def __init__(self, sentence: str, code: str, details: dict) -> None:
        super().__init__(sentence)
        self.code = code
        self.details = details


class UsageError(ClientError):
    """The command line, a file named on it, or the request is at fault."""

    exit_code = 2
    code = "usage"


class AuthorizationError(ClientError):
    exit_code = 3
    code = "unauthorized"
    resumable = True


class UnreachableError(ClientError):
    """The endpoint does not answer, or is not known."""

    exit_code = 4
    code = "unreachable"
    resumable = True


class TimedOutError(ClientError):
    """RunPod ended the job at its execution time-out."""

    exit_code = 5
    code = "timed_out"


class WaitOverError(TimedOutError):
    """`--wait` is over; the job is not."""

    code = "wait_over"
    resumable = True


class SaveError(ClientError):
    """The job is done, but its video or latents could not be fetched or written."""

    exit_code = 6
    code = "not_saved"
    resumable = True


class CancelledError(ClientError):
    """Ctrl-C."""

    exit_code = 130
    code = "cancelled"

    def __init__(self, sentence: str, resumable: bool = False) -> None:
        super().__init__(sentence)
        self.resumable = resumable
