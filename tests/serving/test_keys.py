"""Who may use the service: several keys, revoked while it runs, each with its rate; without keys this machine alone."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from refrag_platform.errors import RefragError
from refrag_platform.serving.guard import RequireKey
from refrag_platform.serving.keys import Keys, add_key, digest_of, new_key, parse_keys, read_keys, revoke_key
from refrag_platform.serving.rate import RateLimit
from refrag_platform.serving.settings import ApiSettings
from tests.command import refrag, refused
from tests.serving.conftest import Server


def add(file: Path, name: str, *options: str) -> str:
    return refrag("keys", "add", name, "--file", file, *options).stdout.strip()


def status(url: str, key: str, path: str = "/v1/models") -> int:
    return httpx.get(url + path, headers={"Authorization": f"Bearer {key}"}).status_code


def test_keys_are_added_and_revoked_while_the_server_runs(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    ana = add(file, "ana")
    with server(ApiSettings(api_keys_file=file, api_key="old")) as url:
        assert [status(url, key) for key in (ana, "old", "wrong", ana[:-1], digest_of(ana.encode()))] == [200, 200] + [
            401
        ] * 3
        bo = add(file, "bo")
        assert [status(url, key) for key in (ana, bo)] == [200, 200]
        refrag("keys", "revoke", "ana", "--file", file)
        assert [status(url, key) for key in (ana, bo, "old")] == [401, 200, 200]
        # Whoever was to be shut out by a change must not stay in because it can't be read.
        file.write_text("bo not-a-digest\n")
        assert [status(url, key) for key in (bo, "old")] == [401, 200]
        file.unlink()
        assert [status(url, key) for key in (bo, "old")] == [401, 200]


def test_no_key_lies_in_its_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    key = add(file, "ana", "--per-minute", "60")
    assert file.read_text() == f"ana {digest_of(key.encode())} 60\n"
    assert file.stat().st_mode & 0o777 == 0o600
    add(file, "bo")
    assert file.stat().st_mode & 0o777 == 0o600
    assert refrag("keys", "ls", "--file", file).output == "ana  60 a minute\nbo\n"
    for wrong, says in (("ana", "has a key named ana"), ("a b", "can't name a key")):
        assert says in refused("keys", "add", wrong, "--file", file)
    assert "it has: ana, bo" in refused("keys", "revoke", "cy", "--file", file)


def test_changes_of_the_file_at_once_lose_none(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    names = [f"key{number}" for number in range(40)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: add_key(file, new_key(name)[1]), names))
        list(threads.map(lambda name: revoke_key(file, name), names[::2]))
    assert sorted(key.name for key in read_keys(file)) == sorted(names[1::2])


def test_a_changed_file_keeps_its_comments_mode_and_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    add(file, "ana")
    file.write_text(f"# of the office\n{file.read_text()}\n  # ana left in May\n")
    file.chmod(0o640)
    owner = (65534, 65534) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.chown(file, *owner)
    modes: list[int] = []
    replace = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda path, to: (modes.append(path.stat().st_mode & 0o777), replace(path, to))[1]
    )
    add(file, "bo")
    refrag("keys", "revoke", "ana", "--file", file)
    assert [line.split()[0] for line in file.read_text().splitlines() if line] == ["#", "#", "bo"]
    assert ((status := file.stat()).st_uid, status.st_gid) == owner
    # Under its name it has never had another mode.
    assert modes == [0o640, 0o640] and status.st_mode & 0o777 == 0o640


def test_keys_of_the_environment_are_hashes_too() -> None:
    (first, ana), (second, bo) = (new_key(name) for name in ("ana", "bo"))
    settings = ApiSettings.from_environment({"REFRAG_API_KEYS": f"{ana.line()}, {bo.line()}"})
    keys = Keys(settings.api_key, settings.api_keys)
    assert keys.needed and not Keys().needed
    assert [keys.find(key.encode()) for key in (first, second, "x")] == [ana, bo, None]


@pytest.mark.parametrize("line", ["ana", "ana 0123", "ana secret-key", f"a/b {'0' * 64}", f"ana {'0' * 64} x"])
def test_a_wrong_line_is_named_by_its_number_and_not_shown(line: str) -> None:
    with pytest.raises(RefragError, match=r"keys, line 2: not NAME SHA256") as error:
        parse_keys(["# a comment", line], "keys")
    assert "secret-key" not in str(error.value)


def test_a_name_stands_once() -> None:
    with pytest.raises(RefragError, match="line 2: a key is named ana already"):
        parse_keys([f"ana {'0' * 64}", f"ana {'1' * 64}"], "keys")


def test_a_server_without_the_file_of_its_keys_does_not_start(server: Server, tmp_path: Path) -> None:
    with pytest.raises(RefragError, match="can't be read"), server(ApiSettings(api_keys_file=tmp_path / "none")):
        pass


def test_each_key_has_its_rate(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    ana, bo = add(file, "ana"), add(file, "bo", "--per-minute", "4")
    with server(ApiSettings(api_keys_file=file, rate_limit=2)) as url:
        assert [status(url, ana) for _ in range(3)] == [200, 200, 429]
        assert [status(url, bo) for _ in range(5)] == [200] * 4 + [429]
        with pytest.raises(openai.RateLimitError, match="may ask 2 times a minute") as error:
            openai.OpenAI(base_url=f"{url}/v1", api_key=ana, max_retries=0).models.list()
        assert 1 <= int(error.value.response.headers["retry-after"]) <= 30
        # A wrong key takes nothing from anyone.
        assert status(url, "wrong") == 401


def test_keys_of_one_name_in_the_environment_and_in_the_file_are_two(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    there, (listed, ana) = add(file, "ana"), new_key("ana")
    with server(ApiSettings(api_keys_file=file, api_keys=ana.line(), rate_limit=1)) as url:
        assert [status(url, key) for key in (there, listed, there, listed)] == [200, 200, 429, 429]


def test_a_bucket_fills_as_time_goes_by() -> None:
    now = [0.0]
    rate = RateLimit(lambda: now[0])
    assert [rate.take("ana", 2) for _ in range(3)] == [0, 0, 30]
    now[0] = 29.0
    assert rate.take("ana", 2) == 1
    now[0] = 30.0
    assert [rate.take("ana", 2), rate.take("bo", 2)] == [0, 0]
    now[0] = 1000.0
    assert [rate.take("ana", 2) for _ in range(3)] == [0, 0, 30]


PORT = ("0.0.0.0", 3000)


def answered(
    client: tuple[str, int] | None,
    headers: list[tuple[bytes, bytes]],
    keys: Keys,
    server: tuple[str, int | None] | None = PORT,
) -> int:
    """The status of a request from some address: the tests' machine has but one."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    scope = {"type": "http", "path": "/v1/models", "headers": headers, "client": client, "server": server}
    asyncio.run(RequireKey(inside, keys)(scope, asyncio.Event().wait, send))
    return int(sent[0]["status"])


