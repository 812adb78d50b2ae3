"""Atomic writes of files, links, pipes and devices."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading

import pytest

from tfmixed._utils import atomic_write


def test_a_file_is_written_with_its_folders(tmp_path):
    """Byte for byte, also over an old one, and without temporary files."""
    path = tmp_path / "new" / "a.txt"
    for text in ("old", "ä\n\r\n"):
        atomic_write.write_text(path, text)
        assert path.read_bytes() == text.encode()
    assert list(path.parent.iterdir()) == [path]


def test_a_reader_keeps_the_old_file(tmp_path):
    """The file is replaced, so another hard link keeps the old content."""
    path, other = tmp_path / "a.txt", tmp_path / "b.txt"
    atomic_write.write_text(path, "old")
    other.hardlink_to(path)
    atomic_write.write_text(path, "new")
    assert (path.read_text(), other.read_text()) == ("new", "old")


@pytest.mark.parametrize("write", [lambda path: atomic_write.write_bytes(path, b"new"), atomic_write.prepare])
def test_a_failure_leaves_nothing_behind(tmp_path, write):
    """A folder cannot be replaced by a file."""
    (tmp_path / "folder" / "full").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        write(tmp_path / "folder")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_prepare_creates_only_the_folder(tmp_path):
    """It removes the file that it wrote."""
    atomic_write.prepare(tmp_path / "new" / "a.txt")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_symbolic_link_stays_and_its_target_is_written(tmp_path):
    """Also a dangling link and a link to a link; a loop of links is an error."""
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to("big/real")
    (tmp_path / "far").symlink_to(tmp_path / "link")
    for name, text in (("link", "new"), ("far", "newer")):
        atomic_write.write_text(tmp_path / name, text)
        assert (tmp_path / "big" / "real").read_text() == text
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far").is_symlink()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop"):
        atomic_write.write_text(tmp_path / "loop", "x")
    assert (tmp_path / "loop").is_symlink()
    assert {entry.name for entry in tmp_path.iterdir()} == {"big", "link", "far", "loop"}


def test_the_mode_of_a_file_stays_and_a_new_one_has_the_default(tmp_path):
    """Given by the umask, as by `open`."""
    old, new, usual = tmp_path / "old", tmp_path / "new", tmp_path / "usual"
    old.write_text("old")
    old.chmod(0o600)
    usual.touch()
    for path in (old, new):
        atomic_write.write_text(path, "new")
    assert stat.S_IMODE(old.stat().st_mode) == 0o600
    assert new.stat().st_mode == usual.stat().st_mode


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_the_owner_of_a_file_stays(tmp_path):
    """If root writes it."""
    (tmp_path / "a").write_text("old")
    os.chown(tmp_path / "a", 1234, 1235)
    atomic_write.write_text(tmp_path / "a", "new")
    assert ((tmp_path / "a").stat().st_uid, (tmp_path / "a").stat().st_gid) == (1234, 1235)


def test_a_pipe_is_written_as_a_stream(tmp_path):
    """It stays a pipe, also behind a link."""
    pipe, link, texts = tmp_path / "pipe", tmp_path / "link", []
    os.mkfifo(pipe)
    link.symlink_to("pipe")
    for path in (pipe, link):
        atomic_write.prepare(path)
        reader = threading.Thread(target=lambda: texts.append(pipe.read_text()))
        reader.start()
        atomic_write.write_text(path, "x" * 100_000)
        reader.join(timeout=60)
    assert texts == ["x" * 100_000] * 2
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert {entry.name for entry in tmp_path.iterdir()} == {"pipe", "link"}


def test_a_device_stays_a_device(tmp_path):
    """A null device in a temporary folder, not that of the machine."""
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.write_bytes(b"x")
    except PermissionError:
        pytest.skip("needs the right to make and use devices")
    atomic_write.prepare(device)
    atomic_write.write_text(device, "new")
    assert stat.S_ISCHR(device.stat().st_mode)
    assert [entry.name for entry in tmp_path.iterdir()] == ["null"]


@pytest.mark.parametrize("to", ["file", "pipe"])
def test_standard_output_is_written_at_its_position(tmp_path, to):
    """Between printed lines. If it is a file, that is neither truncated nor replaced."""
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")  # like /dev/stdout, which a bug would destroy
    write = f"atomic_write.write_text({str(tmp_path / 'stdout')!r}, 'b\\n')"
    code = f"from tfmixed._utils import atomic_write; print('a'); {write}; print('c')"
    with (tmp_path / "out").open("wb") as file:
        stdout = file if to == "file" else subprocess.PIPE
        process = subprocess.run([sys.executable, "-c", code], stdout=stdout, check=True)
    assert ((tmp_path / "out").read_bytes() if to == "file" else process.stdout) == b"a\nb\nc\n"
    assert (tmp_path / "stdout").is_symlink()


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    """A reader always gets a complete text."""
    path, failed = tmp_path / "a.txt", []
    atomic_write.write_text(path, "0" * 100_000)

    def write(letter):
        try:
            for _ in range(20):
                atomic_write.write_text(path, letter * 100_000)
        except OSError as error:
            failed.append(error)

    writers = [threading.Thread(target=write, args=(letter,)) for letter in "1234"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        text = path.read_text()
        assert (len(text), len(set(text))) == (100_000, 1)
    assert not failed
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """Without temporary files."""
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(TypeError), atomic_write.replacement(path) as file:
        file.writelines([b"new", None])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_can_be_as_long_as_the_file_system_allows(tmp_path):
    """And of any bytes but a slash and zero."""
    for name in (b"a" * 255, b"caf\xe9"):
        path = os.path.join(os.fsencode(tmp_path), name)
        atomic_write.write_text(os.fsdecode(path), "new")
        with open(path) as file:
            assert file.read() == "new"
