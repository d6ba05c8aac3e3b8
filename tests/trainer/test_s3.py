"""Promises of the storage in S3, kept against a real server and one that fails as it is told."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from dtp_trainer import s3 as s3_module
from dtp_trainer.s3 import S3Storage
from dtp_trainer.storage import NotFound, Storage, StorageError, Unreadable, open_storage


def behind(proxy: Any, s3: S3Storage) -> S3Storage:
    """The same storage, reached through the one that fails."""
    return S3Storage(s3._bucket, s3._prefix, endpoint=proxy.url)


def of_key(key: str, fault: int, *, times: int = 10**9, method: str = "GET") -> Any:
    """A fault of the first so many requests for a key."""
    left = [times]

    def decide(asked: str, path: str) -> int | None:
        if asked != method or key not in path or left[0] == 0:
            return None
        left[0] -= 1
        return fault

    return decide


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 takes no smaller ones."""
    monkeypatch.setattr(s3_module, "_PART_BYTES", 5 << 20)
    monkeypatch.setattr(s3_module, "_RANGE_BYTES", 1 << 20)


def test_a_uri_names_bucket_and_prefix(s3: S3Storage) -> None:
    """`s3://bucket/prefix` opens what its own `uri` says."""
    s3.write("job/gang.json", b"{}")
    again = open_storage(f"{s3.uri}/job/")
    assert again.uri == f"{s3.uri}/job"
    assert again.read("gang.json") == b"{}"


def test_large_objects_go_in_parts_and_come_in_ranges(s3: S3Storage, small_parts: None) -> None:
    """An object larger than a part is uploaded in several, with checksums, and read in ranges."""
    data = os.urandom(12 << 20) + b"rest"
    with s3.create("big") as file:
        for start in range(0, len(data), 1 << 20):
            file.write(data[start : start + (1 << 20)])
    found = s3._client.head_object(**s3._names("big"), ChecksumMode="ENABLED")
    assert found["ETag"].strip('"').endswith("-3")
    assert "ChecksumCRC32" in found
    with s3.open("big") as opened:
        assert opened.read(7) == data[:7]
        buffer = bytearray(3 << 20)
        assert opened.readinto(buffer) == len(buffer)  # type: ignore[attr-defined]
        assert bytes(buffer) == data[7 : 7 + len(buffer)]
        assert opened.read() == data[7 + len(buffer) :]


def test_an_upload_that_fails_leaves_nothing(s3: S3Storage, small_parts: None) -> None:
    """A block that ends with an error takes its uploaded parts back."""

    def broken() -> Iterator[bytes]:
        yield bytes(11 << 20)
        raise InterruptedError

    with pytest.raises(InterruptedError), s3.create("big") as file:
        file.writelines(broken())
    assert list(s3.list()) == []
    assert "Uploads" not in s3._client.list_multipart_uploads(Bucket=s3._bucket)


def test_a_refused_part_fails_the_upload(s3: S3Storage, faulty: Any, small_parts: None) -> None:
    """A part that S3 will not take is one line, and nothing appears."""
    faulty.fault = of_key("partNumber=2", 503, method="PUT")
    with (
        pytest.raises(StorageError, match=r"cannot write big in s3:.*\(SlowDown\); try again"),
        behind(faulty, s3).create("big") as file,
    ):
        file.write(bytes(11 << 20))
    assert list(s3.list()) == []
    assert "Uploads" not in s3._client.list_multipart_uploads(Bucket=s3._bucket)


def test_an_empty_object_is_read(s3: S3Storage) -> None:
    """Of nothing, nothing is read."""
    s3.write("empty", b"")
    with s3.open("empty") as file:
        assert file.read() == b""


