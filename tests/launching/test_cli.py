"""The command line: words to verbs, the log, and what a failing rank does to the job."""

import errno
import json
import logging
import re

import pytest
from tiny_run import write_tiny

from hetegen_rec import cli, terminal
from hetegen_rec.data.errors import DataError
from hetegen_rec.distributed.runtime import PeerFailedError, Runtime
from hetegen_rec.jobs import Job

GLOO = "[/build/third_party/gloo/gloo/transport/tcp/pair.cc:553]"
LOST = r"error: rank 0 lost another rank: Read error \[10\.0\.0\.2\]:31: reset\. What happened .*\n"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that reach the verbs, which do nothing here."""
    jobs: list[Job] = []
    for verb, (_, text) in cli.VERBS.items():
        monkeypatch.setitem(cli.VERBS, verb, (jobs.append, text))
    return jobs


@pytest.fixture
def config(tmp_path) -> str:
    return str(write_tiny(tmp_path))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "{config}", "train.max_steps=3", "seed=7"],
        ["train.max_steps=3", "--config", "{config}", "seed=7"],
        ["train.max_steps=3", "seed=7", "--config", "{config}"],
        ["--config", "{config}", "--", "train.max_steps=3", "seed=7"],
    ],
)
def test_overrides_may_stand_anywhere(arguments, config, seen):
    assert cli.main(["pretrain", *[word.format(config=config) for word in arguments]]) == 0
    assert (seen[0].config.train.max_steps, seen[0].config.seed) == (3, 7)


def test_options_reach_the_job(config, seen):
    words = ["--stage", "joint", "--input", "a.csv", "--input", "b.csv", "--output", "scores", "seed=2"]
    assert cli.main(["predict", "--config", config, *words]) == 0
    (job,) = seen
    assert (job.stage, list(job.inputs), job.output, job.config.seed) == (
        "joint",
        ["a.csv", "b.csv"],
        "scores",
        2,
    )


@pytest.mark.parametrize("verb", ["pretrain", "finetune", "joint", "scratch", "demo"])
def test_training_starts_anew_only_if_asked(verb, config, seen):
    assert cli.main([verb, "--config", config]) == 0
    assert cli.main([verb, "--config", config, "--fresh"]) == 0
    assert [job.fresh for job in seen] == [False, True]


@pytest.mark.parametrize("verb", ["pretrain", "scratch", "evaluate"])
def test_the_report_can_be_left_out(verb, config, seen):
    assert cli.main([verb, "--config", config]) == 0
    assert cli.main([verb, "--config", config, "--no-report"]) == 0
    assert [job.with_report for job in seen] == [True, False]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "VERB"),
        (["train"], "invalid choice: 'train'"),
        (["pretrain", "--stage", "joint"], "unrecognized arguments: --stage"),
        (["evaluate", "--fresh"], "unrecognized arguments: --fresh"),
        (["predict", "--split", "holdout"], "invalid choice: 'holdout'"),
        (["pretrain", "--ranks", "0"], "--ranks 0"),
        (["pretrain", "--ranks", "2", "--max-restarts", "-1"], "--max-restarts -1"),
    ],
)
def test_wrong_words_exit_with_2(arguments, says, capsys, seen):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err
    assert not seen


def test_help_lists_every_verb(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert not stopped.value.code
    shown = capsys.readouterr().out
    assert all(f"\n  {verb} " in shown for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_offers_ranks_to_the_verbs_that_take_them(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([verb, "--help"])
    assert not stopped.value.code
    shown = capsys.readouterr().out
    assert ("--ranks" in shown) == ("--max-restarts" in shown) == (verb not in ("plan", "export"))


def test_missing_default_configuration_says_what_to_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare"]) == 2
    assert "name a configuration with --config" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--ranks", "--max-restarts"])
def test_ranks_within_a_job_are_refused(option, config, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--config", config, option, "2"])
    assert "leave them out under torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "ranks", "max_restarts"),
    [
        (["--ranks", "3", "seed=1"], 3, 0),
        (["--max-restarts", "2"], 1, 2),
        (["--ranks", "2", "--max-restarts", "4"], 2, 4),
    ],
)
def test_ranks_start_the_same_command_once_each(words, ranks, max_restarts, config, monkeypatch):
    started = []
    monkeypatch.setattr(cli, "relaunch", lambda *call: started.append(call) or 5)
    given = ["pretrain", "--config", config, *words]
    assert cli.main(given) == 5
    alone = [*given, "--ranks", "1", "--max-restarts", "0"]
    assert started == [("hetegen_rec.cli", ranks, alone, max_restarts)]


def test_an_error_that_a_person_can_mend_reaches_the_summary_of_torchrun(config, tmp_path, monkeypatch):
    def fail(job: Job) -> None:
        raise DataError("row 7")

    monkeypatch.setitem(cli.VERBS, "prepare", (fail, ""))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert cli.main(["prepare", "--config", config]) == 2
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "DataError: row 7"


def test_all_but_rank_0_are_silent_about_a_wrong_configuration(config, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.main(["prepare", "--config", config, "nonsense=1"]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (DataError("row 7"), 2, "error: row 7\n"),
        (PeerFailedError("reading failed on rank 3"), 3, ""),
        (RuntimeError(f"{GLOO} Read error [10.0.0.2]:31: reset. This is typically caused by"), 3, LOST),
    ],
)
def test_expected_errors_are_one_line_from_the_rank_that_failed(
    error, code, told, config, monkeypatch, capsys
):
    def fail(job: Job) -> None:
        raise error

    monkeypatch.setitem(cli.VERBS, "prepare", (fail, ""))
    assert cli.main(["prepare", "--config", config]) == code
    assert re.fullmatch(told, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("named", "told"),
    [(["part-0"], ": 'part-0'\n"), ([], "; this job writes to scores, runs/full, ")],
    ids=["file", "no file"],
)
def test_a_full_disk_is_told_with_the_file_or_where_the_job_writes(named, told, config, monkeypatch, capsys):
    def fail(job: Job) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", *named)

    monkeypatch.setitem(cli.VERBS, "predict", (fail, ""))
    assert cli.main(["predict", "--config", config, "--output", "scores", "run_dir=runs/full"]) == 2
    assert f"error: [Errno 28] No space left on device{told}" in capsys.readouterr().err


@pytest.mark.parametrize("text", [f"{GLOO} Connection closed by peer", "pipeline broke"])
def test_what_follows_from_a_peers_failure_is_not_told(text, config, monkeypatch, capsys):
    def fail(job: Job) -> None:
        job.runtime.is_first_to_fail()  # as another rank would note
        raise RuntimeError(text)

    monkeypatch.setitem(cli.VERBS, "prepare", (fail, ""))
    assert cli.main(["prepare", "--config", config]) == 3
    assert capsys.readouterr().err == ""


def test_unexpected_errors_keep_their_traceback(config, monkeypatch):
    def fail(job: Job) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setitem(cli.VERBS, "prepare", (fail, ""))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["prepare", "--config", config])


def test_interrupted_by_the_keyboard_ends_without_a_traceback(config, monkeypatch, capsys):
    def interrupt(job: Job) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "prepare", (interrupt, ""))
    assert cli.main(["prepare", "--config", config]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (DataError("row 7"), 2, "error: row 7\n"),
        (RuntimeError("a bug"), 1, "Traceback .*RuntimeError: a bug\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_a_failed_rank_does_not_wait_for_the_others_where_groups_end_together(
    error, code, told, config, monkeypatch, capsys
):
    """As those of NCCL do: to end them in order would be to wait for ranks that wait for this one."""

    def fail(job: Job) -> None:
        monkeypatch.setattr(Runtime, "ends_with_others", True)
        raise error

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setitem(cli.VERBS, "prepare", (fail, ""))
    with pytest.raises(SystemExit) as left:
        cli.main(["prepare", "--config", config])
    assert left.value.code == code
    assert re.fullmatch(told, capsys.readouterr().err, re.DOTALL)


def test_log_of_rank_0_is_shown_and_of_others_only_trouble(capsys):
    ours, other = logging.getLogger("hetegen_rec.probe"), logging.getLogger("somebody.else")
    with terminal.show_log(rank=0):
        ours.info("half way")
        other.info("noise")
    with terminal.show_log(rank=3):
        ours.info("half way, too")
        ours.warning("out of paper")
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("half way")
    assert second.startswith("[rank 3]")
    assert second.endswith("out of paper")


def test_log_settings_end_with_the_context():
    logger = logging.getLogger("hetegen_rec")
    before = (logger.handlers, logger.level, logger.propagate)
    with terminal.show_log(rank=0):
        assert not logger.propagate
    assert (logger.handlers, logger.level, logger.propagate) == before
