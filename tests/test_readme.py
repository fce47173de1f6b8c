"""The README's Python runs as it stands, block after block, as a reader would type it."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_examples_run_in_order():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    namespace = {}
    for block in blocks:
        exec(block, namespace)
        record = namespace["record"]
        assert record.accepted
        assert record.new_loss < record.loss < 1
    assert 0 < namespace["relative_error"] < 10
    assert namespace["step"].isfinite().all()
    assert 0 < namespace["cosine"] < 1
    assert 0 < namespace["fraction"] < 1
    assert namespace["condition_number"] > 1
    assert namespace["report"].passed
    assert 0 < namespace["similarity"] < namespace["cosine"]
