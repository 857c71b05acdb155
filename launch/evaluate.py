"""The verb `evaluate` as a script: python launch/evaluate.py [--config FILE] [key=value ...]."""

from torch.distributed.elastic.multiprocessing.errors import record

from hetegen_rec.cli import launch


@record
def main() -> None:
    launch("evaluate")


if __name__ == "__main__":
    main()
