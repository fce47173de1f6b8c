"""Published runs, followed from where they started. Losses and errors are those published.

Source: the recorded runs of arXiv 2405.15603, poisson2d with 257 parameters.
"""

import math
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from experiments import reproduce
from experiments.command import run_program
from experiments.objects import UserError
from experiments.presets import PRESETS
from experiments.reporting import followed
from experiments.reporting.followed import FOLLOWED, KEY, summary
from experiments.reproduce import PublishedStart, drawn, follow, keep
from pinncurv.problems import Box, Drawn, Faces, Interior

ROW = "poisson2d_257"
FILE = Path(__file__)  # stands for the published curves
DIFFERS = {"loss_differs": 0.0, "rmse_differs": 0.0}


def program(*arguments):
    return run_program(lambda: reproduce.main([str(argument) for argument in arguments]))


def published(*lines):
    return pd.DataFrame(lines, columns=["step", "loss", "rmse"])


def publish(monkeypatch, *optimizers):
    """Have the same published curve of some optimizers on every row."""
    curve = published((1, 48.9, 0.376), (3, 48.5, 0.333))
    table = pd.concat(curve.assign(optimizer=name) for name in optimizers)
    monkeypatch.setattr(reproduce, "PUBLISHED", FILE)
    monkeypatch.setattr(reproduce, "curves", lambda row: table)


def test_network_and_points_are_those_of_torch_s_own_stream():
    trainer = PublishedStart(PRESETS[ROW], "adam")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers = nn.Linear(2, 64), nn.Linear(64, 1)
        interior, boundary = torch.rand(900, 2), torch.rand(120, 2)
        axis, side = torch.randint(0, 2, (120,)), torch.randint(0, 2, (120,))
        boundary[torch.arange(120), axis] = side.float()
        evaluation = torch.rand(9000, 2)
    expected = [p.double() for layer in layers for p in layer.parameters()]
    assert all(map(torch.equal, trainer.network.parameters(), expected))
    assert all(map(torch.equal, trainer.objective.points, [interior.double(), boundary.double()]))
    assert torch.equal(trainer._evaluation_points, evaluation.double())
    assert trainer.objective.loss().item() == pytest.approx(48.9, abs=0.05)


@pytest.mark.parametrize(
    ("label", "lines"),
    [
        ("adam", [(1, 48.9, 0.376), (3, 48.5, 0.333), (5, 48.1, 0.309)]),
        ("sgd", [(1, 48.9, 0.53), (3, 41.4, 3.05), (5, 33.0, 4.83)]),
        ("lbfgs", [(1, 48.9, 0.336), (3, 0.278, 0.119), (5, 0.0958, 0.113)]),
        ("hessian_free", [(1, 48.9, 0.359), (3, 48.0, 0.312), (5, 46.3, 0.623)]),
        ("engd", [(1, 48.9, 1.54), (3, 11.3, 0.778), (5, 3.44, 0.269)]),
        ("engd_per_layer", [(1, 48.9, 3.66), (3, 9.63, 0.85), (5, 4.96, 0.504)]),
        ("engd_diagonal", [(1, 48.9, 2.66), (3, 12.6, 0.883), (5, 4.88, 0.714)]),
        ("kfac", [(1, 48.9, 1.71), (3, 11.7, 0.502), (5, 3.17, 0.815)]),
        ("kfac_star", [(1, 48.9, 0.403), (3, 15.8, 0.729), (5, 9.84, 0.667)]),
    ],
)
def test_an_optimizer_takes_the_published_steps(label, lines):
    found = pd.DataFrame(follow(ROW, label, published(*lines), 5, 60))
    assert found["step"].tolist() == [1, 3, 5]
    # three digits, of settings of four
    assert found[["loss_differs", "rmse_differs"]].abs().max(axis=None) < 0.006


def test_points_are_drawn_anew_from_the_same_stream():
    """Of poisson5d with 449 parameters, a new batch in every step."""
    trainer = PublishedStart(PRESETS["poisson5d_449"], "adam")
    stream = torch.Generator().manual_seed(1)
    torch.rand(449, generator=stream)  # the network
    draw_batch(stream)
    torch.rand(30_000, 5, generator=stream)  # the points that errors are measured on
    trainer.advance()
    trainer.advance()
    assert all(map(torch.equal, trainer.objective.points, draw_batch(stream)))


