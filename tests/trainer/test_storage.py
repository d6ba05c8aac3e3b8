"""Promises of every storage, and of files in particular, kept by real processes."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from dtp_trainer import storage as storage_module
from dtp_trainer.storage import (
    Conflict,
    FileStorage,
    NotFound,
    Storage,
    StorageError,
    open_storage,
)


@pytest.fixture
def store(tmp_path: Path) -> FileStorage:
    return FileStorage(tmp_path / "jobs")


@pytest.fixture(params=["files", "s3"])
def any_store(request: pytest.FixtureRequest) -> Storage:
    """What every storage promises, this one does."""
    found: Storage = request.getfixturevalue({"files": "store", "s3": "s3"}[request.param])
    return found


def run_python(code: str, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


def own_files(root: Path) -> list[str]:
    return sorted(p.name for p in root.rglob(".dtp-*"))


def test_what_was_written_is_read_back(any_store: Storage) -> None:
    """A key holds the last content that was written to it."""
    any_store.write("a/b.json", b"one")
    any_store.write("a/b.json", b"two")
    assert any_store.read("a/b.json") == b"two"
    with any_store.open("a/b.json") as file:
        assert file.read() == b"two"


@pytest.mark.parametrize("form", ["plain", "uri", "quoted"])
def test_a_folder_is_opened_by_path_or_uri(tmp_path: Path, form: str) -> None:
    """A plain path and a file URI, quoted characters included, name the same storage."""
    folder = tmp_path / "a; b %20 ü"
    uri = {"plain": str(folder), "uri": folder.as_uri(), "quoted": FileStorage(folder).uri}[form]
    open_storage(uri).write("k", b"v")
    assert (folder / "k").read_bytes() == b"v"
    assert open_storage(uri).uri == folder.as_uri()


@pytest.mark.parametrize("uri", ["s3:///x", "file://elsewhere/x", "gs://x", "file://"])
def test_other_uris_are_refused_in_one_line(uri: str) -> None:
    """A URI that is neither folder nor bucket is refused with what to use instead."""
    with pytest.raises(StorageError, match=r"file:///an/absolute/path") as caught:
        open_storage(uri)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key",
    ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", ".", "a\0b", ".dtp-tmp-1", "a/./b"],
)
def test_unsafe_keys_are_refused(any_store: Storage, key: str) -> None:
    """No key reaches outside the root or the storage's own files."""
    for act in (any_store.read, any_store.open, lambda k: any_store.write(k, b"")):
        with pytest.raises(StorageError, match="is not a key"):
            act(key)


@pytest.mark.parametrize("prefix", ["", "/", "..", "a/../.."])
def test_nothing_outside_is_deleted(any_store: Storage, prefix: str) -> None:
    """Deleting takes a safe key too; the whole storage cannot be deleted by accident."""
    any_store.write("a/b", b"")
    with pytest.raises(StorageError):
        any_store.delete(prefix)
    assert [e.key for e in any_store.list()] == ["a/b"]


def test_a_missing_key_is_not_found(any_store: Storage) -> None:
    """Reading what is not there, a folder, or below a file says NotFound, naming key and root."""
    any_store.write("folder/file", b"")
    for key in ("missing", "folder", "folder/file/below"):
        for read in (any_store.read, any_store.open):
            with pytest.raises(NotFound, match=key):
                read(key)


def test_list_gives_keys_in_order_by_prefix(any_store: Storage) -> None:
    """Listing takes any string prefix and sorts by the whole key."""
    for key in ("b/1", "a", "b.txt", "b/0/z", "c"):
        any_store.write(key, b"12")
    assert [e.key for e in any_store.list()] == ["a", "b.txt", "b/0/z", "b/1", "c"]
    assert [e.key for e in any_store.list("b")] == ["b.txt", "b/0/z", "b/1"]
    assert [e.key for e in any_store.list("b/")] == ["b/0/z", "b/1"]
    assert list(any_store.list("none/at/all")) == []
    assert {e.bytes for e in any_store.list()} == {2}


def test_list_of_a_storage_never_written_is_empty(tmp_path: Path) -> None:
    """A storage whose folder does not exist yet holds nothing."""
    assert list(FileStorage(tmp_path / "none").list()) == []


