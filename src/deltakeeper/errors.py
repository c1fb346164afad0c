"""The errors a user can meet: each message is one sentence that says what is wrong, where, and what to do."""


class DeltakeeperError(Exception):
    """Any failure that the user can act on; the command line prints its message and exits with status 2."""


class CheckpointError(DeltakeeperError):
    """A model folder cannot be read as a checkpoint."""


class ArtifactError(DeltakeeperError):
    """A delta artifact is malformed, altered, of an unknown version, or cannot be written."""


class BaseMismatchError(ArtifactError):
    """A delta artifact was made from another base model."""


class ChangedError(ArtifactError):
    """A file of a delta artifact has other bytes than when the delta was loaded."""


class UnreadableError(ArtifactError):
    """The disk did not give a file of a delta artifact at this moment."""


class SideFileError(ArtifactError):
    """A tokenizer, chat template or generation config of a delta artifact cannot be used."""


class CodecError(DeltakeeperError):
    """A codec is unknown, or a setting of it is out of range."""


class LayoutError(ArtifactError):
    """A packed term does not have the tensors, shapes or values that its layout demands."""


class DataError(DeltakeeperError):
    """A prompt set, phrase list or other input file cannot be used."""


class AttestationError(DeltakeeperError):
    """A signed statement does not hold for an artifact, or a key or statement cannot be used."""


class RunError(DeltakeeperError):
    """A run folder cannot be continued or read."""


class KernelError(DeltakeeperError):
    """A product was asked for with tensors that do not fit, or a forced kernel is absent."""


class OverlayError(DeltakeeperError):
    """A delta does not fit the live model, or the overlay is used in a way that it does not allow."""


class LensError(DeltakeeperError):
    """The lens cannot read a model, or does not give the model's own logits where it has to."""


class EngineError(DeltakeeperError):
    """A request cannot be served, or the engine has stopped."""


class TenantError(EngineError):
    """A tenant is unknown, could not be loaded, or does not fit the byte budget."""


class OversizedError(TenantError):
    """A delta is larger than the budget of all tenants together, so that no waiting helps."""


class UnusableError(TenantError):
    """A tenant is not loaded again for a while, since its last load failed for what its files are or for its size."""


_MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""What is wrong with a folder, and not with the disk that it is on."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def is_of_disk(error: BaseException | None) -> bool:
    """Whether the system failed at a file that is there; what a library raises of this kind has no number."""
    return isinstance(error, OSError) and error.errno is not None and not isinstance(error, _MISSING)


def is_failure(error: BaseException) -> bool:
    """Whether something went wrong, rather than that somebody wants the work to stop.

    A library in Rust gives up on its input with a panic, which Python sees as a `PanicException`: no `Exception`.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def is_lasting(error: BaseException | None) -> bool:
    """Whether a delta failed for what it is or for its size: no waiting helps then, only other files or more memory.

    Everything else is to be tried again: what failed for time, memory or the disk, and files that changed, since what
    lies there now is another version that nobody has looked at yet.
    """
    lasting = isinstance(error, (ArtifactError, OverlayError, OversizedError, UnusableError))
    return lasting and not isinstance(error, (ChangedError, UnreadableError))
