"""The benchmark: one tiny run of each mode, floors against counted products, verdicts, errors."""

import dataclasses
import json
import math
import operator
import warnings
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev, vmap
from torch.utils.flop_counter import FlopCounterMode

from experiments import benchmark
from experiments.benchmarking import counting, figures, floors, processes, turns
from experiments.benchmarking.sizes import SIZES, build_network
from experiments.command import run_program
from pinncurv.curvature import Objective
from pinncurv.machine import NotCompiled

NESTED = [name for name in SIZES if name not in ("extra", "k1200", "k3500")]
ONE = ["--sizes", "tiny", "--threads", "1"]


def program(*arguments: str) -> int:
    """Run the program in this process, as the script does; its workers are processes."""
    return run_program(lambda: benchmark.main(arguments))


@pytest.fixture
def _few_points(monkeypatch):
    for name, size in SIZES.items():
        few = dataclasses.replace(size, n_interior=6, n_boundary=4, iterations=1)
        monkeypatch.setitem(SIZES, name, few)


# --- runs -----------------------------------------------------------------------------------------


def test_a_round(tmp_path, capsys):
    file = tmp_path / "results.json"
    options = ["--figures", "kfac_star", "--modes", "eager", "--rounds", "1"]
    assert program(*ONE, *options, "--output", str(file)) == 0
    written = json.loads(file.read_text())
    baseline, step = written["results"]
    assert written["environment"]["threads"] == 1
    assert (baseline["figure"], baseline["ratio"], baseline["floor"]) == ("baseline", 1, None)
    assert (step["size"], step["figure"], step["mode"]) == ("tiny", "kfac_star", "eager")
    assert 0 < step["floor"] < step["milliseconds"]
    assert 0 < step["share"] < 1
    assert 10 < step["megabytes"] < 10_000
    printed, progress = capsys.readouterr()
    assert f"{step['milliseconds']:.2f}" in printed
    assert "tiny: kfac_star eager" in progress


def test_counts(tmp_path, capsys):
    file = tmp_path / "counts.json"
    options = ["--count", "--figures", "gradient", "--modes", "eager", "--output", str(file)]
    assert program(*ONE, *options) == 0
    (row,) = json.loads(file.read_text())["results"]
    assert row["calls"] > row["products"] > 0
    assert (row["launches"], row["synchronizations"]) == (0, 0)
    assert 1 <= row["flops"] / sum(row["needed"].values()) < 1.1
    assert "needs forward 1.00, backward 0.33, gradient 1.00" in capsys.readouterr().out