def draw_batch(stream):
    interior, boundary = (torch.rand(n, 5, generator=stream) for n in (3000, 500))
    axis, side = (torch.randint(0, high, (500,), generator=stream) for high in (5, 2))
    boundary[torch.arange(500), axis] = side.float()
    return [interior.double(), boundary.double()]


def test_an_axis_with_time_and_a_box_that_is_not_the_unit_cube():
    box = Box((0.0, -5.0), (1.0, 5.0))
    stream = torch.Generator().manual_seed(3)
    inner, outer = drawn(Interior(box, 500), stream), drawn(Faces(box, 500), stream)
    assert inner.dtype == torch.float32
    assert bool(((inner >= torch.tensor(box.lower)) & (inner <= torch.tensor(box.upper))).all())
    assert inner[:, 1].min() < -4.5
    on_a_face = (outer == torch.tensor(box.lower)) | (outer == torch.tensor(box.upper))
    assert bool((on_a_face.sum(1) == 1).all())
    with pytest.raises(TypeError, match="must be that of a box, got Drawn"):
        drawn(Drawn(lambda n, generator: torch.rand(n, 2), 2, 5), stream)


def test_how_far_a_run_is_followed():
    steps = [1, 3, 5, 9]
    differs = {"good": [0.0, 0.01, -0.01, 0.0], "late": [0.0, 0.01, -0.5, 0.0], "bad": [1.0] * 4}
    table = pd.concat(
        pd.DataFrame(
            {"row": ROW, "optimizer": name, "step": steps, "loss_differs": d, "rmse_differs": 0.0}
        )
        for name, d in differs.items()
    )
    table.iloc[-1, table.columns.get_loc("rmse_differs")] = 0.3
    lines = summary(table).set_index("optimizer")
    assert lines["agrees"].to_dict() == {"good": 9, "late": 3, "bad": 0}
    assert lines["differs"].to_dict() == {"good": 0.01, "late": 0.5, "bad": 1.0}
    assert lines["ratio"].to_dict() == {"good": 1.0, "late": 1.0, "bad": 1.3}
    page = followed.table(
        lines.reset_index().replace({"good": "kfac", "late": "engd", "bad": "sgd"})
    )
    assert "| poisson2d, 257 | 9 | 3 of 9 | 0 of 9 |" in page.markdown()
    tallies = followed.tallies(lines.reset_index())
    assert [tallies[f"tally/followed-{k}"] for k in ("left", "left-ratio", "left-met")] == [
        "2",
        "1.15",
        "1",
    ]
    assert tallies["tally/followed-whole"] == "1"
    table.loc[table["optimizer"] == "good", "rmse_differs"] = math.inf  # of one that diverged
    assert summary(table).set_index("optimizer")["agrees"]["good"] == 0


def test_what_is_followed_again_takes_the_place_of_what_was(tmp_path):
    for optimizer, loss in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        line = {"row": ROW, "optimizer": optimizer, "step": 1, "commit": "12345678"}
        line |= {"loss": loss, "rmse": 1.0} | DIFFERS
        keep(pd.DataFrame([line]), tmp_path)
    kept = pd.read_csv(tmp_path / FOLLOWED, dtype={"commit": str})
    assert dict(zip(kept["optimizer"], kept["loss"], strict=True)) == {"a": 3.0, "b": 2.0}


def test_fewer_steps_leave_the_later_ones_as_they_were(tmp_path):
    for steps, commit in ((5, "aaaaaaaa"), (3, "bbbbbbbb")):
        line = {"row": ROW, "optimizer": "a", "loss": 1.0, "rmse": 1.0, "commit": commit} | DIFFERS
        keep(pd.DataFrame([{**line, "step": s} for s in range(1, steps + 1, 2)]), tmp_path)
    kept = pd.read_csv(tmp_path / FOLLOWED).set_index("step")["commit"]
    assert kept.to_dict() == {1: "bbbbbbbb", 3: "bbbbbbbb", 5: "aaaaaaaa"}


