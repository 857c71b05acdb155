from benchmarks.shipped_configs import table
from hetegen_rec.evaluation.results import write_evaluation


def evaluated(stage_dir, auc):
    metrics = {"auc": auc, "gauc": None, "log_loss": 0.5}
    write_evaluation(
        stage_dir,
        {
            "run": "ads",
            "stage": stage_dir.name,
            "checkpoint": "",
            "step": 1,
            "splits": {"valid": metrics, "test": metrics},
        },
    )


def test_a_line_is_the_mean_over_the_seeds_that_were_run(tmp_path):
    for seed, auc in enumerate((0.70, 0.72)):
        evaluated(tmp_path / "ads" / f"seed-{seed}" / "finetune", auc)
    evaluated(tmp_path / "ads" / "seed-0" / "scratch", 0.69)
    lines = table(tmp_path, ["ads"], seeds=3)
    assert lines[2] == "| ads | finetune | 2 | 0.7100 ± 0.0141 | 0.7100 ± 0.0141 | n/a | 0.5000 ± 0.0000 |"
    assert lines[3].startswith("| ads | scratch | 1 | 0.6900 ± 0.0000 |")
    assert len(lines) == 4
