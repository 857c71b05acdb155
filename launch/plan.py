"""The verb `plan` as a script: python launch/plan.py [--config FILE] [key=value ...]."""

from torch.distributed.elastic.multiprocessing.errors import record

from hetegen_rec.cli import launch


@record
def main() -> None:
    launch("plan")


if __name__ == "__main__":
    main()