def test_delete_takes_a_key_or_a_folder(any_store: Storage) -> None:
    """Deleting a folder's name removes all below it, not its namesakes; a second time is fine."""
    for key in ("step-1/a", "step-1/b/c", "step-10/a", "other"):
        any_store.write(key, b"")
    any_store.delete("step-1")
    any_store.delete("step-1/")
    any_store.delete("other")
    assert [e.key for e in any_store.list()] == ["step-10/a"]


def test_files_leave_no_litter(store: FileStorage) -> None:
    """Neither a write that failed nor a deleted folder leaves a file of the storage's own."""
    with pytest.raises(ZeroDivisionError), store.create("step-1/a") as file:
        file.write(b"%d" % (1 // 0))
    store.write("step-1/a", b"")
    store.delete("step-1")
    assert own_files(store.root) == []


def test_create_shows_nothing_before_its_end(any_store: Storage) -> None:
    """A streamed object appears whole when its block ends, and not at all when the block fails."""
    any_store.write("k", b"old")
    with any_store.create("k") as file:
        file.write(b"new" * 10)
        assert any_store.read("k") == b"old"
    assert any_store.read("k") == b"new" * 10
    with pytest.raises(ZeroDivisionError), any_store.create("k") as file:
        file.write(b"%d" % (1 // 0))
    assert any_store.read("k") == b"new" * 10


def test_write_if_follows_tags(any_store: Storage) -> None:
    """A conditional write succeeds with the tag of what is there and conflicts with any other."""
    first = any_store.write_if("k", b"1", tag=None)
    assert any_store.read_tagged("k").tag == first
    second = any_store.write_if("k", b"2", tag=first)
    for stale in (None, first):
        with pytest.raises(Conflict, match="changed by another writer"):
            any_store.write_if("k", b"3", tag=stale)
    assert any_store.read_tagged("k") == storage_module.Tagged(b"2", second)
    with pytest.raises(Conflict):
        any_store.write_if("missing", b"", tag=second)


CONTEND = """
import sys
from pathlib import Path
from dtp_trainer.storage import Conflict, FileStorage, NotFound
root, shared = Path(sys.argv[1]), sys.argv[2]
store, won = FileStorage(root), []
sys.stdin.readline()
for turn in range(25):
    key = f"{shared}/{turn}"
    try:
        store.write_if(key, sys.argv[3].encode(), tag=None)
        won.append(turn)
    except Conflict:
        pass
    while True:
        try:
            seen = store.read_tagged("count")
        except NotFound:
            seen = None
        try:
            value = 1 + int(seen.data if seen else b"0")
            store.write_if("count", str(value).encode(), tag=seen.tag if seen else None)
            break
        except Conflict:
            pass
print(*won)
"""


def test_eight_processes_race_and_one_wins_each_round(tmp_path: Path) -> None:
    """Of eight processes that write a key conditionally one wins each round; no count is lost."""
    racers = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", CONTEND, str(tmp_path), "race", str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(8)
    ]
    for racer in racers:
        assert racer.stdin
        racer.stdin.write("\n")
        racer.stdin.flush()
    won: dict[int, int] = {}
    for number, racer in enumerate(racers):
        out, _ = racer.communicate(timeout=90)
        assert racer.returncode == 0
        for turn in map(int, out.split()):
            assert turn not in won
            won[turn] = number
    store = FileStorage(tmp_path)
    assert sorted(won) == list(range(25))
    assert all(store.read(f"race/{turn}") == str(number).encode() for turn, number in won.items())
    assert store.read("count") == str(8 * 25).encode()


def test_threads_race_and_one_wins_each_round(any_store: Storage) -> None:
    """Conditional writes exclude each other among threads of one storage object, too."""
    wins: list[int] = []

    def contend(number: int) -> None:
        for turn in range(20):
            try:
                any_store.write_if(f"race/{turn}", str(number).encode(), tag=None)
            except Conflict:
                continue
            wins.append(turn)

    threads = [threading.Thread(target=contend, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(wins) == list(range(20))


def test_the_lock_is_shared_by_storages_with_other_roots(tmp_path: Path) -> None:
    """Two storages that reach one file by different roots exclude each other."""
    outer, inner = FileStorage(tmp_path), FileStorage(tmp_path / "jobs" / "a")
    tag = outer.write_if("jobs/a/gang.json", b"1", tag=None)
    inner.write_if("gang.json", b"2", tag=tag)
    with pytest.raises(Conflict):
        outer.write_if("jobs/a/gang.json", b"3", tag=tag)


def test_a_lock_held_for_too_long_is_explained(
    store: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that is stuck in the lock does not hang the others without a word."""
    store.write_if("k", b"", tag=None)
    [lock] = store.root.glob(".dtp-lock-*")
    monkeypatch.setattr(storage_module, "_LOCK_DEADLINE_S", 0.05)
    with lock.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="stopped or stuck"):
            store.write_if("k", b"", tag=None)


DIE_WRITING = """
import os, signal, sys
from pathlib import Path
from dtp_trainer.storage import FileStorage
with FileStorage(Path(sys.argv[1])).create("k") as file:
    file.write(b"half")
    file.flush()
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    print("writing", flush=True)
    sys.stdin.readline()
"""


def test_what_a_killed_writer_left_is_swept(store: FileStorage) -> None:
    """kill -9 in the middle of a write leaves the old content; the next writer sweeps the rest."""
    store.write("k", b"old")
    run_python(DIE_WRITING, str(store.root), "die").communicate(timeout=60)
    assert store.read("k") == b"old"
    assert [e.key for e in store.list()] == ["k"]
    assert len(own_files(store.root)) == 1
    FileStorage(store.root).write("other", b"")
    assert own_files(store.root) == []


def test_a_living_writer_is_not_swept(store: FileStorage) -> None:
    """A temporary file whose writer lives survives the sweep and becomes the object."""
    writer = subprocess.Popen(
        [sys.executable, "-P", "-c", DIE_WRITING, str(store.root), "live"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout
    assert writer.stdout.readline() == "writing\n"
    store.write("other", b"")
    writer.communicate("\n", timeout=60)
    assert store.read("k") == b"half"


LIMITED = """
import resource, sys
from pathlib import Path
from dtp_trainer.storage import FileStorage, StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    FileStorage(Path(sys.argv[1])).write("k", b"x" * (5 << 20))
except StorageError as error:
    print(error)
"""


def test_a_write_that_does_not_fit_is_one_line_and_changes_nothing(store: FileStorage) -> None:
    """A write that the system cuts short says which key and why; the old content stays."""
    store.write("k", b"old")
    said = output_of(run_python(LIMITED, str(store.root)))
    assert said.startswith(f"cannot write k in {store.root}: the file is larger than")
    assert said.count("\n") == 1
    assert store.read("k") == b"old"
    assert own_files(store.root) == []


def test_a_full_disk_is_one_line_and_changes_nothing(small_disk: Path) -> None:
    """A full disk is named as such, the old content stays, and a write that fits still works."""
    store = FileStorage(small_disk)
    store.write("k", b"old")
    with pytest.raises(StorageError, match=r"cannot write k in .*: the disk is full; free some"):
        store.write("k", b"x" * (3 << 20))
    assert store.read("k") == b"old"
    assert own_files(store.root) == []
    store.write("k", b"new")


READ_ONLY = """
import os, sys
from pathlib import Path
from dtp_trainer.storage import FileStorage, StorageError
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
store = FileStorage(Path(sys.argv[1]))
for act in (lambda: store.write("k", b""), lambda: store.write_if("l", b"", tag=None),
            lambda: store.read("secret"), lambda: store.delete("k")):
    try:
        act()
    except StorageError as error:
        print(error)
"""


def test_a_folder_without_permission_is_one_line() -> None:
    """Writing, reading or deleting without permission says so in one line each."""
    # Not below tmp_path: pytest closes its own folders to other users.
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "k").write_bytes(b"")
        (root / "secret").write_bytes(b"")
        (root / "secret").chmod(0)
        root.chmod(0o555)
        lines = output_of(run_python(READ_ONLY, name)).splitlines()
        root.chmod(0o755)
    assert len(lines) == 4
    assert all("permission denied" in line for line in lines)


def test_a_file_where_a_folder_is_needed_is_explained(store: FileStorage) -> None:
    """A key below another key is refused with the reason."""
    store.write("a", b"")
    with pytest.raises(StorageError, match="a file, not a folder"):
        store.write("a/b/c", b"")


def test_large_objects_pass_through_create(any_store: Storage) -> None:
    """A stream of many parts comes back byte for byte."""
    parts = [os.urandom(1 << 16) for _ in range(40)]
    with any_store.create("deep/er/big.bin") as file:
        for part in parts:
            file.write(part)
    assert any_store.read("deep/er/big.bin") == b"".join(parts)
