"""`refrag` in this process: what a command says, and how it refuses."""

from typer.testing import CliRunner, Result

from refrag_platform.cli import app


def refrag(*arguments: object, status: int = 0) -> Result:
    """Run a command that ends with `status`; a path may stand among its arguments."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result


def refused(*arguments: object) -> str:
    """What a command says on stderr that is refused as mendable, on one line."""
    return " ".join(refrag(*arguments, status=2).stderr.split())
