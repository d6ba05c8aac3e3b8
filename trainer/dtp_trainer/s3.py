"""`Storage` in S3, or in anything that speaks its protocol (``AWS_ENDPOINT_URL``).

boto3 is imported by the first request. A process has one client an endpoint, which its threads
share; a forked process makes its own. Credentials, region, endpoint and retries are found as by
every AWS tool.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, Any, TypeAlias, cast

from dtp_trainer.s3errors import broken_body, code_of, explained, refused_condition
from dtp_trainer.storage import (
    Conflict,
    Entry,
    NotFound,
    StorageError,
    Tagged,
    Unreadable,
    check_key,
)

_PART_BYTES = 16 << 20
"""Of an upload; doubled every thousand parts, because S3 takes no more than ten thousand."""
_PARTS_AT_ONCE = 4
_RANGE_BYTES = 8 << 20
_RANGES_AT_ONCE = 4
_TRIES = 5
"""Of a body that breaks off; the requests themselves are tried again by botocore."""
_PAUSE_S = 0.1
_BATCH = 1000
"""Keys that one request deletes."""

_Keys: TypeAlias = list[str]  # in the class below, `list` is a method


class S3Storage:
    """Objects in `bucket` whose keys begin with ``prefix/``.

    An upload whose process dies leaves nothing that a reader sees; what it leaves in the bucket is
    removed by a lifecycle rule (AbortIncompleteMultipartUpload).
    """

    def __init__(self, bucket: str, prefix: str = "", *, endpoint: str | None = None) -> None:
        self._bucket, self._prefix = bucket, f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._endpoint = endpoint
        self.uri = f"s3://{bucket}/{self._prefix}".rstrip("/")

    def __repr__(self) -> str:
        return f"S3Storage({self.uri!r})"

    def read(self, key: str) -> bytes:
        return self.read_tagged(key).data

    def read_tagged(self, key: str) -> Tagged:
        names = self._names(key)
        with explained("read", key, self.uri):
            return _whole(lambda: self._client.get_object(**names), key, self.uri)

    def open(self, key: str) -> IO[bytes]:
        with explained("read", key, self.uri):
            ranges = _Ranges(self._client, self._names(key), key, self.uri)
        return io.BufferedReader(ranges, _RANGE_BYTES)

    def write(self, key: str, data: bytes) -> None:
        with explained("write", key, self.uri):
            self._client.put_object(**self._names(key), Body=data)

    def write_if(self, key: str, data: bytes, *, tag: str | None) -> str:
        # An answer that was lost on its way makes the second try a conflict with the first. That is
        # for the caller to find out: only it can tell its own content from another writer's.
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
        with explained("write", key, self.uri):
            try:
                done = self._client.put_object(**self._names(key), Body=data, **condition)
            except self._client.exceptions.ClientError as error:
                if refused_condition(error):
                    raise Conflict(
                        f"{key} in {self.uri} was changed by another writer; read it again"
                    ) from None
                raise
        tag = done["ETag"]
        return str(tag)

    @contextmanager
    def create(self, key: str) -> Iterator[IO[bytes]]:
        upload = _Upload(self._client, self._names(key))
        with explained("write", key, self.uri):
            try:
                yield cast("IO[bytes]", upload)
                upload.complete()
            except BaseException:
                upload.abort()
                raise
            finally:
                upload.close()

    def list(self, prefix: str = "") -> Iterator[Entry]:
        pages = self._client.get_paginator("list_objects_v2")
        with explained("list", prefix or "the keys", self.uri):
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + prefix):
                for found in page.get("Contents", ()):
                    key = found["Key"].removeprefix(self._prefix)
                    if not key.endswith("/"):  # consoles make empty objects that look like folders
                        yield Entry(key, found["Size"], found["LastModified"].timestamp())

    def delete(self, prefix: str) -> None:
        key = prefix.rstrip("/")
        names = self._names(key)
        with explained("delete", prefix, self.uri):
            self._client.delete_object(**names)
            batch: _Keys = []
            for entry in self.list(f"{key}/"):
                batch.append(entry.key)
                if len(batch) == _BATCH:
                    self._delete(batch)
                    batch = []
            if batch:
                self._delete(batch)

    def _delete(self, keys: _Keys) -> None:
        objects = [{"Key": self._prefix + key} for key in keys]
        done = self._client.delete_objects(
            Bucket=self._bucket, Delete={"Objects": objects, "Quiet": True}
        )
        for error in done.get("Errors", ()):
            raise StorageError(
                f"cannot delete {error['Key'].removeprefix(self._prefix)} in {self.uri}: "
                f"{error['Code']}; allow s3:DeleteObject there"
            )

    def _names(self, key: str) -> dict[str, str]:
        check_key(key)
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    @property
    def _client(self) -> Any:
        with explained("use", "the storage", self.uri):
            return _CLIENTS.of(self._endpoint)


# ---------------------------------------------------------------------------------------- clients


class _Clients:
    """One an endpoint in this process."""

    def __init__(self) -> None:
        self.forget()
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        """In a child its parent's connections, and a lock that a thread held there, are useless."""
        self._lock = threading.Lock()
        self._made: dict[str | None, Any] = {}

    def of(self, endpoint: str | None) -> Any:
        endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3", None)
        endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL", None)
        with self._lock:
            if endpoint not in self._made:
                self._made[endpoint] = _make_client(endpoint)
            return self._made[endpoint]


