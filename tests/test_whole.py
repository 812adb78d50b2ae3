from __future__ import annotations

import pytest

from tfmixed import whole


def test_a_file_is_written_with_its_folders(tmp_path):
    """Byte for byte, over an old one, and with nothing beside it."""
    path = tmp_path / "new" / "a.txt"
    for text in ("old", "ä\n\r\n"):
        whole.write_text(path, text)
        assert path.read_bytes() == text.encode()
    assert list(path.parent.iterdir()) == [path]


def test_a_reader_keeps_the_old_file(tmp_path):
    """It is replaced, never written into: a second name of it stays as it was."""
    path, other = tmp_path / "a.txt", tmp_path / "b.txt"
    whole.write_text(path, "old")
    other.hardlink_to(path)
    whole.write_text(path, "new")
    assert (path.read_text(), other.read_text()) == ("new", "old")


@pytest.mark.parametrize("write", [lambda path: whole.write_bytes(path, b"new"), whole.prepare])
def test_what_cannot_be_written_leaves_nothing_behind(tmp_path, write):
    """In the place of a folder there can be no file."""
    (tmp_path / "folder" / "full").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        write(tmp_path / "folder")
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_what_can_be_written_is_prepared_without_a_trace(tmp_path):
    """But for the folder."""
    whole.prepare(tmp_path / "new" / "a.txt")
    assert list((tmp_path / "new").iterdir()) == []
