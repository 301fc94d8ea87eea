"""A folder counts once it is committed; what is damaged or cannot be written says so."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from s3fs import S3FileSystem

from infra import storage
from infra.errors import IntegrityError, StorageError
from infra.local import free_port


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A committed folder with two files."""
    uri = str(tmp_path / "step")
    storage.write_bytes(f"{uri}/a.bin", b"abc" * 1000)
    storage.write_json(f"{uri}/deep/b.json", {"x": 1})
    storage.commit(uri, {"rows": 7})
    return uri


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_committed_folder_opens_with_its_metadata(folder: str) -> None:
    manifest = storage.open_committed(folder)
    assert manifest.metadata == {"rows": 7}
    assert sorted(manifest.files) == ["a.bin", "deep/b.json"]
    assert storage.read_manifest(folder) == manifest


def test_the_digest_depends_on_the_contents_alone(folder: str, tmp_path: Path) -> None:
    before = storage.open_committed(folder).digest
    assert storage.commit(folder, {"rows": 8}).digest == before
    storage.write_bytes(f"{folder}/a.bin", b"other")
    assert storage.commit(folder).digest != before


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "step" / "a"), b"x")
    assert storage.read_manifest(str(tmp_path / "step")) is None
    with pytest.raises(IntegrityError, match="never committed"):
        storage.open_committed(str(tmp_path / "step"))


def test_a_flipped_byte_is_found(folder: str) -> None:
    path = Path(folder, "a.bin")
    content = bytearray(path.read_bytes())
    content[1500] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="does not match its sha256") as caught:
        storage.open_committed(folder)
    assert caught.value.where == str(path)
    assert storage.open_committed(folder, verify=False).metadata == {"rows": 7}


def test_a_missing_file_is_found(folder: str) -> None:
    Path(folder, "deep", "b.json").unlink()
    with pytest.raises(IntegrityError, match="a file of the manifest is missing") as caught:
        storage.open_committed(folder)
    assert caught.value.where.endswith("deep/b.json")


def test_a_damaged_manifest_is_an_integrity_error(folder: str) -> None:
    Path(folder, storage.MANIFEST).write_text('{"files": ')
    with pytest.raises(IntegrityError, match="not a readable JSON file"):
        storage.open_committed(folder)


def test_a_write_replaces_a_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    uri = str(tmp_path / "deep" / "file")
    storage.write_bytes(uri, b"one")
    storage.write_bytes(uri, b"two")
    assert storage.read_bytes(uri) == b"two"
    assert names(tmp_path) == ["file"]


def test_a_file_has_the_usual_permissions(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "ours"), b"")
    (tmp_path / "usual").touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "usual")]
    assert modes[0] == modes[1]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "file")
    storage.write_bytes(uri, b"old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"old"
    assert names(tmp_path) == ["file"]


def test_what_a_killed_writer_left_is_no_part_of_the_folder(folder: str) -> None:
    Path(folder, ".aside-0123").write_bytes(b"half")
    assert sorted(storage.commit(folder).files) == ["a.bin", "deep/b.json"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_storage_error_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    # The call that reports a full disk, as the kernel would let it fail: a small file system cannot be mounted everywhere.
    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="the disk is full") as caught:
        storage.write_table(pa.table({"a": [1]}), str(tmp_path / "table.parquet"))
    assert "free some space" in caught.value.mend
    assert names(tmp_path) == []


def test_a_real_device_without_space_is_a_storage_error() -> None:
    with pytest.raises(StorageError, match="the disk is full"), storage.storage_errors("/dev/full"):
        Path("/dev/full").write_bytes(b"x")


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="does not exist") as caught:
        storage.read_bytes(str(tmp_path / "nowhere"))
    assert "nowhere" in caught.value.where
    assert not storage.exists(str(tmp_path / "nowhere"))


def test_denied_access_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="access is denied"), storage.storage_errors("/etc/shadow"):
        raise PermissionError


def test_a_scheme_without_a_driver_is_a_storage_error() -> None:
    with pytest.raises(StorageError):
        storage.exists("nosuch://bucket/key")


KEYS = {"AWS_ACCESS_KEY_ID": "rankgr-test", "AWS_SECRET_ACCESS_KEY": "not-a-secret"}