_CLIENTS = _Clients()


def _make_client(endpoint: str | None) -> Any:
    try:
        import boto3  # noqa: PLC0415 - 0.3 s, for those who use S3
        from botocore.config import Config  # noqa: PLC0415
    except ImportError:
        raise StorageError("S3 needs boto3: pip install 'dtp-tui[aws]'") from None
    retries = {"mode": "adaptive", "total_max_attempts": 6}
    given = ("AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE")
    config = Config(
        connect_timeout=5,
        read_timeout=30,
        tcp_keepalive=True,
        max_pool_connections=2 * (_PARTS_AT_ONCE + _RANGES_AT_ONCE),
        retries=None if any(name in os.environ for name in given) else retries,
        # Behind an endpoint of one's own, no name server knows the buckets.
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    return boto3.session.Session().client("s3", endpoint_url=endpoint, config=config)


# ------------------------------------------------------------------------------------------ reading


def _whole(ask: Callable[[], Any], key: str, uri: str) -> Tagged:
    """The content of the answer to `ask`, which is asked again when it breaks off."""
    for number in range(1, _TRIES + 1):
        answer = ask()
        try:
            with answer["Body"] as body:
                return Tagged(body.read(), answer["ETag"])
        except Exception as error:
            if not broken_body(error):
                raise
            cause = error
        time.sleep(_PAUSE_S * number)
    raise Unreadable(
        f"cannot read {key} in {uri}: its content broke off {_TRIES} times ({cause}); check the "
        "network between here and there"
    )


class _Ranges(io.RawIOBase):
    """An object read in order, a few ranges ahead; every range is of the same version."""

    def __init__(self, client: Any, names: Mapping[str, str], key: str, uri: str) -> None:
        super().__init__()
        self._client, self._named, self._key, self._uri = client, names, key, uri
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[Future[Tagged]] = deque()
        self._size = self._next = 0
        self._tag: str | None = None
        self._left = memoryview(self._first())

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            self._left = memoryview(self._following())
        count = min(len(buffer), len(self._left))
        memoryview(buffer).cast("B")[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
        super().close()

    def _first(self) -> bytes:
        def ask() -> Any:
            answer = self._client.get_object(**self._named, Range=f"bytes=0-{_RANGE_BYTES - 1}")
            # A server that knows no ranges answers with all of it.
            total = answer.get("ContentRange", "").rpartition("/")[2] or answer["ContentLength"]
            self._size = int(total)
            return answer

        try:
            first = _whole(ask, self._key, self._uri)
        except self._client.exceptions.ClientError as error:
            if code_of(error) == "InvalidRange":  # of an empty object
                return b""
            raise
        self._next, self._tag = len(first.data), first.tag
        return first.data

    def _following(self) -> bytes:
        """Empty at the end."""
        self._pool = self._pool or ThreadPoolExecutor(_RANGES_AT_ONCE, "s3-read")
        while len(self._ahead) < _RANGES_AT_ONCE and self._next < self._size:
            stop = min(self._next + _RANGE_BYTES, self._size)
            self._ahead.append(self._pool.submit(self._fetch, self._next, stop))
            self._next = stop
        if not self._ahead:
            return b""
        with explained("read", self._key, self._uri):
            return self._ahead.popleft().result().data

    def _fetch(self, start: int, stop: int) -> Tagged:
        part = {"Range": f"bytes={start}-{stop - 1}", "IfMatch": self._tag}
        try:
            return _whole(
                lambda: self._client.get_object(**self._named, **part), self._key, self._uri
            )
        except self._client.exceptions.ClientError as error:
            if refused_condition(error):
                raise NotFound(
                    f"{self._key} in {self._uri} was replaced or removed while it was read"
                ) from None
            raise


# ------------------------------------------------------------------------------------------ writing


class _Upload(io.RawIOBase):
    """One request for a small object; parts, a few at once, for one that is larger than a part."""

    def __init__(self, client: Any, names: Mapping[str, str]) -> None:
        super().__init__()
        self._client, self._named = client, names
        self._part = bytearray()
        self._size = 0
        self._id: str | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[Future[dict[str, Any]]] = deque()
        self._done: list[dict[str, Any]] = []
        # What stores other than S3 may not know: botocore's own switch turns it off.
        wanted = client.meta.config.request_checksum_calculation != "when_required"
        self._checksum = {"ChecksumAlgorithm": "CRC32"} if wanted else {}

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        count = len(rest)
        while rest:
            room = self._part_bytes - len(self._part)
            self._part += rest[:room]
            rest = rest[room:]
            if len(self._part) == self._part_bytes:
                self._send()
        return count

    @property
    def _part_bytes(self) -> int:
        sent = len(self._done) + len(self._pending)
        return _PART_BYTES << min(sent // 1000, 5)

    def complete(self) -> None:
        if self._id is None:
            self._client.put_object(**self._named, Body=bytes(self._part))
            return
        if self._part:
            self._send()
        while self._pending:
            self._done.append(self._pending.popleft().result())
        try:
            self._client.complete_multipart_upload(
                **self._named, UploadId=self._id, MultipartUpload={"Parts": self._done}
            )
        except self._client.exceptions.NoSuchUpload:
            # The answer to a first try may have been lost.
            found = self._client.head_object(**self._named)
            if found["ContentLength"] != self._size:
                raise
        self._id = None

    def abort(self) -> None:
        """Nothing of it remains; where even that is refused, a lifecycle rule has to do it."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._id is not None:
            with contextlib.suppress(Exception):  # what went wrong before is what counts
                self._client.abort_multipart_upload(**self._named, UploadId=self._id)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False)
            self._pool = None
        super().close()

    def _send(self) -> None:
        if self._id is None:
            begun = self._client.create_multipart_upload(**self._named, **self._checksum)
            self._id = begun["UploadId"]
        self._pool = self._pool or ThreadPoolExecutor(_PARTS_AT_ONCE, "s3-write")
        if len(self._pending) > _PARTS_AT_ONCE:
            self._done.append(self._pending.popleft().result())
        number = len(self._done) + len(self._pending) + 1
        part, self._part = self._part, bytearray()
        self._size += len(part)
        self._pending.append(self._pool.submit(self._put, number, part))

    def _put(self, number: int, data: bytearray) -> dict[str, Any]:
        answer = self._client.upload_part(
            **self._named, **self._checksum, UploadId=self._id, PartNumber=number, Body=data
        )
        sums = {name: answer[name] for name in ("ChecksumCRC32",) if name in answer}
        return {"PartNumber": number, "ETag": answer["ETag"], **sums}
