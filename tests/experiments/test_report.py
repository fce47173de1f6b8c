"""The report: its tables have the numbers of the store, and it is made of what there is."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from experiments import report
from experiments.command import run_program
from experiments.presets import PRESETS, ROWS
from experiments.reporting import published
from experiments.reporting.macros import numbers, used
from experiments.reporting.quotes import QUOTES, Quote
from experiments.reporting.tables import (
    NAMES,
    ablation_tables,
    cost_table,
    medians,
    other_tables,
    row_table,
    short_trainings,
    summary_table,
    time_budgets,
    with_published_at_equal,
)
from experiments.reporting.typeset import Column, Table, count, error, in_formula, latex, text
from experiments.store import Store, identity

ROW = "poisson2d_9873"
REFUSED = "NotEnoughMemoryError: J of 9 x 9 numbers must fit into the memory"


def program(*arguments):
    return run_program(lambda: report.main([str(argument) for argument in arguments]))


def trained(study, optimizer, errors, steps=100, budget="60 s", outcome="finished"):
    """Return trainings of seeds 1, 2, ..., whose errors fall as one over the steps."""
    trainings, curves = [], []
    for seed, rmse in enumerate(errors, 1):
        key = {"study": study, "optimizer": optimizer, "budget": budget, "seed": seed}
        cost = {"step": steps, "seconds": 60.0, "ms_per_step": 600.0, "memory_mb": 300.0 + seed}
        made = {"device": "CPU", "threads": 1, "torch": "2.13", "commit": "abc"}
        trainings.append(
            {**key, **cost, "rmse": rmse, "relative_error": 2 * rmse, "outcome": outcome, **made}
        )
        for step in sorted({0, 1, 10, steps}):
            last = rmse * steps / step if step else 1.0
            curves.append({**key, "step": step, "seconds": 0.6 * step, "loss": 1.0, "rmse": last})
    return Store(pd.DataFrame(trainings), pd.DataFrame(curves))


@pytest.fixture
def store():
    parts = [
        trained(ROW, "kfac_star", [3e-5, 1e-5, 2e-5], steps=1000),
        trained(ROW, "adam", [4e-2, 5e-2, 6e-2]),
        trained(ROW, "spring", [0.4, 0.4], steps=0, outcome=REFUSED),
        trained("poisson2d_257", "kfac_star", [1e-7, 3e-7], steps=34945, budget="34945 steps"),
        trained("ablations", "default", [1e-5, 3e-5], steps=200),
        trained("ablations", "reduce", [1e-3, 3e-3], steps=50),
    ]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merged(part)
    return merged


@pytest.fixture
def _no_pictures(monkeypatch):
    for name in ("draw_panel", "draw_page"):
        monkeypatch.setattr(report, name, lambda path, *_, **__: path.touch())


@pytest.fixture
def _no_curves(monkeypatch):
    monkeypatch.setattr(published, "published_curves", lambda *_: None)


@pytest.fixture
def _curves(monkeypatch):
    """Have published curves of KFAC* on every row, 1 / k after the first k = 1,000 steps."""
    steps = [1, 10, 1000]
    curve = {"optimizer": "kfac_star", "step": steps, "seconds": [1.0 * s for s in steps]}
    table = pd.DataFrame({**curve, "loss": 1.0, "rmse": [1.0, 0.1, 1e-3], "search": "random"})
    monkeypatch.setattr(published, "published_curves", lambda *_: table)


def test_a_row_has_the_numbers_of_the_store_and_the_published_ones(store):
    table = row_table(store, ROW, "60 s").set_index("optimizer")
    assert set(table.index) == set(PRESETS[ROW].labels)
    ours = table.loc["kfac_star"]
    assert (ours["rmse"], ours["rmse_min"], ours["rmse_max"]) == (2e-5, 1e-5, 3e-5)
    assert (ours["steps"], ours["seeds"], ours["memory_mb"]) == (1000, 3, 303)
    assert ours["relative_error"] == 4e-5
    assert (ours["published_rmse"], ours["published_steps"]) == (7.89e-7, 11568)
    assert (ours["hardware"], ours["source"]) == ("RTX 6000", "arXiv 2405.15603")
    assert table.loc["kfac", "outcome"] == "not trained"
    assert np.isnan(table.loc["kfac", "rmse"])
    assert table.loc["spring", "outcome"] == f"{REFUSED} (seed 1, 2)"
    assert table.loc["spring", "short_outcome"] == "memory"
    assert np.isnan(table.loc["spring", "rmse"])


def test_what_was_interrupted_does_not_count_and_what_diverged_does():
    both = trained(ROW, "adam", [0.1, np.nan, 0.3]).trainings
    numbers = medians(both)
    assert (numbers["rmse"], numbers["rmse_max"]) == (0.3, np.inf)
    both.loc[1, "outcome"] = "interrupted"
    numbers = medians(both)
    assert (numbers["rmse"], numbers["seeds"]) == (0.2, 2)
    assert numbers["outcome"] == "interrupted (seed 2)"


@pytest.mark.usefixtures("_curves")
def test_errors_are_compared_at_equal_steps_and_kept(store, tmp_path, monkeypatch):
    (table,) = with_published_at_equal([row_table(store, ROW, "60 s")], tmp_path)
    ours = table.set_index("optimizer").loc["kfac_star"]
    assert ours["equal_steps"] == 1000
    assert ours["rmse_at_equal"] == pytest.approx(2e-5)
    assert ours["published_at_equal"] == pytest.approx(1e-3)
    kept = (tmp_path / published.AT_STEPS).read_text()
    assert kept == f"row,optimizer,steps,rmse\n{ROW},kfac_star,1000,0.001\n"
    monkeypatch.setattr(published, "published_curves", lambda *_: None)
    (again,) = with_published_at_equal([row_table(store, ROW, "60 s")], tmp_path)
    pd.testing.assert_frame_equal(again, table, rtol=1e-3)
    # other steps than those that are kept: there is no such number, and the kept ones stay
    longer = store.merged(trained(ROW, "kfac_star", [1e-5] * 3, steps=2000))
    (other,) = with_published_at_equal([row_table(longer, ROW, "60 s")], tmp_path)
    assert other["published_at_equal"].isna().all()
    assert (tmp_path / published.AT_STEPS).read_text() == kept


@pytest.mark.usefixtures("_curves")
def test_a_published_curve_ends_where_the_published_run_does():
    curve = published.curves(ROW)
    assert curve["step"].tolist() == [1, 10, 1000, 11568]
    assert curve["rmse"].iloc[-1] == 7.89e-7
    assert published.curves("poisson100d_1325057_bayes").empty  # that was another search
    assert published.interpolated(curve, 100) == pytest.approx(1e-2)
    assert np.isnan(published.interpolated(curve, 20000))
    assert np.isnan(published.interpolated(curve, 0.5))


def test_budgets_other_than_the_one_of_equal_time_have_a_table_of_their_own(store):
    longer = store.merged(trained(ROW, "kfac_star", [1e-6], budget="600 s"))
    assert time_budgets(longer, ROW) == ["60 s", "600 s"]
    assert time_budgets(longer, "poisson2d_257") == []
    first, second = other_tables(longer)
    (other,) = second.to_dict("records")
    assert (other["row"], other["budget"], other["rmse"]) == (ROW, "600 s", 1e-6)
    (line,) = first.to_dict("records")
    assert (line["row"], line["optimizer"], line["steps"]) == ("poisson2d_257", "kfac_star", 34945)
    assert (line["rmse"], line["published_rmse"]) == (2e-7, 1.99e-7)


def test_a_few_seconds_say_what_a_step_takes_and_nothing_else(store):
    large = "poisson10d_118145"
    parts = [
        trained(large, "kfac_star", [0.5], steps=2, budget="5 s"),
        trained(large, "engd", [0.5], steps=0, budget="5 s", outcome=REFUSED),
        trained(ROW, "kfac_star", [0.5], steps=2, budget="5 s"),  # which has others
    ]
    for part in parts:
        store = store.merged(part)
    assert time_budgets(store, large) == []
    assert {table["row"].iloc[0] for table in other_tables(store)} == {"poisson2d_257"}
    short = short_trainings(store)
    assert set(short["study"]) == {large}
    table, columns = cost_table(short, "ms_per_step")
    assert [(column.key, column.title, column.group) for column in columns[1:]] == [
        (large, "118,145", "poisson10d")
    ]
    cells = dict(zip(table["optimizer"], table[large], strict=True))
    assert (cells["kfac_star"], cells["engd"], cells["sgd"]) == ("600", "memory", "not run")


def test_only_runs_of_the_published_steps_are_compared_with_published_ends(store):
    fewer = store.merged(trained("poisson2d_257", "kfac_star", [0.5], steps=5, budget="5 steps"))
    found = numbers(fewer, [], other_tables(fewer), [])
    assert found["final/poisson2d_257/kfac_star"] == r"$2.0\cdot 10^{-7}$"
    assert (found["tally/steps-compared"], found["tally/steps-met"]) == ("1", "0")


def test_the_summary_has_the_best(store):
    (line,) = summary_table([row_table(store, ROW, "60 s")]).to_dict("records")
    assert (line["best_name"], line["best_rmse"], line["kfac_star"]) == ("KFAC*", 2e-5, 2e-5)
    assert (line["first_order_name"], line["first_order"]) == ("Adam", 5e-2)
    assert (line["published_name"], line["published_rmse"]) == ("KFAC*", 7.89e-7)


def test_what_was_trained_with_other_settings_than_today_s_is_left_out(store):
    def with_settings(optimizer, settings, budget):
        part = trained("ablations", optimizer, [1e-3], budget=budget)
        return Store(part.trainings.assign(settings=settings), part.curves)

    today = PRESETS["ablations"].checked()
    bigger = replace(today, settings={**today.settings, "problem.n_interior": "901"})
    both = with_settings("reduce", identity(today, "reduce"), "30 s")
    for label, settings, budget in (
        ("reduce", identity(bigger, "reduce"), "60 s"),
        ("merged", identity(today, "reduce"), "30 s"),
        ("dropped", identity(today, "dropped"), "30 s"),
    ):
        both = both.merged(with_settings(label, settings, budget))
    current, left_out = both.current()
    assert left_out == ["ablations/dropped", "ablations/merged", "ablations/reduce"]
    for table in (current.trainings, current.curves):
        assert set(zip(table["optimizer"], table["budget"], strict=True)) == {("reduce", "30 s")}
    assert current.current()[1] == []
    assert store.current() == (store, [])  # of which no settings are known


def test_an_ablation_is_compared_with_its_default(store):
    (table,) = ablation_tables(store)
    default, variant = table.to_dict("records")
    assert variant["optimizer"] == "reduce"
    assert variant["changes"] == "curvature=KFAC(reduce)"
    assert (default["rmse"], variant["rmse"]) == (2e-5, 2e-3)
    assert variant["equal_steps"] == 50
    assert variant["rmse_at_equal"] == pytest.approx(2e-3)
    assert variant["default_at_equal"] == pytest.approx(8e-5)
    own = store.merged(trained("ablation_sharing", "default", [1e-6]))
    assert next(iter(ablation_tables(own)))["rmse"].iloc[0] == 1e-6


@pytest.mark.usefixtures("_no_pictures", "_no_curves")
def test_what_is_made_without_the_published_curves_and_without_tex(
    store, tmp_path, capsys, monkeypatch
):
    store.write(tmp_path / "store")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    common = ["--store", tmp_path / "store", "--output", tmp_path / "paper"]
    assert program(*common, "--pdf") == 0
    told = capsys.readouterr().out
    assert re.search(r"no PDF: pdflatex and latexmk not found.*\n +apt-get install .*latexmk", told)
    page = (tmp_path / "paper/rows.md").read_text()
    assert "| KFAC* | **2.0e-5** | 1.0e-5 | 3.0e-5 | 4.0e-5 | 1,000 | 60 | 600 | 303 |" in page
    assert f"- SPRING: {REFUSED} (seed 1, 2)" in page
    assert "- *reduce*: `curvature=KFAC(reduce)`" in page
    assert "Not trained for equal time yet: poisson2d_257, " in page
    generated = tmp_path / "paper/report/generated"
    for picture in re.findall(r"!\[.*\]\((.*)\)", page):
        assert (tmp_path / "paper" / picture).is_file()
    assert (tmp_path / "paper/figures/main.png").is_file()
    numbers = (generated / "numbers.tex").read_text()
    assert rf"\csname val@rmse/{ROW}/kfac_star\endcsname{{$2.0\cdot 10^{{-5}}$}}" in numbers
    assert f"\\generatedtable{{row_{ROW}}}" in (generated / "rows.tex").read_text()
    table = pd.read_csv(generated / f"row_{ROW}.csv").set_index("optimizer")
    assert table.loc["adam", "rmse"] == 0.05
    assert not (tmp_path / "store" / published.AT_STEPS).exists()


@pytest.mark.usefixtures("_no_curves")
def test_figures_are_drawn_and_small(store, tmp_path):
    panel = report.row_panel("title", store, row_table(store, ROW, "60 s"), {"adam": "Adam"})
    assert panel.table["optimizer"].unique().tolist() == ["Adam"]
    report.draw_panel(tmp_path / "row.png", panel)
    report.draw_page(tmp_path / "page.png", [panel, panel], one_legend=True)
    assert 5_000 < (tmp_path / "row.png").stat().st_size <= 60_000
    assert (tmp_path / "page.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "has no results of today's presets. Train first"),
        (["--main", "poisson2d_9874"], "got 'poisson2d_9874'.*poisson2d_9873"),
    ],
)
def test_what_is_refused(arguments, message, tmp_path, capsys):
    assert program("--store", tmp_path / "nothing", "--output", tmp_path, *arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_what_cannot_be_written_is_said(store, tmp_path, capsys):
    store.write(tmp_path / "store")
    (tmp_path / "file").touch()
    assert program("--store", tmp_path / "store", "--output", tmp_path / "file") == 2
    assert re.search(r"cannot read or write .*generated: Not a directory", capsys.readouterr().err)


def test_the_text_names_what_there_may_be():
    keys = used(report.SOURCE)
    kinds = (
        "rmse",
        "final",
        "steps",
        "published",
        "published-steps",
        "ms",
        "equal",
        "published-equal",
    )
    for kind, row, label in (k.split("/") for k in keys if k.startswith(kinds)):
        assert kind in kinds
        assert row in ROWS
        assert label in PRESETS[row].labels
    known = {quote.name for quote in QUOTES}
    assert {key.split("/")[0] for key in keys if key.startswith("quote")} <= known
    assert set(NAMES) == set(PRESETS[ROW].labels)


def test_quotes_are_on_their_pages():
    for quote in QUOTES:
        table = quote.table()
        assert list(table.data.columns) == list(quote.columns)
        assert len(table.data) >= 3
    with pytest.raises(Exception, match="must have a table under 'Nowhere' with the columns a"):
        Quote("q", "t", "findings.md", "Nowhere", ("a",)).table()
    with pytest.raises(Exception, match="must have the lines none, got s, m, b, h"):
        Quote("q", "t", "results.md", "Time and memory", ("size", "gradient"), ("none",)).table()


def test_a_table_in_markdown_and_latex():
    data = pd.DataFrame(
        {"who": ["a_1", "b"], "e": [0.5, 2e-7], "n": [1e4, np.nan], "s": ["x", "y"]}
    )
    columns = (Column("who", "name", text), Column("e", "error", error, "ours"))
    table = Table("t", "", data, (*columns, Column("n", "n", count, "ours")), "e", "s")
    assert table.markdown().splitlines() == [
        "| name | ours: error | ours: n |",
        "| --- | --: | --: |",
        "| *x* |  |  |",
        "| a_1 | 0.50 | 10,000 |",
        "| *y* |  |  |",
        "| b | **2.0e-7** |  |",
    ]
    written = table.latex()
    assert r"\cmidrule(lr){2-3}" in written
    assert r"\multicolumn{2}{c}{ours}" in written
    assert "a\\_1 & 0.50 & 10,000 \\\\" in written
    assert r"b & \textbf{2.0e-7} &  \\" in written


def test_numbers_as_they_are_written():
    shown = [error(value) for value in (0, 0.01, 0.0099, 38.6, 99.6, np.inf, np.nan, 1e-10)]
    assert shown == ["0", "0.010", "9.9e-3", "39", "1.0e2", "inf", "", "1.0e-10"]
    assert in_formula(1.26e-6) == r"1.3\cdot 10^{-6}"
    assert in_formula(0.5) == "0.50"
    assert latex("50 % of λ_1") == r"50 \% of $\lambda$\_1"


@pytest.mark.slow
@pytest.mark.usefixtures("_no_pictures", "_no_curves")
@pytest.mark.skipif(shutil.which("latexmk") is None, reason="needs TeX Live")
def test_the_report_is_built_from_a_store_that_has_little(store, tmp_path, capsys):
    few = Store(*(t[t["study"] == "poisson2d_257"] for t in (store.trainings, store.curves)))
    few.write(tmp_path / "store")
    common = ["--store", tmp_path / "store", "--output", tmp_path / "paper"]
    assert program(*common, "--pdf") == 0
    numbers = (tmp_path / "paper/report/generated/numbers.tex").read_text()
    assert r"\csname val@final/poisson2d_257/kfac_star\endcsname{$2.0\cdot 10^{-7}$}" in numbers
    told = capsys.readouterr().out
    assert "report.tex names what the store does not have yet: " in told
    assert f", rmse/{ROW}/kfac_star, " in told
    assert "published/" not in told
    assert (tmp_path / "paper/report/report.pdf").read_bytes().startswith(b"%PDF")
