from dataclasses import replace

from multirank import run_ranks

from benchmarks.checkpoint_pause import Repeat, main, report

TAKEN = Repeat(
    step_alone=0.5,
    synchronous=4.0,
    synchronous_memory=0,
    pause=0.4,
    background=6.0,
    background_memory=1 << 20,
    step_meanwhile=0.75,
)


def test_the_first_save_stands_apart_and_shares_are_those_of_one_repeat():
    first = replace(TAKEN, pause=2.0, background_memory=100 << 20)
    lines = report([first, TAKEN, replace(TAKEN, pause=1.2, synchronous=6.0)], 1 << 30, ranks=2)
    assert "| training waits: `CheckpointWriter.save` | 0.8 s | 0.4 to 1.2 |" in lines
    assert "| training waits: the first `CheckpointWriter.save`, which makes the buffers | 2 s |  |" in lines
    assert "| a step during the background write / alone | 1.5 times | 1.5 to 1.5 |" in lines
    assert "| memory of a rank: first background save, buffers included | 100 MiB |  |" in lines
    assert "| memory of a rank: later ones, beyond the buffers | 1 MiB | 1 to 1 |" in lines
    assert lines[-1].startswith("Training waits for 15 % of")
    assert lines[-1].endswith("for 50 % at the first one.")


def measure(options):
    assert main(options) == 0


def test_it_runs_on_two_ranks_and_leaves_the_table_only(tmp_path):
    options = ["--mib", "2", "--repeats", "2", "--steps", "1", "--directory", str(tmp_path / "scratch")]
    run_ranks(2, measure, [*options, "--out", str(tmp_path / "table.md")])
    text = (tmp_path / "table.md").read_text()
    assert "on 2 ranks, 2 repeats." in text
    assert "`torchrun --nproc-per-node 2 -m benchmarks.checkpoint_pause --mib 2" in text
    assert not list((tmp_path / "scratch").iterdir())