def test_costs(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "METHODS", {"diagonal": benchmark.METHODS["diagonal"]})
    assert program(*ONE, "--costs") == 0
    table = capsys.readouterr().out
    assert "| 2-8-1: D = 33 | build ms | solve ms | MB |\n|:--|--:|--:|--:|\n| diagonal | " in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0."),
        (["--threads", "-1"], "--threads must be at least 1, got -1."),
        (["--sizes", "h", "--costs"], "--costs needs sizes of ['b', 'm', 's', 'tiny'], got ['h']"),
        (["--against", "/"], "--against must be a checkout with src/pinncurv, got /."),
        (["--sizes", "m", "--figures", "spring"], "--figures must name one that is measured"),
        (["--output", "/no/folder.json"], "--output: cannot write /no/folder.json"),
    ],
)
def test_refusals(arguments, message, capsys):
    assert program(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    assert program("--device", "cuda") == 2
    assert "--device must be cpu where there is no GPU, got cuda." in capsys.readouterr().err


@pytest.mark.parametrize("two", [["--count", "--costs"], ["--count", "--against", "."]])
def test_one_mode_at_a_time(two, capsys):
    with pytest.raises(SystemExit):
        program(*two)
    assert "not allowed with argument" in capsys.readouterr().err


# --- what is measured -----------------------------------------------------------------------------


@pytest.mark.usefixtures("_few_points")
@pytest.mark.parametrize("name", NESTED)
def test_baseline_differentiates_the_same_loss(name):
    expected = figures.build("gradient", name)()
    _, received = figures.build("baseline", name)()
    for one, other in zip(received, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("_few_points")
def test_baseline_of_the_kernel():
    model, size = build_network(SIZES["k1200"].widths), SIZES["k1200"]
    parameters, (interior, boundary) = dict(model.named_parameters()), size.sample()[1]

    def u(parameters, x):
        return functional_call(model, parameters, (x,)).squeeze()

    def laplacian(parameters, x):
        return -hessian(u, argnums=1)(parameters, x).trace()

    rows = [
        vmap(jacrev(residual), (None, 0))(parameters, x)
        for residual, x in ((laplacian, interior), (u, boundary))
    ]
    parts = [torch.cat([r[key].flatten(1) for key in parameters], 1) for r in rows]
    J = torch.cat([part / math.sqrt(len(part)) for part in parts])
    torch.testing.assert_close(figures.build("baseline", "k1200")(), J @ J.mT, rtol=1e-9, atol=0)


@pytest.mark.usefixtures("_few_points")
@pytest.mark.parametrize(
    ("figure", "name"),
    [
        ("kfac_star", "extra"),
        ("kfac_star_chunked", "h"),
        ("spring", "k3500"),
        ("baseline", "extra"),
    ],
)
def test_a_figure_is_a_step(figure, name):
    record = figures.build(figure, name)()
    assert record.new_loss <= record.loss


@pytest.mark.usefixtures("_few_points")
def test_compiled_figures_compile(monkeypatch):
    class Compiling(Objective):
        def __init__(self, model, terms, points, chunk_size=None, compile=False):
            super().__init__(model, terms, points, chunk_size)
            asked.append(compile)

    class Plain(Objective):
        def __init__(self, model, terms, points, chunk_size=None):
            super().__init__(model, terms, points, chunk_size)

    asked = []
    monkeypatch.setattr(figures, "Objective", Compiling)
    figures.build("gradient", "tiny", compiled=True)
    figures.build("gradient", "tiny")
    assert asked == [True, False]
    monkeypatch.setattr(figures, "Objective", Plain)
    with pytest.raises(NotImplementedError, match="Objective has no argument compile"):
        figures.build("gradient", "tiny", compiled=True)


@pytest.mark.parametrize("targets", [figures._CPU, figures._CUDA])
def test_targets_are_of_what_is_measured(targets):
    assert all(name in figures.FIGURES[figure] for figure, name in targets)


def test_verdicts():
    assert list(figures.verdict("ratio", 1.3, 1.3)) == ["ratio 1.300: target 1.3 met"]
    assert list(figures.verdict("MB", 501.0, 500.0)) == ["MB 501.000: target 500 MISSED"]
    assert list(figures.verdict("ratio", 9.0, None)) == []
    assert figures.target("kfac_star", "s", "cpu").compiled == 1.8
    assert figures.target("kfac_star", "s", "cuda") == figures.Target(over_eager=0.2)
    assert figures.target("gradient", "kdv", "cpu") == figures.Target()


# --- floors ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_few_points")
@pytest.mark.parametrize("name", SIZES)
def test_sizes_say_what_they_are(name):
    size = SIZES[name]
    model = build_network(size.widths)
    problem, batch = size.sample()
    made = Objective(model, problem.terms, batch).linearize()
    shapes = [tuple(term.blocks["0.weight"].gradients.shape) for term in made]
    assert shapes == [(1, S, N, size.widths[1]) for N, S in size.terms]
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.residuals == sum(len(x) for x in batch)


@pytest.mark.parametrize("name", ["tiny", "m", "h"])
def test_passes_are_what_torch_counts(name):
    size = SIZES[name]
    layers = [nn.Linear(d_in, d_out) for d_in, d_out in size.layers]
    network = nn.Sequential(*layers).to("meta")
    x = torch.empty(sum(N * S for N, S in size.terms), size.widths[0], device="meta")
    with FlopCounterMode(display=False) as forward:
        loss = network(x).sum()
    with FlopCounterMode(display=False) as rest:
        torch.autograd.grad(loss, list(network.parameters()))
    work = floors.needed("gradient", size)
    assert floors.forward(size) == work.flops["forward"] == forward.get_total_flops()
    assert work.flops["backward"] + work.flops["gradient"] == rest.get_total_flops()
    assert work.total == forward.get_total_flops() + rest.get_total_flops()
    assert work.eigen == {}


def test_factors_are_half_of_what_torch_counts():
    size = SIZES["b"]
    with FlopCounterMode(display=False) as counter:
        for N, S in size.terms:
            for width in (width for layer in size.layers for width in layer):
                rows = torch.empty(N * S, width, device="meta")
                rows.mT @ rows
    work = floors.needed("kfac_star", size)
    assert work.flops["factors"] == counter.get_total_flops() / 2
    assert work.eigen == {3: 1, 256: 2, 257: 2, 128: 2, 129: 2}
    assert work.flops["quadratic model"] == 2 * floors.forward(size)
    chunked = floors.needed("kfac_star_chunked", size)
    again = work.flops["forward"] + work.flops["backward"]
    assert chunked.total == work.total + again


def test_kernel_takes_the_cheaper_way():
    size = dataclasses.replace(SIZES["tiny"], widths=(2, 3, 1), n_interior=10, n_boundary=6)
    # pairs of the interior, of both, of the boundary; rows 3·3 or channels 6 S S', and 4 or 5 S S'
    assert floors.kernel(size) == 2 * (50 * (9 + 4) + 60 * (9 + 4) + 18 * (6 + 4))
    assert floors.needed("spring", size).flops["Cholesky"] == 16**3 / 3


@pytest.mark.parametrize("boundary", [10, 100])
def test_gauss_newton_is_on_the_cheaper_side(boundary):
    size = dataclasses.replace(SIZES["tiny"], n_interior=10, n_boundary=boundary)
    R, D, n = 10 + boundary, 33, min(10 + boundary, 33)
    work = floors.needed("gauss_newton", size)
    assert work.flops["JᵀJ or JJᵀ"] == R * D * n
    assert work.flops["Cholesky"] == n**3 / 3


def test_floor_is_work_at_the_rates():
    work = floors.Work({"forward": 3e9, "gradient": 1e9}, {3: 2, 5: 1})
    assert work.seconds(2e9, {3: 0.1, 5: 0.25}) == pytest.approx(2 + 0.2 + 0.25)
    assert floors.needed("baseline", SIZES["m"]) is None


def test_rates_are_positive_and_the_shapes_are_those_of_a_step():
    assert floors.product_shape(SIZES["h"], of_kernel=False) == (21_000, 256, 256)
    assert floors.product_shape(SIZES["k1200"], of_kernel=True) == (1024, 2048, 1024)
    assert 1e7 < floors.measure_product((64, 64, 64), "cpu") < 1e14
    assert 0 < floors.measure_eigen(5, "cpu") < 1


# --- counts ---------------------------------------------------------------------------------------


def test_events():
    def event(name, parent=None):
        return SimpleNamespace(name=name, cpu_parent=parent)

    engine = event("autograd::engine::evaluate_function: MmBackward0")
    product, alone = event("aten::matmul"), event("aten::mv", engine)
    events = [
        *(engine, product, event("aten::mm", product), alone, event("aten::addmv_", alone)),
        *(event("aten::add"), event("cudaLaunchKernel"), event("cuLaunchKernelEx")),
        *(event("cudaGraphLaunch"), event("cudaMemcpyAsync"), event("cudaStreamSynchronize")),
        *(event("cudaEventSynchronize"), event("cudaDeviceSynchronize")),  # the profiler's own
    ]
    assert counting.count_events(events) == counting.Counts(3, 2, 3, 2)
    assert counting.count_events([]) == counting.Counts(0, 0, 0, 0)


def test_reads_of_values():
    x = torch.tensor(2)
    with counting.counted_reads() as reads:
        values = [float(x), int(x), bool(x), operator.index(x), x.item(), x.tolist()]
        x.numpy()
        (x + x).sum()
    assert values == [2, 2, True, 2, 2, 2]
    assert reads == ["__float__", "__int__", "__bool__", "__index__", "item", "tolist", "numpy"]
    float(x)
    assert len(reads) == 7  # all is as it was


def test_flops_of_products():
    A, B, v = torch.ones(3, 4), torch.ones(4, 5), torch.ones(4)
    batch, C = torch.ones(2, 3, 4), torch.zeros(3, 5)
    with counting.ProductFlops() as flops:
        A @ B
        C.addmm_(A, B)
        torch.addmm(C, A, B)
        batch @ torch.ones(2, 4, 5)
        A @ v
        torch.nn.functional.linear(A, B.t())
        A + A
    assert flops.total == 2 * 60 + 2 * 60 + 2 * 60 + 4 * 60 + 2 * 12 + 2 * 60


def test_counts_of_work():
    def work():
        return (torch.ones(3, 4) @ torch.ones(4, 5)).sum().item()

    counts = counting.count(work, "cpu", compiled=False)
    assert (counts["products"], counts["reads"], counts["flops"]) == (1, 1, 2 * 60)
    assert "flops" not in counting.count(work, "cpu", compiled=True)


# --- turns ----------------------------------------------------------------------------------------


class FakeWorker:
    """Takes as long as its figure says, times 1, 2, ... by turn, and fails where it should."""

    SECONDS: ClassVar = {"baseline": 1.0, "gradient": 0.5, "kfac_star": 2.0}
    ended = 0

    def __init__(self, job, root):
        self.job, self.count, self.old = job, 0, root != processes.HERE
        if self.old and job.figure == "kfac_star":
            raise ChildProcessError("Traceback\nAttributeError: no kfac_star")
        if job.compiled and job.figure == "kfac_star":
            raise ChildProcessError("NotImplementedError: no compiler")
        self.about = {"ready": 1.0, "warnings": ["it is late"]}

    def turn(self):
        self.count += 1
        if self.job.kind == "machine":
            sizes = {str(n): 1e-3 for n in floors.needed("kfac_star", SIZES["tiny"]).eigen}
            return {"rate": 1e6 / self.count, "eigen": sizes}
        factor = self.count * (2 if self.old else 1) * (0.5 if self.job.compiled else 1)
        return {"seconds": self.SECONDS[self.job.figure] * factor, "megabytes": 100.0}

    def end(self):
        type(self).ended += 1


@pytest.fixture
def rows(monkeypatch, tmp_path):
    monkeypatch.setattr(turns, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "ended", 0)
    chosen = [(f, compiled) for compiled in (False, True) for f in ("gradient", "kfac_star")]
    setting = turns.Setting(rounds=2, against=tmp_path)
    return {(row.figure, row.mode): row for row in turns.measure_size("tiny", chosen, setting)}


def test_ratios_are_within_turns(rows):
    assert next(iter(rows)) == ("baseline", "eager")
    ratios = {key: row.ratio for key, row in rows.items()}
    assert ratios["gradient", "eager"] == ratios["baseline", "eager"] / 2 == 0.5
    assert (ratios["gradient", "compiled"], ratios["kfac_star", "eager"]) == (0.25, 2.0)
    assert rows["gradient", "eager"].milliseconds == 1e3 * 0.5 * 3  # the median of five turns
    work = floors.needed("gradient", SIZES["tiny"]).total
    assert rows["gradient", "eager"].floor == pytest.approx(1e3 * 3 * work / 1e6)
    assert rows["gradient", "eager"].share == pytest.approx(work / 1e6 / 0.5)
    assert rows["gradient", "compiled"].share == pytest.approx(work / 1e6 / 0.25)


def test_the_other_checkout(rows):
    row = rows["gradient", "eager"]
    assert (row.over_old, row.old_milliseconds, row.old_megabytes) == (0.5, 3000, 100)
    assert row.verdicts == (
        "new / old 0.500: target 1.03 met",
        "MB new / old 1.000: target 1.03 met",
    )
    assert rows["kfac_star", "eager"].missing_old == "no kfac_star"
    assert "old 3000.00 ms, 100 MB" in list(benchmark._notes(row))


def test_what_is_missing_is_said_and_every_process_ended(rows, capsys):
    row = rows["kfac_star", "compiled"]
    assert (row.missing, row.milliseconds) == ("no compiler", None)
    assert "not available" in benchmark._cell(row)
    assert list(benchmark._notes(row)) == ["no compiler"]
    assert FakeWorker.ended == 2 * (1 + 3 * 2 + 1)  # machine; baseline, gradients; a step


def test_warnings_of_a_process_are_shown(monkeypatch, capsys):
    monkeypatch.setattr(turns, "Worker", FakeWorker)
    turns.measure_size("tiny", [("gradient", True)], turns.Setting(rounds=1))
    assert "tiny: gradient compiled warns: it is late" in capsys.readouterr().err


def test_an_eager_figure_must_not_be_missing(monkeypatch):
    def refuse(job, root):
        raise ChildProcessError("ValueError: broken")

    monkeypatch.setattr(turns, "Worker", refuse)
    with pytest.raises(ChildProcessError, match="broken"):
        turns.measure_size("tiny", [("gradient", False)], turns.Setting(rounds=1))


def test_what_is_not_compiled_is_not_measured_as_compiled():
    with warnings.catch_warnings(record=True, action="always") as caught:
        warnings.warn("a step is slow", UserWarning, stacklevel=1)
        processes.check_compiled(caught)
        warnings.warn("no compiler is found", NotCompiled, stacklevel=1)
    with pytest.raises(RuntimeError, match="no compiler is found"):
        processes.check_compiled(caught)


def test_a_process_that_ends_says_why():
    with pytest.raises(ChildProcessError, match="KeyError: 'no such size'"):
        processes.Worker(processes.Job("time", "gradient", "no such size"))
