import json
import math
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from verippo.core.training import metrics
from verippo.core.training.metrics import MetricLog, Stopwatch, finite, parse_loggers, start_log


def open_log(folder, *, first_step=0, loggers=()):
    return MetricLog(folder, loggers=list(loggers), first_step=first_step, config={}, run_id=None)


def rows(path):
    return [json.loads(line) for line in path.read_bytes().decode().split("\n") if line]


def test_every_row_is_on_disk_as_soon_as_it_is_written(tmp_path):
    log = open_log(tmp_path)
    for step in (1, 2):
        log.write("metrics", {"step": step, "score_mean": step / 2})
        assert rows(tmp_path / "metrics.jsonl")[-1] == {"step": step, "score_mean": step / 2}
    assert len(rows(tmp_path / "metrics.jsonl")) == 2


def start(folder, step, **config):
    start_log(
        folder, log_to="jsonl", step=step, total_steps=9, config=config, world_size=1, run_id=None
    )


def test_a_run_that_goes_on_says_where_and_what_has_changed(tmp_path, capsys):
    start(tmp_path, 0, data="a", lr=1e-6, kl={"coef": 0.03, "estimator": None})
    assert capsys.readouterr().out == ""
    start(tmp_path, 3, data="a", lr=1e-6, kl={"coef": 0.03, "estimator": None})
    assert (
        capsys.readouterr().out
        == "resuming after step 3 of 9 (use another --output to start over)\n"
    )
    start(tmp_path, 3, data="b", lr=1e-6, kl={"coef": 0.03, "estimator": "k1"}, new=1)
    assert (
        capsys.readouterr().out.splitlines()[1]
        == "changed since the last start: data a -> b, kl.estimator None -> k1"
    )
    for torn in (b"data: [", b"data", b"\xff"):
        (tmp_path / "config.yaml").write_bytes(torn)
        start(tmp_path, 3, data="c")
        assert capsys.readouterr().out.count("\n") == 1


def test_rows_after_the_resumed_step_are_dropped_from_every_file(tmp_path):
    log = open_log(tmp_path)
    for step in (1, 2, 3):
        log.write("metrics", {"step": step, "x": 1.0})
        log.write_text("samples", {"step": step, "text": "a"})
    log = open_log(tmp_path, first_step=2)
    log.write("metrics", {"step": 3, "x": 2.0})
    assert rows(tmp_path / "metrics.jsonl") == [
        {"step": 1, "x": 1.0},
        {"step": 2, "x": 1.0},
        {"step": 3, "x": 2.0},
    ]
    assert [row["step"] for row in rows(tmp_path / "samples.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    "torn", [b'{"step": 2, "te', '{"step": 2, "text": "热'.encode()[:-1], b"{", b""]
)
def test_a_line_torn_by_a_kill_is_dropped(tmp_path, torn):
    path = tmp_path / "samples.jsonl"
    path.write_bytes('{"step": 1, "text": "发热"}\n'.encode() + torn)
    open_log(tmp_path, first_step=5).write_text("samples", {"step": 6, "text": "b"})
    assert rows(path) == [{"step": 1, "text": "发热"}, {"step": 6, "text": "b"}]


def test_a_text_with_unusual_line_breaks_survives_a_resume(tmp_path):
    text = "one\u2028two\x85three\x0bfour\r\nfive\u2029"
    open_log(tmp_path).write_text("samples", {"step": 1, "text": text})
    open_log(tmp_path, first_step=1)
    assert rows(tmp_path / "samples.jsonl") == [{"step": 1, "text": text}]


def test_a_line_without_a_step_is_kept(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"q": "a question"}\n')
    open_log(tmp_path, first_step=3)
    assert rows(tmp_path / "own.jsonl") == [{"q": "a question"}]


def test_tensorboard_gets_the_numbers_under_their_prefix(tmp_path):
    log = open_log(tmp_path, loggers=["tensorboard"])
    for step in (1, 2):
        log.write(
            "metrics", {"step": step, "score_mean": 0.25 * step, "note": "text", "missing": None}
        )
    log.write("evaluation", {"step": 2, "score_mean": 0.75}, prefix="eval_")
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval_score_mean", "score_mean"]
    assert [(e.step, e.value) for e in events.Scalars("score_mean")] == [(1, 0.25), (2, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("eval_score_mean")] == [(2, 0.75)]


def test_without_tensorboard_nothing_but_jsonl_is_written(tmp_path):
    log = open_log(tmp_path)
    log.write("metrics", {"step": 1, "x": 1})
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_wandb_that_is_not_installed_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(metrics.sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install 'verippo\[wandb\]'"):
        open_log(tmp_path, loggers=["wandb"])


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    class FakeRun:
        id, logged = "abc123", []

        def log(self, numbers, step):
            self.logged.append((step, numbers))

        def finish(self):
            self.logged.append("finished")

    class FakeWandb:
        asked = []

        @classmethod
        def init(cls, **options):
            cls.asked.append((options["id"], options["resume"]))
            return FakeRun()

    monkeypatch.setitem(metrics.sys.modules, "wandb", FakeWandb)
    log = MetricLog(tmp_path, loggers=["wandb"], first_step=0, config={"a": 1}, run_id=None)
    log.write("metrics", {"step": 4, "x": 1.5})
    log.close()
    MetricLog(tmp_path, loggers=["wandb"], first_step=4, config={"a": 1}, run_id=log.run_id)
    assert FakeWandb.asked == [(None, "allow"), ("abc123", "allow")]
    assert FakeRun.logged == [(4, {"x": 1.5}), "finished"]


def test_loggers_are_read_from_a_list_and_an_unknown_one_refused():
    assert parse_loggers(" jsonl, tensorboard,") == ["jsonl", "tensorboard"]
    assert parse_loggers("") == []
    with pytest.raises(
        ValueError, match="unknown logger 'mlflow'; known are jsonl, tensorboard, wandb"
    ):
        parse_loggers("jsonl,mlflow")


def test_no_number_is_written_that_json_has_no_word_for(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        open_log(tmp_path).write("metrics", {"step": 1, "x": math.nan})
    row = {"a": math.nan, "b": -math.inf, "c": 1.5, "d": 2, "e": "nan", "f": None}
    assert finite(row) == {"a": None, "b": None, "c": 1.5, "d": 2, "e": "nan", "f": None}


def test_a_stopwatch_adds_up_each_phase_and_starts_afresh(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 12.5, 20.0, 24.0, 30.0, 31.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = Stopwatch()
    for phase in ("rollout", "train", "rollout"):
        with watch(phase):
            pass
    assert watch.take() == {"seconds_rollout": 5.0, "seconds_train": 2.5}
    with pytest.raises(RuntimeError), watch("train"):
        raise RuntimeError
    assert watch.take() == {"seconds_train": 1.0}


def test_the_environment_names_the_packages_and_the_machine():
    facts = metrics.environment(3)
    assert facts["world_size"] == 3
    assert facts["torch"].startswith("2.")
    assert set(facts) >= {
        "python",
        "transformers",
        "deepspeed",
        "sglang",
        "gpu",
        "cpu_cores",
        "memory_gib",
        "command",
    }
    assert 0.01 < metrics.peak_memory_gib() < facts["memory_gib"]
