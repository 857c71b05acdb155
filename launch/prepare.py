"""The verb `prepare` as a script: python launch/prepare.py [--config FILE] [key=value ...]."""

from torch.distributed.elastic.multiprocessing.errors import record

from hetegen_rec.cli import launch


@record
def main() -> None:
    launch("prepare")


if __name__ == "__main__":
    main()
