import pytest

from benchmarks.throughput.arithmetic import summarise
from benchmarks.throughput.runner import interleave
from benchmarks.throughput.stopwatch import Stopwatch, Turn


def turn(*seconds):
    return Turn(list(seconds), cpu_seconds=sum(seconds) / len(seconds))


def test_every_variant_has_its_turn_in_every_round_and_every_place_in_turn():
    order = []

    def variant(name):
        def one():
            order.append(name)
            return turn(float(len(order)))

        return one

    turns = interleave({name: variant(name) for name in "abc"}, 2, 1, lambda: order.append("-"))
    assert "".join(order) == "abcabc-bca-"
    assert [one.seconds for one in turns["b"]] == [[5.0], [8.0]]


def test_ratios_are_those_of_one_repeat_and_their_median():
    base = summarise([turn(1.0), turn(10.0), turn(2.0)], 100, "median")
    other = summarise([turn(2.0), turn(11.0), turn(3.0)], 100, "median")
    ratio = other.ratio_to(base)
    assert (ratio.median, ratio.least, ratio.most) == pytest.approx((1.5, 1.1, 2.0))


def test_a_mean_counts_a_stall_and_a_median_does_not():
    turns = [turn(*[1.0] * 9, 11.0)] * 3
    mean, median = summarise(turns, 100, "mean"), summarise(turns, 100, "median")
    assert (mean.step, mean.rows_per_second) == (2.0, 50.0)
    assert (median.step, median.rows_per_second) == (1.0, 100.0)


def test_percentiles_are_of_single_steps_of_all_repeats():
    summary = summarise([turn(*range(0, 50)), turn(*range(50, 101))], 100, "median")
    assert (summary.p50, summary.p90, summary.p99) == (50.0, 90.0, 99.0)
    assert summary.num_steps == 101


def test_a_stopwatch_times_from_one_batch_to_the_next_and_starts_anew():
    stopwatch = Stopwatch()
    for count in (5, 3):
        assert list(stopwatch.watch(iter(range(count)))) == list(range(count))
        assert len(stopwatch.read(skip=2).seconds) == count - 2
