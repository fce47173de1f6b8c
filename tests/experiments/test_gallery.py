"""The page of the gallery: trained, continued, and made anew from run folders."""

import re

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from experiments import catalog, figures, gallery
from experiments.command import run_program
from experiments.exhibits import EXHIBITS, Exhibit, Published
from experiments.experiment import Experiment
from experiments.objects import UserError
from pinncurv.problems import Fixed, Problem, poisson2d
from tests.experiments.runs import column

TINY = {"network.widths": "(4,)", "problem.n_interior": "12", "problem.n_boundary": "6"}
PUBLISHED = Published(1.5e-13, "2-4-1 (17)", "10 s, a GPU", "arXiv 0000.00000")


@pytest.fixture
def _tiny(monkeypatch):
    exhibits = {
        "tiny": Exhibit(Experiment("poisson2d", settings=TINY), "rmse", PUBLISHED, "Mind the gap."),
        "slice": Exhibit(Experiment("heat4d", settings=TINY), axes=(0, 3)),
    }
    for name, exhibit in exhibits.items():
        monkeypatch.setitem(EXHIBITS, name, exhibit)


def program(*arguments):
    return run_program(lambda: gallery.main([str(argument) for argument in arguments]))


@pytest.mark.parametrize("name", EXHIBITS)
def test_every_exhibit_can_be_built(name):
    exhibit = EXHIBITS[name]
    experiment = exhibit.experiment.checked()
    problem = experiment.build_problem()
    model = experiment.build_network(problem, 1)
    points = problem.evaluation.sample(torch.Generator().manual_seed(0), torch.float64, "cpu")
    assert model(points).shape == (len(points), problem.d_out)
    assert max(exhibit.axes) < problem.d_in
    assert exhibit.component < problem.d_out
    if exhibit.published:
        count = sum(p.numel() for p in model.parameters())
        assert f"({count:,})" in exhibit.published.network or exhibit.note


@pytest.mark.usefixtures("_tiny", "_no_figure")
def test_a_page_is_made_continued_and_made_anew(tmp_path, capsys):
    runs, page = tmp_path / "runs", tmp_path / "paper/gallery.md"
    common = ["--optimizers", "kfac_star", "adam", "--seeds", 1, 2, "--output", page]
    problems = ["--problems", "tiny", "slice"]
    assert program(*problems, *common, "--runs", runs, "--steps", 3) == 0
    text = page.read_text()
    errors = {
        name: sorted(column(runs / "tiny", name, "rmse", seed)[-1] for seed in (1, 2))
        for name in ("kfac_star", "adam")
    }
    best = min(errors, key=lambda name: sum(errors[name]))
    for name, (low, high) in errors.items():
        numbers = (f"{error:.1e}" for error in (low, (low + high) / 2, high))
        least, middle, most = (re.sub(r"e[+]?(-?)0", r"e\1", number) for number in numbers)
        assert f"| {name} | {middle} | {least} to {most} |" in text
        assert (f"**{middle}**" in text) == (name == best)
    assert "| published (arXiv 0000.00000), 2-4-1 (17) | 1.5e-13 | | | | 10 s, a GPU |" in text
    assert "[tiny](#tiny) | 17 |" in text
    assert "-Δu = 2 π² sin(πx₁) sin(πx₂)" in text
    assert "Mind the gap." in text
    assert "mlp(n_interior=12, n_boundary=6, widths=(4,)), 17 parameters, float64" in text
    pictures = re.findall(r"!\[\w+\]\((.*)\)", text)
    assert pictures == ["figures/gallery_tiny.png", "figures/gallery_slice.png"]
    for picture in pictures:
        assert 5_000 < (page.parent / picture).stat().st_size <= figures.MOST_BYTES

    assert program(*problems[:2], *common, "--runs", runs, "--steps", 5) == 0
    assert column(runs / "tiny", "adam", "step", 2) == [0, 1, 2, 3, 4, 5]
    page.unlink()
    before = (runs / "tiny/adam/seed1/metrics.csv").read_bytes()
    assert program(*problems[:2], "--from", runs, "--output", page) == 0
    assert "| 5 | 0 s |" in page.read_text()
    assert (runs / "tiny/adam/seed1/metrics.csv").read_bytes() == before


@pytest.mark.usefixtures("_tiny", "_no_figure")
def test_a_problem_that_cannot_be_trained_leaves_the_others(tmp_path, monkeypatch, capsys):
    bad = Exhibit(Experiment("poisson2d", settings={"network.widths": "(0,)"}))
    monkeypatch.setitem(EXHIBITS, "bad", bad)
    arguments = ["--runs", tmp_path, "--output", tmp_path / "page.md", "--steps", 1]
    assert program("--problems", "bad", "tiny", "--optimizers", "adam", *arguments) == 1
    assert "bad: mlp: widths must be positive" in capsys.readouterr().err
    text = (tmp_path / "page.md").read_text()
    assert "## tiny" in text
    assert "## bad" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problems", "poison2d"], "no 'poison2d'. Perhaps you meant poisson2d"),
        (["--from", "nowhere"], "nowhere has no run folder of poisson2d"),
    ],
)
def test_what_is_refused(arguments, message, capsys, tmp_path):
    assert program(*arguments, "--output", tmp_path / "page.md") == 2
    assert message in capsys.readouterr().err


def test_the_plane_around_a_domain_that_is_no_box_stays_white():
    x = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(0)).double()
    disc = Fixed(x[(x - 0.5).square().sum(1).sqrt() < 0.4])
    problem = Problem("disc", poisson2d().terms, 2, disc)
    extent, points, outside = gallery._plane(problem, torch.zeros(1).double(), (0, 1))
    assert extent == pytest.approx((0.1, 0.9, 0.1, 0.9), abs=1e-2)
    radius = (points - 0.5).square().sum(1).sqrt()
    assert not outside[radius < 0.4].any()
    assert outside[radius > 0.42].all()


def test_a_figure_that_does_not_fit_gets_fewer_dots_and_colours(tmp_path, monkeypatch):
    noise = torch.rand(300, 300, generator=torch.Generator().manual_seed(0))
    figure = Figure(figsize=(2.5, 2.5))
    figure.subplots().imshow(noise.numpy())
    sizes = []
    for most in (200_000, 30_000):
        monkeypatch.setattr(figures, "MOST_BYTES", most)
        figures.save_small(figure, tmp_path / "noise.png")
        with Image.open(tmp_path / "noise.png") as picture:
            sizes.append(picture.size[0])
        assert (tmp_path / "noise.png").stat().st_size <= most
    assert sizes[0] > sizes[1]
    monkeypatch.setattr(figures, "MOST_BYTES", 100)
    with pytest.raises(UserError, match="must have at most 100 bytes, got"):
        figures.save_small(figure, tmp_path / "noise.png")


def test_the_optimizers_of_the_gallery_have_names():
    assert set(gallery.OPTIMIZERS) <= {*catalog.OPTIMIZERS, "auto"}
