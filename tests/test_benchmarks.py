"""The benchmark's protocol: splits, the results file, which rate wins, the table; and two short runs."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import forgetting
import generated
import methods
import pictures
import report
import runs
import tasks

pytest.importorskip("easy_vqa")
DOMAINS = [f"{kind}/{domain}" for kind in ("windows", "aligned") for domain in ("code", "manual", "science", "chat")]
DOMAINS.append("aligned/questions")


def line(task="numbers", method="lora", rate=0.1, seed=0, validation=0.5, test=0.4, after=10.0, error=None, **more):
    text = {domain: {"base": 10.0, "after": after, "kl": 0.0, "changed": 0.0, "captured": None} for domain in DOMAINS}
    measured = {"validation": validation, "test": test, "text": text, "bit_equal": False, "seconds": {"train": 30.0}}
    key = {"task": task, "method": method, "rate": rate, "seed": seed, "settings": "s"}
    return {**key, "error": error, **({} if error else measured), **more}


def sources(package, number):
    """Hand-made files of a package: three documented functions each, and some code; file 7 says "of 7 for"."""
    function = (
        'def {0}():\n    """Does thing {0} of {1} for {2} files."""\n    return "{0} of {1} for nothing but code"'
    )
    codes = [
        "\n".join(function.format(name, file, package[:3]) for name in ("one", "two", "three"))
        for file in range(number)
    ]
    return [tasks.text_data.parse_source(code, f"{package}.m{place}") for place, code in enumerate(codes)]


# ---------------------------------------------------------------- tasks


def test_library_splits_are_disjoint_balanced_deterministic_and_give_no_answer_away():
    packages = {package: sources(package, 60) for package in tasks.LIBRARIES}
    told = tasks.text_data.parse_source(
        'def f():\n    """Converts an array to a torch tensor in place."""', "torch.m0x"
    )
    packages["torch"] += [told] * 2
    rows = tasks.library_records(packages)
    questions = {split: {row["question"] for row in rows[split]} for split in tasks.SPLITS}
    assert all(questions.values()) and not any("tensor" in text for part in questions.values() for text in part)
    assert sum(map(len, questions.values())) == len(set.union(*questions.values())) == sum(map(len, rows.values()))
    assert tasks.majority(rows["train"]) == 1 / len(tasks.LIBRARIES)
    assert rows == tasks.library_records(packages)


def test_library_keeps_a_module_on_one_side_and_held_out_text_away():
    packages = {package: sources(package, 60) for package in tasks.LIBRARIES}
    rows = tasks.library_records(packages)
    home = {sentence: source for part in packages.values() for source in part for sentence in tasks.sentences(source)}
    for split, part in rows.items():
        for row in part:
            source = home[row["question"]]
            assert tasks.side(source.key) == split and not source.held_out


def test_numbers_are_all_there_once_and_written_right():
    rows = tasks.number_records(2500)
    answers = [row["answer"] for split in tasks.SPLITS for row in rows[split]]
    assert len(answers) == len(set(answers)) == 2501 and rows == tasks.number_records(2500)
    assert len(rows["train"]) > 5 * len(rows["test"]) > 0 and len(rows["validation"]) > 0
    values = {
        0: "zero",
        19: "nineteen",
        40: "forty",
        99: "ninety-nine",
        700: "seven hundred",
        1005: "one thousand five",
    }
    values[21_342] = "twenty-one thousand three hundred forty-two"
    assert {number: tasks.in_words(number) for number in values} == values
    for row in rows["test"]:
        assert tasks.in_words(int(row["question"].replace(",", "").replace(" ", ""))) == row["answer"]


def documented(package, number, functions=6):
    """Hand-made files whose functions document a parameter of every kind, in numpy's style and in Google's."""
    numpy = 'def f{0}():\n    """Does.\n\n    x : {2}\n        What {1} takes as number {0}, {2}.\n    """'
    google = (
        'def g{0}():\n    """Does.\n\n    Args:\n        x (`{2}`, *optional*): What {1} gives as {0}, {2}.\n    """'
    )
    codes = [
        "\n".join(
            form.format(f"{kind[:2]}{n}", f"m{file} of {package}", kind)
            for n in range(functions)
            for kind in ("bool", "int", "str", "ndarray", "list of int")
            for form in (numpy, google)
        )
        for file in range(number)
    ]
    return [tasks.text_data.parse_source(text, f"{package}.m{file}") for file, text in enumerate(codes)]


def test_types_has_no_large_module_no_description_twice_and_no_module_on_two_sides():
    twice = 'def f{0}():\n    """Does.\n\n    x : {1}\n        {2}\n    """'
    kinds = [("int", "Description {} with two kinds."), ("str", "description {}, with TWO kinds")]
    texts = [twice.format(kind, kind, text.format(number)) for number in range(20) for kind, text in kinds]
    packages = {package: documented(package, 8) for package in tasks.DOCUMENTED}
    packages["numpy"] += [tasks.text_data.parse_source("\n".join(texts), "numpy.more")]
    found = tasks.type_records(packages)
    texts = {split: [entry["question"] for entry in part] for split, part in found.items()}
    assert len(set(sum(texts.values(), []))) == sum(map(len, texts.values())) and all(texts.values())
    assert not any("two kinds" in text.lower() for part in texts.values() for text in part)
    assert any(" takes as " in text for text in texts["test"]) and any(" gives as " in text for text in texts["test"])
    home = {
        text: text.split("What ")[2].split(" as ")[0].rsplit(" ", 1)[0] for part in texts.values() for text in part
    }
    modules = {split: Counter(home[text] for text in part) for split, part in texts.items()}
    assert not set(modules["train"]) & set(modules["test"]) and not set(modules["validation"]) & set(modules["test"])
    assert max(max(counts.values()) for counts in modules.values()) <= tasks.MODULE_RECORDS
    asked = min(getattr(tasks.TASKS["types"], split) for split in ("validation", "test"))
    assert tasks.MODULE_RECORDS < 0.05 * asked
    assert {tasks.majority(part) for part in found.values()} == {0.2}
    assert found == tasks.type_records(packages)


def read_rule(rule):
    """{name: value} of a recurrence rule."""
    return dict(part.split("=") for part in rule.split(";"))


def test_calendar_rules_say_what_the_sentences_say():
    found = tasks.calendar_records(3000)
    rules = [entry["answer"] for split in tasks.SPLITS for entry in found[split]]
    assert len(set(rules)) == len(rules) == 3000 and found == tasks.calendar_records(3000)
    assert len(found["train"]) > 5 * len(found["test"]) > 0 and len(found["validation"]) > 0
    times = {
        f"{h % 12 or 12} {'morning' if h < 12 else 'afternoon' if h < 18 else 'evening'}": h for h in range(6, 24)
    }
    numbers = {generated.in_words(number): number for number in range(1, 13)}
    for entry in found["test"]:
        sentence, rule = entry["question"], read_rule(entry["answer"])
        before, _, part = (
            sentence.partition(" in the ")[0],
            None,
            sentence.split(" in the ")[1].split(",")[0].strip("."),
        )
        minute = {"quarter past": 15, "half past": 30}
        assert int(rule["BYHOUR"]) == times[f"{numbers[before.rsplit(' ', 1)[1]]} {part}"]
        assert int(rule.get("BYMINUTE", 0)) == next((m for name, m in minute.items() if name in before), 0)
        assert [day[:2].upper() for day in generated.DAYS if day in sentence] == [
            day.lstrip("-123") for day in rule.get("BYDAY", "").split(",") if day
        ]
    kinds = Counter(read_rule(rule)["FREQ"] for rule in rules)
    assert min(kinds.values()) > 150 and set(kinds) == {"DAILY", "WEEKLY", "MONTHLY", "YEARLY"}


def test_follow_ups_are_answered_from_earlier_turns_and_never_by_a_word_that_was_said():
    found = tasks.follow_up_records(2000)
    assert found == tasks.follow_up_records(2000) and all(found.values())
    known, steps = generated.SERIES, {"right after": 1, "right before": -1, "two after": 2, "two before": -2}
    for split, part in found.items():
        for entry in part:
            talk = tasks.messages(entry)
            assert [turn["role"] for turn in talk] == ["user", "assistant"] * (len(talk) // 2)
            assert tasks.messages(entry, answer=False) == talk[:-1] and len(talk) >= 4
            kind = next(kind for kind in known if f"Which {kind} comes" in talk[0]["content"])
            first = now = known[kind].index(talk[0]["content"].rstrip("?").rsplit(" ", 1)[1])
            said = [known[kind][first]]
            for user, assistant in zip(talk[::2], talk[1::2], strict=True):
                step = next((number for words, number in steps.items() if words in user["content"]), None)
                if step is None:  # an aside
                    continue
                now = (first if "first" in user["content"] else now) + step
                now %= len(known[kind]) if kind in generated.ROUND else 1000
                assert assistant["content"] == known[kind][now]
                said.append(assistant["content"])
            assert said[-1] == entry["answer"] and entry["answer"] not in said[:-1], split
    dialogues = {split: {str(tasks.messages(entry)) for entry in part} for split, part in found.items()}
    assert not dialogues["test"] & dialogues["train"] and tasks.majority(found["test"]) < 0.1


def test_a_member_past_an_end_is_none_and_days_go_round():
    assert generated.member("letter", 26) is generated.member("letter", -1) is None
    assert (generated.member("day", 7), generated.member("month", -1)) == ("Monday", "December")
    seen = [generated.dialogue(random.Random(seed)) for seed in range(300)]
    assert {sound for *_, sound in seen} == {True, False}
    assert all(all(contents) for contents, _, sound in seen if sound)


def test_easy_vqa_splits_share_no_image():
    rows = tasks.easy_vqa_records()
    images = {split: {row["image"] for row in part} for split, part in rows.items()}
    assert not images["train"] & images["validation"] and not images["test"] & (images["train"] | images["validation"])
    assert all(row["answer"] not in ("yes", "no") for row in rows["validation"] + rows["test"])
    described = {row["image"] for row in tasks.caption_records()}
    assert len(described) > 1000 and not described & (images["validation"] | images["test"])


def test_retention_text_has_nothing_of_held_out_or_asked_modules():
    packages = sources("stdlib", 200)
    render = lambda talk: " ".join(turn["content"] for turn in talk)  # noqa: E731
    rows = tasks.retention_texts(packages, render, number=50)
    assert [sum(row["domain"] == domain for row in rows) for domain in tasks.RETENTION_DOMAINS] == [50, 50, 50]
    barred = [s.key.split(".m")[1] for s in packages if s.held_out or tasks.side(s.key) != "train"]
    assert len(barred) > 20
    for row in rows:
        assert not any(f"of {file} for" in row["text"] or f"m{file}`" in row["text"] for file in barred)
    assert any("of 1" in row["text"] for row in rows)  # the texts do say their file


def test_every_pass_has_every_row_once_in_the_seeds_order():
    rows = list(range(10))
    order = tasks.training_records(rows, 25, seed=1)
    assert sorted(order[:10]) == sorted(order[10:20]) == rows and order[:10] != order[10:20]
    assert order == tasks.training_records(rows, 25, seed=1) != tasks.training_records(rows, 25, seed=2)


def test_each_split_asks_its_own_rows_as_many_as_the_task_says(monkeypatch):
    monkeypatch.setattr(tasks, "read", lambda name: {split: [(name, split)] * 5000 for split in tasks.SPLITS})
    for task in tasks.TASKS.values():
        for split in ("validation", "test"):
            assert tasks.held_out_records(task, split) == [(task.name, split)] * getattr(task, split)


# ---------------------------------------------------------------- the results file


def test_a_line_that_was_cut_off_is_dropped_and_run_again(tmp_path, capsys):
    path = tmp_path / "deep" / "runs.jsonl"
    assert runs.read_runs(path) == []
    first, second = line(seed=0), line(seed=1)
    runs.append_run(path, first)
    runs.append_run(path, second)
    path.write_bytes(path.read_bytes()[:-20])
    assert runs.read_runs(path) == [first] and "cut off" in capsys.readouterr().out
    assert runs.missing([first, second], runs.read_runs(path)) == [second]
    runs.append_run(path, second)
    assert runs.read_runs(path) == [first, second] and capsys.readouterr().out == ""


def test_another_broken_line_is_named(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text("{}\n{nonsense\n{}\n")
    with pytest.raises(ValueError, match="Line 2 of .*runs.jsonl is no JSON"):
        runs.read_runs(path)


def test_failed_runs_are_skipped_unless_retried_and_the_last_line_counts():
    failed, other = line(error="exit code 1"), line(rate=0.2)
    assert runs.missing([failed, other], [failed]) == [other]
    assert runs.missing([failed, other], [failed], retry=True) == [failed, other]
    assert runs.latest([failed, other, line()]) == [line(), other]


def test_settings_are_part_of_the_key_and_rates_are_not():
    task, method = tasks.TASKS["numbers"], methods.METHODS["gate"]
    same = methods.changed(method, {})
    other = methods.changed(method, {"routing": {"selection": "compete"}})
    assert same == method and other.routing == {**method.routing, "selection": "compete"}
    hashes = [runs.settings_hash(task, part) for part in (method, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert hashes[0] != runs.settings_hash(tasks.TASKS["library"], method)


# ---------------------------------------------------------------- who wins


def test_winner_is_most_accurate_on_validation_then_least_forgetful():
    best = line(rate=0.2, validation=0.7, test=0.1, after=20.0)
    assert runs.winner([line(rate=0.1, validation=0.6, test=0.9), best, line(rate=0.3, error="x")]) == best
    assert runs.winner([best, line(rate=0.3, validation=0.7, after=19.0)])["rate"] == 0.3
    assert runs.winner([best, line(rate=0.05, validation=0.7, after=20.0)])["rate"] == 0.05
    assert runs.winner([line(error="x")]) is None
    assert runs.winner([line(validation=0.2, after=float("inf")), best]) == best


def test_every_method_sweeps_as_many_rates():
    assert {len(method.rates) for method in methods.METHODS.values()} == {4}
    assert {*methods.METHODS} == {*report.NAMES} and {*tasks.TASKS} == {*report.WORDS}, "pictures name what they show"


# ---------------------------------------------------------------- the schedule


@pytest.fixture
def fake(monkeypatch):
    """`in_own_process` without a process; the second rate is the best one, and "lora" fails at the highest."""
    seen = []

    def measure(wanted):
        seen.append(wanted)
        grid = methods.METHODS[wanted["method"]].rates
        if wanted["method"] == "lora" and wanted["rate"] == max(grid):
            return {"error": "exit code 1\nValueError: boom"}
        done = line(validation=0.9 if wanted["rate"] == grid[1] else 0.3)
        return {name: value for name, value in done.items() if name not in runs.KEY}

    monkeypatch.setattr(forgetting, "in_own_process", measure)
    monkeypatch.setattr(forgetting, "prepare", lambda args: None)
    return seen


def run_main(monkeypatch, tmp_path, *more):
    arguments = ["forgetting.py", "--output", str(tmp_path / "runs.jsonl"), "--tasks", "numbers", *more]
    monkeypatch.setattr(sys, "argv", arguments)
    forgetting.main()


def test_four_rates_on_one_seed_then_the_winner_on_two_and_nothing_twice(monkeypatch, tmp_path, fake, capsys):
    run_main(monkeypatch, tmp_path, "--methods", "full", "lora")
    assert len(fake) == 2 * (4 + 2) and "boom" in capsys.readouterr().out
    for method in ("full", "lora"):
        ran = [(run["rate"], run["seed"]) for run in fake if run["method"] == method]
        grid = methods.METHODS[method].rates
        assert sorted(ran) == sorted([(rate, 0) for rate in grid] + [(grid[1], 1), (grid[1], 2)])
    run_main(monkeypatch, tmp_path, "--methods", "full", "lora")
    assert len(fake) == 12
    run_main(monkeypatch, tmp_path, "--methods", "lora", "--retry")
    assert len(fake) == 13 and fake[-1]["rate"] == max(methods.METHODS["lora"].rates)


def test_quick_runs_the_second_rate_on_one_seed_where_a_method_fits(monkeypatch, tmp_path, fake):
    run_main(monkeypatch, tmp_path, "--quick")
    assert [run["method"] for run in fake] == ["paper", "gate", "full_replay", "lora_replay"]
    assert all(run["rate"] == methods.METHODS[run["method"]].rates[1] and run["seed"] == 0 for run in fake)


@pytest.mark.parametrize("method", forgetting.ABLATIONS)
def test_ablations_are_variants_of_one_method_each_with_a_key_of_its_own(method):
    wanted = forgetting.ablations(forgetting.parse(["--ablations", method, "--tasks", "numbers"]))
    assert len({runs.key(run) for run in wanted}) == len(wanted) == len(methods.ABLATIONS[method])
    assert len({run["settings"] for run in wanted}) == len(wanted) and {run["of"] for run in wanted} == {method}


# ---------------------------------------------------------------- the table


def test_table_has_both_accuracies_of_the_winning_rate_and_the_rises(tmp_path):
    path = tmp_path / "runs.jsonl"
    done = [line(rate=0.1, validation=0.6, test=0.99), line(rate=0.2, validation=0.7, test=0.5, after=11.0)]
    done += [line(rate=0.2, seed=seed, validation=0.64, test=0.4, after=12.0) for seed in (1, 2)]
    done[1]["text"]["windows/science"]["after"] = 30.0
    done += [line(method="full", error="exit code 1"), line(task="library", method="paper", bit_equal=True, test=0.3)]
    path.write_text("".join(json.dumps(run) + "\n" for run in done))
    numbers, library = report.markdown(runs.read_runs(path)).split("### library")
    assert "| method | rate | seeds | validation | test | windows |" in numbers
    row = "| lora | 0.2 | 3 | 66.0% (64.0 to 70.0) | 43.3% (40.0 to 50.0) | +16.7% (to +20.0%) | +16.7% (to +20.0%) "
    assert row + "| +80.0% (to +200.0%) | +16.7% (to +20.0%) |  | 30 |" in numbers
    assert "Failed: full." in numbers and "99" not in numbers
    assert "| paper | 0.1 | 1 | 50.0% | 30.0% | bit-equal | bit-equal | bit-equal | bit-equal |  | 30 |" in library
    report.show(path)
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_the_overview_has_a_line_a_task_and_says_where_seeds_are_missing():
    done = [line(method="full", seed=seed, validation=0.5, test=test) for seed, test in enumerate((0.4, 0.5, 0.6))]
    done += [line(task="types", method="gate_deltas", validation=0.75, test=0.25, bit_equal=True)]
    done += [line(task="types", method="full", error="exit code 1"), line(task="types", method="paper")]
    text = report.overview(done)
    assert "| task | gate_deltas | full |" in text and "| numbers |  | 50.0% / 50.0%, +0.00% |" in text
    assert "| types | 75.0% / 25.0%, bit-equal |  |" in text
    assert text.endswith("Fewer than three seeds: types gate_deltas (1).\n")


def test_readmes_table_is_what_the_results_say():
    readme = (Path(report.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    shown = readme.split("<!-- python benchmarks/report.py --readme -->\n")[1].split("<!-- end -->")[0]
    assert shown == report.readme_table(runs.read_runs(report.RESULTS / "forgetting.jsonl"))


@pytest.mark.slow
def test_every_picture_of_the_pages_is_drawn_from_files(tmp_path, monkeypatch):
    shown = {path.name for path in pictures.IMAGES.iterdir()}
    monkeypatch.setattr(pictures, "IMAGES", tmp_path)
    monkeypatch.setattr(sys, "argv", ["pictures.py"])
    pictures.main()
    assert {path.name for path in tmp_path.iterdir()} == shown and len(shown) >= 20
    assert all(path.stat().st_size > 5_000 for path in tmp_path.iterdir())
    with pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "argv", ["pictures.py", "idee"])
        pictures.main()


def test_below_a_table_stand_the_shares_of_full_replay_on_both_splits():
    done = [line(method="full_replay", validation=0.8, test=0.5), line(method="full", validation=0.4, test=0.6)]
    text = report.markdown(done)
    assert "as a share of full_replay's, validation / test split: full 50.0% / 120.0%." in text
    assert "share of" not in report.markdown(done[1:])


def test_lines_of_other_records_or_settings_than_todays_are_named():
    task, changes = tasks.TASKS["types"], {"new_experts": 8}
    settings = runs.settings_hash(task, methods.METHODS["gate"])
    eight = runs.settings_hash(task, methods.changed(methods.METHODS["gate"], changes))
    done = [line(task="types", method="gate", settings=settings), line(task="types", method="lora")]
    done.append(line(task="types", method="gate: 8 new experts", of="gate", changes=changes, settings=eight))
    assert "Of earlier records or settings: lora." in report.markdown(done)
    assert "earlier" not in report.markdown([done[0], done[2]])


def test_runs_with_earlier_settings_are_history():
    old, new = line(validation=0.9, test=0.9, settings="old"), line(validation=0.2, test=0.2)
    assert [run["test"] for run in report.chosen([old, new])] == [0.2]


@pytest.mark.parametrize(
    ("value", "text"), [(0.004, "+0.00%"), (-0.3, "-0.30%"), (12.34, "+12.3%"), (899, "+899.0%"), (4000, "x41")]
)
def test_percent_has_as_many_places_as_matter(value, text):
    assert report.percent(value) == text


# ---------------------------------------------------------------- training


def test_replay_takes_turns_with_the_task_batch_by_batch():
    pytest.importorskip("peft")
    import training

    assert training.with_replay([1, 2, 3, 4], ["a", "b", "c", "d"], 2) == [1, 2, "a", "b", 3, 4, "c", "d"]


@pytest.fixture
def small_data(monkeypatch, tmp_path):
    """A little of the data of the task `numbers`."""
    pytest.importorskip("peft")
    import training

    rows = {split: tasks.number_records(200)[split] for split in tasks.SPLITS}
    text = {"domain": "windows/code", "text": "def f(x):\n    return x"}
    for name, part in {"numbers": rows, "retention": [text] * 40, "documents": [text] * 4}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    monkeypatch.setattr(tasks, "data_folder", lambda: tmp_path)
    only = {"numbers": {"train": rows["train"]}}  # training, and the choice of source experts, see no other split
    monkeypatch.setattr(training, "read", lambda name: only.get(name) or tasks.read(name))


@pytest.mark.slow
def test_runs_side_by_side_train_in_folders_of_their_own():
    """The trainer refuses a folder that another process is at work in, and the benchmark starts two at once."""
    folder = "training.arguments(training.SFTConfig, tasks.TASKS['library'], 0.1, 0).output_dir"
    code = f"import sys; sys.path.append({str(forgetting.HERE)!r}); import tasks, training; print({folder})"
    command = [sys.executable, "-c", code]
    folders = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert folders[0].strip() and folders[0] != folders[1]


@pytest.mark.slow
def test_two_steps_of_two_methods(small_data):
    import run

    found = {
        name: run.run(tasks.TASKS["numbers"], methods.METHODS[name], 1e-2, seed=0, steps=2, limit=4)
        for name in ("paper", "lora_replay")
    }
    for result in found.values():
        assert result["text"]["windows/code"]["after"] != result["text"]["windows/code"]["base"] > 1
        assert 0 <= result["test"] <= 1 and not result["bit_equal"]
    assert 0 < found["paper"]["text"]["windows/code"]["captured"] <= 1
    assert found["lora_replay"]["text"]["windows/code"]["captured"] is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hidden_state_only", "plain_mean", "gate_a_layer", "gated_lora"])
def test_two_steps_of_every_variant(name, small_data, monkeypatch):
    import run

    from modeling_moextend.training import checks, gate, trainer

    replaced = {gate: ("fit_gate", "gate_inputs"), checks: ("check_frozen",), trainer: ("check_frozen",)}
    for module, functions in replaced.items():  # by a variant; a run is a process of its own
        for function in functions:
            monkeypatch.setattr(module, function, getattr(module, function))
    changes = {"variant": name, "trainer": {"gate_steps": 60, "gate_retention_weight": 0.1, "retention_tokens": 2000}}
    method = methods.changed(methods.METHODS["gate"], changes)
    result = run.run(tasks.TASKS["numbers"], method, 1e-2, seed=0, steps=2, limit=4)
    assert 0 <= result["test"] <= 1 and result["text"]["windows/code"]["after"] > 1
    assert result["trainable"] > 0


@pytest.mark.slow
def test_the_script_for_gpus_runs_tiny_without_one(tmp_path):
    output = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--sizes", "S", "--output", str(output)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    parts = json.loads(output.read_text())["parts"]
    held = [kind for kind in parts["guarantees"].values() if isinstance(kind, dict) and "left out" not in kind]
    assert len(held) >= 8 and all(value is True for kind in held for value in kind.values())
    assert parts["use"]["S"]["exclusive, fused, compiled"]["decode 1"] > 0
    assert all(run["tokens a second"] > 0 for run in parts["train"]["S"].values())
    assert parts["quantised"].keys() & {"left out", "refused", "trains"}


def test_the_script_for_gpus_asks_for_one(monkeypatch, capsys):
    import gpu

    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    with pytest.raises(SystemExit):
        gpu.parse([])
    assert "--tiny" in capsys.readouterr().err
