"""What a GGUF file says of itself; which models are at hand."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from fusechat.models.gguf import about
from fusechat.models.reference import Reference
from fusechat.models.resolve import find_cached


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny <b>model</b>")
    writer.add_license("apache-2.0")
    writer.add_tags(["chat", "tiny"])
    writer.add_file_type(3)
    writer.add_block_count(2)
    writer.add_rope_freq_base(1e4)
    writer.add_token_list([f"token {number}" for number in range(2000)])
    writer.add_tensor("weight", np.zeros((2, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_name_and_licence_as_the_library_wrote_them(file: Path) -> None:
    found = about(file)
    assert found["name"] == "Tiny <b>model</b>"
    assert found["license"] == "apache-2.0"
    assert found["file_type"] == 3
    assert found["bytes"] == file.stat().st_size
    assert "tags" not in found


def test_what_is_not_here_is_not_fetched(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSECHAT_CACHE", str(tmp_path / "cache"))
    for name in ("nobody/nothing", "wheel:nothing==1/model.gguf", str(file)):
        assert find_cached(Reference((name,))) is None
    assert find_cached(Reference(("wheel:nothing==1/model.gguf",), sha256="0" * 64)) is None
    assert find_cached(Reference((str(tmp_path),))) == tmp_path
