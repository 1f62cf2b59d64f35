"""The report folder, its pictures, the callback that writes it in training, and the script."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from test_evaluation import DOCUMENTS, PROMPTS, make_model, make_tokenizer

from modeling_moextend.evaluation import figures, report
from modeling_moextend.evaluation.report import ReportCallback, evaluate_adapter, read_point, write_report
from modeling_moextend.publishing.card import create_card
from modeling_moextend.training.config import MoExtendSFTConfig
from modeling_moextend.training.trainer import MoExtendSFTTrainer

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = [{"prompt": prompt, "answer": "a", "images": []} for prompt in PROMPTS]
OPTIONS = {"batch_size": 2, "max_new_tokens": 3, "progress": False}


def domain(before, after, captured):
    values = {"perplexity_before": before, "perplexity_after": after, "perplexity_ratio": after / before}
    values |= {"kl": 0.25, "top1_changed": 0.125, "captured": captured, "documents": 3, "tokens": 1234}
    return values | {"captured_mean": sum(captured.values()) / len(captured) if captured else None}


def make_results(**changes):
    """Results as `evaluate_adapter` gives them, with numbers that are easy to find again."""
    results = {
        "scope": "gate",
        "gate_threshold": 0.5,
        "new_experts": {1: 2, 3: 1},
        "retention": {
            **domain(40.0, 50.0, {1: 0.1, 3: 0.3}),
            "domains": {"law": domain(40.0, 50.0, {1: 0.1, 3: 0.3})},
        },
        "bit_equal": 0.75,
        "accuracy": 0.45,
        "base_accuracy": 0.0625,
        "metric": "exact_match",
        "questions": 1000,
        "samples": [{"question": "a|b?", "reference": "c", "answer": "d\ne"}],
        "task_captured": {1: 0.9, 3: 0.8},
        "expert_use": {
            "law": {0: [0.5, 0.5], 1: [0.4, 0.4, 0.1, 0.1], 3: [0.25, 0.5, 0.25]},
            "new task": {0: [1.0, 0.0], 1: [0.0, 0.0, 0.5, 0.5], 3: [0.0, 0.0, 1.0]},
        },
        "threshold_curve": [
            {
                "threshold": t,
                "accuracy": a,
                "perplexity_ratio": r,
                "kl": 0.1,
                "top1_changed": 0.1,
                "captured_mean": 0.2,
            }
            for t, a, r in ((1.0, 0.3, 1.0), (0.0, 0.5, 1.5))
        ],
    }
    return {**results, **changes}


@pytest.fixture
def drawn(monkeypatch):
    """The figures drawn in the test, in order."""
    made, new_figure = [], figures.new_figure

    def keep(*size):
        made.append(new_figure(*size))
        return made[-1]

    monkeypatch.setattr(figures, "new_figure", keep)
    return made


# ---------------------------------------------------------------- the folder


def test_the_folder_holds_numbers_words_and_pictures(tmp_path):
    tokens = [{"text": "who", "layers": {1: 0, 3: 0}}, {"text": " me\n", "layers": {1: 1, 3: 0}}]
    seen = make_results(token_view=[{"question": "a|b?", "tokens": tokens}])
    card = write_report(tmp_path / "new" / "report", seen, title="law adapter")
    folder = tmp_path / "new" / "report"
    stored = json.loads((folder / "report.json").read_text())
    assert stored["title"] == "law adapter" and stored["retention"]["kl"] == 0.25 and stored["card"] == card
    assert card["token_lines"] == ["who[ me\n]"]
    assert 'title="layer 1: new, 3: base"' in (folder / "tokens.html").read_text()
    assert stored["task_captured"] == {"1": 0.9, "3": 0.8}
    words = (folder / "report.md").read_text()
    assert words.startswith("# law adapter\n")
    for part in (
        "| 6.25% | 45% |",
        "| 40.00 | 50.00 |",
        "1.2500",
        "| law |",
        "a\\|b? | c | d e |",
        "| 0 | 50% | 1.5000 |",
    ):
        assert part in words
    assert set(card["figures"].values()) == {"frontier.png", "expert_use.png", "captured.png", "threshold.png"}
    for caption, file in card["figures"].items():
        assert f"![{caption}]({file})" in words
        assert (folder / file).read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (folder / file).with_suffix(".svg").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "title", ["a", "数字から単語へ", "الأرقام 🎉 ตัวเลข", r"$\nofrac{$ of $5", "long " * 40, "a\nb\x07"]
)
def test_a_picture_drawn_twice_is_the_same_file_in_the_one_style(title, tmp_path, drawn):
    points = [{"name": title, "accuracy": 0.25, "perplexity_ratio": 3.0}]
    for name in ("one", "two"):
        figures.plot_frontier(points, tmp_path / f"{name}.png")
        figures.plot_captured({title: {1: 0.1}}, tmp_path / "captured.png")
        figures.plot_expert_use({title: {1: [0.5, 0.5]}}, {1: 1}, tmp_path / "use.png")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert drawn[0].axes[0].spines["top"].get_visible() is False  # moextend.mplstyle


def test_what_was_not_measured_is_left_out(tmp_path):
    bare = make_results(
        accuracy=None, base_accuracy=None, questions=0, samples=[], task_captured={}, expert_use={}, threshold_curve=[]
    )
    bare["retention"] = {**domain(40.0, 50.0, {}), "domains": {"law": domain(40.0, 50.0, {})}}
    card = write_report(tmp_path, bare)
    assert card["figures"] == {} and not list(tmp_path.glob("*.png"))
    assert not any("questions" in row["measure"] or "new expert" in row["measure"] for row in card["results"])
    with pytest.raises(ValueError, match="has no accuracy: write it again with questions"):
        read_point(tmp_path)


def test_a_result_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_report(tmp_path, make_results(accuracy=float("nan")))


def test_the_model_card_takes_what_the_report_returns(tmp_path):
    text = str(create_card(make_model().config, **write_report(tmp_path, make_results())))
    assert "| exact match, 1,000 questions | 6.25% | 45% | higher |" in text
    assert "![Accuracy on the new task against forgetting](frontier.png)" in text


def test_reports_can_be_compared_in_one_frontier(tmp_path, drawn):
    write_report(tmp_path / "one", make_results(), title="one")
    assert read_point(tmp_path / "one") == {"name": "one", "accuracy": 0.45, "perplexity_ratio": 1.25}
    assert read_point(tmp_path / "one" / "report.json") == read_point(tmp_path / "one")
    drawn.clear()
    write_report(tmp_path / "two", make_results(accuracy=0.5), title="two", points=[read_point(tmp_path / "one")])
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["base alone", "two", "one"]


# ---------------------------------------------------------------- the pictures


def test_the_frontier_shows_percent_lost_and_percent_right(tmp_path, drawn):
    points = [{"name": "a", "accuracy": 0.25, "perplexity_ratio": 3.0, "accuracy_std": 0.05}]
    figures.plot_frontier([*points, {"name": "b", "accuracy": 0.5, "perplexity_ratio": 0.8}], tmp_path / "f.png")
    (axes,) = drawn[0].axes
    places = [tuple(float(v[0]) for v in bars.lines[0].get_data()) for bars in axes.containers]
    assert places == [pytest.approx((200, 25)), pytest.approx((-20, 50))]
    low, high = axes.get_xlim()
    assert low < -20 and high > 200 and "%" in axes.get_xlabel() and "%" in axes.get_ylabel()


def test_heat_maps_share_a_scale_and_part_new_experts_from_old_ones(tmp_path, drawn):
    figures.plot_expert_use(make_results()["expert_use"], {1: 2, 3: 1}, tmp_path / "e.png")
    maps = [axes for axes in drawn[0].axes if axes.images]
    assert [axes.get_title("left") for axes in maps] == ["law", "new task"]
    assert {axes.images[0].get_clim() for axes in maps} == {(0, 100)}
    shares = maps[0].images[0].get_array()
    assert shares.shape == (3, 4) and shares[1].tolist() == [40, 40, 10, 10]
    assert shares.mask.tolist()[0] == [False, False, True, True]
    assert [label.get_text() for label in maps[0].get_xticklabels()] == ["0", "1", "n0", "n1"]
    assert [label.get_text() for label in maps[0].get_yticklabels()] == ["0", "1", "3"]
    assert maps[0].lines[-1].get_xdata() == [1.5, 1.5]


def test_bars_are_means_of_the_layers_on_one_scale(tmp_path, drawn):
    figures.plot_captured({"law": {1: 0.1, 3: 0.3}, "code": {1: 0.0, 3: 0.0}}, tmp_path / "c.png", {1: 0.9, 3: 0.7})
    (axes,) = drawn[0].axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([20, 0, 80])
    assert [text.get_text() for text in axes.texts] == ["20%", "0%", "80%"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["law", "code", "new task"]
    assert axes.get_xlim()[0] == 0 and axes.get_xlim()[1] >= 100


def test_the_threshold_curve_is_sorted_and_marks_the_models_own(tmp_path, drawn):
    figures.plot_threshold_curve(make_results()["threshold_curve"], tmp_path / "t.png", current=0.5)
    upper, lower = drawn[0].axes
    assert upper.lines[0].get_xydata().tolist() == [[0, 50], [1, 30]]
    assert lower.lines[0].get_xydata().tolist() == [[0, 1.5], [1, 1.0]]
    assert list(upper.lines[1].get_xdata()) == [0.5, 0.5]
    without = [{**row, "accuracy": None} for row in make_results()["threshold_curve"]]
    figures.plot_threshold_curve(without, tmp_path / "t.png")
    assert len(drawn[1].axes) == 1


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'moextend\[plot\]'"):
        write_report(tmp_path, make_results())


# ---------------------------------------------------------------- measuring


def test_an_adapter_is_measured_on_both_sides():
    model = make_model(selection="exclusive", calibration="none")
    with model.disable_adapter():
        alone = report.answer(model, make_tokenizer(), PROMPTS, max_new_tokens=3, progress=False)
    questions = [{**row, "answer": text} for row, text in zip(QUESTIONS, alone, strict=True)]
    results = evaluate_adapter(model, make_tokenizer(), DOCUMENTS, questions, **OPTIONS)
    assert results["base_accuracy"] == 1.0 and results["accuracy"] < 1.0
    assert [row["reference"] for row in results["samples"]] == alone != [row["answer"] for row in results["samples"]]
    assert results["retention"]["captured"] == {1: 1.0, 2: 1.0} == results["task_captured"]
    assert results["new_experts"] == {1: 1, 2: 2} and results["bit_equal"] == 0.0
    assert list(results["expert_use"]) == ["x", "y", "new task"]
    assert [len(shares) for shares in results["expert_use"]["x"].values()] == [6, 7, 8, 6]
    assert results["expert_use"]["new task"][1] == [0.0] * 6 + [1.0]


def test_one_call_measures_both_sides_at_every_threshold_of_a_gate(tmp_path):
    model = make_model(scope="gate", selection="exclusive", calibration="none")
    model.gate_threshold = -0.5
    results = evaluate_adapter(model, make_tokenizer(), DOCUMENTS, QUESTIONS, thresholds=[1e9, -1e9], **OPTIONS)
    closed, wide_open = results["threshold_curve"]
    assert (closed["perplexity_ratio"], closed["kl"], closed["captured_mean"]) == (1.0, 0.0, 0.0)
    assert closed["accuracy"] == results["base_accuracy"]
    assert wide_open["captured_mean"] == 1.0 and wide_open["kl"] > 0
    assert model.gate_threshold == results["gate_threshold"] == -0.5
    assert "threshold.png" in write_report(tmp_path, results)["figures"].values()


def test_several_references_a_question_are_all_heard():
    questions = [{"prompt": PROMPTS[0], "answer": "x", "answers": ["y"] * 10}]
    given = evaluate_adapter(make_model(), make_tokenizer(), DOCUMENTS, questions, **OPTIONS)["samples"][0]["answer"]
    questions[0]["answers"] = [given] * 2 + ["y"] * 8
    found = evaluate_adapter(make_model(), make_tokenizer(), DOCUMENTS, questions, metric="vqa_accuracy", **OPTIONS)
    assert found["accuracy"] == pytest.approx(0.6)


def test_thresholds_without_a_gate_are_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(report, "compare_with_base", None)
    with pytest.raises(ValueError, match="scope='gate', but this one's scope is 'all'.*leave out the thresholds"):
        evaluate_adapter(make_model(), make_tokenizer(), DOCUMENTS, thresholds=[0.0])


# ---------------------------------------------------------------- in training


def train(folder, callbacks):
    """Three steps, evaluated after the second; the trainer, and what every evaluation found."""
    settings = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no", "use_cpu": True}
    settings |= {"per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-2}
    data = Dataset.from_dict({"text": [document["text"] for document in DOCUMENTS] * 3})
    trainer = MoExtendSFTTrainer(
        model=make_model(calibration="none"),
        args=MoExtendSFTConfig(str(folder), stage="finetune", **settings),
        train_dataset=data,
        eval_dataset=data.select(range(2)),
        processing_class=make_tokenizer(),
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


def test_the_callback_reports_at_evaluations_and_at_the_end(tmp_path):
    callback = ReportCallback(DOCUMENTS, QUESTIONS, **OPTIONS)
    trainer = train(tmp_path, [callback])
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["step-2", "step-3"]
    stored = json.loads((tmp_path / "report" / "step-2" / "report.json").read_text())
    assert stored["title"] == "step 2" and stored["questions"] == len(QUESTIONS)
    metrics = trainer.evaluate()
    last = json.loads((tmp_path / "report" / "step-3" / "report.json").read_text())
    assert metrics["eval_base_perplexity_ratio"] == last["retention"]["perplexity_ratio"]
    assert metrics["eval_accuracy"] == last["accuracy"]


def test_the_callback_measures_a_step_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(report, "evaluate_adapter", lambda *args, **kwargs: asked.append(args) or make_results())
    args = SimpleNamespace(output_dir=str(tmp_path), disable_tqdm=True)
    state = SimpleNamespace(global_step=5, is_world_process_zero=False)
    callback, metrics = ReportCallback(DOCUMENTS, QUESTIONS), {}
    trained = {"model": "model", "processing_class": "tokenizer"}
    callback.on_evaluate(args, state, None, metrics=metrics, **trained)
    callback.on_train_end(args, state, None, **trained)
    assert asked == [("model", "tokenizer", DOCUMENTS, QUESTIONS)]
    assert metrics == {"eval_base_perplexity_ratio": 1.25, "eval_accuracy": 0.45}
    assert not list(tmp_path.iterdir())  # another process writes
    state.global_step = 6
    callback.on_train_end(args, state, None, **trained)
    assert len(asked) == 2


@pytest.mark.slow
def test_training_goes_on_as_if_nobody_had_measured(tmp_path):
    plain = train(tmp_path / "plain", [])
    measured = train(tmp_path / "measured", [ReportCallback(DOCUMENTS, QUESTIONS, **OPTIONS)])
    tensors = plain.model.adapter_tensors()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in measured.model.adapter_tensors().items())
    untrained = make_model(calibration="none").adapter_tensors()
    assert not all(torch.equal(tensor, tensors[name]) for name, tensor in untrained.items())


def test_the_callback_reads_files_and_can_wait_for_the_end(tmp_path):
    text, asked = tmp_path / "text.jsonl", tmp_path / "questions.jsonl"
    text.write_text("\n".join(map(json.dumps, DOCUMENTS)))
    rows = [{"messages": [*row["prompt"], {"role": "assistant", "content": "a"}]} for row in QUESTIONS]
    asked.write_text("\n".join(map(json.dumps, rows)))
    callback = ReportCallback(text, str(asked), folder=tmp_path / "here", every_evaluation=False, **OPTIONS)
    assert callback.documents == DOCUMENTS and callback.questions == QUESTIONS
    train(tmp_path / "run", [callback])
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["step-3"]


# ---------------------------------------------------------------- the script


@pytest.mark.slow
@pytest.mark.parametrize("place", ["law", "base"])
def test_the_script_writes_a_report_and_a_card(tmp_path, place):
    make_model(calibration="none").save_pretrained(tmp_path / "law")
    base = make_model().detach()
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / place)
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    rows = [{"messages": [*row["prompt"], {"role": "assistant", "content": "a"}]} for row in QUESTIONS]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_report(tmp_path / "other", make_results(), title="another adapter")
    command = [sys.executable, ROOT / "examples/evaluate_adapter.py", "--adapter", "law", "--base", "base"]
    command += [
        "--text",
        "text.jsonl",
        "--questions",
        "questions.jsonl",
        "--compare",
        "other",
        "--max_new_tokens",
        "3",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exact match, 4 questions: " in done.stdout and "after / before: " in done.stdout
    written = {path.name for path in (tmp_path / "report").iterdir()}
    pictures = {f"{name}.{kind}" for name in ("frontier", "expert_use", "captured") for kind in ("png", "svg")}
    assert written == {"report.json", "report.md", "model_card.md", "tokens.html", *pictures}
    assert "(tokens.html)" in (tmp_path / "report/report.md").read_text()
    assert json.loads((tmp_path / "report/report.json").read_text())["title"] == "law"
    assert "## Results" in (tmp_path / "report/model_card.md").read_text()