def test_a_body_that_breaks_off_is_fetched_again(
    s3: S3Storage, faulty: Any, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that ends in the middle of an object costs a second request, not the object."""
    monkeypatch.setattr(s3_module, "_PAUSE_S", 0.001)
    data = os.urandom(3 << 20)
    s3.write("big", data)
    faulty.fault = of_key("big", -1000, times=3)
    with behind(faulty, s3).open("big") as file:
        assert file.read() == data
    faulty.fault = of_key("big", -1000, times=2)
    assert behind(faulty, s3).read("big") == data
    assert len(faulty.refused) == 5


def test_a_body_that_always_breaks_off_is_unreadable(
    s3: S3Storage, faulty: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What never arrives whole is given up in one line."""
    monkeypatch.setattr(s3_module, "_PAUSE_S", 0.001)
    s3.write("k", b"x" * 5000)
    faulty.fault = of_key("/k", -1000)
    for read in (behind(faulty, s3).read, behind(faulty, s3).open):
        with pytest.raises(Unreadable, match="broke off 5 times") as caught:
            read("k")
        assert "\n" not in str(caught.value)


def test_an_object_replaced_while_it_is_read_is_no_mixture(
    s3: S3Storage, small_parts: None
) -> None:
    """Bytes of two versions never come as one object."""
    s3.write("big", bytes(6 << 20))
    file = s3.open("big")
    s3.write("big", b"\1" * (6 << 20))
    with pytest.raises(NotFound, match="replaced or removed while it was read"), file:
        file.read()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (403, r"cannot read k in s3://\S+: access denied; allow s3:GetObject there"),
        (503, r"cannot read k in s3://\S+: S3 refuses, however often it is asked \(SlowDown\)"),
    ],
)
def test_a_refusal_is_one_line(s3: S3Storage, faulty: Any, fault: int, said: str) -> None:
    """A read that S3 refuses is Unreadable, a write that it refuses an error; both say why."""
    s3.write("k", b"")
    faulty.fault = lambda _method, path: fault if "/k" in path else None
    with pytest.raises(Unreadable, match=said):
        behind(faulty, s3).read("k")
    with pytest.raises(StorageError, match="cannot write k") as caught:
        behind(faulty, s3).write("k", b"")
    assert not isinstance(caught.value, Unreadable)


def test_a_missing_bucket_is_named(s3: S3Storage) -> None:
    """A bucket that is not there is an error of every operation, not an empty storage."""
    nowhere = S3Storage("no-such-bucket-here")
    for act in (lambda s: s.read("k"), lambda s: s.write("k", b""), lambda s: list(s.list())):
        with pytest.raises(StorageError, match="there is no bucket no-such-bucket-here; create"):
            act(nowhere)


def test_an_endpoint_that_is_not_there_is_one_line(s3: S3Storage) -> None:
    """Nobody at the endpoint: said with its address, after the tries that botocore makes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(StorageError, match=re.escape(url)) as caught:
            S3Storage("bucket", endpoint=url).read("k")
    assert "does not answer" in str(caught.value)
    assert not isinstance(caught.value, Unreadable)


WITHOUT = """
import sys
from dtp_trainer.storage import StorageError, open_storage
try:
    open_storage(sys.argv[1]).read("k")
except StorageError as error:
    print(error)
"""


def test_missing_credentials_are_one_line(
    s3: S3Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """A process without credentials is told where they come from."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT, s3.uri], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.stdout.startswith(f"cannot read k in {s3.uri}: no AWS credentials here; run `aws")
    assert done.stdout.count("\n") == 1


def test_a_forked_process_makes_its_own_client(s3: S3Storage) -> None:
    """A child shares no connection with its parent, and no lock that a thread held there."""
    s3.write("k", b"parent")
    mine = id(s3._client)
    with s3_module._CLIENTS._lock:
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)  # a child that waits for ever must not outlive the test
            same = id(s3._client) == mine
            s3.write("k", b"child")
            os._exit(int(same))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert s3.read("k") == b"child"


def test_threads_share_one_client(s3: S3Storage) -> None:
    """However many threads ask at once, one client is made."""
    s3_module._CLIENTS.forget()
    found: set[int] = set()
    threads = [threading.Thread(target=lambda: found.add(id(s3._client))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 1


def test_more_keys_than_one_request_takes_are_deleted(
    s3: S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deleting goes on until nothing is left below the name."""
    monkeypatch.setattr(s3_module, "_BATCH", 2)
    for number in range(5):
        s3.write(f"step-1/{number}", b"")
    store: Storage = s3
    store.delete("step-1")
    assert list(store.list()) == []
