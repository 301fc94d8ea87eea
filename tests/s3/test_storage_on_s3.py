"""Files on a real S3 server: what is written is read, in parts too, and what cannot be used is told in one clear line."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pytest
from s3fs import S3FileSystem

from infra import storage
from infra.errors import IntegrityError, StorageError
from infra.local import free_port
from tests.command import rankgr_here
from tests.s3.conftest import BUCKET, S3


@pytest.fixture
def folder(s3: S3, request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/unit/{request.node.name}"


def test_a_folder_is_committed_read_copied_and_removed(folder: str) -> None:
    storage.write_table(pa.table({"a": [1, 2]}), f"{folder}/part-0.parquet")
    storage.write_json(f"{folder}/deep/b.json", {"x": 1})
    storage.commit(folder, {"rows": 2})
    assert storage.open_committed(folder).metadata == {"rows": 2}
    assert storage.list_files(folder) == ["deep/b.json", storage.MANIFEST, "part-0.parquet"]
    assert storage.read_table(folder)["a"].to_pylist() == [1, 2]
    with storage.local_copy(folder) as path:
        assert (path / "deep" / "b.json").exists()
    storage.remove(folder)
    assert storage.list_files(folder) == []
    assert storage.read_manifest(folder) is None


def test_a_byte_that_another_process_changed_is_found(folder: str, s3: S3) -> None:
    storage.write_bytes(f"{folder}/a.bin", b"abc")
    storage.commit(folder)
    S3FileSystem(endpoint_url=s3.endpoint, skip_instance_cache=True).pipe_file(f"{folder}/a.bin", b"abd")
    with pytest.raises(IntegrityError, match="does not match its sha256"):
        storage.open_committed(folder)


def test_a_large_file_travels_in_parts(folder: str) -> None:
    content = os.urandom(1 << 20) * 33
    storage.write_bytes(f"{folder}/large", content)
    fs, path = storage.filesystem(f"{folder}/large")
    assert "-" in fs.info(path)["ETag"], "an ETag with a dash is that of parts"
    assert storage.read_bytes(f"{folder}/large") == content


WRONG = {
    "key": ({"AWS_ACCESS_KEY_ID": "nobody"}, f"s3://{BUCKET}/events.csv", "S3 denies access", "AWS_ACCESS_KEY_ID"),
    "secret": ({"AWS_SECRET_ACCESS_KEY": "guessed"}, f"s3://{BUCKET}/events.csv", "S3 denies access", "AWS_SECRET_ACCESS_KEY"),
    "endpoint": ({"AWS_ENDPOINT_URL": "closed"}, f"s3://{BUCKET}/events.csv", "Could not connect to the endpoint", "AWS_ENDPOINT_URL"),
    "bucket": ({}, "s3://no-such-bucket/events.csv", "does not exist", "s3://no-such-bucket"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_with_the_logs_is_told(wrong: str, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed, logs, what, named = WRONG[wrong]
    closed = f"http://127.0.0.1:{free_port()}"
    for name, value in {"AWS_MAX_ATTEMPTS": "1", **changed}.items():
        monkeypatch.setenv(name, closed if value == "closed" else value)
    S3FileSystem.clear_instance_cache()
    done = rankgr_here("run", "--preset", "tiny", "--logs", logs, "--dry-run", folder=tmp_path)
    S3FileSystem.clear_instance_cache()
    assert done.returncode in (3, 4)
    first, *more = done.stderr.splitlines()
    assert first.startswith("error: ")
    assert what in first
    assert named in done.stderr
    assert len(more) == 2, "where, and how to mend it"


@pytest.mark.parametrize("wrong", ["key", "bucket"])
def test_a_workspace_that_cannot_be_written_is_told_with_what_to_check(wrong: str, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    # Who may not make buckets is denied access to one that does not exist, here as by other servers.
    if wrong == "key":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match="S3 denies access") as caught:
        storage.write_bytes(f"s3://{BUCKET if wrong == 'key' else 'no-such-bucket'}/runs/x", b"1")
    assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, what they may do in the bucket, and its name" in str(caught.value)
    S3FileSystem.clear_instance_cache()


def test_a_bucket_that_does_not_exist_is_told_when_it_is_read(s3: S3) -> None:
    with pytest.raises(StorageError, match="the bucket does not exist"):
        storage.read_bytes("s3://no-such-bucket/runs/x")