def error_of_s3(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> StorageError:
    """What reading from an S3 that does not answer raises, with nothing of S3 in the environment but a few variables."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    closed = f"http://127.0.0.1:{free_port()}"
    alone = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in {**alone, "AWS_ENDPOINT_URL": closed, "AWS_MAX_ATTEMPTS": "1", **variables}.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError) as caught:
        storage.read_bytes("s3://bucket/key")
    S3FileSystem.clear_instance_cache()
    return caught.value


@pytest.mark.parametrize(("credentials", "message"), [({}, "Unable to locate credentials"), (KEYS, "Could not connect")])
def test_an_s3_without_credentials_or_without_answer_is_a_storage_error(
    credentials: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = error_of_s3(monkeypatch, credentials)
    assert message in error.what
    assert "AWS_ENDPOINT_URL" in error.mend


@pytest.mark.parametrize("value", ["abc", "0", "-1", "2.5"])
def test_a_number_of_attempts_that_is_none_is_told_with_its_variable(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = error_of_s3(monkeypatch, {**KEYS, "AWS_MAX_ATTEMPTS": value})
    assert (error.what, error.where) == (f"{value!r} is no number of attempts", "AWS_MAX_ATTEMPTS")
    assert error.mend == "set AWS_MAX_ATTEMPTS to 1 or more, or unset it"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_RETRY_MODE", "abc"),
        ("AWS_ENDPOINT_URL", "minio:9000"),
        ("AWS_DEFAULT_REGION", "a b"),
        ("AWS_PROFILE", "nobody"),
        ("AWS_DEFAULTS_MODE", "abc"),
        ("AWS_REQUEST_CHECKSUM_CALCULATION", "abc"),
    ],
)
def test_a_variable_that_s3_cannot_use_is_named_with_its_value(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = error_of_s3(monkeypatch, {**KEYS, name: value})
    assert value in error.what
    assert error.mend == f"check {name}"


def test_variables_of_s3_that_are_empty_are_as_those_that_are_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    error = error_of_s3(monkeypatch, {**KEYS, "AWS_RETRY_MODE": "", "AWS_MAX_ATTEMPTS": ""})
    assert "Could not connect" in error.what


def test_a_path_through_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        storage.write_bytes(str(tmp_path / "file" / "below"), b"x")


def test_tables_of_a_folder_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "odd [name]"
    for number in (2, 0, 1):
        storage.write_table(pa.table({"a": [number]}), str(folder / f"part-{number}.parquet"))
    assert storage.read_table(str(folder))["a"].to_pylist() == [0, 1, 2]
    assert storage.read_table(str(folder / "part-2.parquet"))["a"].to_pylist() == [2]


def test_reading_a_table_leaves_no_thread_that_could_outlive_the_interpreter(tmp_path: Path) -> None:
    storage.write_table(pa.table({"a": [[f"{i}"] for i in range(1000)], "b": list(range(1000))}), str(tmp_path / "t.parquet"))
    script = """
import os, sys
from infra import storage
before = len(os.listdir("/proc/self/task"))
assert storage.read_table(sys.argv[1]).num_rows == 1000
print(len(os.listdir("/proc/self/task")) - before)
"""
    told = subprocess.run([sys.executable, "-c", script, str(tmp_path / "t.parquet")], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "0"


def test_a_folder_without_tables_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        storage.read_table(str(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_table_is_an_integrity_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "t.parquet"
    storage.write_table(pa.table({"a": list(range(1000))}), str(path))
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-10]
    else:
        content[4:300] = bytes(byte ^ 0xFF for byte in content[4:300])
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="not a readable Parquet file") as caught:
        storage.read_table(str(path))
    assert caught.value.where == str(path)


def test_a_local_copy_of_a_local_path_is_the_path_itself(folder: str) -> None:
    with storage.local_copy(folder) as path:
        assert path == Path(folder)
    with storage.local_copy(f"file://{folder}") as path:
        assert (path / "a.bin").exists()
    assert Path(folder).exists()


def test_a_local_copy_of_a_remote_folder_is_gone_afterwards() -> None:
    storage.write_bytes("memory://bucket/model/config.json", b"{}")
    with storage.local_copy("memory://bucket/model") as path:
        assert json.loads((path / "config.json").read_text()) == {}
    assert not path.exists()
    storage.remove("memory://bucket")


def test_remove_takes_files_folders_and_nothing(folder: str) -> None:
    storage.remove(f"{folder}/a.bin")
    storage.remove(folder)
    storage.remove(folder)
    assert not storage.exists(folder)


def test_uris_are_joined_by_one_slash() -> None:
    assert storage.join("s3://bucket/a/", "b", "c") == "s3://bucket/a/b/c"
    assert storage.is_local("/a")
    assert storage.is_local("file:///a")
    assert not storage.is_local("s3://a")


def test_hashes_do_not_depend_on_the_order_of_keys() -> None:
    assert storage.hash_json({"a": 1, "b": 2}) == storage.hash_json({"b": 2, "a": 1})
    assert storage.hash_json({"a": 1}) != storage.hash_json({"a": 2})


def test_batches_of_a_table_have_the_columns_asked_for(tmp_path: Path) -> None:
    storage.write_table(pa.table({"a": list(range(5)), "b": ["x"] * 5}), str(tmp_path / "t.parquet"))
    found = list(storage.read_batches(tmp_path / "t.parquet", ["a"], rows=2))
    assert [batch.to_pydict() for batch in found] == [{"a": [0, 1]}, {"a": [2, 3]}, {"a": [4]}]
    assert storage.count_rows(tmp_path / "t.parquet") == 5


def test_batches_of_what_is_no_table_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    for read in (storage.count_rows, lambda path: list(storage.read_batches(path, ["a"], rows=2))):
        with pytest.raises(IntegrityError, match="not a readable Parquet file"):
            read(tmp_path / "t.parquet")
        with pytest.raises(StorageError, match="does not exist"):
            read(tmp_path / "missing.parquet")


def test_the_start_of_a_file_is_read_alone(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "f"), b"abcdef")
    assert storage.read_bytes(str(tmp_path / "f"), first=2) == b"ab"
    assert storage.read_bytes(str(tmp_path / "f"), first=99) == b"abcdef"
