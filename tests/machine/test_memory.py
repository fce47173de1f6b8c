"""What is free, and what is refused because it does not fit."""

import re

import pytest
import torch

from pinncurv.curvature import (
    BlockDiagonalGaussNewton,
    GaussNewton,
    Jacobian,
    Kernel,
    MatrixFreeGaussNewton,
    Nystroem,
    Objective,
    SubspaceGaussNewton,
    Woodbury,
)
from pinncurv.linops import (
    Block,
    Damped,
    DenseBlockDiagonalLinearOperator,
    DenseLinearOperator,
    PseudoInverse,
)
from pinncurv.machine import NotEnoughMemoryError, check_memory, free_memory, memory
from tests.optim.cases import network, poisson

CPU = torch.device("cpu")


@pytest.fixture
def _little(monkeypatch):
    monkeypatch.setattr(memory, "_ALWAYS", 0)
    monkeypatch.setattr(memory, "free_memory", lambda device: 999)


def test_the_error_says_what_is_needed_what_is_free_and_what_to_do(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 2_500_000_000)
    message = "The kernel must fit into the memory, but takes 8 TB, and 2.5 GB are free on cpu. Go."
    with pytest.raises(NotEnoughMemoryError, match=re.escape(message)):
        check_memory("the kernel", 10**12, torch.float64, CPU, "Go.")
    with pytest.raises(MemoryError, match=r"takes 2\.6 GB"):
        check_memory("the kernel", 650 * 10**6, torch.float32, CPU, "Run.")
    check_memory("the kernel", 600 * 10**6, torch.float32, CPU, "Run.")


def test_what_is_not_known_is_not_refused(monkeypatch):
    assert free_memory(torch.device("meta")) is None
    check_memory("the kernel", 10**15, torch.float64, torch.device("meta"), "Run.")


@pytest.mark.usefixtures("_little")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda made: Kernel()(made).to_dense(), r"kernel of 25 residuals.*Nystroem"),
        (GaussNewton(), r"JᵀJ of 33 parameters.*Woodbury"),
        (BlockDiagonalGaussNewton(), r"blocks of JᵀJ of 2 layers.*KFAC"),
        (lambda made: Jacobian()(made).to_dense(), r"J of 25 x 33 numbers.*products"),
        (lambda made: Woodbury(1e-3)(MatrixFreeGaussNewton()(made)), r"kernel of 25 residuals"),
        (lambda made: Nystroem(1e-3, 9)(MatrixFreeGaussNewton()(made)), r"sketch of rank 9.*rank"),
        (SubspaceGaussNewton(12), r"kernel of 12 residuals"),
    ],
)
def test_large_matrices_are_refused_before_they_are_made(make, message):
    made = poisson(network(2, 8, 1), n=17).linearize()
    with pytest.raises(NotEnoughMemoryError, match=message):
        make(made)


@pytest.mark.usefixtures("_little")
def test_a_large_factorization_is_refused():
    dense = DenseLinearOperator(torch.eye(9), [(9,)])
    blocks = DenseBlockDiagonalLinearOperator([dense.matrix], [Block("a", 0, None, 3, 3)], [(3, 3)])
    for operator in (dense, blocks):
        for inverse in (Damped(1e-3), PseudoInverse()):
            with pytest.raises(NotEnoughMemoryError, match=r"factorization .* of 9 param.*KFAC"):
                inverse(operator)


def test_a_million_residuals_are_refused_at_once():
    """Of points that are repeated, which take no memory; nothing is computed at them."""
    model = network(2, 8, 1)
    made = poisson(model)
    points = [x[:1].expand(600_000, -1) for x in made.points]
    many = Objective(model, made.terms, points, chunk_size=100)
    with pytest.raises(NotEnoughMemoryError, match=r"1,200,000 residuals with .* takes 34\.6 TB"):
        Woodbury(1e-3)(MatrixFreeGaussNewton()(many.linearize()))


# --- what is free ---------------------------------------------------------------------------------


def test_free_memory_is_some_of_what_there_is():
    free = free_memory(CPU)
    assert free is not None
    assert 10**6 < free < 10**14


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/job", "", ("memory.max", "memory.current", "inactive_file")),
        (
            "4:cpu,memory:/job",
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_limits_of_control_groups_count(line, folder, names, tmp_path, monkeypatch):
    """That of a group around the process's own, less what is used but for dropped files."""
    membership, meminfo = tmp_path / "cgroup", tmp_path / "meminfo"
    membership.write_text(f"1:name=systemd:/\n{line}\n")
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:   5000 kB\n")
    monkeypatch.setattr(memory, "_MEMBERSHIP", membership)
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    assert free_memory(CPU) == 5000 * 1024
    own = tmp_path / folder / "job"
    own.mkdir(parents=True)
    limit, used, cache = names
    for where, most in ((own, "max"), (own.parent, "4000")):
        (where / limit).write_text(f"{most}\n")
        (where / used).write_text("3000\n")
        (where / "memory.stat").write_text(f"anon 2500\n{cache} 500\n")
    assert free_memory(CPU) == 1500
    (own.parent / limit).write_text("max\n")
    assert free_memory(CPU) == 5000 * 1024


# --- chunks ---------------------------------------------------------------------------------------


def test_a_chunk_size_is_picked_from_what_is_free(monkeypatch, caplog):
    """Z and G of 3 points' inputs and outputs: 4 channels of widths 2, 8, 8, 1, and a residual."""
    model = network(2, 8, 1)
    made = poisson(model, n=40)
    terms, points = made.terms, made.points
    fitting = "pinncurv.linearization.footprint.free_memory"
    monkeypatch.setattr(fitting, lambda device: 10**9)
    assert Objective(model, terms, points, chunk_size="auto").chunk_size is None
    monkeypatch.setattr(fitting, lambda device: None)
    assert Objective(model, terms, points, chunk_size="auto").chunk_size is None
    numbers = 4 * (2 + 8 + 8 + 1) + 1
    monkeypatch.setattr(fitting, lambda device: 3.5 * 4 * 8 * numbers)
    with caplog.at_level("INFO", "pinncurv"):
        picked = Objective(model, terms, points, chunk_size="auto")
    assert picked.chunk_size == 3
    assert "chunk_size='auto' picked 3" in caplog.text
    few = [len(chunk.residual) for chunk in picked.linearize()[0]]
    assert max(few) == 3
    torch.testing.assert_close(picked.linearize().gradient(), made.linearize().gradient())
    assert picked.resampled(torch.Generator()).chunk_size == 3


@pytest.mark.usefixtures("shapes_unchecked")
def test_other_words_are_refused():
    model = network(2, 8, 1)
    made = poisson(model)
    with pytest.raises(ValueError, match="None or 'auto', got 'all'"):
        Objective(model, made.terms, made.points, chunk_size="all")