@pytest.mark.parametrize(
    ("host", "headers", "status"),
    [
        ("127.0.0.1", [], 200),
        ("127.8.8.8", [], 200),
        ("::1", [], 200),
        ("::ffff:127.0.0.1", [], 200),
        ("10.0.0.7", [], 401),
        ("::ffff:10.0.0.7", [], 401),
        ("fe80::1", [], 401),
        ("localhost", [], 401),
        # A proxy on this machine speaks for others.
        ("127.0.0.1", [(b"x-forwarded-for", b"127.0.0.1")], 401),
        ("127.0.0.1", [(b"forwarded", b"for=10.0.0.7")], 401),
        ("127.0.0.1", [(b"via", b"1.1 proxy")], 401),
        ("127.0.0.1", [(b"x-forwarded-host", b"refrag.example")], 401),
        ("127.0.0.1", [(b"x-forwarded-proto", b"https")], 401),
        # A page of a stranger's host, whose name leads here.
        ("127.0.0.1", [(b"host", b"evil.example:3000")], 401),
        ("127.0.0.1", [(b"host", b"localhost.evil.example")], 401),
        ("127.0.0.1", [(b"host", b"127.0.0.1.evil.example")], 401),
        ("127.0.0.1", [(b"host", b"")], 401),
        ("127.0.0.1", [(b"host", b"LOCALHOST:3000")], 200),
        ("127.0.0.1", [(b"host", b"127.0.0.1:3000")], 200),
        ("::1", [(b"host", b"[::1]:3000")], 200),
        # A page of a stranger's that asks this machine by its own name.
        ("127.0.0.1", [(b"host", b"localhost:3000"), (b"origin", b"https://evil.example")], 401),
        ("127.0.0.1", [(b"host", b"localhost:3000"), (b"origin", b"null")], 401),
        ("127.0.0.1", [(b"host", b"localhost:3000"), (b"origin", b"http://[")], 401),
        ("127.0.0.1", [(b"host", b"localhost:3000"), (b"origin", b"http://localhost:3000")], 200),
    ],
)
def test_without_keys_this_machine_alone_is_answered(
    host: str, headers: list[tuple[bytes, bytes]], status: int
) -> None:
    assert answered((host, 5000), headers, Keys()) == status
    bearer = (b"authorization", b"Bearer secret")
    assert answered((host, 5000), [*headers, bearer], Keys("secret")) == 200


@pytest.mark.parametrize(
    ("server", "status"), [(("/run/refrag.sock", None), 200), (("0.0.0.0", 3000), 401), (None, 401)]
)
def test_only_a_unix_socket_needs_no_address(server: tuple[str, int | None] | None, status: int) -> None:
    """Of a client that has hung up by then the server knows no address."""
    assert answered(None, [], Keys(), server) == status


def test_a_response_is_cancelled_by_its_own_key_alone(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    ana, bo = (openai.OpenAI(base_url="", api_key=add(file, name), max_retries=0) for name in ("ana", "bo"))
    with server(ApiSettings(api_keys_file=file)) as url:
        ana.base_url = bo.base_url = f"{url}/v1"  # type: ignore[assignment]
        asked: dict[str, Any] = {
            "model": "tiny",
            "input": "x",
            "max_output_tokens": 1500,
            "extra_body": {"retrieve": 0},
        }
        stream = ana.responses.create(**asked, stream=True)
        name = next(stream).response.id
        with pytest.raises(openai.NotFoundError):
            bo.responses.cancel(name)
        assert ana.responses.cancel(name).status == "cancelled"
        assert list(stream)[-1].response.status == "cancelled"


@pytest.mark.parametrize(("text", "seconds"), [("", 0.0), ("0", 0.0), ("0.0", 0.0), ("2.5", 2.5)])
def test_seconds_of_being_unready_may_be_none(text: str, seconds: float) -> None:
    assert ApiSettings.from_environment({"REFRAG_UNREADY": text}).unready == seconds


@pytest.mark.parametrize(
    ("name", "text"), [("REFRAG_UNREADY", "-1"), ("REFRAG_UNREADY", "nan"), ("REFRAG_DEADLINE", "0")]
)
def test_a_number_out_of_range_is_refused_by_its_name(name: str, text: str) -> None:
    with pytest.raises(RefragError, match=f"{name} is '{text}'; it must be a number above 0"):
        ApiSettings.from_environment({name: text})
