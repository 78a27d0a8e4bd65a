"""`python -m refrag_platform` is `refrag`."""

from refrag_platform.cli import app

if __name__ == "__main__":
    app()
