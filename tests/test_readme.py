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
    comparison = namespace["comparison"]
    assert 0 < comparison.cosine.value < 1
    assert 0 < comparison.step.decrease_fraction < 1
    assert comparison.condition_number > 1
    assert len(namespace["eigenvalues"]) == 129
    assert namespace["report"].passed
    assert 0 < namespace["similarity"] < comparison.cosine.value