def test_the_program(tmp_path, monkeypatch, capsys):
    publish(monkeypatch, "adam")
    assert program(ROW, "--steps", 3, "--store", tmp_path) == 0
    words = capsys.readouterr().out
    assert (
        "adam: agrees with the published run up to step 3 of 3, and to 0.1% up to step 3" in words
    )
    kept = pd.read_csv(tmp_path / FOLLOWED)
    assert kept["step"].tolist() == [1, 3]
    assert {"commit", "torch", "threads"} <= set(kept)


def test_what_was_followed_up_to_a_failure_is_kept(tmp_path, monkeypatch, capsys):
    publish(monkeypatch, "adam", "sgd")

    def failing(row, label, *_):
        yield {**dict(zip(KEY, (row, label, 1), strict=True)), "loss": 1.0, "rmse": 1.0} | DIFFERS
        if label == "adam":
            raise UserError("no more")

    monkeypatch.setattr(reproduce, "follow", failing)
    assert program(ROW, "--store", tmp_path) == 1
    assert "adam: stopped: no more" in capsys.readouterr().out
    assert pd.read_csv(tmp_path / FOLLOWED)["optimizer"].tolist() == ["adam", "sgd"]


@pytest.mark.parametrize("optimizers", [("adam", "sgd"), ("adam",)])
def test_what_was_followed_up_to_an_interruption_is_kept(optimizers, tmp_path, monkeypatch):
    """Also if no other run would have come."""
    publish(monkeypatch, *optimizers)

    def interrupted(row, label, published, steps, seconds, stopped):
        for step in (1, 3, 5):
            if stopped():
                return
            key = dict(zip(KEY, (row, label, step), strict=True))
            yield {**key, "loss": 1.0, "rmse": 1.0} | DIFFERS
            if step == 3:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(reproduce, "follow", interrupted)
    assert program(ROW, "--store", tmp_path) == 130
    kept = pd.read_csv(tmp_path / FOLLOWED)
    assert kept[["optimizer", "step"]].to_numpy().tolist() == [["adam", 1], ["adam", 3]]


def test_no_step_is_taken_after_a_stop():
    asked = iter([False, False, True])
    curve = published((1, 48.9, 0.376), (3, 48.5, 0.333))
    found = list(follow(ROW, "adam", curve, 9, 60, lambda: next(asked)))
    assert [line["step"] for line in found] == [1]


@pytest.mark.parametrize("content", ["", "row,optimizer\n", "a,b\nc\n", "row,optimizer,step"])
def test_a_store_that_is_none_is_refused_before_anything_is_followed(content, tmp_path, capsys):
    (tmp_path / FOLLOWED).write_text(content)
    assert program(ROW, "--store", tmp_path) == 2
    assert FOLLOWED in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["poisson2d_1"], "must be some of poisson2d_257"),
        ([ROW, "--optimizers", "adma"], "There is no optimizer 'adma'. Perhaps you meant adam"),
        ([ROW, "--steps", "0"], "--steps must be positive, got 0"),
        ([ROW, "--seconds", "nan"], "--seconds must be positive, got nan"),
        ([ROW, "--optimizers", "auto"], "No run of these was published"),
    ],
)
def test_what_is_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "PUBLISHED", FILE)
    monkeypatch.setattr(reproduce, "curves", lambda row: published().assign(optimizer="adam"))
    assert program(*arguments, "--store", tmp_path) == 2
    assert message in capsys.readouterr().err
    monkeypatch.setattr(reproduce, "PUBLISHED", tmp_path / "none.csv")
    assert program(ROW, "--store", tmp_path) == 2
    assert "The published curves are not here: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_first_update_is_withheld_and_remembered():
    trainer = PublishedStart(PRESETS[ROW], "kfac_star")
    trainer.optimizer.step_size = reproduce.FirstWithheld()
    before = [p.detach().clone() for p in trainer.network.parameters()]
    trainer.advance()
    after = list(trainer.network.parameters())
    assert all(torch.allclose(a, b, rtol=0, atol=1e-10) for a, b in zip(after, before, strict=True))
    record = trainer.advance()
    assert abs(record.momentum) > 1e10
    assert record.new_loss < record.loss
