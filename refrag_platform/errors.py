"""The one family of errors that users see: each names the thing, the value and the fix."""


class RefragError(Exception):
    """Something a user can mend. The CLI prints the message without a traceback and exits with 2."""


class Paused(RefragError):
    """A signal, or the end of the time that a run was given, stopped it; what it saved is there to continue from."""


class RecipeError(RefragError):
    """A recipe has a wrong key or value."""


class ArtifactError(RefragError):
    """An artifact is missing, half-written, damaged or made by something else than what is asked for."""


class QueryTooLong(RefragError):
    """A query of more words than full-text search may be asked for."""


class CheckFailed(RefragError):
    """A blocking quality check failed on a freshly made artifact, which was therefore not published."""
