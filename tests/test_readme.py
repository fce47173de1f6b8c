"""The README: its examples run in their order, and its lists are those of the code."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


def test_the_examples_run_in_order():
    blocks = re.findall(r"```python\n(?!# my_)(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 8
    torch.manual_seed(0)  # of the networks' weights
    namespace = {}
    for block in blocks:
        exec(block, namespace)
        record = namespace["record"]
        assert record.accepted
        assert record.new_loss < record.loss
    assert 0 < namespace["relative_error"] < 10
    assert namespace["step"].isfinite().all()
    comparison = namespace["comparison"]
    assert 0 < comparison.cosine.value < 1
    assert 0 < comparison.step.decrease_fraction < 1
    assert comparison.condition_number > 1
    assert len(namespace["eigenvalues"]) == 129
    assert namespace["report"].passed
    assert 0 < namespace["similarity"] < 1
    assert namespace["system"].linearize().gradient()


def covered() -> str:
    """Return the list of functions with a rule, as it stands in the README."""
    # in a process of its own, since tests register functions, too
    code = "from pinncurv.jets import supported; print(*supported())"
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    names = sorted({n.removeprefix("nn.functional.") for n in output.split() if "__" not in n})
    plain = [n for n in names if not n.startswith("Tensor.")]
    return textwrap.fill(", ".join(plain), 100)


def test_the_list_of_functions_is_that_of_the_registry():
    """If this fails, paste what it prints between the two comments."""
    (listed,) = re.findall(
        r"<!-- supported -->\n(.*?)<!-- /supported -->", README.read_text(), flags=re.DOTALL
    )
    assert listed.strip() == covered(), covered()
